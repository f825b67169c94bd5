use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metrics::Gauge;

/// How often to say that Redis refuses something.
const SAY_AGAIN_MS: u64 = 60_000;

/// Keeps reads from waiting for a Redis that does not answer.
///
/// Closed until so many requests in a row have failed; then open, which lets one request through per pause, and closed
/// again when one succeeds.
pub(super) struct Breaker {
    limit: u32,
    pause: Duration,
    origin: Instant,
    failures: AtomicU32,
    /// When the next request is let through, in ms after `origin`; 0 while closed.
    retry_at_ms: AtomicU64,
    /// When it may be said again that Redis refuses requests, in ms after `origin`.
    say_at_ms: AtomicU64,
    open: Gauge,
}

impl Breaker {
    pub(super) fn new(limit: u32, pause: Duration, open: Gauge) -> Self {
        Self {
            limit: limit.max(1),
            pause,
            origin: Instant::now(),
            failures: AtomicU32::new(0),
            retry_at_ms: AtomicU64::new(0),
            say_at_ms: AtomicU64::new(0),
            open,
        }
    }

    /// Whether Redis may be asked now.
    pub(super) fn allows(&self) -> bool {
        self.retry_at_ms.load(Ordering::Relaxed) == 0 || self.allows_at(self.now_ms())
    }

    fn allows_at(&self, now_ms: u64) -> bool {
        let retry_at = self.retry_at_ms.load(Ordering::Relaxed);
        if retry_at == 0 {
            return true;
        }
        let next = now_ms + self.pause_ms();
        let only_one =
            || self.retry_at_ms.compare_exchange(retry_at, next, Ordering::Relaxed, Ordering::Relaxed);
        now_ms >= retry_at && only_one().is_ok()
    }

    pub(super) fn succeeded(&self) {
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
        if self.retry_at_ms.load(Ordering::Relaxed) != 0 && self.retry_at_ms.swap(0, Ordering::Relaxed) != 0 {
            self.open.set(0);
            tracing::info!("redis answers again, the cache is used again");
        }
    }

    /// Redis that is full, or does not permit something, still answers hits, so it is not left alone.
    pub(super) fn failed(&self, error: &crate::RedisError) {
        if error.is_answer() {
            self.succeeded();
            return self.complain(error);
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if failures < self.limit {
            return;
        }
        let next = self.now_ms() + self.pause_ms();
        if self.retry_at_ms.swap(next, Ordering::Relaxed) == 0 {
            self.open.set(1);
            tracing::warn!(%error, "redis does not answer, readers load without it");
        }
    }

    fn complain(&self, error: &crate::RedisError) {
        let (now, say_at) = (self.now_ms(), self.say_at_ms.load(Ordering::Relaxed));
        let next = now + SAY_AGAIN_MS;
        if now >= say_at
            && self.say_at_ms.compare_exchange(say_at, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            tracing::warn!(%error, "redis refuses what readers ask for; what they load is not cached");
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }

    fn pause_ms(&self) -> u64 {
        u64::try_from(self.pause.as_millis()).unwrap_or(u64::MAX / 2).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RedisError;

    const PAUSE_MS: u64 = 3_600_000;

    fn breaker() -> Breaker {
        Breaker::new(3, Duration::from_millis(PAUSE_MS), Gauge::noop())
    }

    fn fail(breaker: &Breaker, times: u32) {
        for _ in 0..times {
            breaker.failed(&RedisError::unavailable("down"));
        }
    }

    #[test]
    fn it_opens_after_failures_in_a_row_only() {
        let breaker = breaker();
        fail(&breaker, 2);
        breaker.succeeded();
        fail(&breaker, 2);
        assert!(breaker.allows());
        fail(&breaker, 1);
        assert!(!breaker.allows());
    }

    #[test]
    fn an_open_breaker_lets_one_request_through_per_pause_and_closes_on_success() {
        let breaker = breaker();
        fail(&breaker, 3);
        let much_later = 2 * PAUSE_MS;
        assert!(!breaker.allows_at(0));
        assert!(breaker.allows_at(much_later));
        assert!(!breaker.allows_at(much_later));
        breaker.succeeded();
        assert!(breaker.allows_at(much_later) && breaker.allows());
    }
}
