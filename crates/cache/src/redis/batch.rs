//! Many keys in one round trip: the requests of each server together, those of different servers at the same time.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use deadpool_redis::redis::{FromRedisValue, Pipeline, Value, from_redis_value};
use futures::future::join_all;
use tokio::time::Instant;

use super::Redis;
use super::moving::SlotIsMoving;
use super::nodes::{Address, SlotMap};
use crate::RedisError;
use crate::names::Shard;
use crate::slot::slot_of;

/// Most commands sent to one server at once. Each write has its own limit of time, so that a batch of any size gets through
/// a server that is slow.
const COMMANDS_PER_WRITE: usize = 4_096;

/// Items whose keys can share a pipeline.
pub(super) struct Group<T> {
    pub(super) shard: Shard,
    pub(super) items: Vec<T>,
}

impl<T: Copy> Group<T> {
    /// Two groups, unless it has only one item.
    pub(super) fn halves(&self) -> Option<[Self; 2]> {
        let (one, other) = self.items.split_at(self.items.len() / 2);
        let half = |items: &[T]| Self { shard: self.shard, items: items.to_vec() };
        (!one.is_empty()).then(|| [half(one), half(other)])
    }
}

/// A pipeline and where all its keys live.
pub(super) struct Request {
    pub(super) shard: Shard,
    pub(super) pipeline: Pipeline,
}

/// One request per group.
pub(super) fn requests<T>(groups: &[Group<T>], pipeline: impl Fn(&Group<T>) -> Pipeline) -> Vec<Request> {
    groups.iter().map(|group| Request { shard: group.shard, pipeline: pipeline(group) }).collect()
}

impl Redis {
    /// Splits items by where the names they are about live.
    pub(super) fn group<T>(
        &self,
        items: impl IntoIterator<Item = T>,
        name: impl Fn(&T) -> &[u8],
    ) -> Vec<Group<T>> {
        if !self.is_cluster() {
            let items: Vec<T> = items.into_iter().collect();
            let groups = (!items.is_empty()).then_some(Group { shard: Shard::Server, items });
            return groups.into_iter().collect();
        }
        let mut slots: HashMap<u16, Vec<T>> = HashMap::new();
        for item in items {
            slots.entry(slot_of(name(&item))).or_default().push(item);
        }
        slots.into_iter().map(|(slot, items)| Group { shard: Shard::Slot(slot), items }).collect()
    }

    /// Sends all requests and returns the answers in the same order. What a moving slot has kept from being carried out
    /// is then done key by key. All is tried before the first failure is reported.
    pub(super) async fn run_all(&self, requests: &[Request]) -> Result<Vec<Vec<Value>>, RedisError> {
        self.try_all(requests).await.into_iter().collect()
    }

    /// As [`run_all`](Self::run_all), but says what became of each request.
    pub(super) async fn try_all(&self, requests: &[Request]) -> Vec<Result<Vec<Value>, RedisError>> {
        let mut outcomes = self.run_each(requests).await;
        let mut deadline = None;
        for (request, outcome) in requests.iter().zip(&mut outcomes) {
            let is_moving = outcome.as_ref().is_err_and(RedisError::is_slot_moving);
            // One by one they would take too long if none of them succeeds.
            if is_moving && deadline.is_none_or(|deadline| Instant::now() < deadline) {
                *outcome = self.run_singly(&request.pipeline).await;
                if outcome.is_err() {
                    deadline.get_or_insert_with(|| Instant::now() + self.limit);
                }
            }
        }
        outcomes
    }

    /// Sends all requests and returns what became of each, in the same order. Those about slots known to be moving are
    /// not sent. A server that does not answer holds up no other.
    pub(super) async fn run_each(&self, requests: &[Request]) -> Vec<Result<Vec<Value>, RedisError>> {
        let unsent = || Err(RedisError::unavailable("not sent"));
        let mut outcomes: Vec<_> = requests.iter().map(|_| unsent()).collect();
        self.run_some(requests, 0..requests.len(), &mut outcomes).await;
        let moved: Vec<usize> = (0..requests.len()).filter(|at| has_moved(&outcomes[*at])).collect();
        // The refusal has them looked up once more.
        self.run_some(requests, moved.into_iter(), &mut outcomes).await;
        for (request, outcome) in requests.iter().zip(&outcomes) {
            let is_moving = outcome.as_ref().is_err_and(RedisError::is_slot_moving);
            if is_moving && !self.lanes.moving().contains(request.shard) {
                self.lanes.moving().notice(request.shard);
            }
        }
        outcomes
    }

