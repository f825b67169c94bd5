//! From retained messages to fewer and larger ones. Pure.

use bytes::Bytes;
use event::{Envelope, EnvelopeWriter, Topic};
use outbox::retention::Published;

use crate::packing::{BATCH_BYTES, Limits};

/// A message being filled.
struct Merged {
    subject: String,
    writer: EnvelopeWriter,
    /// How many retained messages it holds.
    count: usize,
    rows: i32,
    traceparent: Option<String>,
}

/// Merges messages of one subject as long as they fit `limits`. The ids are new, and end with `suffix`: the stream may
/// remember the old ids of messages that it has lost, and would not store them again.
#[must_use]
pub fn merge(messages: Vec<Published>, limits: Limits, suffix: &str) -> Vec<Published> {
    let nothing = Envelope::default().encode();
    let mut open: Vec<Merged> = Vec::new();
    let mut done = Vec::new();
    for message in messages.into_iter().filter(|message| message.body != nothing) {
        let known = open.iter().position(|merged| merged.subject == message.subject);
        let index = known.unwrap_or_else(|| {
            open.push(Merged::new(message.subject.clone(), limits));
            open.len() - 1
        });
        if open[index].is_full(limits) || !open[index].add(&message) {
            let fresh = Merged::new(message.subject.clone(), limits);
            done.extend(std::mem::replace(&mut open[index], fresh).finish(suffix));
            if !open[index].add(&message) {
                done.push(as_it_stands(message, suffix));
            }
        }
    }
    done.extend(open.into_iter().filter_map(|merged| merged.finish(suffix)));
    done
}

/// A message that was not written by this version, or is too large to be merged.
fn as_it_stands(message: Published, suffix: &str) -> Published {
    Published { message_id: format!("{}-{suffix}", message.message_id), stream_seq: 0, ..message }
}

impl Merged {
    fn new(subject: String, limits: Limits) -> Self {
        let writer = EnvelopeWriter::new(limits.bytes);
        Self { subject, writer, count: 0, rows: 0, traceparent: None }
    }

    fn is_full(&self, limits: Limits) -> bool {
        self.writer.events() >= limits.events || self.writer.bytes() >= BATCH_BYTES
    }

    fn add(&mut self, message: &Published) -> bool {
        let events = usize::try_from(message.events).unwrap_or(0).max(1);
        if !self.writer.append(&message.body, events) {
            return false;
        }
        self.count += 1;
        self.rows += message.events;
        self.traceparent = message.traceparent.clone().filter(|_| self.count == 1);
        true
    }

    fn finish(self, suffix: &str) -> Option<Published> {
        if self.count == 0 {
            return None;
        }
        let body = Bytes::from(self.writer.finish());
        let topic = self.subject.rsplit('.').next().and_then(|topic| Topic::new(topic).ok());
        let id = EnvelopeWriter::message_id(&topic.unwrap_or_default(), &body);
        Some(Published {
            subject: self.subject,
            message_id: format!("{id}-{suffix}"),
            traceparent: self.traceparent,
            events: self.rows,
            body,
            stream_seq: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use event::{CacheKey, Change, CommittedEvent, EventId};

    use super::*;

    const ROOMY: Limits = Limits { events: 500, bytes: 1_000_000 };

    fn message(subject: &str, key: &str) -> Published {
        let event = CommittedEvent {
            id: EventId::generate(),
            keys: vec![CacheKey::new(key).unwrap()],
            change: Change::Delete,
            xids: vec![1],
            history: None,
            at_us: 1,
            traceparent: None,
        };
        Published {
            subject: subject.to_owned(),
            message_id: key.to_owned(),
            traceparent: Some("trace".to_owned()),
            events: 1,
            body: Envelope { events: vec![event] }.encode().into(),
            stream_seq: 7,
        }
    }

    fn keys(messages: &[Published]) -> Vec<(String, Vec<String>)> {
        let keys = |body: &[u8]| -> Vec<String> {
            let events = Envelope::decode(body).unwrap().events;
            events.iter().flat_map(|event| event.keys.iter().map(|key| key.as_str().to_owned())).collect()
        };
        messages.iter().map(|message| (message.subject.clone(), keys(&message.body))).collect()
    }

    fn expected(subject: &str, keys: &[&str]) -> (String, Vec<String>) {
        (subject.to_owned(), keys.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn messages_of_a_subject_become_one_and_no_key_is_lost() {
        let some = vec![
            message("invalidation.a", "1"),
            message("invalidation.b", "2"),
            message("invalidation.a", "3"),
        ];
        let merged = merge(some, ROOMY, "x");
        assert_eq!(
            keys(&merged),
            [expected("invalidation.a", &["1", "3"]), expected("invalidation.b", &["2"])]
        );
        assert_eq!(merged.iter().map(|message| message.events).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(merged[0].traceparent, None);
        assert_eq!(merged[1].traceparent.as_deref(), Some("trace"));
    }

    #[test]
    fn limits_of_events_and_bytes_are_kept() {
        let some = || (0..10).map(|key| message("invalidation.a", &key.to_string())).collect::<Vec<_>>();
        let merged = merge(some(), Limits { events: 4, ..ROOMY }, "x");
        assert_eq!(merged.iter().map(|message| message.events).collect::<Vec<_>>(), [4, 4, 2]);
        let bytes = some()[0].body.len() * 3;
        let merged = merge(some(), Limits { bytes, ..ROOMY }, "x");
        assert!(merged.iter().all(|message| message.body.len() <= bytes) && merged.len() > 2);
        assert_eq!(merged.iter().map(|message| message.events).sum::<i32>(), 10);
    }

    #[test]
    fn what_cannot_be_merged_stays_as_it_is_and_marks_are_left_out() {
        let foreign =
            Published { body: Bytes::from_static(b"{ \"v\": 1 }"), ..message("invalidation.a", "f") };
        let mark = Published {
            body: Envelope::default().encode().into(),
            events: 0,
            ..message("invalidation.a", "m")
        };
        let large = message("invalidation.a", "large");
        let limits = Limits { bytes: 20, ..ROOMY };
        let merged = merge(vec![foreign.clone(), mark, large.clone()], limits, "9");
        let bodies: Vec<_> = merged.iter().map(|message| &message.body).collect();
        assert_eq!(bodies, [&foreign.body, &large.body]);
        assert_eq!(merged[0].message_id, "f-9");
    }

    #[test]
    fn equal_messages_of_two_losses_are_not_taken_for_duplicates() {
        let some = vec![message("invalidation.a", "1")];
        let id = |suffix| merge(some.clone(), ROOMY, suffix)[0].message_id.clone();
        assert_ne!(id("1"), id("2"));
        assert_eq!(id("1"), id("1"));
    }
}
