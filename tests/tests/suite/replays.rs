//! A replay of the stream is whole, or says that it is not.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use cache::{Redis, RedisConfig};
use devstack::proxy::{FaultProxy, Mode};
use devstack::{Nats, NatsOptions, RedisOptions, eventually};
use event::{CacheKey, Change, CommittedEvent, Envelope, EventId};
use subscriber::replay::{Replay, ReplayError};

const SOON: Duration = Duration::from_secs(30);

/// A stream with something to replay, and a cache.
struct Bed {
    nats: Nats,
    redis: devstack::Redis,
    cache: Redis,
}

impl Bed {
    async fn new(max_payload: u32) -> Self {
        let options = NatsOptions { max_payload: Some(max_payload), ..Default::default() };
        let nats = Nats::start_alone(options).await.unwrap();
        let redis = devstack::Redis::start_alone(RedisOptions::default()).await.unwrap();
        let cache = Redis::new(RedisConfig { url: redis.url(), ..Default::default() }).unwrap();
        let bed = Self { nats, redis, cache };
        let config = stream::Config {
            name: "INVALIDATIONS".to_owned(),
            subjects: vec!["invalidation.>".to_owned()],
            ..Default::default()
        };
        bed.jetstream().await.create_stream(config).await.unwrap();
        bed
    }

    async fn jetstream(&self) -> jetstream::Context {
        jetstream::new(async_nats::connect(self.nats.url()).await.unwrap())
    }

    /// Publishes the change of every key, so many in one message, and puts something at each of them.
    async fn publish(&self, keys: &[String], change: &Change, in_a_message: usize) {
        let jetstream = self.jetstream().await;
        let mut acks = Vec::new();
        for keys in keys.chunks(in_a_message) {
            let body = Envelope { events: keys.iter().map(|key| committed(key, change)).collect() }.encode();
            acks.push(jetstream.publish("invalidation.default", body.into()).await.unwrap());
            for key in keys {
                self.redis.command(&["SET", key, "cached"]).await.unwrap();
            }
        }
        for ack in acks {
            ack.await.unwrap();
        }
    }

    async fn stream(&self, url: &str) -> stream::Stream {
        jetstream::new(async_nats::connect(url).await.unwrap()).get_stream("INVALIDATIONS").await.unwrap()
    }

    async fn left(&self) -> usize {
        self.redis.command(&["DBSIZE"]).await.unwrap().parse().unwrap()
    }

    fn replay<'a>(
        &'a self,
        stream: &'a stream::Stream,
        progress: &'a (dyn Fn() + Send + Sync),
    ) -> Replay<'a> {
        Replay { stream, redis: &self.cache, topic: None, max_payload: 1024 * 1024, progress }
    }
}

fn committed(key: &str, change: &Change) -> CommittedEvent {
    let keys = vec![CacheKey::new(key).unwrap()];
    let (id, change) = (EventId::generate(), change.clone());
    CommittedEvent { id, keys, change, xids: vec![], history: None, at_us: 0, traceparent: None }
}

