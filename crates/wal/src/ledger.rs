use std::collections::VecDeque;

use pgwire_replication::Lsn;

/// Which transactions are published, so that only a position is confirmed before which everything is.
#[derive(Debug, Default)]
pub struct Ledger {
    open: VecDeque<Entry>,
    /// Number of the first of `open`.
    first: u64,
    confirmed: Lsn,
}

#[derive(Debug)]
struct Entry {
    end_lsn: Lsn,
    is_done: bool,
}

/// The place of a transaction in the [`Ledger`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

impl Ledger {
    /// Takes note of a transaction, in the order of the log.
    pub fn open(&mut self, end_lsn: Lsn) -> Ticket {
        self.open.push_back(Entry { end_lsn, is_done: false });
        Ticket(self.first + self.open.len() as u64 - 1)
    }

    /// Everything of the transaction is published.
    pub fn done(&mut self, ticket: Ticket) {
        let index = usize::try_from(ticket.0 - self.first).expect("open transactions fit in memory");
        self.open[index].is_done = true;
        while self.open.front().is_some_and(|entry| entry.is_done) {
            let entry = self.open.pop_front().expect("just looked at");
            self.first += 1;
            self.confirmed = self.confirmed.max(entry.end_lsn);
        }
    }

    /// The server has looked at the log up to here. It counts only while nothing is open, since what is open lies
    /// before it.
    pub fn keep_alive(&mut self, wal_end: Lsn) {
        if self.open.is_empty() {
            self.confirmed = self.confirmed.max(wal_end);
        }
    }

    /// Everything before it is published.
    #[must_use]
    pub fn confirmed(&self) -> Lsn {
        self.confirmed
    }

    /// How many transactions are not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether all are.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_confirmed_only_when_everything_before_it_is_done() {
        let mut ledger = Ledger::default();
        let first = ledger.open(Lsn(10));
        let second = ledger.open(Lsn(20));
        ledger.done(second);
        assert_eq!(ledger.confirmed(), Lsn(0));
        ledger.keep_alive(Lsn(99));
        assert_eq!(ledger.confirmed(), Lsn(0), "what is open lies before the keep-alive");
        ledger.done(first);
        assert_eq!(ledger.confirmed(), Lsn(20));
        ledger.keep_alive(Lsn(99));
        assert_eq!(ledger.confirmed(), Lsn(99));
        let third = ledger.open(Lsn(120));
        assert_eq!(ledger.len(), 1);
        ledger.done(third);
        assert_eq!(ledger.confirmed(), Lsn(120));
    }
}
