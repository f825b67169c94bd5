//! Growing waits between attempts to reach something that is down.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    time::Duration,
};

/// Exponential backoff with equal jitter: attempt `n` waits between half and all of `min × 2ⁿ`, never more than `max`.
///
/// Half of the wait is fixed so that an outage is never answered by a burst; the other half is random so that many
/// processes that lost the same broker do not return in step (the *Exponential Backoff And Jitter* article, AWS, 2015).
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    attempts: u32,
}

impl Backoff {
    /// Starts at `min` and doubles up to `max`; a `max` below `min` counts as `min`.
    #[must_use]
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max: max.max(min), attempts: 0 }
    }

    /// The wait before the next attempt; longer each time until [`Backoff::reset`].
    pub fn next_delay(&mut self) -> Duration {
        let factor = 2_u32.saturating_pow(self.attempts);
        self.attempts = self.attempts.saturating_add(1);
        let whole = self.min.saturating_mul(factor).min(self.max);
        whole / 2 + (whole / 2).mul_f64(random_fraction())
    }

    /// Forgets past failures: to be called when an attempt has succeeded.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }

    /// Attempts since the start or the last [`Backoff::reset`].
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }
}

/// Between 0 and 1. The standard library seeds its hasher at random, and jitter needs no better source.
fn random_fraction() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 32;
    f64::from(u32::try_from(bits).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(5);

    #[test]
    fn every_delay_lies_between_half_and_all_of_its_step() {
        for _ in 0..200 {
            let mut backoff = Backoff::new(MIN, MAX);
            for attempt in 0..12 {
                let step = MIN.saturating_mul(1 << attempt).min(MAX);
                let delay = backoff.next_delay();
                assert!(delay >= step / 2 && delay <= step, "attempt {attempt}: {delay:?} of {step:?}");
            }
        }
    }

    #[test]
    fn delays_stay_at_the_maximum_however_long_the_outage() {
        let mut backoff = Backoff { min: MIN, max: MAX, attempts: u32::MAX - 1 };
        for _ in 0..3 {
            assert!(backoff.next_delay() <= MAX);
        }
        assert_eq!(backoff.attempts(), u32::MAX);
    }

    #[test]
    fn a_success_starts_over_at_the_minimum() {
        let mut backoff = Backoff::new(MIN, MAX);
        for _ in 0..10 {
            backoff.next_delay();
        }
        backoff.reset();
        assert!(backoff.next_delay() <= MIN);
        assert_eq!(backoff.attempts(), 1);
    }

    #[test]
    fn delays_are_not_all_the_same() {
        let delays: std::collections::HashSet<Duration> =
            (0..50).map(|_| Backoff::new(MIN, MAX).next_delay()).collect();
        assert!(delays.len() > 10, "{delays:?}");
    }

    #[test]
    fn a_maximum_below_the_minimum_counts_as_the_minimum() {
        assert!(Backoff::new(MAX, MIN).next_delay() >= MAX / 2);
    }
}
