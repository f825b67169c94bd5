//! The durable consumer of a cache: used by another cache, edited, paused, or the only one that remembers.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::Stream;
use devstack::{Redis, eventually};
use subscriber::durable::Claim;
use tests::{Daemon, SETTLED};

use crate::subscriber::{SHORT, Scene};

pub(crate) const LONG: Duration = Duration::from_secs(600);

pub(crate) const RECORD: &str = "\u{1f}position:redis";
const IDENTITY: &str = "\u{1f}position:{\u{1f}position:redis}:cache";

/// A cache whose subscriber has applied one event and has recorded it.
pub(crate) async fn acquainted(max_age: Duration) -> (Scene, Stream, Daemon) {
    let scene = Scene::new().await;
    let stream = scene.create_stream(max_age).await;
    let subscriber = scene.subscriber(&[("SUBSCRIBER_GAP_GRACE", "1s".to_owned())]);
    subscriber.until_ready().await;
    scene.fill("first").await;
    scene.publish("default", "first").await;
    scene.until_gone("first").await;
    scene.until_recorded(1).await;
    (scene, stream, subscriber)
}

pub(crate) async fn another_redis(scene: &Scene) -> Redis {
    Redis::start_in(&scene.directory, Default::default()).await.unwrap()
}

async fn info(stream: &Stream) -> async_nats::jetstream::consumer::Info {
    let consumer: PullConsumer = stream.get_consumer("redis").await.unwrap();
    consumer.cached_info().clone()
}

