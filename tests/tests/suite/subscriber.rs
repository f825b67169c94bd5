//! The subscriber between NATS and Redis, without Postgres and without a relay: what it takes for a gap and what not, and
//! what it does then.

use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, consumer::PullConsumer, stream::Config, stream::Stream};
use devstack::{Nats, NatsOptions, Redis, StackDirectory, eventually};
use event::{CacheKey, Change, CommittedEvent, Envelope, EventId};
use futures::StreamExt;
use subscriber::broker;
use subscriber::position::Seen;
use tests::{Daemon, SETTLED, program};

/// So long the stream keeps messages where a test waits until they expire: much longer than the subscriber takes between
/// two looks, even on a busy machine.
pub(crate) const SHORT: Duration = Duration::from_secs(8);

/// Servers of a subscriber, and nothing else.
pub(crate) struct Scene {
    pub(crate) nats: Nats,
    pub(crate) redis: Redis,
    pub(crate) jetstream: jetstream::Context,
    pub(crate) directory: Arc<StackDirectory>,
}

impl Scene {
    pub(crate) async fn new() -> Self {
        Self::with_nats(String::new()).await
    }

    /// With more lines in the configuration of NATS.
    pub(crate) async fn with_nats(configuration: String) -> Self {
        let directory = StackDirectory::create().unwrap();
        let options = NatsOptions { configuration, ..Default::default() };
        let nats = Nats::start_in(&directory, options).await.unwrap();
        let redis = Redis::start_in(&directory, Default::default()).await.unwrap();
        let jetstream = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
        Self { nats, redis, jetstream, directory }
    }

    /// The stream as a relay would create it, but for how long it keeps messages.
    pub(crate) async fn create_stream(&self, max_age: Duration) -> Stream {
        let config = Config {
            name: "INVALIDATIONS".to_owned(),
            subjects: vec!["invalidation.>".to_owned()],
            max_age,
            duplicate_window: Duration::from_secs(1),
            ..Default::default()
        };
        self.jetstream.create_stream(config).await.unwrap()
    }

