//! Marks: transactions about to commit a change to a key. While a key has one, no value of it can appear.

use std::time::Duration;

use deadpool_redis::redis::{Cmd, Pipeline};
use event::CacheKey;

use super::Redis;
use super::apply::{NAMES_PER_UNLINK, milliseconds};
use super::batch::{Group, read, requests};
use super::lease::MAX_STALE;
use crate::RedisError;
use crate::names::{Shard, guard, marks, parse_registry_member, registry_member, stale};
use crate::script::MARK;

/// Most forgotten marks returned at once from one registry.
const MAX_ORPHANS: usize = 1_000;

/// Names of a key that a mark is about: marks, guard, value and stale copy.
pub(super) const NAMES_PER_KEY: usize = 4;

/// Most keys marked in one step.
const KEYS_PER_MARK: usize = NAMES_PER_UNLINK / NAMES_PER_KEY;

/// Registries looked at in one pipeline: about a millisecond of a node's time.
const REGISTRIES_PER_PIPELINE: usize = 1_000;

impl Redis {
    /// Announces that transaction `xid` is about to commit changes to `keys`. One round trip per server.
    ///
    /// To be called after the last statement and before `COMMIT`. From its success until the mark is removed no reader
    /// finds a value, and no reader that is loading one now can store it. Marks have no TTL: a commit can become
    /// visible long after its client has died, and only Postgres knows whether it did.
    ///
    /// # Errors
    /// Any [`RedisError`], and then the transaction must not commit: some marks may be missing. Roll back, then
    /// [`unmark`](Self::unmark) as far as that is possible. What remains, or arrives late, costs hits until the resolver
    /// finds it by [`orphan_marks`](Self::orphan_marks), never a stale read.
    pub async fn mark(&self, keys: &[CacheKey], xid: u64) -> Result<(), RedisError> {
        let groups = self.group(keys, |key| key.as_str().as_bytes());
        self.run_all(&requests(&groups, |group| marking(group, xid))).await.map(drop)
    }

    /// Removes the marks of transaction `xid`, whose outcome must be known: committed and visible, or rolled back. One
    /// round trip per server. Returns how many were there.
    ///
    /// # Errors
    /// Any [`RedisError`]. Whatever is left is done by the transaction's event or by the resolver.
    pub async fn unmark(&self, keys: &[CacheKey], xid: u64) -> Result<u64, RedisError> {
        let marked: Vec<_> = keys.iter().map(|key| (key.as_str(), xid)).collect();
        self.remove_marks(&marked).await
    }

    /// Marks that have been there for longer than `older_than`, by the clock of Redis: their writer has probably died
    /// between marking and unmarking. At most a thousand per server, or per slot of a cluster.
    ///
    /// Ask Postgres about each (`pg_xact_status`) and [`resolve`](Self::resolve) those that are not in progress.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn orphan_marks(&self, older_than: Duration) -> Result<Vec<(CacheKey, u64)>, RedisError> {
        let until = self.now_ms().await?.saturating_sub(milliseconds(older_than));
        let mut orphans = Vec::new();
        for master in self.masters().await? {
            for shards in master.shards.chunks(REGISTRIES_PER_PIPELINE) {
                let answers = match self.pipeline_to(&master, listing(shards, until)).await {
                    // The registry of a slot that is moving may be at another node.
                    Err(error) if error.is_slot_moving() => self.run_singly(&listing(shards, until)).await,
                    answers => answers,
                };
                for answer in answers? {
                    let members: Vec<String> = read(answer)?;
                    orphans.extend(members.iter().filter_map(|member| parse_mark(member)));
                }
            }
        }
        Ok(orphans)
    }

    /// Removes the mark of a transaction of which Postgres has said that it is no longer in progress. The key is
    /// deleted first, whether it committed or not, so it does not matter if its event is still to come.
    ///
    /// # Errors
    /// Any [`RedisError`]; the mark stays and is listed again.
    pub async fn resolve(&self, key: &CacheKey, xid: u64) -> Result<(), RedisError> {
        self.remove_marks(&[(key.as_str(), xid)]).await.map(drop)
    }

    /// Deletes each key, then removes its mark, then its entry in the registry. In this order no mark goes before its
    /// key was deleted, and whatever is interrupted stays registered.
    pub(super) async fn remove_marks(&self, marked: &[(&str, u64)]) -> Result<u64, RedisError> {
        let groups = self.group(marked, |(key, _)| key.as_bytes());
        let answers = self.run_all(&requests(&groups, unmarking)).await?;
        let removals = groups.iter().zip(answers).flat_map(|(group, answers)| {
            let deletes = group.items.len().div_ceil(NAMES_PER_UNLINK / 2);
            answers.into_iter().skip(deletes).take(group.items.len())
        });
        removals.map(read::<u64>).sum()
    }

    async fn now_ms(&self) -> Result<u64, RedisError> {
        let mut time = Cmd::new();
        time.arg("TIME");
        let (seconds, microseconds): (u64, u64) = self.query(&time).await?;
        Ok(seconds * 1_000 + microseconds / 1_000)
    }
}

/// One step for up to so many keys as is short enough not to hold up other clients.
fn marking(group: &Group<&CacheKey>, xid: u64) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(group.items.len().div_ceil(KEYS_PER_MARK));
    for (nth, keys) in group.items.chunks(KEYS_PER_MARK).enumerate() {
        MARK.call_in(&mut pipeline, nth == 0).arg(keys.len() * NAMES_PER_KEY + 1).arg(group.shard.registry());
        for key in keys.iter().map(|key| key.as_str()) {
            pipeline.arg(marks(key)).arg(guard(key)).arg(key).arg(stale(key));
        }
        pipeline.arg(xid).arg(milliseconds(MAX_STALE));
        for key in keys {
            pipeline.arg(registry_member(key.as_str(), xid));
        }
    }
    pipeline
}

fn unmarking(group: &Group<&(&str, u64)>) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(group.items.len() * 2 + 2);
    for keys in group.items.chunks(NAMES_PER_UNLINK / 2) {
        pipeline.cmd("UNLINK");
        for (key, _) in keys {
            pipeline.arg(guard(key)).arg(*key);
        }
    }
    for (key, xid) in &group.items {
        pipeline.cmd("SREM").arg(marks(key)).arg(*xid);
    }
    for (key, xid) in &group.items {
        pipeline.cmd("ZREM").arg(group.shard.registry()).arg(registry_member(key, *xid));
    }
    pipeline
}

fn listing(shards: &[Shard], until_ms: u64) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(shards.len());
    for shard in shards {
        pipeline.cmd("ZRANGEBYSCORE").arg(shard.registry()).arg("-inf").arg(until_ms);
        pipeline.arg("LIMIT").arg(0).arg(MAX_ORPHANS);
    }
    pipeline
}

fn parse_mark(member: &str) -> Option<(CacheKey, u64)> {
    let (key, xid) = parse_registry_member(member)?;
    Some((CacheKey::new(key).ok()?, xid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_of_many_keys_is_one_command_so_that_no_part_of_it_can_come_late() {
        let keys: Vec<CacheKey> = (0..30).map(|n| CacheKey::new(format!("k:{n}")).unwrap()).collect();
        let group = Group { shard: Shard::Server, items: keys.iter().collect() };
        assert_eq!(marking(&group, 7).len(), 1);
    }
}
