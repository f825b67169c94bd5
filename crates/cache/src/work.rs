use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use event::{CacheKey, Change, CommittedEvent, TransactionId};

use crate::Mark;

/// What a batch of events asks of the cache: the union of their keys, each once.
///
/// Events commute, so the union loses nothing: a delete wins over every update of the same key (after a delete an update
/// finds no version and acts as a delete too), and of several updates the one with the highest version.
#[derive(Debug, Default)]
pub struct Work {
    positions: HashMap<Arc<str>, usize>,
    items: Vec<Item>,
    namespaces: BTreeSet<CacheKey>,
    /// Transactions of all events, one event after the other.
    transactions: Vec<TransactionId>,
    /// A key, by its position in `items`, and where in `transactions` the transactions of an event that names it are.
    named: Vec<(usize, Range<usize>)>,
}

/// A key and what is asked for it.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) key: Arc<str>,
    pub(crate) update: Option<Update>,
}

/// The value a key has from now on.
#[derive(Debug, Clone)]
pub(crate) struct Update {
    pub(crate) value: Vec<u8>,
    pub(crate) version: i64,
    pub(crate) ttl: Duration,
}

impl Work {
    /// Nothing to do yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what `event` asks for.
    pub fn add(&mut self, event: &CommittedEvent) {
        if event.change == Change::Namespace {
            self.namespaces.extend(event.keys.iter().cloned());
            return;
        }
        let first = self.transactions.len();
        let history = event.history;
        self.transactions.extend(event.xids.iter().map(|&xid| TransactionId { history, xid }));
        for key in &event.keys {
            let at = match &event.change {
                Change::Delete => self.delete(key),
                Change::Update { value, version, ttl } => self.update(key, value, *version, *ttl),
                Change::Namespace => unreachable!("handled above"),
            };
            self.named.push((at, first..self.transactions.len()));
        }
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty() && self.namespaces.is_empty()
    }

    /// Number of distinct keys.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.items.len()
    }

    /// Forgets everything but keeps the memory for the next batch.
    pub fn clear(&mut self) {
        self.positions.clear();
        self.items.clear();
        self.namespaces.clear();
        self.transactions.clear();
        self.named.clear();
    }

    /// What this asks of some of its keys. Nothing of its namespaces.
    #[must_use]
    pub fn only(&self, keys: &HashSet<&str>) -> Self {
        self.filtered(|key| keys.contains(key))
    }

    /// What this asks of the keys that are wanted. Nothing of its namespaces.
    #[must_use]
    pub fn filtered(&self, wanted: impl Fn(&str) -> bool) -> Self {
        let mut part = Self::new();
        part.add_items(self, wanted);
        part
    }

    /// Adds what `other` asks for.
    pub fn merge(&mut self, other: &Self) {
        self.namespaces.extend(other.namespaces.iter().cloned());
        self.add_items(other, |_| true);
    }

    fn add_items(&mut self, other: &Self, wanted: impl Fn(&str) -> bool) {
        let mut places = HashMap::new();
        for (from, item) in other.items.iter().enumerate().filter(|(_, item)| wanted(&item.key)) {
            places.insert(from, self.add_item(item));
        }
        for (from, transactions) in &other.named {
            if let Some(&at) = places.get(from) {
                let first = self.transactions.len();
                self.transactions.extend_from_slice(&other.transactions[transactions.clone()]);
                self.named.push((at, first..self.transactions.len()));
            }
        }
    }

    fn add_item(&mut self, item: &Item) -> usize {
        let is_new = !self.positions.contains_key(&item.key);
        let at = self.position(&item.key, || None);
        let held = &mut self.items[at].update;
        let is_newer = match (&held, &item.update) {
            (Some(held), Some(update)) => held.version < update.version,
            (_, None) => true,
            (None, Some(_)) => is_new,
        };
        if is_newer {
            held.clone_from(&item.update);
        }
        at
    }

    /// Removes the namespaces and returns them.
    #[must_use]
    pub fn take_namespaces(&mut self) -> BTreeSet<CacheKey> {
        std::mem::take(&mut self.namespaces)
    }

    /// The distinct keys.
    pub fn key_names(&self) -> impl Iterator<Item = &str> {
        self.items.iter().map(|item| &*item.key)
    }

    /// Roughly how much memory this takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        const PER_KEY: usize = 160;
        let of = |item: &Item| {
            PER_KEY + item.key.len() + item.update.as_ref().map_or(0, |update| update.value.len())
        };
        let namespaces = self.namespaces.iter().map(|namespace| PER_KEY + namespace.as_str().len());
        self.items.iter().map(of).chain(namespaces).sum::<usize>()
            + self.transactions.len() * size_of::<TransactionId>()
    }

    /// Beginnings of keys of which every one is invalidated.
    #[must_use]
    pub fn namespaces(&self) -> &BTreeSet<CacheKey> {
        &self.namespaces
    }

    pub(crate) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Whether any event says which transaction it belongs to.
    pub(crate) fn has_transactions(&self) -> bool {
        !self.transactions.is_empty()
    }

    /// Every key together with each transaction that named it.
    pub(crate) fn transactions(&self) -> impl Iterator<Item = (&str, TransactionId)> {
        self.named.iter().flat_map(|(at, transactions)| {
            let key = &*self.items[*at].key;
            self.transactions[transactions.clone()].iter().map(move |&transaction| (key, transaction))
        })
    }

    /// Those of `marks`, each with its key, that a transaction of this batch has made.
    pub(crate) fn marks_among<'a>(&self, marks: &[(&'a str, Mark)]) -> Vec<(&'a str, Mark)> {
        let mut of_keys: HashMap<&str, Vec<TransactionId>> = HashMap::new();
        for &(key, _) in marks {
            of_keys.entry(key).or_default();
        }
        for (key, transaction) in self.transactions() {
            if let Some(transactions) = of_keys.get_mut(key) {
                transactions.push(transaction);
            }
        }
        let is_own = |&&(key, mark): &&(&str, Mark)| {
            of_keys[key].iter().any(|transaction| transaction.is_also(mark.transaction()))
        };
        marks.iter().filter(is_own).copied().collect()
    }

    /// Adds the deletion of one key and returns its position.
    pub(crate) fn delete(&mut self, key: &CacheKey) -> usize {
        let at = self.position(key.as_str(), || None);
        self.items[at].update = None;
        at
    }

    fn update(&mut self, key: &CacheKey, value: &[u8], version: i64, ttl: Duration) -> usize {
        let update = || Some(Update { value: value.to_vec(), version, ttl });
        let at = self.position(key.as_str(), update);
        if self.items[at].update.as_ref().is_some_and(|held| held.version < version) {
            self.items[at].update = update();
        }
        at
    }

    fn position(&mut self, key: &str, update: impl FnOnce() -> Option<Update>) -> usize {
        if let Some(&at) = self.positions.get(key) {
            return at;
        }
        let at = self.items.len();
        let key: Arc<str> = key.into();
        self.positions.insert(Arc::clone(&key), at);
        self.items.push(Item { key, update: update() });
        at
    }
}

