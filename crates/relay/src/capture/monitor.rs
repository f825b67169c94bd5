//! Looks at the slot from outside: how much log it holds back, and whether it is about to be lost.

use std::mem::{Discriminant, discriminant};
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::gauge;
use outbox::capture as recorded;
use service::{Component, Report, Shutdown};
use wal::Lsn;
use wal::publication::{self, Drift, Fingerprint, Refusal, Tables};
use wal::slot::{self, SlotState};

use super::lag::Lag;
use super::publishing::hidden_since;
use super::{CAUGHT_UP_BYTES, Capture};
use crate::database::{PATIENCE, within};
use crate::metrics as names;

const INTERVAL: Duration = Duration::from_secs(2);

/// In a database where nothing happens something is written to the log this often, if other databases have written more
/// than [`HEARTBEAT_LAG_BYTES`] meanwhile: the slot moves on with it even if the server says nothing of its own accord.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
const HEARTBEAT_LAG_BYTES: i64 = 1024 * 1024;

/// How often the publication is compared with the rules while the log is read.
const DRIFT_INTERVAL: Duration = Duration::from_secs(10);

/// A relay whose oldest log that is not published is older is not ready, however little it is.
const LAG_LIMIT: Duration = Duration::from_secs(60);

/// Most tables named whose writers Postgres refuses.
const MAX_REFUSALS_NAMED: i64 = 5;