fn keys(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("replayed:{number}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_whose_messages_were_lost_on_the_way_does_not_count_as_done() {
    let bed = Bed::new(1024 * 1024).await;
    bed.publish(&keys(4_000), &Change::Delete, 1).await;
    let proxy = FaultProxy::start(bed.nats.address()).await.unwrap();
    let stream = bed.stream(&bed.nats.url_through(&proxy)).await;
    let cut = async {
        eventually(SOON, async || bed.left().await < 4_000).await;
        // What the server sends now is delivered as far as it knows.
        proxy.set_mode(Mode::DropToClient);
        tokio::time::sleep(Duration::from_millis(300)).await;
        proxy.set_mode(Mode::Pass);
        proxy.reset_connections();
    };
    let replay = bed.replay(&stream, &|| {});
    let (outcome, ()) = tokio::join!(replay.run(None), cut);
    assert!(bed.left().await > 0, "the connection was cut too late");
    assert!(matches!(outcome, Err(ReplayError::Gap { .. } | ReplayError::Nats(_))), "{outcome:?}");
    // As the subscriber does it.
    assert_eq!(replay.run(None).await.unwrap(), 4_000);
    assert_eq!(bed.left().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_that_gets_no_answer_any_more_does_not_count_as_done() {
    let bed = Bed::new(1024 * 1024).await;
    // Fewer than one request brings: nothing comes after what is lost.
    bed.publish(&keys(200), &Change::Delete, 1).await;
    let proxy = FaultProxy::start(bed.nats.address()).await.unwrap();
    let stream = bed.stream(&bed.nats.url_through(&proxy)).await;
    let starts = AtomicU32::new(0);
    let cut_at_first_request = || {
        if starts.fetch_add(1, Ordering::Relaxed) == 0 {
            proxy.set_mode(Mode::DropToClient);
        }
    };
    let heal = async {
        eventually(SOON, async || starts.load(Ordering::Relaxed) > 0).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        proxy.set_mode(Mode::Pass);
        proxy.reset_connections();
    };
    let replay = bed.replay(&stream, &cut_at_first_request);
    let (outcome, ()) = tokio::join!(replay.run(None), heal);
    assert_eq!(bed.left().await, 200, "nothing was lost");
    assert!(matches!(outcome, Err(ReplayError::Gap { expected: 1, got: 200 })), "{outcome:?}");
    assert_eq!(replay.run(None).await.unwrap(), 200);
    assert_eq!(bed.left().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_ends_when_everything_left_has_expired() {
    let bed = Bed::new(1024 * 1024).await;
    bed.publish(&keys(600), &Change::Delete, 1).await;
    let url = bed.nats.url();
    let stream = bed.stream(&url).await;
    let requests = AtomicU32::new(0);
    let purge = || {
        // Before the second of three requests.
        if requests.fetch_add(1, Ordering::Relaxed) == 1 {
            let request = bed.nats.request("$JS.API.STREAM.PURGE.INVALIDATIONS", "");
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(request)).unwrap();
        }
    };
    assert_eq!(bed.replay(&stream, &purge).run(None).await.unwrap(), 256);
    assert_eq!(bed.left().await, 600 - 256);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_larger_than_one_request_may_bring_are_replayed_all_the_same() {
    const MAX_PAYLOAD: u32 = 8 * 1024 * 1024;
    let bed = Bed::new(MAX_PAYLOAD).await;
    let large = Change::update(vec![b'x'; 500_000], 1, SOON).unwrap();
    // Many that only together exceed a request, then one that does alone.
    bed.publish(&keys(40), &large, 1).await;
    bed.publish(&["a", "b", "c", "d", "e", "f", "g", "h", "i"].map(str::to_owned), &large, 9).await;
    let url = bed.nats.url();
    let stream = bed.stream(&url).await;
    let replay = Replay { max_payload: MAX_PAYLOAD as usize, ..bed.replay(&stream, &|| {}) };
    assert_eq!(replay.run(None).await.unwrap(), 41);
    assert_eq!(bed.left().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_says_that_it_gets_on_while_redis_is_slow() {
    let bed = Bed::new(1024 * 1024).await;
    bed.publish(&keys(1), &Change::Delete, 1).await;
    let proxy = FaultProxy::start(bed.redis.address()).await.unwrap();
    let url = format!("redis://{}", proxy.addr());
    let patient = Duration::from_secs(60);
    let cache =
        Redis::new(RedisConfig { url, pool_size: 1, response_timeout: patient, ..Default::default() })
            .unwrap();
    cache.ping().await.unwrap();
    let nats_url = bed.nats.url();
    let stream = bed.stream(&nats_url).await;
    let signs = AtomicU32::new(0);
    let count = || {
        signs.fetch_add(1, Ordering::Relaxed);
    };
    let replay = Replay { redis: &cache, ..bed.replay(&stream, &count) };
    proxy.set_mode(Mode::Stall);
    let resume = async {
        eventually(SOON, async || signs.load(Ordering::Relaxed) >= 4).await;
        proxy.set_mode(Mode::Pass);
    };
    let (outcome, ()) = tokio::join!(replay.run(None), resume);
    assert_eq!(outcome.unwrap(), 1);
    assert_eq!(bed.left().await, 0);
}
