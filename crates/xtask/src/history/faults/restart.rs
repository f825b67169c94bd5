//! What a process manager does: a daemon that gives up at its start, as its servers are down, is started again.

use crate::daemon::Daemon;
use crate::history::field::{Field, Target};
use crate::history::progress;

/// Starts each daemon again that has ended by itself.
pub fn restart_daemons(field: &Field) -> anyhow::Result<()> {
    [&field.relay, &field.subscriber].into_iter().flatten().try_for_each(restart)
}

fn restart(daemon: &Target<Daemon>) -> anyhow::Result<()> {
    // Whoever holds it has killed it and starts it again.
    let Ok(_busy) = daemon.busy.try_lock() else { return Ok(()) };
    let process = daemon.it.process();
    if process.is_running() {
        return Ok(());
    }
    let log = process.log();
    progress(&format!(
        "{} ended and is started again: {}",
        daemon.name,
        log.trim().lines().last().unwrap_or_default()
    ));
    process.start()
}
