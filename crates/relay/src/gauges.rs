//! Figures that are measured now and then rather than counted.

use std::time::Duration;

use metrics::gauge;
use outbox::{backlog, dead_letters};
use service::{Report, Shutdown};
use sqlx::PgPool;

use crate::database::{PATIENCE, within};
use crate::metrics as names;

const INTERVAL: Duration = Duration::from_secs(5);

/// The backlog is counted up to here: more would be a load of its own, and means the same to whoever is on call.
const COUNT_LIMIT: i64 = 100_000;

/// Measures until shutdown is requested.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub async fn run(pool: PgPool, shutdown: Shutdown) {
    while !shutdown.is_requested() {
        let measured = async {
            let backlog = backlog::measure(&pool, COUNT_LIMIT).await?;
            gauge!(names::BACKLOG).set(backlog.events as f64);
            gauge!(names::BACKLOG_AGE).set(backlog.oldest_age_seconds());
            gauge!(names::DEAD_LETTERS_WAITING).set(dead_letters::count(&pool).await? as f64);
            Ok::<_, sqlx::Error>(())
        };
        if let Err(error) = within(PATIENCE, measured).await {
            tracing::debug!(error = %Report::of(&error), "could not measure the backlog");
        }
        tokio::select! {
            () = shutdown.requested() => {}
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}
