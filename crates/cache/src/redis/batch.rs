//! Many keys in one round trip: one pipeline for a server, one per slot, all in flight together, for a cluster.

use std::collections::HashMap;

use deadpool_redis::redis::{Pipeline, Value};
use futures::{StreamExt, TryStreamExt, stream};

use super::Redis;
use crate::RedisError;
use crate::names;
use crate::slot::slot_of;

/// Most pipelines in flight at once on one connection to a cluster.
const MAX_PIPELINES: usize = 256;

/// Keys that one server can handle in one pipeline.
pub(super) struct Group<T> {
    /// Where the marks of these keys are registered.
    pub(super) registry: String,
    pub(super) items: Vec<T>,
}

impl Redis {
    /// Splits items by where their keys live.
    pub(super) fn group<'a, T>(&self, items: impl Iterator<Item = (&'a str, T)>) -> Vec<Group<T>> {
        if !self.is_cluster() {
            let items: Vec<T> = items.map(|(_, item)| item).collect();
            return if items.is_empty() {
                Vec::new()
            } else {
                vec![Group { registry: names::REGISTRY.to_owned(), items }]
            };
        }
        let mut slots: HashMap<u16, Vec<T>> = HashMap::new();
        for (key, item) in items {
            slots.entry(slot_of(key.as_bytes())).or_default().push(item);
        }
        slots
            .into_iter()
            .map(|(slot, items)| Group { registry: names::registry_of_slot(slot), items })
            .collect()
    }

    /// Sends one pipeline per group and returns the answers in the same order.
    pub(super) async fn run_all(&self, pipelines: Vec<Pipeline>) -> Result<Vec<Vec<Value>>, RedisError> {
        let lane = self.lanes.get().await?;
        if let [pipeline] = pipelines.as_slice() {
            return Ok(vec![self.pipeline_on(&lane, pipeline).await?]);
        }
        let lane = &lane;
        stream::iter(pipelines)
            .map(|pipeline| async move { self.pipeline_on(lane, &pipeline).await })
            .buffered(MAX_PIPELINES)
            .try_collect()
            .await
    }
}
