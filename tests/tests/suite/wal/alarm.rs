//! The relay says so when the log piles up.

use devstack::eventually;
use tests::SETTLED;
use wal::session::{ChangeStream, Session, Settings, StreamOptions};

use super::{
    USER_RULES, USERS, captured, fence, relay, sql, until_not_ready_because, until_read, until_unread,
    write_log,
};

const LIMIT: [(&str, &str); 2] = [("RELAY_SLOT_LAG_LIMIT", "3000000"), ("RELAY_SOURCE", "outbox,wal")];

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_lags_because_nats_is_down_makes_the_relay_not_ready_until_it_has_caught_up() {
    let pair = captured(USERS, USER_RULES, &LIMIT).await;
    fence(&pair).await;
    let server = until_read(&pair).await;
    let lag = async || pair.relay.metric("relay_wal_slot_lag_bytes").await.unwrap();
    assert!(lag().await < 3e6);
    pair.stack.nats.kill().unwrap();
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "update users set name = 'x' where id = 1").await;
    write_log(&pair, 5).await;

    let reason = until_not_ready_because(&pair, "RELAY_SLOT_LAG_LIMIT").await;
    assert!(reason.contains(&format!("process {server} reads it")), "{reason}");
    let (before, _) = reason.split_once(" bytes behind").unwrap();
    assert!(before.rsplit(' ').next().unwrap().parse::<u64>().unwrap() > 5_000_000, "{reason}");
    let first = lag().await;
    assert!(first > 5e6, "{first}");
    write_log(&pair, 3).await;
    eventually(SETTLED, async || lag().await > first + 3e6).await;
    eventually(SETTLED, async || pair.relay.metric("relay_wal_slot_lag_seconds").await.unwrap() > 1.0).await;

    pair.stack.nats.start().await.unwrap();
    pair.until_none("user:1:*").await;
    pair.relay.until_ready().await;
    eventually(SETTLED, async || lag().await < 3e6).await;
    eventually(SETTLED, async || pair.relay.metric("relay_wal_slot_lag_seconds").await.unwrap() < 0.1).await;
}

/// Reads nothing of the slot and confirms nothing, as a relay that hangs, but says that it lives.
pub async fn hold_slot(url: &str) -> ChangeStream {
    let settings = Settings::parse(&url.parse().unwrap(), "holder").unwrap();
    let session = Session::open(&settings, SETTLED, SETTLED).await.unwrap();
    let (slot, publication) = ("outbox_relay", "outbox_relay");
    let options = StreamOptions { slot, publication, server_version: 140_000, streaming: false };
    session.start(&options).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_outbox_goes_on_while_the_log_cannot_be_read() {
    let pair = captured(USERS, USER_RULES, &LIMIT).await;
    fence(&pair).await;
    pair.relay.process().kill().unwrap();
    until_unread(&pair).await;
    write_log(&pair, 5).await;
    let url = pair.stack.postgres_url();
    let holder = hold_slot(&url).await;
    let server = until_read(&pair).await;
    pair.relay.process().start().unwrap();

    let reason = until_not_ready_because(&pair, "RELAY_SLOT_LAG_LIMIT").await;
    assert!(reason.contains(&format!("process {server} reads it")), "{reason}");
    pair.fill("cart:1").await.unwrap();
    pair.enqueue(&["cart:1"]).await.unwrap();
    pair.until_none("cart:1").await;

    drop(holder);
    pair.relay.until_ready().await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_cannot_be_created_before_a_transaction_ends_is_told_while_the_outbox_goes_on() {
    let pair = captured(USERS, USER_RULES, &LIMIT).await;
    pair.relay.process().terminate().await.unwrap();
    until_unread(&pair).await;
    let (ok, text) = relay(&pair, &["slot", "drop"], &[]).await;
    assert!(ok, "{text}");
    let mut open = pair.pool.begin().await.unwrap();
    sqlx::raw_sql("update users set name = 'x' where id = 1").execute(&mut *open).await.unwrap();
    pair.relay.process().start().unwrap();

    until_not_ready_because(&pair, "Postgres waits for all transactions that are open").await;
    pair.fill("cart:1").await.unwrap();
    pair.enqueue(&["cart:1"]).await.unwrap();
    pair.until_none("cart:1").await;

    open.commit().await.unwrap();
    pair.relay.until_ready().await;
    fence(&pair).await;
}
