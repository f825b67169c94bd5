//! Many keys in one round trip: one pipeline for a server; for a cluster one per slot, all in flight together.

use std::collections::HashMap;

use deadpool_redis::redis::{FromRedisValue, Pipeline, Value, from_redis_value};
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::Redis;
use crate::RedisError;
use crate::names::Shard;
use crate::slot::slot_of;

/// Most pipelines in flight at once on one connection to a cluster.
const MAX_PIPELINES: usize = 256;

/// Items whose keys can share a pipeline.
pub(super) struct Group<T> {
    pub(super) shard: Shard,
    pub(super) items: Vec<T>,
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

    /// Sends one pipeline per group and returns the answers in the same order.
    pub(super) async fn run_all(&self, pipelines: Vec<Pipeline>) -> Result<Vec<Vec<Value>>, RedisError> {
        if pipelines.is_empty() {
            return Ok(Vec::new());
        }
        let lane = &self.lane().await?;
        if let [pipeline] = pipelines.as_slice() {
            return Ok(vec![self.pipeline_on(lane, pipeline).await?]);
        }
        // Collected before the stream is built: with the closure inside the stream the compiler cannot prove that the
        // future may be sent to another thread.
        let requests: Vec<_> = pipelines.iter().map(|pipeline| self.pipeline_on(lane, pipeline)).collect();
        stream::iter(requests).buffered(MAX_PIPELINES).try_collect().await
    }

    /// As [`run_all`](Self::run_all) where every answer is a number and only their sum matters.
    pub(super) async fn sum_all(&self, pipelines: Vec<Pipeline>) -> Result<u64, RedisError> {
        let answers = self.run_all(pipelines).await?;
        answers.into_iter().flatten().map(read::<u64>).sum()
    }
}

/// Reads an answer of Redis.
pub(super) fn read<T: FromRedisValue>(answer: Value) -> Result<T, RedisError> {
    from_redis_value(answer).map_err(|error| RedisError::Unexpected(error.into()))
}
