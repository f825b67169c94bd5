//! Trouble whose cause the operator must read: in the log, in `/readyz`, in what a command prints.

use std::error::Error;
use std::process::Command;
use std::time::Duration;

use devstack::{Binary, Port, Process, Redis, RedisOptions, Stack, StackOptions};
use service::Report;
use sqlx::PgPool;
use tests::{Daemon, Pair, program};

async fn refused(pool: &PgPool, sql: &'static str) -> sqlx::Error {
    sqlx::raw_sql(sql).execute(pool).await.expect_err("Postgres refuses it")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_postgres_has_its_detail_and_hint_and_no_line_of_its_source() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let pool = PgPool::connect(&stack.postgres_url()).await.unwrap();
    let error = refused(&pool, "create table t (id int primary key); insert into t values (1), (1)").await;
    let report = Report::of(&error).to_string();
    assert!(error.to_string().contains(" at line "), "sqlx does not add the line any more: {error}");
    assert!(report.contains("detail: Key (id)=(1) already exists."), "{report}");
    assert!(!report.contains(" at line "), "{report}");

    let error = anyhow::Error::from(refused(&pool, "select no_such_function()").await).context("cannot look");
    let report = Report::of(error.as_ref() as &(dyn Error + 'static)).to_string();
    assert!(report.starts_with("cannot look: ") && report.contains("; hint: "), "{report}");
    assert!(!report.contains(" at line "), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_down_is_named_with_its_address_and_why() {
    let pair = Pair::start().await.unwrap();
    let address = pair.stack.redis.address().to_string();
    pair.stack.redis.kill().unwrap();
    let said = pair.subscriber.until_not_ready_because("Connection refused").await;
    assert!(said.contains(&address), "{said}");
    until_logged(&pair.subscriber, &[&address, "Connection refused"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_is_down_is_named_with_its_address_and_why() {
    let pair = Pair::start().await.unwrap();
    let address = pair.stack.postgres.address().to_string();
    pair.stack.postgres.kill().unwrap();
    let said = pair.relay.until_not_ready_because("Connection refused").await;
    assert!(said.contains(&address), "{said}");
    until_logged(&pair.relay, &[&address, "Connection refused"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nats_that_is_down_is_named_with_its_address_and_why_and_no_right_is_blamed() {
    let pair = Pair::start().await.unwrap();
    let address = pair.stack.nats.address().to_string();
    pair.stack.nats.kill().unwrap();
    for daemon in [&pair.relay, &pair.subscriber] {
        let said = daemon.until_not_ready_because("Connection refused").await;
        assert!(said.contains(&address) && !said.contains("ermission"), "{said}");
        until_logged(daemon, &[&address, "Connection refused"]).await;
        let log = daemon.process().log();
        let of_client = log.lines().filter(|line| line.contains("async_nats")).count();
        assert_eq!(of_client, 0, "the client library logs each attempt:\n{log}");
    }
    assert!(!pair.subscriber.process().log().contains("ermission"));
}

/// A NATS account with limits, and what the daemons must say when they meet them.
#[tokio::test(flavor = "multi_thread")]
async fn limits_of_jetstream_are_named() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let pool = PgPool::connect(&stack.postgres_url()).await.unwrap();
    outbox::migrate(&pool).await.unwrap();
    let nats = Accounts::start(&stack).await;
    let cases: [(&str, &str, &[&str]); 3] = [
        ("relay", "none", &["not enabled for this NATS account", "10039"]),
        ("subscriber", "none", &["not enabled for this NATS account", "10039"]),
        ("relay", "full", &["INVALIDATIONS", "max_streams", "10027"]),
    ];
    let config = r#"{"name":"INVALIDATIONS","subjects":["invalidation.>"],"retention":"limits","storage":"file",
        "max_bytes":-1,"max_age":0,"max_consumers":-1,"num_replicas":1,"discard":"new"}"#;
    nats.request("small", "$JS.API.STREAM.CREATE.INVALIDATIONS", config).await;
    nats.request("full", "$JS.API.STREAM.CREATE.X", r#"{"name":"X","subjects":["x"],"num_replicas":1}"#)
        .await;
    for (name, user, words) in cases {
        let error = failure(name, &stack, &nats.url(user)).await;
        for word in words {
            assert!(error.contains(word), "{name} as {user}: {error}");
        }
        assert!(!error.contains("ermission"), "{name} as {user}: {error}");
    }
    // The stream of dead letters is created when there is one to keep.
    let variables = [("NATS_URL", nats.url("small")), ("REDIS_URL", stack.redis_url())];
    let subscriber = Daemon::spawn(stack.directory(), "subscriber", &variables).unwrap();
    subscriber.until_ready().await;
    nats.request("small", "invalidation.default", "garbage").await;
    until_logged(&subscriber, &["INVALIDATIONS_DEAD", "limit of the account"]).await;
}

/// A server whose users `none`, `full` and `small` are of accounts without JetStream, with one stream, with 10 MB.
struct Accounts {
    port: Port,
    _process: Process,
}

impl Accounts {
    async fn start(stack: &Stack) -> Self {
        let port = Port::reserve().unwrap();
        let configuration = format!(
            r#"listen: "{}"
            jetstream {{ store_dir: "{}" }}
            accounts {{
                NONE {{ users = [{{ user: none, password: x }}] }}
                FULL {{ users = [{{ user: full, password: x }}], jetstream: {{ max_streams: 1 }} }}
                SMALL {{ users = [{{ user: small, password: x }}], jetstream: {{ max_file: 10485760 }} }}
            }}"#,
            port.address(),
            stack.directory().path().join("accounts-data").display()
        );
        let file = stack.directory().path().join("accounts.conf");
        std::fs::write(&file, configuration).unwrap();
        let mut command = Command::new(Binary::NatsServer.find().unwrap());
        command.arg("-c").arg(&file);
        let process = Process::spawn(stack.directory(), "nats-accounts", command).unwrap();
        process.wait_for_log("Server is ready", Duration::from_secs(20)).await.unwrap();
        Self { port, _process: process }
    }

    fn url(&self, user: &str) -> String {
        format!("nats://{user}:x@{}", self.port.address())
    }

    async fn request(&self, user: &str, subject: &'static str, payload: impl Into<String>) {
        let options = async_nats::ConnectOptions::with_user_and_password(user.to_owned(), "x".to_owned());
        let client = options.connect(self.port.address().to_string()).await.unwrap();
        client.request(subject, payload.into().into()).await.unwrap();
    }
}

/// Runs a daemon that cannot start, and returns its last word.
async fn failure(name: &str, stack: &Stack, nats_url: &str) -> String {
    let mut command = Command::new(program(name).unwrap());
    command
        .env("DATABASE_URL", stack.postgres_url())
        .env("NATS_URL", nats_url)
        .env("REDIS_URL", stack.redis_url())
        .env("HTTP_ADDR", "127.0.0.1:0")
        .env("RELAY_STARTUP_TIMEOUT", "1s")
        .env("SUBSCRIBER_STARTUP_TIMEOUT", "1s")
        .env_remove("RUST_LOG");
    let daemon = Process::spawn(stack.directory(), name, command).unwrap();
    let status = daemon.wait_exit(tests::SETTLED).await.unwrap();
    let error = daemon.log();
    assert_eq!(status.code(), Some(1), "{error}");
    error.lines().last().unwrap_or_default().to_owned()
}

/// Answers of a Redis that is there and does not do what it should.
#[tokio::test(flavor = "multi_thread")]
async fn what_redis_answers_is_named() {
    let pair = Pair::start().await.unwrap();
    let redis = &pair.stack.redis;
    let cases: [(&[&str], &[&str], &str); 3] = [
        (
            &["CONFIG", "SET", "min-replicas-to-write", "1"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
            "NOREPLICAS",
        ),
        (&["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"], "replica"),
        (&["ACL", "SETUSER", "default", "-@write"], &["ACL", "SETUSER", "default", "+@write"], "NOPERM"),
    ];
    for (number, (spoil, mend, word)) in cases.into_iter().enumerate() {
        redis.command(spoil).await.unwrap();
        let key = format!("user:{number}");
        pair.enqueue(&[&key]).await.unwrap();
        pair.subscriber.until_not_ready_because(word).await;
        until_logged(&pair.subscriber, &["WARN", word]).await;
        redis.command(mend).await.unwrap();
        pair.subscriber.until_ready().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_trouble_of_redis_is_named() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let file = |name: &str| format!("{}/../crates/cache/tests/tls/{name}", env!("CARGO_MANIFEST_DIR"));
    let port = Port::reserve().unwrap();
    let configuration = format!(
        "tls-port {}\ntls-ca-cert-file {}\ntls-cert-file {}\ntls-key-file {}\ntls-auth-clients yes\n",
        port.address().port(),
        file("ca.pem"),
        file("server.pem"),
        file("server.key"),
    );
    let redis = Redis::start_in(stack.directory(), RedisOptions { configuration, ..Default::default() });
    let _redis = match redis.await {
        Err(error) if format!("{error:#}").contains("TLS") || format!("{error:#}").contains("tls-") => {
            eprintln!("this redis-server is built without TLS: no trouble with it can be made");
            return;
        }
        redis => redis.unwrap(),
    };
    let secured = port.address().port();
    let cases = [
        (format!("rediss://127.0.0.1:{secured}"), "ca.pem", "the server asks for a client certificate"),
        (format!("rediss://127.0.0.1:{secured}"), "client.pem", "invalid peer certificate"),
    ];
    for (url, authority, expected) in cases {
        let variables = [
            ("REDIS_URL", url.clone()),
            ("REDIS_CA", file(authority)),
            ("NATS_URL", stack.nats_url()),
            ("SUBSCRIBER_STARTUP_TIMEOUT", "1s".to_owned()),
        ];
        let subscriber = Daemon::spawn(stack.directory(), "subscriber", &variables).unwrap();
        until_logged(&subscriber, &[expected]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_judges_the_account_and_what_waits() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let pool = PgPool::connect(&stack.postgres_url()).await.unwrap();
    outbox::migrate(&pool).await.unwrap();
    let old = "insert into outbox.events (id, topic, keys, xid, created_at) values \
               (gen_random_uuid(), 'default', '{user:1}', pg_current_xact_id(), now() - interval '1 hour')";
    sqlx::raw_sql(old).execute(&pool).await.unwrap();
    let nats = Accounts::start(&stack).await;
    nats.request("small", "$JS.API.STREAM.CREATE.X", r#"{"name":"X","subjects":["x"],"num_replicas":1}"#)
        .await;
    for _ in 0..9 {
        nats.request("small", "x", "a megabyte".repeat(100_000)).await;
    }
    let report = printed("relay", &["doctor"], &stack, &nats.url("small")).await;
    for words in [
        "!!  account",
        "nearly full",
        "of 10.5 MB",
        "!!  backlog",
        "!!  stream         INVALIDATIONS does not exist",
    ] {
        assert!(report.contains(words), "no {words:?} in:\n{report}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_of_others_cannot_command_the_terminal() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let pool = PgPool::connect(&stack.postgres_url()).await.unwrap();
    outbox::migrate(&pool).await.unwrap();
    let bad = "insert into outbox.dead_letters (id, seq, topic, keys, xid, created_at, namespace, reason) values \
               ('018f0000-0000-7000-8000-000000000001', 1, E'to\\npic', array[E'k\\x1b[2J\\nforged', E'\\u202eb'], \
               pg_current_xact_id(), now(), false, E'rea\\x1b]0;x\\x07son')";
    sqlx::raw_sql(bad).execute(&pool).await.unwrap();
    let show = ["dead", "show", "018f0000-0000-7000-8000-000000000001"];
    for (arguments, lines) in [(&["dead", "list"][..], 1), (&show[..], 7)] {
        let printed = printed("relay", arguments, &stack, &stack.nats_url()).await;
        let is_harmless = |c: char| c == '\n' || !(c.is_control() || c == '\u{202e}');
        assert!(printed.chars().all(is_harmless), "{printed:?}");
        assert!(printed.contains("\\u{1b}[2J\\nforged"), "{printed}");
        assert_eq!(printed.lines().count(), lines, "{printed}");
    }
}

/// Runs a command and returns what it prints.
async fn printed(name: &str, arguments: &[&str], stack: &Stack, nats_url: &str) -> String {
    let mut command = Command::new(program(name).unwrap());
    command
        .args(arguments)
        .env("DATABASE_URL", stack.postgres_url())
        .env("NATS_URL", nats_url)
        .env_remove("RUST_LOG");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until one line of the log has all the words.
async fn until_logged(daemon: &Daemon, words: &[&str]) {
    devstack::eventually(tests::SETTLED, async || {
        let log = daemon.process().log();
        let is_there = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        if is_there { Ok(()) } else { Err(format!("no line with {words:?} in:\n{log}")) }
    })
    .await;
}
