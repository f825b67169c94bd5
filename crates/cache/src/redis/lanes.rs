//! A few connections that all requests share.
//!
//! Requests of different tasks are pipelined on the same connection, which needs no check-out, no ping before use and
//! no more connections than busy cores. A pool that lends a connection to one task at a time would pay a round trip
//! (about 100 µs) for each hit of the cache.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::cluster_async::ClusterConnection;
use deadpool_redis::redis::{self, AsyncConnectionConfig, ErrorKind, ServerErrorKind};

use super::address::{self, Target};
use super::config::RedisConfig;
use super::moving::Moving;
use super::{Connection, within};
use crate::RedisError;
use crate::error::NotConnected;

/// A failed attempt to connect answers for everyone who asks within this time, so that requests that queued up behind
/// it do not each wait for a timeout of their own.
const FAILURE_HOLDS: Duration = Duration::from_millis(50);

pub(super) struct Lanes {
    config: RedisConfig,
    /// Replaced when credentials change; always of the same kind.
    target: RwLock<Arc<Target>>,
    settings: AsyncConnectionConfig,
    slots: Box<[Slot]>,
    next: AtomicUsize,
    made: AtomicUsize,
    moving: Moving,
}

#[derive(Default)]
struct Slot {
    live: Mutex<Option<(usize, Connection)>>,
    connecting: tokio::sync::Mutex<Option<(Instant, redis::RedisError)>>,
}

/// A connection together with where it came from, so that it can be given up after a failure.
pub(super) struct Lane {
    slot: usize,
    made: usize,
    connection: Connection,
}

impl Lane {
    pub(super) fn connection(&self) -> Connection {
        self.connection.clone()
    }
}

impl Lanes {
    pub(super) fn new(config: RedisConfig) -> Result<Self, RedisError> {
        let target = Target::new(&config)?;
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(config.connect_timeout))
            .set_response_timeout(Some(config.response_timeout));
        let slots = (0..config.pool_size.max(1)).map(|_| Slot::default()).collect();
        Ok(Self {
            config,
            target: RwLock::new(Arc::new(target)),
            settings,
            slots,
            next: AtomicUsize::new(0),
            made: AtomicUsize::new(0),
            moving: Moving::default(),
        })
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

    /// Host of the first node given for a cluster.
    pub(super) fn first_host(&self) -> String {
        match &*self.target() {
            Target::Cluster { first, .. } => address::host_of(first).to_owned(),
            Target::Server(_) | Target::Sentinel(_) => String::new(),
        }
    }

    /// The next connection in turn, made now if there is none.
    pub(super) async fn get(self: &Arc<Self>, limit: Duration) -> Result<Lane, RedisError> {
        let slot = self.next.fetch_add(1, Ordering::Relaxed) % self.slots.len();
        match self.live(slot) {
            Some(lane) => Ok(lane),
            None => Box::pin(self.wait_for_connection(slot, limit)).await,
        }
    }

    fn live(&self, slot: usize) -> Option<Lane> {
        let live = self.slots[slot].live.lock().unwrap_or_else(PoisonError::into_inner);
        live.as_ref().map(|(made, connection)| Lane { slot, made: *made, connection: connection.clone() })
    }

