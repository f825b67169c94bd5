//! Waiting until a server speaks its protocol.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use tokio::time::{Instant, sleep, timeout};

use crate::process::Process;

/// Generous, as many stacks may start at once on a small machine; a server that exits is noticed at once.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A probe that hangs this long is given up and repeated.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Repeats `probe` until it succeeds.
///
/// # Errors
/// When the process ends or [`START_TIMEOUT`] passes; with the last error and the end of the log.
pub(crate) async fn wait_until_ready(
    process: &Process,
    mut probe: impl AsyncFnMut() -> Result<()>,
) -> Result<()> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let attempt = timeout(PROBE_TIMEOUT, probe()).await;
        let Err(error) =
            attempt.unwrap_or_else(|_elapsed| Err(anyhow!("no answer within {PROBE_TIMEOUT:?}")))
        else {
            return Ok(());
        };
        if !process.is_running() {
            let status = process.exit_status();
            bail!("{} ended while starting ({status:?})\n{}", process.name(), process.log_tail());
        }
        if Instant::now() > deadline {
            let reason = error.context(format!("{} is not ready within {START_TIMEOUT:?}", process.name()));
            return Err(reason.context(process.log_tail()));
        }
        sleep(POLL_INTERVAL).await;
    }
}
