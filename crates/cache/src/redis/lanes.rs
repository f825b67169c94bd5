//! Where requests go: to the one server, or to the node of a cluster that has their slot.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{
    self, AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, ServerErrorKind, Value,
};

use super::address::{Target, without_library_name, without_password};
use super::config::RedisConfig;
use super::endpoint::{Endpoint, Lane};
use super::moving::Moving;
use super::nodes::{Address, Nodes};
use crate::RedisError;
use crate::error::is_read_only;

pub(super) struct Lanes {
    config: RedisConfig,
    /// Replaced when credentials change; always of the same kind.
    target: RwLock<Arc<Target>>,
    settings: AsyncConnectionConfig,
    server: Arc<Endpoint>,
    nodes: Nodes,
    moving: Moving,
}

impl Lanes {
    pub(super) fn new(config: RedisConfig) -> Result<Self, RedisError> {
        let target = Target::new(&config)?;
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(config.connect_timeout))
            .set_response_timeout(Some(config.response_timeout));
        let server = Arc::new(Endpoint::new(without_password(&config.url), config.pool_size));
        let nodes = Nodes::new(target.seeds(), config.pool_size);
        let target = RwLock::new(Arc::new(target));
        Ok(Self { config, target, settings, server, nodes, moving: Moving::default() })
    }

    pub(super) fn config(&self) -> &RedisConfig {
        &self.config
    }

    fn target(&self) -> Arc<Target> {
        Arc::clone(&self.target.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes connections to `url` from now on. What is connected stays.
    pub(super) fn use_url(&self, url: &str) -> Result<(), RedisError> {
        let target = Target::new(&RedisConfig { url: url.to_owned(), ..self.config.clone() })?;
        if std::mem::discriminant(&target) != std::mem::discriminant(&*self.target()) {
            let text = "a server cannot become a cluster or the like without a restart";
            return Err(RedisError::Config(text.to_owned()));
        }
        *self.target.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(target);
        Ok(())
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(*self.target(), Target::Cluster { .. })
    }

    pub(super) fn moving(&self) -> &Moving {
        &self.moving
    }

    pub(super) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// A connection to a node of the cluster, or without an address to the one server.
    pub(super) async fn get(
        self: &Arc<Self>,
        address: Option<&Address>,
        limit: Duration,
    ) -> Result<Lane, RedisError> {
        let limit = limit.min(self.config.connect_timeout);
        let (lanes, owned) = (Arc::clone(self), address.cloned());
        let dial = || async move { lanes.dial(owned).await };
        let lane = match address {
            None => self.server.get(limit, dial).await,
            Some(address) => self.nodes.endpoint(address).get(limit, dial).await,
        };
        if lane.is_err() {
            self.nodes.doubt();
        }
        lane
    }

    async fn dial(&self, address: Option<Address>) -> Result<MultiplexedConnection, redis::RedisError> {
        let dial = async {
            let client = self.client(address.as_ref()).await?;
            let mut connection = client.get_multiplexed_async_connection_with_config(&self.settings).await?;
            if matches!(client.get_connection_info().addr(), ConnectionAddr::TcpTls { .. }) {
                first_answer(&mut connection).await?;
            }
            Ok(connection)
        };
        // The client's own limits do not cover asking Sentinels one after the other.
        match tokio::time::timeout(self.config.connect_timeout, dial).await {
            Ok(connection) => connection,
            Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()),
        }
    }

    async fn client(&self, address: Option<&Address>) -> Result<Client, redis::RedisError> {
        let target = self.target();
        match (&*target, address) {
            (Target::Server(client), _) => Ok(client.as_ref().clone()),
            (Target::Sentinel(sentinels), _) => {
                let master = sentinels.lock().await.async_get_client().await?;
                Client::open(without_library_name(master.get_connection_info().clone()))
            }
            (target @ Target::Cluster { .. }, Some(address)) => target.node(address),
            (Target::Cluster { .. }, None) => {
                Err((ErrorKind::ClusterConnectionNotFound, "a request to no node of the cluster").into())
            }
        }
    }

    /// Decides what becomes of a connection on which a request failed, and what the caller is told.
    ///
    /// A server that does not answer in time may have stopped, and one that has become a replica takes no writes: such
    /// a connection is not used again. Answers of a healthy server leave it as it is.
    pub(super) fn failed(&self, lane: &Lane, error: redis::RedisError) -> RedisError {
        match error.kind() {
            ErrorKind::Io | ErrorKind::Parse => {
                lane.give_up();
                self.nodes.doubt();
            }
            ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::CrossSlot) if !self.is_cluster() => {
                return RedisError::Config("the server is a node of a cluster, use redis+cluster://".into());
            }
            ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::ClusterDown) => self.nodes.doubt(),
            _ if is_read_only(&error) => self.give_up_all(),
            _ => {}
        }
        error.into()
    }

    /// The master has moved: whatever is connected may be connected to the old one.
    pub(super) fn give_up_all(&self) {
        self.server.give_up_all();
        self.nodes.doubt();
    }
}

/// Waits for the first answer. A server that misses a client certificate says so only after the handshake, and then closes
/// the connection: who writes later learns nothing but that it is closed.
async fn first_answer(connection: &mut MultiplexedConnection) -> Result<(), redis::RedisError> {
    match redis::cmd("PING").query_async::<Value>(connection).await {
        // A refusal is an answer as well.
        Err(error) if error.code().is_none() => Err(error),
        _ => Ok(()),
    }
}
