//! Capture from the write-ahead log: no service enqueues anything here.

mod basics;
mod expand;
mod faults;
mod gaps;
mod gate;
mod large;
mod outbox;
mod schema;
mod transactions;

use devstack::{StackOptions, eventually};
use sqlx::AssertSqlSafe;
use tests::{Pair, PairOptions, SETTLED};

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
