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

    /// There is nothing to publish up to here: confirmed at once while nothing is open, and otherwise together with what
    /// is. Any number in a row takes one entry.
    pub fn nothing(&mut self, lsn: Lsn) {
        match self.open.back_mut() {
            None => self.confirmed = self.confirmed.max(lsn),
            Some(last) if last.is_done => last.end_lsn = last.end_lsn.max(lsn),
            Some(_) => self.open.push_back(Entry { end_lsn: lsn, is_done: true }),
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
        ledger.nothing(Lsn(90));
        ledger.nothing(Lsn(99));
        assert_eq!(ledger.confirmed(), Lsn(0), "what is open lies before it");
        assert_eq!(ledger.len(), 2, "kept with what was done already");
        ledger.done(first);
        assert_eq!(ledger.confirmed(), Lsn(99));
        ledger.nothing(Lsn(110));
        assert_eq!(ledger.confirmed(), Lsn(110));
        let open = ledger.open(Lsn(115));
        (0..1_000).for_each(|more| ledger.nothing(Lsn(116 + more)));
        assert_eq!(ledger.len(), 2, "nothing to publish takes no room, however often");
        ledger.done(open);
        assert_eq!(ledger.confirmed(), Lsn(1_115));
        let third = ledger.open(Lsn(1_120));
        assert_eq!(ledger.len(), 1);
        ledger.done(third);
        assert_eq!(ledger.confirmed(), Lsn(1_120));
    }
}
