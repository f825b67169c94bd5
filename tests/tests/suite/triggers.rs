//! Capture by triggers, end to end, and what an operator asks about rules.

use std::path::PathBuf;
use std::process::{Command, Output};

use std::time::Duration;

use devstack::eventually;
use tests::{Pair, SETTLED, program};

const RULES: &str = r#"
[[table]]
name = "users"
columns = ["name", "email"]
keys = ["user:{id}:profile", "tenant:{tenant_id}:user:{email}"]
on_truncate = ["user:"]
"#;

const SCHEMA: &str = "
    create table users (id int primary key, tenant_id int, name text, email text, seen int);
    insert into users values (1, 5, 'Ada', 'ada@x', 0), (2, 5, 'Bob', 'bob@x', 0)";

/// The pair, a table and its rules.
struct Watched {
    pair: Pair,
    rules: PathBuf,
}

impl Watched {
    async fn start() -> Self {
        let pair = Pair::start().await.unwrap();
        let rules = pair.stack.directory().path().join("rules.toml");
        std::fs::write(&rules, RULES).unwrap();
        let watched = Self { pair, rules };
        watched.sql(SCHEMA).await;
        watched
    }

    /// As somebody in front of psql would.
    async fn sql(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&self.pair.pool).await.unwrap();
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(program("relay").unwrap());
        command
            .env("DATABASE_URL", self.pair.stack.postgres_url())
            .env("NATS_URL", self.pair.stack.nats_url());
        command.env("RELAY_RULES", &self.rules).args(arguments);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// What a successful command prints.
    async fn ask(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command prints that fails, and its error.
    async fn fail(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments).await;
        assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_no_service_knows_about_removes_the_keys() {
    let watched = Watched::start().await;
    let pair = &watched.pair;
    assert!(watched.ask(&["rules", "apply"]).await.contains("8 changes were made"));
    for key in ["user:1:profile", "tenant:5:user:ada@x", "tenant:5:user:lovelace@x", "user:2:profile"] {
        pair.fill(key).await.unwrap();
    }
    watched.sql("update users set email = 'lovelace@x' where id = 1").await;
    pair.until_none("*ada@x").await;
    pair.until_none("*lovelace@x").await;
    pair.until_none("user:1:*").await;
    assert!(pair.is_cached("user:2:profile").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn truncate_removes_every_key_of_the_namespace_and_no_other() {
    let watched = Watched::start().await;
    let pair = &watched.pair;
    watched.ask(&["rules", "apply"]).await;
    pair.fill_many("user", 0..5_000).await.unwrap();
    pair.fill("users").await.unwrap();
    watched.sql("truncate users").await;
    pair.until_none("user:*").await;
    assert!(pair.is_cached("users").await.unwrap());
    assert!(pair.subscriber.metric("subscriber_namespaces_invalidated_total").await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_can_try_rules_before_anything_depends_on_them() {
    let watched = Watched::start().await;
    let old = r#"{"id": 1, "tenant_id": 5, "name": "Ada", "email": "ada@x"}"#;
    let new = r#"{"id": 1, "tenant_id": 5, "name": "Ada", "email": "new@x"}"#;
    let keys = watched.ask(&["rules", "test", "--table", "users", "--old", old, "--new", new]).await;
    assert_eq!(
        keys.lines().collect::<Vec<_>>(),
        ["user:1:profile", "tenant:5:user:ada@x", "tenant:5:user:new@x"]
    );

    let explained = watched.ask(&["rules", "explain", "update users set name = 'x' where id = 2"]).await;
    assert!(explained.starts_with("1 rows, 1 events; rolled back"), "{explained}");
    assert!(explained.contains("default  user:2:profile"), "{explained}");
    let truncated = watched.ask(&["rules", "explain", "truncate users"]).await;
    assert!(truncated.contains("default  user:*"), "{truncated}");
    let refused = watched.fail(&["rules", "explain", "commit"]).await;
    assert!(refused.contains("explain runs one statement"), "{refused}");
    let refused = watched.fail(&["rules", "explain", "delete from users; commit"]).await;
    assert!(refused.contains("multiple commands"), "{refused}");
    let rows: i64 = sqlx::query_scalar("select count(*) from users where name <> 'x'")
        .fetch_one(&watched.pair.pool)
        .await
        .unwrap();
    assert_eq!(rows, 2, "nothing that was explained has happened");
    assert!(
        watched.fail(&["rules", "check"]).await.contains("8 steps are missing"),
        "explain installs nothing"
    );

    let coverage = watched.ask(&["rules", "coverage"]).await;
    assert!(coverage.contains("not watched: seen"), "{coverage}");
    assert!(
        watched
            .ask(&["rules", "sql"])
            .await
            .contains("create or replace trigger outbox_capture_update after update")
    );
    assert!(watched.fail(&["rules", "check", "--wal"]).await.contains("REPLICA IDENTITY FULL"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_apply_does_is_planned_while_nobody_else_changes_triggers() {
    let watched = Watched::start().await;
    let pool = &watched.pair.pool;
    let mut other = pool.begin().await.unwrap();
    rules::triggers::lock(&mut other, SETTLED).await.unwrap();
    for command in [&["rules", "apply"][..], &["rules", "remove"], &["rules", "explain", "truncate users"]] {
        let refused = watched.fail(&[command, &["--lock-timeout", "100ms"]].concat()).await;
        assert!(refused.contains("another `relay rules` may be changing the triggers"), "{refused}");
    }
    let apply = ["rules", "apply", "--lock-timeout", "60s"];
    let (applied, ()) = tokio::join!(watched.ask(&apply), async {
        let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted";
        eventually(SETTLED, async || {
            sqlx::query_scalar::<_, i64>(waiting).fetch_one(pool).await.unwrap() == 1
        })
        .await;
        // What it finds when it is its turn.
        watched.sql("drop table users; create table users (id int, tenant_id int, name text, email text) partition by list (id);
            create table users_1 partition of users default").await;
        other.rollback().await.unwrap();
    });
    assert!(applied.contains("create trigger outbox_capture_update on public.users_1"), "{applied}");
    assert!(watched.ask(&["rules", "check"]).await.contains("installed and current"));
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_gives_up_on_a_statement_that_takes_too_long() {
    let watched = Watched::start().await;
    let endless = "update users set name = pg_sleep(600)::text";
    let limit = Duration::from_secs(60);
    let explain = ["rules", "explain", endless, "--statement-timeout", "200ms"];
    let error = tokio::time::timeout(limit, watched.fail(&explain)).await.unwrap();
    assert!(error.contains("--statement-timeout") && error.contains("statement timeout"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_and_doctor_notice_a_partition_without_triggers() {
    let watched = Watched::start().await;
    watched.sql("drop table users; create table users (id int, tenant_id int, name text, email text) partition by list (id)").await;
    watched.ask(&["rules", "apply"]).await;
    assert!(watched.ask(&["rules", "check"]).await.contains("installed and current"));
    let doctor = String::from_utf8(watched.run(&["doctor"]).await.stdout).unwrap();
    assert!(doctor.contains("ok  triggers"), "{doctor}");
    watched.sql("create table users_1 partition of users for values in (1)").await;
    let check = watched.fail(&["rules", "check"]).await;
    assert!(check.contains("create trigger outbox_capture_update on public.users_1"), "{check}");
    let doctor = watched.fail(&["doctor"]).await;
    assert!(doctor.contains("public.users_1") && doctor.contains("relay rules apply"), "{doctor}");
    std::fs::write(&watched.rules, RULES.replace("email}", "mail}")).unwrap();
    let check = watched.fail(&["rules", "check"]).await;
    assert!(
        check.contains("rules.toml:5: table public.users, column mail: there is no such column"),
        "{check}"
    );
}
