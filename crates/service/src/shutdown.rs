//! Stopping in good order: signals ask for it, loops notice it, and what is in flight gets a limited time to finish.

use std::{future::Future, io, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// Exit codes by the convention of shells: 128 plus the signal's number.
const EXIT_SIGINT: i32 = 128 + 2;
const EXIT_SIGTERM: i32 = 128 + 15;

/// The request to stop; clones share it. Once made it is never withdrawn.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
}

impl Shutdown {
    /// Nobody has asked yet, and no signal will: for tests, or for a part of a process.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks on the first SIGTERM or SIGINT; a second one ends the process at once with code 143 or 130.
    ///
    /// Must be called within a Tokio runtime.
    ///
    /// # Errors
    ///
    /// When the operating system refuses the signal handlers.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::new();
        let mut signals = Signals::listen()?;
        let asked = shutdown.clone();
        tokio::spawn(async move {
            loop {
                let (name, code) = signals.next().await;
                if asked.is_requested() {
                    tracing::warn!(signal = name, "second {name} while stopping: exiting at once");
                    std::process::exit(code);
                }
                tracing::info!(signal = name, "{name} received: stopping; a second signal exits at once");
                asked.request();
            }
        });
        Ok(shutdown)
    }

    /// Carries out `work` unless it is time to stop first; then `work` is dropped at the point it had reached, and there is
    /// no result.
    pub async fn or_done<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.requested() => None,
            done = work => Some(done),
        }
    }

    /// Asks everything that holds this request to stop.
    pub fn request(&self) {
        self.token.cancel();
    }

    /// Whether it is time to stop.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until it is time to stop. Cancel-safe.
    pub async fn requested(&self) {
        self.token.cancelled().await;
    }

    /// The underlying token, for interfaces that want one and for child tokens.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// The name of the next signal, and the exit code that goes with it.
    async fn next(&mut self) -> (&'static str, i32) {
        tokio::select! {
            _ = self.interrupt.recv() => ("SIGINT", EXIT_SIGINT),
            _ = self.terminate.recv() => ("SIGTERM", EXIT_SIGTERM),
        }
    }
}

/// Ends the process at once on SIGTERM or SIGINT, with code 143 or 130: for commands that have nothing to finish. Without it
/// the first process of a container would not be ended by these signals at all.
///
/// Must be called within a Tokio runtime.
///
/// # Errors
///
/// When the operating system refuses the signal handlers.
pub fn exit_on_signals() -> io::Result<()> {
    let mut signals = Signals::listen()?;
    tokio::spawn(async move {
        let (_, code) = signals.next().await;
        std::process::exit(code);
    });
    Ok(())
}

/// Gives `work` (such as `tracker.wait()` of a closed `TaskTracker`) at most `limit` to finish, and logs how it went.
///
/// Returns whether it finished. If not, `work` is dropped at the point it had reached.
pub async fn drain(what: &str, work: impl Future<Output = ()>, limit: Duration) -> bool {
    let started = Instant::now();
    tracing::info!(limit_ms = millis(limit), "draining {what}");
    let finished = timeout(limit, work).await.is_ok();
    let elapsed_ms = millis(started.elapsed());
    if finished {
        tracing::info!(elapsed_ms, "drained {what}");
    } else {
        tracing::warn!(elapsed_ms, "{what} did not finish within the drain timeout: abandoning it");
    }
    finished
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;

    #[tokio::test]
    async fn a_request_reaches_every_clone_and_stays() {
        let shutdown = Shutdown::new();
        let elsewhere = shutdown.clone();
        assert!(!elsewhere.is_requested());
        shutdown.request();
        elsewhere.requested().await;
        elsewhere.requested().await;
        assert!(elsewhere.is_requested() && elsewhere.token().is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_ends_in_time_is_drained() {
        let tracker = TaskTracker::new();
        tracker.spawn(tokio::time::sleep(Duration::from_secs(3)));
        tracker.close();
        let started = Instant::now();
        assert!(drain("tasks", async { tracker.wait().await }, Duration::from_secs(10)).await);
        assert_eq!(started.elapsed().as_secs(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_takes_too_long_is_abandoned_at_the_limit() {
        let started = Instant::now();
        assert!(!drain("a hung task", std::future::pending(), Duration::from_secs(10)).await);
        assert_eq!(started.elapsed().as_secs(), 10);
    }
}
