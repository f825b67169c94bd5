//! What a reader does that found no usable value.

use std::time::{Duration, Instant};

use event::CacheKey;
use tokio::time::{sleep, timeout_at};

use super::flight::{Landing, Leader, Role};
use super::load::{Lease, LeaseRequest, Loaded};
use super::{Cache, Options};
use crate::codec::Codec;
use crate::{Acquired, LeaseToken};

/// Flights one reader joins before it loads for itself. Two are enough unless the key is invalidated all the time.
const MAX_FLIGHTS: usize = 4;

/// First pause between two looks at a key that another process is loading; doubles up to the longest.
const FIRST_POLL: Duration = Duration::from_millis(1);
const LONGEST_POLL: Duration = Duration::from_millis(20);

/// Why there is no value from the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Miss {
    Absent,
    /// Of the wrong type, or not decodable: to be replaced.
    Unusable,
    /// Redis did not answer. It is not asked again in this read, which has waited long enough.
    NoAnswer,
}

/// How the leader of a flight goes on.
enum Course<'a, T> {
    /// The value has appeared, and the followers know.
    Done(T),
    /// It loads, and fills if it has a lease.
    Load(Leader<'a>, Option<Lease<'a>>),
}

impl Cache {
    pub(super) async fn miss<T, C, E, F, Fut>(
        &self,
        key: &CacheKey,
        options: &Options<C>,
        miss: Miss,
        loader: F,
    ) -> Result<T, E>
    where
        C: Codec<T>,
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Loaded<T>, E>>,
    {
        let came = Instant::now();
        // A load that takes longer than a lease is not worth waiting for: nobody may store it.
        let patience = tokio::time::Instant::now() + self.shared.config.lease;
        self.shared.meters.misses.increment(1);
        if miss == Miss::Unusable {
            self.count_unusable(key);
        }
        for _ in 0..MAX_FLIGHTS {
            let follower = match self.shared.flights.join(key) {
                Role::Leader(leader) => {
                    return match self.lead(leader, key, options, miss).await {
                        Course::Done(value) => Ok(value),
                        Course::Load(leader, lease) => {
                            self.load_and_fill(leader, lease, options, loader).await
                        }
                    };
                }
                Role::Follower(follower) => follower,
            };
            if let Some(value) = self.stale(key, options).await {
                return Ok(value);
            }
            match timeout_at(patience, follower.landing()).await {
                Ok(Landing::Value { bytes, for_readers_before }) if came < for_readers_before => {
                    let Ok(value) = options.codec.decode(&bytes) else { break };
                    self.shared.meters.shared_loads.increment(1);
                    return Ok(value);
                }
                Ok(Landing::Value { .. } | Landing::Abandoned) => {}
                Ok(Landing::Failed) | Err(_) => break,
            }
        }
        Ok(self.load(loader).await?.value)
    }

