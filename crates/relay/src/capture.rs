//! Capture from the write-ahead log: reads a slot, waits until each transaction is visible, publishes what it
//! invalidates, and confirms the position.
//!
//! One relay reads a slot at a time; the others stand by and take over when it is gone. Three stages work side by side:
//! the reader decodes, the pump publishes, and what is published is settled in Postgres before the slot hears of it.

mod events;
mod expand;
mod gap;
mod lag;
mod monitor;
mod opening;
mod publishing;
mod pump;
mod reader;
mod reading;

use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge};
use rules::Rules;
use service::{Backoff, Component, Report, SaidLately, Shutdown};
use wal::publication::Tables;
use wal::session::SessionError;
use wal::slot;
use wal::{Assembler, Lsn};

use crate::config::CaptureConfig;
use crate::database::{PATIENCE, Servers, within};
use crate::metrics as names;
use crate::worker::Shared;

use gap::Gap;
use opening::{OpenError, Opened};
use pump::{Pump, PumpError};
use reader::{Catalog, ReadEnd, ReadError};

pub use monitor::monitor;
pub use opening::{ReadElsewhere, is_passing, preflight};
pub use publishing::check_rules;
pub use reading::Reading;

/// How a reader of the log shows in `pg_stat_replication`: by it relays know one another.
pub const APPLICATION_NAME: &str = "relay-wal";

/// Pauses before the log is read again after a failure.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// How often a relay that stands by looks whether the slot is free; each time a little earlier or later.
const STANDBY_INTERVAL: Duration = Duration::from_millis(700);

/// How often a halted reader looks whether somebody has decided.
const HALT_INTERVAL: Duration = Duration::from_secs(5);

/// How long what was read before a shutdown may take to be published.
const FAREWELL: Duration = Duration::from_secs(5);

/// Less than this behind is caught up: a reader at work leaves a little log unconfirmed.
const CAUGHT_UP_BYTES: u64 = 1024 * 1024;

/// What the reader of the log needs.
#[derive(Debug)]
pub struct Capture {
    /// What all sources share.
    pub shared: Arc<Shared>,
    /// Options.
    pub config: CaptureConfig,
    /// Which keys depend on which table.
    pub rules: Arc<Rules>,
    /// Servers of which one is connected to for replication.
    pub servers: Servers,
    /// What is being read.
    pub reading: Reading,
}

/// Why the log is not read at the moment.
#[derive(Debug, thiserror::Error)]
enum CaptureError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Pump(#[from] PumpError),
    #[error("the publication was changed while it was read")]
    Drifted,
}

impl CaptureError {
    /// Whether the publication, which was there a moment ago, did not exist at the position of the slot: Postgres looks it
    /// up as of there, and will say the same for ever. A slot that is missing sounds the same, and has no position.
    fn lacks_publication(&self) -> bool {
        matches!(
            self,
            Self::Open(OpenError::Session(SessionError::Missing(_)))
                | Self::Read(ReadError::Session(SessionError::Missing(_)))
        )
    }
}

async fn position_of_slot(capture: &Capture) -> Option<Lsn> {
    let found = within(PATIENCE, slot::find(&capture.shared.pool, &capture.config.slot)).await;
    found.ok().flatten().map(|state| state.confirmed)
}

