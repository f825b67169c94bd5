use std::time::Duration;

use crate::codec::Json;

/// How all reads of a [`Cache`](crate::Cache) behave.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// Times to live are shortened at random by up to this fraction, so that values cached together do not expire
    /// together. Between 0 and 1.
    pub ttl_jitter: f64,
    /// How long a reader may take to load, at most 366 days. A value loaded later than that is returned but not cached.
    pub lease: Duration,
    /// How long a reader waits for a value that another process is loading before it loads the value itself.
    pub wait: Duration,
    /// Longest time for the answer to one request to Redis, and for a connection if there is none. A read makes at most
    /// three requests, besides the polls of `wait` and those for a stale copy.
    pub redis_timeout: Duration,
    /// After so many failed requests in a row Redis is not asked any more.
    pub breaker_failures: u32,
    /// So long; then one reader tries again.
    pub breaker_pause: Duration,
    /// Larger values are not cached, in bytes.
    pub max_value_bytes: usize,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            ttl_jitter: 0.1,
            lease: Duration::from_secs(10),
            wait: Duration::from_millis(250),
            redis_timeout: Duration::from_millis(250),
            breaker_failures: 5,
            breaker_pause: Duration::from_secs(1),
            max_value_bytes: 1024 * 1024,
        }
    }
}

/// How one read behaves. Write `Options { ttl, ..Default::default() }`.
#[derive(Debug, Clone, Copy)]
pub struct Options<C = Json> {
    /// How long the loaded value may be served if nothing invalidates it, at most 366 days. Zero: neither read nor fill
    /// the cache.
    pub ttl: Duration,
    /// The same for values that do not exist. Zero: do not cache them.
    pub negative_ttl: Duration,
    /// Serve a value that was invalidated up to so long ago (at most [`MAX_STALE`](crate::MAX_STALE)) while another
    /// caller loads the new one. Keys read this way occupy twice the memory.
    pub stale_for: Option<Duration>,
    /// Never serve an invalidated value, whatever `stale_for` says.
    pub strict: bool,
    /// How the value is stored.
    pub codec: C,
}

impl<C: Default> Default for Options<C> {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(300),
            negative_ttl: Duration::from_secs(30),
            stale_for: None,
            strict: false,
            codec: C::default(),
        }
    }
}

impl<C> Options<C> {
    /// How old an invalidated value this read accepts.
    pub(crate) fn accepts_stale(&self) -> Option<Duration> {
        if self.strict { None } else { self.stale_for.filter(|longest| !longest.is_zero()) }
    }
}
