//! Waiting for servers that are away when the process starts.

use std::{future::Future, time::Duration};

use tokio::time::Instant;

use crate::{Backoff, Component, Report};

/// Pauses between attempts.
const MIN_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// How long a process tries to reach its servers when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience(Duration);

impl Patience {
    /// Limits the attempts to `limit`; zero is no limit.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self(limit)
    }

    fn is_over(self, started: Instant) -> bool {
        !self.0.is_zero() && started.elapsed() >= self.0
    }

    /// Repeats `attempt` until it succeeds, fails for a reason that does not pass, or the time is over. Meanwhile the
    /// component says what is missing.
    ///
    /// # Errors
    /// The last failure.
    pub async fn persist<T, F: Future<Output = anyhow::Result<T>>>(
        self,
        component: &Component,
        is_passing: impl Fn(&anyhow::Error) -> bool,
        mut attempt: impl FnMut() -> F,
    ) -> anyhow::Result<T> {
        let started = Instant::now();
        let mut backoff = Backoff::new(MIN_PAUSE, MAX_PAUSE);
        let mut said = String::new();
        loop {
            let error = match attempt().await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if !is_passing(&error) || self.is_over(started) {
                return Err(error);
            }
            let cause = Report::of(error.as_ref()).to_string();
            component.not_ready(format!("starting: {cause}"));
            if cause != said {
                tracing::warn!(cause, "cannot start yet; trying again");
                said = cause;
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Health, Limits};

    async fn attempts(limit: u64, passing: bool, succeeds_at: usize) -> (bool, usize, Duration) {
        let health = Health::new();
        let component = health.component("startup", Limits::default());
        let started = Instant::now();
        let count = std::cell::Cell::new(0);
        let result = Patience::new(Duration::from_secs(limit))
            .persist(
                &component,
                |_| passing,
                || {
                    count.set(count.get() + 1);
                    let done = count.get() >= succeeds_at;
                    async move { if done { Ok(()) } else { Err(anyhow::anyhow!("away")) } }
                },
            )
            .await;
        if count.get() > 1 {
            let reason = health.snapshot().components.remove(0).reason;
            assert_eq!(reason.as_deref(), Some("starting: away"));
        }
        (result.is_ok(), count.get(), started.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_it_waits_for_as_long_as_it_takes() {
        let (ok, tried, waited) = attempts(0, true, 5000).await;
        assert!(ok && tried == 5000 && waited > Duration::from_secs(3600), "{tried} {waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn with_a_limit_it_gives_up_and_what_does_not_pass_ends_it_at_once() {
        let (ok, tried, waited) = attempts(30, true, usize::MAX).await;
        assert!(!ok && tried > 10 && waited < Duration::from_secs(35), "{tried} {waited:?}");
        assert_eq!(attempts(0, false, usize::MAX).await.1, 1);
    }
}
