//! The stream and the dead letters on NATS, and what is seen of stream and consumer.

use std::time::Duration;

use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{
    Config as StreamConfig, DiscardPolicy, Info as StreamInfo, RawMessageErrorKind, Stream,
};
use async_nats::jetstream::{self, ErrorCode};
use event::nats::{DEAD_SUBJECTS, STREAM};
use serde_json::json;
use service::nats::{JetStreamError, Nats};

use crate::durable;
use crate::position::Seen;

/// Stream of messages that could not be decoded.
pub const DEAD_STREAM: &str = "INVALIDATIONS_DEAD";

/// How long dead letters are kept for somebody to look at.
const DEAD_MAX_AGE: Duration = Duration::from_hours(30 * 24);

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
    #[error(
        "cannot create stream {DEAD_STREAM} for up to {max_bytes} bytes of dead letters on {replicas} servers; \
         SUBSCRIBER_DEAD_MAX_BYTES is the number of bytes that JetStream reserves for it"
    )]
    DeadStream {
        /// Its size limit.
        max_bytes: i64,
        /// How many servers.
        replicas: usize,
        /// What JetStream said.
        #[source]
        source: async_nats::Error,
    },
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
        "durable consumer {durable} has options with which invalidations are missed, and they cannot be changed: \
         {difference}; delete it (nats consumer rm {STREAM} {durable}) or choose another SUBSCRIBER_DURABLE"
    )]
    Mismatch {
        /// Its name.
        durable: String,
        /// What differs.
        difference: String,
        /// Why it cannot be changed, if NATS says so.
        #[source]
        source: Option<async_nats::Error>,
    },
    /// Somebody has paused it.
    #[error(
        "durable consumer {durable} is paused until {until}, so nothing is invalidated; resume it: \
         nats consumer resume {STREAM} {durable}"
    )]
    Paused {
        /// Its name.
        durable: String,
        /// Time until which it is paused.
        until: String,
    },
    /// Somebody has deleted it.
    #[error("durable consumer {durable} is gone; it is created again")]
    Gone {
        /// Its name.
        durable: String,
    },
}

impl BrokerError {
    /// Whether the same request can succeed a moment later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NoStream => true,
            Self::Look(error) => error.may_pass(),
            _ => false,
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

/// Creates the stream that keeps dead letters, on as many servers as the stream of events, unless it is there. Returns true
/// if it was created.
///
/// # Errors
/// [`BrokerError`].
pub async fn ensure_dead_stream(
    jetstream: &jetstream::Context,
    max_bytes: i64,
) -> Result<bool, async_nats::Error> {
    if find_stream(jetstream, DEAD_STREAM).await?.is_some() {
        return Ok(false);
    }
    // Debezium's change events may come without a relay.
    let events = find_stream(jetstream, STREAM).await?;
    let num_replicas = events.map_or(1, |stream| stream.cached_info().config.num_replicas);
    let wanted = StreamConfig {
        name: DEAD_STREAM.to_owned(),
        description: Some("Messages of INVALIDATIONS that could not be decoded".to_owned()),
        subjects: vec![DEAD_SUBJECTS.to_owned()],
        discard: DiscardPolicy::Old,
        max_age: DEAD_MAX_AGE,
        max_bytes,
        num_replicas,
        ..Default::default()
    };
    match jetstream.get_or_create_stream(wanted).await {
        Ok(_) => Ok(true),
        Err(error) => {
            Err(BrokerError::DeadStream { max_bytes, replicas: num_replicas, source: error.into() }.into())
        }
    }
}

async fn find_stream(
    jetstream: &jetstream::Context,
    name: &str,
) -> Result<Option<Stream>, async_nats::Error> {
    match jetstream.get_stream(name).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(reason) if reason.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                Ok(None)
            }
            _ => Err(error.into()),
        },
    }
}

/// The stream and the consumer as they are now.
///
/// # Errors
/// Whatever JetStream says; [`BrokerError::Gone`] if there is no consumer.
pub async fn look(
    jetstream: &jetstream::Context,
    stream: &mut Stream,
    durable: &str,
) -> Result<Look, async_nats::Error> {
    // In this order nothing that expires between the two is taken for acknowledged, nor anything that is published and
    // acknowledged for lost.
    let Some(consumer) = durable::find(jetstream, durable).await? else {
        return Err(BrokerError::Gone { durable: durable.to_owned() }.into());
    };
    let state = &consumer.consumer;
    let info = stream.info().await?;
    let seen = Seen {
        stream_created_us: info.created.timestamp_micros(),
        first_seq: info.state.first_sequence,
        last_seq: info.state.last_sequence,
        ack_floor: state.ack_floor.stream_sequence,
        is_refilled: false,
        holes: 0,
        is_unrecorded: false,
    };
    let deleted = info.state.deleted_count.unwrap_or_default();
    Ok(Look { seen, pending: Pending::of(&consumer), consumer, deleted })
}

/// What one look at the stream and the consumer brings.
#[derive(Debug, Clone)]
pub struct Look {
    /// What is judged.
    pub seen: Seen,
    /// What the consumer has before it.
    pub pending: Pending,
    /// The consumer.
    pub consumer: durable::Info,
    /// Messages deleted from the middle of the stream, applied or not.
    pub deleted: u64,
}

/// Counts the messages behind `applied` that were deleted from the middle of the stream.
///
/// # Errors
/// Whatever JetStream says.
pub async fn deleted_after(jetstream: &jetstream::Context, applied: u64) -> Result<u64, async_nats::Error> {
    let (subject, request) = (format!("STREAM.INFO.{STREAM}"), json!({ "deleted_details": true }));
    match jetstream.request::<_, _, Response<StreamInfo>>(subject, &request).await? {
        Response::Ok(info) => {
            let deleted = info.state.deleted.unwrap_or_default();
            Ok(deleted.iter().filter(|sequence| **sequence > applied).count() as u64)
        }
        Response::Err { error } => Err(error.into()),
    }
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
    let now = published_at(stream, acked_seq).await?;
    Ok(now.is_some_and(|published_us| published_us != acked_until_us))
}

/// When the message `sequence` was published, in microseconds since the Unix epoch; `None` if it is gone.
///
/// # Errors
/// Whatever JetStream says.
pub async fn published_at(stream: &Stream, sequence: u64) -> Result<Option<i64>, async_nats::Error> {
    if sequence == 0 {
        return Ok(None);
    }
    match stream.get_raw_message(sequence).await {
        Ok(message) => Ok(Some(message.time.timestamp_micros())),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
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

impl Pending {
    /// Of this consumer.
    #[must_use]
    pub fn of(info: &durable::Info) -> Self {
        let state = &info.consumer;
        Self {
            messages: state.num_pending,
            unacknowledged: state.num_ack_pending as u64,
            redelivered: state.num_redelivered as u64,
            delivered: state.delivered.stream_sequence,
        }
    }
}
