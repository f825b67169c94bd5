//! The wire format, all of it: what one NATS message carries.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

use crate::event::check_key_count;
use crate::{CacheKey, Change, EventId, History, InvalidEvent, Topic, Traceparent};

/// Version this code writes, and the only one it reads.
pub const WIRE_VERSION: u64 = 1;

const OPENING: &[u8] = br#"{"v":1,"events":["#;
const CLOSING: &[u8] = b"]}";

/// An event whose transaction has committed, as it travels.
///
/// Events that the relay coalesced travel as one: it has the identity of the first and the transactions of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedEvent {
    /// Identity of the event, of the first one where several were coalesced.
    pub id: EventId,
    /// Keys it names; for [`Change::Namespace`] the beginnings of keys.
    pub keys: Vec<CacheKey>,
    /// What happens to the keys.
    pub change: Change,
    /// Postgres transactions (`xid8`) that made it true.
    pub xids: Vec<u64>,
    /// The history that all of `xids` belong to, if the relay has said it. Without it the event removes no mark that
    /// names its history.
    pub history: Option<History>,
    /// When it was enqueued, in microseconds since the Unix epoch, by the clock of Postgres.
    pub at_us: i64,
    /// Trace it belongs to.
    pub traceparent: Option<Traceparent>,
}

/// One or more committed events as they travel in one NATS message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Envelope {
    /// The events, in no particular order: they commute.
    pub events: Vec<CommittedEvent>,
}

/// Why a message is not an envelope. Every variant is poison: no later attempt can succeed.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The message was written by a newer version of the system.
    #[error("envelope has wire version {version}, this reader knows {WIRE_VERSION}")]
    UnknownVersion {
        /// Version the message claims.
        version: u64,
    },
    /// The message is not JSON of the expected shape.
    #[error("message is not an envelope")]
    Malformed(#[source] serde_json::Error),
    /// One of the events says that something else is to happen than this reader knows of.
    #[error(
        "event {id} in the envelope asks for a change that this reader does not know; upgrade the subscriber"
    )]
    UnknownChange {
        /// Identity of the event.
        id: EventId,
    },
    /// One of the events breaks a rule that events keep.
    #[error("event {id} in the envelope is not valid")]
    InvalidEvent {
        /// Identity of the refused event.
        id: EventId,
        /// The rule it breaks.
        #[source]
        reason: InvalidEvent,
    },
}

#[derive(Deserialize)]
struct WireEnvelope {
    v: u64,
    events: Vec<WireEvent>,
}

/// The fields of an event say what it does: `keys` alone, `keys` with `update`, or `namespaces` alone. One that does
/// something this reader does not know has neither `keys` nor `namespaces`, and is poison rather than a wrong delete.
#[derive(Deserialize)]
pub(crate) struct WireEvent {
    id: EventId,
    keys: Option<Vec<CacheKey>>,
    namespaces: Option<Vec<CacheKey>>,
    update: Option<WireUpdate>,
    #[serde(default)]
    xids: Vec<u64>,
    /// Text, so that one of another form is no poison: it is then as if it were not there.
    history: Option<String>,
    at_us: i64,
    traceparent: Option<Traceparent>,
}

/// The borrowed form of a [`CommittedEvent`]: writing it copies nothing but the value of an update.
#[derive(Debug, Clone, Copy)]
pub struct CommittedEventRef<'a> {
    /// As in [`CommittedEvent`].
    pub id: EventId,
    /// As in [`CommittedEvent`].
    pub keys: &'a [CacheKey],
    /// As in [`CommittedEvent`].
    pub change: &'a Change,
    /// As in [`CommittedEvent`].
    pub xids: &'a [u64],
    /// As in [`CommittedEvent`].
    pub history: Option<History>,
    /// As in [`CommittedEvent`].
    pub at_us: i64,
    /// As in [`CommittedEvent`].
    pub traceparent: Option<&'a Traceparent>,
}

impl Serialize for CommittedEventRef<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let update = WireUpdate::from_change(self.change);
        let optional = [update.is_some(), self.history.is_some(), self.traceparent.is_some()];
        let fields = 4 + optional.into_iter().filter(|is_some| *is_some).count();
        let names = if *self.change == Change::Namespace { "namespaces" } else { "keys" };
        let mut event = serializer.serialize_struct("Event", fields)?;
        event.serialize_field("id", &self.id)?;
        event.serialize_field(names, self.keys)?;
        if let Some(update) = &update {
            event.serialize_field("update", update)?;
        }
        event.serialize_field("xids", self.xids)?;
        if let Some(history) = &self.history {
            event.serialize_field("history", history)?;
        }
        event.serialize_field("at_us", &self.at_us)?;
        if let Some(traceparent) = self.traceparent {
            event.serialize_field("traceparent", traceparent)?;
        }
        event.end()
    }
}

