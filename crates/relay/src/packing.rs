//! From claimed rows to messages: coalesce, batch, split. Pure.

use std::collections::HashMap;

use bytes::Bytes;
use event::{CacheKey, Change, CommittedEventRef, EnvelopeWriter, Topic};
use outbox::Claimed;

/// Past this size a batch is closed. Large messages would only delay the first key behind the last.
pub const BATCH_BYTES: usize = 128 * 1024;

/// What a message may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most events in a message.
    pub events: usize,
    /// Largest body the broker accepts, in bytes.
    pub bytes: usize,
}

/// A message ready to be published.
#[derive(Debug, Clone)]
pub struct Packed {
    /// Topic of all its events.
    pub topic: Topic,
    /// `Nats-Msg-Id`.
    pub message_id: String,
    /// Trace of its event, if it has just one.
    pub traceparent: Option<String>,
    /// The encoded envelope.
    pub body: Bytes,
    /// How many rows it settles.
    pub rows: usize,
}

/// What a claim becomes.
#[derive(Debug, Default)]
pub struct Packing {
    /// The messages.
    pub messages: Vec<Packed>,
    /// Indexes of rows that do not fit a message even alone.
    pub too_large: Vec<usize>,
    /// Rows that need no entry of their own, since every key is in another one.
    pub coalesced: usize,
}

/// An event of the envelope in the making: one row, and what other rows said of the same keys.
struct Entry<'a> {
    row: usize,
    /// The keys, where other entries took some of the row's own.
    remaining: Option<Vec<CacheKey>>,
    claimed: &'a Claimed,
    /// Transactions, where rows of several were coalesced.
    xids: Option<Vec<u64>>,
    at_us: i64,
    absorbed: Vec<usize>,
}

/// Packs claimed rows into messages, one topic each.
#[must_use]
pub fn pack(claimed: &[Claimed], limits: Limits) -> Packing {
    let mut packing = Packing::default();
    let mut topics: Vec<(&Topic, Vec<Entry<'_>>)> = Vec::new();
    for (topic, rows) in by_topic(claimed) {
        let entries = coalesce(claimed, &rows);
        packing.coalesced += rows.len() - entries.len();
        topics.push((topic, entries));
    }
    for (topic, entries) in topics {
        let mut batch = Batch::new(topic, limits);
        for entry in &entries {
            batch.add(entry, entry.keys(), 1 + entry.absorbed.len(), true, &mut packing);
        }
        batch.close(&mut packing);
    }
    packing
}

fn by_topic(claimed: &[Claimed]) -> Vec<(&Topic, Vec<usize>)> {
    let mut topics: Vec<(&Topic, Vec<usize>)> = Vec::new();
    for (row, Claimed { topic, .. }) in claimed.iter().enumerate() {
        // Nearly always one topic; a linear search beats a map.
        match topics.iter_mut().find(|(known, _)| *known == topic) {
            Some((_, rows)) => rows.push(row),
            None => topics.push((topic, vec![row])),
        }
    }
    topics
}

/// One delete per distinct key. A key that an earlier entry already names is left to it, and the transaction goes with
/// it, so that marks of strict writes are still resolved. Updates stay as they are, since they carry versions, and so do
/// namespaces, which are no keys.
fn coalesce<'a>(claimed: &'a [Claimed], rows: &[usize]) -> Vec<Entry<'a>> {
    let mut entries: Vec<Entry<'a>> = Vec::with_capacity(rows.len());
    let mut named_by: HashMap<&'a CacheKey, usize> = HashMap::with_capacity(rows.len());
    for &row in rows {
        let claimed = &claimed[row];
        let mut entry = Entry::new(row, claimed);
        if claimed.event.change != Change::Delete {
            entries.push(entry);
            continue;
        }
        let mine = entries.len();
        let mut taken_by = None;
        let mut fresh = 0_usize;
        for key in &claimed.event.keys {
            match *named_by.entry(key).or_insert(mine) {
                earlier if earlier == mine => fresh += 1,
                earlier => {
                    entries[earlier].absorb_transaction(&claimed.event.xids, claimed.event.at_us);
                    taken_by = Some(earlier);
                }
            }
        }
        match taken_by {
            None => entries.push(entry),
            Some(earlier) if fresh == 0 => entries[earlier].absorbed.push(row),
            Some(_) => {
                let left = claimed.event.keys.iter().filter(|key| named_by[key] == mine);
                entry.remaining = Some(left.cloned().collect());
                entries.push(entry);
            }
        }
    }
    entries
}

