//! NATS is down, restarted, full, or loses its leader.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devstack::{Nats, eventually};
use outbox::Event;
use tests::{Pair, PairOptions, SETTLED};

/// Far more than the relay needs, far less than a leak would take.
const MAX_RSS_BYTES: u64 = 64 * 1024 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn nats_down_for_a_minute_under_full_insert_rate_loses_nothing_and_costs_no_memory() {
    let pair = Pair::start().await.unwrap();
    pair.stack.nats.kill().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let mut committed = 0;
    while Instant::now() < end {
        pair.fill_many("outage", committed..committed + 500).await.unwrap();
        let events: Vec<Event> =
            (committed..committed + 500).map(|n| Event::delete([format!("outage:{n}")]).unwrap()).collect();
        let mut tx = pair.pool.begin().await.unwrap();
        outbox::enqueue_all(&mut tx, &events).await.unwrap();
        tx.commit().await.unwrap();
        committed += 500;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(committed > 10_000);
    assert_eq!(pair.backlog().await.unwrap(), i64::try_from(committed).unwrap());
    let reason = pair.relay.until_not_ready().await;
    assert!(reason.contains("NATS"), "{reason}");
    pair.stack.nats.start().await.unwrap();
    pair.until_none("outage:*").await;
    pair.until_outbox_empty().await;
    pair.relay.until_ready().await;
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
    assert!(pair.relay.process().rss_bytes().unwrap() < MAX_RSS_BYTES);
    assert!(pair.subscriber.process().rss_bytes().unwrap() < MAX_RSS_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_killed_and_restarted_with_its_data_under_load_loses_nothing() {
    let pair = Pair::start().await.unwrap();
    let end = Instant::now() + Duration::from_secs(8);
    let kills = async {
        while Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(900)).await;
            pair.stack.nats.kill().unwrap();
            pair.stack.nats.start().await.unwrap();
        }
    };
    let (committed, ()) = tokio::join!(pair.load("restart", |_| Instant::now() >= end), kills);
    assert!(committed.unwrap() > 20);
    pair.until_outbox_empty().await;
    pair.until_none("restart:*").await;
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn leader_of_a_three_node_cluster_killed_under_load_loses_nothing() {
    let pair = Pair::start().await.unwrap();
    pair.relay.process().terminate().await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    let cluster = Nats::cluster(3).await.unwrap();
    let nats = [("NATS_URL", cluster.url()), ("RELAY_STREAM_REPLICAS", "3".to_owned())];
    let relay = pair.another_relay(&nats).unwrap();
    // Its position is about another stream.
    let subscriber =
        pair.another_subscriber(&[nats[0].clone(), ("SUBSCRIBER_DURABLE", "clustered".to_owned())]).unwrap();
    relay.until_ready().await;
    subscriber.until_ready().await;
    let survived = AtomicBool::new(false);
    let published_more = async |by: f64| {
        let before = relay.metric("relay_events_published_total").await.unwrap();
        eventually(SETTLED, async || {
            relay.metric("relay_events_published_total").await.is_ok_and(|now| now >= before + by)
        })
        .await;
    };
    let kills = async {
        published_more(100.0).await;
        let leader = eventually(SETTLED, || cluster.stream_leader("INVALIDATIONS")).await;
        cluster.nodes[leader].kill().unwrap();
        published_more(100.0).await;
        cluster.nodes[leader].start().await.unwrap();
        cluster.wait_until_ready().await.unwrap();
        published_more(100.0).await;
        survived.store(true, Ordering::Relaxed);
    };
    let (committed, ()) = tokio::join!(pair.load("leader", |_| survived.load(Ordering::Relaxed)), kills);
    assert!(committed.unwrap() > 20);
    pair.until_outbox_empty().await;
    pair.until_none("leader:*").await;
    relay.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_stream_holds_events_back_in_the_outbox_instead_of_dropping_them() {
    let relay = vec![("RELAY_STREAM_MAX_BYTES", "20000".to_owned()), ("RELAY_CLAIM_LIMIT", "10".to_owned())];
    let pair = Pair::start_with(PairOptions { relay, ..Default::default() }).await.unwrap();
    pair.subscriber.process().kill().unwrap();
    pair.load("full", |committed| committed >= 400).await.unwrap();
    eventually(Duration::from_secs(30), async || {
        pair.relay.metric("relay_publish_failures_total").await.unwrap_or(0.0) >= 1.0
    })
    .await;
    assert!(pair.backlog().await.unwrap() > 0);
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
    // The operator makes room.
    let info = pair.stack.nats.request("$JS.API.STREAM.INFO.INVALIDATIONS", "").await.unwrap();
    let mut config: serde_json::Value =
        serde_json::from_str::<serde_json::Value>(&info).unwrap()["config"].clone();
    config["max_bytes"] = (-1).into();
    pair.stack.nats.request("$JS.API.STREAM.UPDATE.INVALIDATIONS", &config.to_string()).await.unwrap();
    pair.subscriber.process().start().unwrap();
    pair.until_outbox_empty().await;
    pair.until_none("full:*").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_deleted_under_the_pair_is_created_again_and_nothing_is_lost() {
    let pair = Pair::start().await.unwrap();
    pair.fill("before").await.unwrap();
    pair.enqueue(&["before"]).await.unwrap();
    pair.until_none("before").await;
    pair.until_recorded().await;
    pair.stack.nats.request("$JS.API.STREAM.DELETE.INVALIDATIONS", "").await.unwrap();
    pair.load("deleted", |committed| committed >= 40).await.unwrap();
    pair.until_outbox_empty().await;
    pair.until_none("deleted:*").await;
    pair.subscriber.until_ready().await;
}
