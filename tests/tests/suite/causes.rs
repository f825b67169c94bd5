//! Trouble whose cause the operator must read: in the log, in `/readyz`, in what a command prints.

use std::error::Error;
use std::process::Command;
use std::time::Duration;

use devstack::{Binary, Port, Process, Stack, StackOptions};
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
    assert!(said.contains(&format!("cannot connect to {address}")), "{said}");
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
    let cases: [(&str, &str, &[&str]); 4] = [
        ("relay", "none", &["not enabled for this NATS account", "10039"]),
        ("subscriber", "none", &["not enabled for this NATS account", "10039"]),
        ("relay", "full", &["INVALIDATIONS", "max_streams", "10027"]),
        ("subscriber", "small", &["INVALIDATIONS_DEAD", "MB of dead letters", "limit of the account"]),
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

    async fn request(&self, user: &str, subject: &'static str, payload: &'static str) {
        let options = async_nats::ConnectOptions::with_user_and_password(user.to_owned(), "x".to_owned());
        let client = options.connect(self.port.address().to_string()).await.unwrap();
        client.request(subject, payload.into()).await.unwrap();
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
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    error.lines().last().unwrap_or_default().to_owned()
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
