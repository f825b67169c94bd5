//! A database where nothing happens, on a server where others write.

use std::time::{Duration, Instant};

use devstack::eventually;
use tests::{Pair, SETTLED};

use super::{fence, slot, sql, users};

/// For how long the other database writes, and how much each time.
const BUSY: Duration = Duration::from_secs(15);
const NOISE: &str = "create table noise as select repeat('x', 1000) from generate_series(1, 2000); drop table noise; checkpoint";

/// More than a reader at work leaves unconfirmed, and far less than all that is written.
const BOUND_BYTES: u64 = 12_000_000;

async fn bytes_since(pair: &Pair, column: &str) -> u64 {
    let lag = slot(pair, &format!("pg_wal_lsn_diff(pg_current_wal_lsn(), {column})")).await;
    lag.parse().unwrap_or(u64::MAX)
}

async fn written(pair: &Pair) -> u64 {
    let rows =
        pair.stack.postgres.query("select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')").await.unwrap();
    rows[0][0].as_deref().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slot_follows_what_another_database_writes_while_ours_is_idle() {
    let pair = users().await;
    fence(&pair).await;
    pair.stack.create_database("busy").await.unwrap();
    let (begin, begin_bytes) = (Instant::now(), written(&pair).await);
    let (mut furthest, mut most_kept) = (0, 0);
    while begin.elapsed() < BUSY {
        pair.stack.postgres.query_in("busy", NOISE).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        furthest = furthest.max(bytes_since(&pair, "confirmed_flush_lsn").await);
        most_kept = most_kept.max(bytes_since(&pair, "restart_lsn").await);
    }
    let all = written(&pair).await - begin_bytes;
    println!("{all} bytes were written, the slot was at most {furthest} behind and kept {most_kept}");
    assert!(all > 2 * BOUND_BYTES, "only {all} bytes were written");
    assert!(furthest < BOUND_BYTES, "{furthest} of {all} bytes were not confirmed");
    // Log is given back in the steps of checkpoints.
    eventually(SETTLED, async || {
        pair.stack.postgres.query("checkpoint").await.unwrap();
        let kept = bytes_since(&pair, "restart_lsn").await;
        if kept < BOUND_BYTES { Ok(()) } else { Err(format!("{kept} of {all} bytes are kept")) }
    })
    .await;
}

/// How many heartbeats the log holds since the slot `probe` was made.
async fn heartbeats(pair: &Pair) -> u64 {
    let count = "select count(*) from pg_logical_slot_peek_binary_changes('probe', null, null, 'proto_version', '1',
        'publication_names', 'outbox_relay', 'messages', 'true') where position('outbox-heartbeat'::bytea in data) > 0";
    let rows = pair.stack.postgres.query(count).await.unwrap();
    rows[0][0].as_deref().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn something_is_written_to_the_log_when_the_slot_lags_and_nothing_happens() {
    let pair = users().await;
    fence(&pair).await;
    sql(&pair, "select pg_create_logical_replication_slot('probe', 'pgoutput')").await;
    pair.stack.create_database("busy").await.unwrap();
    // One change that cannot be published keeps the position where it is.
    pair.stack.nats.kill().unwrap();
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "update users set name = 'x' where id = 1").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(heartbeats(&pair).await, 0, "hardly anything is unconfirmed");
    pair.stack.postgres.query_in("busy", NOISE).await.unwrap();
    eventually(SETTLED, async || heartbeats(&pair).await > 0).await;
    let log = pair.relay.process().log();
    assert!(!log.contains("heartbeat"), "the first one has arrived:\n{log}");
    pair.stack.nats.start().await.unwrap();
    pair.until_none("user:1:*").await;
}