    /// Asks for the lease until the answer says what to do, at most as long as it is worth waiting for another process.
    async fn lead<'a, T, C: Codec<T>>(
        &'a self,
        leader: Leader<'a>,
        key: &'a CacheKey,
        options: &Options<C>,
        miss: Miss,
    ) -> Course<'a, T> {
        if miss == Miss::NoAnswer {
            return Course::Load(leader, None);
        }
        let mut unusable = miss == Miss::Unusable;
        let config = &self.shared.config;
        let token = LeaseToken::generate();
        let patience = Instant::now() + config.wait;
        let mut poll = FIRST_POLL;
        loop {
            let asked = Instant::now();
            let request = LeaseRequest::new(self, key, token);
            let acquired = self.ask(self.shared.reads.acquire(key, token, config.lease, unusable)).await;
            if let Some(acquired) = &acquired {
                self.shared.meters.leases.count(acquired);
            }
            let refused = match acquired {
                Some(Acquired::Grant(id)) => return Course::Load(leader, Some(request.granted(id))),
                None => return Course::Load(leader, None),
                Some(refused) => refused,
            };
            request.forget();
            match refused {
                Acquired::Grant(_) | Acquired::Bypass => return Course::Load(leader, None),
                Acquired::Value(bytes) => {
                    if let Ok(value) = options.codec.decode(&bytes) {
                        leader.land(Landing::Value { bytes: bytes.into(), for_readers_before: asked });
                        return Course::Done(value);
                    }
                    self.count_unusable(key);
                    unusable = true;
                }
                Acquired::Wait => {
                    if let Some(value) = self.stale(key, options).await {
                        leader.land(Landing::Abandoned);
                        return Course::Done(value);
                    }
                    if Instant::now() + poll > patience {
                        return Course::Load(leader, None);
                    }
                    sleep(poll).await;
                    poll = (poll * 2).min(LONGEST_POLL);
                }
            }
        }
    }

    /// The value from before the invalidation, if this read accepts it and it is not too old.
    async fn stale<T, C: Codec<T>>(&self, key: &CacheKey, options: &Options<C>) -> Option<T> {
        let longest = options.accepts_stale()?;
        let bytes = self.ask(self.shared.reads.get_stale(key, longest)).await??;
        let value = options.codec.decode(&bytes).ok()?;
        self.shared.meters.stale_served.increment(1);
        Some(value)
    }

    fn count_unusable(&self, key: &CacheKey) {
        self.shared.meters.undecodable.increment(1);
        tracing::debug!(key = key.as_str(), "the cached value is of the wrong type or cannot be decoded");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use devstack::proxy::{FaultProxy, Mode};

    use super::*;
    use crate::cache::CacheConfig;
    use crate::{Json, Redis, RedisConfig};

    /// What a reader, whose own load would find 2, gets when the flight it follows lands with 1.
    async fn value_after_landing(good_for_late_readers: bool) -> u32 {
        let server = devstack::Redis::start_alone(devstack::RedisOptions::default()).await.unwrap();
        let redis = Redis::new(RedisConfig { url: server.url(), ..RedisConfig::default() }).unwrap();
        let cache = Cache::new(redis, CacheConfig::default());
        let key = CacheKey::new("k").unwrap();
        let Role::Leader(leader) = cache.shared.flights.join(&key) else { panic!("the first leads") };
        let before = Instant::now();
        let options = Options::<Json>::default();
        let load = async || Ok::<_, std::convert::Infallible>(Loaded::new(2));
        let mut reader = std::pin::pin!(cache.miss(&key, &options, Miss::Absent, load));
        assert!(futures::poll!(reader.as_mut()).is_pending());
        let moment = if good_for_late_readers { Instant::now() } else { before };
        leader.land(Landing::Value { bytes: Arc::new(b"1".to_vec()), for_readers_before: moment });
        let Ok(value) = reader.await;
        value
    }

    #[tokio::test]
    async fn a_reader_who_came_after_the_fill_was_sent_does_not_get_its_value() {
        assert_eq!(value_after_landing(false).await, 2);
    }

    #[tokio::test]
    async fn a_reader_who_came_before_the_fill_was_sent_gets_its_value() {
        assert_eq!(value_after_landing(true).await, 1);
    }

    const SOON: Duration = Duration::from_secs(20);

    /// Long enough to do something while an answer is on its way.
    const UNDER_WAY: Duration = Duration::from_millis(700);

    /// A cache behind a proxy, whose requests are given up after a while.
    struct Bed {
        server: devstack::Redis,
        proxy: FaultProxy,
        cache: Cache,
        key: CacheKey,
    }

    impl Bed {
        async fn new() -> Self {
            let server = devstack::Redis::start_alone(devstack::RedisOptions::default()).await.unwrap();
            let proxy = FaultProxy::start(server.address()).await.unwrap();
            let url = server.url_through(&proxy);
            let config = RedisConfig { url, pool_size: 1, ..RedisConfig::default() };
            let redis = Redis::new(RedisConfig { response_timeout: UNDER_WAY * 5, ..config }).unwrap();
            redis.ping().await.unwrap();
            let config = CacheConfig { redis_timeout: UNDER_WAY * 4, ..CacheConfig::default() };
            let key = CacheKey::new("k").unwrap();
            let bed = Self { server, proxy, cache: Cache::new(redis, config), key };
            // Redis knows the scripts from now on, so that each step is one round trip.
            bed.miss(0).await;
            bed.invalidate().await;
            bed
        }

        /// Reads after a miss; the own load finds `loaded`.
        async fn miss(&self, loaded: u32) -> u32 {
            let options = Options::<Json>::default();
            let load = async || Ok::<_, std::convert::Infallible>(Loaded::new(loaded));
            let Ok(value) = self.cache.miss(&self.key, &options, Miss::Absent, load).await;
            value
        }

        /// As [`miss`](Self::miss), and `during` runs while the value is being loaded.
        async fn miss_while(&self, loaded: u32, during: impl AsyncFnOnce()) -> u32 {
            let options = Options::<Json>::default();
            let load = async || {
                during().await;
                Ok::<_, std::convert::Infallible>(Loaded::new(loaded))
            };
            let Ok(value) = self.cache.miss(&self.key, &options, Miss::Absent, load).await;
            value
        }

        async fn invalidate(&self) {
            self.server.command(&["DEL", "k", "\u{1f}g{k}"]).await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_accepted_fill_is_not_shared_with_readers_who_came_after_it_was_sent() {
        let bed = Bed::new().await;
        let leader = bed.miss_while(1, async || bed.proxy.set_mode(Mode::Delay(UNDER_WAY)));
        let late = async {
            let is_stored = async || bed.server.command(&["EXISTS", "k"]).await.unwrap() == "1";
            devstack::eventually(SOON, is_stored).await;
            // A commit, before the leader hears that its fill was accepted.
            bed.invalidate().await;
            bed.miss(2).await
        };
        assert_eq!(tokio::join!(leader, late), (1, 2));
    }

    #[tokio::test]
    async fn a_value_found_on_asking_is_not_shared_with_readers_who_came_after_the_question() {
        let bed = Bed::new().await;
        bed.server.command(&["SET", "k", "1"]).await.unwrap();
        bed.server.command(&["CONFIG", "RESETSTAT"]).await.unwrap();
        bed.proxy.set_mode(Mode::Delay(UNDER_WAY));
        let late = async {
            let was_asked = async || {
                let statistics = bed.server.command(&["INFO", "commandstats"]).await.unwrap();
                statistics.contains("cmdstat_evalsha")
            };
            devstack::eventually(SOON, was_asked).await;
            bed.invalidate().await;
            bed.miss(2).await
        };
        assert_eq!(tokio::join!(bed.miss(3), late), (1, 2));
    }

    #[tokio::test]
    async fn a_fill_without_an_answer_is_not_shared_with_readers_who_came_during_the_load() {
        let bed = Bed::new().await;
        let (is_loading, has_follower) = (tokio::sync::Notify::new(), tokio::sync::Notify::new());
        let leader = bed.miss_while(1, async || {
            is_loading.notify_one();
            has_follower.notified().await;
            bed.proxy.set_mode(Mode::DropToServer);
        });
        let late = async {
            is_loading.notified().await;
            let mut reader = std::pin::pin!(bed.miss(2));
            assert!(futures::poll!(reader.as_mut()).is_pending());
            has_follower.notify_one();
            reader.await
        };
        assert_eq!(tokio::join!(leader, late), (1, 2));
    }
}
