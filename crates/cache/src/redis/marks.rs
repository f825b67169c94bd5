//! Marks: transactions about to commit a change to a key. While a key has one, no value of it can appear.

use deadpool_redis::redis::Pipeline;
use event::CacheKey;

use super::Redis;
use super::apply::{NAMES_PER_UNLINK, milliseconds};
use super::batch::{Group, read, requests};
use super::lease::MAX_STALE;
use crate::names::{guard, marks, stale};
use crate::script::MARK;
use crate::{Mark, RedisError};

/// Names of a key that a mark is about: marks, guard, value and stale copy.
pub(super) const NAMES_PER_KEY: usize = 4;

/// Most keys marked in one step.
const KEYS_PER_MARK: usize = NAMES_PER_UNLINK / NAMES_PER_KEY;

impl Redis {
    /// Announces by `mark` that its transaction is about to commit changes to `keys`. One round trip per server.
    ///
    /// To be called after the last statement and before `COMMIT`. From its success until the mark is removed no reader
    /// finds a value, and no reader that is loading one now can store it. Marks have no TTL: a commit can become
    /// visible long after its client has died, and only Postgres knows whether it did.
    ///
    /// # Errors
    /// Any [`RedisError`], and then the transaction must not commit: some marks may be missing. Roll back, then
    /// [`unmark`](Self::unmark) as far as that is possible. What remains, or arrives late, costs hits until the resolver
    /// finds it by [`old_marks`](Self::old_marks), never a stale read.
    pub async fn mark(&self, keys: &[CacheKey], mark: Mark) -> Result<(), RedisError> {
        let groups = self.group(keys, |key| key.as_str().as_bytes());
        self.run_all(&requests(&groups, |group| marking(group, mark))).await.map(drop)
    }

    /// Removes `mark` from `keys`. The outcome of its transaction must be known: committed and visible, or rolled back.
    /// One round trip per server. Returns how many were there. No other mark is removed, not even one of a later
    /// transaction with the same id.
    ///
    /// # Errors
    /// Any [`RedisError`]. Whatever is left is done by the transaction's event or by the resolver.
    pub async fn unmark(&self, keys: &[CacheKey], mark: Mark) -> Result<u64, RedisError> {
        let marked: Vec<_> = keys.iter().map(|key| (key.as_str(), mark)).collect();
        self.remove_marks(&marked).await
    }

    /// Removes marks of transactions of which Postgres has said that they are no longer in progress. Each key is
    /// deleted first, whether the transaction committed or not, so it does not matter if its event is still to come.
    ///
    /// # Errors
    /// Any [`RedisError`]; what is left is listed again.
    pub async fn resolve(&self, ended: &[(CacheKey, Mark)]) -> Result<u64, RedisError> {
        let marked: Vec<_> = ended.iter().map(|(key, mark)| (key.as_str(), *mark)).collect();
        self.remove_marks(&marked).await
    }

    /// Deletes each key, then removes its mark, then its entry in the registry. In this order no mark goes before its
    /// key was deleted, and whatever is interrupted stays registered.
    pub(super) async fn remove_marks(&self, marked: &[(&str, Mark)]) -> Result<u64, RedisError> {
        let groups = self.group(marked, |(key, _)| key.as_bytes());
        let answers = self.run_all(&requests(&groups, unmarking)).await?;
        let removals = groups.iter().zip(answers).flat_map(|(group, answers)| {
            let deletes = group.items.len().div_ceil(NAMES_PER_UNLINK / 2);
            answers.into_iter().skip(deletes).take(group.items.len())
        });
        removals.map(read::<u64>).sum()
    }
}

/// One step for up to so many keys as is short enough not to hold up other clients.
fn marking(group: &Group<&CacheKey>, mark: Mark) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(group.items.len().div_ceil(KEYS_PER_MARK));
    for (nth, keys) in group.items.chunks(KEYS_PER_MARK).enumerate() {
        MARK.call_in(&mut pipeline, nth == 0).arg(keys.len() * NAMES_PER_KEY + 1).arg(group.shard.registry());
        for key in keys.iter().map(|key| key.as_str()) {
            pipeline.arg(marks(key)).arg(guard(key)).arg(key).arg(stale(key));
        }
        pipeline.arg(mark.to_string()).arg(milliseconds(MAX_STALE));
        for key in keys {
            pipeline.arg(mark.member(key.as_str()));
        }
    }
    pipeline
}

fn unmarking(group: &Group<&(&str, Mark)>) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(group.items.len() * 2 + 2);
    for keys in group.items.chunks(NAMES_PER_UNLINK / 2) {
        pipeline.cmd("UNLINK");
        for (key, _) in keys {
            pipeline.arg(guard(key)).arg(*key);
        }
    }
    for (key, mark) in &group.items {
        pipeline.cmd("SREM").arg(marks(key)).arg(mark.to_string());
    }
    for (key, mark) in &group.items {
        pipeline.cmd("ZREM").arg(group.shard.registry()).arg(mark.member(key));
    }
    pipeline
}

#[cfg(test)]
mod tests {
    use event::TransactionId;

    use super::*;
    use crate::names::Shard;

    #[test]
    fn a_mark_of_many_keys_is_one_command_so_that_no_part_of_it_can_come_late() {
        let keys: Vec<CacheKey> = (0..30).map(|n| CacheKey::new(format!("k:{n}")).unwrap()).collect();
        let group = Group { shard: Shard::Server, items: keys.iter().collect() };
        let mark = Mark::generate(TransactionId { history: None, xid: 7 });
        assert_eq!(marking(&group, mark).len(), 1);
    }
}
