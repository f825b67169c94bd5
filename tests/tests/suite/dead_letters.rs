//! Messages that cannot be decoded are set aside whatever their headers say, and hold up nothing if they cannot be.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer::PullConsumer, stream};
use devstack::{Nats, Redis, RedisOptions, StackDirectory, eventually};
use tests::{Daemon, SETTLED};

use crate::subscriber::Scene;

const LONG: Duration = Duration::from_secs(600);
const DEAD: &str = "INVALIDATIONS_DEAD";

async fn publish(scene: &Scene, headers: &[(&str, &str)], body: Vec<u8>) {
    let mut map = HeaderMap::new();
    headers.iter().for_each(|(name, value)| map.insert(*name, *value));
    let sent = scene.jetstream.publish_with_headers("invalidation.default", map, body.into()).await;
    sent.unwrap().await.unwrap();
}

/// The dead letter with this number.
async fn letter(scene: &Scene, sequence: u64) -> jetstream::message::StreamMessage {
    eventually(SETTLED, async || {
        let dead = scene.jetstream.get_stream(DEAD).await.map_err(|error| error.to_string())?;
        dead.get_raw_message(sequence).await.map_err(|error| error.to_string())
    })
    .await
}

async fn until_acknowledged(scene: &Scene, sequence: u64) {
    let stream = scene.jetstream.get_stream("INVALIDATIONS").await.unwrap();
    eventually(SETTLED, async || {
        let consumer: PullConsumer = stream.get_consumer("redis").await.map_err(|error| error.to_string())?;
        let floor = consumer.cached_info().ack_floor.stream_sequence;
        if floor >= sequence { Ok(()) } else { Err(format!("{floor}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_whose_headers_nats_would_obey_is_set_aside_with_the_headers_as_text() {
    let scene = Scene::new().await;
    scene.create_stream(LONG).await;
    let subscriber = scene.subscriber(&[]);
    subscriber.until_ready().await;
    let headers = [("Nats-Expected-Stream", "INVALIDATIONS"), ("Nats-Rollup-X", "all"), ("Mine", "kept")];
    publish(&scene, &headers, b"garbage".to_vec()).await;
    let kept = letter(&scene, 1).await;
    assert_eq!(kept.headers.get("Dead-Nats-Expected-Stream").unwrap().as_str(), "INVALIDATIONS");
    assert_eq!(kept.headers.get("Mine").unwrap().as_str(), "kept");
    assert!(kept.headers.get("Nats-Expected-Stream").is_none());
    until_acknowledged(&scene, 1).await;
    assert!(subscriber.process().log().contains("set aside as a dead letter"));
    assert!(subscriber.metric("subscriber_dead_letters_failed_total").await.unwrap() < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nats_says_about_expired_messages_is_no_dead_letter() {
    let scene = Scene::new().await;
    scene.create_stream(LONG).await;
    let subscriber = scene.subscriber(&[]);
    // As nats-server writes it into a stream with subject_delete_marker_ttl.
    publish(&scene, &[("Nats-Marker-Reason", "MaxAge")], Vec::new()).await;
    until_acknowledged(&scene, 1).await;
    subscriber.until_ready().await;
    assert!(subscriber.metric("subscriber_dead_letters_total").await.unwrap() < 1.0);
    assert!(scene.jetstream.get_stream(DEAD).await.is_err(), "nothing was set aside");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_of_the_largest_size_is_cut_to_make_room_for_the_reason() {
    const MAX_PAYLOAD: usize = 1024 * 1024;
    let scene = Scene::new().await;
    scene.create_stream(LONG).await;
    let _subscriber = scene.subscriber(&[]);
    publish(&scene, &[], vec![b'x'; MAX_PAYLOAD]).await;
    let kept = letter(&scene, 1).await;
    assert_eq!(kept.headers.get("Invalidation-Dead-Original-Bytes").unwrap().as_str(), "1048576");
    assert!(kept.payload.len() > MAX_PAYLOAD - 2_000, "{}", kept.payload.len());
    until_acknowledged(&scene, 1).await;
}

/// One account for everybody, with this limit of JetStream.
fn limited(limit: &str) -> String {
    format!(
        "accounts {{ app {{ jetstream {{ {limit} }}, users: [ {{ user: app, password: app }} ] }} }}\nno_auth_user: app"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn without_room_for_dead_letters_everything_else_goes_on_and_the_cause_is_named() {
    let cases = [
        ("max_file: 100MB", "SUBSCRIBER_DEAD_MAX_BYTES", "insufficient storage"),
        ("max_file: 1GB, max_streams: 1", "raise max_streams", "number of streams"),
    ];
    for (limit, advice, cause) in cases {
        let scene = Scene::with_nats(limited(limit)).await;
        scene.create_stream(LONG).await;
        let subscriber = scene.subscriber(&[("SUBSCRIBER_ACK_WAIT", "1s".to_owned())]);
        publish(&scene, &[], b"garbage".to_vec()).await;
        eventually(SETTLED, async || {
            let log = subscriber.process().log();
            if log.contains(advice) && log.contains(cause) { Ok(()) } else { Err(log) }
        })
        .await;
        assert!(!subscriber.process().log().contains("$JS.API"), "{}", subscriber.process().log());
        scene.fill("user:1").await;
        scene.publish("default", "user:1").await;
        scene.until_gone("user:1").await;
        subscriber.until_ready().await;
        assert!(subscriber.metric("subscriber_dead_letters_failed_total").await.unwrap() >= 1.0);
        if limit.contains("max_streams") {
            continue;
        }
        // As the message says.
        subscriber.process().terminate().await.unwrap();
        let small =
            [("SUBSCRIBER_ACK_WAIT", "1s".to_owned()), ("SUBSCRIBER_DEAD_MAX_BYTES", "1048576".to_owned())];
        let _subscriber = scene.subscriber(&small);
        assert_eq!(&letter(&scene, 1).await.payload[..], b"garbage");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_cluster_dead_letters_are_on_as_many_servers_as_events_and_nobody_waits_for_them() {
    let cluster = Nats::cluster(3).await.unwrap();
    let directory = StackDirectory::create().unwrap();
    let redis = Redis::start_in(&directory, RedisOptions::default()).await.unwrap();
    let urls = cluster.nodes.iter().map(Nats::url).collect::<Vec<_>>().join(",");
    let client = async_nats::connect(urls.split(',').collect::<Vec<_>>()).await.unwrap();
    let jetstream = jetstream::new(client);
    let config = stream::Config {
        name: "INVALIDATIONS".to_owned(),
        subjects: vec!["invalidation.>".to_owned()],
        num_replicas: 3,
        ..Default::default()
    };
    eventually(SETTLED, async || jetstream.create_stream(config.clone()).await).await;
    let environment = [("NATS_URL", urls.clone()), ("REDIS_URL", redis.url())];
    let subscriber = Daemon::spawn(&directory, "subscriber", &environment).unwrap();
    subscriber.until_ready().await;
    jetstream.publish("invalidation.default", "garbage".into()).await.unwrap().await.unwrap();
    let dead = eventually(SETTLED, async || jetstream.get_stream(DEAD).await).await;
    assert_eq!(dead.cached_info().config.num_replicas, 3);

    // With one server away a subscriber starts all the same.
    cluster.nodes[2].kill().unwrap();
    subscriber.process().kill().unwrap();
    subscriber.process().start().unwrap();
    subscriber.until_ready().await;
}
