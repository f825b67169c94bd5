use std::time::Duration;

use async_nats::jetstream::AckKind;
use async_nats::jetstream::message::Acker;
use cache::Work;
use event::{Change, CommittedEvent};
use service::Report;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

/// A change event in hand: its invalidations, and the means to acknowledge it. The body of the message is gone.
pub(super) struct Delivery {
    acker: Acker,
    events: Vec<CommittedEvent>,
    /// Time at which the next lane may apply it.
    pub(super) due: Instant,
    /// Commit time by the clock of the database, in microseconds since the Unix epoch; none for snapshots.
    pub(super) committed_us: Option<i64>,
    /// Its share of what may be in hand; given back when the delivery is settled.
    _share: OwnedSemaphorePermit,
}

/// The part of a delivery that a lane applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Single keys: one round trip.
    Keys,
    /// Key prefixes: a scan of the cache.
    Prefixes,
    /// Both.
    Everything,
}

impl Part {
    fn includes(self, event: &CommittedEvent) -> bool {
        match self {
            Self::Keys => event.change != Change::Namespace,
            Self::Prefixes => event.change == Change::Namespace,
            Self::Everything => true,
        }
    }
}

impl Delivery {
    pub(super) fn new(
        acker: Acker,
        events: Vec<CommittedEvent>,
        committed_us: Option<i64>,
        share: OwnedSemaphorePermit,
    ) -> Self {
        Self { acker, events, due: Instant::now(), committed_us, _share: share }
    }

    /// Adds the part of it that a lane applies.
    pub(super) fn add_to(&self, work: &mut Work, part: Part) {
        self.events.iter().filter(|event| part.includes(event)).for_each(|event| work.add(event));
    }

    /// Tells whether it invalidates nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Tells whether it invalidates key prefixes.
    pub(super) fn has_prefixes(&self) -> bool {
        self.events.iter().any(|event| event.change == Change::Namespace)
    }

    /// Acknowledges it. One whose acknowledgement is lost is delivered and applied once more.
    pub(super) async fn acknowledge(self) {
        if let Err(error) = self.acker.ack().await {
            tracing::debug!(error = %Report::of(error.as_ref()), "cannot acknowledge a change event; it will be applied once more");
        }
    }

    /// Tells NATS that it is still being worked on.
    pub(super) async fn keep_alive(&self) {
        let _ = self.acker.ack_with(AckKind::Progress).await;
    }

    /// Gives it back to NATS, to be delivered again after a pause.
    pub(super) async fn give_back(self, pause: Duration) {
        if let Err(error) = self.acker.ack_with(AckKind::Nak(Some(pause))).await {
            tracing::debug!(error = %Report::of(error.as_ref()), "cannot give back a change event; it is delivered again later");
        }
    }
}
