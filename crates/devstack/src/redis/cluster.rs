//! Redis Cluster.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::{Instant, sleep};

use super::{Redis, RedisOptions, Role};
use crate::directory::StackDirectory;
use crate::ports::Port;
use crate::readiness::START_TIMEOUT;

/// Number of hash slots of every Redis Cluster.
const SLOTS: usize = 16_384;

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Short, so that tests of failover need not wait, yet no node of a busy machine is taken for dead.
const NODE_TIMEOUT_MS: u32 = 3_000;

/// A Redis Cluster whose slots are spread evenly over the masters.
#[derive(Debug)]
pub struct RedisCluster {
    /// The masters first, then the replicas: of master 0, 1, …, and again for a second replica each.
    pub nodes: Vec<Redis>,
}

impl RedisCluster {
    /// Starts a cluster in a directory of its own and waits until every node says it is complete.
    ///
    /// # Errors
    /// [`MissingBinaries`](crate::MissingBinaries), or whatever keeps the servers from starting, with a log.
    pub async fn start(masters: usize, replicas_per_master: usize) -> Result<Self> {
        Self::start_in(&StackDirectory::create()?, masters, replicas_per_master, RedisOptions::default())
            .await
    }

    /// As [`start`](Self::start), in `directory`.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_in(
        directory: &Arc<StackDirectory>,
        masters: usize,
        replicas_per_master: usize,
        options: RedisOptions,
    ) -> Result<Self> {
        let append_only = if options.append_only { "yes" } else { "no" };
        let configuration = format!(
            "save \"\"\nappendonly {append_only}\ncluster-enabled yes\ncluster-node-timeout {NODE_TIMEOUT_MS}\n\
             repl-diskless-sync-delay 0\n{}",
            options.configuration
        );
        let mut nodes = Vec::new();
        for _ in 0..masters * (1 + replicas_per_master) {
            let port = Port::reserve_with_cluster_bus()?;
            nodes.push(Redis::launch(directory, port, Role::Server, &configuration).await?);
        }
        let cluster = Self { nodes };
        cluster.assign_slots(masters).await?;
        cluster.introduce().await?;
        cluster.attach_replicas(masters).await?;
        cluster.wait_until_ready().await?;
        Ok(cluster)
    }

    /// Waits until every running node sees the cluster complete, and the replicas are connected.
    ///
    /// # Errors
    /// When that takes more than a minute.
    pub async fn wait_until_ready(&self) -> Result<()> {
        self.until("the cluster is complete", async |node| {
            let info = node.command(&["CLUSTER", "INFO"]).await?;
            ensure!(info.contains("cluster_state:ok"), "{info}");
            let link = node.info("replication", "master_link_status").await?;
            ensure!(link.as_deref().unwrap_or("up") == "up", "the replica is not connected");
            Ok(())
        })
        .await
    }

    /// URLs of all nodes.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Redis::url).collect()
    }

    async fn assign_slots(&self, masters: usize) -> Result<()> {
        for (index, node) in self.nodes.iter().take(masters).enumerate() {
            let slots: Vec<String> = (SLOTS * index / masters..SLOTS * (index + 1) / masters)
                .map(|slot| slot.to_string())
                .collect();
            // ADDSLOTSRANGE would need version 7.
            let mut command = vec!["CLUSTER", "ADDSLOTS"];
            command.extend(slots.iter().map(String::as_str));
            node.command(&command).await?;
            // Distinct epochs from the start spare the nodes settling a conflict.
            node.command(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]).await?;
        }
        Ok(())
    }

    /// Makes every node known to every other.
    async fn introduce(&self) -> Result<()> {
        let (first, others) = self.nodes.split_first().context("a cluster has nodes")?;
        for node in others {
            let port = node.address().port().to_string();
            first.command(&["CLUSTER", "MEET", "127.0.0.1", &port]).await?;
        }
        let known = format!("cluster_known_nodes:{}\r", self.nodes.len());
        self.until("all nodes know each other", async |node| {
            let info = node.command(&["CLUSTER", "INFO"]).await?;
            ensure!(info.contains(&known), "{info}");
            let nodes = node.command(&["CLUSTER", "NODES"]).await?;
            ensure!(!nodes.contains("handshake"), "{nodes}");
            Ok(())
        })
        .await
    }

    async fn attach_replicas(&self, masters: usize) -> Result<()> {
        for (index, replica) in self.nodes.iter().enumerate().skip(masters) {
            let master = self.nodes[index % masters].command(&["CLUSTER", "MYID"]).await?;
            replica.command(&["CLUSTER", "REPLICATE", &master]).await?;
        }
        Ok(())
    }

    /// Polls every running node until `check` passes on it.
    async fn until(&self, what: &str, check: impl AsyncFn(&Redis) -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        for node in self.nodes.iter().filter(|node| node.is_running()) {
            while let Err(error) = check(node).await {
                if Instant::now() > deadline {
                    let log = node.process().log_tail();
                    return Err(error.context(format!("not within {START_TIMEOUT:?}: {what}\n{log}")));
                }
                sleep(POLL_INTERVAL).await;
            }
        }
        Ok(())
    }
}