    pub(crate) fn environment(&self, more: &[(&'static str, String)]) -> Vec<(&'static str, String)> {
        [&[("NATS_URL", self.nats.url()), ("REDIS_URL", self.redis.url())], more].concat()
    }

    pub(crate) fn subscriber(&self, more: &[(&'static str, String)]) -> Daemon {
        Daemon::spawn(&self.directory, "subscriber", &self.environment(more)).unwrap()
    }

    /// Runs an administrative command of the subscriber and returns what it printed.
    pub(crate) async fn ask(&self, arguments: &[&str], more: &[(&'static str, String)]) -> String {
        let mut command = Command::new(program("subscriber").unwrap());
        command.args(arguments).envs(self.environment(more));
        let run = move || command.output().unwrap();
        let output: Output = tokio::task::spawn_blocking(run).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub(crate) async fn publish(&self, topic: &str, key: &str) -> u64 {
        let subject = format!("invalidation.{topic}");
        self.jetstream.publish(subject, envelope(key).into()).await.unwrap().await.unwrap().sequence
    }

    pub(crate) async fn fill(&self, key: &str) {
        self.redis.command(&["SET", key, "cached"]).await.unwrap();
    }

    pub(crate) async fn until_gone(&self, key: &str) {
        eventually(SETTLED, async || self.redis.command(&["EXISTS", key]).await.is_ok_and(|n| n == "0"))
            .await;
    }

    /// Publishes a message now and then until the task is aborted.
    fn keep_publishing(&self, topic: &'static str) -> tokio::task::JoinHandle<()> {
        let jetstream = self.jetstream.clone();
        tokio::spawn(async move {
            loop {
                let _ = jetstream.publish(format!("invalidation.{topic}"), envelope("other").into()).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    }

    pub(crate) async fn until_recorded(&self, sequence: u64) {
        let config = cache::RedisConfig { url: self.redis.url(), ..Default::default() };
        let redis = cache::Redis::new(config).unwrap();
        eventually(SETTLED, async || {
            let record = redis.load_position("redis").await.map_err(|error| error.to_string())?;
            let record = String::from_utf8(record.unwrap_or_default()).unwrap();
            if record.contains(&format!("\"acked_seq\":{sequence}")) { Ok(()) } else { Err(record) }
        })
        .await;
    }

    /// Publishes to a topic that nobody takes until everything up to `sequence` has expired.
    pub(crate) async fn until_expired(&self, stream: &Stream, sequence: u64) {
        eventually(SETTLED, async || {
            self.publish("busy", "other").await;
            let first = stream.get_info().await.map_err(|error| error.to_string())?.state.first_sequence;
            if first > sequence { Ok(()) } else { Err(format!("{first} of {sequence}")) }
        })
        .await;
    }
}

fn envelope(key: &str) -> Vec<u8> {
    let event = CommittedEvent {
        id: EventId::generate(),
        keys: vec![CacheKey::new(key).unwrap()],
        change: Change::Delete,
        xids: Vec::new(),
        history: None,
        at_us: chrono::Utc::now().timestamp_micros(),
        traceparent: None,
    };
    Envelope { events: vec![event] }.encode()
}

fn quiet() -> Vec<(&'static str, String)> {
    vec![("SUBSCRIBER_TOPIC", "quiet".to_owned())]
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_other_topics_may_expire_while_the_own_topic_is_quiet() {
    let scene = Scene::new().await;
    let stream = scene.create_stream(SHORT).await;
    let subscriber = scene.subscriber(&quiet());
    scene.fill("own:1").await;
    let own = scene.publish("quiet", "own:1").await;
    scene.until_gone("own:1").await;
    // Later by more than the stream keeps, and nothing of the own topic since.
    let mut last = own;
    for _ in 0..2 {
        scene.until_expired(&stream, last).await;
        last = scene.publish("busy", "other").await;
    }
    let status = scene.ask(&["status"], &quiet()).await;
    let lag = status.lines().find(|line| line.starts_with("lag")).unwrap();
    assert!(!lag.contains("unknown"), "{status}");
    scene.fill("own:2").await;
    scene.publish("quiet", "own:2").await;
    scene.until_gone("own:2").await;
    subscriber.until_ready().await;
    assert!(
        subscriber.metric("subscriber_gaps_total").await.unwrap() < 1.0,
        "{}",
        subscriber.process().log()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_reaches_to_its_next_message_and_no_further_and_nowhere_if_some_expired_meanwhile() {
    let scene = Scene::new().await;
    let mut stream = scene.create_stream(Duration::from_secs(600)).await;
    for topic in ["quiet", "busy", "busy", "quiet", "busy"] {
        scene.publish(topic, "k").await;
    }
    let info = stream.info().await.unwrap();
    let created_us = info.created.timestamp_micros();
    let seen = Seen {
        stream_created_us: created_us,
        first_seq: 1,
        last_seq: 5,
        ack_floor: 0,
        is_refilled: false,
        holes: 0,
        is_unrecorded: false,
    };
    let mut reach =
        async |seen, applied| broker::reach(&mut stream, "invalidation.quiet", seen, applied).await.unwrap();
    assert_eq!(reach(seen, 0).await, 0);
    assert_eq!(reach(seen, 1).await, 3);
    assert_eq!(reach(seen, 4).await, 5);
    // Whatever came after the first look does not count.
    scene.publish("busy", "k").await;
    assert_eq!(reach(seen, 4).await, 5);
    assert_eq!(reach(Seen { last_seq: 3, ..seen }, 1).await, 3);
    // Another stream, and one that has lost something since.
    assert_eq!(reach(Seen { stream_created_us: 7, ..seen }, 4).await, 4);
    let purge = r#"{"seq":5}"#;
    scene.nats.request("$JS.API.STREAM.PURGE.INVALIDATIONS", purge).await.unwrap();
    assert_eq!(reach(seen, 3).await, 3);
    assert_eq!(reach(seen, 4).await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn message_of_the_own_topic_that_expired_unread_is_a_gap_although_nothing_of_it_is_pending() {
    let scene = Scene::new().await;
    let stream = scene.create_stream(SHORT).await;
    let subscriber =
        scene.subscriber(&[quiet().as_slice(), &[("SUBSCRIBER_GAP_GRACE", "1s".to_owned())]].concat());
    scene.fill("own:1").await;
    scene.publish("quiet", "own:1").await;
    scene.until_gone("own:1").await;
    subscriber.process().kill().unwrap();
    scene.fill("own:2").await;
    let missed = scene.publish("quiet", "own:2").await;
    scene.until_expired(&stream, missed).await;
    let consumer: PullConsumer = stream.get_consumer("redis").await.unwrap();
    assert_eq!(consumer.cached_info().num_pending, 0, "the consumer does not know what it missed");
    subscriber.process().start().unwrap();
    let reason = subscriber.until_not_ready_because("missing from the stream for good").await;
    assert!(reason.contains("expired"), "{reason}");
    assert!(subscriber.metric("subscriber_halted").await.unwrap() > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn halted_subscriber_stays_says_why_and_goes_on_when_the_gap_is_accepted() {
    let scene = Scene::new().await;
    let stream = scene.create_stream(SHORT).await;
    let subscriber = scene.subscriber(&[("SUBSCRIBER_GAP_GRACE", "1s".to_owned())]);
    scene.fill("before").await;
    scene.publish("default", "before").await;
    scene.until_gone("before").await;
    subscriber.process().kill().unwrap();
    let missed = scene.publish("default", "missed").await;
    scene.until_expired(&stream, missed).await;
    subscriber.process().start().unwrap();
    let reason = subscriber.until_not_ready_because("missing from the stream for good").await;
    assert!(reason.contains("SUBSCRIBER_GAP_POLICY") && reason.contains("accept-gap"), "{reason}");
    assert!(subscriber.metric("subscriber_halted").await.unwrap() > 0.0);
    let gaps = async || subscriber.metric("subscriber_gaps_total").await.unwrap();
    assert!((gaps().await - 1.0).abs() < 0.1, "{}", gaps().await);

    // It looks again, and again, and says so once. Nothing is consumed meanwhile, and messages go on expiring.
    let busy = scene.keep_publishing("busy");
    scene.fill("after").await;
    scene.publish("default", "after").await;
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert_eq!(scene.redis.command(&["EXISTS", "after"]).await.unwrap(), "1");
    assert!(gaps().await < 1.5, "one gap is counted once");
    let said = subscriber.process().log().matches("missing from the stream for good").count();
    assert_eq!(said, 1, "{}", subscriber.process().log());

    assert!(scene.ask(&["accept-gap"], &[]).await.contains("accepted"));
    subscriber.until_ready().await;
    busy.abort();
    assert!(subscriber.metric("subscriber_halted").await.unwrap() < 1.0);
    assert!(gaps().await < 1.5, "{}", subscriber.process().log());
    scene.publish("default", "after").await;
    scene.until_gone("after").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn durable_that_exists_is_changed_to_what_is_configured_and_keeps_its_place() {
    let scene = Scene::new().await;
    let stream = scene.create_stream(Duration::from_secs(600)).await;
    let subscriber = scene.subscriber(&[]);
    scene.fill("user:1").await;
    scene.publish("default", "user:1").await;
    scene.until_gone("user:1").await;
    subscriber.process().terminate().await.unwrap();
    let subscriber = scene.subscriber(&[("SUBSCRIBER_ACK_WAIT", "7s".to_owned())]);
    subscriber.until_ready().await;
    let consumer: PullConsumer = stream.get_consumer("redis").await.unwrap();
    let info = consumer.cached_info();
    assert_eq!(info.config.ack_wait, Duration::from_secs(7));
    assert_eq!((info.ack_floor.stream_sequence, info.num_pending), (1, 0));
    let log = subscriber.process().log();
    assert!(log.contains("ack_wait is 30s instead of 7s"), "{log}");
    scene.fill("user:2").await;
    scene.publish("default", "user:2").await;
    scene.until_gone("user:2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gap_of_a_stream_that_came_back_shorter_can_be_accepted() {
    let scene = Scene::new().await;
    scene.create_stream(Duration::from_secs(600)).await;
    scene.publish("default", "backed-up").await;
    scene.nats.terminate().await.unwrap();
    scene.nats.save_data("backup").unwrap();
    scene.nats.start().await.unwrap();
    let subscriber = scene.subscriber(&[("SUBSCRIBER_GAP_GRACE", "1s".to_owned())]);
    for key in ["a", "b", "c"] {
        scene.fill(key).await;
        scene.publish("default", key).await;
        scene.until_gone(key).await;
    }
    scene.until_recorded(4).await;
    scene.nats.kill().unwrap();
    scene.nats.restore_data("backup").unwrap();
    scene.nats.start().await.unwrap();
    subscriber.until_not_ready_because("NATS came back with old data, and no relay answers").await;
    // The next messages have numbers that were applied before.
    scene.fill("next").await;
    scene.publish("default", "next").await;
    assert!(scene.ask(&["accept-gap"], &[]).await.contains("accepted"));
    scene.until_gone("next").await;
    subscriber.until_ready().await;
}

/// A stream that was created anew, and somebody who answers for the relays: for a while that the stream was not examined,
/// which is an answer, and then that it is whole.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_the_stream_was_not_examined_yet_is_waited_for_however_long_it_takes() {
    let scene = Scene::new().await;
    scene.create_stream(Duration::from_secs(600)).await;
    let subscriber = scene.subscriber(&[("SUBSCRIBER_GAP_GRACE", "1s".to_owned())]);
    scene.fill("before").await;
    scene.publish("default", "before").await;
    scene.until_gone("before").await;
    scene.until_recorded(1).await;
    let client = async_nats::connect(scene.nats.url()).await.unwrap();
    let mut questions = client.subscribe("invalidation-relay.coverage").await.unwrap();
    client.flush().await.unwrap();
    scene.jetstream.delete_stream("INVALIDATIONS").await.unwrap();
    scene.create_stream(Duration::from_secs(600)).await;

    let began = std::time::Instant::now();
    let mut asked = 0;
    while asked < 5 || began.elapsed() < Duration::from_secs(6) {
        let question = questions.next().await.unwrap();
        asked += 1;
        let not_yet =
            r#"{"complete_since_us":null,"retained_since_us":0,"republish_remaining":1000,"later":1}"#;
        client.publish(question.reply.unwrap(), not_yet.into()).await.unwrap();
    }
    let reason = subscriber.until_not_ready_because("not examined the stream yet").await;
    assert!(reason.contains("created anew"), "{reason}");
    assert!(
        subscriber.metric("subscriber_gaps_total").await.unwrap() < 1.0,
        "{}",
        subscriber.process().log()
    );
    let question = questions.next().await.unwrap();
    let whole = r#"{"complete_since_us":0,"retained_since_us":0,"republish_remaining":1000}"#;
    client.publish(question.reply.unwrap(), whole.into()).await.unwrap();
    subscriber.until_ready().await;
    scene.fill("after").await;
    scene.publish("default", "after").await;
    scene.until_gone("after").await;
}
