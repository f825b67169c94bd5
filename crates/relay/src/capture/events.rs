//! From parts of transactions to events. Pure.

use event::{CacheKey, Change, CommittedEvent, Event, EventId, MAX_NAMESPACES, Topic, log_event};
use outbox::{Claimed, Poison};
use rules::TableRules;
use uuid::{Builder, Uuid};
use wal::{Commit, Piece};
use xxhash_rust::xxh3::Xxh3;

/// What a part of a transaction becomes.
#[derive(Debug, Default)]
pub(super) struct Events {
    pub(super) events: Vec<Claimed>,
    /// What can never be published.
    pub(super) poison: Vec<Poison>,
}

/// The events of a part of the visible transaction `xid`. Read again, the same part gives the same events, so that
/// JetStream knows them for duplicates.
pub(super) fn of_piece(piece: Piece, xid: u64) -> Events {
    let Piece { commit, topics, events: logged, .. } = piece;
    let mut made = Events::default();
    for (topic, changes) in topics {
        if !changes.keys.is_empty() {
            made.events.push(event(commit, xid, topic.clone(), changes.keys, Change::Delete));
        }
        for namespaces in changes.namespaces.chunks(MAX_NAMESPACES) {
            made.events.push(event(commit, xid, topic.clone(), namespaces.to_vec(), Change::Namespace));
        }
    }
    for content in &logged {
        match log_event::decode(content, xid, commit.committed_at_us) {
            Ok((topic, event)) => made.events.push(Claimed { seq: 0, topic, event }),
            Err(error) => {
                // It names no key that could be believed; what it said is told by its place in the log.
                let mut empty = event(commit, xid, Topic::default(), Vec::new(), Change::Delete);
                // Each its own: two may come from one transaction.
                let mut hash = Xxh3::new();
                hash.update(content);
                empty.event.id = identity(commit, xid, &hash);
                made.poison.push(Poison::new(
                    &empty,
                    format!(
                        "logical message is no event: {} (commit at {})",
                        service::Report::of(&error),
                        commit.commit_lsn
                    ),
                ));
            }
        }
    }
    made
}

/// Declares stale whatever the rules of a table can name: nobody knows which of its changes are missing.
pub(super) fn of_missing_changes(table: &TableRules) -> Vec<Event> {
    let namespaces = wal::namespaces(table);
    let event = |namespaces: &[CacheKey]| {
        let names = namespaces.iter().map(CacheKey::as_str);
        let event =
            Event::delete_namespaces(names).expect("they are valid, and no more than an event may name");
        event.with_topic(table.topic.clone())
    };
    namespaces.chunks(MAX_NAMESPACES).map(event).collect()
}

/// What several transactions together invalidate.
pub(super) fn of_several(
    topic: Topic,
    keys: Vec<CacheKey>,
    change: Change,
    xids: Vec<u64>,
    at_us: i64,
) -> Claimed {
    let event = CommittedEvent {
        id: EventId::generate(),
        keys,
        change,
        xids,
        history: None,
        at_us,
        traceparent: None,
    };
    Claimed { seq: 0, topic, event }
}

fn event(commit: Commit, xid: u64, topic: Topic, keys: Vec<CacheKey>, change: Change) -> Claimed {
    // The keys are part of it: a transaction may be cut into other parts when it is read again.
    let mut hash = Xxh3::new();
    hash.update(topic.as_str().as_bytes());
    hash.update(&[u8::from(change == Change::Namespace)]);
    for key in &keys {
        hash.update(&[0]);
        hash.update(key.as_str().as_bytes());
    }
    let id = identity(commit, xid, &hash);
    let event = CommittedEvent {
        id,
        keys,
        change,
        xids: vec![xid],
        history: None,
        at_us: commit.committed_at_us,
        traceparent: None,
    };
    Claimed { seq: 0, topic, event }
}

/// A UUID of version 7 from the time of the commit and a hash of the transaction and its content.
fn identity(commit: Commit, xid: u64, content: &Xxh3) -> EventId {
    let mut hash = content.clone();
    hash.update(&xid.to_le_bytes());
    hash.update(&commit.commit_lsn.0.to_le_bytes());
    let milliseconds = u64::try_from(commit.committed_at_us / 1000).unwrap_or_default();
    let random: [u8; 16] = hash.digest128().to_le_bytes();
    let random = random.first_chunk::<10>().expect("16 bytes hold 10");
    let id: Uuid = Builder::from_unix_timestamp_millis(milliseconds, random).into_uuid();
    EventId(id)
}

#[cfg(test)]
mod tests {
    use wal::{Lsn, TopicChanges};

    use super::*;

    fn piece(keys: &[&str], logged: &[&str]) -> Piece {
        let keys = keys.iter().map(|key| CacheKey::new(*key).unwrap()).collect();
        Piece {
            commit: Commit { xid: 7, commit_lsn: Lsn(500), committed_at_us: 1_700_000_000_000_000 },
            end_lsn: Some(Lsn(600)),
            topics: vec![(Topic::default(), TopicChanges { keys, namespaces: Vec::new() })],
            primary_keys: Vec::new(),
            events: logged.iter().map(|text| text.as_bytes().into()).collect(),
            unknown: Vec::new(),
        }
    }

    #[test]
    fn the_same_part_read_again_is_the_same_event_and_another_part_is_not() {
        let id = |keys: &[&str]| of_piece(piece(keys, &[]), 7).events[0].event.id;
        assert_eq!(id(&["a", "b"]), id(&["a", "b"]));
        assert_ne!(id(&["a", "b"]), id(&["a"]));
        assert_ne!(id(&["ab"]), id(&["a", "b"]));
        assert_eq!(id(&["a"]).0.get_version_num(), 7);
    }

    #[test]
    fn a_message_that_is_no_event_is_set_aside_and_the_rest_goes_on() {
        let made = of_piece(piece(&["a"], &["nonsense", "rubbish"]), 9);
        assert_eq!((made.events.len(), made.poison.len()), (1, 2));
        assert_ne!(made.poison[0].event_id(), made.poison[1].event_id(), "each is a dead letter of its own");
        assert_eq!(made.events[0].event.xids, [9]);
        assert!(made.poison[0].reason.contains("0/1F4"), "{}", made.poison[0].reason);
    }
}
