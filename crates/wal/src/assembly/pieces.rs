use event::{CacheKey, Topic};
use pgwire_replication::Lsn;

use crate::key_set::KeySet;

use super::Unknown;
use super::pending::{Collected, Pending};

/// Most keys in a part of a transaction.
const PIECE_KEYS: usize = 1_000;

/// Most bytes of events in a part of a transaction, unless a single event has more.
const PIECE_EVENT_BYTES: usize = 512 * 1024;

/// A transaction that has committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit {
    /// Its id, without the epoch.
    pub xid: u32,
    /// Where its commit is in the log.
    pub commit_lsn: Lsn,
    /// When it committed, in microseconds since the Unix epoch.
    pub committed_at_us: i64,
}

/// What a transaction invalidates in one topic.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TopicChanges {
    /// Keys.
    pub keys: Vec<CacheKey>,
    /// Prefixes of keys.
    pub namespaces: Vec<CacheKey>,
}

/// A part of a committed transaction.
#[derive(Debug)]
pub struct Piece {
    /// The transaction.
    pub commit: Commit,
    /// Where the log goes on after the transaction, in its last part.
    pub end_lsn: Option<Lsn>,
    /// What it invalidates.
    pub topics: Vec<(Topic, TopicChanges)>,
    /// Primary keys that `expand` is to map, by the index of the table in the rules.
    pub primary_keys: Vec<(usize, Vec<String>)>,
    /// Events that were enqueued without a table, as they were written.
    pub events: Vec<Box<[u8]>>,
    /// Changes of which the log does not hold what their keys are made of; namespaces stand for them.
    pub unknown: Vec<Unknown>,
}

impl Piece {
    /// A part of a transaction of which more is to come.
    pub(super) fn of_unfinished(commit: Commit, pending: Pending) -> Self {
        let mut draining = Draining::new(commit, Lsn(0), vec![pending]);
        draining.piece_keys = usize::MAX;
        draining.piece_event_bytes = usize::MAX;
        Self { end_lsn: None, ..draining.next() }
    }

    /// Whether it is the last part of its transaction.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.end_lsn.is_some()
    }

    /// Whether it invalidates nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.topics.is_empty() && self.primary_keys.is_empty() && self.events.is_empty()
    }

    /// Memory it takes, in bytes, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        const PER_KEY: usize = 48;
        let of_keys = |keys: &[CacheKey]| keys.iter().map(|key| key.as_str().len() + PER_KEY).sum::<usize>();
        let topics =
            self.topics.iter().map(|(_, changes)| of_keys(&changes.keys) + of_keys(&changes.namespaces));
        let primary_keys =
            self.primary_keys.iter().flat_map(|(_, keys)| keys.iter().map(|key| key.len() + PER_KEY));
        let events = self.events.iter().map(|event| event.len());
        size_of::<Self>() + topics.sum::<usize>() + primary_keys.sum::<usize>() + events.sum::<usize>()
    }

    /// How many keys it names, those in events aside.
    #[must_use]
    pub fn key_count(&self) -> usize {
        self.topics.iter().map(|(_, changes)| changes.keys.len()).sum()
    }
}

/// A committed transaction that is given away part by part, and freed on the way.
pub(super) struct Draining {
    commit: Commit,
    end_lsn: Lsn,
    topics: Vec<(Topic, Keys, Vec<CacheKey>)>,
    primary_keys: Vec<(usize, Keys)>,
    events: std::iter::Peekable<std::vec::IntoIter<Box<[u8]>>>,
    unknown: Vec<Unknown>,
    piece_keys: usize,
    piece_event_bytes: usize,
}

type Keys = std::iter::Peekable<Box<dyn Iterator<Item = String> + Send>>;

fn given_back(keys: KeySet) -> Keys {
    let keys: Box<dyn Iterator<Item = String> + Send> = Box::new(keys.into_keys());
    keys.peekable()
}

impl std::fmt::Debug for Draining {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Draining").field("commit", &self.commit).finish_non_exhaustive()
    }
}

impl Draining {
    pub(super) fn new(commit: Commit, end_lsn: Lsn, parts: Vec<Pending>) -> Self {
        let mut all_events = Vec::new();
        let mut draining = Self {
            commit,
            end_lsn,
            topics: Vec::new(),
            primary_keys: Vec::new(),
            events: Vec::new().into_iter().peekable(),
            unknown: Vec::new(),
            piece_keys: PIECE_KEYS,
            piece_event_bytes: PIECE_EVENT_BYTES,
        };
        for Pending { topics, primary_keys, events, unknown, .. } in parts {
            all_events.extend(events);
            draining
                .primary_keys
                .extend(primary_keys.into_iter().map(|(table, keys)| (table, given_back(keys))));
            draining.unknown.extend(unknown);
            for (topic, Collected { keys, namespaces }) in topics {
                draining.topics.push((topic, given_back(keys), namespaces));
            }
        }
        draining.events = all_events.into_iter().peekable();
        draining
    }

    /// The next part; after the last one it is not to be asked again.
    pub(super) fn next(&mut self) -> Piece {
        let mut room = self.piece_keys;
        let mut topics: Vec<(Topic, TopicChanges)> = Vec::new();
        while room > 0
            && let Some((topic, keys, namespaces)) = self.topics.last_mut()
        {
            let taken: Vec<_> = keys.by_ref().take(room).filter_map(|key| CacheKey::new(key).ok()).collect();
            room = room.saturating_sub(taken.len());
            let changes = TopicChanges { keys: taken, namespaces: std::mem::take(namespaces) };
            match topics.iter_mut().find(|(known, _)| known == topic) {
                Some((_, known)) => {
                    known.keys.extend(changes.keys);
                    known.namespaces.extend(changes.namespaces);
                }
                None => topics.push((topic.clone(), changes)),
            }
            if keys.peek().is_some() {
                break;
            }
            self.topics.pop();
        }
        let mut primary_keys: Vec<(usize, Vec<String>)> = Vec::new();
        while room > 0
            && let Some((table, keys)) = self.primary_keys.last_mut()
        {
            let taken: Vec<_> = keys.by_ref().take(room).collect();
            room -= taken.len();
            primary_keys.push((*table, taken));
            if keys.peek().is_some() {
                break;
            }
            self.primary_keys.pop();
        }
        let mut events = Vec::new();
        let mut bytes = 0_usize;
        while let Some(event) = self.events.next_if(|event| {
            bytes = bytes.saturating_add(event.len());
            events.is_empty() || bytes <= self.piece_event_bytes
        }) {
            events.push(event);
        }
        let is_last = self.topics.is_empty() && self.primary_keys.is_empty() && self.events.peek().is_none();
        Piece {
            commit: self.commit,
            end_lsn: is_last.then_some(self.end_lsn),
            topics,
            primary_keys,
            events,
            unknown: std::mem::take(&mut self.unknown),
        }
    }
}
