//! Looks at the slot from outside: how much log it holds back, and whether it is about to be lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::gauge;
use service::{Component, Report, Shutdown};
use wal::publication::{self, Drift};
use wal::slot::{self, SlotState};

use super::Capture;
use crate::database::{PATIENCE, explain, within};
use crate::metrics as names;

const INTERVAL: Duration = Duration::from_secs(2);

/// In a database where nothing happens something is written to the log this often, if other databases have written more
/// than [`HEARTBEAT_LAG_BYTES`] meanwhile: the slot moves on with it even if the server says nothing of its own accord.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
const HEARTBEAT_LAG_BYTES: i64 = 1024 * 1024;

/// How often the publication is compared with the rules while the log is read.
const DRIFT_INTERVAL: Duration = Duration::from_secs(10);

/// Measures until shutdown is requested. The component is not ready while the slot is further behind than the limit.
pub async fn monitor(capture: Arc<Capture>, health: Component, shutdown: Shutdown) {
    let mut behind_since = None;
    let mut heartbeat_at = Instant::now();
    let mut compared_at = Instant::now();
    health.ready();
    while !shutdown.is_requested() {
        match within(PATIENCE, slot::find(&capture.shared.pool, &capture.config.slot)).await {
            Ok(state) => {
                if compared_at.elapsed() >= DRIFT_INTERVAL {
                    compared_at = Instant::now();
                    compare(&capture).await;
                }
                judge(&capture, state.as_ref(), &mut behind_since, &health);
                let lag = state.map_or(0, |state| state.lag_bytes);
                if lag > HEARTBEAT_LAG_BYTES && heartbeat_at.elapsed() >= HEARTBEAT_INTERVAL {
                    heartbeat_at = Instant::now();
                    if let Err(error) = within(PATIENCE, slot::heartbeat(&capture.shared.pool)).await {
                        tracing::warn!(error = %Report::of(&error), "could not write a heartbeat to the log");
                    }
                }
            }
            Err(error) => {
                let error = explain(&capture.shared.pool.connect_options(), error).await;
                // A restart would not help a server that is down.
                tracing::debug!(error = %Report::of(&error), "could not look at the slot");
                health.not_ready(format!(
                    "cannot look at slot {}: {}",
                    capture.config.slot,
                    Report::of(&error)
                ));
            }
        }
        tokio::select! {
            () = shutdown.requested() => {}
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

/// Looks whether what is read is still everything that the rules are about: a publication can be altered, and a table
/// replaced by another of its name, without a word in the log. If not, the reader begins anew, which corrects the
/// publication. Whoever stands by, perhaps with other rules, leaves it alone.
async fn compare(capture: &Capture) {
    let Some(tables) = capture.reading.tables() else { return };
    let name = &capture.config.publication;
    let drift = publication::drift_since(&capture.shared.pool, name, &capture.rules, &tables);
    match within(PATIENCE, drift).await {
        // A publication that is too wide lacks nothing.
        Ok(None | Some(Drift::TooWide)) => {}
        Ok(Some(drift)) => {
            tracing::warn!(
                "publication {name} {drift} any more, so that changes may be missing; reading anew"
            );
            capture.reading.drifted.notify_one();
        }
        Err(error) => {
            tracing::debug!(error = %Report::of(&error), "could not compare the publication with the rules")
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 8 PiB of log")]
fn judge(
    capture: &Capture,
    state: Option<&SlotState>,
    behind_since: &mut Option<Instant>,
    health: &Component,
) {
    let Some(state) = state else {
        health.beat();
        return;
    };
    let lag = u64::try_from(state.lag_bytes).unwrap_or(0);
    // Caught up is less than what a working reader leaves unconfirmed.
    if lag < crate::capture::CAUGHT_UP_BYTES {
        *behind_since = None;
    } else {
        behind_since.get_or_insert_with(Instant::now);
    }
    gauge!(names::CAPTURE_LAG_BYTES).set(lag as f64);
    gauge!(names::CAPTURE_LAG_SECONDS).set(behind_since.map_or(0.0, |since| since.elapsed().as_secs_f64()));
    gauge!(names::CAPTURE_SLOT_LOST).set(f64::from(u8::from(state.is_lost())));
    if state.is_lost() {
        health.not_ready(format!("slot {} is lost", capture.config.slot));
    } else if lag > capture.config.slot_lag_limit {
        let reader =
            state.active_pid.map_or("no relay reads it".to_owned(), |pid| format!("process {pid} reads it"));
        tracing::error!(
            slot = capture.config.slot,
            lag_bytes = lag,
            limit_bytes = capture.config.slot_lag_limit,
            "the slot is further behind than RELAY_SLOT_LAG_LIMIT: {reader}"
        );
        health.not_ready(format!(
            "slot {} is {lag} bytes behind, more than RELAY_SLOT_LAG_LIMIT; {reader}",
            capture.config.slot
        ));
    } else {
        health.ready();
    }
}
