//! The roles of the README suffice for what they are for, and for nothing else.

use std::path::Path;
use std::process::Command;

use devstack::{Stack, StackOptions, eventually};
use outbox::Event;
use sqlx::{AssertSqlSafe, PgPool};
use tests::{Daemon, SETTLED, program};

const RULES: &str = "[[table]]\nname = 'users'\nkeys = ['user:{id}']\non_truncate = ['user:']\n";

/// The SQL of the README between two markers.
fn readme_sql(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("README.md");
    let readme = std::fs::read_to_string(path).unwrap();
    let (begin, end) = (format!("<!-- {name}:begin -->\n```sql\n"), format!("```\n<!-- {name}:end -->"));
    let (_, rest) = readme.split_once(&begin).unwrap_or_else(|| panic!("the README has no {begin}"));
    rest.split_once(&end).unwrap_or_else(|| panic!("the README has no {end}")).0.to_owned()
}

/// A stack with the roles, and a table of the application.
struct Roles {
    stack: Stack,
}

impl Roles {
    async fn create() -> Self {
        let mut options = StackOptions::default();
        options.postgres.settings.push(("wal_level".to_owned(), "logical".to_owned()));
        let roles = Self { stack: Stack::start(options).await.unwrap() };
        let superuser = roles.pool("postgres").await;
        run(&superuser, "create role app_owner; create role app login").await.unwrap();
        run(
            &superuser,
            "create table users (id int primary key, name text); alter table users owner to app_owner",
        )
        .await
        .unwrap();
        run(&superuser, "grant select, insert, update, truncate on users to app").await.unwrap();
        run(&superuser, &readme_sql("roles before migrate")).await.unwrap();
        std::fs::write(roles.rules(), RULES).unwrap();
        roles.relay("outbox_admin", &["migrate"]).await;
        run(&roles.pool("outbox_admin").await, &readme_sql("roles after migrate")).await.unwrap();
        run(&superuser, &readme_sql("roles for the log")).await.unwrap();
        run(&superuser, "grant outbox_producer to app").await.unwrap();
        roles
    }

    fn url(&self, role: &str) -> String {
        let (_, rest) =
            self.stack.postgres_url().split_once('@').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        format!("postgres://{role}@{rest}")
    }

    fn rules(&self) -> std::path::PathBuf {
        self.stack.directory().path().join("rules.toml")
    }

    async fn pool(&self, role: &str) -> PgPool {
        PgPool::connect(&self.url(role)).await.unwrap()
    }

    fn environment(&self, role: &str) -> Vec<(&'static str, String)> {
        vec![
            ("DATABASE_URL", self.url(role)),
            ("NATS_URL", self.stack.nats_url()),
            ("RELAY_RULES", self.rules().display().to_string()),
        ]
    }

    /// Runs a command of the relay as a role; it must succeed.
    async fn relay(&self, role: &str, arguments: &[&str]) {
        let mut command = Command::new(program("relay").unwrap());
        command.args(arguments).envs(self.environment(role));
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{role} {arguments:?}: {text}");
    }

