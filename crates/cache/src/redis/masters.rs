//! Requests that go to a server rather than to a key.

use std::collections::BTreeMap;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::cluster_routing::{RoutingInfo, SingleNodeRoutingInfo};
use deadpool_redis::redis::{Cmd, Pipeline, Value};

use super::batch::read;
use super::lanes::Lanes;
use super::{Connection, Redis, within};
use crate::RedisError;
use crate::names::Shard;

/// One of the servers that hold the data, with the shards it holds.
pub(super) struct Master {
    /// In a cluster. By address, because a request routed by slot goes to any node while that slot's is away.
    address: Option<Address>,
    pub(super) shards: Vec<Shard>,
    /// A connection of its own, to a node that has no slot: the cluster's client knows only those that have.
    apart: Option<MultiplexedConnection>,
}

/// Host and port.
pub(super) type Address = (String, u16);

impl Master {
    fn new(address: Option<Address>, shards: Vec<Shard>) -> Self {
        Self { address, shards, apart: None }
    }

    /// A node that has no slot yet.
    pub(super) async fn apart(address: Address, lanes: &Lanes) -> Result<Self, RedisError> {
        let connection = lanes.dial_node(&address).await?;
        Ok(Self { address: Some(address), shards: Vec::new(), apart: Some(connection) })
    }

    /// Host and port in a cluster; outside of one the only server.
    pub(super) fn name(&self) -> String {
        self.address.as_ref().map_or("redis".to_owned(), |(host, port)| format!("{host}:{port}"))
    }

    pub(super) fn is_at(&self, address: &Address) -> bool {
        self.address.as_ref() == Some(address)
    }
}

impl Redis {
    /// The masters as they are now.
    pub(super) async fn masters(&self) -> Result<Vec<Master>, RedisError> {
        if !self.is_cluster() {
            return Ok(vec![Master::new(None, vec![Shard::Server])]);
        }
        let mut slots = Cmd::new();
        slots.arg("CLUSTER").arg("SLOTS");
        let ranges: Vec<Value> = self.query(&slots).await?;
        let mut by_address = BTreeMap::<Address, Vec<Shard>>::new();
        for range in ranges {
            let (first, last, (host, port)) = read_range(range)?;
            // A node that knows no name of its own means the one by which it was reached.
            let host = if host.is_empty() { self.lanes.first_host() } else { host };
            by_address.entry((host, port)).or_default().extend((first..=last).map(Shard::Slot));
        }
        let masters = by_address.into_iter();
        Ok(masters.map(|(address, shards)| Master::new(Some(address), shards)).collect())
    }

    pub(super) async fn query_to(&self, master: &Master, command: &Cmd) -> Result<Value, RedisError> {
        if let Some(connection) = &master.apart {
            return Ok(within(self.limit, command.query_async(&mut connection.clone())).await?);
        }
        let lane = self.lane().await?;
        let (Connection::Cluster(mut connection), Some(address)) = (lane.connection(), &master.address)
        else {
            return self.query(command).await;
        };
        let route = RoutingInfo::SingleNode(by_address(address));
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
        let (Connection::Cluster(mut connection), Some(address)) = (lane.connection(), &master.address)
        else {
            return self.pipeline_on(&lane, &pipeline).await;
        };
        let commands = pipeline.len();
        within(self.limit, connection.route_pipeline(pipeline, 0, commands, by_address(address)))
            .await
            .and_then(|answers| answers.into_iter().map(Value::extract_error).collect())
            .map_err(|error| self.lanes.failed(&lane, error))
    }
}

fn by_address((host, port): &Address) -> SingleNodeRoutingInfo {
    SingleNodeRoutingInfo::ByAddress { host: host.clone(), port: *port }
}

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
