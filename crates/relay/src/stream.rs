//! The stream: created if missing, checked if present, every option explicit.

use std::time::Duration;

use async_nats::jetstream::stream::{
    Config as StreamConfig, DiscardPolicy, Info, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{self, ErrorCode};
use chrono::{DateTime, Utc};
use event::nats::{STREAM, SUBJECTS};
use outbox::stream::StreamPosition;
use service::nats::{JetStreamError, Link, Nats};

use crate::Config;

/// How long JetStream remembers message ids. A claim that was published but not settled comes again within seconds.
const DUPLICATE_WINDOW: Duration = Duration::from_mins(2);

/// Room left for headers below the broker's `max_payload`, which counts them.
const HEADER_BYTES: usize = 1024;

/// Why there is no usable stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// It cannot be looked at.
    #[error("cannot look at stream {STREAM}")]
    Look(#[source] JetStreamError),
    /// Creating it failed.
    #[error("cannot create stream {STREAM}")]
    Create(#[source] JetStreamError),
    /// It exists, but with options under which invalidations could be lost.
    #[error("stream {STREAM} has unsafe options: {findings}; correct them with `nats stream edit {STREAM}`")]
    Unsafe {
        /// What is wrong, one sentence each.
        findings: String,
    },
}

/// Options that have their effect only when the stream is created, and differ now: it is not for a restart of a relay to
/// change a stream, which may drop messages.
#[must_use]
pub fn differences(actual: &StreamConfig, config: &Config) -> Vec<String> {
    let wanted = wanted(config);
    let mut found = Vec::new();
    if actual.max_age != wanted.max_age {
        found.push(format!("RELAY_STREAM_MAX_AGE is {:?}, max_age {:?}", wanted.max_age, actual.max_age));
    }
    if actual.num_replicas != wanted.num_replicas {
        found.push(format!(
            "RELAY_STREAM_REPLICAS is {}, replicas {}",
            wanted.num_replicas, actual.num_replicas
        ));
    }
    if actual.max_bytes.max(-1) != wanted.max_bytes {
        let limit = |bytes| if bytes > 0 { format!("{bytes}") } else { "not set".to_owned() };
        found.push(format!(
            "RELAY_STREAM_MAX_BYTES is {}, max_bytes {}",
            limit(wanted.max_bytes),
            limit(actual.max_bytes)
        ));
    }
    found
}

/// What the workers need to know of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usable {
    /// Identity and end.
    pub position: StreamPosition,
    /// Largest body it accepts, in bytes.
    pub max_body: usize,
    /// The connection over which it was looked at: after another one it may be another stream.
    pub link: Link,
}

/// The options the relay creates the stream with.
#[must_use]
pub fn wanted(config: &Config) -> StreamConfig {
    StreamConfig {
        name: STREAM.to_owned(),
        description: Some("Cache invalidations of committed transactions".to_owned()),
        subjects: vec![SUBJECTS.to_owned()],
        storage: StorageType::File,
        retention: RetentionPolicy::Limits,
        // A full stream must refuse, so that events wait in the outbox; the default would drop the oldest unread ones.
        discard: DiscardPolicy::New,
        max_age: config.stream_max_age,
        max_bytes: config.stream_max_bytes.unwrap_or(-1),
        max_messages: -1,
        max_messages_per_subject: -1,
        max_message_size: -1,
        max_consumers: -1,
        num_replicas: usize::from(config.stream_replicas),
        duplicate_window: DUPLICATE_WINDOW.min(config.stream_max_age),
        allow_direct: false,
        ..Default::default()
    }
}

/// Finds the stream or creates it, and checks it.
///
/// # Errors
/// [`StreamError`].
pub async fn ensure(
    nats: &Nats,
    jetstream: &jetstream::Context,
    config: &Config,
    link: Link,
) -> Result<Usable, StreamError> {
    let info = match jetstream.get_stream(STREAM).await {
        Ok(stream) => stream.cached_info().clone(),
        Err(error) if is_missing(&error) => create(nats, jetstream, config).await?,
        Err(error) => return Err(StreamError::Look(nats.judge(error))),
    };
    let findings = unsafe_options(&info.config);
    if !findings.is_empty() {
        return Err(StreamError::Unsafe { findings: findings.join("; ") });
    }
    let max_payload = nats.client.server_info().max_payload;
    Ok(Usable { position: position(&info), max_body: max_body(&info.config, max_payload), link })
}

async fn create(nats: &Nats, jetstream: &jetstream::Context, config: &Config) -> Result<Info, StreamError> {
    let stream = jetstream
        .create_stream(wanted(config))
        .await
        .map_err(|error| StreamError::Create(nats.judge(error)))?;
    tracing::info!(stream = STREAM, "created the stream");
    Ok(stream.cached_info().clone())
}

fn is_missing(error: &jetstream::context::GetStreamError) -> bool {
    matches!(error.kind(), jetstream::context::GetStreamErrorKind::JetStream(error)
        if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// Options under which acknowledged invalidations could disappear unread, whoever created the stream. Old servers drop
/// options they do not know without a word, so what the server returned is judged, not what was asked for.
#[must_use]
pub fn unsafe_options(actual: &StreamConfig) -> Vec<String> {
    let mut findings = Vec::new();
    let mut check = |holds: bool, finding: &str| {
        if !holds {
            findings.push(finding.to_owned());
        }
    };
    check(
        actual.subjects.iter().any(|subject| subject == SUBJECTS),
        "it does not have the subject invalidation.>",
    );
    check(
        actual.storage == StorageType::File,
        "storage is not file, a restart of NATS would lose everything",
    );
    check(actual.retention == RetentionPolicy::Limits, "retention is not limits");
    check(!actual.no_ack, "no_ack is set, publishing could never be confirmed");
    // It drops the oldest message of the subject whatever discard says.
    check(actual.max_messages_per_subject <= 0, "it has max_msgs_per_subject, set it to -1");
    let limited = actual.max_bytes > 0 || actual.max_messages > 0;
    check(
        !limited || actual.discard == DiscardPolicy::New,
        "it has a size limit with discard=old, a full stream would drop invalidations nobody has read; set discard=new",
    );
    findings
}

/// Identity and end of a stream.
#[must_use]
pub fn position(info: &Info) -> StreamPosition {
    StreamPosition {
        created: to_microseconds(info.created),
        last_seq: i64::try_from(info.state.last_sequence).unwrap_or(i64::MAX),
    }
}

/// Postgres keeps microseconds; an identity that lost its nanoseconds on the way would never equal itself again.
fn to_microseconds(time: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or_default()
}

fn max_body(config: &StreamConfig, max_payload: usize) -> usize {
    let of_stream =
        usize::try_from(config.max_message_size).ok().filter(|size| *size > 0).unwrap_or(usize::MAX);
    of_stream.min(max_payload).saturating_sub(HEADER_BYTES)
}
