//! Waiting for something to become true.

use std::time::Duration;

use anyhow::Context;
use tokio::time::{Instant, sleep};

const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Repeats `attempt` until it yields a value.
///
/// # Errors
/// An error of an attempt is not final, but what is reported, with `what`, when `deadline` passes.
pub async fn until<T>(
    what: &str,
    deadline: Duration,
    mut attempt: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = Instant::now() + deadline;
    loop {
        let outcome = attempt().await;
        if let Ok(Some(value)) = outcome {
            return Ok(value);
        }
        if Instant::now() >= end {
            let message = format!("not within {deadline:?}: {what}");
            return outcome.with_context(|| message.clone())?.context(message);
        }
        sleep(POLL_INTERVAL).await;
    }
}