async fn is_ready(daemon: &Daemon) -> bool {
    daemon.get("/readyz").await.is_ok_and(|(status, _)| status == 200)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_cache_with_the_same_durable_is_refused_and_the_first_misses_nothing() {
    let (scene, stream, first) = acquainted(LONG).await;
    let redis = another_redis(&scene).await;
    let environment = [("REDIS_URL", redis.url())];
    let second = scene.subscriber(&environment);
    let reason = second.until_not_ready_because("belongs to another cache").await;
    assert!(reason.contains(&scene.redis.url()) && reason.contains("SUBSCRIBER_DURABLE"), "{reason}");
    for number in 0..40 {
        let key = format!("user:{number}");
        scene.fill(&key).await;
        scene.publish("default", &key).await;
    }
    for number in 0..40 {
        scene.until_gone(&format!("user:{number}")).await;
    }
    assert!(is_ready(&first).await);
    let status = scene.ask(&["status"], &environment).await;
    assert!(status.contains("ANOTHER cache"), "{status}");

    // The first one being away changes nothing, and a restart of the second neither.
    first.process().terminate().await.unwrap();
    second.process().kill().unwrap();
    second.process().start().unwrap();
    second.until_not_ready_because("belongs to another cache").await;
    first.process().start().unwrap();
    first.until_ready().await;

    // An operator gives the durable to the second.
    first.process().terminate().await.unwrap();
    stream.delete_consumer("redis").await.unwrap();
    second.until_ready().await;
    first.process().start().unwrap();
    let reason = first.until_not_ready_because("belongs to another cache").await;
    assert!(reason.contains(&redis.url()), "{reason}");
    redis.command(&["SET", "moved", "cached"]).await.unwrap();
    scene.publish("default", "moved").await;
    eventually(SETTLED, async || redis.command(&["EXISTS", "moved"]).await.is_ok_and(|n| n == "0")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_caches_that_start_at_once_with_one_durable_one_is_refused() {
    let scene = Scene::new().await;
    scene.create_stream(LONG).await;
    // Two databases of one server are two caches.
    let daemons = ["/0", "/1"]
        .map(|database| scene.subscriber(&[("REDIS_URL", format!("{}{database}", scene.redis.url()))]));
    let refused = async |daemon: &Daemon| {
        let answer = daemon.get("/readyz").await;
        answer.is_ok_and(|(status, body)| status == 503 && body.contains("belongs to another cache"))
    };
    eventually(SETTLED, async || {
        let [first, second] = &daemons;
        (is_ready(first).await && refused(second).await) || (is_ready(second).await && refused(first).await)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_was_emptied_keeps_its_durable() {
    let (scene, _, subscriber) = acquainted(LONG).await;
    let before = scene.redis.command(&["GET", IDENTITY]).await.unwrap();
    scene.redis.command(&["FLUSHALL"]).await.unwrap();
    eventually(SETTLED, async || {
        scene.redis.command(&["GET", IDENTITY]).await.is_ok_and(|now| now == before)
            && scene.redis.command(&["EXISTS", RECORD]).await.is_ok_and(|n| n == "1")
    })
    .await;
    assert!(is_ready(&subscriber).await, "{}", subscriber.process().log());

    // While nobody looks. Then it might be another cache as well, and takes the durable over after a while.
    subscriber.process().terminate().await.unwrap();
    scene.redis.command(&["FLUSHALL"]).await.unwrap();
    subscriber.process().start().unwrap();
    subscriber.until_ready().await;
    scene.fill("next").await;
    scene.publish("default", "next").await;
    scene.until_gone("next").await;
}

/// How an operator edits a consumer: a name, the edit, and what the log must name afterwards.
type Edit = (&'static str, fn(&mut pull::Config));

const EDITS: [Edit; 5] = [
    ("filter_subject", |config| config.filter_subject = "invalidation.other".to_owned()),
    ("headers_only", |config| config.headers_only = true),
    ("max_batch", |config| config.max_batch = 1),
    ("max_expires", |config| config.max_expires = Duration::from_millis(500)),
    ("max_deliver", |config| config.max_deliver = 1),
];

async fn edit(stream: &Stream, change: fn(&mut pull::Config)) {
    use async_nats::jetstream::consumer::FromConsumer;
    let mut config = pull::Config::try_from_consumer_config(info(stream).await.config).unwrap();
    change(&mut config);
    stream.create_consumer(config).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_durable_that_is_edited_is_put_right_and_what_was_missed_is_applied() {
    let (scene, stream, subscriber) = acquainted(LONG).await;
    for (name, change) in EDITS {
        // While the subscriber runs, and while it is away.
        edit(&stream, change).await;
        let running = format!("running:{name}");
        scene.fill(&running).await;
        scene.publish("default", &running).await;
        scene.until_gone(&running).await;

        subscriber.process().terminate().await.unwrap();
        edit(&stream, change).await;
        let away = format!("away:{name}");
        scene.fill(&away).await;
        scene.publish("default", &away).await;
        subscriber.process().start().unwrap();
        scene.until_gone(&away).await;
        subscriber.until_ready().await;
        let log = subscriber.process().log();
        assert!(log.contains(&format!("should be: {name} is")), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_durable_that_cannot_be_put_right_is_not_used() {
    let scene = Scene::new().await;
    let stream = scene.create_stream(LONG).await;
    let wrong = pull::Config {
        durable_name: Some("redis".to_owned()),
        ack_policy: AckPolicy::None,
        ..Default::default()
    };
    stream.create_consumer(wrong).await.unwrap();
    let subscriber = scene.subscriber(&[]);
    let reason = subscriber.until_not_ready_because("ack_policy").await;
    assert!(reason.contains("nats consumer rm INVALIDATIONS redis"), "{reason}");
    // As the message says.
    stream.delete_consumer("redis").await.unwrap();
    subscriber.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_durable_is_a_reason_not_to_be_ready() {
    let (scene, _, subscriber) = acquainted(LONG).await;
    let pause = async |until: serde_json::Value| {
        let request = "CONSUMER.PAUSE.INVALIDATIONS.redis";
        scene.jetstream.request::<_, _, serde_json::Value>(request, &until).await
    };
    let answer = pause(serde_json::json!({"pause_until": "2099-01-01T00:00:00Z"})).await;
    // nats-server below 2.11 cannot pause.
    if !answer.is_ok_and(|answer| answer["paused"] == true) {
        return;
    }
    let reason = subscriber.until_not_ready_because("paused until 2099").await;
    assert!(reason.contains("nats consumer resume INVALIDATIONS redis"), "{reason}");
    let status = scene.ask(&["status"], &[]).await;
    assert!(status.contains("PAUSED        until 2099"), "{status}");
    pause(serde_json::json!({})).await.unwrap();
    subscriber.until_ready().await;
}

/// Waits until the durable has a copy of the record, and returns it.
async fn claim(stream: &Stream, sequence: u64) -> Claim {
    eventually(SETTLED, async || {
        let claim = Claim::parse(&info(stream).await.config.description.unwrap_or_default());
        claim.filter(|claim| claim.acked_seq >= sequence)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_noticed_although_redis_has_evicted_what_the_subscriber_stored() {
    let (scene, stream, subscriber) = acquainted(SHORT).await;
    subscriber.process().terminate().await.unwrap();
    subscriber.process().start().unwrap();
    subscriber.until_ready().await;
    claim(&stream, 1).await;
    for gone in [RECORD, IDENTITY] {
        scene.redis.command(&["DEL", gone]).await.unwrap();
        eventually(SETTLED, async || scene.redis.command(&["EXISTS", gone]).await.is_ok_and(|n| n == "1"))
            .await;
    }
    subscriber.process().terminate().await.unwrap();
    scene.redis.command(&["DEL", RECORD, IDENTITY]).await.unwrap();
    scene.fill("stale").await;
    let missed = scene.publish("default", "stale").await;
    scene.until_expired(&stream, missed).await;
    subscriber.process().start().unwrap();
    subscriber.until_not_ready_because("missing from the stream for good").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_durable_without_any_record_beside_it_is_a_gap_unless_the_cache_is_empty() {
    let (scene, stream, subscriber) = acquainted(SHORT).await;
    subscriber.process().terminate().await.unwrap();
    let forget = async || {
        scene.redis.command(&["DEL", RECORD, IDENTITY]).await.unwrap();
        edit(&stream, |config| config.description = Some("mine".to_owned())).await;
    };
    forget().await;
    scene.fill("stale").await;
    let missed = scene.publish("default", "stale").await;
    scene.until_expired(&stream, missed).await;
    subscriber.process().start().unwrap();
    let reason = subscriber.until_not_ready_because("missing from the stream for good").await;
    assert!(reason.contains("says which messages this cache has applied"), "{reason}");
    subscriber.process().terminate().await.unwrap();
    scene.redis.command(&["DEL", "stale"]).await.unwrap();
    forget().await;
    subscriber.process().start().unwrap();
    subscriber.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_cache_begins_with_what_is_published_from_now_on_and_another_with_everything() {
    let scene = Scene::new().await;
    let stream = scene.create_stream(LONG).await;
    scene.publish("default", "old").await;
    let redis = another_redis(&scene).await;
    redis.command(&["SET", "old", "cached"]).await.unwrap();
    let cases = [("empty", scene.redis.url(), true), ("filled", redis.url(), false)];
    for (durable, url, is_empty) in cases {
        let subscriber = scene.subscriber(&[("SUBSCRIBER_DURABLE", durable.to_owned()), ("REDIS_URL", url)]);
        subscriber.until_ready().await;
        let consumer: PullConsumer = stream.get_consumer(durable).await.unwrap();
        let policy = consumer.cached_info().config.deliver_policy;
        assert_eq!(matches!(policy, DeliverPolicy::ByStartTime { .. }), is_empty, "{durable}: {policy:?}");
        assert!(subscriber.metric("subscriber_replays_total").await.unwrap() < 1.0);
    }
    eventually(SETTLED, async || redis.command(&["EXISTS", "old"]).await.is_ok_and(|n| n == "0")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_deleted_unread_from_the_middle_of_the_stream_are_a_gap_and_applied_ones_are_not() {
    let (scene, stream, subscriber) = acquainted(LONG).await;
    let purge = async |subject: &str| {
        let request = serde_json::json!({ "filter": subject });
        let purge =
            scene.jetstream.request::<_, _, serde_json::Value>("STREAM.PURGE.INVALIDATIONS", &request);
        assert_eq!(purge.await.unwrap()["success"], true);
    };
    // What was applied may go.
    scene.publish("other", "a").await;
    scene.publish("default", "b").await;
    scene.until_recorded(3).await;
    purge("invalidation.other").await;
    scene.fill("c").await;
    scene.publish("default", "c").await;
    scene.until_gone("c").await;
    scene.until_recorded(4).await;
    assert!(is_ready(&subscriber).await);

    subscriber.process().terminate().await.unwrap();
    scene.publish("default", "kept").await;
    scene.publish("other", "missed").await;
    let single = scene.publish("default", "missed").await;
    scene.publish("default", "kept").await;
    purge("invalidation.other").await;
    stream.delete_message(single).await.unwrap();
    subscriber.process().start().unwrap();
    let reason = subscriber.until_not_ready_because("missing from the stream for good").await;
    assert!(reason.contains("2 messages were deleted"), "{reason}");
    assert!(scene.ask(&["accept-gap"], &[]).await.contains("accepted"));
    subscriber.until_ready().await;

    // That is remembered.
    scene.until_recorded(8).await;
    subscriber.process().terminate().await.unwrap();
    subscriber.process().start().unwrap();
    subscriber.until_ready().await;
    assert!(subscriber.metric("subscriber_gaps_total").await.unwrap() < 1.0);
}
