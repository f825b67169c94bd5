//! How much waits for this cache. Whoever is on call needs it above all while Redis is down.

use async_nats::jetstream::consumer::PullConsumer;
use event::nats::STREAM;
use metrics::gauge;
use service::Report;

use super::{Memory, Supervisor};
use crate::broker::{self, Pending};
use crate::metrics as names;

impl Supervisor {
    /// Counts what waits, when a look ended at Redis before it came to the stream. Changes nothing there, and leaves it to
    /// the next look to judge what is wrong.
    pub(super) async fn count_waiting(&self, memory: &mut Memory) {
        let counted = match &mut memory.handles {
            Some((stream, consumer)) => broker::look(stream, consumer).await.map(|(_, pending)| pending),
            None => self.find_waiting().await,
        };
        match counted {
            Ok(pending) => show(pending),
            Err(error) => {
                tracing::debug!(error = %Report::of(error.as_ref()), "cannot count what waits for Redis")
            }
        }
    }

    /// For a subscriber that started while Redis is down. It creates no consumer, as where that begins is recorded in Redis.
    async fn find_waiting(&self) -> Result<Pending, async_nats::Error> {
        let mut stream = self.jetstream.get_stream(STREAM).await?;
        let mut consumer: PullConsumer = stream.get_consumer(&self.config.durable).await?;
        Ok(broker::look(&mut stream, &mut consumer).await?.1)
    }
}

/// Shows what waits in the metrics.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub(super) fn show(pending: Pending) {
    gauge!(names::PENDING).set(pending.messages as f64);
    gauge!(names::ACK_PENDING).set(pending.unacknowledged as f64);
}
