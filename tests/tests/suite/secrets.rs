//! Secrets: never in what the daemons write, and read again when they change.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use devstack::proxy::FaultProxy;
use devstack::{Binary, Port, Process, Stack, StackDirectory, StackOptions, eventually};
use nkeys::KeyPair;
use serde_json::{Value, json};
use tests::{Daemon, Pair, SETTLED};

/// A NATS server whose configuration the test writes.
struct Nats {
    port: Port,
    file: PathBuf,
    process: Process,
}

impl Nats {
    async fn start(directory: &Arc<StackDirectory>, configuration: &str) -> Self {
        Self::start_in_domain(directory, "", configuration).await
    }

    async fn start_in_domain(directory: &Arc<StackDirectory>, domain: &str, configuration: &str) -> Self {
        let port = Port::reserve().unwrap();
        let name = format!("nats-{}", port.address().port());
        let file = directory.path().join(format!("{name}.conf"));
        let domain = if domain.is_empty() { String::new() } else { format!(", domain: {domain}") };
        let address = port.address();
        let data = directory.path().join(format!("{name}-data"));
        let jetstream = format!("jetstream {{ store_dir: \"{}\"{domain} }}", data.display());
        std::fs::write(
            &file,
            format!("server_name: {name}\nlisten: \"{address}\"\n{jetstream}\n{configuration}\n"),
        )
        .unwrap();
        let mut command = Command::new(Binary::NatsServer.find().unwrap());
        command.arg("-c").arg(&file);
        let process = Process::spawn(directory, &name, command).unwrap();
        process.wait_for_log("Server is ready", Duration::from_secs(20)).await.unwrap();
        Self { port, file, process }
    }

    /// Replaces a text of the configuration and starts the server again.
    async fn restart_with(&self, before: &str, after: &str) {
        let text = std::fs::read_to_string(&self.file).unwrap();
        assert!(text.contains(before), "{text}");
        std::fs::write(&self.file, text.replace(before, after)).unwrap();
        self.process.kill().unwrap();
        self.process.start().unwrap();
        self.process.wait_for_log("Server is ready", Duration::from_secs(20)).await.unwrap();
    }

    fn url(&self, user: &str) -> String {
        format!("nats://{user}{}", self.port.address())
    }
}

async fn stack() -> Stack {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let pool = sqlx::PgPool::connect(&stack.postgres_url()).await.unwrap();
    outbox::migrate(&pool).await.unwrap();
    stack
}

