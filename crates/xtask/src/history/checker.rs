//! Decides which reads were stale. Pure.

use std::collections::HashMap;
use std::time::Duration;

use super::record::{Kind, Record};
use crate::bench::percentiles::Delays;

/// Offending reads that are kept to be shown.
const MAX_OFFENCES: usize = 5;

/// What is known to have been committed, and since when: the highest version of each row at any time.
#[derive(Debug, Default)]
pub struct Known {
    /// By row: moments and versions, both increasing once settled.
    rows: HashMap<u32, Vec<(u64, u64)>>,
}

/// What the checker needs to know before it can judge.
#[derive(Debug, Default)]
pub struct History {
    /// Versions whose commit was acknowledged.
    acknowledged: Known,
    /// Versions that a read or a look has returned, acknowledged or not.
    seen: Known,
    /// When each version was first returned.
    first_seen: HashMap<(u32, u64), u64>,
}

/// A read that broke the promise.
#[derive(Debug, Clone, Copy)]
pub struct Offence {
    /// The read.
    pub read: Record,
    /// The highest version that was known when it began.
    pub known: u64,
    /// Since when a version newer than the one it returned was known.
    pub newer_since_ns: u64,
    /// Whether it was known from another read or a look at the database, rather than from the writer.
    pub from_a_read: bool,
}

/// What all records come to.
#[derive(Debug)]
pub struct Tally {
    pub hits: u64,
    pub loads: u64,
    pub looks: u64,
    pub failed_reads: u64,
    pub commits: u64,
    pub rolled_back: u64,
    pub unknown: u64,
    /// Reads older than a commit that was acknowledged before they began.
    pub stale: u64,
    /// Reads that were not stale, but older than what another read or a look at the database had returned before they
    /// began: the commit was visible, though not acknowledged.
    pub backwards: u64,
    /// Reads of a version that was never committed.
    pub invented: u64,
    /// For stale reads: from the acknowledgement of the first newer version to the beginning of the read.
    pub windows: Delays,
    pub offences: Vec<Offence>,
}

impl Known {
    fn learn(&mut self, row: u32, version: u64, at_ns: u64) {
        self.rows.entry(row).or_default().push((at_ns, version));
    }

    /// Keeps what raised the highest version.
    fn settle(&mut self) {
        for moments in self.rows.values_mut() {
            moments.sort_unstable();
            let mut highest = 0;
            moments.retain(|(_, version)| {
                let raises = *version > highest;
                highest = highest.max(*version);
                raises
            });
        }
    }

    /// The highest version known before a moment.
    fn before(&self, row: u32, moment_ns: u64) -> Option<u64> {
        let moments = self.rows.get(&row)?;
        let count = moments.partition_point(|(at_ns, _)| *at_ns < moment_ns);
        moments.get(count.checked_sub(1)?).map(|(_, version)| *version)
    }

    /// Since when a version above this one was known.
    fn newer_since(&self, row: u32, version: u64) -> Option<u64> {
        let moments = self.rows.get(&row)?;
        let first = moments.partition_point(|(_, known)| *known <= version);
        moments.get(first).map(|(at_ns, _)| *at_ns)
    }

    /// What makes this read an old one, if anything: the version that was known, and since when a newer one was.
    fn against(&self, read: &Record) -> Option<(u64, u64)> {
        let known = self.before(read.row, read.began_ns)?;
        let newer_since = self.newer_since(read.row, read.version)?;
        (known > read.version).then_some((known, newer_since))
    }
}

impl History {
    /// Takes in one record. Every record, before any is judged.
    pub fn learn(&mut self, record: &Record) {
        match record.kind {
            Kind::Committed => self.acknowledged.learn(record.row, record.version, record.ended_ns),
            Kind::Hit | Kind::Load | Kind::Look => {
                let first = self.first_seen.entry((record.row, record.version)).or_insert(u64::MAX);
                *first = record.ended_ns.min(*first);
            }
            _ => {}
        }
    }

    /// No more records come.
    pub fn settle(&mut self) {
        for ((row, version), at_ns) in self.first_seen.drain() {
            self.seen.learn(row, version, at_ns);
        }
        self.acknowledged.settle();
        self.seen.settle();
    }
}

impl Tally {
    pub fn new() -> Self {
        Self {
            hits: 0,
            loads: 0,
            looks: 0,
            failed_reads: 0,
            commits: 0,
            rolled_back: 0,
            unknown: 0,
            stale: 0,
            backwards: 0,
            invented: 0,
            windows: Delays::new(),
            offences: Vec::new(),
        }
    }