impl<'a> Entry<'a> {
    fn new(row: usize, claimed: &'a Claimed) -> Self {
        Self { row, remaining: None, claimed, xids: None, at_us: claimed.event.at_us, absorbed: Vec::new() }
    }

    fn keys(&self) -> &[CacheKey] {
        self.remaining.as_deref().unwrap_or(&self.claimed.event.keys)
    }

    fn absorb_transaction(&mut self, xids: &[u64], at_us: i64) {
        let known = self.xids.get_or_insert_with(|| self.claimed.event.xids.clone());
        for xid in xids {
            // Rows of one transaction lie together, so the last one is nearly always where a repetition is.
            if known.last() != Some(xid) {
                known.push(*xid);
            }
        }
        self.at_us = self.at_us.min(at_us);
    }

    fn is_untouched(&self) -> bool {
        self.remaining.is_none() && self.xids.is_none()
    }

    fn wire<'b>(&'b self, keys: &'b [CacheKey]) -> CommittedEventRef<'b> {
        let event = &self.claimed.event;
        CommittedEventRef {
            id: event.id,
            keys,
            change: &event.change,
            xids: self.xids.as_deref().unwrap_or(&event.xids),
            history: event.history,
            at_us: self.at_us,
            traceparent: event.traceparent.as_ref(),
        }
    }
}

/// The message being filled.
struct Batch<'a> {
    topic: &'a Topic,
    limits: Limits,
    writer: EnvelopeWriter,
    rows: usize,
    /// Trace of the event, while the message is exactly one whole event.
    trace: Option<String>,
}

impl<'a> Batch<'a> {
    fn new(topic: &'a Topic, limits: Limits) -> Self {
        Self { topic, limits, writer: EnvelopeWriter::new(limits.bytes), rows: 0, trace: None }
    }

    /// Adds `keys` of an entry, in a message of its own or split over several where they are too many.
    fn add(&mut self, entry: &Entry<'_>, keys: &[CacheKey], rows: usize, whole: bool, packing: &mut Packing) {
        let full = self.writer.events() >= self.limits.events || self.writer.bytes() >= BATCH_BYTES;
        if full {
            self.close(packing);
        }
        if self.writer.push(entry.wire(keys)) {
            self.rows += rows;
            let alone = self.writer.events() == 1 && whole && entry.is_untouched();
            let traceparent = entry.claimed.event.traceparent.as_ref().filter(|_| alone);
            self.trace = traceparent.map(|parent| parent.as_str().to_owned());
        } else if self.writer.events() > 0 {
            self.close(packing);
            self.add(entry, keys, rows, whole, packing);
        } else if keys.len() > 1 {
            let (left, right) = keys.split_at(keys.len() / 2);
            self.add(entry, left, rows, false, packing);
            self.add(entry, right, 0, false, packing);
        } else {
            packing.too_large.push(entry.row);
            packing.too_large.extend(&entry.absorbed);
        }
    }

