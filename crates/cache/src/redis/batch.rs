//! Many keys in one round trip: one pipeline for a server; for a cluster one per slot, all in flight together.

use std::collections::HashMap;
use std::time::Duration;

use deadpool_redis::redis::{FromRedisValue, Pipeline, Value, from_redis_value};
use futures::{Stream, StreamExt as _, stream};
use tokio::time::{Instant, timeout_at};

use super::Redis;
use super::lanes::Lane;
use super::moving::SlotIsMoving;
use crate::RedisError;
use crate::names::Shard;
use crate::slot::slot_of;

/// Most pipelines in flight at once on one connection to a cluster. While a node does not answer, the others get on as
/// long as there are fewer of its slots than this.
pub(super) const MAX_PIPELINES: usize = 8_192;

/// Once a request of a batch has failed, how much longer than one request all together may take. They are sent together, so
/// those that have no answer by then hardly get one.
const GRACE: Duration = Duration::from_millis(500);

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
        let (mut failure, mut deadline) = (None, None);
        for (request, answers) in requests.iter().zip(self.run_each(requests).await?) {
            let answers = match answers {
                // One by one they would take too long if none of them succeeds.
                Err(error)
                    if error.is_slot_moving()
                        && deadline.is_none_or(|deadline| Instant::now() < deadline) =>
                {
                    let answers = self.run_singly(&request.pipeline).await;
                    if answers.is_err() {
                        deadline.get_or_insert_with(|| Instant::now() + self.limit);
                    }
                    answers
                }
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
            return Ok(vec![self.run_one(lane, request, 0).await.1]);
        }
        // Collected before the stream is built: with the closure inside the stream the compiler cannot prove that the
        // future may be sent to another thread.
        let running: Vec<_> =
            requests.iter().enumerate().map(|(at, request)| self.run_one(lane, request, at)).collect();
        let mut running = stream::iter(running).buffer_unordered(MAX_PIPELINES);
        let given_up = || Err(RedisError::unavailable("given up since another request has failed"));
        let mut outcomes: Vec<_> = requests.iter().map(|_| given_up()).collect();
        let (began, mut deadline) = (Instant::now(), None);
        while let Some((at, outcome)) = next_before(&mut running, deadline).await {
            if outcome.as_ref().is_err_and(|error| !error.is_slot_moving()) {
                deadline = Some(began + self.limit + GRACE);
            }
            outcomes[at] = outcome;
        }
        Ok(outcomes)
    }

    async fn run_one(
        &self,
        lane: &Lane,
        request: &Request,
        at: usize,
    ) -> (usize, Result<Vec<Value>, RedisError>) {
        if self.lanes.moving().contains(request.shard) {
            return (at, Err(RedisError::Unavailable(SlotIsMoving.into())));
        }
        let answers = self.pipeline_on(lane, &request.pipeline).await;
        if answers.as_ref().is_err_and(RedisError::is_slot_moving) {
            self.lanes.moving().notice(request.shard);
        }
        (at, answers)
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
