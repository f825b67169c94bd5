use std::sync::LazyLock;

use deadpool_redis::redis::{Pipeline, Script, Value, from_redis_value};

use super::Redis;
use super::batch::Group;
use crate::names::{self, guard, marks};
use crate::work::{Asked, Update};
use crate::{RedisError, Work};

/// Names per `UNLINK`, two per key: long enough to be cheap, short enough not to hold up other clients.
const NAMES_PER_UNLINK: usize = 1_000;

/// Most marks looked at to find those of a batch. A longer registry means that every mark of the batch is removed
/// without looking.
const REGISTRY_WINDOW: isize = 1_000;

const APPLY_TEXT: &str = include_str!("../scripts/apply.lua");
static APPLY: LazyLock<Script> = LazyLock::new(|| Script::new(APPLY_TEXT));

/// What a batch changed in the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Names that were there and are gone. A value whose version is known counts twice, with its guard.
    pub deleted: u64,
    /// Values replaced by a newer version.
    pub updated: u64,
    /// Updates that found the same or a newer version cached.
    pub ignored: u64,
    /// Marks of transactions removed because their event has now done what the mark stood for.
    pub unmarked: u64,
}

type Item<'a> = (&'a str, &'a Asked);

impl Redis {
    /// Carries out a batch: removes value and guard of every key, applies updates, then removes the marks that the
    /// transactions of the batch still have. One round trip per server, and a second one only if there are such marks.
    ///
    /// When it returns without an error every key of the batch is invalidated on the master. Doing it again does no
    /// harm, so after an error the whole batch is simply repeated.
    ///
    /// # Errors
    /// Any [`RedisError`]. Parts of the batch may have been carried out.
    pub async fn apply(&self, work: &Work) -> Result<Applied, RedisError> {
        let mut applied = Applied::default();
        if work.is_empty() {
            return Ok(applied);
        }
        let groups = self.group(work.iter().map(|(key, _, asked)| (key, (key, asked))));
        let pipelines = groups.iter().map(invalidation).collect();
        let mut marked = Vec::new();
        for (group, answers) in groups.iter().zip(self.run_all(pipelines).await?) {
            let registry = count(group, answers, &mut applied)?;
            marked.extend(marks_to_remove(work, group, &registry));
        }
        applied.unmarked = self.remove_marks(marked).await?;
        Ok(applied)
    }
}

/// `UNLINK`s, then updates, then a look at the registry of marks.
///
/// Reading the registry after the deletes is what makes it safe to leave all other marks alone: a mark is registered
/// before its transaction commits, so before its event exists. If it is not listed now, its writer or the resolver has
/// already removed it, having deleted the key first.
fn invalidation(group: &Group<Item<'_>>) -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(group.items.len() / NAMES_PER_UNLINK + 2);
    let mut deletes = group.items.iter().filter(|(_, asked)| matches!(asked, Asked::Delete)).peekable();
    while deletes.peek().is_some() {
        pipeline.cmd("UNLINK");
        for (key, _) in deletes.by_ref().take(NAMES_PER_UNLINK / 2) {
            pipeline.arg(guard(key)).arg(*key);
        }
    }
    let mut first = true;
    for (key, asked) in &group.items {
        if let Asked::Update(update) = asked {
            add_update(&mut pipeline, key, update, first);
            first = false;
        }
    }
    pipeline.cmd("ZRANGE").arg(&group.registry).arg(0).arg(REGISTRY_WINDOW - 1);
    pipeline
}

/// The first call brings the script's text, which also loads it for the rest of the pipeline: a restarted server never
/// answers `NOSCRIPT` in the middle of a batch.
fn add_update(pipeline: &mut Pipeline, key: &str, update: &Update, first: bool) {
    if first {
        pipeline.cmd("EVAL").arg(APPLY_TEXT);
    } else {
        pipeline.cmd("EVALSHA").arg(APPLY.get_hash());
    }
    let ttl_ms = u64::try_from(update.ttl.as_millis()).unwrap_or(u64::MAX);
    pipeline.arg(3).arg(key).arg(guard(key)).arg(marks(key));
    pipeline.arg(update.value.as_slice()).arg(update.version).arg(ttl_ms);
}

/// Adds up a group's answers and returns the last, the registry's members.
fn count(
    group: &Group<Item<'_>>,
    mut answers: Vec<Value>,
    applied: &mut Applied,
) -> Result<Vec<String>, RedisError> {
    let updates = group.items.iter().filter(|(_, asked)| matches!(asked, Asked::Update(_))).count();
    let registry = answers.pop().ok_or_else(|| RedisError::unexpected("fewer answers than commands"))?;
    let deletes = answers.len().saturating_sub(updates);
    for (at, answer) in answers.into_iter().enumerate() {
        let number: i64 = from_redis_value(answer).map_err(|error| RedisError::Unexpected(error.into()))?;
        match number {
            deleted if at < deletes => applied.deleted += u64::try_from(deleted).unwrap_or(0),
            1 => applied.updated += 1,
            0 => applied.ignored += 1,
            _ => {}
        }
    }
    from_redis_value(registry).map_err(|error| RedisError::Unexpected(error.into()))
}

/// The marks among `registry` that belong to a transaction of the batch.
fn marks_to_remove(work: &Work, group: &Group<Item<'_>>, registry: &[String]) -> Vec<(String, u64)> {
    if registry.is_empty() || work.transactions.is_empty() {
        return Vec::new();
    }
    if registry.len() >= REGISTRY_WINDOW.unsigned_abs() {
        return all_transactions(work, group);
    }
    registry
        .iter()
        .filter_map(|member| names::parse_registry_member(member))
        .filter(|(key, xid)| work.position(key).is_some_and(|at| work.transactions.contains(&(at, *xid))))
        .map(|(key, xid)| (key.to_owned(), xid))
        .collect()
}

fn all_transactions(work: &Work, group: &Group<Item<'_>>) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    for (key, _) in &group.items {
        if let Some(at) = work.position(key) {
            let of_key = work.transactions.iter().filter(|(changed, _)| *changed == at);
            all.extend(of_key.map(|&(_, xid)| ((*key).to_owned(), xid)));
        }
    }
    all
}

impl Redis {
    /// Deletes each key once more, then removes its mark, then its entry in the registry: in this order whatever is
    /// interrupted leaves a mark that the resolver finds, and no mark goes before the key was deleted.
    pub(crate) async fn remove_marks(&self, marked: Vec<(String, u64)>) -> Result<u64, RedisError> {
        if marked.is_empty() {
            return Ok(0);
        }
        let groups = self.group(marked.iter().map(|(key, xid)| (key.as_str(), (key.as_str(), *xid))));
        let pipelines = groups
            .iter()
            .map(|group| {
                let mut pipeline = Pipeline::with_capacity(group.items.len() * 3);
                for (key, xid) in &group.items {
                    pipeline.cmd("UNLINK").arg(guard(key)).arg(*key).ignore();
                    pipeline.cmd("SREM").arg(marks(key)).arg(*xid);
                    pipeline.cmd("ZREM").arg(&group.registry).arg(names::registry_member(key, *xid)).ignore();
                }
                pipeline
            })
            .collect();
        let mut removed = 0;
        for answer in self.run_all(pipelines).await?.into_iter().flatten() {
            removed +=
                from_redis_value::<u64>(answer).map_err(|error| RedisError::Unexpected(error.into()))?;
        }
        Ok(removed)
    }
}
