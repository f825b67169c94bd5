//! Capture from the write-ahead log: no service enqueues anything here.

mod alarm;
mod basics;
mod commands;
mod doctor;
mod drift;
mod expand;
mod failover;
mod faults;
mod gaps;
mod gate;
mod generated;
mod health;
mod idle;
mod large;
mod outbox;
mod partitions;
mod publication;
mod recovery;
mod schema;
mod synchronized;
mod transactions;
mod values;
mod writers;

use std::process::Command;

use devstack::{PostgresOptions, StackOptions, eventually};
use sqlx::AssertSqlSafe;
use tests::{Pair, PairOptions, SETTLED, program};

/// A table of a thousand users, and its rules, for the tests that need no other.
pub const USERS: &str = "create table users (id bigint primary key, name text);
    insert into users select n, 'user' from generate_series(1, 1000) n";
pub const USER_RULES: &str = r#"
    [[table]]
    name = "users"
    keys = ["user:{id}:profile"]
    on_truncate = ["user:"]
"#;

/// A pair whose relay reads the log, with the table of users.
pub async fn users() -> Pair {
    captured(USERS, USER_RULES, &[]).await
}

/// A pair whose relay reads the log.
pub async fn captured(schema: &'static str, rules: &'static str, relay: &[(&'static str, &str)]) -> Pair {
    captured_on(StackOptions::default(), schema, rules, relay).await
}

pub async fn captured_on(
    stack: StackOptions,
    schema: &'static str,
    rules: &'static str,
    relay: &[(&'static str, &str)],
) -> Pair {
    let mut environment = vec![("RELAY_SOURCE", "wal".to_owned())];
    environment.extend(relay.iter().map(|(name, value)| (*name, (*value).to_owned())));
    let options = PairOptions { stack, schema, rules, relay: environment, ..Default::default() };
    Pair::start_with(options).await.unwrap()
}

/// Whether the server is of this version or a later one (`server_version_num`). If not, says what is not tried.
pub async fn is_since(pair: &Pair, version: i32, what: &str) -> bool {
    let found = sqlx::query_scalar("select current_setting('server_version_num')::integer");
    let found: i32 = found.fetch_one(&pair.pool).await.unwrap();
    if found < version {
        println!("Postgres {found} has no {what}; that part is not tried");
    }
    found >= version
}

/// Runs SQL as psql would.
pub async fn sql(pair: &Pair, statements: &str) {
    sqlx::raw_sql(AssertSqlSafe(statements.to_owned())).execute(&pair.pool).await.unwrap();
}

/// Waits until everything that was committed before has been published: a change made now is.
pub async fn fence(pair: &Pair) {
    for _ in 0..2 {
        pair.fill("user:1000:profile").await.unwrap();
        sql(pair, "update users set name = name || '.' where id = 1000").await;
        pair.until_none("user:1000:profile").await;
    }
}

/// What the slot says of itself, as text.
pub async fn slot(pair: &Pair, column: &str) -> String {
    let query = format!("select {column}::text from pg_replication_slots where slot_name = 'outbox_relay'");
    let rows = pair.stack.postgres.query(&query).await.unwrap_or_default();
    rows.into_iter().next().and_then(|mut row| row.swap_remove(0)).unwrap_or_default()
}

/// Waits until the slot is read by somebody, and returns the process of the server that serves it.
pub async fn until_read(pair: &Pair) -> String {
    eventually(SETTLED, async || {
        let pid = slot(pair, "active_pid").await;
        if pid.is_empty() { Err("nobody reads the slot".to_owned()) } else { Ok(pid) }
    })
    .await
}

/// A stack whose Postgres gives a slot up after a megabyte of log.
pub fn with_little_log() -> StackOptions {
    let settings = [("max_slot_wal_keep_size", "1MB"), ("wal_keep_size", "0"), ("max_wal_size", "32MB")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let postgres = PostgresOptions { settings: settings.to_vec(), ..Default::default() };
    StackOptions { postgres, ..Default::default() }
}

/// Waits until nobody reads the slot: a server process notices a moment later that its reader has died.
pub async fn until_unread(pair: &Pair) {
    eventually(SETTLED, async || slot(pair, "active").await == "false").await;
}

/// Writes so much log that Postgres of [`with_little_log`] gives up the slot, which nobody reads.
pub async fn lose_slot(pair: &Pair) {
    for _ in 0..4 {
        write_log(pair, 20).await;
        sql(pair, "select pg_switch_wal()").await;
        sql(pair, "checkpoint").await;
    }
    assert_eq!(slot(pair, "wal_status").await, "lost");
}

/// Writes this much log, in megabytes, that has nothing to do with the rules.
pub async fn write_log(pair: &Pair, megabytes: u32) {
    let rows = megabytes * 1000;
    sql(
        pair,
        &format!(
            "create table filler as select repeat('x', 1000) from generate_series(1, {rows}); drop table filler"
        ),
    )
    .await;
}

/// Runs a command of the relay with the environment of the pair's relay and more; says whether it succeeded, and what it
/// printed.
pub async fn relay(pair: &Pair, arguments: &[&str], more: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(program("relay").unwrap());
    command
        .env("DATABASE_URL", pair.stack.postgres_url())
        .env("NATS_URL", pair.stack.nats_url())
        .env("RELAY_SOURCE", "wal")
        .env("RELAY_RULES", pair.stack.directory().path().join("rules.toml"))
        .env("NO_COLOR", "1")
        .envs(more.iter().copied())
        .args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// Waits until the relay is not ready for a reason that contains `text`.
#[track_caller]
pub fn until_not_ready_because(pair: &Pair, text: &str) -> impl Future<Output = String> {
    eventually(SETTLED, async move || {
        let (status, body) = pair.relay.get("/readyz").await.map_err(|error| format!("{error:#}"))?;
        if status == 503 && body.contains(text) { Ok(body) } else { Err(format!("{status} {body}")) }
    })
}
