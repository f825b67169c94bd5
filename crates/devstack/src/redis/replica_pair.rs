//! A Redis primary with a replica, and a sentinel that can swap them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use tokio::time::{Instant, sleep};

use super::{Redis, RedisOptions, Role};
use crate::directory::StackDirectory;
use crate::ports::Port;
use crate::readiness::START_TIMEOUT;

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A primary, a replica that has its data, and a sentinel if asked for.
#[derive(Debug)]
pub struct RedisReplicaPair {
    /// The primary, at the start.
    pub primary: Redis,
    /// The replica, at the start.
    pub replica: Redis,
    /// A sentinel that promotes the replica a second after the primary stops answering.
    pub sentinel: Option<Redis>,
}

impl RedisReplicaPair {
    /// The name under which the sentinel knows the primary.
    pub const MASTER_NAME: &str = "mymaster";

    /// Starts a pair without a sentinel in a directory of its own.
    ///
    /// # Errors
    /// [`MissingBinaries`](crate::MissingBinaries), or whatever keeps the servers from starting, with a log.
    pub async fn start() -> Result<Self> {
        Self::start_in(&StackDirectory::create()?, RedisOptions::default(), false).await
    }

    /// Starts a pair with a sentinel in a directory of its own.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_with_sentinel() -> Result<Self> {
        Self::start_in(&StackDirectory::create()?, RedisOptions::default(), true).await
    }

    /// Starts a pair in `directory` and waits until the replica has the primary's data.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_in(
        directory: &Arc<StackDirectory>,
        mut options: RedisOptions,
        with_sentinel: bool,
    ) -> Result<Self> {
        options.configuration.push_str("\nrepl-diskless-sync-delay 0\n");
        let primary = Redis::start_in(directory, options.clone()).await?;
        options.configuration.push_str(&format!("replicaof 127.0.0.1 {}\n", primary.address().port()));
        let replica = Redis::start_in(directory, options).await?;
        let mut pair = Self { primary, replica, sentinel: None };
        pair.wait_in_sync().await?;
        if with_sentinel {
            let sentinel = pair.start_sentinel(directory).await?;
            pair.sentinel = Some(sentinel);
        }
        Ok(pair)
    }

    /// Waits until the replica is connected and has everything the primary has written so far.
    ///
    /// # Errors
    /// When that takes more than a minute.
    pub async fn wait_in_sync(&self) -> Result<()> {
        until("the replica is in sync", async || {
            let link = self.replica.info("replication", "master_link_status").await?;
            ensure!(link.as_deref() == Some("up"), "the link is {link:?}");
            let written = self.primary.info("replication", "master_repl_offset").await?;
            let replayed = self.replica.info("replication", "slave_repl_offset").await?;
            ensure!(written == replayed, "{replayed:?} of {written:?}");
            Ok(())
        })
        .await
    }

    /// Makes the replica a primary of its own, whatever the primary does.
    ///
    /// # Errors
    /// When the replica does not answer.
    pub async fn promote_replica(&self) -> Result<()> {
        self.replica.command(&["REPLICAOF", "NO", "ONE"]).await.map(drop)
    }

    async fn start_sentinel(&self, directory: &Arc<StackDirectory>) -> Result<Redis> {
        let name = Self::MASTER_NAME;
        let configuration = format!(
            "sentinel monitor {name} 127.0.0.1 {} 1\nsentinel down-after-milliseconds {name} 1000\n\
             sentinel failover-timeout {name} 5000\n",
            self.primary.address().port()
        );
        let sentinel = Redis::launch(directory, Port::reserve()?, Role::Sentinel, &configuration).await?;
        until("the sentinel knows the replica", async || {
            let replicas = sentinel.command(&["SENTINEL", "REPLICAS", name]).await?;
            ensure!(!replicas.is_empty(), "it knows none");
            Ok(())
        })
        .await?;
        Ok(sentinel)
    }
}

async fn until(what: &str, mut check: impl AsyncFnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + START_TIMEOUT;
    while let Err(error) = check().await {
        if Instant::now() > deadline {
            bail!("not within {START_TIMEOUT:?}: {what}: {error:#}");
        }
        sleep(POLL_INTERVAL).await;
    }
    Ok(())
}
