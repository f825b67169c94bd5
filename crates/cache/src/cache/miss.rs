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
}
