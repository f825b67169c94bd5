//! Messages that cannot be decoded: kept on a stream of their own with the reason, and never delivered again.

mod headers;

use std::error::Error;

use async_nats::HeaderMap;
use async_nats::jetstream::{self, AckKind, Message};
use bytes::Bytes;
use event::nats::{DEAD_REASON_HEADER, DEAD_SEQUENCE_HEADER, dead_subject};
use metrics::counter;
use service::Report;

use crate::metrics as names;
use crate::{Config, broker};

/// Longest reason that goes into a header.
const MAX_REASON_BYTES: usize = 256;

/// Header of a dead letter that was too large with its reason: size of the original message in bytes.
const TRUNCATED_HEADER: &str = "Invalidation-Dead-Original-Bytes";

/// Where undecodable messages go. The stream for them is created when the first one comes.
#[derive(Debug)]
pub struct DeadLetters {
    jetstream: jetstream::Context,
    max_bytes: i64,
}

/// Takes a message that is no event and nobody's mistake. Returns false for any other.
pub async fn pass_over(message: &Message) -> bool {
    if headers::is_without_content(message) {
        tracing::debug!(
            "a message came without its content, as the durable consumer was edited; it comes again"
        );
        return true;
    }
    if !headers::is_delete_marker(message) {
        return false;
    }
    if let Err(error) = message.ack().await {
        tracing::debug!(error = %Report::of(error.as_ref()), "could not acknowledge what NATS says about expired messages; it comes again");
    }
    true
}

impl DeadLetters {
    /// Through this connection.
    #[must_use]
    pub fn new(jetstream: jetstream::Context, config: &Config) -> Self {
        Self { jetstream, max_bytes: config.dead_max_bytes }
    }

    /// Publishes the original bytes and headers with the reason, waits until they are stored, and only then ends the
    /// delivery of the message.
    ///
    /// # Errors
    /// Whatever NATS says; the message is delivered again then.
    pub async fn set_aside(
        &self,
        message: &Message,
        reason: &(dyn Error + Sync + 'static),
    ) -> Result<(), async_nats::Error> {
        let reason = describe(reason);
        let (stream, sequence) =
            message.info().map(|info| (info.stream.to_owned(), info.stream_sequence)).unwrap_or_default();
        let mut headers = headers::of_dead_letter(message.headers.as_ref());
        // The id belongs to the original: a second delivery of the same poison must not be taken for a duplicate of it
        // in another stream, and identical garbage is worth one dead letter each.
        headers.insert(async_nats::header::NATS_MESSAGE_ID, format!("dead-{stream}-{sequence}"));
        headers.insert(DEAD_REASON_HEADER, reason.clone());
        headers.insert(DEAD_SEQUENCE_HEADER, sequence.to_string());
        let kept = self.keep(&message.subject, headers, message.payload.clone()).await;
        kept.inspect_err(|_| counter!(names::DEAD_LETTERS_FAILED).increment(1))?;
        message.ack_with(AckKind::Term).await?;
        tracing::error!(subject = %message.subject, sequence, reason, "message cannot be decoded; set aside as a dead letter");
        Ok(())
    }

    /// Publishes a dead letter, and creates the stream if there is none.
    async fn keep(&self, subject: &str, headers: HeaderMap, body: Bytes) -> Result<(), async_nats::Error> {
        let (headers, body) = fit(headers, body, self.jetstream.client().server_info().max_payload);
        let Err(error) = self.publish(subject, headers.clone(), body.clone()).await else { return Ok(()) };
        match broker::ensure_dead_stream(&self.jetstream, self.max_bytes).await {
            // It was there, so that was not the cause.
            Ok(false) => Err(error),
            Ok(true) => self.publish(subject, headers, body).await,
            Err(cause) => Err(cause),
        }
    }

    async fn publish(&self, subject: &str, headers: HeaderMap, body: Bytes) -> Result<(), async_nats::Error> {
        self.jetstream.publish_with_headers(dead_subject(subject), headers, body).await?.await?;
        Ok(())
    }
}

/// A message of the largest size has no room for the reason: the end of its body is cut off then.
fn fit(mut headers: HeaderMap, body: Bytes, max_payload: usize) -> (HeaderMap, Bytes) {
    if headers::size(&headers) + body.len() <= max_payload {
        return (headers, body);
    }
    headers.insert(TRUNCATED_HEADER, body.len().to_string());
    if headers::size(&headers) >= max_payload {
        headers = headers::only_ours(&headers);
    }
    let room = max_payload.saturating_sub(headers::size(&headers));
    let body = body.slice(..room.min(body.len()));
    (headers, body)
}

/// The reason in one line, fit for a header.
fn describe(reason: &(dyn Error + 'static)) -> String {
    let mut line = Report::of(reason).to_string();
    while line.len() > MAX_REASON_BYTES {
        line.pop();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_the_largest_size_is_cut_to_make_room_for_the_reason() {
        let mut headers = HeaderMap::new();
        headers.insert(DEAD_REASON_HEADER, "it is garbage");
        let body = Bytes::from(vec![b'x'; 1_000]);
        let (same, whole) = fit(headers.clone(), body.clone(), 2_000);
        assert_eq!((same, whole.len()), (headers.clone(), 1_000));
        for copied in [0, 500, 5_000] {
            let mut headers = headers.clone();
            headers.insert("Copied", "y".repeat(copied));
            let (headers, body) = fit(headers, body.clone(), 1_024);
            assert!(headers::size(&headers) + body.len() <= 1_024, "{copied}");
            assert_eq!(headers.get(TRUNCATED_HEADER).unwrap().as_str(), "1000");
            assert_eq!(headers.get(DEAD_REASON_HEADER).unwrap().as_str(), "it is garbage");
        }
    }
}
