use deadpool_redis::redis::cluster_routing::{RoutingInfo, SingleNodeRoutingInfo};
use deadpool_redis::redis::{Cmd, Pipeline, Value, from_redis_value};

use super::{Connection, Redis};
use crate::{RedisError, names};

/// Names looked at per step of a scan: about a millisecond of the server's time.
const NAMES_PER_STEP: usize = 1_000;

/// A part of the cache that is scanned by itself.
enum Node {
    Server,
    Master { host: String, port: u16 },
}

impl Redis {
    /// Deletes every value whose key matches one of the glob `patterns`, and every lease on such a key, on all
    /// masters. Returns the number of values. Marks, their registry and positions stay.
    ///
    /// Guards go first: a lease granted before the scan either is found, and its fill will be refused, or has become a
    /// value before the scan of the values starts, and is found there. So when this returns every matching value was
    /// loaded after the call.
    ///
    /// # Errors
    /// Any [`RedisError`]; repeat the call.
    pub async fn delete_matching(&self, patterns: &[String]) -> Result<u64, RedisError> {
        let nodes = self.nodes().await?;
        for pattern in patterns {
            for node in &nodes {
                self.scan(node, &names::guards_matching(pattern), names::is_guard).await?;
            }
        }
        let mut deleted = 0;
        for pattern in patterns {
            for node in &nodes {
                let deletable = |name: &[u8]| !names::outlives_flush(name) && !names::is_guard(name);
                deleted += self.scan(node, pattern, deletable).await?;
            }
        }
        Ok(deleted)
    }

    /// Deletes every value in the database, whoever put it there, and every lease. Marks, their registry and positions
    /// stay: without its marks a strict write in flight would lose its promise.
    ///
    /// # Errors
    /// Any [`RedisError`]; repeat the call.
    pub async fn flush_all_keys(&self) -> Result<u64, RedisError> {
        self.delete_matching(&["*".to_owned()]).await
    }

    async fn nodes(&self) -> Result<Vec<Node>, RedisError> {
        if !self.is_cluster() {
            return Ok(vec![Node::Server]);
        }
        let mut slots = Cmd::new();
        slots.arg("CLUSTER").arg("SLOTS");
        let ranges: Vec<Vec<Value>> = self.query(&slots).await?;
        let mut masters: Vec<(String, u16)> = Vec::new();
        for range in ranges {
            let master =
                range.into_iter().nth(2).ok_or_else(|| RedisError::unexpected("slots without a node"))?;
            let parts: Vec<Value> =
                from_redis_value(master).map_err(|error| RedisError::Unexpected(error.into()))?;
            let mut parts = parts.into_iter();
            let (Some(host), Some(port)) = (parts.next(), parts.next()) else {
                return Err(RedisError::unexpected("a node without an address"));
            };
            let host = from_redis_value(host).map_err(|error| RedisError::Unexpected(error.into()))?;
            let port = from_redis_value(port).map_err(|error| RedisError::Unexpected(error.into()))?;
            let master = (host, port);
            if !masters.contains(&master) {
                masters.push(master);
            }
        }
        Ok(masters.into_iter().map(|(host, port)| Node::Master { host, port }).collect())
    }

    async fn scan(
        &self,
        node: &Node,
        pattern: &str,
        deletable: impl Fn(&[u8]) -> bool,
    ) -> Result<u64, RedisError> {
        let mut cursor = 0_u64;
        let mut deleted = 0;
        loop {
            let mut step = Cmd::new();
            step.arg("SCAN").arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(NAMES_PER_STEP);
            let answer = self.query_node(node, &step).await?;
            let (next, mut found): (u64, Vec<Vec<u8>>) =
                from_redis_value(answer).map_err(|error| RedisError::Unexpected(error.into()))?;
            found.retain(|name| deletable(name));
            deleted += self.unlink(&found).await?;
            cursor = next;
            if cursor == 0 {
                return Ok(deleted);
            }
        }
    }

    async fn query_node(&self, node: &Node, command: &Cmd) -> Result<Value, RedisError> {
        let Node::Master { host, port } = node else { return self.query(command).await };
        let lane = self.lanes.get().await?;
        let Connection::Cluster(mut connection) = lane.connection() else {
            return self.query(command).await;
        };
        let route = SingleNodeRoutingInfo::ByAddress { host: host.clone(), port: *port };
        connection
            .route_command(command.clone(), RoutingInfo::SingleNode(route))
            .await
            .and_then(Value::extract_error)
            .map_err(|error| self.lanes.failed(&lane, error))
    }

    async fn unlink(&self, found: &[Vec<u8>]) -> Result<u64, RedisError> {
        if found.is_empty() {
            return Ok(0);
        }
        if !self.is_cluster() {
            let mut unlink = Cmd::new();
            unlink.arg("UNLINK").arg(found);
            return self.query(&unlink).await;
        }
        let mut slots = std::collections::HashMap::<u16, Vec<&Vec<u8>>>::new();
        for name in found {
            slots.entry(crate::slot::slot_of(name)).or_default().push(name);
        }
        let pipelines = slots
            .into_values()
            .map(|names| {
                let mut pipeline = Pipeline::new();
                pipeline.cmd("UNLINK").arg(names);
                pipeline
            })
            .collect();
        let mut deleted = 0;
        for answer in self.run_all(pipelines).await?.into_iter().flatten() {
            deleted +=
                from_redis_value::<u64>(answer).map_err(|error| RedisError::Unexpected(error.into()))?;
        }
        Ok(deleted)
    }
}