    fn close(&mut self, packing: &mut Packing) {
        let writer = std::mem::replace(&mut self.writer, EnvelopeWriter::new(self.limits.bytes));
        let rows = std::mem::take(&mut self.rows);
        let traceparent = self.trace.take();
        if writer.events() == 0 {
            return;
        }
        let body = Bytes::from(writer.finish());
        let message_id = EnvelopeWriter::message_id(self.topic, &body);
        packing.messages.push(Packed { topic: self.topic.clone(), message_id, traceparent, body, rows });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use event::{CommittedEvent, Envelope, EventId};

    use super::*;

    const ROOMY: Limits = Limits { events: 500, bytes: 1_000_000 };

    fn row(seq: i64, xid: u64, keys: &[&str]) -> Claimed {
        let event = CommittedEvent {
            id: EventId::generate(),
            keys: keys.iter().map(|key| CacheKey::new(*key).unwrap()).collect(),
            change: Change::Delete,
            xids: vec![xid],
            history: None,
            at_us: 1_000 + seq,
            traceparent: None,
        };
        Claimed { seq, topic: Topic::default(), event }
    }

    fn decoded(packing: &Packing) -> Vec<CommittedEvent> {
        packing.messages.iter().flat_map(|message| Envelope::decode(&message.body).unwrap().events).collect()
    }

    fn keys(events: &[CommittedEvent]) -> Vec<&str> {
        events.iter().flat_map(|event| event.keys.iter().map(CacheKey::as_str)).collect()
    }

    #[test]
    fn each_key_is_named_once_and_keeps_every_transaction() {
        let rows = [row(1, 10, &["a", "b"]), row(2, 11, &["b"]), row(3, 12, &["b", "c"]), row(4, 12, &["c"])];
        let packing = pack(&rows, ROOMY);
        let events = decoded(&packing);
        assert_eq!(keys(&events), ["a", "b", "c"]);
        assert_eq!(events[0].xids, [10, 11, 12]);
        assert_eq!(events[1].xids, [12]);
        assert_eq!(packing.coalesced, 2);
        assert_eq!(packing.messages.iter().map(|message| message.rows).sum::<usize>(), 4);
    }

    #[test]
    fn a_message_is_a_duplicate_only_of_one_from_the_same_transactions() {
        let id = |rows: &[Claimed]| pack(rows, ROOMY).messages[0].message_id.clone();
        let first = row(1, 10, &["a"]);
        // Published but not settled, then claimed again: JetStream is to know it.
        let mut again = row(1, 10, &["a"]);
        again.event.id = first.event.id;
        assert_eq!(id(&[first]), id(&[again]));
        // Claimed again beside a younger event on the same key: that one must not be taken for a duplicate.
        let (mut older, younger) = (row(1, 10, &["a"]), row(2, 11, &["a"]));
        let both = [row(1, 10, &["a"]), row(2, 11, &["a"])];
        assert_eq!(decoded(&pack(&both, ROOMY))[0].xids, [10, 11]);
        assert_ne!(id(&both), id(&[older]));
        // Nor one that a producer enqueued with the same id in another transaction.
        older = row(2, 11, &["a"]);
        older.event.id = younger.event.id;
        let mut same_id = row(1, 10, &["a"]);
        same_id.event.id = younger.event.id;
        assert_ne!(id(&[same_id]), id(&[older]));
    }

    #[test]
    fn a_namespace_is_not_taken_for_a_key_of_the_same_name() {
        let mut rows = vec![row(1, 10, &["user:"]), row(2, 11, &["user:"]), row(3, 12, &["user:"])];
        rows[1].event.change = Change::Namespace;
        let events = decoded(&pack(&rows, ROOMY));
        let changes: Vec<_> = events.iter().map(|event| (&event.change, event.xids.as_slice())).collect();
        assert_eq!(changes, [(&Change::Delete, &[10_u64, 12][..]), (&Change::Namespace, &[11][..])]);
    }

    #[test]
    fn topics_do_not_mix() {
        let mut rows = [row(1, 10, &["a"]), row(2, 11, &["a"])];
        rows[1].topic = Topic::new("orders").unwrap();
        let packing = pack(&rows, ROOMY);
        assert_eq!(packing.messages.len(), 2);
        assert_eq!(packing.coalesced, 0);
    }

    #[test]
    fn batches_respect_both_limits() {
        let rows: Vec<_> = (0..100).map(|n| row(n, 1, &[&format!("user:{n}:profile")])).collect();
        let packing = pack(&rows, Limits { events: 7, bytes: 1_000_000 });
        assert!(packing.messages.iter().all(|message| message.rows <= 7));
        let packing = pack(&rows, Limits { events: 500, bytes: 600 });
        assert!(packing.messages.iter().all(|message| message.body.len() <= 600));
        assert_eq!(decoded(&packing).len(), 100);
    }

    #[test]
    fn an_event_with_more_keys_than_a_message_holds_is_split_without_losing_one() {
        let names: Vec<String> = (0..10_000).map(|n| format!("user:{n}:{}", "x".repeat(100))).collect();
        let rows = [row(1, 10, &names.iter().map(String::as_str).collect::<Vec<_>>())];
        let packing = pack(&rows, Limits { events: 500, bytes: 100_000 });
        assert!(
            packing.messages.len() > 10
                && packing.messages.iter().all(|message| message.body.len() <= 100_000)
        );
        let ids: BTreeSet<_> = packing.messages.iter().map(|message| &message.message_id).collect();
        assert_eq!(ids.len(), packing.messages.len(), "equal ids would be swallowed as duplicates");
        let events = decoded(&packing);
        assert_eq!(keys(&events).into_iter().collect::<BTreeSet<_>>().len(), 10_000);
    }

    #[test]
    fn what_does_not_fit_even_alone_is_set_aside_and_the_rest_goes_on() {
        let mut rows = vec![row(1, 10, &["a"]), row(2, 11, &["big"]), row(3, 12, &["c"])];
        rows[1].event.change = Change::update(vec![7; 5_000], 1, Duration::from_secs(1)).unwrap();
        let packing = pack(&rows, Limits { events: 500, bytes: 1_000 });
        assert_eq!(packing.too_large, [1]);
        assert_eq!(keys(&decoded(&packing)), ["a", "c"]);
    }
}
