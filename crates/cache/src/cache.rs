//! The read path.

mod breaker;
mod config;
mod flight;
mod load;
mod many;
mod miss;

use std::sync::Arc;
use std::time::Duration;

use event::{CacheKey, MAX_TTL};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use config::{CacheConfig, Options};
pub use load::Loaded;

use crate::codec::{Codec, Json};
use crate::metrics::Meters;
use crate::redis::Found;
use crate::{Redis, RedisError};
use breaker::Breaker;
use flight::Flights;
use miss::Miss;

/// Reads through the cache: a hit is one `GET`, a miss loads the value and fills it under a lease.
///
/// Trouble with Redis never reaches the caller: the value is then loaded, after a bounded time, and the trouble is
/// counted. Cheap to clone; clones share connections, loads in flight and the breaker, so use one per process.
#[derive(Clone)]
pub struct Cache {
    shared: Arc<Shared>,
}

struct Shared {
    /// As it was given, for writers.
    redis: Redis,
    /// With the limit of reads.
    reads: Redis,
    config: CacheConfig,
    breaker: Breaker,
    flights: Flights,
    meters: Meters,
}

impl Cache {
    /// A cache in `redis`. Install the metrics recorder before.
    #[must_use]
    pub fn new(redis: Redis, mut config: CacheConfig) -> Self {
        // Longer times mean for ever, and cannot be added to the time of day.
        config.lease = config.lease.min(MAX_TTL);
        config.wait = config.wait.min(MAX_TTL);
        let meters = Meters::new();
        let breaker =
            Breaker::new(config.breaker_failures, config.breaker_pause, meters.breaker_open.clone());
        let reads = redis.limited_to(config.redis_timeout);
        let flights = Flights::default();
        Self { shared: Arc::new(Shared { redis, reads, config, breaker, flights, meters }) }
    }

    /// The value of `key`, from the cache or else from `loader`, as JSON.
    ///
    /// The loader must read the primary database, in no transaction that was open before. Where it may find nothing,
    /// let it return an `Option`: absence is cached too.
    ///
    /// Cancel-safe: of readers waiting for a load that is dropped, another loads.
    ///
    /// # Errors
    /// Only the loader's own.
    pub async fn get_or_load<T, E, F, Fut>(
        &self,
        key: impl AsRef<str>,
        ttl: Duration,
        loader: F,
    ) -> Result<T, E>
    where
        T: Serialize + DeserializeOwned,
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.get_or_load_with(key, &Options::<Json> { ttl, ..Options::default() }, loader).await
    }

    /// As [`get_or_load`](Self::get_or_load), with all options.
    ///
    /// # Errors
    /// Only the loader's own.
    pub async fn get_or_load_with<T, C, E, F, Fut>(
        &self,
        key: impl AsRef<str>,
        options: &Options<C>,
        loader: F,
    ) -> Result<T, E>
    where
        C: Codec<T>,
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.get_or_load_versioned(key, options, || async { loader().await.map(Loaded::new) }).await
    }

    /// As [`get_or_load_with`](Self::get_or_load_with) where the loader also tells the version of the row, so that an
    /// update event with a newer version can replace the value instead of deleting it.
    ///
    /// # Errors
    /// Only the loader's own.
    pub async fn get_or_load_versioned<T, C, E, F, Fut>(
        &self,
        key: impl AsRef<str>,
        options: &Options<C>,
        loader: F,
    ) -> Result<T, E>
    where
        C: Codec<T>,
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Loaded<T>, E>>,
    {
        let Some(key) = self.cacheable(key.as_ref(), options) else {
            return Ok(self.load(loader).await?.value);
        };
        let found = self.ask(self.shared.reads.get(&key)).await;
        if let Some(Found::Value(bytes)) = &found
            && let Ok(value) = options.codec.decode(bytes)
        {
            self.shared.meters.hits.increment(1);
            return Ok(value);
        }
        let miss = match found {
            Some(Found::Nothing) => Miss::Absent,
            Some(Found::Value(_) | Found::WrongType) => Miss::Unusable,
            None => Miss::NoAnswer,
        };
        // Boxed so that the future of a hit, by far the most frequent, stays small.
        Box::pin(self.miss(&key, options, miss, loader)).await
    }

    /// The connection, for invalidations and marks.
    #[must_use]
    pub fn redis(&self) -> &Redis {
        &self.shared.redis
    }

    /// The key, if this read has anything to do with the cache.
    fn cacheable<C>(&self, key: &str, options: &Options<C>) -> Option<CacheKey> {
        if options.ttl.is_zero() {
            return None;
        }
        match CacheKey::new(key) {
            Ok(key) => Some(key),
            Err(error) => {
                self.shared.meters.invalid_keys.increment(1);
                tracing::debug!(%error, "a key cannot be cached, its value is loaded");
                None
            }
        }
    }

    /// Asks Redis, unless the breaker is open. `None` means that there is no answer.
    async fn ask<T>(&self, request: impl Future<Output = Result<T, RedisError>>) -> Option<T> {
        let Shared { breaker, meters, .. } = &*self.shared;
        if !breaker.allows() {
            meters.breaker_skips.increment(1);
            return None;
        }
        match request.await {
            Ok(answer) => {
                breaker.succeeded();
                Some(answer)
            }
            Err(error) => {
                meters.redis_errors.increment(1);
                breaker.failed(&error);
                None
            }
        }
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache")
            .field("redis", &self.shared.redis)
            .field("config", &self.shared.config)
            .finish_non_exhaustive()
    }
}
