//! The connection to one cache and everything that is asked of it.

mod address;
mod apply;
mod batch;
mod config;
mod flush;
mod lanes;
mod position;
mod server;

use std::sync::Arc;

use deadpool_redis::redis::aio::{ConnectionLike, MultiplexedConnection};
use deadpool_redis::redis::cluster_async::ClusterConnection;
use deadpool_redis::redis::{Cmd, FromRedisValue, Pipeline, Value};

pub use apply::Applied;
pub use config::{RedisConfig, RedisTls};
pub use server::EvictionPolicy;

use crate::RedisError;
use lanes::{Lane, Lanes};

/// Connection to one cache: a single server, a Cluster, or the master that Sentinels name.
///
/// Cheap to clone; clones share their connections. Every request is pipelined on one of
/// [`RedisConfig::pool_size`] connections, which are made when first needed and replaced after a failure or a timeout.
/// All methods are cancel-safe in the sense that a dropped request may or may not have been carried out.
#[derive(Clone)]
pub struct Redis {
    lanes: Arc<Lanes>,
}

/// A connection in use.
#[derive(Clone)]
pub(crate) enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Redis {
    /// Prepares connections without making one: a server that is down is not an error yet.
    ///
    /// # Errors
    /// [`RedisError::Config`] if the URL or the TLS files cannot be used.
    pub fn new(config: RedisConfig) -> Result<Self, RedisError> {
        Ok(Self { lanes: Arc::new(Lanes::new(config)?) })
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// Any [`RedisError`]; this is where wrong credentials show first.
    pub async fn ping(&self) -> Result<(), RedisError> {
        let mut ping = Cmd::new();
        ping.arg("PING");
        self.query::<Value>(&ping).await.map(drop)
    }

    pub(crate) fn is_cluster(&self) -> bool {
        self.lanes.is_cluster()
    }

    /// Runs one command. In a cluster it goes where its key lives.
    pub(crate) async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, RedisError> {
        let lane = self.lanes.get().await?;
        let answer = match lane.connection() {
            Connection::Server(mut connection) => command.query_async(&mut connection).await,
            Connection::Cluster(mut connection) => command.query_async(&mut connection).await,
        };
        answer.map_err(|error| self.lanes.failed(&lane, error))
    }

    /// Runs commands in one write. In a cluster all their keys share a slot.
    pub(crate) async fn pipeline(&self, pipeline: &Pipeline) -> Result<Vec<Value>, RedisError> {
        let lane = self.lanes.get().await?;
        self.pipeline_on(&lane, pipeline).await
    }

    async fn pipeline_on(&self, lane: &Lane, pipeline: &Pipeline) -> Result<Vec<Value>, RedisError> {
        let answers = match lane.connection() {
            Connection::Server(connection) => run(connection, pipeline).await,
            Connection::Cluster(connection) => run(connection, pipeline).await,
        };
        answers.map_err(|error| self.lanes.failed(lane, error))
    }
}

async fn run(
    mut connection: impl ConnectionLike,
    pipeline: &Pipeline,
) -> Result<Vec<Value>, deadpool_redis::redis::RedisError> {
    pipeline.query_async(&mut connection).await
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis").field("config", self.lanes.config()).finish()
    }
}
