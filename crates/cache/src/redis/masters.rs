//! Requests that go to a server rather than to a key.

use deadpool_redis::redis::{Cmd, Pipeline, Value};

use super::Redis;
use super::nodes::Address;
use crate::RedisError;
use crate::names::Shard;

/// One of the servers that hold the data, with the shards it holds.
pub(super) struct Master {
    /// In a cluster.
    address: Option<Address>,
    pub(super) shards: Vec<Shard>,
}

impl Master {
    /// A node of the cluster that has no slot yet.
    pub(super) fn without_slots(address: Address) -> Self {
        Self { address: Some(address), shards: Vec::new() }
    }

    /// Host and port of a node of a cluster, `redis` for the one server: its label in metrics.
    pub(super) fn label(&self) -> String {
        self.address.as_ref().map_or_else(|| "redis".to_owned(), |address| node_name(Some(address)))
    }

    pub(super) fn is_at(&self, address: &Address) -> bool {
        self.address.as_ref() == Some(address)
    }

    /// Host and port of a node of a cluster; for the one server, that it is the one.
    pub(super) fn name(&self) -> String {
        node_name(self.address.as_ref())
    }
}

/// Name of a node for people.
pub(super) fn node_name(address: Option<&Address>) -> String {
    address.map_or_else(|| "the server".to_owned(), |(host, port)| format!("{host}:{port}"))
}

impl Redis {
    /// Name of the node that has a shard, as far as is known.
    pub(super) fn node_of(&self, shard: Shard) -> String {
        let Shard::Slot(slot) = shard else { return node_name(None) };
        node_name(self.lanes.nodes().known().owner(slot))
    }

    /// The masters as they are now.
    pub(super) async fn masters(&self) -> Result<Vec<Master>, RedisError> {
        if !self.is_cluster() {
            return Ok(vec![Master { address: None, shards: vec![Shard::Server] }]);
        }
        let masters = self.slot_map().await?.masters();
        Ok(masters.into_iter().map(|(address, shards)| Master { address: Some(address), shards }).collect())
    }

    pub(super) async fn query_to(&self, master: &Master, command: &Cmd) -> Result<Value, RedisError> {
        self.query_node(master.address.as_ref(), command).await
    }

    pub(super) async fn pipeline_to(
        &self,
        master: &Master,
        pipeline: Pipeline,
    ) -> Result<Vec<Value>, RedisError> {
        let address = master.address.as_ref();
        let lane = self.lanes.get(address, self.limit).await?;
        let answers = self.pipeline_on(&lane, &pipeline).await?;
        answers.into_iter().map(|answer| self.answer(&lane, answer)).collect()
    }
}
