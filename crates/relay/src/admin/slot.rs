use anyhow::bail;
use clap::Subcommand;
use outbox::capture;
use service::printable;
use sqlx::PgPool;
use wal::slot::{self, SlotState};

use crate::Config;

/// What to do with the slot.
#[derive(Debug, Clone, Subcommand)]
pub enum SlotCommand {
    /// Show where it is
    Show,
    /// Go on although changes are missing: the relay makes a new slot, and then declares every key stale that the rules can
    /// name
    AcceptGap,
    /// Drop it, so that Postgres keeps no log for it any more: no relay reads the log from now on
    Drop,
}

pub(super) async fn execute(pool: &PgPool, config: &Config, command: SlotCommand) -> anyhow::Result<()> {
    let name = &config.capture.slot;
    let state = slot::find(pool, name).await?;
    if let (Some(pid), SlotCommand::AcceptGap | SlotCommand::Drop) =
        (state.as_ref().and_then(|state| state.active_pid), &command)
    {
        bail!("slot {name} is being read (server process {pid}); stop the relays with --source wal first");
    }
    match command {
        SlotCommand::Show => println!("{}", describe(name, state.as_ref())),
        SlotCommand::AcceptGap => {
            if !capture::begin_anew(pool, name).await? {
                bail!("no relay has read slot {name} yet, so nothing can be missing");
            }
            println!(
                "what is missing is accepted; a relay with --source wal makes a new slot, and then declares every key stale \
                 that the rules can name"
            );
        }
        SlotCommand::Drop => {
            // Marked first: what changes without a slot is missing for whoever reads again.
            capture::begin_anew(pool, name).await?;
            slot::discard(pool, name).await?;
            let done = if state.is_some() { "is dropped" } else { "does not exist" };
            println!("slot {name} {done}; a relay that runs with --source wal creates it again");
        }
    }
    Ok(())
}

/// One line about the slot.
pub(super) fn describe(name: &str, state: Option<&SlotState>) -> String {
    let Some(state) = state else { return format!("{name} does not exist") };
    let reader = state.active_pid.map_or("nobody reads it".to_owned(), |pid| {
        let name = state.reader.as_deref().unwrap_or_default();
        format!("read by process {pid} '{name}'")
    });
    let room = state
        .safe_bytes
        .map_or(String::new(), |bytes| format!(", lost after {:.1} MB more", megabytes(bytes)));
    let status =
        if state.is_lost() { format!("lost: {}", state.lost_because()) } else { state.wal_status.clone() };
    let line = format!(
        "{name} at {}, {}, {:.1} MB behind, {:.1} MB of log kept ({status}{room})",
        state.confirmed,
        reader,
        megabytes(state.lag_bytes),
        megabytes(state.retained_bytes),
    );
    printable(&line)
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn megabytes(bytes: i64) -> f64 {
    bytes as f64 / 1e6
}
