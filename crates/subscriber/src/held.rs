//! Messages that are done in part: acknowledged by whoever does the last part.

use std::sync::{Arc, Weak};
use std::time::Duration;

use async_nats::jetstream::AckKind;
use async_nats::jetstream::message::Acker;
use metrics::{counter, histogram};
use service::Report;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::Span;

use crate::metrics as names;

/// Most memory for messages that are done in part, in bytes. Nothing more is fetched once it is used up.
const MAX_BYTES: usize = 64 * 1024 * 1024;

/// Memory that a message takes besides its keys.
const BYTES_PER_MESSAGE: usize = 512;

/// What becomes of a message once it is done.
#[derive(Debug, Default)]
pub struct Account {
    /// Number of its events.
    pub events: u64,
    /// Enqueue time of its oldest event, in microseconds since the Unix epoch.
    pub oldest_us: Option<i64>,
    /// Spans of its traces; they last until it is acknowledged.
    #[expect(dead_code, reason = "a span ends when it is dropped")]
    pub spans: Vec<Span>,
}

impl Account {
    /// Counts the message as applied.
    pub fn count(&self) {
        counter!(names::MESSAGES, "result" => "applied").increment(1);
        counter!(names::EVENTS_APPLIED).increment(self.events);
        if let Some(oldest) = self.oldest_us {
            let age_us = chrono::Utc::now().timestamp_micros().saturating_sub(oldest).max(0).cast_unsigned();
            histogram!(names::ENQUEUE_TO_DELETE).record(Duration::from_micros(age_us));
        }
    }
}

/// The stream as long as its messages can come again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamBegin {
    /// Creation time of the stream, in microseconds since the Unix epoch: its identity.
    pub created_us: i64,
    /// Its first sequence. What is before has expired.
    pub first_seq: u64,
}

/// A message that is done in part. Each part that is left holds a reference, and gives it back by [`release`].
pub struct Held {
    acker: Acker,
    account: Account,
    /// Creation time of its stream.
    pub stream_created_us: i64,
    /// Its sequence in the stream.
    pub sequence: u64,
    _room: OwnedSemaphorePermit,
}

impl Held {
    /// Holds a message without its payload.
    #[must_use]
    pub fn new(
        acker: Acker,
        account: Account,
        (stream_created_us, sequence): (i64, u64),
        room: OwnedSemaphorePermit,
    ) -> Arc<Self> {
        Arc::new(Self { acker, account, stream_created_us, sequence, _room: room })
    }

    /// Whether the message can still come again.
    #[must_use]
    pub fn is_in(&self, stream: StreamBegin) -> bool {
        self.stream_created_us == stream.created_us && self.sequence >= stream.first_seq
    }
}

/// Gives back a reference. The last one acknowledges the message.
pub async fn release(held: Arc<Held>) {
    let Some(held) = Arc::into_inner(held) else { return };
    if let Err(error) = held.acker.ack().await {
        tracing::debug!(error = %Report::of(error.as_ref()), "could not acknowledge a message; it will be applied once more");
    }
    held.account.count();
}

/// Tells NATS of all messages that are left that they are being worked on.
pub async fn keep_alive(all: &[Weak<Held>]) {
    for held in all {
        let Some(held) = held.upgrade() else { continue };
        let _ = held.acker.ack_with(AckKind::Progress).await;
        release(held).await;
    }
}

/// Memory for messages that are done in part.
#[derive(Debug, Clone)]
pub struct Room(Arc<Semaphore>);

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_BYTES)))
    }
}

impl Room {
    /// Waits for room for a message with so many bytes of keys.
    pub async fn take(&self, bytes: usize) -> OwnedSemaphorePermit {
        let wanted = (bytes + BYTES_PER_MESSAGE).min(MAX_BYTES);
        let wanted = u32::try_from(wanted).expect("the limit fits");
        Arc::clone(&self.0).acquire_many_owned(wanted).await.expect("it is never closed")
    }
}
