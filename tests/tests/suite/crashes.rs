//! Relay and subscriber die or freeze at the worst moments.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devstack::eventually;
use tests::{Daemon, Pair, PairOptions};

/// Loads the pair for a few seconds while a daemon dies again and again, restarts it each time, and makes sure that
/// everything arrives in the end.
async fn dies_and_is_restarted(pair: &Pair, daemon: &Daemon) {
    let end = Instant::now() + Duration::from_secs(4);
    let give_up = end + Duration::from_secs(60);
    let loaded = AtomicBool::new(false);
    let died = AtomicBool::new(false);
    // A slow machine takes longer to come to the failpoint.
    let enough = || Instant::now() >= end && (died.load(Ordering::Relaxed) || Instant::now() >= give_up);
    let load = async {
        let committed = pair.load("crash", |_| enough()).await.unwrap();
        loaded.store(true, Ordering::Relaxed);
        committed
    };
    let restart = async {
        let mut restarts = 0;
        let deadline = give_up + Duration::from_secs(90);
        while !loaded.load(Ordering::Relaxed)
            || pair.backlog().await.unwrap() > 0
            || pair.count("crash:*").await.unwrap() > 0
        {
            assert!(Instant::now() < deadline, "the work is never done; log:\n{}", daemon.process().log());
            if !daemon.process().is_running() {
                restarts += 1;
                died.store(true, Ordering::Relaxed);
                daemon.process().start().unwrap();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        restarts
    };
    let (committed, restarts) = tokio::join!(load, restart);
    assert!(committed > 20, "{committed}");
    assert!(restarts >= 1, "the failpoint was reached {restarts} times");
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
}

async fn relay_dies_at(failpoint: &str) {
    let relay = vec![("FAILPOINTS", format!("{failpoint}=kill@8"))];
    let pair = Pair::start_with(PairOptions { relay, ..Default::default() }).await.unwrap();
    dies_and_is_restarted(&pair, &pair.relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_killed_with_rows_claimed_loses_nothing() {
    relay_dies_at("relay.after_claim").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_killed_between_publish_and_settle_loses_nothing() {
    relay_dies_at("relay.after_publish").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_killed_after_settle_loses_nothing() {
    relay_dies_at("relay.after_settle").await;
}

async fn subscriber_dies_at(failpoint: &str) {
    let subscriber =
        vec![("FAILPOINTS", format!("{failpoint}=kill@10")), ("SUBSCRIBER_ACK_WAIT", "2s".to_owned())];
    let pair = Pair::start_with(PairOptions { subscriber, ..Default::default() }).await.unwrap();
    dies_and_is_restarted(&pair, &pair.subscriber).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_killed_between_delete_and_ack_loses_nothing() {
    subscriber_dies_at("subscriber.after_delete").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_killed_after_ack_loses_nothing() {
    subscriber_dies_at("subscriber.after_ack").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_relays_and_two_subscribers_killed_at_random_under_load_lose_nothing() {
    let subscriber = vec![("SUBSCRIBER_ACK_WAIT", "2s".to_owned())];
    let pair = Pair::start_with(PairOptions { subscriber, ..Default::default() }).await.unwrap();
    let second_relay = pair.another_relay(&[]).unwrap();
    let second_subscriber = pair.another_subscriber(&[]).unwrap();
    let daemons = [&pair.relay, &second_relay, &pair.subscriber, &second_subscriber];
    let end = Instant::now() + Duration::from_secs(12);
    let kills = async {
        let mut kills = 0_usize;
        while Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(200)).await;
            // A multiplier coprime to four visits every daemon in an order that is not a rhythm.
            let victim = daemons[(kills * 7 + kills / 4) % 4].process();
            if victim.is_running() {
                victim.kill().unwrap();
            }
            victim.start().unwrap();
            kills += 1;
        }
        kills
    };
    let (committed, kills) = tokio::join!(pair.load("storm", |_| Instant::now() >= end), kills);
    assert!(kills >= 20 && committed.unwrap() > 100);
    for daemon in daemons {
        daemon.until_ready().await;
    }
    pair.until_outbox_empty().await;
    pair.until_none("storm:*").await;
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_frozen_for_longer_than_the_publish_timeout_keeps_nothing_from_another() {
    // It freezes with rows in hand: the server takes them back when the lease is over.
    let relay = vec![("RELAY_PUBLISH_TIMEOUT", "1s".to_owned()), ("RELAY_WORKERS", "1".to_owned())];
    let pair = Pair::start_with(PairOptions { relay, ..Default::default() }).await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    let frozen = pair.another_relay(&[("FAILPOINTS", "relay.after_claim=pause@1".to_owned())]).unwrap();
    frozen.until_ready().await;
    pair.fill_many("frozen", 0..20).await.unwrap();
    pair.enqueue(&["frozen:0"]).await.unwrap();
    eventually(Duration::from_secs(20), async || {
        frozen.metric("relay_claims_total").await.unwrap_or(0.0) >= 1.0
    })
    .await;
    frozen.process().stop().unwrap();

    pair.relay.process().start().unwrap();
    pair.relay.until_ready().await;
    for number in 1..20 {
        pair.enqueue(&[&format!("frozen:{number}")]).await.unwrap();
    }
    pair.until_none("frozen:*").await;
    frozen.process().resume().unwrap();
    pair.fill("frozen:20").await.unwrap();
    pair.enqueue(&["frozen:20"]).await.unwrap();
    pair.until_none("frozen:*").await;
    pair.until_outbox_empty().await;
}
