//! Messages that cannot be decoded: kept on a stream of their own with the reason, and never delivered again.

use async_nats::jetstream::{self, AckKind, Message};
use event::nats::{DEAD_REASON_HEADER, DEAD_SEQUENCE_HEADER, dead_subject};
use service::Report;

/// Longest reason that goes into a header.
const MAX_REASON_BYTES: usize = 256;

/// Where undecodable messages go.
#[derive(Debug)]
pub struct DeadLetters {
    jetstream: jetstream::Context,
}

impl DeadLetters {
    /// Through this connection.
    #[must_use]
    pub fn new(jetstream: jetstream::Context) -> Self {
        Self { jetstream }
    }

    /// Publishes the original bytes and headers with the reason, waits until they are stored, and only then ends the
    /// delivery of the message.
    ///
    /// # Errors
    /// Whatever NATS says; the message is delivered again then.
    pub async fn set_aside(
        &self,
        message: &Message,
        reason: &(dyn std::error::Error + Sync + 'static),
    ) -> Result<(), async_nats::Error> {
        let reason = describe(reason);
        let (stream, sequence) =
            message.info().map(|info| (info.stream.to_owned(), info.stream_sequence)).unwrap_or_default();
        tracing::error!(subject = %message.subject, sequence, reason, "message cannot be decoded; set aside as a dead letter");
        let mut headers = message.headers.clone().unwrap_or_default();
        // The id belongs to the original: a second delivery of the same poison must not be taken for a duplicate of it
        // in another stream, and identical garbage is worth one dead letter each.
        headers.insert(async_nats::header::NATS_MESSAGE_ID, format!("dead-{stream}-{sequence}"));
        headers.insert(DEAD_REASON_HEADER, reason);
        headers.insert(DEAD_SEQUENCE_HEADER, sequence.to_string());
        self.jetstream
            .publish_with_headers(dead_subject(&message.subject), headers, message.payload.clone())
            .await?
            .await?;
        message.ack_with(AckKind::Term).await
    }
}

/// The reason in one line, fit for a header.
fn describe(reason: &(dyn std::error::Error + 'static)) -> String {
    let mut line = Report::of(reason).to_string();
    while line.len() > MAX_REASON_BYTES {
        line.pop();
    }
    line
}
