//! What one look at the old marks has shown. Pure.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use cache::OldMark;
use event::TransactionId;
use event::nats::Outcome;

/// Most transactions remembered in one look. With more, some are asked about again.
const MAX_TRANSACTIONS: usize = 100_000;

/// The marks that were found, and what is known of their transactions.
#[derive(Debug, Default)]
pub(super) struct Look {
    marks: u64,
    oldest: Duration,
    outcomes: HashMap<TransactionId, Outcome>,
    /// Marks that stay, by transaction: their number and the age of the oldest.
    staying: HashMap<TransactionId, (u64, Duration)>,
}

/// The transaction whose marks have stayed the longest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocking {
    pub(super) transaction: TransactionId,
    /// How many keys it keeps from being cached.
    pub(super) keys: u64,
    pub(super) age: Duration,
    /// How many other transactions do the same.
    pub(super) others: usize,
    /// What a relay said of it, if one did.
    pub(super) outcome: Option<Outcome>,
}

impl Look {
    /// Transactions of the page that are not known yet, each once.
    pub(super) fn unknown(&self, page: &[OldMark]) -> Vec<TransactionId> {
        let transactions = page.iter().map(|old| old.mark.transaction());
        let unknown = transactions.filter(|transaction| !self.outcomes.contains_key(transaction));
        unknown.collect::<BTreeSet<_>>().into_iter().collect()
    }

    pub(super) fn learn(&mut self, outcomes: Vec<(TransactionId, Outcome)>) {
        if self.outcomes.len() + outcomes.len() > MAX_TRANSACTIONS {
            self.outcomes.clear();
        }
        self.outcomes.extend(outcomes);
    }

    /// Counts the marks of a page and returns those that may go, each with the outcome of its transaction.
    pub(super) fn take_ended(&mut self, page: Vec<OldMark>) -> Vec<(OldMark, &'static str)> {
        let mut ended = Vec::new();
        for old in page {
            self.marks += 1;
            self.oldest = self.oldest.max(old.age);
            let transaction = old.mark.transaction();
            match self.outcomes.get(&transaction).copied().and_then(name) {
                Some(outcome) => ended.push((old, outcome)),
                None => self.stays(transaction, old.age),
            }
        }
        ended
    }

    fn stays(&mut self, transaction: TransactionId, age: Duration) {
        if self.staying.len() >= MAX_TRANSACTIONS && !self.staying.contains_key(&transaction) {
            return;
        }
        let (keys, oldest) = self.staying.entry(transaction).or_default();
        *keys += 1;
        *oldest = age.max(*oldest);
    }

    /// How many old marks there were, those included that are gone now.
    pub(super) fn marks(&self) -> u64 {
        self.marks
    }

    /// Age of the oldest.
    pub(super) fn oldest(&self) -> Duration {
        self.oldest
    }

    pub(super) fn blocking(&self) -> Option<Blocking> {
        let longest = self.staying.iter().max_by_key(|(transaction, (_, age))| (*age, **transaction));
        longest.map(|(&transaction, &(keys, age))| Blocking {
            transaction,
            keys,
            age,
            others: self.staying.len() - 1,
            outcome: self.outcomes.get(&transaction).copied(),
        })
    }
}

/// The outcome as metrics name it, if the transaction has ended.
fn name(outcome: Outcome) -> Option<&'static str> {
    match outcome {
        Outcome::Committed => Some("committed"),
        Outcome::Aborted => Some("aborted"),
        Outcome::InProgress | Outcome::OtherHistory => None,
    }
}

#[cfg(test)]
mod tests {
    use cache::Mark;
    use event::CacheKey;

    use super::*;

    fn transaction(xid: u64) -> TransactionId {
        TransactionId { history: None, xid }
    }

    fn old(key: &str, xid: u64, seconds: u64) -> OldMark {
        let (key, mark) = (CacheKey::new(key).unwrap(), Mark::generate(transaction(xid)));
        OldMark { key, mark, age: Duration::from_secs(seconds) }
    }

    #[test]
    fn each_mark_goes_or_stays_by_the_outcome_of_its_own_transaction() {
        let mut look = Look::default();
        let page = vec![old("a", 4, 9), old("b", 3, 9), old("c", 2, 9), old("d", 1, 9), old("e", 5, 9)];
        look.learn(vec![
            (transaction(1), Outcome::InProgress),
            (transaction(2), Outcome::Aborted),
            (transaction(3), Outcome::OtherHistory),
            (transaction(4), Outcome::Committed),
        ]);
        let ended = look.take_ended(page);
        let ended: Vec<_> = ended.iter().map(|(old, outcome)| (old.key.as_str(), *outcome)).collect();
        assert_eq!(ended, [("a", "committed"), ("c", "aborted")]);
        assert_eq!(look.marks(), 5);
    }

    #[test]
    fn each_transaction_is_asked_about_once_however_many_marks_it_has() {
        let mut look = Look::default();
        let page = [old("a", 7, 9), old("b", 7, 9), old("c", 8, 9)];
        assert_eq!(look.unknown(&page), [transaction(7), transaction(8)]);
        look.learn(vec![(transaction(7), Outcome::InProgress)]);
        assert_eq!(look.unknown(&page), [transaction(8)]);
    }

    #[test]
    fn the_transaction_that_has_blocked_keys_the_longest_is_named() {
        let mut look = Look::default();
        assert_eq!(look.blocking(), None);
        look.learn(vec![(transaction(7), Outcome::InProgress), (transaction(9), Outcome::Committed)]);
        look.take_ended(vec![old("a", 8, 40), old("b", 7, 90), old("c", 7, 50), old("d", 9, 300)]);
        let blocking = look.blocking().unwrap();
        let (age, outcome) = (Duration::from_secs(90), Some(Outcome::InProgress));
        assert_eq!(blocking, Blocking { transaction: transaction(7), keys: 2, age, others: 1, outcome });
        assert_eq!(look.oldest(), Duration::from_secs(300));
    }
}
