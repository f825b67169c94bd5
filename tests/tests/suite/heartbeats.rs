//! Heartbeats go through the whole pipe, and what holds them up shows.

use std::time::Duration;

use devstack::{RedisCluster, RedisOptions, eventually};
use serde_json::Value;
use tests::{Daemon, Pair, PairOptions, SETTLED};

const LIMIT: (&str, &str) = ("SUBSCRIBER_HEARTBEAT_LIMIT", "3s");

fn impatient() -> PairOptions {
    PairOptions { subscriber: vec![(LIMIT.0, LIMIT.1.to_owned())], ..Default::default() }
}

async fn age(subscriber: &Daemon) -> Option<f64> {
    let (_, text) = subscriber.get("/metrics").await.unwrap();
    let ages = text.lines().filter(|line| line.starts_with("subscriber_heartbeat_age_seconds{"));
    ages.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).reduce(f64::max)
}

/// State and reason of the component that judges heartbeats.
async fn heartbeat(subscriber: &Daemon) -> Result<(String, String), String> {
    let (_, body) = subscriber.get("/readyz").await.map_err(|error| error.to_string())?;
    let body: Value = serde_json::from_str(&body).map_err(|error| error.to_string())?;
    let checks = body["checks"].as_array().ok_or("no checks")?;
    let check = checks.iter().find(|check| check["name"] == "heartbeat").ok_or("no heartbeat yet")?;
    let text = |field: &str| check[field].as_str().unwrap_or_default().to_owned();
    Ok((text("state"), text("reason")))
}

async fn until_missing(subscriber: &Daemon, word: &str) {
    eventually(SETTLED, async || {
        let (state, reason) = heartbeat(subscriber).await?;
        if state == "not_ready" && reason.contains(word) { Ok(()) } else { Err(format!("{state} {reason}")) }
    })
    .await;
    eventually(SETTLED, async || age(subscriber).await.is_some_and(|age| age > 3.0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_of_two_relays_come_through_as_one_and_leave_nothing_behind() {
    let pair = Pair::start_with(impatient()).await.unwrap();
    let another = pair.another_relay(&[]).unwrap();
    another.until_ready().await;
    eventually(SETTLED, async || age(&pair.subscriber).await.is_some_and(|age| age < 3.0)).await;
    assert_eq!(heartbeat(&pair.subscriber).await.unwrap().0, "ready");
    let jetstream = async_nats::jetstream::new(async_nats::connect(pair.stack.nats_url()).await.unwrap());
    let mut stream = jetstream.get_stream("INVALIDATIONS").await.unwrap();
    let before = stream.cached_info().state.last_sequence;
    eventually(SETTLED, async || stream.info().await.unwrap().state.last_sequence >= before + 5).await;
    let mut seconds = Vec::new();
    for sequence in before + 1..=before + 5 {
        let message = stream.get_raw_message(sequence).await.unwrap();
        assert_eq!(message.subject.as_str(), "invalidation.heartbeat");
        // An older subscriber finds nothing to do in it.
        assert!(event::Envelope::decode(&message.payload).unwrap().events.is_empty());
        let sent = message.headers.get("Invalidation-Heartbeat").unwrap().as_str();
        seconds.push(sent.parse::<i64>().unwrap() / 1_000_000);
    }
    seconds.dedup();
    assert_eq!(seconds.len(), 5, "more than one heartbeat a second: {seconds:?}");
    assert!(pair.subscriber.metric("subscriber_dead_letters_total").await.unwrap() < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_are_stuck_are_noticed_whatever_they_say() {
    let mut options = impatient();
    options.subscriber.push(("FAILPOINTS", "subscriber.after_delete=pause".to_owned()));
    let pair = Pair::start_with(options).await.unwrap();
    until_missing(&pair.subscriber, "no heartbeat was applied").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_frozen_is_noticed_and_forgotten_when_it_answers() {
    let pair = Pair::start_with(impatient()).await.unwrap();
    eventually(SETTLED, async || age(&pair.subscriber).await.is_some()).await;
    pair.stack.redis.stop().unwrap();
    until_missing(&pair.subscriber, "heartbeat").await;
    pair.stack.redis.resume().unwrap();
    pair.subscriber.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_frozen_server_of_a_cluster_is_noticed() {
    let pair = Pair::start().await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    let cluster =
        RedisCluster::start_in(pair.stack.directory(), 3, 0, RedisOptions::default()).await.unwrap();
    let hosts: Vec<String> = cluster.nodes.iter().map(|node| node.address().to_string()).collect();
    let url = format!("redis+cluster://{}", hosts.join(","));
    let subscriber = pair
        .another_subscriber(&[
            ("REDIS_URL", url),
            ("SUBSCRIBER_DURABLE", "cluster".to_owned()),
            (LIMIT.0, LIMIT.1.to_owned()),
        ])
        .unwrap();
    subscriber.until_ready().await;
    eventually(SETTLED, async || age(&subscriber).await.is_some_and(|age| age < 3.0)).await;
    let (_, metrics) = subscriber.get("/metrics").await.unwrap();
    assert_eq!(metrics.matches("subscriber_heartbeat_age_seconds{").count(), 3, "{metrics}");
    cluster.nodes[1].stop().unwrap();
    until_missing(&subscriber, "heartbeat").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_gets_no_heartbeats_any_more_is_noticed() {
    let pair = Pair::start_with(impatient()).await.unwrap();
    eventually(SETTLED, async || age(&pair.subscriber).await.is_some()).await;
    // Nothing is delivered to it: paused, or with another filter, it looks the same from here.
    let redis = pair.cache().unwrap();
    let jetstream = async_nats::jetstream::new(async_nats::connect(pair.stack.nats_url()).await.unwrap());
    let limit = Duration::from_secs(2);
    let pulse = subscriber::heartbeat::Pulse { heartbeats: Default::default(), redis, jetstream, limit };
    let (health, shutdown) = (service::Health::new(), service::Shutdown::new());
    let running =
        tokio::spawn(pulse.run(health.component("heartbeat", service::Limits::default()), shutdown.clone()));
    eventually(SETTLED, async || {
        let reason = health.snapshot().components.remove(0).reason.unwrap_or_default();
        if reason.contains("paused or changed") { Ok(()) } else { Err(reason) }
    })
    .await;
    shutdown.request();
    running.await.unwrap();
}

/// Without relays, and with relays that know of no heartbeats.
#[tokio::test(flavor = "multi_thread")]
async fn where_no_relay_sends_any_the_subscriber_stays_ready_and_the_age_grows() {
    let pair = Pair::start_with(impatient()).await.unwrap();
    eventually(SETTLED, async || age(&pair.subscriber).await.is_some()).await;
    pair.relay.process().terminate().await.unwrap();
    eventually(SETTLED, async || age(&pair.subscriber).await.is_some_and(|age| age > 7.0)).await;
    pair.subscriber.until_ready().await;
    assert_eq!(heartbeat(&pair.subscriber).await.unwrap().0, "ready");
}
