//! Events of an outbox without a table: written to the log as they are, in the writer's transaction
//! (`pg_logical_emit_message`), and read from there.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use event::{CacheKey, Change, CommittedEvent, Event, EventId, InvalidEvent, Topic, Traceparent};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Claimed;

/// Prefix of the messages.
pub const PREFIX: &str = "outbox";

/// Why a message is not an event. It is poison: no later attempt can succeed.
#[derive(Debug, thiserror::Error)]
pub enum InvalidLogEvent {
    /// Not JSON of the expected shape.
    #[error("logical message with prefix '{PREFIX}' is not an event: {0}")]
    Malformed(#[from] serde_json::Error),
    /// It breaks a rule of events.
    #[error(transparent)]
    Invalid(#[from] InvalidEvent),
}

/// What stands in the log.
#[derive(Serialize, Deserialize)]
struct LogEvent {
    id: Uuid,
    keys: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    topic: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    update: Option<LogUpdate>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    namespace: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct LogUpdate {
    /// Base64, since a cached value is any bytes and JSON is text.
    value: String,
    version: i64,
    ttl_ms: u64,
}

/// The event as it stands in the log.
#[must_use]
pub fn encode(event: &Event) -> Vec<u8> {
    let update = match event.change() {
        Change::Update { value, version, ttl } => Some(LogUpdate {
            value: STANDARD.encode(value),
            version: *version,
            ttl_ms: u64::try_from(ttl.as_millis()).expect("at most MAX_TTL"),
        }),
        Change::Delete | Change::Namespace => None,
    };
    let written = LogEvent {
        id: event.id().0,
        keys: event.keys().iter().map(|key| key.as_str().to_owned()).collect(),
        topic: Some(event.topic().as_str().to_owned()),
        update,
        namespace: *event.change() == Change::Namespace,
        traceparent: event.traceparent().map(|parent| parent.as_str().to_owned()),
    };
    serde_json::to_vec(&written).expect("plain data always serializes into memory")
}

/// Reads an event that the transaction `xid` wrote; it committed at `at_us`, in microseconds since the Unix epoch.
///
/// # Errors
/// [`InvalidLogEvent`]. Never panics.
pub fn decode(content: &[u8], xid: u64, at_us: i64) -> Result<Claimed, InvalidLogEvent> {
    let LogEvent { id, keys, topic, update, namespace, traceparent } = serde_json::from_slice(content)?;
    let event = match update {
        None if namespace => Event::delete_namespaces(keys)?,
        None => Event::delete(keys)?,
        Some(LogUpdate { value, version, ttl_ms }) => {
            let [key]: [String; 1] = keys.try_into().map_err(|keys: Vec<String>| {
                InvalidEvent::Update(event::InvalidUpdate::NotOneKey { keys: keys.len() })
            })?;
            let value = STANDARD.decode(value).map_err(|_| InvalidEvent::ValueNotBase64)?;
            let key = CacheKey::new(key).map_err(|reason| InvalidEvent::Key { index: 0, reason })?;
            Event::update(key, value, version, Duration::from_millis(ttl_ms))?
        }
    };
    let topic = topic.map(Topic::new).transpose().map_err(InvalidEvent::Topic)?.unwrap_or_default();
    let traceparent =
        traceparent.as_deref().map(Traceparent::new).transpose().map_err(InvalidEvent::Traceparent)?;
    let event = CommittedEvent {
        id: EventId(id),
        keys: event.keys().to_vec(),
        change: event.change().clone(),
        xids: vec![xid],
        at_us,
        traceparent,
    };
    Ok(Claimed { seq: 0, topic, event })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_comes_back_as_it_was_written() {
        let topic = Topic::new("orders").unwrap();
        let delete = Event::delete(["a", "b"]).unwrap().with_topic(topic);
        let update = Event::update("c", vec![0, 255], 3, Duration::from_secs(60)).unwrap();
        let namespace = Event::delete_namespaces(["user:"]).unwrap();
        for event in [delete, update, namespace] {
            let read = decode(&encode(&event), 77, 5).unwrap();
            assert_eq!((read.event.id, &read.topic), (event.id(), event.topic()));
            assert_eq!((read.event.keys.as_slice(), &read.event.change), (event.keys(), event.change()));
            assert_eq!((read.event.xids.as_slice(), read.event.at_us), (&[77_u64][..], 5));
        }
    }

    #[test]
    fn what_anybody_may_write_under_the_prefix_is_refused_with_a_reason() {
        for content in [&b""[..], b"{}", b"\xff", br#"{"id":"x","keys":["a"]}"#] {
            assert!(matches!(decode(content, 1, 1), Err(InvalidLogEvent::Malformed(_))));
        }
        let no_keys = br#"{"id":"00000000-0000-7000-8000-000000000000","keys":[]}"#;
        assert_eq!(decode(no_keys, 1, 1).unwrap_err().to_string(), "event names no key");
    }
}
