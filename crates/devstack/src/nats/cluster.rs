//! Several NATS servers that replicate streams.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::{Instant, sleep, timeout};

use super::{Nats, NatsOptions};
use crate::directory::StackDirectory;
use crate::ports::Port;
use crate::readiness::START_TIMEOUT;

/// Elections take seconds, so asking more often only costs.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Without a leader a request gets no reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(2);

/// A stream made and deleted to see that replicas can be placed.
const PROBE_STREAM: &str = "devstack-probe";

/// A NATS cluster with JetStream.
#[derive(Debug)]
pub struct NatsCluster {
    /// The servers, each of which can be killed, stopped and started.
    pub nodes: Vec<Nats>,
}

impl NatsCluster {
    /// Starts `size` servers in `directory` and waits until they can hold a stream with that many replicas.
    ///
    /// # Errors
    /// [`MissingBinaries`](crate::MissingBinaries), or whatever keeps the servers from starting, with a log.
    pub async fn start_in(
        directory: &Arc<StackDirectory>,
        size: usize,
        options: NatsOptions,
    ) -> Result<Self> {
        let routes: Vec<Port> = (0..size).map(|_| Port::reserve()).collect::<Result<_>>()?;
        let urls: Vec<String> = routes.iter().map(|port| format!("\"nats://{}\"", port.address())).collect();
        let urls = urls.join(", ");
        let mut nodes = Vec::new();
        for route in routes {
            let block =
                format!("cluster {{ name: devstack\nlisten: \"{}\"\nroutes: [{urls}] }}", route.address());
            nodes.push(Nats::prepare(directory, Port::reserve()?, &options, Some((route, block)))?);
        }
        let cluster = Self { nodes };
        for node in &cluster.nodes {
            node.start().await?;
        }
        cluster.wait_until_ready().await?;
        Ok(cluster)
    }

    /// Waits until every running node reaches the meta leader and a stream with a replica on each of them can be made.
    ///
    /// # Errors
    /// When that takes more than a minute.
    pub async fn wait_until_ready(&self) -> Result<()> {
        let running: Vec<&Nats> = self.nodes.iter().filter(|node| node.is_running()).collect();
        for node in &running {
            until_answered(node, "$JS.API.INFO", "").await?;
        }
        let node = running.first().context("no node is running")?;
        let replicas = running.len();
        let stream = format!(
            r#"{{"name":"{PROBE_STREAM}","subjects":["{PROBE_STREAM}"],"storage":"memory","num_replicas":{replicas}}}"#
        );
        until_answered(node, &format!("$JS.API.STREAM.CREATE.{PROBE_STREAM}"), &stream).await?;
        until_answered(node, &format!("$JS.API.STREAM.DELETE.{PROBE_STREAM}"), "").await.map(drop)
    }

    /// URLs of all nodes, separated by commas.
    #[must_use]
    pub fn url(&self) -> String {
        self.nodes.iter().map(Nats::url).collect::<Vec<_>>().join(",")
    }

    /// The node that leads `stream`, as an index into [`nodes`](Self::nodes).
    ///
    /// # Errors
    /// When no running node knows a leader.
    pub async fn stream_leader(&self, stream: &str) -> Result<usize> {
        let node = self.nodes.iter().find(|node| node.is_running()).context("no node is running")?;
        let subject = format!("$JS.API.STREAM.INFO.{stream}");
        let reply = timeout(REPLY_TIMEOUT, node.request(&subject, "")).await.context("no reply")??;
        let leader = reply.split_once("\"leader\":\"").and_then(|(_, rest)| rest.split('"').next());
        let leader = leader.with_context(|| format!("stream {stream} has no leader"))?;
        let position = self.nodes.iter().position(|node| node.process().name() == leader);
        position.with_context(|| format!("unknown leader {leader}"))
    }
}

/// Repeats a request until a reply without an error arrives.
async fn until_answered(node: &Nats, subject: &str, payload: &str) -> Result<String> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let error = match timeout(REPLY_TIMEOUT, node.request(subject, payload)).await {
            Ok(Ok(reply)) => return Ok(reply),
            Ok(Err(error)) => error,
            Err(elapsed) => elapsed.into(),
        };
        if Instant::now() > deadline {
            return Err(error.context(format!("no answer to {subject}\n{}", node.process().log_tail())));
        }
        sleep(POLL_INTERVAL).await;
    }
}
