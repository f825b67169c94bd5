//! Events of an outbox without a table: written to Postgres' write-ahead log as logical messages, in the writer's
//! transaction, and read from there. What the log itself knows (transaction and time) is added by the reader.

use serde::{Deserialize, Serialize};

use crate::envelope::{CommittedEvent, CommittedEventRef, DecodeError, WireEvent};
use crate::{Event, Topic};

/// Prefix of the messages.
pub const PREFIX: &str = "outbox";

#[derive(Serialize)]
struct Written<'a> {
    topic: &'a Topic,
    event: CommittedEventRef<'a>,
}

#[derive(Deserialize)]
struct Read {
    topic: Topic,
    event: WireEvent,
}

/// The event as it stands in the log.
#[must_use]
pub fn encode(event: &Event) -> Vec<u8> {
    let written = Written {
        topic: event.topic(),
        event: CommittedEventRef {
            id: event.id(),
            keys: event.keys(),
            change: event.change(),
            xids: &[],
            history: None,
            at_us: 0,
            traceparent: event.traceparent(),
        },
    };
    serde_json::to_vec(&written).expect("plain data always serializes into memory")
}

/// Reads an event that the transaction `xid` wrote; it committed at `at_us`, in microseconds since the Unix epoch.
///
/// # Errors
/// [`DecodeError`]: it is poison. Never panics.
pub fn decode(content: &[u8], xid: u64, at_us: i64) -> Result<(Topic, CommittedEvent), DecodeError> {
    let Read { topic, event } = serde_json::from_slice(content).map_err(DecodeError::Malformed)?;
    let mut event = event.checked()?;
    event.xids = vec![xid];
    event.history = None;
    event.at_us = at_us;
    Ok((topic, event))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_event_comes_back_as_it_was_written() {
        let orders = Topic::new("orders").unwrap();
        let delete = Event::delete(["a", "b"]).unwrap().with_topic(orders);
        let update = Event::update("c", vec![0, 255], 3, Duration::from_secs(60)).unwrap();
        let namespace = Event::delete_namespaces(["user:"]).unwrap();
        for event in [delete, update, namespace] {
            let (topic, read) = decode(&encode(&event), 77, 5).unwrap();
            assert_eq!((read.id, &topic), (event.id(), event.topic()));
            assert_eq!((read.keys.as_slice(), &read.change), (event.keys(), event.change()));
            assert_eq!((read.xids.as_slice(), read.at_us), (&[77_u64][..], 5));
        }
    }

    #[test]
    fn what_anybody_may_write_under_the_prefix_is_refused() {
        let of = |topic: &str, keys: &str| {
            let id = "00000000-0000-7000-8000-000000000000";
            format!(r#"{{"topic":"{topic}","event":{{"id":"{id}","keys":{keys},"at_us":0}}}}"#).into_bytes()
        };
        assert!(decode(&of("orders", r#"["k"]"#), 1, 1).is_ok());
        for content in
            [b"".to_vec(), b"{}".to_vec(), b"\xff".to_vec(), of("a.b", r#"["k"]"#), of("orders", "[1]")]
        {
            assert!(matches!(decode(&content, 1, 1), Err(DecodeError::Malformed(_))));
        }
        assert!(matches!(decode(&of("orders", "[]"), 1, 1), Err(DecodeError::InvalidEvent { .. })));
    }
}