    /// Reads through the cache that returned something.
    pub fn reads(&self) -> u64 {
        self.hits + self.loads
    }

    /// Counts a record, and judges it if it is a read. `last_version` is what its row came to in the end.
    pub fn add(&mut self, record: &Record, history: &History, last_version: u64) {
        let count = match record.kind {
            Kind::Hit => &mut self.hits,
            Kind::Load => &mut self.loads,
            Kind::Look => &mut self.looks,
            Kind::FailedRead => &mut self.failed_reads,
            Kind::Committed => &mut self.commits,
            Kind::RolledBack => &mut self.rolled_back,
            Kind::Unknown => &mut self.unknown,
        };
        *count += 1;
        if matches!(record.kind, Kind::Hit | Kind::Load) {
            self.judge(record, history);
            self.invented += u64::from(record.version > last_version);
        }
    }

    fn judge(&mut self, read: &Record, history: &History) {
        let (known, newer_since_ns, from_a_read) = match history.acknowledged.against(read) {
            Some((known, since_ns)) => {
                self.stale += 1;
                self.windows.record(Duration::from_nanos(read.began_ns.saturating_sub(since_ns)));
                (known, since_ns, false)
            }
            None => match history.seen.against(read) {
                Some((known, since_ns)) => {
                    self.backwards += 1;
                    (known, since_ns, true)
                }
                None => return,
            },
        };
        if self.offences.len() < MAX_OFFENCES {
            self.offences.push(Offence { read: *read, known, newer_since_ns, from_a_read });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: u32 = 7;

    fn read(version: u64, began_ns: u64, ended_ns: u64) -> Record {
        Record { kind: Kind::Hit, row: ROW, version, began_ns, ended_ns }
    }

    fn commit(version: u64, ended_ns: u64) -> Record {
        Record { kind: Kind::Committed, row: ROW, version, began_ns: 0, ended_ns }
    }

    fn judge(records: &[Record]) -> Tally {
        let mut history = History::default();
        records.iter().for_each(|record| history.learn(record));
        history.settle();
        let mut tally = Tally::new();
        records.iter().for_each(|record| tally.add(record, &history, 4));
        tally
    }

    #[test]
    fn a_read_is_stale_if_it_is_older_than_what_was_acknowledged_before_it_began() {
        // Acknowledgements need not arrive in the order of the versions.
        let commits = [commit(1, 10), commit(3, 30), commit(2, 40), commit(4, 50)];
        let stale = |version, began_ns| {
            let tally = judge(&[&commits[..], &[read(version, began_ns, 90)]].concat());
            assert_eq!(tally.backwards, 0);
            tally.offences.first().map(|offence| (offence.known, offence.newer_since_ns))
        };
        assert_eq!(stale(1, 30), None);
        assert_eq!(stale(1, 31), Some((3, 30)));
        assert_eq!(stale(2, 45), Some((3, 30)));
        assert_eq!(stale(3, 45), None);
        assert_eq!(stale(3, 51), Some((4, 50)));
        assert_eq!(stale(1, 60), Some((4, 30)));
        // Newer than anything acknowledged is no offence.
        assert_eq!(stale(4, 5), None);
    }

    #[test]
    fn a_read_that_is_older_than_what_was_visible_before_it_began_goes_backwards() {
        let tally = judge(&[commit(1, 10), read(2, 15, 20), read(1, 20, 30), read(1, 21, 30)]);
        assert_eq!((tally.stale, tally.backwards), (0, 1));
        assert!(tally.offences[0].from_a_read && tally.offences[0].read.began_ns == 21);
        let look = Record { kind: Kind::Look, ..read(2, 15, 20) };
        let tally = judge(&[commit(1, 10), look, read(1, 20, 30), read(1, 21, 30)]);
        assert_eq!((tally.reads(), tally.stale, tally.backwards), (2, 0, 1));
    }

    #[test]
    fn a_window_lasts_from_the_first_newer_acknowledgement_to_the_beginning_of_the_read() {
        let tally = judge(&[commit(2, 1_000_000), commit(3, 2_000_000), read(1, 6_000_000, 7_000_000)]);
        assert_eq!(tally.windows.count(), 1);
        assert!((tally.windows.max() - 5.0).abs() < 0.01, "{}", tally.windows.max());
    }

    #[test]
    fn a_version_that_the_row_never_came_to_is_invented() {
        assert_eq!(judge(&[read(4, 1, 2), read(5, 1, 2)]).invented, 1);
    }
}