    /// Connects in a task of its own, so that a caller with less patience than a connection takes still leaves one to
    /// the next caller.
    async fn wait_for_connection(self: &Arc<Self>, slot: usize, limit: Duration) -> Result<Lane, RedisError> {
        let lanes = Arc::clone(self);
        let connecting = tokio::spawn(async move { lanes.connect(slot).await });
        let limit = limit.min(self.config.connect_timeout);
        match tokio::time::timeout(limit, connecting).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(stopped)) => Err(RedisError::Unavailable(stopped.into())),
            Err(_) => {
                let address = address::without_password(&self.config.url);
                Err(RedisError::Unavailable(format!("not connected to {address} within {limit:?}").into()))
            }
        }
    }

    async fn connect(&self, slot: usize) -> Result<Lane, RedisError> {
        let mut failure = self.slots[slot].connecting.lock().await;
        if let Some(lane) = self.live(slot) {
            return Ok(lane);
        }
        if let Some((at, error)) = &*failure
            && at.elapsed() < FAILURE_HOLDS
        {
            return Err(self.not_connected(error.clone()));
        }
        // The clients' own limits do not cover asking Sentinels or the first nodes of a cluster one after the other.
        match within(self.config.connect_timeout, self.dial()).await {
            Ok(connection) => Ok(self.install(slot, connection)),
            Err(error) => {
                *failure = Some((Instant::now(), error.clone()));
                Err(self.not_connected(error))
            }
        }
    }

    /// Names the server, which the client's error does not.
    fn not_connected(&self, source: redis::RedisError) -> RedisError {
        match RedisError::from(source.clone()) {
            RedisError::Unavailable(_) => {
                let address = address::without_password(&self.config.url);
                RedisError::Unavailable(NotConnected { address, source }.into())
            }
            other => other,
        }
    }

    async fn dial(&self) -> Result<Connection, redis::RedisError> {
        match &*self.target() {
            Target::Server(client) => client
                .get_multiplexed_async_connection_with_config(&self.settings)
                .await
                .map(Connection::Server),
            Target::Cluster { client, .. } => client.get_async_connection().await.map(Connection::Cluster),
            Target::Sentinel(client) => client
                .lock()
                .await
                .get_async_connection_with_config(&self.settings)
                .await
                .map(Connection::Server),
        }
    }

    pub(super) fn moving(&self) -> &Moving {
        &self.moving
    }

    /// A connection to the cluster beside those that are shared.
    pub(super) async fn dial_cluster(&self) -> Result<ClusterConnection, RedisError> {
        let target = self.target();
        let Target::Cluster { client, .. } = &*target else {
            return Err(RedisError::unexpected("only a cluster has slots that move"));
        };
        Ok(within(self.config.connect_timeout, client.get_async_connection()).await?)
    }

    /// A connection to one node of the cluster.
    pub(super) async fn dial_node(
        &self,
        (host, port): &(String, u16),
    ) -> Result<MultiplexedConnection, RedisError> {
        let client = self.target().node(host, *port)?;
        let dial = client.get_multiplexed_async_connection_with_config(&self.settings);
        Ok(within(self.config.connect_timeout, dial).await?)
    }

    fn install(&self, slot: usize, connection: Connection) -> Lane {
        let made = self.made.fetch_add(1, Ordering::Relaxed);
        let mut live = self.slots[slot].live.lock().unwrap_or_else(PoisonError::into_inner);
        *live = Some((made, connection.clone()));
        Lane { slot, made, connection }
    }

    /// Decides what becomes of a connection on which a request failed, and what the caller is told.
    ///
    /// A server that does not answer in time may have stopped, and one that has become a replica takes no writes: such
    /// a connection is not used again. Answers of a healthy server leave it as it is.
    pub(super) fn failed(&self, lane: &Lane, error: redis::RedisError) -> RedisError {
        match error.kind() {
            ErrorKind::Io | ErrorKind::Parse | ErrorKind::ClusterConnectionNotFound => self.give_up(lane),
            ErrorKind::Server(ServerErrorKind::ReadOnly) => self.give_up_all(),
            ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::CrossSlot) if !self.is_cluster() => {
                return RedisError::Config("the server is a node of a cluster, use redis+cluster://".into());
            }
            _ => {}
        }
        error.into()
    }

    fn give_up(&self, lane: &Lane) {
        let mut live = self.slots[lane.slot].live.lock().unwrap_or_else(PoisonError::into_inner);
        if live.as_ref().is_some_and(|(made, _)| *made == lane.made) {
            *live = None;
        }
    }

    /// The master has moved: whatever is connected is connected to the old one.
    pub(super) fn give_up_all(&self) {
        for slot in &self.slots {
            *slot.live.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}
