//! Trouble whose cause the operator must read: in the log, in `/readyz`, in what a command prints.

use std::error::Error;

use devstack::{Stack, StackOptions};
use service::Report;
use sqlx::PgPool;
use tests::{Daemon, Pair};

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

/// Waits until one line of the log has all the words.
async fn until_logged(daemon: &Daemon, words: &[&str]) {
    devstack::eventually(tests::SETTLED, async || {
        let log = daemon.process().log();
        let is_there = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        if is_there { Ok(()) } else { Err(format!("no line with {words:?} in:\n{log}")) }
    })
    .await;
}
