//! The connection to one cache and everything that is asked of it.

mod address;
mod apply;
mod batch;
mod config;
mod emptiness;
mod endpoint;
mod flush;
mod lanes;
mod layout;
mod lease;
mod marks;
mod masters;
mod moving;
mod nodes;
mod old_marks;
mod outcome;
mod position;
mod routing;
mod server;
mod values;

use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::{Cmd, ErrorKind, ServerErrorKind, ToRedisArgs, Value};
use deadpool_redis::redis::{FromRedisValue, Pipeline};

pub use apply::Applied;
pub use config::{RedisConfig, RedisTls};
pub use lease::{Acquired, Fill, LeaseId, LeaseToken, MAX_STALE};
pub(crate) use moving::SlotIsMoving;
pub use old_marks::{OldMark, OldMarks};
pub use outcome::{Outcome, Undone};
pub use server::{EvictionPolicy, Instance, Masters, Unreachable};
pub(crate) use values::Found;

use crate::RedisError;
use crate::names::Shard;
use crate::script::Script;
use crate::slot::slot_of;
use batch::{Group, requests};
use lanes::Lanes;

/// A request that has failed may take twice as long, and so on up to this power of two.
const MAX_PATIENCE: u32 = 4;

/// Connection to one cache: a single server, a Cluster, or the master that Sentinels name.
///
/// Cheap to clone; clones share their connections. Every request is pipelined on one of
/// [`RedisConfig::pool_size`] connections to its server, which are made when first needed and replaced after a failure or a timeout.
/// Dropping a request is safe; it may or may not be carried out.
#[derive(Clone)]
pub struct Redis {
    lanes: Arc<Lanes>,
    limit: Duration,
}

impl Redis {
    /// Prepares connections without making one: a server that is down is not an error yet.
    ///
    /// # Errors
    /// [`RedisError::Config`] if the URL or the TLS files cannot be used.
    pub fn new(config: RedisConfig) -> Result<Self, RedisError> {
        let limit = config.response_timeout;
        Ok(Self { lanes: Arc::new(Lanes::new(config)?), limit })
    }

    /// The same connections for requests that are given up after `limit`, connecting included.
    #[must_use]
    pub fn limited_to(&self, limit: Duration) -> Self {
        Self { lanes: Arc::clone(&self.lanes), limit }
    }

    /// The same connections for a request that has failed so many times already: it may take twice as long after each
    /// failure, up to sixteen times. A large batch would otherwise never get through a Redis that is slow but answers,
    /// however often it is repeated.
    #[must_use]
    pub fn after_failures(&self, failures: u32) -> Self {
        self.limited_to(self.lanes.config().response_timeout * 2_u32.pow(failures.min(MAX_PATIENCE)))
    }

    /// Makes new connections with the credentials in `url`. What is connected stays, also in all clones.
    ///
    /// # Errors
    /// [`RedisError::Config`] if the URL cannot be used, or is for another kind, such as a Cluster instead of one server.
    pub fn use_url(&self, url: &str) -> Result<(), RedisError> {
        self.lanes.use_url(url)
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

    /// Returns true if the URL is that of a cluster, whose nodes can fail one by one.
    #[must_use]
    pub fn is_cluster(&self) -> bool {
        self.lanes.is_cluster()
    }

    /// Name of the node of a cluster that has `key`, as far as is known.
    #[must_use]
    pub fn node_of_key(&self, key: &str) -> String {
        self.node_of(self.shard_of(key))
    }

    /// Where the names that belong to `key` live.
    pub(crate) fn shard_of(&self, key: &str) -> Shard {
        if self.is_cluster() { Shard::Slot(slot_of(key.as_bytes())) } else { Shard::Server }
    }

    /// Calls a script on the siblings of `key`. The arguments start with their number. If they are not at one node
    /// because their slot is moving, the answer is `otherwise`.
    async fn call<T: FromRedisValue>(
        &self,
        script: &Script,
        key: &str,
        arguments: &impl ToRedisArgs,
        otherwise: T,
    ) -> Result<T, RedisError> {
        let (shard, moving) = (self.shard_of(key), self.lanes.moving());
        if moving.contains(shard) {
            return Ok(otherwise);
        }
        let answer = match self.query(script.call().arg(arguments)).await {
            Err(RedisError::Unavailable(cause)) if is_unknown_script(&*cause) => {
                self.query(script.call_with_text().arg(arguments)).await
            }
            answer => answer,
        };
        match answer {
            Err(error) if error.is_slot_moving() => {
                moving.notice(shard);
                Ok(otherwise)
            }
            answer => answer,
        }
    }

    /// As [`call`](Self::call) once per key, in one round trip per server. Answers are in the order of the keys.
    async fn call_many<'a, A: ToRedisArgs>(
        &self,
        script: &Script,
        keys: impl Iterator<Item = (&'a str, A)>,
        otherwise: &Value,
    ) -> Result<Vec<Value>, RedisError> {
        let groups = self.group(keys.enumerate(), |(_, (key, _))| key.as_bytes());
        let calls = |group: &Group<(usize, (&str, A))>| {
            let mut pipeline = Pipeline::with_capacity(group.items.len());
            for (nth, (_, (_, arguments))) in group.items.iter().enumerate() {
                script.call_in(&mut pipeline, nth == 0).arg(arguments);
            }
            pipeline
        };
        let requests = requests(&groups, calls);
        let mut placed = Vec::new();
        for (group, answers) in groups.iter().zip(self.run_each(&requests).await) {
            let places = group.items.iter().map(|(at, _)| *at);
            match answers {
                Ok(answers) => placed.extend(places.zip(answers)),
                Err(error) if error.is_slot_moving() => {
                    placed.extend(places.map(|at| (at, otherwise.clone())));
                }
                Err(error) => return Err(error),
            }
        }
        placed.sort_unstable_by_key(|(at, _)| *at);
        Ok(placed.into_iter().map(|(_, answer)| answer).collect())
    }
}

fn is_unknown_script(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause
        .downcast_ref::<deadpool_redis::redis::RedisError>()
        .is_some_and(|error| error.kind() == ErrorKind::Server(ServerErrorKind::NoScript))
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis").field("config", self.lanes.config()).finish()
    }
}
