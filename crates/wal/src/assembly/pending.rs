use event::{CacheKey, Topic};
use rules::TableRules;

use crate::key_set::KeySet;

use super::Unknown;

/// A transaction that comes after its commit is given away in parts of about this many keys. More would not make the
/// messages larger, only the memory.
const FULL_AT_KEYS: usize = 1_000;

/// And of about this many bytes of events.
const FULL_AT_BYTES: usize = 512 * 1024;

/// What a transaction, or a part of it, invalidates if it commits.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) topics: Vec<(Topic, Collected)>,
    /// Primary keys that `expand` is to map, by the index of the table in the rules.
    pub(super) primary_keys: Vec<(usize, KeySet)>,
    /// Events that were enqueued without a table, as they were written.
    pub(super) events: Vec<Box<[u8]>>,
    event_bytes: usize,
    /// Changes of which the log does not hold what their keys are made of.
    pub(super) unknown: Vec<Unknown>,
}

/// Of one topic.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) keys: KeySet,
    pub(super) namespaces: Vec<CacheKey>,
}

impl Pending {
    pub(super) fn add_keys(&mut self, topic: &Topic, keys: &[CacheKey]) {
        if keys.is_empty() {
            return;
        }
        let collected = self.topic(topic);
        for key in keys {
            collected.keys.insert(key.as_str());
        }
    }

    pub(super) fn add_primary_keys(&mut self, table: usize, primary_keys: &[String]) {
        if primary_keys.is_empty() {
            return;
        }
        let known = self.primary_keys.iter().position(|(known, _)| *known == table);
        let index = known.unwrap_or_else(|| {
            self.primary_keys.push((table, KeySet::default()));
            self.primary_keys.len() - 1
        });
        for primary_key in primary_keys {
            self.primary_keys[index].1.insert(primary_key);
        }
    }

    pub(super) fn add_namespaces(&mut self, topic: &Topic, namespaces: &[CacheKey]) {
        let collected = self.topic(topic);
        for namespace in namespaces {
            if !collected.namespaces.contains(namespace) {
                collected.namespaces.push(namespace.clone());
            }
        }
    }

    pub(super) fn add_event(&mut self, event: Box<[u8]>) {
        self.event_bytes += event.len();
        self.events.push(event);
    }

    /// A change that cannot be told the keys of: whatever the table's rules could name is invalidated instead.
    pub(super) fn add_unknown(&mut self, table: &TableRules, unknown: &Unknown) {
        let namespaces = crate::namespaces(table);
        self.add_namespaces(&table.topic, &namespaces);
        if !self.unknown.contains(unknown) {
            self.unknown.push(unknown.clone());
        }
    }

    fn topic(&mut self, topic: &Topic) -> &mut Collected {
        // Nearly always one topic; a linear search beats a map.
        let known = self.topics.iter().position(|(known, _)| known == topic);
        let index = known.unwrap_or_else(|| {
            self.topics.push((topic.clone(), Collected::default()));
            self.topics.len() - 1
        });
        &mut self.topics[index].1
    }

    pub(super) fn is_full(&self) -> bool {
        let keys: usize = self.topics.iter().map(|(_, collected)| collected.keys.len()).sum();
        let primary_keys: usize = self.primary_keys.iter().map(|(_, keys)| keys.len()).sum();
        self.event_bytes > FULL_AT_BYTES || keys + primary_keys >= FULL_AT_KEYS
    }

    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Memory it takes, about; what a subtransaction of a single row takes is mostly the room around it.
    pub(super) fn bytes(&self) -> usize {
        let of_topic =
            |(_, collected): &(Topic, Collected)| collected.keys.bytes() + collected.namespaces.len() * 64;
        let own = size_of::<Self>()
            + self.topics.capacity() * size_of::<(Topic, Collected)>()
            + self.primary_keys.capacity() * size_of::<(usize, KeySet)>();
        let primary_keys: usize = self.primary_keys.iter().map(|(_, keys)| keys.bytes()).sum();
        let topics: usize = self.topics.iter().map(of_topic).sum();
        own + self.event_bytes + self.events.len() * 16 + topics + primary_keys
    }
}
