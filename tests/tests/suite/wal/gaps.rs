//! The slot is not where it was left.

use devstack::{PostgresOptions, StackOptions, eventually};
use tests::{Pair, SETTLED};

use super::{USER_RULES, USERS, captured, captured_on, fence, slot, sql, until_read};

const FLUSH: (&str, &str) = ("RELAY_GAP_POLICY", "flush");

/// Ends the relay, drops the slot behind its back, and lets something change meanwhile.
async fn slot_is_dropped_while_nobody_reads(pair: &Pair) {
    fence(pair).await;
    pair.relay.process().kill().unwrap();
    eventually(SETTLED, async || slot(pair, "active").await == "false").await;
    sql(pair, "select pg_drop_replication_slot('outbox_relay')").await;
    pair.fill("user:1:profile").await.unwrap();
    pair.fill("order:1").await.unwrap();
    sql(pair, "update users set name = 'missed' where id = 1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_dropped_behind_our_back_halts_and_says_so() {
    let pair = captured(USERS, USER_RULES, &[]).await;
    slot_is_dropped_while_nobody_reads(&pair).await;
    pair.relay.process().start().unwrap();
    eventually(SETTLED, async || {
        let (status, body) = pair.relay.get("/readyz").await.unwrap_or((0, String::new()));
        if status == 503 && body.contains("does not exist any more") { Ok(()) } else { Err(body) }
    })
    .await;
    assert_eq!(slot(&pair, "slot_name").await, "", "a new slot would hide what is missing");
    assert!(pair.relay.process().log().contains("ERROR"), "loud");
    assert!(pair.relay.metric("relay_wal_gaps_total").await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_dropped_behind_our_back_flushes_what_the_rules_can_name_if_asked_to() {
    let pair = captured(USERS, USER_RULES, &[FLUSH]).await;
    slot_is_dropped_while_nobody_reads(&pair).await;
    pair.relay.process().start().unwrap();
    pair.until_none("user:*").await;
    assert!(pair.is_cached("order:1").await.unwrap());
    until_read(&pair).await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_created_again_behind_our_back_is_not_taken_for_the_old_one() {
    let pair = captured(USERS, USER_RULES, &[FLUSH]).await;
    slot_is_dropped_while_nobody_reads(&pair).await;
    sql(&pair, "select pg_create_logical_replication_slot('outbox_relay', 'pgoutput')").await;
    pair.relay.process().start().unwrap();
    pair.until_none("user:*").await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_postgres_gave_up_is_a_gap() {
    let settings = [("max_slot_wal_keep_size", "1MB"), ("wal_keep_size", "0"), ("max_wal_size", "32MB")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let postgres = PostgresOptions { settings: settings.to_vec(), ..Default::default() };
    let stack = StackOptions { postgres, ..Default::default() };
    let pair = captured_on(stack, USERS, USER_RULES, &[FLUSH]).await;
    fence(&pair).await;
    pair.relay.process().kill().unwrap();
    eventually(SETTLED, async || slot(&pair, "active").await == "false").await;
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "update users set name = 'missed' where id = 1").await;
    for _ in 0..4 {
        sql(&pair, "create table filler as select repeat('x', 1000) from generate_series(1, 20000); drop table filler").await;
        sql(&pair, "select pg_switch_wal()").await;
        sql(&pair, "checkpoint").await;
    }
    assert_eq!(slot(&pair, "wal_status").await, "lost");
    pair.relay.process().start().unwrap();
    pair.until_none("user:*").await;
    until_read(&pair).await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_is_recorded_nowhere_is_an_error_and_not_settled() {
    let pair = super::users().await;
    let settlement = outbox::capture::Settlement::default();
    let error = outbox::capture::settle(&pair.pool, "forgotten", 7, &settlement).await.unwrap_err();
    assert!(matches!(error, sqlx::Error::RowNotFound), "{error}");
}
