use deadpool_redis::redis::{Pipeline, Value};
use event::CacheKey;

use super::batch::{Group, read, requests};
use super::lease::MAX_STALE;
use super::{Outcome, Redis, Undone};
use crate::names::{Shard, guard, marks, stale};
use crate::script::{APPLY, LIMIT_STALE};
use crate::work::{Item, Update};
use crate::{Mark, RedisError, Work};

/// Names per `UNLINK`, two per key: long enough to be cheap, short enough not to hold up other clients.
pub(super) const NAMES_PER_UNLINK: usize = 1_000;

/// Most keys of one server that are invalidated before it has answered.
const KEYS_PER_STEP: usize = 2_000;

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
    /// stale copies. A large batch is sent in steps.
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
        let mut outcome = self.apply_keys(work).await;
        if !work.namespaces().is_empty() {
            match self.delete_namespaces(work.namespaces()).await {
                Err(error @ RedisError::KeysRefused { .. }) => {
                    let keys = work.namespaces().iter().map(ToString::to_string).collect();
                    outcome.undone.push(Undone { keys, node: String::new(), error });
                }
                Ok(deleted) => outcome.applied.deleted += deleted,
                Err(error) => return Err(error),
            }
        }
        outcome.into_result()
    }

    /// As [`apply`](Self::apply) without the namespaces, and says of each key whether it is done: a server of a cluster that
    /// does not answer, or a key that the user may not touch, holds up no other key.
    pub async fn apply_keys(&self, work: &Work) -> Outcome {
        let mut outcome = Outcome::default();
        let mut refused = Vec::new();
        let mut groups = in_steps(self.group(work.items(), |item| item.key.as_bytes()));
        // One key that the user may not touch has its whole command refused. It is found by halving.
        while !groups.is_empty() {
            let answers = self.try_all(&requests(&groups, invalidation)).await;
            let mut done = Vec::new();
            for (group, answers) in std::mem::take(&mut groups).into_iter().zip(answers) {
                match answers.and_then(|answers| count(&group, answers, &mut outcome.applied)) {
                    Ok(shown) => done.push((group, shown)),
                    Err(error) if error.is_about_keys() => match group.halves() {
                        Some(halves) => groups.extend(halves),
                        None => refused.extend(names_in(&group)),
                    },
                    Err(error) => outcome.add(self.node_of(group.shard), names_in(&group), error),
                }
            }
            self.finish(work, done, &mut outcome).await;
        }
        outcome.refuse(refused);
        outcome
    }

    /// What remains to be done for keys that are deleted.
    async fn finish(&self, work: &Work, done: Vec<(Group<&Item>, Shown)>, outcome: &mut Outcome) {
        let own = match self.marks_of(work, &done).await {
            Ok(own) => own,
            Err(error) => return self.undo(done.iter().map(|(group, _)| group), error, outcome),
        };
        match self.remove_marks(&own).await {
            Ok(removed) => outcome.applied.unmarked += removed,
            Err(error) => {
                let node = own.first().map_or_else(String::new, |(key, _)| self.node_of_key(key));
                outcome.add(node, own.iter().map(|(key, _)| (*key).to_owned()), error);
            }
        }
        let with_copies = done.into_iter().filter(|(_, shown)| shown.has_stale_copies);
        let with_copies: Vec<_> = with_copies.map(|(group, _)| group).collect();
        let limited = self.try_all(&requests(&with_copies, limit_stale_copies)).await;
        for (group, limited) in with_copies.iter().zip(limited) {
            if let Err(error) = limited {
                outcome.add(self.node_of(group.shard), names_in(group), error);
            }
        }
    }

    /// Counts groups as not done, for a reason that may concern any of them.
    fn undo<'a>(
        &self,
        groups: impl Iterator<Item = &'a Group<&'a Item>>,
        error: RedisError,
        outcome: &mut Outcome,
    ) {
        let mut groups = groups.peekable();
        let node = groups.peek().map_or_else(String::new, |group| self.node_of(group.shard));
        outcome.add(node, groups.flat_map(names_in), error);
    }

    /// The marks that the transactions of the batch still have on keys that are done.
    async fn marks_of<'a>(
        &self,
        work: &Work,
        done: &'a [(Group<&'a Item>, Shown)],
    ) -> Result<Vec<(&'a str, Mark)>, RedisError> {
        if !work.has_transactions() || done.iter().all(|(_, shown)| shown.registry.is_empty()) {
            return Ok(Vec::new());
        }
        if done.iter().any(|(_, shown)| shown.registry.len() >= REGISTRY_WINDOW) {
            let items = done.iter().flat_map(|(group, _)| &group.items);
            let found = self.marks_on(items.map(|item| &*item.key)).await?;
            return Ok(work.marks_among(&found));
        }
        let members = done.iter().flat_map(|(_, shown)| &shown.registry);
        let registered: Vec<_> = members.filter_map(|member| Mark::parse_member(member)).collect();
        Ok(work.marks_among(&registered))
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
}

/// From now on these keys' stale copies live no longer than a reader may be served one.
fn limit_stale_copies(group: &Group<&Item>) -> Pipeline {
    let longest_ms = milliseconds(MAX_STALE);
    let mut pipeline = Pipeline::with_capacity(group.items.len());
    for (at, item) in group.items.iter().enumerate() {
        LIMIT_STALE.call_in(&mut pipeline, at == 0).arg(1).arg(stale(&item.key)).arg(longest_ms);
    }
    pipeline
}

fn names_in(group: &Group<&Item>) -> impl Iterator<Item = String> {
    group.items.iter().map(|item| item.key.to_string())
}

/// Cuts groups into such that are carried out in one step.
fn in_steps(groups: Vec<Group<&Item>>) -> Vec<Group<&Item>> {
    let cut = |group: Group<_>| {
        let shard = group.shard;
        let steps: Vec<Vec<&Item>> = group.items.chunks(KEYS_PER_STEP).map(<[_]>::to_vec).collect();
        steps.into_iter().map(move |items| Group { shard, items })
    };
    groups.into_iter().flat_map(cut).collect()
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