    async fn pair(&self, relay_role: &str, more: &[(&'static str, String)]) -> (Daemon, Daemon) {
        let mut environment = self.environment(relay_role);
        environment.extend(more.iter().cloned());
        let relay = Daemon::spawn(self.stack.directory(), "relay", &environment).unwrap();
        let redis = [("REDIS_URL", self.stack.redis_url()), ("NATS_URL", self.stack.nats_url())];
        let subscriber = Daemon::spawn(self.stack.directory(), "subscriber", &redis).unwrap();
        relay.until_ready().await;
        subscriber.until_ready().await;
        (relay, subscriber)
    }

    /// Runs SQL as the application and waits until it has removed `user:1`.
    async fn removes(&self, relay: &Daemon, app: &PgPool, sql: &str) {
        self.stack.redis.command(&["SET", "user:1", "cached"]).await.unwrap();
        run(app, sql).await.unwrap();
        eventually(SETTLED, async || {
            match self.stack.redis.command(&["EXISTS", "user:1"]).await.unwrap().as_str() {
                "0" => Ok(()),
                _ => Err(format!("not after {sql}; relay:\n{}", relay.process().log())),
            }
        })
        .await;
    }
}

async fn run(pool: &PgPool, sql: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(pool).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_can_do_its_work() {
    let roles = Roles::create().await;
    roles.relay("outbox_admin", &["rules", "apply"]).await;
    roles.relay("outbox_admin", &["rules", "check"]).await;
    let (relay, _subscriber) = roles.pair("outbox_relay", &[]).await;
    let app = roles.pool("app").await;
    roles.removes(&relay, &app, "insert into users values (1, 'Ada')").await;
    roles.removes(&relay, &app, "select outbox.enqueue(array['user:1'])").await;
    roles.removes(&relay, &app, "select outbox.enqueue_namespaces(array['user:'])").await;
    let insert = "with changed (id) as (values (1))
        insert into outbox.events (id, keys) select outbox.new_id(), array['user:' || id] from changed";
    roles.removes(&relay, &app, insert).await;
    roles.removes(&relay, &app, "truncate users").await;
    let mut tx = app.begin().await.unwrap();
    outbox::enqueue(&mut tx, &Event::delete(["user:1"]).unwrap()).await.unwrap();
    tx.commit().await.unwrap();
    for command in [&["status"][..], &["doctor"], &["dead", "list"], &["dead", "discard", "--all"]] {
        roles.relay("outbox_relay", command).await;
    }
    // Nothing that it was not allowed to do was worth a line.
    assert!(!relay.process().log().contains("permission denied"), "{}", relay.process().log());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_role_of_the_wal_relay_reads_the_log() {
    let roles = Roles::create().await;
    let owner = roles.pool("outbox_admin").await;
    run(&owner, "create publication outbox_relay for table users").await.unwrap();
    let (relay, _subscriber) = roles.pair("outbox_wal_relay", &[("RELAY_SOURCE", "wal".to_owned())]).await;
    let app = roles.pool("app").await;
    roles.removes(&relay, &app, "insert into users values (1, 'Ada')").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_hidden_from_the_role_of_the_wal_relay_cost_the_namespaces_of_expand() {
    let roles = Roles::create().await;
    let superuser = roles.pool("postgres").await;
    run(&superuser, "create table lines (order_id int, user_id int); insert into lines values (5, 1)")
        .await
        .unwrap();
    run(&superuser, "grant select on lines to outbox_relay").await.unwrap();
    let expand = "[[table.expand]]\nsql = \"select 'order:' || order_id from lines where user_id = any($1)\"
        namespaces = ['order:']";
    std::fs::write(roles.rules(), format!("{RULES}{expand}")).unwrap();
    let owner = roles.pool("outbox_admin").await;
    run(&owner, "create publication outbox_relay for table users").await.unwrap();
    let (relay, _subscriber) = roles.pair("outbox_wal_relay", &[("RELAY_SOURCE", "wal".to_owned())]).await;
    run(&superuser, "alter table lines enable row level security").await.unwrap();
    roles.stack.redis.command(&["SET", "order:5", "cached"]).await.unwrap();
    roles.removes(&relay, &roles.pool("app").await, "insert into users values (1, 'Ada')").await;
    eventually(SETTLED, async || {
        match roles.stack.redis.command(&["EXISTS", "order:5"]).await.unwrap().as_str() {
            "0" => Ok(()),
            _ => Err(relay.process().log()),
        }
    })
    .await;
    assert!(relay.process().log().contains("row-level security"), "{}", relay.process().log());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_role_can_do_more() {
    let roles = Roles::create().await;
    let (app, relay) = (roles.pool("app").await, roles.pool("outbox_relay").await);
    for (pool, sql) in [
        (&app, "delete from outbox.events"),
        (&app, "select keys from outbox.events"),
        (&app, "select * from outbox.dead_letters"),
        (&app, "truncate outbox.published"),
        (&app, "create table outbox.mine (id int)"),
        (&relay, "select * from users"),
        (&relay, "update users set name = 'x'"),
        (&relay, "delete from outbox.migrations"),
        (&relay, "drop table outbox.events"),
        (&relay, "create table outbox.mine (id int)"),
    ] {
        let error = run(pool, sql).await.unwrap_err().to_string();
        assert!(error.contains("permission denied") || error.contains("must be owner"), "{sql}: {error}");
    }
    let superuser = roles.pool("postgres").await;
    run(&superuser, "create role stranger login").await.unwrap();
    let stranger = roles.pool("stranger").await;
    let error = run(&stranger, "select outbox.enqueue(array['k'])").await.unwrap_err();
    assert!(error.to_string().contains("permission denied"), "{error}");
    for message in ["'x'", "'x'::bytea"] {
        let emit = format!("select pg_logical_emit_message(true, 'outbox', {message})");
        let error = run(&stranger, &emit).await.unwrap_err();
        assert!(error.to_string().contains("permission denied"), "{error}");
        // What outbox::through_wal calls, and what the reader of the log does when nothing else happens.
        run(&app, &emit).await.unwrap();
        run(&roles.pool("outbox_wal_relay").await, &emit).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_cannot_have_its_own_code_run_with_the_rights_of_the_outbox() {
    let roles = Roles::create().await;
    let app = roles.pool("app").await;
    let mut session = app.acquire().await.unwrap();
    sqlx::raw_sql(
        "create function pg_temp.spy(text pg_catalog.text) returns boolean language plpgsql as
             $$ begin raise exception 'ran as %', current_user; end $$;
         create domain pg_temp.text as pg_catalog.text check (pg_temp.spy(value));
         create domain pg_temp.int4 as pg_catalog.int4 check (pg_temp.spy(value::pg_catalog.text));
         set search_path = pg_temp, public",
    )
    .execute(&mut *session)
    .await
    .unwrap();
    // One call for each way through the function: the plain one and the one that checks everything.
    for call in [
        "select outbox.enqueue(array['k']::pg_catalog.text[])",
        "select outbox.enqueue(array['k']::pg_catalog.text[], value => 'v', version => 1, ttl_ms => 5)",
        "select outbox.enqueue_namespaces(array['k']::pg_catalog.text[])",
    ] {
        sqlx::raw_sql(call).execute(&mut *session).await.unwrap_or_else(|error| panic!("{call}: {error}"));
    }
}
