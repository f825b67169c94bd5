//! Loading a value and offering it to the cache.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event::{CacheKey, MAX_TTL};

use super::flight::{Landing, Leader};
use super::{Cache, Options, Shared};
use crate::codec::Codec;
use crate::{Fill, LeaseId, LeaseToken};

/// What a loader found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded<T> {
    /// The value.
    pub value: T,
    /// Version of the row it comes from, if every change of the row increments it under the row's lock.
    pub version: Option<i64>,
}

impl<T> Loaded<T> {
    /// A value without a version.
    #[must_use]
    pub fn new(value: T) -> Self {
        Self { value, version: None }
    }

    /// A value with its version.
    #[must_use]
    pub fn versioned(value: T, version: i64) -> Self {
        Self { value, version: Some(version) }
    }
}

/// A request for a lease, from the moment it is sent. Dropped while the lease may be held, it gives that back: by a loader
/// that failed, by a caller that lost interest, after an answer that came too late.
pub(super) struct LeaseRequest<'a> {
    cache: &'a Cache,
    key: &'a CacheKey,
    token: LeaseToken,
    perhaps_held: bool,
}

impl<'a> LeaseRequest<'a> {
    pub(super) fn new(cache: &'a Cache, key: &'a CacheKey, token: LeaseToken) -> Self {
        Self { cache, key, token, perhaps_held: true }
    }

    /// There is nothing to give back: it was not granted.
    pub(super) fn forget(mut self) {
        self.perhaps_held = false;
    }

    /// It was granted under this name.
    pub(super) fn granted(self, id: LeaseId) -> Lease<'a> {
        Lease { request: self, id }
    }
}

/// A lease that was granted. Dropped without a fill, it is given back.
pub(super) struct Lease<'a> {
    request: LeaseRequest<'a>,
    id: LeaseId,
}

impl<'a> Lease<'a> {
    /// The key and the lease's name, for a fill together with others.
    pub(super) fn used_for_many(self) -> (&'a CacheKey, LeaseId) {
        let key = self.request.key;
        self.request.forget();
        (key, self.id)
    }

    /// Offers a value. If it was stored, says when it was sent.
    async fn fill(self, fill: Fill<'_>) -> Option<Instant> {
        let LeaseRequest { cache, key, .. } = self.request;
        let Shared { reads, meters, .. } = &*cache.shared;
        let sent = Instant::now();
        let stored = cache.ask(reads.fill(key, &self.id, fill)).await;
        meters.fills.count(stored);
        // Without an answer it may still be held, and others would wait for it.
        if stored.is_some() {
            self.request.forget();
        }
        (stored == Some(true)).then_some(sent)
    }
}

impl Drop for LeaseRequest<'_> {
    fn drop(&mut self) {
        if let (true, Ok(runtime)) = (self.perhaps_held, tokio::runtime::Handle::try_current()) {
            let (cache, key, token) = (self.cache.clone(), self.key.clone(), self.token);
            runtime.spawn(async move { cache.ask(cache.shared.reads.release(&key, token)).await });
        }
    }
}

impl Cache {
    pub(super) async fn load<L, E, F, Fut>(&self, loader: F) -> Result<L, E>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<L, E>>,
    {
        self.shared.meters.loads.increment(1);
        loader().await
    }

    /// Loads for a whole flight, and fills if there is a lease.
    pub(super) async fn load_and_fill<T, C, E, F, Fut>(
        &self,
        leader: Leader<'_>,
        lease: Option<Lease<'_>>,
        options: &Options<C>,
        loader: F,
    ) -> Result<T, E>
    where
        C: Codec<T>,
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<Loaded<T>, E>>,
    {
        let began = Instant::now();
        let Loaded { value, version } = match self.load(loader).await {
            Ok(loaded) => loaded,
            Err(error) => {
                leader.land(Landing::Failed);
                return Err(error);
            }
        };
        let Ok(bytes) = options.codec.encode(&value) else {
            self.shared.meters.fills.skipped.increment(1);
            leader.land(Landing::Failed);
            return Ok(value);
        };
        let stored = match (lease, self.storable_for(options, &bytes)) {
            (Some(lease), Some(ttl)) => {
                let keep_stale_copy = options.accepts_stale().is_some();
                lease.fill(Fill { value: &bytes, ttl, version, keep_stale_copy }).await
            }
            _ => None,
        };
        let for_readers_before = stored.unwrap_or(began);
        leader.land(Landing::Value { bytes: Arc::new(bytes), for_readers_before });
        Ok(value)
    }

    /// How long these bytes may be served; `None` if they are not to be stored.
    pub(super) fn storable_for<T, C: Codec<T>>(
        &self,
        options: &Options<C>,
        bytes: &[u8],
    ) -> Option<Duration> {
        let ttl = if options.codec.is_absent(bytes) { options.negative_ttl } else { options.ttl };
        let ttl = ttl.min(MAX_TTL);
        if ttl.is_zero() || bytes.len() > self.shared.config.max_value_bytes {
            self.shared.meters.fills.skipped.increment(1);
            return None;
        }
        let jitter = self.shared.config.ttl_jitter.clamp(0.0, 1.0);
        Some(ttl.mul_f64(1.0 - jitter * rand::random::<f64>()))
    }
}
