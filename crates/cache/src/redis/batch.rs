//! Many keys in one round trip: one pipeline for a server; for a cluster one per slot, all in flight together.

use std::collections::HashMap;

use deadpool_redis::redis::{FromRedisValue, Pipeline, Value, from_redis_value};
use futures::{Stream, StreamExt as _, stream};
use tokio::time::{Instant, timeout_at};

use super::Redis;
use super::lanes::Lane;
use super::moving::SlotIsMoving;
use crate::RedisError;
use crate::names::Shard;
use crate::slot::slot_of;

/// Most pipelines in flight at once on one connection to a cluster.
pub(super) const MAX_PIPELINES: usize = 256;

/// Items whose keys can share a pipeline.
pub(super) struct Group<T> {
    pub(super) shard: Shard,
    pub(super) items: Vec<T>,
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

/// The next outcome; `None` at the end, or when the time is up. One failure must not keep the others from being carried
/// out, but where a node is down all its slots fail, and there are thousands.
async fn next_before<S: Stream + Unpin>(outcomes: &mut S, deadline: Option<Instant>) -> Option<S::Item> {
    match deadline {
        None => outcomes.next().await,
        Some(deadline) => timeout_at(deadline, outcomes.next()).await.ok().flatten(),
    }
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
        let mut all = Vec::with_capacity(requests.len());
        let mut failure = None;
        for (request, answers) in requests.iter().zip(self.run_each(requests).await?) {
            let answers = match answers {
                Err(error) if error.is_slot_moving() => self.run_singly(&request.pipeline).await,
                answers => answers,
            };
            match answers {
                Ok(answers) => all.push(answers),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(all), Err)
    }

    /// Sends all requests and returns what became of each, in the same order. Those about slots known to be moving are
    /// not sent. An error if there is no connection.
    pub(super) async fn run_each(
        &self,
        requests: &[Request],
    ) -> Result<Vec<Result<Vec<Value>, RedisError>>, RedisError> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let lane = &self.lane().await?;
        if let [request] = requests {
            return Ok(vec![self.run_one(lane, request).await]);
        }
        // Collected before the stream is built: with the closure inside the stream the compiler cannot prove that the
        // future may be sent to another thread.
        let running: Vec<_> = requests.iter().map(|request| self.run_one(lane, request)).collect();
        let mut running = stream::iter(running).buffered(MAX_PIPELINES);
        let mut outcomes = Vec::with_capacity(requests.len());
        let mut deadline = None;
        while let Some(outcome) = next_before(&mut running, deadline).await {
            if outcome.as_ref().is_err_and(|error| !error.is_slot_moving()) {
                deadline.get_or_insert_with(|| Instant::now() + self.limit);
            }
            outcomes.push(outcome);
        }
        let given_up = || Err(RedisError::unavailable("given up since another request has failed"));
        outcomes.resize_with(requests.len(), given_up);
        Ok(outcomes)
    }

    async fn run_one(&self, lane: &Lane, request: &Request) -> Result<Vec<Value>, RedisError> {
        if self.lanes.moving().contains(request.shard) {
            return Err(RedisError::Unavailable(SlotIsMoving.into()));
        }
        let answers = self.pipeline_on(lane, &request.pipeline).await;
        if answers.as_ref().is_err_and(RedisError::is_slot_moving) {
            self.lanes.moving().notice(request.shard);
        }
        answers
    }

    /// As [`run_all`](Self::run_all) where every answer is a number and only their sum matters.
    pub(super) async fn sum_all(&self, requests: &[Request]) -> Result<u64, RedisError> {
        let answers = self.run_all(requests).await?;
        answers.into_iter().flatten().map(read::<u64>).sum()
    }
}

/// Reads an answer of Redis.
pub(super) fn read<T: FromRedisValue>(answer: Value) -> Result<T, RedisError> {
    from_redis_value(answer).map_err(|error| RedisError::Unexpected(error.into()))
}