/// Runs until shutdown is requested, with everything confirmed that was published.
pub async fn run(capture: Arc<Capture>, health: Component, shutdown: Shutdown) {
    let mut retry = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
    let mut standby = Backoff::new(STANDBY_INTERVAL, STANDBY_INTERVAL);
    let mut streaming = true;
    let mut halted = None;
    let mut told = None;
    let mut said = SaidLately::default();
    let mut unreadable = None;
    while !shutdown.is_requested() {
        gauge!(names::CAPTURE_ACTIVE).set(0.0);
        capture.reading.ended();
        let pause = match read_on(&capture, streaming, unreadable, &health, &shutdown).await {
            Ok(()) => continue,
            Err(CaptureError::Open(OpenError::Session(SessionError::SlotActive(_)))) => {
                tracing::debug!(slot = capture.config.slot, "another relay reads the slot; standing by");
                retry.reset();
                health.ready();
                health.idle();
                standby.next_delay()
            }
            Err(CaptureError::Open(OpenError::ReadElsewhere(foreign))) => {
                if told.as_ref() != Some(&foreign) {
                    tracing::warn!(
                        slot = capture.config.slot,
                        "{foreign}; the write-ahead log is not read: stop that program, or choose another name in RELAY_SLOT"
                    );
                }
                health.not_ready(foreign.to_string());
                told = Some(foreign);
                standby.next_delay()
            }
            Err(CaptureError::Open(OpenError::Gap(gap))) => {
                report_halt(&capture, &gap, &mut halted);
                health
                    .not_ready(format!("{gap}; the write-ahead log is not read (RELAY_GAP_POLICY is halt)"));
                HALT_INTERVAL
            }
            Err(CaptureError::Read(ReadError::NotBeforeCommit(reason))) => {
                tracing::warn!("{reason}; reading transactions after their commit from here on");
                streaming = false;
                halted = None;
                continue;
            }
            Err(error) => {
                halted = None;
                if error.lacks_publication() {
                    unreadable = position_of_slot(&capture).await.or(unreadable);
                }
                counter!(names::CAPTURE_RECONNECTS).increment(1);
                let error = Report::of(&error).to_string();
                if said.is_news(&error) {
                    tracing::warn!(error, "the write-ahead log is not read; trying again");
                }
                health.not_ready(error);
                retry.next_delay()
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.requested() => {}
        }
    }
}

/// Counts and logs a gap that nobody has decided about: once, however often it is looked at.
fn report_halt(capture: &Capture, gap: &Gap, halted: &mut Option<Gap>) {
    if halted.as_ref() == Some(gap) {
        return;
    }
    counter!(names::CAPTURE_GAPS, "policy" => capture.config.gap_policy.as_str()).increment(1);
    tracing::error!(
        slot = capture.config.slot,
        "{gap}; the write-ahead log is not read: decide with RELAY_GAP_POLICY=flush or `relay slot accept-gap`"
    );
    *halted = Some(gap.clone());
}

/// Reads the log for as long as it goes well. `Ok` only after a shutdown was requested.
async fn read_on(
    capture: &Arc<Capture>,
    streaming: bool,
    unreadable: Option<Lsn>,
    health: &Component,
    shutdown: &Shutdown,
) -> Result<(), CaptureError> {
    let Opened { stream, tables, expanders, timeline } =
        opening::open(capture, streaming, unreadable, health).await?;
    tracing::info!(
        slot = capture.config.slot,
        publication = capture.config.publication,
        "reading the write-ahead log"
    );
    gauge!(names::CAPTURE_ACTIVE).set(1.0);
    health.ready();
    let confirmer = stream.confirmer();
    let (sender, receiver) = reader::channel();
    let primary_keys =
        expanders.iter().map(|expander| Some(expander.as_ref()?.column().to_owned())).collect();
    let tables = Arc::new(tables);
    let assembler = Assembler::new(Arc::clone(&capture.rules), Tables::clone(&tables), primary_keys);
    let pump = Pump::new(Arc::clone(capture), expanders, timeline, confirmer, health.clone());
    let mut pump = Box::pin(pump.run(receiver));
    let catalog =
        Catalog { pool: &capture.shared.pool, publication: &capture.config.publication, tables: &tables };
    capture.reading.began(Arc::clone(&tables));
    let reading = reader::read(stream, assembler, &catalog, sender, &capture.reading, shutdown);
    let end = tokio::select! {
        end = reading => end?,
        pumped = &mut pump => return Ok(pumped?),
        // What was read and is not settled is read again.
        () = capture.reading.drifted() => return Err(CaptureError::Drifted),
    };
    // The reader has let go of its end, so the pump comes to an end when everything is published.
    let ReadEnd { stream } = end;
    if let Ok(pumped) = tokio::time::timeout(FAREWELL, pump).await {
        pumped?;
    }
    stream.finish().await;
    Ok(())
}
