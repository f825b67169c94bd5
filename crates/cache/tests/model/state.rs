//! A state of the whole system.

use std::cmp::Ordering;

use crate::key::{Guard, KeyState};
use crate::reader::Reader;
use crate::system::{MAX_READERS, MAX_WRITERS, System};
use crate::transactions::Transactions;
use crate::writer::{Transaction, Writer};

/// Everything there is. Writers and readers a scenario does not have stay as they begin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    pub key: KeyState,
    pub writers: [Writer; MAX_WRITERS],
    pub readers: [Reader; MAX_READERS],
    /// Transactions that a new snapshot on the primary contains.
    pub visible: Transactions,
    /// Transactions that a new snapshot on the replica contains. Follows only where something reads it.
    pub replica: Transactions,
    /// Some read has returned a value that lacks a strict commit which had finished when the read began.
    pub stale_read: bool,
}

impl State {
    /// Version of the row in a new snapshot. Writers of versioned rows wait for each other, so exactly one of them has
    /// written what is visible.
    pub fn version_of_row(&self) -> u8 {
        let last = self
            .writers
            .iter()
            .find(|writer| writer.transaction == Transaction::Visible && writer.value == self.visible);
        last.map_or(0, |writer| writer.version)
    }

    /// Writers or readers of a kind are alike: renames them so that states that differ only in who is who become
    /// one state. Not every such pair is found, which costs states but never hides one.
    pub fn canonical(mut self, system: &System) -> Self {
        for end in (1..MAX_READERS).rev() {
            for reader in 0..end {
                if self.readers[reader] > self.readers[reader + 1] {
                    self.rename_readers(index(reader), index(reader + 1));
                }
            }
        }
        for end in (1..system.scenario.writers.len()).rev() {
            for writer in 0..end {
                let (one, other) = (index(writer), index(writer + 1));
                let alike = system.writer_kind(one) == system.writer_kind(other);
                if alike && self.compare_writers(one, other).is_gt() {
                    self.rename_writers(one, other);
                }
            }
        }
        self
    }

    /// Tells two writers apart by everything but their names.
    fn compare_writers(&self, one: u8, other: u8) -> Ordering {
        let progress = |index: u8| {
            let writer = &self.writers[usize::from(index)];
            (writer.client, writer.transaction, writer.delivered, writer.half_delivered)
        };
        progress(one).cmp(&progress(other)).then_with(|| self.traces(one).cmp(&self.traces(other)))
    }

    /// Where the transaction of a writer is to be found.
    fn traces(&self, index: u8) -> u8 {
        let mut traces = u8::from(self.key.marks.contains(index));
        let mut add = |set: Transactions| traces = traces << 1 | u8::from(set.contains(index));
        add(self.key.value.unwrap_or_default());
        for reader in &self.readers {
            add(reader.required);
            add(reader.value);
        }
        traces
    }

    fn rename_readers(&mut self, one: u8, other: u8) {
        self.readers.swap(one.into(), other.into());
        if let Guard::Lease(lease) = &mut self.key.guard {
            lease.token = match lease.token {
                token if token == one => other,
                token if token == other => one,
                token => token,
            };
        }
    }

    fn rename_writers(&mut self, one: u8, other: u8) {
        self.writers.swap(one.into(), other.into());
        let rename = |set: &mut Transactions| *set = set.renamed(one, other);
        self.key.value.iter_mut().for_each(rename);
        rename(&mut self.key.marks);
        rename(&mut self.visible);
        rename(&mut self.replica);
        self.writers.iter_mut().for_each(|writer| rename(&mut writer.value));
        for reader in &mut self.readers {
            rename(&mut reader.required);
            rename(&mut reader.value);
        }
    }
}

fn index(position: usize) -> u8 {
    u8::try_from(position).expect("there are only a few writers and readers")
}
