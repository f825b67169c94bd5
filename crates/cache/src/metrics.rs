//! Names of the metrics that this crate counts through the `metrics` facade.

use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

use crate::Acquired;

/// Reads answered from the cache.
pub const HITS: &str = "cache_hits_total";
/// Reads that found no usable value.
pub const MISSES: &str = "cache_misses_total";
/// Calls of a loader.
pub const LOADS: &str = "cache_loads_total";
/// Reads answered with the result of another caller's load in the same process.
pub const SHARED_LOADS: &str = "cache_shared_loads_total";
/// Loaded values offered to the cache, by `outcome`: `stored`, `refused` (invalidated meanwhile), `skipped` (too large,
/// not encodable, or a time to live of zero), `failed` (no answer).
pub const FILLS: &str = "cache_fills_total";
/// Leases asked for, by `outcome`: `grant`, `wait`, `bypass`, `value`.
pub const LEASES: &str = "cache_leases_total";
/// Requests to Redis that failed or took too long.
pub const REDIS_ERRORS: &str = "cache_redis_errors_total";
/// Reads that went to the loader at once because the breaker was open.
pub const BREAKER_SKIPS: &str = "cache_breaker_skips_total";
/// 1 while Redis is not asked, 0 otherwise.
pub const BREAKER_OPEN: &str = "cache_breaker_open";
/// Values that were of the wrong type or could not be decoded, and were replaced.
pub const UNDECODABLE: &str = "cache_undecodable_total";
/// Reads of keys that cannot be cached: empty, too long, or with control characters.
pub const INVALID_KEYS: &str = "cache_invalid_keys_total";
/// Reads answered with a value that was already invalidated, because they allowed it.
pub const STALE_SERVED: &str = "cache_stale_served_total";

/// Tells the recorder what the metrics mean. Call it once, after the recorder is installed.
pub fn describe() {
    describe_counter!(HITS, "Reads answered from the cache");
    describe_counter!(MISSES, "Reads that found no usable value");
    describe_counter!(LOADS, "Calls of a loader");
    describe_counter!(SHARED_LOADS, "Reads answered with another caller's load in the same process");
    describe_counter!(FILLS, "Loaded values offered to the cache, by outcome");
    describe_counter!(LEASES, "Leases asked for, by outcome");
    describe_counter!(REDIS_ERRORS, "Requests of readers to Redis that failed or took too long");
    describe_counter!(BREAKER_SKIPS, "Reads that went to the loader because the breaker was open");
    describe_gauge!(BREAKER_OPEN, "1 while readers do not ask Redis");
    describe_counter!(UNDECODABLE, "Values of the wrong type or not decodable, replaced");
    describe_counter!(INVALID_KEYS, "Reads of keys that cannot be cached");
    describe_counter!(STALE_SERVED, "Reads answered with an invalidated value because they allowed it");
}

/// Handles resolved once: looking a metric up by name for every hit would cost more than the hit's own bookkeeping.
pub(crate) struct Meters {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) loads: Counter,
    pub(crate) shared_loads: Counter,
    pub(crate) fills: Fills,
    pub(crate) leases: Leases,
    pub(crate) redis_errors: Counter,
    pub(crate) breaker_skips: Counter,
    pub(crate) breaker_open: Gauge,
    pub(crate) undecodable: Counter,
    pub(crate) invalid_keys: Counter,
    pub(crate) stale_served: Counter,
}

pub(crate) struct Fills {
    pub(crate) stored: Counter,
    pub(crate) refused: Counter,
    pub(crate) skipped: Counter,
    pub(crate) failed: Counter,
}

pub(crate) struct Leases {
    pub(crate) grant: Counter,
    pub(crate) wait: Counter,
    pub(crate) bypass: Counter,
    pub(crate) value: Counter,
}

impl Fills {
    /// Counts the answer to one fill.
    pub(crate) fn count(&self, stored: Option<bool>) {
        match stored {
            Some(true) => self.stored.increment(1),
            Some(false) => self.refused.increment(1),
            None => self.failed.increment(1),
        }
    }
}

impl Leases {
    /// Counts the answer to one request for a lease.
    pub(crate) fn count(&self, acquired: &Acquired) {
        match acquired {
            Acquired::Grant(_) => self.grant.increment(1),
            Acquired::Wait => self.wait.increment(1),
            Acquired::Bypass => self.bypass.increment(1),
            Acquired::Value(_) => self.value.increment(1),
        }
    }
}

impl Meters {
    pub(crate) fn new() -> Self {
        let fill = |outcome: &'static str| counter!(FILLS, "outcome" => outcome);
        let lease = |outcome: &'static str| counter!(LEASES, "outcome" => outcome);
        Self {
            hits: counter!(HITS),
            misses: counter!(MISSES),
            loads: counter!(LOADS),
            shared_loads: counter!(SHARED_LOADS),
            fills: Fills {
                stored: fill("stored"),
                refused: fill("refused"),
                skipped: fill("skipped"),
                failed: fill("failed"),
            },
            leases: Leases {
                grant: lease("grant"),
                wait: lease("wait"),
                bypass: lease("bypass"),
                value: lease("value"),
            },
            redis_errors: counter!(REDIS_ERRORS),
            breaker_skips: counter!(BREAKER_SKIPS),
            breaker_open: gauge!(BREAKER_OPEN),
            undecodable: counter!(UNDECODABLE),
            invalid_keys: counter!(INVALID_KEYS),
            stale_served: counter!(STALE_SERVED),
        }
    }
}
