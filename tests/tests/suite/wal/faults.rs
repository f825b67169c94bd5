//! Relay and Postgres die while the log is read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devstack::proxy::{FaultProxy, Mode};
use devstack::{Process, eventually};
use sqlx::AssertSqlSafe;
use tests::{Pair, SETTLED};

use super::{USER_RULES, USERS, captured, fence, slot, sql, until_read, users};

const WRITERS: usize = 8;

/// Updates users, each with a cached key, until `enough`. Faults of Postgres are ridden out as a service would.
async fn load(pair: &Pair, enough: impl Fn() -> bool) -> usize {
    let mut committed = 0;
    while !enough() {
        let writes = (0..WRITERS).map(|writer| async move {
            let id = (committed + writer) % 900 + 1;
            pair.fill(&format!("user:{id}:profile")).await.unwrap();
            let update = format!("update users set name = name || '.' where id = {id}");
            while sqlx::raw_sql(AssertSqlSafe(update.clone())).execute(&pair.pool).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        futures::future::join_all(writes).await;
        committed += WRITERS;
    }
    committed
}

/// Loads the pair while the relay dies again and again, and makes sure that everything arrives in the end.
async fn relay_dies_at(failpoint: &str) {
    let armed = format!("{failpoint}=kill@8");
    let pair = captured(USERS, USER_RULES, &[("FAILPOINTS", &armed)]).await;
    let end = Instant::now() + Duration::from_secs(4);
    let give_up = end + Duration::from_secs(60);
    let (loaded, died) = (AtomicBool::new(false), AtomicBool::new(false));
    let enough = || Instant::now() >= end && (died.load(Ordering::Relaxed) || Instant::now() >= give_up);
    let load = async {
        let committed = load(&pair, enough).await;
        loaded.store(true, Ordering::Relaxed);
        committed
    };
    let restart = async {
        let deadline = give_up + SETTLED;
        let mut restarts = 0;
        while !loaded.load(Ordering::Relaxed) || pair.count("user:*").await.unwrap() > 0 {
            assert!(
                Instant::now() < deadline,
                "not everything arrived; log:\n{}",
                pair.relay.process().log()
            );
            if !pair.relay.process().is_running() {
                restarts += 1;
                died.store(true, Ordering::Relaxed);
                pair.relay.process().start().unwrap();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        restarts
    };
    let (committed, restarts) = tokio::join!(load, restart);
    assert!(committed > 20 && restarts >= 1, "{committed} committed, {restarts} restarts");
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_killed_with_messages_published_but_not_settled_loses_nothing() {
    relay_dies_at("relay.wal_after_publish").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_killed_with_a_position_recorded_but_not_confirmed_loses_nothing_and_sees_no_gap() {
    relay_dies_at("relay.wal_after_settle").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_killed_under_load_loses_nothing() {
    let pair = users().await;
    let end = Instant::now() + Duration::from_secs(6);
    let kills = async {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            pair.stack.postgres.kill().unwrap();
            pair.stack.postgres.start().await.unwrap();
        }
    };
    let (committed, ()) = tokio::join!(load(&pair, || Instant::now() >= end), kills);
    assert!(committed > 20);
    pair.until_none("user:*").await;
    pair.relay.until_ready().await;
    fence(&pair).await;
}

/// Which of two relays reads the slot.
async fn active(relays: [&tests::Daemon; 2]) -> &Process {
    eventually(SETTLED, async || {
        for relay in relays {
            if relay.metric("relay_wal_active").await.unwrap_or(0.0) > 0.5 {
                return Ok(relay.process());
            }
        }
        Err("no relay reads the slot")
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_stands_by_takes_over_when_the_active_one_dies() {
    let pair = users().await;
    let second = pair.another_relay(&[]).unwrap();
    second.until_ready().await;
    let first = active([&pair.relay, &second]).await;
    pair.fill("user:1:profile").await.unwrap();
    first.kill().unwrap();
    let killed = Instant::now();
    sql(&pair, "update users set name = 'x' where id = 1").await;
    pair.until_none("user:1:*").await;
    assert!(killed.elapsed() < Duration::from_secs(15), "took over after {:?}", killed.elapsed());
    assert_ne!(active([&pair.relay, &second]).await.name(), first.name());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_relay_does_not_keep_the_slot() {
    let pair = users().await;
    let frozen_server = until_read(&pair).await;
    pair.relay.process().stop().unwrap();
    let second = pair.another_relay(&[]).unwrap();
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "update users set name = 'x' where id = 1").await;
    pair.until_none("user:1:*").await;
    assert_ne!(until_read(&pair).await, frozen_server);
    pair.relay.process().resume().unwrap();
    second.until_ready().await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_database_does_not_hold_back_the_log_that_another_one_writes() {
    let pair = users().await;
    fence(&pair).await;
    let lag = async || slot(&pair, "pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)").await;
    pair.stack.create_database("busy").await.unwrap();
    let noise =
        "create table noise as select repeat('x', 1000) from generate_series(1, 20000); drop table noise";
    for _ in 0..3 {
        pair.stack.postgres.query_in("busy", noise).await.unwrap();
    }
    eventually(SETTLED, async || {
        let lag: u64 = lag().await.parse().unwrap_or(u64::MAX);
        if lag < 2_000_000 { Ok(()) } else { Err(format!("{lag} bytes behind")) }
    })
    .await;
    // It comes to rest: recording the position writes log itself.
    let position = async || slot(&pair, "confirmed_flush_lsn").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = position().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(position().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_was_lost_on_the_way_to_postgres_is_asked_again() {
    let pair = users().await;
    pair.relay.process().terminate().await.unwrap();
    let proxy = FaultProxy::start(pair.stack.postgres.address()).await.unwrap();
    let url = pair.stack.postgres.url_through(&proxy, "postgres");
    let relay = pair.another_relay(&[("DATABASE_URL", url)]).unwrap();
    relay.until_ready().await;
    let server = until_read(&pair).await;
    // It begins anew, and what it asks first is swallowed: no answer, and no reset either.
    proxy.set_mode(Mode::DropToServer);
    sql(&pair, &format!("select pg_terminate_backend({server})")).await;
    eventually(SETTLED, async || {
        let log = relay.process().log();
        if log.contains("the write-ahead log is not read") { Ok(()) } else { Err(log) }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    proxy.set_mode(Mode::Pass);
    until_read(&pair).await;
    fence(&pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nats_lost_of_the_log_is_published_again() {
    let pair = users().await;
    pair.subscriber.process().terminate().await.unwrap();
    pair.fill("user:1:profile").await.unwrap();
    sql(&pair, "update users set name = 'x' where id = 1").await;
    eventually(SETTLED, async || pair.relay.metric("relay_wal_flushed_lsn").await.unwrap_or(0.0) > 0.0).await;
    pair.stack.nats.kill().unwrap();
    pair.stack.nats.wipe_data().unwrap();
    pair.stack.nats.start().await.unwrap();
    pair.subscriber.process().start().unwrap();
    pair.until_none("user:1:*").await;
}
