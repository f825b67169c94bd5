//! Wrong settings and missing rights: an error at the start that names what to fix, and an exit code.

use std::process::{Command, Output};
use std::time::Duration;

use devstack::{Binary, Port, Process, Stack, StackOptions};
use tests::program;

/// Variables that are wrong, and the words that the error must have.
type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);

/// Program, arguments, variables that are wrong, and the exit code.
type Attempt<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)], i32);

struct Scene {
    stack: Stack,
}

impl Scene {
    async fn start() -> Self {
        let stack = Stack::start(StackOptions::default()).await.unwrap();
        let pool = sqlx::PgPool::connect(&stack.postgres_url()).await.unwrap();
        outbox::migrate(&pool).await.unwrap();
        Self { stack }
    }

    /// Runs a program with good settings but for `wrong`, and returns how it failed.
    async fn failure(&self, name: &str, arguments: &[&str], wrong: &[(&str, &str)]) -> String {
        let output = self.run(name, arguments, wrong).await;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{name} succeeded with {wrong:?}: {error}");
        error
    }

    async fn run(&self, name: &str, arguments: &[&str], wrong: &[(&str, &str)]) -> Output {
        let mut command = Command::new(program(name).unwrap());
        command
            .args(arguments)
            .env("DATABASE_URL", self.stack.postgres_url())
            .env("NATS_URL", self.stack.nats_url())
            .env("REDIS_URL", self.stack.redis_url())
            .env("HTTP_ADDR", "127.0.0.1:0")
            .env("RELAY_STARTUP_TIMEOUT", "1s")
            .env("SUBSCRIBER_STARTUP_TIMEOUT", "1s")
            .env("SUBSCRIBER_REDIS_TIMEOUT", "1s")
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG");
        command.envs(wrong.iter().copied());
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_names_what_is_wrong_with_its_surroundings() {
    let scene = Scene::start().await;
    let url = scene.stack.create_database("bare").await.unwrap();
    let poor = scene.stack.postgres_url().replace("postgres@", "poor@");
    let pool = sqlx::PgPool::connect(&scene.stack.postgres_url()).await.unwrap();
    sqlx::raw_sql("create role poor login").execute(&pool).await.unwrap();
    let cases: [Case<'_>; 8] = [
        (&[("DATABASE_URL", "")], &["DATABASE_URL"]),
        (
            &[("DATABASE_URL", "postgres://app:hunter2@127.0.0.1:1/x")],
            &["DATABASE_URL", "127.0.0.1:1", "Connection refused"],
        ),
        (&[("DATABASE_URL", &poor)], &["poor@", "Roles", "permission denied"]),
        (&[("DATABASE_URL", &url.replace("/bare", "/nowhere"))], &["DATABASE_URL", "database"]),
        (&[("DATABASE_URL", &url)], &["relay migrate"]),
        (&[("NATS_URL", "nats://app:hunter2@127.0.0.1:1")], &["NATS_URL", "127.0.0.1:1"]),
        (&[("RELAY_POLL_MAX", "10")], &["RELAY_POLL_MAX"]),
        (&[("FAILPOINTS", "relay.no_such=kill")], &["relay.no_such"]),
    ];
    for (wrong, expected) in cases {
        let error = scene.failure("relay", &[], wrong).await;
        for word in expected {
            assert!(error.contains(word), "{wrong:?} gave: {error}");
        }
        assert!(!error.contains("hunter2"), "the password is printed: {error}");
    }
    let bare = url.replace("postgres@", "poor@");
    let error = scene.failure("relay", &["migrate"], &[("DATABASE_URL", &bare)]).await;
    assert!(error.contains("Roles") && error.contains("permission denied"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_names_what_is_wrong_with_its_surroundings() {
    let scene = Scene::start().await;
    // The stream is missing, as no relay has run yet.
    let error = scene.failure("subscriber", &[], &[]).await;
    assert!(error.contains("INVALIDATIONS") && error.contains("relay"), "{error}");
    scene.stack.redis.command(&["ACL", "SETUSER", "app", "on", ">hunter2"]).await.unwrap();
    let wrong = scene.stack.redis_url().replace("redis://", "redis://app:hunter3@");
    let cases: [Case<'_>; 5] = [
        (&[("REDIS_URL", &wrong)], &["REDIS_URL"]),
        (&[("REDIS_URL", "http://127.0.0.1")], &["REDIS_URL"]),
        (&[("NATS_URL", "nats://app:hunter2@127.0.0.1:1")], &["NATS_URL", "127.0.0.1:1"]),
        (
            &[("SUBSCRIBER_GAP_POLICY", "flush")],
            &["SUBSCRIBER_FLUSH_PATTERNS", "SUBSCRIBER_FLUSH_EVERYTHING"],
        ),
        (&[("SUBSCRIBER_DURABLE", "a.b")], &["SUBSCRIBER_DURABLE"]),
    ];
    for (wrong, expected) in cases {
        let error = scene.failure("subscriber", &[], wrong).await;
        for word in expected {
            assert!(error.contains(word), "{wrong:?} gave: {error}");
        }
        assert!(!error.contains("hunter"), "a password is printed: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_configuration_exits_with_two_and_a_bad_world_with_one() {
    let scene = Scene::start().await;
    let rules = scene.stack.directory().path().join("broken.toml").display().to_string();
    std::fs::write(&rules, "[[table]]\nnam = 1\n").unwrap();
    let cases: [Attempt<'_>; 17] = [
        ("relay", &[], &[("DATABASE_URL", "")], 2),
        ("relay", &["status"], &[("DATABASE_URL", "")], 2),
        ("relay", &[], &[("DATABASE_URL", "postgres://db:port/x")], 2),
        ("relay", &[], &[("RELAY_SOURCE", "wal")], 2),
        ("relay", &["--source", "wal"], &[("RELAY_RULES", &rules)], 2),
        ("relay", &["--source", "wal"], &[("RELAY_RULES", "/nowhere.toml")], 2),
        ("relay", &[], &[("NATS_URL", "nats://a b")], 2),
        ("relay", &[], &[("NATS_CREDS", "/nowhere.creds")], 2),
        ("relay", &["--no-such-option"], &[], 2),
        ("relay", &[], &[("DATABASE_URL", "postgres://app@127.0.0.1:1/x")], 1),
        ("relay", &[], &[("NATS_URL", "nats://127.0.0.1:1")], 1),
        ("subscriber", &[], &[("SUBSCRIBER_GAP_POLICY", "flush")], 2),
        ("subscriber", &[], &[("REDIS_URL", "http://127.0.0.1")], 2),
        ("subscriber", &["status"], &[("REDIS_URL", "http://127.0.0.1")], 2),
        ("subscriber", &[], &[("REDIS_CA", "/nowhere.pem"), ("REDIS_URL", "rediss://127.0.0.1")], 2),
        ("subscriber", &[], &[("NATS_URL", "nats://a b")], 2),
        ("subscriber", &[], &[("NATS_URL", "nats://127.0.0.1:1")], 1),
    ];
    for (name, arguments, wrong, code) in cases {
        let output = scene.run(name, arguments, wrong).await;
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{name} {arguments:?} {wrong:?}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_credentials_and_rights_are_named_when_they_are_wrong() {
    let scene = Scene::start().await;
    // Started by hand: devstack asks a server whether it is ready, and this one answers nobody without credentials.
    let port = Port::reserve().unwrap();
    let file = scene.stack.directory().path().join("users.conf");
    let configuration = format!(
        r#"listen: "{}"
        jetstream {{ store_dir: "{}" }}
        authorization {{ users = [
            {{ user: app, password: secret }}
            {{ user: poor, password: secret, permissions: {{ publish: ["x"], subscribe: ["_INBOX.>"] }} }}
        ] }}"#,
        port.address(),
        scene.stack.directory().path().join("users-data").display()
    );
    std::fs::write(&file, configuration).unwrap();
    let mut command = Command::new(Binary::NatsServer.find().unwrap());
    command.arg("-c").arg(&file);
    let nats = Process::spawn(scene.stack.directory(), "nats-users", command).unwrap();
    nats.wait_for_log("Server is ready", Duration::from_secs(20)).await.unwrap();
    let url = |user: &str| format!("nats://{user}@{}", port.address());
    for name in ["relay", "subscriber"] {
        let error = scene.failure(name, &[], &[("NATS_URL", &url("app:hunter2"))]).await;
        assert!(
            error.contains("NATS_URL") && error.contains("credentials") && !error.contains("hunter2"),
            "{error}"
        );
        let error = scene.failure(name, &[], &[("NATS_URL", &url("poor:secret"))]).await;
        assert!(error.contains("permission") && error.contains("$JS.API"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_whose_options_could_lose_events_is_refused() {
    let scene = Scene::start().await;
    let config = r#"{"name":"INVALIDATIONS","subjects":["invalidation.>"],"retention":"limits","storage":"file",
        "max_msgs":10,"max_bytes":-1,"max_age":0,"max_consumers":-1,"num_replicas":1,"discard":"old"}"#;
    scene.stack.nats.request("$JS.API.STREAM.CREATE.INVALIDATIONS", config).await.unwrap();
    let error = scene.failure("relay", &[], &[]).await;
    assert!(error.contains("discard=new"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn http_address_in_use_is_named() {
    let scene = Scene::start().await;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = scene.failure("relay", &[], &[("HTTP_ADDR", &address)]).await;
    assert!(error.contains("HTTP_ADDR") && error.contains(&address), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn admin_commands_answer() {
    let scene = Scene::start().await;
    let text = |output: Output| {
        // Who asks wants the answer and nothing else.
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(text(scene.run("relay", &["migrate"], &[]).await).contains("current"));
    let status = text(scene.run("relay", &["status"], &[]).await);
    assert!(status.contains("backlog       0 events") && status.contains("does not exist"), "{status}");
    assert!(text(scene.run("relay", &["dead", "list"], &[]).await).contains("no dead letters"));
    let config = r#"{"name":"INVALIDATIONS","subjects":["invalidation.>"],"retention":"limits","storage":"file",
        "max_bytes":-1,"max_age":0,"max_consumers":-1,"num_replicas":1,"discard":"new"}"#;
    scene.stack.nats.request("$JS.API.STREAM.CREATE.INVALIDATIONS", config).await.unwrap();
    assert!(text(scene.run("relay", &["status"], &[]).await).contains("INVALIDATIONS"));
    assert!(text(scene.run("subscriber", &["status"], &[]).await).contains("does not exist yet"));
    let environment = [("NATS_URL", scene.stack.nats_url()), ("REDIS_URL", scene.stack.redis_url())];
    let subscriber = tests::Daemon::spawn(scene.stack.directory(), "subscriber", &environment).unwrap();
    subscriber.until_ready().await;
    let status = text(scene.run("subscriber", &["status"], &[]).await);
    assert!(status.contains("nothing was published yet") && !status.contains("1970"), "{status}");
    subscriber.process().terminate().await.unwrap();
    scene.stack.nats.request("$JS.API.STREAM.DELETE.INVALIDATIONS", "").await.unwrap();
    let doctor = scene.run("relay", &["doctor"], &[]).await;
    let report = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(report.contains("ok  claim          uses the index events_pkey"), "{report}");
    assert!(
        !doctor.status.success()
            && report.contains("the relay creates the stream when it runs")
            && !report.contains("start NATS"),
        "{report}"
    );
    assert!(!scene.run("relay", &["health"], &[("HTTP_ADDR", "127.0.0.1:1")]).await.status.success());
}