    async fn run_some(
        &self,
        requests: &[Request],
        which: impl Iterator<Item = usize>,
        outcomes: &mut [Result<Vec<Value>, RedisError>],
    ) {
        let mut which = which.peekable();
        let Some(first) = which.peek().copied() else { return };
        let map = match self.is_cluster() {
            true => self.slot_map().await,
            false => Ok(Arc::default()),
        };
        let map = match map {
            Ok(map) => map,
            Err(error) => return outcomes[first] = Err(error),
        };
        let mut by_node = BTreeMap::<Option<Address>, Vec<usize>>::new();
        for at in which {
            match self.place(&map, requests[at].shard) {
                Ok(node) => by_node.entry(node).or_default().push(at),
                Err(error) => outcomes[at] = Err(error),
            }
        }
        let running: Vec<_> =
            by_node.into_iter().map(|(node, which)| Box::pin(self.run_on(node, requests, which))).collect();
        for (at, outcome) in join_all(running).await.into_iter().flatten() {
            outcomes[at] = outcome;
        }
    }

    /// The node to ask about a shard.
    fn place(&self, map: &SlotMap, shard: Shard) -> Result<Option<Address>, RedisError> {
        match shard {
            Shard::Server => Ok(None),
            Shard::Slot(_) if self.lanes.moving().contains(shard) => {
                Err(RedisError::Unavailable(SlotIsMoving.into()))
            }
            Shard::Slot(slot) => self.owner(map, slot).map(Some),
        }
    }

    /// Sends requests to one server, in steps. After the first that gets no answer the others are not tried.
    async fn run_on(
        &self,
        node: Option<Address>,
        requests: &[Request],
        which: Vec<usize>,
    ) -> Vec<(usize, Result<Vec<Value>, RedisError>)> {
        let mut outcomes = Vec::with_capacity(which.len());
        for step in steps(&which, requests) {
            match self.write(node.as_ref(), requests, &which[step.clone()]).await {
                Ok(answers) => outcomes.extend(which[step].iter().copied().zip(answers)),
                Err(error) => {
                    outcomes.push((which[step.start], Err(error)));
                    break;
                }
            }
        }
        let given_up =
            || Err(RedisError::unavailable("given up since another request to the server has failed"));
        outcomes.extend(which[outcomes.len()..].iter().map(|at| (*at, given_up())).collect::<Vec<_>>());
        outcomes
    }

    async fn write(
        &self,
        node: Option<&Address>,
        requests: &[Request],
        which: &[usize],
    ) -> Result<Vec<Result<Vec<Value>, RedisError>>, RedisError> {
        let lane = self.lanes.get(node, self.limit).await?;
        let answers = match which {
            [at] => self.pipeline_on(&lane, &requests[*at].pipeline).await?,
            _ => self.pipeline_on(&lane, &joined(requests, which)).await?,
        };
        let mut answers = answers.into_iter();
        let outcomes = which.iter().map(|at| {
            let own: Vec<_> = answers.by_ref().take(requests[*at].pipeline.len()).collect();
            own.into_iter().map(|answer| self.answer(&lane, answer)).collect()
        });
        Ok(outcomes.collect())
    }
}

/// Whether the server said that the slot is another's now.
fn has_moved(outcome: &Result<Vec<Value>, RedisError>) -> bool {
    outcome.as_ref().is_err_and(RedisError::is_slot_moved)
}

/// The requests of `which` in order, cut where a write has enough commands.
fn steps(which: &[usize], requests: &[Request]) -> Vec<Range<usize>> {
    let mut steps = Vec::new();
    let (mut start, mut commands) = (0, 0);
    for (nth, at) in which.iter().enumerate() {
        let more = requests[*at].pipeline.len();
        if nth > start && commands + more > COMMANDS_PER_WRITE {
            steps.push(start..nth);
            (start, commands) = (nth, 0);
        }
        commands += more;
    }
    if start < which.len() {
        steps.push(start..which.len());
    }
    steps
}

fn joined(requests: &[Request], which: &[usize]) -> Pipeline {
    let mut all = Pipeline::with_capacity(which.iter().map(|at| requests[*at].pipeline.len()).sum());
    for at in which {
        for command in requests[*at].pipeline.cmd_iter() {
            all.add_command(command.clone());
        }
    }
    all
}

/// Reads an answer of Redis.
pub(super) fn read<T: FromRedisValue>(answer: Value) -> Result<T, RedisError> {
    from_redis_value(answer).map_err(|error| RedisError::Unexpected(error.into()))
}
