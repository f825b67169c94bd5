//! The slot is not where it was left.

use std::time::Duration;

use tests::Pair;

use super::{
    USER_RULES, USERS, captured, captured_on, fence, lose_slot, slot, sql, until_not_ready_because,
    until_read, until_unread, with_little_log,
};

const FLUSH: (&str, &str) = ("RELAY_GAP_POLICY", "flush");

/// Ends the relay, drops the slot behind its back, and lets something change meanwhile.
pub async fn slot_is_dropped_while_nobody_reads(pair: &Pair) {
    fence(pair).await;
    pair.relay.process().kill().unwrap();
    until_unread(pair).await;
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
    until_not_ready_because(&pair, "does not exist any more").await;
    assert_eq!(slot(&pair, "slot_name").await, "", "a new slot would hide what is missing");
    // It looks again and again whether somebody has decided.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let log = pair.relay.process().log();
    assert_eq!(log.lines().filter(|line| line.contains("ERROR")).count(), 1, "loud, and once:\n{log}");
    let gaps = pair.relay.metric("relay_wal_gaps_total").await.unwrap();
    assert!((gaps - 1.0).abs() < 0.1, "{gaps} gaps");
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
    let pair = captured_on(with_little_log(), USERS, USER_RULES, &[FLUSH]).await;
    fence(&pair).await;
    pair.relay.process().kill().unwrap();
    until_unread(&pair).await;
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "update users set name = 'missed' where id = 1").await;
    lose_slot(&pair).await;
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

/// Something is committed while there is no publication. The relay makes a new one, which does not help: Postgres looks
/// it up as of then.
async fn publication_is_dropped_while_nobody_reads(pair: &Pair) {
    fence(pair).await;
    pair.relay.process().kill().unwrap();
    until_unread(pair).await;
    pair.fill("user:1:profile").await.unwrap();
    sql(pair, "drop publication outbox_relay").await;
    sql(pair, "update users set name = 'missed' where id = 1").await;
    pair.relay.process().start().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_was_missing_for_a_while_is_a_gap_that_can_be_accepted() {
    let pair = captured(USERS, USER_RULES, &[]).await;
    publication_is_dropped_while_nobody_reads(&pair).await;
    until_not_ready_because(&pair, "the publication did not exist at the position of the slot").await;
    let (ok, text) = super::relay(&pair, &["slot", "accept-gap"], &[]).await;
    assert!(ok, "{text}");
    pair.relay.until_ready().await;
    until_read(&pair).await;
    fence(&pair).await;
    assert!(pair.relay.metric("relay_wal_gaps_total").await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_was_missing_for_a_while_costs_what_the_rules_can_name_if_asked_to() {
    let pair = captured(USERS, USER_RULES, &[FLUSH]).await;
    publication_is_dropped_while_nobody_reads(&pair).await;
    pair.until_none("user:*").await;
    until_read(&pair).await;
    fence(&pair).await;
}
