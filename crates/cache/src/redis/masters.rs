//! Requests that go to a server rather than to a key.

use std::collections::BTreeMap;

use deadpool_redis::redis::cluster_routing::{Route, RoutingInfo, SingleNodeRoutingInfo, SlotAddr};
use deadpool_redis::redis::{Cmd, Pipeline, Value};

use super::batch::read;
use super::{Connection, Redis, within};
use crate::RedisError;
use crate::names::Shard;

/// One of the servers that hold the data, with the shards it holds; never none.
pub(super) struct Master {
    pub(super) shards: Vec<Shard>,
}

impl Master {
    /// By one of its slots rather than by its address, which a node that knows no other does not tell.
    fn route(&self) -> SingleNodeRoutingInfo {
        match self.shards.first() {
            Some(Shard::Slot(slot)) => {
                SingleNodeRoutingInfo::SpecificNode(Route::new(*slot, SlotAddr::Master))
            }
            Some(Shard::Server) | None => SingleNodeRoutingInfo::RandomPrimary,
        }
    }
}

impl Redis {
    /// The masters as they are now.
    pub(super) async fn masters(&self) -> Result<Vec<Master>, RedisError> {
        if !self.is_cluster() {
            return Ok(vec![Master { shards: vec![Shard::Server] }]);
        }
        let mut slots = Cmd::new();
        slots.arg("CLUSTER").arg("SLOTS");
        let ranges: Vec<Value> = self.query(&slots).await?;
        let mut by_address = BTreeMap::<Address, Vec<Shard>>::new();
        for range in ranges {
            let (first, last, address) = read_range(range)?;
            by_address.entry(address).or_default().extend((first..=last).map(Shard::Slot));
        }
        Ok(by_address.into_values().map(|shards| Master { shards }).collect())
    }

    pub(super) async fn query_to(&self, master: &Master, command: &Cmd) -> Result<Value, RedisError> {
        let lane = self.lane().await?;
        let Connection::Cluster(mut connection) = lane.connection() else {
            return self.query(command).await;
        };
        let route = RoutingInfo::SingleNode(master.route());
        within(self.limit, connection.route_command(command.clone(), route))
            .await
            .and_then(Value::extract_error)
            .map_err(|error| self.lanes.failed(&lane, error))
    }

    pub(super) async fn pipeline_to(
        &self,
        master: &Master,
        pipeline: Pipeline,
    ) -> Result<Vec<Value>, RedisError> {
        let lane = self.lane().await?;
        let Connection::Cluster(mut connection) = lane.connection() else {
            return self.pipeline_on(&lane, &pipeline).await;
        };
        let commands = pipeline.len();
        within(self.limit, connection.route_pipeline(pipeline, 0, commands, master.route()))
            .await
            .and_then(|answers| answers.into_iter().map(Value::extract_error).collect())
            .map_err(|error| self.lanes.failed(&lane, error))
    }
}

type Address = (String, u16);

/// One element of `CLUSTER SLOTS`: first slot, last slot, master, replicas. A node is host, port and more.
fn read_range(range: Value) -> Result<(u16, u16, Address), RedisError> {
    let mut parts = read::<Vec<Value>>(range)?.into_iter();
    let (Some(first), Some(last), Some(master)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(RedisError::unexpected("a range of slots without a master"));
    };
    let mut address = read::<Vec<Value>>(master)?.into_iter();
    let (Some(host), Some(port)) = (address.next(), address.next()) else {
        return Err(RedisError::unexpected("a master without an address"));
    };
    let host: Option<String> = read(host)?;
    Ok((read(first)?, read(last)?, (host.unwrap_or_default(), read(port)?)))
}
