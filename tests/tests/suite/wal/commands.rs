//! What an operator does about the slot: `relay slot show`, `accept-gap` and `drop`.

use std::time::{Duration, Instant};

use sqlx::Row;
use tests::Pair;

use super::gaps::slot_is_dropped_while_nobody_reads;
use super::{fence, relay, slot, sql, until_not_ready_because, until_read, until_unread, users, write_log};

/// Twice what the relay waits between two looks at a decision, on a busy machine.
const DECISION_SEEN: Duration = Duration::from_secs(30);

/// How many readers of a slot have a recorded position.
async fn recorded(pair: &Pair) -> i64 {
    let count = "select count(*) from outbox.capture where slot = 'outbox_relay'";
    sqlx::query(count).fetch_one(&pair.pool).await.unwrap().get(0)
}

/// Whether the slot is confirmed at `position` or further.
async fn has_reached(pair: &Pair, position: &str) -> bool {
    slot(pair, &format!("(confirmed_flush_lsn >= '{position}'::pg_lsn)")).await == "true"
}

/// The megabytes that stand before " MB behind".
fn behind(shown: &str) -> f64 {
    let (before, _) = shown.split_once(" MB behind").unwrap_or_else(|| panic!("no lag in {shown}"));
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn slot_show_names_position_reader_and_lag() {
    let pair = users().await;
    fence(&pair).await;
    let server = until_read(&pair).await;
    let before = slot(&pair, "confirmed_flush_lsn").await;
    let (ok, shown) = relay(&pair, &["slot", "show"], &[]).await;
    assert!(ok, "{shown}");
    let position = shown.strip_prefix("outbox_relay at ").and_then(|rest| rest.split(',').next()).unwrap();
    assert!(has_reached(&pair, position).await, "{position} is not confirmed yet");
    let earlier = format!("select '{position}'::pg_lsn < '{before}'::pg_lsn");
    let rows = pair.stack.postgres.query(&earlier).await.unwrap();
    assert_eq!(rows[0][0].as_deref(), Some("f"), "{position} was confirmed before {before}");
    assert!(shown.contains(&format!("read by process {server}")), "{shown}");
    assert!(behind(&shown) < 2.0, "{shown}");

    pair.relay.process().kill().unwrap();
    until_unread(&pair).await;
    write_log(&pair, 5).await;
    let (_, shown) = relay(&pair, &["slot", "show"], &[]).await;
    assert!(shown.contains("nobody reads it") && behind(&shown) > 5.0, "{shown}");
    let (_, status) = relay(&pair, &["status"], &[]).await;
    let line = status.lines().find(|line| line.starts_with("slot ")).unwrap();
    assert!(line.contains("nobody reads it") && behind(line) > 5.0, "{status}");

    let (ok, shown) = relay(&pair, &["slot", "show"], &[("RELAY_SLOT", "other")]).await;
    assert!(ok && shown.contains("other does not exist"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_read_is_neither_dropped_nor_forgotten() {
    let pair = users().await;
    let server = until_read(&pair).await;
    for command in ["accept-gap", "drop"] {
        let (ok, text) = relay(&pair, &["slot", command], &[]).await;
        assert!(!ok && text.contains(&format!("server process {server}")), "{command}: {text}");
        assert!(text.contains("stop the relays"), "{command} says what to do: {text}");
        assert_eq!((recorded(&pair).await, until_read(&pair).await.as_str()), (1, server.as_str()));
    }
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_that_is_accepted_lets_the_halted_relay_go_on_by_itself() {
    let pair = users().await;
    slot_is_dropped_while_nobody_reads(&pair).await;
    pair.relay.process().start().unwrap();
    let reason = until_not_ready_because(&pair, "does not exist any more").await;
    assert!(!reason.contains("failed over"), "{reason}");
    let process = pair.relay.process().pid().unwrap();

    let accepted = Instant::now();
    let (ok, text) = relay(&pair, &["slot", "accept-gap"], &[]).await;
    assert!(ok, "{text}");
    until_read(&pair).await;
    assert!(accepted.elapsed() < DECISION_SEEN, "went on after {:?}", accepted.elapsed());
    pair.relay.until_ready().await;
    fence(&pair).await;
    assert_eq!(pair.relay.process().pid().unwrap(), process, "nobody restarted it");
    assert!(!pair.is_cached("user:1:profile").await.unwrap(), "what was missed is declared stale");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_was_dropped_on_purpose_is_no_gap_and_the_next_relay_begins_anew() {
    let pair = users().await;
    fence(&pair).await;
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    let (ok, text) = relay(&pair, &["slot", "drop"], &[]).await;
    assert!(ok, "{text}");
    assert_eq!(slot(&pair, "slot_name").await, "");
    sql(&pair, "update users set name = 'unseen' where id = 1").await;
    let (ok, text) = relay(&pair, &["slot", "drop"], &[]).await;
    assert!(ok && text.contains("does not exist"), "{text}");

    pair.relay.process().start().unwrap();
    pair.relay.until_ready().await;
    fence(&pair).await;
    assert!(pair.relay.metric("relay_wal_gaps_total").await.unwrap() < 1.0, "an intended end is no gap");
}
