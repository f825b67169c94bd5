//! The stream and the dead letters on NATS, and what is seen of stream and consumer.

use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::{Config as StreamConfig, DiscardPolicy, RawMessageErrorKind, Stream};
use async_nats::jetstream::{self, ErrorCode};
use event::nats::{DEAD_SUBJECTS, STREAM};
use service::nats::{JetStreamError, Nats};

use crate::position::Seen;

/// Stream of messages that could not be decoded.
pub const DEAD_STREAM: &str = "INVALIDATIONS_DEAD";

/// How long dead letters are kept for somebody to look at.
const DEAD_MAX_AGE: Duration = Duration::from_hours(30 * 24);

/// Most bytes of dead letters: a producer of garbage must not fill the disk of the broker.
const DEAD_MAX_BYTES: i64 = 256 * 1024 * 1024;

/// How long JetStream may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Why NATS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Nobody has created the stream yet.
    #[error("stream {STREAM} does not exist; start a relay, which creates it")]
    NoStream,
    /// The stream cannot be looked at.
    #[error("cannot look at stream {STREAM}")]
    Look(#[source] JetStreamError),
    /// The stream of dead letters cannot be created.
    #[error("cannot create stream {DEAD_STREAM} for up to {} MB of dead letters", DEAD_MAX_BYTES / 1_000_000)]
    DeadStream(#[source] JetStreamError),
    /// The consumer could not be created.
    #[error("cannot create durable consumer {durable}")]
    Consumer {
        /// Its name.
        durable: String,
        /// What JetStream said.
        #[source]
        source: async_nats::Error,
    },
    /// A consumer of that name does something else.
    #[error(
        "durable consumer {durable} exists with other options: {difference}; delete it or choose another SUBSCRIBER_DURABLE"
    )]
    Mismatch {
        /// Its name.
        durable: String,
        /// What differs.
        difference: String,
    },
}

impl BrokerError {
    /// Whether the same request can succeed a moment later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NoStream => true,
            Self::Look(error) | Self::DeadStream(error) => error.may_pass(),
            Self::Consumer { .. } | Self::Mismatch { .. } => false,
        }
    }
}

/// JetStream with timeouts fit for a subscriber.
#[must_use]
pub fn jetstream(nats: &Nats) -> jetstream::Context {
    nats.jetstream(TIMEOUT)
}

/// Finds the stream.
///
/// # Errors
/// [`BrokerError`].
pub async fn stream(nats: &Nats, jetstream: &jetstream::Context) -> Result<Stream, BrokerError> {
    jetstream.get_stream(STREAM).await.map_err(|error| match error.kind() {
        GetStreamErrorKind::JetStream(reason) if reason.error_code() == ErrorCode::STREAM_NOT_FOUND => {
            BrokerError::NoStream
        }
        _ => BrokerError::Look(nats.judge(error)),
    })
}

/// Makes sure there is a stream that keeps dead letters.
///
/// # Errors
/// [`BrokerError`].
pub async fn ensure_dead_stream(nats: &Nats, jetstream: &jetstream::Context) -> Result<(), BrokerError> {
    let wanted = StreamConfig {
        name: DEAD_STREAM.to_owned(),
        description: Some("Messages of INVALIDATIONS that could not be decoded".to_owned()),
        subjects: vec![DEAD_SUBJECTS.to_owned()],
        discard: DiscardPolicy::Old,
        max_age: DEAD_MAX_AGE,
        max_bytes: DEAD_MAX_BYTES,
        ..Default::default()
    };
    match jetstream.get_or_create_stream(wanted).await {
        Ok(_) => Ok(()),
        Err(error) => Err(BrokerError::DeadStream(nats.judge(error))),
    }
}

/// The stream and the consumer as they are now.
///
/// # Errors
/// Whatever JetStream says, for example that the consumer is gone.
pub async fn look(
    stream: &mut Stream,
    consumer: &mut PullConsumer,
) -> Result<(Seen, Pending), async_nats::Error> {
    // In this order nothing that expires between the two is taken for acknowledged, nor anything that is published and
    // acknowledged for lost.
    let state = consumer.info().await?.clone();
    let info = stream.info().await?;
    let seen = Seen {
        stream_created_us: info.created.timestamp_micros(),
        first_seq: info.state.first_sequence,
        last_seq: info.state.last_sequence,
        ack_floor: state.ack_floor.stream_sequence,
        is_refilled: false,
    };
    let pending = Pending {
        messages: state.num_pending,
        unacknowledged: state.num_ack_pending as u64,
        redelivered: state.num_redelivered as u64,
        delivered: state.delivered.stream_sequence,
    };
    Ok((seen, pending))
}

/// Whether the message at `acked_seq` is another one than that which was published at `acked_until_us`: the stream ended before
/// it and was filled again. One that is gone may have expired.
///
/// # Errors
/// Whatever JetStream says.
pub async fn is_refilled(
    stream: &Stream,
    acked_seq: u64,
    acked_until_us: i64,
) -> Result<bool, async_nats::Error> {
    if acked_seq == 0 || acked_until_us == 0 {
        return Ok(false);
    }
    match stream.get_raw_message(acked_seq).await {
        Ok(message) => Ok(message.time.timestamp_micros() != acked_until_us),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Up to where the stream has nothing on `subject` that follows `applied`, or as far as that is known.
///
/// The floor of a consumer with a filter moves only when it acknowledges, while the messages of others come and expire.
/// Its count of pending messages proves nothing: it is told of a new message after the stream has stored it, and forgets
/// one that expires. So the stream itself is asked for the next message, between two looks: `seen` says what it had before,
/// and that nothing behind `applied` has expired by the second look says that the answer leaves nothing out.
///
/// # Errors
/// Whatever JetStream says.
pub async fn reach(
    stream: &mut Stream,
    subject: &str,
    seen: Seen,
    applied: u64,
) -> Result<u64, async_nats::Error> {
    if applied >= seen.last_seq || seen.first_seq > applied + 1 {
        return Ok(applied);
    }
    let reach = match stream.get_first_raw_message_by_subject(subject, applied + 1).await {
        Ok(next) => next.sequence.saturating_sub(1).min(seen.last_seq),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => seen.last_seq,
        Err(error) => return Err(error.into()),
    };
    let info = stream.info().await?;
    let is_same = info.created.timestamp_micros() == seen.stream_created_us;
    let is_whole = info.state.first_sequence <= applied + 1 && info.state.last_sequence >= seen.last_seq;
    Ok(if is_same && is_whole { reach.max(applied) } else { applied })
}

/// What a consumer has before it.
#[derive(Debug, Clone, Copy)]
pub struct Pending {
    /// Messages not delivered yet.
    pub messages: u64,
    /// Messages delivered but not acknowledged.
    pub unacknowledged: u64,
    /// Messages delivered more than once and not acknowledged yet.
    pub redelivered: u64,
    /// Last sequence delivered.
    pub delivered: u64,
}
