//! A few connections to one server that all its requests share.
//!
//! Requests of different tasks are pipelined on the same connection, which needs no check-out, no ping before use and
//! no more connections than busy cores. A pool that lends a connection to one task at a time would pay a round trip
//! (about 100 µs) for each hit of the cache.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use deadpool_redis::redis;
use deadpool_redis::redis::aio::MultiplexedConnection;

use crate::RedisError;
use crate::error::NotConnected;

/// A failed attempt to connect answers for everyone who asks within this time, so that requests that queued up behind
/// it do not each wait for a timeout of their own.
const FAILURE_HOLDS: Duration = Duration::from_millis(50);

/// The connections to one server.
pub(super) struct Endpoint {
    /// Name for people, without a password.
    name: String,
    places: Box<[Place]>,
    next: AtomicUsize,
    made: AtomicUsize,
}

#[derive(Default)]
struct Place {
    live: Mutex<Option<(usize, MultiplexedConnection)>>,
    connecting: tokio::sync::Mutex<Option<(Instant, redis::RedisError)>>,
}

/// A connection together with where it came from, so that it can be given up after a failure.
pub(super) struct Lane {
    endpoint: Arc<Endpoint>,
    place: usize,
    made: usize,
    connection: MultiplexedConnection,
}

impl Lane {
    pub(super) fn connection(&self) -> MultiplexedConnection {
        self.connection.clone()
    }

    /// Takes the connection out of use, unless another has taken its place.
    pub(super) fn give_up(&self) {
        let mut live = self.endpoint.places[self.place].live.lock().unwrap_or_else(PoisonError::into_inner);
        if live.as_ref().is_some_and(|(made, _)| *made == self.made) {
            *live = None;
        }
    }
}

impl Endpoint {
    pub(super) fn new(name: String, connections: usize) -> Self {
        let places = (0..connections.max(1)).map(|_| Place::default()).collect();
        Self { name, places, next: AtomicUsize::new(0), made: AtomicUsize::new(0) }
    }

    /// The next connection in turn, made now by `dial` if there is none.
    ///
    /// It is made in a task of its own, so that a caller with less patience than a connection takes still leaves one to
    /// the next caller.
    pub(super) async fn get<D>(
        self: &Arc<Self>,
        limit: Duration,
        dial: impl FnOnce() -> D,
    ) -> Result<Lane, RedisError>
    where
        D: Future<Output = Result<MultiplexedConnection, redis::RedisError>> + Send + 'static,
    {
        let place = self.next.fetch_add(1, Ordering::Relaxed) % self.places.len();
        if let Some(lane) = self.live(place) {
            return Ok(lane);
        }
        let (endpoint, dial) = (Arc::clone(self), Box::pin(dial()));
        let connecting = tokio::spawn(async move { endpoint.connect(place, dial).await });
        match tokio::time::timeout(limit, connecting).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(stopped)) => Err(RedisError::Unavailable(stopped.into())),
            Err(_) => {
                let late = format!("not connected to {} within {limit:?}", self.name);
                Err(RedisError::Unavailable(late.into()))
            }
        }
    }

    /// Takes all connections out of use.
    pub(super) fn give_up_all(&self) {
        for place in &self.places {
            *place.live.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    fn live(self: &Arc<Self>, place: usize) -> Option<Lane> {
        let live = self.places[place].live.lock().unwrap_or_else(PoisonError::into_inner);
        live.as_ref().map(|(made, connection)| self.lane(place, *made, connection.clone()))
    }

    fn lane(self: &Arc<Self>, place: usize, made: usize, connection: MultiplexedConnection) -> Lane {
        Lane { endpoint: Arc::clone(self), place, made, connection }
    }

    async fn connect(
        self: &Arc<Self>,
        place: usize,
        dial: impl Future<Output = Result<MultiplexedConnection, redis::RedisError>>,
    ) -> Result<Lane, RedisError> {
        let mut failure = self.places[place].connecting.lock().await;
        if let Some(lane) = self.live(place) {
            return Ok(lane);
        }
        if let Some((at, error)) = &*failure
            && at.elapsed() < FAILURE_HOLDS
        {
            return Err(self.not_connected(error.clone()));
        }
        match dial.await {
            Ok(connection) => Ok(self.install(place, connection)),
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
                RedisError::Unavailable(NotConnected { address: self.name.clone(), source }.into())
            }
            other => other,
        }
    }

    fn install(self: &Arc<Self>, place: usize, connection: MultiplexedConnection) -> Lane {
        let made = self.made.fetch_add(1, Ordering::Relaxed);
        let mut live = self.places[place].live.lock().unwrap_or_else(PoisonError::into_inner);
        *live = Some((made, connection.clone()));
        self.lane(place, made, connection)
    }
}
