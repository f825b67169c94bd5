use deadpool_redis::redis::{Pipeline, Value};
use event::CacheKey;

use super::Redis;
use super::batch::{Group, read, requests};
use super::flush::beginning_with;
use super::lease::MAX_STALE;
use crate::names::{Shard, guard, marks, stale};
use crate::script::{APPLY, LIMIT_STALE};
use crate::work::{Item, Update};
use crate::{Mark, RedisError, Work};

/// Names per `UNLINK`, two per key: long enough to be cheap, short enough not to hold up other clients.
pub(super) const NAMES_PER_UNLINK: usize = 1_000;

/// Most marks looked at to find those of a batch. With more in a registry the marks of every key of the batch are
/// looked at, one command per key.
const REGISTRY_WINDOW: usize = 1_000;

/// What a batch changed in the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Names that were there and are gone: values, and guards (leases in flight, versions of values).
    pub deleted: u64,
    /// Values replaced by a newer version.
    pub updated: u64,
    /// Updates that found the same or a newer version cached.
    pub ignored: u64,
    /// Marks removed because the event of their transaction has now done what the mark stood for.
    pub unmarked: u64,
}

/// What one shard says besides the counts.
struct Shown {
    registry: Vec<String>,
    has_stale_copies: bool,
}

impl Redis {
    /// Carries out a batch: removes value and guard of every key, applies updates, then removes the marks that the
    /// transactions of the batch still have. One round trip per server; a second one only if there are such marks or
    /// stale copies.
    ///
    /// Namespaces of the batch are searched for in the whole cache, in steps: that takes as long as it takes.
    ///
    /// When it returns without an error every key of the batch is invalidated on the master. Doing it again does no
    /// harm, so after an error the whole batch is simply repeated.
    ///
    /// # Errors
    /// Any [`RedisError`]. Parts of the batch may have been carried out; after [`RedisError::KeysRefused`] all but the keys
    /// that it is about.
    pub async fn apply(&self, work: &Work) -> Result<Applied, RedisError> {
        let mut applied = Applied::default();
        let mut refused = Vec::new();
        // One key that the user may not touch has its whole command refused. It is found by halving.
        let mut parts = vec![work.items()];
        while let Some(part) = parts.pop() {
            match self.apply_part(part, work, &mut applied).await {
                Err(error) if error.is_about_keys() => match part {
                    [item] => refused.push(&*item.key),
                    _ => parts.extend(<[_; 2]>::from(part.split_at(part.len() / 2))),
                },
                outcome => outcome?,
            }
        }
        if !work.namespaces().is_empty() {
            let namespaces: Vec<_> = work.namespaces().iter().map(beginning_with).collect();
            match self.delete_matching(&namespaces).await {
                Err(error) if error.is_about_keys() => {
                    refused.extend(work.namespaces().iter().map(CacheKey::as_str))
                }
                deleted => applied.deleted += deleted?,
            }
        }
        if refused.is_empty() { Ok(applied) } else { Err(keys_refused(&refused)) }
    }

    async fn apply_part(&self, items: &[Item], work: &Work, applied: &mut Applied) -> Result<(), RedisError> {
        let groups = self.group(items, |item| item.key.as_bytes());
        let answers = self.run_all(&requests(&groups, invalidation)).await?;
        let mut registries = Vec::new();
        let mut with_stale_copies = Vec::new();
        for (group, answers) in groups.into_iter().zip(answers) {
            let shown = count(&group, answers, applied)?;
            registries.push(shown.registry);
            if shown.has_stale_copies {
                with_stale_copies.push(group);
            }
        }
        self.limit_stale_copies(&with_stale_copies).await?;
        applied.unmarked += self.remove_marks_of(work, items, &registries).await?;
        Ok(())
    }

    /// Removes the marks that the transactions of the batch still have on `items`. Says how many.
    async fn remove_marks_of(
        &self,
        work: &Work,
        items: &[Item],
        registries: &[Vec<String>],
    ) -> Result<u64, RedisError> {
        if !work.has_transactions() || registries.iter().all(Vec::is_empty) {
            return Ok(0);
        }
        if registries.iter().any(|registry| registry.len() >= REGISTRY_WINDOW) {
            let found = self.marks_on(items.iter().map(|item| &*item.key)).await?;
            return self.remove_marks(&work.marks_among(&found)).await;
        }
        let members = registries.iter().flatten();
        let registered: Vec<_> = members.filter_map(|member| Mark::parse_member(member)).collect();
        self.remove_marks(&work.marks_among(&registered)).await
    }

