//! The stream: created if missing, checked if present, every option explicit.

mod options;

use std::time::Duration;

use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{
    Config as StreamConfig, DiscardPolicy, Info, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{self, ErrorCode};
use chrono::{DateTime, Utc};
use event::nats::{STREAM, SUBJECTS};
use outbox::stream::StreamPosition;
use serde_json::{Map, Value, json};
use service::nats::{JetStreamError, Link, Nats};

use crate::Config;

pub use options::{Judgement, judge};

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
    /// It was deleted while it was looked at.
    #[error("stream {STREAM} was deleted at this moment")]
    Vanished,
    /// It carries the events of another database.
    #[error(
        "stream {STREAM} belongs to the database {theirs} (system identifier and oid) and this relay publishes for {ours}; give \
         each database a NATS account of its own, or, if this database has replaced the other one, release the stream with \
         `nats stream edit {STREAM} --description ''`"
    )]
    Foreign {
        /// The database that the stream names.
        theirs: String,
        /// The database of this relay.
        ours: String,
    },
    /// It exists, but with options under which invalidations could be lost.
    #[error("stream {STREAM} has unsafe options: {findings}; correct them with `nats stream edit {STREAM}`")]
    Unsafe {
        /// What is wrong, one sentence each.
        findings: String,
    },
}

/// What the description of the stream says before the name of its database. Every version of NATS keeps a description.
const DESCRIPTION: &str = "Cache invalidations of committed transactions of database ";

/// The stream as the server describes it.
#[derive(Debug, Clone)]
pub struct Looked {
    /// What this version knows of it.
    pub info: Info,
    /// Every option by its name on the wire.
    pub options: Map<String, Value>,
}

/// The stream as a relay needs it.
#[derive(Debug)]
pub struct Seen {
    /// What the workers need to know.
    pub usable: Usable,
    /// Options that could lose events or hold them back under some circumstances.
    pub risks: Vec<String>,
    /// The options, if the stream names no database yet.
    pub unowned: Option<Map<String, Value>>,
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

/// The options the relay creates the stream with, for the database `owner`.
#[must_use]
pub fn wanted(config: &Config, owner: Option<&str>) -> StreamConfig {
    StreamConfig {
        name: STREAM.to_owned(),
        description: owner.map(|owner| format!("{DESCRIPTION}{owner}")),
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

/// Finds the stream or creates it, and checks it. `owner` is the name of the relay's database, if it is known.
///
/// # Errors
/// [`StreamError`].
pub async fn ensure(
    nats: &Nats,
    jetstream: &jetstream::Context,
    config: &Config,
    owner: Option<&str>,
    link: Link,
) -> Result<Seen, StreamError> {
    let Looked { info, options } = match look(nats, jetstream).await? {
        Some(looked) => looked,
        None => create(nats, jetstream, config, owner).await?,
    };
    let theirs = info.config.description.as_deref().and_then(|text| text.strip_prefix(DESCRIPTION));
    if let (Some(theirs), Some(ours)) = (theirs, owner)
        && theirs != ours
    {
        return Err(StreamError::Foreign { theirs: theirs.to_owned(), ours: ours.to_owned() });
    }
    let max_payload = nats.client.server_info().max_payload;
    let Judgement { unusable, risks } = judge(&options, config, max_payload);
    if !unusable.is_empty() {
        return Err(StreamError::Unsafe { findings: unusable.join("; ") });
    }
    let usable = Usable { position: position(&info), max_body: max_body(&info.config, max_payload), link };
    Ok(Seen { usable, risks, unowned: theirs.is_none().then_some(options) })
}

/// Asks for the stream; `None` if there is none.
///
/// # Errors
/// [`StreamError::Look`].
pub async fn look(nats: &Nats, jetstream: &jetstream::Context) -> Result<Option<Looked>, StreamError> {
    let failed = |error: async_nats::Error| StreamError::Look(nats.judge(error));
    let asked = jetstream.request(format!("STREAM.INFO.{STREAM}"), &json!({})).await;
    let answer: Value = match asked.map_err(|error| failed(error.into()))? {
        Response::Ok(answer) => answer,
        Response::Err { error } if error.error_code() == ErrorCode::STREAM_NOT_FOUND => return Ok(None),
        Response::Err { error } => return Err(failed(error.into())),
    };
    let options = answer["config"].as_object().cloned().unwrap_or_default();
    let info = serde_json::from_value(answer).map_err(|error| failed(error.into()))?;
    Ok(Some(Looked { info, options }))
}

/// Writes the name of the relay's database into the description of a stream that names none.
///
/// # Errors
/// [`JetStreamError`], such as a missing right.
pub async fn claim(
    nats: &Nats,
    jetstream: &jetstream::Context,
    mut options: Map<String, Value>,
    owner: &str,
) -> Result<(), JetStreamError> {
    options.insert("description".to_owned(), format!("{DESCRIPTION}{owner}").into());
    let asked = jetstream.request(format!("STREAM.UPDATE.{STREAM}"), &options).await;
    match asked.map_err(|error| nats.judge(error))? {
        Response::<Value>::Ok(_) => Ok(()),
        Response::Err { error } => Err(nats.judge(error)),
    }
}

async fn create(
    nats: &Nats,
    jetstream: &jetstream::Context,
    config: &Config,
    owner: Option<&str>,
) -> Result<Looked, StreamError> {
    let created = jetstream.create_stream(wanted(config, owner)).await;
    match look(nats, jetstream).await? {
        Some(looked) => {
            if created.is_ok() {
                tracing::info!(stream = STREAM, "created the stream");
            }
            Ok(looked)
        }
        None => Err(created
            .map_or_else(|error| StreamError::Create(nats.judge(error)), |_stream| StreamError::Vanished)),
    }
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
