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

/// The `err_code` of the API for a stream that does not exist.
const STREAM_NOT_FOUND: &str = "\"err_code\":10059,";

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
        until_deleted(node, PROBE_STREAM).await
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
async fn until_answered(node: &Nats, subject: &str, payload: &str) -> Result<()> {
    until(node, subject, async || node.request(subject, payload).await.map(drop)).await
}

/// Repeats a deletion until `stream` is known to be gone. Whoever deletes and does not get the reply, as it often
/// happens while leaders are elected, finds nothing the second time.
async fn until_deleted(node: &Nats, stream: &str) -> Result<()> {
    let subject = format!("$JS.API.STREAM.DELETE.{stream}");
    until(node, &subject, async || match node.request(&subject, "").await {
        Err(error) if error.to_string().contains(STREAM_NOT_FOUND) => Ok(()),
        other => other.map(drop),
    })
    .await
}

async fn until(node: &Nats, subject: &str, mut request: impl AsyncFnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let error = match timeout(REPLY_TIMEOUT, request()).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(elapsed) => elapsed.into(),
        };
        if Instant::now() > deadline {
            return Err(error.context(format!("no answer to {subject}\n{}", node.process().log_tail())));
        }
        sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_whose_deletion_went_unanswered_counts_as_deleted() {
        let nats = Nats::start_alone(NatsOptions::default()).await.unwrap();
        nats.request("$JS.API.STREAM.CREATE.once", r#"{"name":"once","subjects":["once"]}"#).await.unwrap();
        until_deleted(&nats, "once").await.unwrap();
        assert!(nats.request("$JS.API.STREAM.INFO.once", "").await.is_err());
        timeout(REPLY_TIMEOUT, until_deleted(&nats, "once")).await.unwrap().unwrap();
    }
}
