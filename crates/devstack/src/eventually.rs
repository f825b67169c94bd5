//! The only polling helper of the project's tests.

use std::fmt::Display;
use std::panic::Location;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

/// Short enough to add no noticeable latency to a test, long enough not to starve what it waits for.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// What one attempt of [`eventually`] may return: a value, or why not yet.
pub trait Outcome {
    /// What a successful attempt yields.
    type Value;

    /// The value, or the reason to try again.
    ///
    /// # Errors
    /// The reason, as text for the panic message.
    fn outcome(self) -> Result<Self::Value, String>;
}

impl<T, E: Display> Outcome for Result<T, E> {
    type Value = T;

    fn outcome(self) -> Result<T, String> {
        self.map_err(|error| format!("{error:#}"))
    }
}

impl<T> Outcome for Option<T> {
    type Value = T;

    fn outcome(self) -> Result<T, String> {
        self.ok_or_else(|| "still None".to_owned())
    }
}

impl Outcome for bool {
    type Value = ();

    fn outcome(self) -> Result<(), String> {
        self.then_some(()).ok_or_else(|| "still false".to_owned())
    }
}

/// Polls `attempt` every few milliseconds until it succeeds, and returns its value.
///
/// An attempt succeeds with `Ok`, `Some` or `true`. An attempt that hangs is cut off at the deadline.
///
/// # Panics
/// When `deadline` passes first; the message has the last failure and where `eventually` was called.
#[track_caller]
pub fn eventually<O: Outcome>(
    deadline: Duration,
    mut attempt: impl AsyncFnMut() -> O,
) -> impl Future<Output = O::Value> {
    // An async fn would see its poller here, not its caller.
    let caller = Location::caller();
    async move {
        let end = Instant::now() + deadline;
        let mut last = "the first attempt did not finish".to_owned();
        loop {
            match timeout_at(end, attempt()).await.map(Outcome::outcome) {
                Ok(Ok(value)) => return value,
                Ok(Err(reason)) => last = reason,
                Err(_elapsed) => panic!("{caller}: not within {deadline:?}: {last} (the last attempt hung)"),
            }
            assert!(Instant::now() < end, "{caller}: not within {deadline:?}: {last}");
            sleep(POLL_INTERVAL).await;
        }
    }
}
