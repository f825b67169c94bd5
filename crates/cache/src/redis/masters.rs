//! Requests that go to a server rather than to a key.

use deadpool_redis::redis::cluster_routing::{RoutingInfo, SingleNodeRoutingInfo};
use deadpool_redis::redis::{Cmd, Pipeline, Value};

use super::batch::read;
use super::{Connection, Redis, within};
use crate::RedisError;
use crate::names::Shard;

/// One of the servers that hold the data.
pub(super) enum Master {
    Only,
    OfCluster { host: String, port: u16 },
}

impl Master {
    fn route(&self) -> SingleNodeRoutingInfo {
        match self {
            Self::Only => SingleNodeRoutingInfo::RandomPrimary,
            Self::OfCluster { host, port } => {
                SingleNodeRoutingInfo::ByAddress { host: host.clone(), port: *port }
            }
        }
    }
}

impl Redis {
    /// The masters with the shards each of them holds now.
    pub(super) async fn masters(&self) -> Result<Vec<(Master, Vec<Shard>)>, RedisError> {
        if !self.is_cluster() {
            return Ok(vec![(Master::Only, vec![Shard::Server])]);
        }
        let mut slots = Cmd::new();
        slots.arg("CLUSTER").arg("SLOTS");
        let ranges: Vec<Value> = self.query(&slots).await?;
        let mut masters = std::collections::BTreeMap::<(String, u16), Vec<Shard>>::new();
        for range in ranges {
            let (first, last, address) = read_range(range)?;
            masters.entry(address).or_default().extend((first..=last).map(Shard::Slot));
        }
        let masters = masters.into_iter();
        Ok(masters.map(|((host, port), shards)| (Master::OfCluster { host, port }, shards)).collect())
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
        pipeline: &Pipeline,
    ) -> Result<Vec<Value>, RedisError> {
        let lane = self.lane().await?;
        let Connection::Cluster(mut connection) = lane.connection() else {
            return self.pipeline_on(&lane, pipeline).await;
        };
        let sent = connection.route_pipeline(pipeline.clone(), 0, pipeline.len(), master.route());
        within(self.limit, sent)
            .await
            .and_then(|answers| answers.into_iter().map(Value::extract_error).collect())
            .map_err(|error| self.lanes.failed(&lane, error))
    }
}

type Range = (u16, u16, (String, u16));

/// One element of `CLUSTER SLOTS`: first slot, last slot, master, replicas. A node is host, port and more.
fn read_range(range: Value) -> Result<Range, RedisError> {
    let mut parts = read::<Vec<Value>>(range)?.into_iter();
    let (Some(first), Some(last), Some(master)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(RedisError::unexpected("a range of slots without a master"));
    };
    let mut address = read::<Vec<Value>>(master)?.into_iter();
    let (Some(host), Some(port)) = (address.next(), address.next()) else {
        return Err(RedisError::unexpected("a master without an address"));
    };
    Ok((read(first)?, read(last)?, (read(host)?, read(port)?)))
}
