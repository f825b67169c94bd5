use devstack::{PostgresOptions, StackOptions};
use outbox::Event;
use sqlx::Connection;
use tests::Pair;

use super::{USER_RULES, USERS, captured_on, fence, sql, users};

/// The server streams every transaction of more than 64 kB before its commit.
async fn streaming() -> Pair {
    let settings = vec![("logical_decoding_work_mem".to_owned(), "64kB".to_owned())];
    let stack =
        StackOptions { postgres: PostgresOptions { settings, ..Default::default() }, ..Default::default() };
    captured_on(stack, USERS, USER_RULES, &[]).await
}

const SAVEPOINTS: &str = "begin;
    update users set name = repeat('a', 300) where id between 1 and 300;
    savepoint a;
    update users set name = repeat('b', 300) where id between 301 and 600;
    rollback to savepoint a;
    savepoint b;
    update users set name = repeat('c', 300) where id between 601 and 900;
    release savepoint b;
    commit";

async fn only_what_committed_goes(pair: &Pair) {
    let keys: Vec<String> = (1..=900).map(|id| format!("user:{id}:profile")).collect();
    for key in &keys {
        pair.fill(key).await.unwrap();
    }
    sql(pair, SAVEPOINTS).await;
    pair.until_none("user:1:*").await;
    pair.until_none("user:900:*").await;
    fence(pair).await;
    assert_eq!(pair.count("user:*").await.unwrap(), 300, "those that were rolled back are still cached");
    assert!(pair.is_cached("user:450:profile").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_savepoint_took_back_invalidates_nothing() {
    only_what_committed_goes(&users().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_savepoint_took_back_invalidates_nothing_in_a_streamed_transaction_either() {
    let pair = streaming().await;
    only_what_committed_goes(&pair).await;
    let streamed =
        pair.stack.postgres.query("select stream_txns from pg_stat_replication_slots").await.unwrap();
    assert_ne!(streamed[0][0].as_deref(), Some("0"), "the transaction was streamed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_transaction_invalidates_nothing_streamed_or_not() {
    let pair = streaming().await;
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "begin; update users set name = repeat('a', 500) where id < 900; rollback").await;
    sql(&pair, "begin; update users set name = 'x' where id = 1; rollback").await;
    fence(&pair).await;
    assert!(pair.is_cached("user:1:profile").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_transaction_invalidates_when_it_is_committed_and_only_then() {
    let pair = users().await;
    pair.fill("user:1:profile").await.unwrap();
    pair.fill("user:2:profile").await.unwrap();
    sql(&pair, "begin; update users set name = 'x' where id = 1; prepare transaction 'first'").await;
    sql(&pair, "begin; update users set name = 'x' where id = 2; prepare transaction 'second'").await;
    fence(&pair).await;
    assert!(pair.is_cached("user:1:profile").await.unwrap(), "it is not committed yet");
    sql(&pair, "commit prepared 'first'").await;
    pair.until_none("user:1:*").await;
    sql(&pair, "rollback prepared 'second'").await;
    fence(&pair).await;
    assert!(pair.is_cached("user:2:profile").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_a_savepoint_took_back_is_not_published_though_its_transaction_was_streamed() {
    let pair = streaming().await;
    for key in ["cart:kept", "cart:void"] {
        pair.fill(key).await.unwrap();
    }
    let event = |key: &str| Event::delete([key]).unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    sqlx::raw_sql("update users set name = repeat('a', 300) where id < 900").execute(&mut *tx).await.unwrap();
    let _ = outbox::enqueue_through_wal(&mut tx, &[event("cart:kept")]).await.unwrap();
    let mut savepoint = tx.begin().await.unwrap();
    let _ = outbox::enqueue_through_wal(&mut savepoint, &[event("cart:void")]).await.unwrap();
    sqlx::raw_sql("update users set name = repeat('b', 300) where id < 900")
        .execute(&mut *savepoint)
        .await
        .unwrap();
    savepoint.rollback().await.unwrap();
    tx.commit().await.unwrap();
    pair.until_none("cart:kept").await;
    fence(&pair).await;
    assert!(pair.is_cached("cart:void").await.unwrap(), "it never committed");
}