impl CommittedEvent {
    /// The same event, borrowed.
    #[must_use]
    pub fn borrowed(&self) -> CommittedEventRef<'_> {
        CommittedEventRef {
            id: self.id,
            keys: &self.keys,
            change: &self.change,
            xids: &self.xids,
            history: self.history,
            at_us: self.at_us,
            traceparent: self.traceparent.as_ref(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct WireUpdate {
    /// Base64, since a cached value is any bytes and JSON is text.
    value: String,
    version: i64,
    ttl_ms: u64,
}

impl Envelope {
    /// The `Content-Type` of an encoded envelope.
    pub const CONTENT_TYPE: &'static str = "application/json";

    /// Reads an envelope. Fields this version does not know are ignored.
    ///
    /// # Errors
    /// [`DecodeError`] for anything that is not an envelope of [`WIRE_VERSION`]. Never panics.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let wire: WireEnvelope = serde_json::from_slice(body).map_err(|error| explain(body, error))?;
        if wire.v != WIRE_VERSION {
            return Err(DecodeError::UnknownVersion { version: wire.v });
        }
        let events = wire.events.into_iter().map(WireEvent::checked).collect::<Result<_, _>>()?;
        Ok(Self { events })
    }

    /// Writes an envelope.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = EnvelopeWriter::new(usize::MAX);
        for event in &self.events {
            let fits = writer.push(event.borrowed());
            debug_assert!(fits, "nothing is longer than usize::MAX");
        }
        writer.finish()
    }
}

/// A later version may have another shape, so a document that does not parse is asked for its version once more.
fn explain(body: &[u8], error: serde_json::Error) -> DecodeError {
    #[derive(Deserialize)]
    struct Head {
        v: u64,
    }
    match serde_json::from_slice::<Head>(body) {
        Ok(Head { v }) if v != WIRE_VERSION => DecodeError::UnknownVersion { version: v },
        _ => DecodeError::Malformed(error),
    }
}

impl WireEvent {
    pub(crate) fn checked(self) -> Result<CommittedEvent, DecodeError> {
        let Self { id, keys, namespaces, update, xids, history, at_us, traceparent } = self;
        let refused = |reason| DecodeError::InvalidEvent { id, reason };
        let (keys, change) = match (keys, namespaces, update) {
            (Some(keys), None, None) => (keys, Change::Delete),
            (Some(keys), None, Some(update)) => (keys, update.checked().map_err(refused)?),
            (None, Some(namespaces), None) => (namespaces, Change::Namespace),
            _ => return Err(DecodeError::UnknownChange { id }),
        };
        check_key_count(&keys, &change).map_err(refused)?;
        let history = history.and_then(|history| history.parse().ok());
        Ok(CommittedEvent { id, keys, change, xids, history, at_us, traceparent })
    }
}

impl WireUpdate {
    fn checked(self) -> Result<Change, InvalidEvent> {
        let value = STANDARD.decode(self.value).map_err(|_| InvalidEvent::ValueNotBase64)?;
        Ok(Change::update(value, self.version, Duration::from_millis(self.ttl_ms))?)
    }
}

/// Builds the body of an envelope event by event, never past a given size.
#[derive(Debug)]
pub struct EnvelopeWriter {
    body: Vec<u8>,
    events: usize,
    max_bytes: usize,
}

impl EnvelopeWriter {
    /// An empty envelope that may grow to `max_bytes` when finished.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        Self { body: OPENING.to_vec(), events: 0, max_bytes }
    }

    /// Adds an event, or leaves the envelope as it was and says `false` if it does not fit any more.
    #[must_use = "an event that does not fit is not added"]
    pub fn push(&mut self, event: CommittedEventRef<'_>) -> bool {
        let before = self.body.len();
        if self.events > 0 {
            self.body.push(b',');
        }
        serde_json::to_writer(&mut self.body, &event).expect("plain data always serializes into memory");
        if self.body.len().saturating_add(CLOSING.len()) > self.max_bytes {
            self.body.truncate(before);
            return false;
        }
        self.events += 1;
        true
    }

    /// Adds the `events` events of an envelope that is written already, or leaves this one as it was and says `false` if
    /// they do not fit any more or the body was not written by this code.
    #[must_use = "an envelope that does not fit is not added"]
    pub fn append(&mut self, body: &[u8], events: usize) -> bool {
        let written = body.strip_prefix(OPENING).and_then(|rest| rest.strip_suffix(CLOSING));
        let Some(written) = written.filter(|written| !written.is_empty()) else { return false };
        if self.bytes().saturating_add(1 + written.len()) > self.max_bytes {
            return false;
        }
        if self.events > 0 {
            self.body.push(b',');
        }
        self.body.extend_from_slice(written);
        self.events += events;
        true
    }

    /// How many events it holds.
    #[must_use]
    pub fn events(&self) -> usize {
        self.events
    }

    /// Size of the body so far, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.body.len() + CLOSING.len()
    }

    /// The finished body.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.body.extend_from_slice(CLOSING);
        self.body
    }

    /// The message id (`Nats-Msg-Id`) of an envelope: a hash of topic and **body**. JetStream looks for duplicates in all
    /// subjects of a stream.
    ///
    /// The ids of the events, or a hash of them, would be wrong. A batch that was published but not settled is claimed again
    /// later, perhaps together with newer events on the same keys; and a producer may enqueue the same event in two
    /// transactions. Were the message id the same, JetStream would take the newer events for a duplicate and swallow them.
    /// Equal bodies name equal transactions, so swallowing one is safe.
    #[must_use]
    pub fn message_id(topic: &Topic, body: &[u8]) -> String {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        hash.update(topic.as_str().as_bytes());
        hash.update(&[0]);
        hash.update(body);
        format!("{:032x}", hash.digest128())
    }
}

impl WireUpdate {
    fn from_change(change: &Change) -> Option<Self> {
        match change {
            Change::Delete | Change::Namespace => None,
            Change::Update { value, version, ttl } => Some(Self {
                value: STANDARD.encode(value),
                version: *version,
                ttl_ms: u64::try_from(ttl.as_millis()).expect("at most MAX_TTL"),
            }),
        }
    }
}
