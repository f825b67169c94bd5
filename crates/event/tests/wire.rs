//! The wire format: golden files per version, and properties that hold for any input.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a panic")]

use std::time::Duration;

use event::{
    CacheKey, Change, CommittedEvent, DecodeError, Envelope, EnvelopeWriter, EventId, History, Topic,
    Traceparent,
};
use proptest::prelude::*;

const ID: &str = "01936d3c-7a80-7000-8000-000000000001";

fn event(keys: &[&str], change: Change) -> CommittedEvent {
    CommittedEvent {
        id: EventId(ID.parse().unwrap()),
        keys: keys.iter().map(|key| CacheKey::new(*key).unwrap()).collect(),
        change,
        xids: vec![731, 733],
        history: None,
        at_us: 1_767_225_600_000_000,
        traceparent: None,
    }
}

fn golden() -> [(&'static str, Envelope); 5] {
    let traced = CommittedEvent {
        traceparent: Some(
            Traceparent::new("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap(),
        ),
        ..event(&["{tenant}:\"quoted\"", "профиль:7"], Change::Delete)
    };
    let update = Change::update(b"\x00{\"name\":\"Ada\"}".to_vec(), 7, Duration::from_secs(60)).unwrap();
    [
        (
            include_str!("golden/v1-delete.json"),
            Envelope { events: vec![event(&["user:123:profile"], Change::Delete)] },
        ),
        (
            include_str!("golden/v1-batch-traced.json"),
            Envelope { events: vec![event(&["a", "b"], Change::Delete), traced] },
        ),
        (
            include_str!("golden/v1-update.json"),
            Envelope { events: vec![event(&["user:123:profile"], update)] },
        ),
        (
            include_str!("golden/v1-history.json"),
            Envelope {
                events: vec![CommittedEvent {
                    history: Some("d4f0a8b3c21.3".parse().unwrap()),
                    ..event(&["user:123:profile"], Change::Delete)
                }],
            },
        ),
        (
            include_str!("golden/v1-namespace.json"),
            Envelope { events: vec![event(&["user:", "{tenant}:"], Change::Namespace)] },
        ),
    ]
}

#[test]
fn a_history_of_another_form_is_as_if_it_were_not_there() {
    let (_, envelope) = &golden()[3];
    let body = String::from_utf8(envelope.encode()).unwrap();
    let other = body.replace("\"history\":\"d", "\"history\":\"e");
    assert_ne!(other, body);
    assert_eq!(Envelope::decode(other.as_bytes()).unwrap().events[0].history, None);
}

#[test]
fn version_1_is_written_and_read_exactly_as_its_golden_files() {
    for (file, envelope) in golden() {
        assert_eq!(String::from_utf8(envelope.encode()).unwrap(), file.trim_end());
        assert_eq!(Envelope::decode(file.as_bytes()).unwrap(), envelope);
    }
}

#[test]
fn fields_of_a_later_writer_are_ignored() {
    let body = format!(
        r#"{{"v":1,"sent_by":"x","events":[{{"id":"{ID}","keys":["k"],"at_us":1,"colour":{{"a":[1]}}}}]}}"#
    );
    let decoded = Envelope::decode(body.as_bytes()).unwrap();
    assert_eq!(decoded.events[0].xids, Vec::<u64>::new());
    assert_eq!(decoded.events[0].keys[0].as_str(), "k");
}

#[test]
fn a_change_that_this_reader_does_not_know_is_poison_and_never_another_change() {
    for fields in [
        r#""patterns":["user:*"]"#,
        r#""keys":["user:"],"namespaces":["user:"]"#,
        r#""namespaces":["k"],"update":{"value":"","version":1,"ttl_ms":5}"#,
        r#""update":{"value":"","version":1,"ttl_ms":5}"#,
    ] {
        let body = format!(r#"{{"v":1,"events":[{{"id":"{ID}",{fields},"at_us":1}}]}}"#);
        let error = Envelope::decode(body.as_bytes()).unwrap_err();
        assert!(matches!(error, DecodeError::UnknownChange { .. }), "{fields}: {error}");
    }
    // A reader that knows only `keys` requires them.
    let namespace = Envelope { events: vec![event(&["user:"], Change::Namespace)] }.encode();
    assert!(!String::from_utf8(namespace).unwrap().contains(r#""keys""#));
}

#[test]
fn an_unknown_version_is_named_whatever_its_shape() {
    for body in [r#"{"v":2,"events":[]}"#, r#"{"v":2,"batches":{"x":1}}"#] {
        let error = Envelope::decode(body.as_bytes()).unwrap_err();
        assert!(matches!(error, DecodeError::UnknownVersion { version: 2 }), "{error}");
    }
}

#[test]
fn events_that_break_a_rule_are_refused() {
    let cases = [
        format!(r#"{{"v":1,"events":[{{"id":"{ID}","keys":[],"at_us":1}}]}}"#),
        format!(r#"{{"v":1,"events":[{{"id":"{ID}","keys":["a\nb"],"at_us":1}}]}}"#),
        format!(
            r#"{{"v":1,"events":[{{"id":"{ID}","keys":["a","b"],"at_us":1,"update":{{"value":"","version":1,"ttl_ms":5}}}}]}}"#
        ),
        format!(
            r#"{{"v":1,"events":[{{"id":"{ID}","keys":["a"],"at_us":1,"update":{{"value":"*","version":1,"ttl_ms":5}}}}]}}"#
        ),
        r#"{"v":1}"#.to_owned(),
        "[]".to_owned(),
        String::new(),
        "[".repeat(100_000),
    ];
    for body in cases {
        assert!(Envelope::decode(body.as_bytes()).is_err(), "{body:.60}");
    }
}

#[test]
fn a_writer_never_exceeds_its_limit_and_keeps_what_it_took() {
    let one = event(&["user:123:profile"], Change::Delete);
    let single = Envelope { events: vec![one.clone()] }.encode().len();
    let mut writer = EnvelopeWriter::new(single * 2);
    while writer.push(one.borrowed()) {}
    let events = writer.events();
    let body = writer.finish();
    assert!(events >= 2 && body.len() <= single * 2);
    assert_eq!(Envelope::decode(&body).unwrap().events.len(), events);
}

#[test]
fn bodies_that_differ_only_in_their_transactions_have_different_message_ids() {
    let first = Envelope { events: vec![event(&["k"], Change::Delete)] };
    let mut second = first.clone();
    second.events[0].xids.push(740);
    let id = |topic: &str, envelope: &Envelope| {
        EnvelopeWriter::message_id(&Topic::new(topic).unwrap(), &envelope.encode())
    };
    assert_ne!(id("default", &first), id("default", &second));
    assert_eq!(id("default", &first), id("default", &first));
    assert_ne!(id("default", &first), id("orders", &first), "the same event, for other caches");
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Delete),
        Just(Change::Namespace),
        (proptest::collection::vec(any::<u8>(), 0..64), 0..i64::MAX, 1..1_000_000_u64).prop_map(
            |(value, version, ms)| Change::update(value, version, Duration::from_millis(ms)).unwrap()
        ),
    ]
}

fn any_event() -> impl Strategy<Value = CommittedEvent> {
    let transactions = (proptest::collection::vec(any::<u64>(), 0..4), any::<Option<(u32, u32)>>());
    (any::<u128>(), "\\PC{1,40}", any_change(), transactions, any::<i64>()).prop_map(
        |(id, key, change, (xids, history), at_us)| CommittedEvent {
            id: EventId(uuid_from(id)),
            keys: vec![CacheKey::new(key).unwrap()],
            change,
            xids,
            history: history.map(any_history),
            at_us,
            traceparent: None,
        },
    )
}

fn any_history((database, timeline): (u32, u32)) -> History {
    format!("d{database:010x}.{timeline}").parse().unwrap()
}

fn uuid_from(id: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(id)
}

proptest! {
    #[test]
    fn what_is_encoded_decodes_to_the_same(events in proptest::collection::vec(any_event(), 0..8)) {
        let envelope = Envelope { events };
        prop_assert_eq!(Envelope::decode(&envelope.encode()).unwrap(), envelope);
    }

    #[test]
    fn decoding_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = Envelope::decode(&bytes);
    }

    #[test]
    fn decoding_a_damaged_envelope_never_panics(events in proptest::collection::vec(any_event(), 1..4), at: usize, with: u8) {
        let mut body = Envelope { events }.encode();
        let at = at % body.len();
        body[at] = with;
        let _ = Envelope::decode(&body);
        let _ = Envelope::decode(&body[..at]);
    }
}