    /// Every mark on these keys.
    async fn marks_on<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<(&'a str, Mark)>, RedisError> {
        let groups = self.group(keys, |key| key.as_bytes());
        let listing = |group: &Group<&str>| {
            let mut pipeline = Pipeline::with_capacity(group.items.len());
            for &key in &group.items {
                pipeline.cmd("SMEMBERS").arg(marks(key));
            }
            pipeline
        };
        let answers = self.run_all(&requests(&groups, listing)).await?;
        let mut found = Vec::new();
        for (group, answers) in groups.into_iter().zip(answers) {
            for (key, answer) in group.items.into_iter().zip(answers) {
                let texts: Vec<String> = read(answer)?;
                found.extend(texts.iter().filter_map(|text| Some((key, Mark::parse(text)?))));
            }
        }
        Ok(found)
    }

    /// Invalidates keys now, as the event of the same change will do again. Returns how many names were there.
    ///
    /// # Errors
    /// Any [`RedisError`]. Some keys may have been invalidated.
    pub async fn invalidate(&self, keys: &[CacheKey]) -> Result<u64, RedisError> {
        let mut work = Work::new();
        for key in keys {
            work.delete(key);
        }
        Ok(self.apply(&work).await?.deleted)
    }

    /// From now on these keys' stale copies live no longer than a reader may be served one.
    async fn limit_stale_copies(&self, groups: &[Group<&Item>]) -> Result<(), RedisError> {
        let longest_ms = milliseconds(MAX_STALE);
        let limit = |group: &Group<&Item>| {
            let mut pipeline = Pipeline::with_capacity(group.items.len());
            for (at, item) in group.items.iter().enumerate() {
                LIMIT_STALE.call_in(&mut pipeline, at == 0).arg(1).arg(stale(&item.key)).arg(longest_ms);
            }
            pipeline
        };
        self.run_all(&requests(groups, limit)).await.map(drop)
    }
}

fn keys_refused(keys: &[&str]) -> RedisError {
    const NAMED: usize = 3;
    let mut what = keys.iter().take(NAMED).map(|key| format!("{key:?}")).collect::<Vec<_>>().join(", ");
    if keys.len() > NAMED {
        what = format!("{what} and {} more", keys.len() - NAMED);
    }
    RedisError::KeysRefused { what }
}

/// `UNLINK`s, then updates, then a look at the registry of marks and at whether there are stale copies.
///
/// Looking at the registry only after the deletes is what makes it safe to leave all other marks alone: a mark is
/// registered before its transaction commits, so before its event exists. If it is not listed now, its writer or the
/// resolver has already removed it, having deleted the key first.
fn invalidation(group: &Group<&Item>) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(group.items.len() / NAMES_PER_UNLINK * 2 + 3);
    let mut deletes = group.items.iter().filter(|item| item.update.is_none()).peekable();
    while deletes.peek().is_some() {
        pipeline.cmd("UNLINK");
        for item in deletes.by_ref().take(NAMES_PER_UNLINK / 2) {
            pipeline.arg(guard(&item.key)).arg(&*item.key);
        }
    }
    for (at, (item, update)) in updates(group).enumerate() {
        add_update(&mut pipeline, item, update, at == 0);
    }
    add_look(&mut pipeline, group.shard);
    pipeline
}

fn updates<'a>(group: &'a Group<&Item>) -> impl Iterator<Item = (&'a Item, &'a Update)> {
    group.items.iter().filter_map(|item| Some((*item, item.update.as_ref()?)))
}

fn add_update(pipeline: &mut Pipeline, item: &Item, update: &Update, first: bool) {
    let key = &*item.key;
    let call = APPLY.call_in(pipeline, first).arg(3).arg(key).arg(guard(key)).arg(marks(key));
    call.arg(update.value.as_slice()).arg(update.version).arg(milliseconds(update.ttl));
}

fn add_look(pipeline: &mut Pipeline, shard: Shard) {
    pipeline.cmd("ZRANGE").arg(shard.registry()).arg(0).arg(REGISTRY_WINDOW - 1);
    pipeline.cmd("EXISTS").arg(shard.has_stale_copies());
}

/// Adds up a group's answers and returns what its shard shows.
fn count(group: &Group<&Item>, mut answers: Vec<Value>, applied: &mut Applied) -> Result<Shown, RedisError> {
    let (Some(has_stale_copies), Some(registry)) = (answers.pop(), answers.pop()) else {
        return Err(RedisError::unexpected("fewer answers than commands"));
    };
    let deletes = answers.len().saturating_sub(updates(group).count());
    let updates = answers.split_off(deletes);
    for answer in answers {
        applied.deleted += read::<u64>(answer)?;
    }
    for answer in updates {
        match read::<i64>(answer)? {
            1 => applied.updated += 1,
            0 => applied.ignored += 1,
            _ => {}
        }
    }
    Ok(Shown { registry: read(registry)?, has_stale_copies: read(has_stale_copies)? })
}

/// A duration as Redis takes it. Zero would be an error to it.
pub(super) fn milliseconds(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}