/// Measures until shutdown is requested. The component is not ready while the slot is further behind than the limit.
pub async fn monitor(capture: Arc<Capture>, health: Component, shutdown: Shutdown) {
    let mut lag = Lag::default();
    let mut refused = Vec::new();
    let mut told = None;
    let mut heartbeat_at = Instant::now();
    let mut compared_at = Instant::now();
    health.ready();
    while !shutdown.is_requested() {
        match within(PATIENCE, slot::find(&capture.shared.pool, &capture.config.slot)).await {
            Ok(state) => {
                if compared_at.elapsed() >= DRIFT_INTERVAL {
                    compared_at = Instant::now();
                    refused = compare(&capture).await.unwrap_or(refused);
                }
                let behind = state.as_ref().map_or(Duration::ZERO, |state| {
                    lag.observe(Instant::now(), state.written, reached(&capture, state))
                });
                let trouble = state.as_ref().and_then(|state| {
                    measure(state, behind);
                    judge(state, behind, &refused, capture.config.slot_lag_limit)
                });
                report(&capture, state.as_ref(), trouble.as_ref(), &mut told, &health);
                let lag = state.map_or(0, |state| state.lag_bytes);
                if lag > HEARTBEAT_LAG_BYTES && heartbeat_at.elapsed() >= HEARTBEAT_INTERVAL {
                    heartbeat_at = Instant::now();
                    if let Err(error) = within(PATIENCE, slot::heartbeat(&capture.shared.pool)).await {
                        tracing::warn!(error = %Report::of(&error), "could not write a heartbeat to the log");
                    }
                }
            }
            Err(error) => {
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

/// Position before which everything is published. The reader knows it; others know what is confirmed, which a reader at
/// work leaves a little behind.
fn reached(capture: &Capture, state: &SlotState) -> Lsn {
    let confirmed = state.confirmed;
    capture.reading.reached().map_or(Lsn(confirmed.0 + CAUGHT_UP_BYTES), |reached| reached.max(confirmed))
}

/// Looks whether what is read is still everything that the rules are about: a publication can be altered, and a table
/// replaced by another of its name, without a word in the log. If not, the reader begins anew, which corrects the
/// publication. Whoever stands by, perhaps with other rules, leaves it alone. Returns the tables whose writers Postgres
/// refuses, if it could be asked.
async fn compare(capture: &Capture) -> Option<Vec<Refusal>> {
    let Some(tables) = capture.reading.tables() else { return Some(Vec::new()) };
    let name = &capture.config.publication;
    match within(PATIENCE, difference(capture, &tables)).await {
        Ok(None) => {}
        Ok(Some(difference)) => {
            tracing::warn!("publication {name} {difference}, so that changes may be missing; reading anew");
            capture.reading.open_anew();
        }
        Err(error) => {
            tracing::debug!(error = %Report::of(&error), "could not compare the publication with the rules")
        }
    }
    let refused = publication::refused_writers(&capture.shared.pool, name, MAX_REFUSALS_NAMED);
    within(PATIENCE, refused).await.ok()
}

/// How the publication differs from the rules, or from what it was when it was last right.
async fn difference(capture: &Capture, tables: &Tables) -> Result<Option<String>, sqlx::Error> {
    let (pool, name) = (&capture.shared.pool, &capture.config.publication);
    match publication::drift_since(pool, name, &capture.rules, tables).await? {
        // A publication that is too wide lacks nothing.
        Some(Drift::TooWide) => return Ok(None),
        Some(drift) => return Ok(Some(format!("{drift} any more"))),
        None => {}
    }
    let record = recorded::find(pool, &capture.config.slot).await?;
    let now = Fingerprint::take(&mut *pool.acquire().await?, name).await?;
    let (Some(record), Some(now)) = (record, now) else { return Ok(None) };
    let hidden = hidden_since(record.publication.as_deref(), &now, tables);
    Ok((!hidden.is_empty()).then(|| "was changed and changed back".to_owned()))
}

/// What is wrong with the slot, if anything is.
#[derive(Debug, PartialEq, Eq)]
enum Trouble {
    Lost(&'static str),
    /// Bytes.
    TooMuchLog(u64),
    TooOld(Duration),
    Writers(String),
}

fn judge(state: &SlotState, behind: Duration, refused: &[Refusal], limit_bytes: u64) -> Option<Trouble> {
    let bytes = u64::try_from(state.lag_bytes).unwrap_or(0);
    if state.is_lost() {
        Some(Trouble::Lost(state.lost_because()))
    } else if !refused.is_empty() {
        let tables: Vec<String> = refused.iter().map(ToString::to_string).collect();
        Some(Trouble::Writers(tables.join("; ")))
    } else if bytes > limit_bytes {
        Some(Trouble::TooMuchLog(bytes))
    } else if behind > LAG_LIMIT {
        Some(Trouble::TooOld(behind))
    } else {
        None
    }
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 8 PiB of log")]
fn measure(state: &SlotState, behind: Duration) {
    gauge!(names::CAPTURE_LAG_BYTES).set(u64::try_from(state.lag_bytes).unwrap_or(0) as f64);
    gauge!(names::CAPTURE_LAG_SECONDS).set(behind.as_secs_f64());
    gauge!(names::CAPTURE_SLOT_LOST).set(f64::from(u8::from(state.is_lost())));
}

/// Says whether the slot is as it should be; in the log once for each kind of trouble, however long it lasts.
fn report(
    capture: &Capture,
    state: Option<&SlotState>,
    trouble: Option<&Trouble>,
    told: &mut Option<Discriminant<Trouble>>,
    health: &Component,
) {
    match (state, trouble) {
        (None, _) => health.beat(),
        (Some(_), None) => health.ready(),
        (Some(state), Some(trouble)) => {
            let reason = reason(capture, state, trouble);
            if *told != Some(discriminant(trouble)) {
                tracing::error!(slot = capture.config.slot, "{reason}");
            }
            health.not_ready(reason);
        }
    }
    *told = trouble.map(discriminant);
}

fn reason(capture: &Capture, state: &SlotState, trouble: &Trouble) -> String {
    let slot = &capture.config.slot;
    let reader =
        || state.active_pid.map_or("no relay reads it".to_owned(), |pid| format!("process {pid} reads it"));
    match trouble {
        Trouble::Lost(why) => format!("slot {slot} is lost: {why}"),
        Trouble::TooMuchLog(bytes) => {
            format!("slot {slot} is {bytes} bytes behind, more than RELAY_SLOT_LAG_LIMIT; {}", reader())
        }
        Trouble::TooOld(behind) => {
            let why = capture
                .reading
                .warning()
                .map_or_else(reader, |warning| format!("the server says: {warning}"));
            format!("slot {slot} is {} s behind; {why}", behind.as_secs())
        }
        Trouble::Writers(tables) => format!(
            "Postgres refuses every UPDATE and DELETE of published tables: {tables}; give each a primary key or another \
             replica identity, or drop the publication"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_judged_by_time_as_well_as_by_bytes() {
        let slot = |wal_status: &str, lag_bytes: i64| SlotState {
            plugin: "pgoutput".to_owned(),
            database: "db".to_owned(),
            active_pid: None,
            reader: None,
            wal_status: wal_status.to_owned(),
            confirmed: Lsn(1),
            lag_bytes,
            retained_bytes: 0,
            safe_bytes: None,
            written: Lsn(1),
            invalidation: None,
            failover: None,
        };
        let judge = |slot: &SlotState, seconds| judge(slot, Duration::from_secs(seconds), &[], 1000);
        assert_eq!(judge(&slot("reserved", 1000), 60), None);
        assert_eq!(judge(&slot("reserved", 1001), 0), Some(Trouble::TooMuchLog(1001)));
        assert_eq!(judge(&slot("reserved", 10), 61), Some(Trouble::TooOld(Duration::from_secs(61))));
        assert!(matches!(judge(&slot("lost", 0), 0), Some(Trouble::Lost(_))));
    }
}