async fn until_logged_again(daemon: &Daemon, text: &str, times: usize) {
    eventually(SETTLED, async || {
        let log = daemon.process().log();
        let count = log.matches(text).count();
        if count >= times { Ok(()) } else { Err(format!("{count} times {text:?} in:\n{log}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_the_log_at_any_level_or_in_what_is_served() {
    let stack = stack().await;
    let users = "authorization { user: app, password: \"nats-s3cret\" }";
    let nats = Nats::start(stack.directory(), users).await;
    stack
        .redis
        .command(&["ACL", "SETUSER", "app", "on", ">redis-s3cret", "~*", "&*", "+@all"])
        .await
        .unwrap();
    let postgres = FaultProxy::start(stack.postgres.address()).await.unwrap();
    let redis = FaultProxy::start(stack.redis.address()).await.unwrap();
    let broker = FaultProxy::start(nats.port.address()).await.unwrap();
    let database = stack.postgres_url().replace("postgres@", "postgres:postgres-s3cret@");
    let variables = [
        (
            "DATABASE_URL",
            database.replace(&stack.postgres.address().to_string(), &postgres.addr().to_string()),
        ),
        ("NATS_URL", format!("nats://app:nats-s3cret@{}", broker.addr())),
        ("REDIS_URL", format!("redis://app:redis-s3cret@{}", redis.addr())),
        ("RUST_LOG", "trace,async_nats=trace".to_owned()),
    ];
    let relay = Daemon::spawn(stack.directory(), "relay", &variables).unwrap();
    let subscriber = Daemon::spawn(stack.directory(), "subscriber", &variables).unwrap();
    let daemons = [&relay, &subscriber];
    for daemon in daemons {
        daemon.until_ready().await;
    }
    for proxy in [&postgres, &redis, &broker] {
        proxy.reset_connections();
    }
    for daemon in daemons {
        until_logged_again(daemon, "connected to NATS", 2).await;
        daemon.until_ready().await;
        let served = [daemon.get("/metrics").await.unwrap().1, daemon.get("/readyz").await.unwrap().1];
        let log = daemon.process().log();
        for secret in ["nats-s3cret", "postgres-s3cret", "redis-s3cret"] {
            let line = log.lines().find(|line| line.contains(secret));
            assert!(line.is_none(), "{line:?}");
            assert!(!served.concat().contains(secret));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nats_password_that_changed_on_disk_is_used_at_the_next_attempt_to_connect() {
    let stack = stack().await;
    let nats = Nats::start(stack.directory(), "authorization { user: app, password: first }").await;
    let (password, url) =
        (stack.directory().path().join("password"), stack.directory().path().join("nats-url"));
    let write = |word: &str| {
        std::fs::write(&password, format!("{word}\n")).unwrap();
        std::fs::write(&url, nats.url(&format!("app:{word}@"))).unwrap();
    };
    write("first");
    let of_relay = [
        ("DATABASE_URL", stack.postgres_url()),
        ("NATS_URL", nats.url("")),
        ("NATS_USER", "app".to_owned()),
        ("NATS_PASSWORD_FILE", password.display().to_string()),
    ];
    let of_subscriber = [("REDIS_URL", stack.redis_url()), ("NATS_URL_FILE", url.display().to_string())];
    let relay = Daemon::spawn(stack.directory(), "relay", &of_relay).unwrap();
    let subscriber = Daemon::spawn(stack.directory(), "subscriber", &of_subscriber).unwrap();
    relay.until_ready().await;
    subscriber.until_ready().await;

    nats.restart_with("password: first", "password: second").await;
    for daemon in [&relay, &subscriber] {
        let said = daemon.until_not_ready_because("uthorization").await;
        assert!(!said.contains("first"), "{said}");
    }
    write("second");
    relay.until_ready().await;
    subscriber.until_ready().await;
}

/// The keys of an operator with one account for everything, and one for the system.
struct Keys {
    operator: KeyPair,
    account: KeyPair,
    system: KeyPair,
}

impl Keys {
    fn new() -> Self {
        Self {
            operator: KeyPair::new_operator(),
            account: KeyPair::new_account(),
            system: KeyPair::new_account(),
        }
    }

    fn configuration(&self) -> String {
        let any = json!({ "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
            "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1 });
        let operator = token(&self.operator, &self.operator, None, json!({ "type": "operator" }));
        let account = json!({ "type": "account", "limits": any });
        let account = token(&self.operator, &self.account, None, account);
        let system = token(&self.operator, &self.system, None, json!({ "type": "account" }));
        format!(
            "operator: {operator}\nsystem_account: {1}\nresolver: MEMORY\nresolver_preload: {{ {0}: {account}, {1}: {system} }}",
            self.account.public_key(),
            self.system.public_key(),
        )
    }

    /// Writes the file of a new user.
    fn write_credentials(&self, file: &Path, valid_for: Option<i64>) {
        let user = KeyPair::new_user();
        let rights = json!({ "type": "user", "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {} });
        let jwt = token(&self.account, &user, valid_for, rights);
        let seed = user.seed().unwrap();
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        std::fs::write(file, text).unwrap();
    }
}

/// A JWT of `subject`, signed by `issuer`.
fn token(issuer: &KeyPair, subject: &KeyPair, valid_for: Option<i64>, mut nats: Value) -> String {
    nats["version"] = 2.into();
    let now = chrono::Utc::now().timestamp();
    let mut claims = json!({ "jti": subject.public_key(), "iat": now, "iss": issuer.public_key(),
        "sub": subject.public_key(), "name": "test", "nats": nats });
    if let Some(seconds) = valid_for {
        claims["exp"] = (now + seconds).into();
    }
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", encode(&json!({ "typ": "JWT", "alg": "ed25519-nkey" })), encode(&claims));
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(text.as_bytes()).unwrap());
    format!("{text}.{signature}")
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_were_renewed_on_disk_are_used_when_the_old_ones_expire() {
    let stack = stack().await;
    let keys = Keys::new();
    let nats = Nats::start(stack.directory(), &keys.configuration()).await;
    let file = stack.directory().path().join("user.creds");
    keys.write_credentials(&file, Some(15));
    let common = [("NATS_URL", nats.url("")), ("NATS_CREDS", file.display().to_string())];
    let of = |name, url| [common.as_slice(), &[(name, url)]].concat();
    let relay = Daemon::spawn(stack.directory(), "relay", &of("DATABASE_URL", stack.postgres_url())).unwrap();
    let subscriber =
        Daemon::spawn(stack.directory(), "subscriber", &of("REDIS_URL", stack.redis_url())).unwrap();
    relay.until_ready().await;
    subscriber.until_ready().await;
    // Expired, and not renewed yet: neither may give up.
    relay.until_not_ready_because("uthorization").await;
    keys.write_credentials(&file, None);
    for daemon in [&relay, &subscriber] {
        daemon.until_ready().await;
        until_logged_again(daemon, "connected to NATS", 2).await;
        assert!(!daemon.process().log().contains("SEED"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_unusable_file_is_named_at_once_as_a_fault_of_the_options() {
    let stack = stack().await;
    let empty = stack.directory().path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let empty = empty.display().to_string();
    let cases: [(&[(&str, &str)], &str); 6] = [
        (&[("NATS_CA", "/nowhere/ca.pem")], "cannot read /nowhere/ca.pem (NATS_CA): No such file"),
        (&[("NATS_CREDS", "/nowhere/x.creds")], "cannot read /nowhere/x.creds (NATS_CREDS): No such file"),
        (&[("NATS_CREDS", &empty)], "it has no part `BEGIN NATS USER JWT`"),
        (&[("NATS_URL_FILE", "/nowhere/url"), ("NATS_URL", "")], "cannot read /nowhere/url (NATS_URL_FILE)"),
        (
            &[("NATS_USER", "a"), ("NATS_PASSWORD_FILE", "/nowhere/p")],
            "cannot read /nowhere/p (NATS_PASSWORD_FILE)",
        ),
        (&[("NATS_CERT", "/nowhere/c"), ("NATS_KEY", "/nowhere/k")], "cannot read /nowhere/c (NATS_CERT)"),
    ];
    for name in ["relay", "subscriber"] {
        for (wrong, expected) in cases {
            let mut command = Command::new(tests::program(name).unwrap());
            command
                .env("DATABASE_URL", stack.postgres_url())
                .env("NATS_URL", stack.nats_url())
                .env("REDIS_URL", stack.redis_url())
                .env("HTTP_ADDR", "127.0.0.1:0")
                .envs(wrong.iter().copied());
            let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(error.contains(expected), "{name} {wrong:?}: {error}");
            assert_eq!(output.status.code(), Some(2), "{name} {wrong:?}: {error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_of_a_hub_is_used_from_a_leaf_node_by_its_domain() {
    let stack = stack().await;
    let leaves = Port::reserve().unwrap();
    let hub = Nats::start_in_domain(
        stack.directory(),
        "hub",
        &format!("leafnodes {{ listen: \"{}\" }}", leaves.address()),
    )
    .await;
    let remote = format!("leafnodes {{ remotes: [ {{ url: \"nats-leaf://{}\" }} ] }}", leaves.address());
    let leaf = Nats::start_in_domain(stack.directory(), "leaf", &remote).await;
    leaf.process.wait_for_log("Leafnode connection created", Duration::from_secs(20)).await.unwrap();
    let domain = ("NATS_JS_DOMAIN", "hub".to_owned());
    let of_relay = [("DATABASE_URL", stack.postgres_url()), ("NATS_URL", hub.url("")), domain.clone()];
    let of_subscriber = [("REDIS_URL", stack.redis_url()), ("NATS_URL", leaf.url("")), domain];
    let relay = Daemon::spawn(stack.directory(), "relay", &of_relay).unwrap();
    let subscriber = Daemon::spawn(stack.directory(), "subscriber", &of_subscriber).unwrap();
    relay.until_ready().await;
    subscriber.until_ready().await;
    stack.redis.command(&["SET", "user:1", "cached"]).await.unwrap();
    let pool = sqlx::PgPool::connect(&stack.postgres_url()).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    outbox::enqueue(&mut tx, &outbox::Event::delete(["user:1"]).unwrap()).await.unwrap();
    tx.commit().await.unwrap();
    eventually(SETTLED, async || match stack.redis.command(&["EXISTS", "user:1"]).await.as_deref() {
        Ok("0") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_password_that_changed_on_disk_is_used_for_new_connections() {
    let mut pair = Pair::start().await.unwrap();
    let redis = &pair.stack.redis;
    let rights = ["ACL", "SETUSER", "app", "on", ">first", "~*", "&*", "+@all"];
    redis.command(&rights).await.unwrap();
    let file = pair.stack.directory().path().join("redis-password");
    std::fs::write(&file, "first\n").unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    pair.subscriber = pair
        .another_subscriber(&[
            ("REDIS_URL", pair.stack.redis_url().replace("redis://", "redis://app@")),
            ("REDIS_PASSWORD_FILE", file.display().to_string()),
        ])
        .unwrap();
    pair.subscriber.until_ready().await;

    redis.command(&["ACL", "SETUSER", "app", "resetpass", ">second"]).await.unwrap();
    redis.command(&["CLIENT", "KILL", "USER", "app"]).await.unwrap();
    let said = pair.subscriber.until_not_ready_because("WRONGPASS").await;
    assert!(!said.contains("first"), "{said}");
    std::fs::write(&file, "second\n").unwrap();
    pair.subscriber.until_ready().await;
    pair.fill("user:1").await.unwrap();
    pair.enqueue(&["user:1"]).await.unwrap();
    pair.until_none("user:1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_password_that_changed_on_disk_is_used_by_pool_and_log_reader() {
    let stack = stack().await;
    let login = Login::new(&stack).await;
    let url = stack.postgres_url().replace("postgres@", "app@");
    let (url_file, pass_file) =
        (stack.directory().path().join("database-url"), stack.directory().path().join("pgpass"));
    let write = |password: &str| {
        std::fs::write(&url_file, url.replace("app@", &format!("app:{password}@"))).unwrap();
        std::fs::write(&pass_file, format!("*:*:*:app:{password}\n")).unwrap();
        std::fs::set_permissions(&pass_file, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    write("first");
    let rules = stack.directory().path().join("rules.toml");
    std::fs::write(
        &rules,
        "[[table]]\nname = \"items\"\nkeys = [\"item:{id}\"]\non_truncate = [\"item:\"]\n",
    )
    .unwrap();
    let common = [
        ("NATS_URL", stack.nats_url()),
        ("RELAY_SOURCE", "outbox,wal".to_owned()),
        ("RELAY_RULES", rules.display().to_string()),
    ];
    let by_url = [common.as_slice(), &[("DATABASE_URL_FILE", url_file.display().to_string())]].concat();
    let slot = [("RELAY_SLOT", "other".to_owned()), ("RELAY_PUBLICATION", "other".to_owned())];
    let by_file = [("DATABASE_URL", url.clone()), ("PGPASSFILE", pass_file.display().to_string())];
    let by_file = [common.as_slice(), &slot, &by_file].concat();
    let relays =
        [by_url, by_file].map(|variables| Daemon::spawn(stack.directory(), "relay", &variables).unwrap());
    for relay in &relays {
        relay.until_ready().await;
    }
    login.change_to("second").await;
    for relay in &relays {
        relay.until_not_ready_because("password authentication failed").await;
    }
    write("second");
    for relay in &relays {
        relay.until_ready().await;
        let reads = eventually(SETTLED, async || match relay.metric("relay_wal_active").await {
            Ok(active) if active > 0.0 => Ok(()),
            other => Err(format!("{other:?}")),
        });
        reads.await;
    }
}

/// A role of Postgres that has to give its password.
struct Login {
    admin: sqlx::PgPool,
}

impl Login {
    async fn new(stack: &Stack) -> Self {
        let admin = sqlx::PgPool::connect(&stack.postgres_url()).await.unwrap();
        let role = "create role app login superuser replication password 'first'; create table items (id int primary key)";
        sqlx::raw_sql(role).execute(&admin).await.unwrap();
        let file: String = sqlx::query_scalar("show hba_file").fetch_one(&admin).await.unwrap();
        let rules = std::fs::read_to_string(&file).unwrap();
        let strict = "host all app all scram-sha-256\nhost replication app all scram-sha-256\n";
        std::fs::write(&file, format!("{strict}{rules}")).unwrap();
        sqlx::raw_sql("select pg_reload_conf()").execute(&admin).await.unwrap();
        Self { admin }
    }

    /// Changes the password and ends every session of the role.
    async fn change_to(&self, password: &str) {
        let change = format!("alter role app password '{password}'");
        sqlx::raw_sql(sqlx::AssertSqlSafe(change)).execute(&self.admin).await.unwrap();
        let end = "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'";
        sqlx::raw_sql(end).execute(&self.admin).await.unwrap();
    }
}
