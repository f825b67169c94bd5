//! Redis without anything of ours: what a service that does cache-aside by hand uses.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::timeout;

use crate::resp::{Connection, Reply};

/// Longest time for a command, connecting included.
const PATIENCE: Duration = Duration::from_secs(1);

/// A connection that is made again after a failure.
#[derive(Debug)]
pub struct Plain {
    address: Option<SocketAddr>,
    connection: Option<Connection>,
}

impl Plain {
    /// To a server with a `redis://` URL.
    pub fn new(url: &str) -> Self {
        let address = url.strip_prefix("redis://").and_then(|address| address.parse().ok());
        Self { address, connection: None }
    }

    /// Runs a command; `None` if there is no answer, or nothing at the key.
    pub async fn command(&mut self, words: &[&str]) -> Option<String> {
        // Taken out meanwhile, so that a connection with half an answer on it is not used again.
        let used = self.connection.take();
        let address = self.address?;
        let answer = timeout(PATIENCE, async {
            let mut connection = match used {
                Some(connection) => connection,
                None => Connection::open(address).await?,
            };
            let reply = connection.command(words).await?;
            anyhow::Ok((connection, reply))
        });
        let (connection, reply) = answer.await.ok()?.ok()?;
        self.connection = Some(connection);
        match reply {
            Reply::Text(text) => Some(text),
            Reply::Nil | Reply::Integer(_) | Reply::Array(_) => None,
        }
    }
}