#[cfg(test)]
mod tests {
    use event::EventId;

    use super::*;

    fn committed(keys: &[&str], change: Change, xids: &[u64]) -> CommittedEvent {
        let keys = keys.iter().map(|&key| CacheKey::new(key).unwrap()).collect();
        let (id, xids) = (EventId::generate(), xids.to_vec());
        CommittedEvent { id, keys, change, xids, history: None, at_us: 0, traceparent: None }
    }

    fn version(number: i64) -> Change {
        Change::update(b"value".to_vec(), number, Duration::from_secs(60)).unwrap()
    }

    #[test]
    fn every_key_is_named_once_with_all_its_transactions() {
        let mut work = Work::new();
        work.add(&committed(&["a", "b"], Change::Delete, &[1, 2]));
        work.add(&committed(&["b"], Change::Delete, &[3]));
        assert_eq!(work.keys(), 2);
        let mut transactions: Vec<_> = work.transactions().map(|(key, of)| (key, of.xid)).collect();
        transactions.sort_unstable();
        assert_eq!(transactions, [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]);
        work.clear();
        assert!(work.is_empty());
        assert!(!work.has_transactions());
    }

    #[test]
    fn a_part_of_the_work_keeps_what_it_asks_for_and_a_sum_is_as_if_all_events_had_been_added() {
        let events = [
            committed(&["a", "b"], Change::Delete, &[1, 2]),
            committed(&["b", "c"], version(7), &[3]),
            committed(&["c"], version(8), &[4]),
            committed(&["n:"], Change::Namespace, &[5]),
        ];
        let all = |events: &[CommittedEvent]| {
            let mut work = Work::new();
            events.iter().for_each(|event| work.add(event));
            work
        };
        let asked = |work: &Work| {
            let mut asked: Vec<_> = (work.items().iter())
                .map(|item| (item.key.to_string(), item.update.as_ref().map(|update| update.version)))
                .collect();
            asked.sort();
            let transactions =
                work.transactions().map(|(key, transaction)| (key.to_owned(), transaction.xid));
            let mut transactions: Vec<_> = transactions.collect();
            transactions.sort();
            (asked, transactions)
        };
        let whole = all(&events);
        let part = whole.only(&HashSet::from(["c", "other"]));
        assert_eq!(asked(&part), (vec![("c".into(), Some(8))], vec![("c".into(), 3), ("c".into(), 4)]));
        assert!(part.namespaces().is_empty());
        for split in 0..events.len() {
            let (one, other) = events.split_at(split);
            for (one, other) in [(one, other), (other, one)] {
                let mut sum = all(one);
                sum.merge(&all(other));
                assert_eq!((asked(&sum), sum.namespaces()), (asked(&whole), whole.namespaces()));
            }
        }
    }

    #[test]
    fn a_namespace_is_no_key_of_the_same_name() {
        let mut work = Work::new();
        work.add(&committed(&["user:"], Change::Namespace, &[1]));
        work.add(&committed(&["user:"], Change::Namespace, &[2]));
        assert_eq!((work.keys(), work.namespaces().len(), work.is_empty()), (0, 1, false));
        work.clear();
        assert!(work.is_empty());
    }

    #[test]
    fn a_delete_wins_over_updates_and_a_newer_update_over_older_ones_in_any_order() {
        let asked = |changes: &[Change]| {
            let mut work = Work::new();
            for change in changes {
                work.add(&committed(&["k"], change.clone(), &[]));
            }
            work.items()[0].update.as_ref().map(|update| update.version)
        };
        assert_eq!(asked(&[version(7), version(8)]), Some(8));
        assert_eq!(asked(&[version(8), version(7)]), Some(8));
        assert_eq!(asked(&[version(8), Change::Delete]), None);
        assert_eq!(asked(&[Change::Delete, version(8)]), None);
        assert_eq!(asked(&[version(8), Change::Delete, version(9)]), None);
    }
}
