//! How much waits for this cache. Whoever is on call needs it above all while Redis is down.

use metrics::gauge;
use service::Report;

use super::Supervisor;
use crate::broker::Pending;
use crate::durable;
use crate::metrics as names;

impl Supervisor {
    /// Counts what waits, when a look ended at Redis before it came to the stream. Changes nothing there, and leaves it to
    /// the next look to judge what is wrong.
    pub(super) async fn count_waiting(&self) {
        match durable::find(&self.jetstream, &self.config.durable).await {
            Ok(Some(info)) => show(Pending::of(&info)),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(error = %Report::of(error.as_ref()), "cannot count what waits for Redis")
            }
        }
    }
}

/// Shows what waits in the metrics.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub(super) fn show(pending: Pending) {
    gauge!(names::PENDING).set(pending.messages as f64);
    gauge!(names::ACK_PENDING).set(pending.unacknowledged as f64);
}
