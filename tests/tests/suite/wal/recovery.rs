//! Whoever makes a slot that is not the very first declares stale what nobody read, once the slot exists.

use devstack::{StackOptions, eventually};
use tests::{Pair, SETTLED};

use super::gaps::slot_is_dropped_while_nobody_reads;
use super::{
    USER_RULES, USERS, captured, captured_on, fence, is_since, relay, slot, sql, until_not_ready_because,
    until_read, until_unread, users,
};

const FAILOVER_SLOTS: i32 = 170_000;

/// Has a new slot wait for an open transaction, and changes a row meanwhile: no slot has that change.
async fn change_while_the_slot_is_created(pair: &Pair, decide: impl AsyncFnOnce()) {
    let mut open = pair.pool.begin().await.unwrap();
    sqlx::raw_sql("update users set name = 'x' where id = 500").execute(&mut *open).await.unwrap();
    decide().await;
    until_not_ready_because(pair, "Postgres waits for all transactions that are open").await;
    pair.fill("user:2:profile").await.unwrap();
    sql(pair, "update users set name = 'between' where id = 2").await;
    open.commit().await.unwrap();
    pair.until_none("user:2:profile").await;
    until_read(pair).await;
    pair.relay.until_ready().await;
    fence(pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_an_accepted_slot_is_created_is_declared_stale() {
    let pair = users().await;
    slot_is_dropped_while_nobody_reads(&pair).await;
    pair.relay.process().start().unwrap();
    until_not_ready_because(&pair, "does not exist any more").await;
    let accept = async || {
        let (ok, text) = relay(&pair, &["slot", "accept-gap"], &[]).await;
        assert!(ok, "{text}");
    };
    change_while_the_slot_is_created(&pair, accept).await;
    assert!(!pair.is_cached("user:1:profile").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_the_flush_policy_creates_a_slot_is_declared_stale() {
    let pair = captured(USERS, USER_RULES, &[("RELAY_GAP_POLICY", "flush")]).await;
    slot_is_dropped_while_nobody_reads(&pair).await;
    change_while_the_slot_is_created(&pair, async || pair.relay.process().start().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_after_the_slot_was_dropped_on_purpose_is_declared_stale() {
    let pair = users().await;
    fence(&pair).await;
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    let (ok, text) = relay(&pair, &["slot", "drop"], &[]).await;
    assert!(ok, "{text}");
    change_while_the_slot_is_created(&pair, async || pair.relay.process().start().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_that_is_accepted_while_no_relay_runs_can_be_read_afterwards() {
    let pair = users().await;
    fence(&pair).await;
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "drop publication outbox_relay").await;
    sql(&pair, "update users set name = 'missed' where id = 1").await;
    sql(&pair, "create publication outbox_relay for table users").await;
    let (ok, text) = relay(&pair, &["slot", "accept-gap"], &[]).await;
    assert!(ok, "{text}");
    pair.relay.process().start().unwrap();
    pair.until_none("user:1:profile").await;
    fence(&pair).await;
    let gaps = pair.relay.metric("relay_wal_gaps_total").await.unwrap();
    assert!(gaps < 0.5, "it was accepted before: {gaps}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_was_made_before_the_first_relay_is_no_gap() {
    let elsewhere = [("RELAY_SLOT", "elsewhere"), ("RELAY_PUBLICATION", "elsewhere")];
    let pair = captured(USERS, USER_RULES, &elsewhere).await;
    pair.relay.process().terminate().await.unwrap();
    sql(&pair, "select pg_create_logical_replication_slot('outbox_relay', 'pgoutput')").await;
    sql(&pair, "update users set name = 'y' where id = 1").await;
    let usual = ["RELAY_SLOT", "RELAY_PUBLICATION"].map(|name| (name, "outbox_relay".to_owned()));
    let relay = pair.another_relay(&usual).unwrap();
    relay.until_ready().await;
    until_read(&pair).await;
    fence(&pair).await;
    assert!(relay.metric("relay_wal_gaps_total").await.unwrap_or_default() < 0.5);
    assert!(!relay.process().log().contains("ERROR"), "{}", relay.process().log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_nobody_gave_to_standbys_is_given_to_them_and_stays_so_after_a_gap() {
    let pair = users().await;
    fence(&pair).await;
    if !is_since(&pair, FAILOVER_SLOTS, "logical slots on standbys").await {
        return;
    }
    assert_eq!(slot(&pair, "failover").await, "true", "made by the relay");
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    let confirmed = slot(&pair, "confirmed_flush_lsn").await;
    sql(&pair, "select pg_copy_logical_replication_slot('outbox_relay', 'kept'); select pg_drop_replication_slot('outbox_relay');
        select pg_copy_logical_replication_slot('kept', 'outbox_relay'); select pg_drop_replication_slot('kept')").await;
    assert_eq!(
        (slot(&pair, "confirmed_flush_lsn").await, slot(&pair, "failover").await),
        (confirmed, "false".to_owned())
    );
    let (_, text) = relay(&pair, &["doctor"], &[]).await;
    assert!(text.contains("no standby may keep a copy of the slot: a failover is a gap"), "{text}");
    pair.relay.process().start().unwrap();
    until_read(&pair).await;
    assert_eq!(slot(&pair, "failover").await, "true", "altered when it was opened");
    fence(&pair).await;
    let (_, text) = relay(&pair, &["doctor"], &[]).await;
    assert!(text.contains("standbys may keep a copy of the slot"), "{text}");

    slot_is_dropped_while_nobody_reads(&pair).await;
    let (ok, text) = relay(&pair, &["slot", "accept-gap"], &[]).await;
    assert!(ok, "{text}");
    pair.relay.process().start().unwrap();
    until_read(&pair).await;
    assert_eq!(slot(&pair, "failover").await, "true", "made again after a gap");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_waits_for_a_standby_that_is_away_is_lag_and_the_standby_is_named() {
    let mut stack = StackOptions::default();
    stack.postgres.settings.push(("log_min_messages".to_owned(), "warning".to_owned()));
    let pair = captured_on(stack, USERS, USER_RULES, &[]).await;
    fence(&pair).await;
    let lag = async || pair.relay.metric("relay_wal_slot_lag_seconds").await.unwrap();
    if !is_since(&pair, FAILOVER_SLOTS, "standby slots that are waited for").await {
        // Any other reason: a few bytes that are not published are lag as well.
        pair.stack.nats.kill().unwrap();
        sql(&pair, "update users set name = 'late' where id = 1").await;
        eventually(SETTLED, async || lag().await > 5.0).await;
        return;
    }
    sql(&pair, "select pg_create_physical_replication_slot('away')").await;
    sql(&pair, "alter system set synchronized_standby_slots = 'away'").await;
    sql(&pair, "select pg_reload_conf()").await;
    pair.fill("user:1:profile").await.unwrap();
    eventually(SETTLED, async || {
        sql(&pair, "update users set name = 'late' where id = 1").await;
        pair.relay.process().log().contains("\"away\"")
    })
    .await;
    eventually(SETTLED, async || lag().await > 5.0).await;
    let reason = until_not_ready_because(&pair, "s behind; the server says").await;
    assert!(reason.contains("away"), "{reason}");
    sql(&pair, "alter system reset synchronized_standby_slots").await;
    sql(&pair, "select pg_reload_conf()").await;
    pair.until_none("user:1:profile").await;
    pair.relay.until_ready().await;
    eventually(SETTLED, async || lag().await < 3.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_nobody_read_for_too_long_is_not_blamed_on_the_size_of_the_log() {
    let pair = users().await;
    fence(&pair).await;
    if !is_since(&pair, 180_000, "idle_replication_slot_timeout").await {
        return;
    }
    pair.relay.process().kill().unwrap();
    until_unread(&pair).await;
    sql(&pair, "alter system set idle_replication_slot_timeout = '1s'").await;
    sql(&pair, "select pg_reload_conf()").await;
    eventually(SETTLED, async || {
        sql(&pair, "select pg_switch_wal()").await;
        sql(&pair, "checkpoint").await;
        slot(&pair, "wal_status").await == "lost"
    })
    .await;
    sql(&pair, "alter system reset idle_replication_slot_timeout").await;
    sql(&pair, "select pg_reload_conf()").await;
    pair.relay.process().start().unwrap();
    let reason = until_not_ready_because(&pair, "idle_replication_slot_timeout").await;
    assert!(!reason.contains("max_slot_wal_keep_size"), "{reason}");
    let (_, shown) = relay(&pair, &["slot", "show"], &[]).await;
    assert!(shown.contains("idle_replication_slot_timeout"), "{shown}");
}
