//! Hands messages to JetStream and waits until every one is acknowledged.

use std::time::Duration;

use async_nats::jetstream::{self, context::PublishErrorKind, message::PublishMessage};
use event::Envelope;
use event::nats::{STREAM, subject};
use futures::{StreamExt, TryStreamExt, stream};
use outbox::retention::Published;
use service::nats::{Link, Nats};
use service::trace;
use tracing::{Instrument, Span};

use crate::packing::Packed;

/// Messages on their way at the same time. More does not make JetStream faster, it only grows memory.
const IN_FLIGHT: usize = 128;

/// Why messages were not acknowledged. Always the broker's doing, so always worth another attempt: what can never be
/// published was set aside before it came here.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The connection broke; acknowledgements still on their way are lost with it.
    #[error("connection to NATS was lost before all messages were acknowledged")]
    Disconnected,
    /// No acknowledgement in time.
    #[error("no acknowledgement within {0:?}")]
    TimedOut(Duration),
    /// No stream takes the subject.
    #[error("stream {STREAM} is missing")]
    NoStream,
    /// Another stream takes the subject.
    #[error("subject is captured by stream {0} instead of {STREAM}")]
    WrongStream(String),
    /// The stream refuses, for example because it is full.
    #[error("stream refuses the message")]
    Refused(#[source] jetstream::context::PublishError),
}

impl PublishError {
    /// Every word that [`PublishError::reason`] can be.
    pub const REASONS: [&'static str; 5] =
        ["disconnected", "timeout", "no_stream", "wrong_stream", "refused"];

    /// A short word for the metric's label.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        let [disconnected, timeout, no_stream, wrong_stream, refused] = Self::REASONS;
        match self {
            Self::Disconnected => disconnected,
            Self::TimedOut(_) => timeout,
            Self::NoStream => no_stream,
            Self::WrongStream(_) => wrong_stream,
            Self::Refused(_) => refused,
        }
    }
}

/// Publishes all messages over the connection `link` and waits for all acknowledgements, within `timeout` altogether. Over a
/// later connection nothing is published: the stream has to be looked at first.
///
/// # Errors
/// [`PublishError`] as soon as one message fails; others may have been published by then. Publishing them again is
/// harmless. Cancel-safe in the same sense.
pub async fn publish<M: Into<Published>>(
    jetstream: &jetstream::Context,
    nats: &Nats,
    link: Link,
    messages: Vec<M>,
    timeout: Duration,
) -> Result<Vec<Published>, PublishError> {
    let lost = nats.lost_since(link);
    let all = stream::iter(messages)
        .map(|message| publish_one(jetstream, message.into(), timeout))
        .buffer_unordered(IN_FLIGHT)
        .try_collect();
    tokio::select! {
        biased;
        () = lost => Err(PublishError::Disconnected),
        published = all => published,
        () = tokio::time::sleep(timeout) => Err(PublishError::TimedOut(timeout)),
    }
}

async fn publish_one(
    jetstream: &jetstream::Context,
    message: Published,
    timeout: Duration,
) -> Result<Published, PublishError> {
    let span = span(&message);
    let stream_seq = acknowledged(jetstream, &message, timeout).instrument(span).await?;
    Ok(Published { stream_seq, ..message })
}

impl From<Packed> for Published {
    fn from(message: Packed) -> Self {
        Self {
            subject: subject(&message.topic),
            message_id: message.message_id,
            traceparent: message.traceparent,
            events: i32::try_from(message.rows).unwrap_or(i32::MAX),
            body: message.body,
            stream_seq: 0,
        }
    }
}

/// The part of the writer's trace that happens here, if the message has one.
fn span(published: &Published) -> Span {
    let Some(traceparent) = &published.traceparent else { return Span::none() };
    let span = tracing::info_span!("publish", subject = published.subject);
    trace::parent_from(&span, traceparent);
    span
}

/// Publishes a message and returns the sequence the stream gave it.
async fn acknowledged(
    jetstream: &jetstream::Context,
    published: &Published,
    timeout: Duration,
) -> Result<i64, PublishError> {
    let mut message = PublishMessage::build()
        .payload(published.body.clone())
        .message_id(&published.message_id)
        .header("Content-Type", Envelope::CONTENT_TYPE);
    if let Some(traceparent) = &published.traceparent {
        // With traces exported, the next part of the trace is a child of this one.
        let parent = trace::current_traceparent().unwrap_or_else(|| traceparent.clone());
        message = message.header("traceparent", parent.as_str());
    }
    let sent = jetstream.send_publish(published.subject.clone(), message).await;
    let ack = match sent {
        Ok(ack) => ack.await,
        Err(error) => Err(error),
    };
    match ack {
        Ok(ack) if ack.stream == STREAM => Ok(i64::try_from(ack.sequence).unwrap_or(i64::MAX)),
        Ok(ack) => Err(PublishError::WrongStream(ack.stream)),
        Err(error) => Err(match error.kind() {
            PublishErrorKind::TimedOut => PublishError::TimedOut(timeout),
            PublishErrorKind::BrokenPipe => PublishError::Disconnected,
            PublishErrorKind::StreamNotFound => PublishError::NoStream,
            _ => PublishError::Refused(error),
        }),
    }
}
