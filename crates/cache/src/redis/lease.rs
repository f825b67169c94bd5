//! Leases: permission for one reader to fill one key after a miss.

use std::time::Duration;

use deadpool_redis::redis::{Cmd, Value};
use event::CacheKey;

use super::Redis;
use super::apply::milliseconds;
use super::batch::read;
use crate::RedisError;
use crate::names::{Shard, guard, marks, stale};
use crate::script::{ACQUIRE, FILL, RELEASE};
use crate::slot::slot_of;

/// Longest time that a value may be served after its invalidation, to readers who ask for stale values. All parts of
/// the system agree on it, so a copy's remaining time to live tells how long ago its value was invalidated.
pub const MAX_STALE: Duration = Duration::from_secs(60);

/// Names the holder of a lease. Made by chance, never twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseToken(u128);

impl LeaseToken {
    /// A token nobody else has.
    #[must_use]
    pub fn generate() -> Self {
        Self(rand::random())
    }
}

impl std::fmt::Display for LeaseToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What a reader that missed may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// Load the value and fill it; nobody else may until the lease ends.
    Grant,
    /// Somebody else is loading it.
    Wait,
    /// A transaction is about to change the key: load it, do not fill it.
    Bypass,
    /// Somebody has filled it in the meantime.
    Value(Vec<u8>),
}

/// A loaded value on its way into the cache.
#[derive(Debug, Clone, Copy)]
pub struct Fill<'a> {
    /// The value, as readers of the cache expect it.
    pub value: &'a [u8],
    /// How long it may be served.
    pub ttl: Duration,
    /// Version of the row it was loaded from, if later changes of that row come as updates.
    pub version: Option<i64>,
    /// Whether to keep a copy that outlives the value's invalidation for readers who ask for stale values.
    pub keep_stale_copy: bool,
}

impl Redis {
    /// Asks for the right to fill `key`. `unusable` says that the value present, if any, is to be replaced.
    ///
    /// # Errors
    /// Any [`RedisError`]; load without filling.
    pub async fn acquire(
        &self,
        key: &CacheKey,
        token: LeaseToken,
        lease: Duration,
        unusable: bool,
    ) -> Result<Acquired, RedisError> {
        let answer =
            self.call(&ACQUIRE, |call| add_acquire(call, key.as_str(), token, lease, unusable)).await?;
        read_acquired(answer)
    }

    /// Stores a loaded value if the lease is still held, and says whether it was. The load must have begun after the
    /// lease was granted, on the primary, in no older snapshot.
    ///
    /// # Errors
    /// Any [`RedisError`]; the value may have been stored.
    pub async fn fill(&self, key: &CacheKey, token: LeaseToken, fill: Fill<'_>) -> Result<bool, RedisError> {
        let shard = self.shard_of(key.as_str());
        self.call(&FILL, |call| add_fill(call, key.as_str(), shard, token, &fill)).await
    }

    /// Gives a lease back without filling.
    ///
    /// # Errors
    /// Any [`RedisError`]; the lease ends by itself.
    pub async fn release(&self, key: &CacheKey, token: LeaseToken) -> Result<(), RedisError> {
        let add = |call: &mut Cmd| {
            call.arg(1).arg(guard(key.as_str())).arg(token.to_string());
        };
        self.call::<Value>(&RELEASE, add).await.map(drop)
    }

    pub(super) fn shard_of(&self, key: &str) -> Shard {
        if self.is_cluster() { Shard::Slot(slot_of(key.as_bytes())) } else { Shard::Server }
    }
}

fn add_acquire(call: &mut Cmd, key: &str, token: LeaseToken, lease: Duration, unusable: bool) {
    call.arg(3).arg(key).arg(guard(key)).arg(marks(key));
    call.arg(token.to_string()).arg(milliseconds(lease)).arg(u8::from(unusable));
}

fn read_acquired(answer: Value) -> Result<Acquired, RedisError> {
    let mut parts = read::<Vec<Vec<u8>>>(answer)?.into_iter();
    match (parts.next().as_deref(), parts.next()) {
        (Some(b"GRANT"), None) => Ok(Acquired::Grant),
        (Some(b"WAIT"), None) => Ok(Acquired::Wait),
        (Some(b"BYPASS"), None) => Ok(Acquired::Bypass),
        (Some(b"VALUE"), Some(value)) => Ok(Acquired::Value(value)),
        _ => Err(RedisError::unexpected("ACQUIRE has no such answer")),
    }
}

fn add_fill(call: &mut Cmd, key: &str, shard: Shard, token: LeaseToken, fill: &Fill<'_>) {
    call.arg(4).arg(key).arg(guard(key)).arg(stale(key)).arg(shard.has_stale_copies());
    call.arg(token.to_string()).arg(fill.value).arg(milliseconds(fill.ttl));
    match fill.version {
        Some(version) => call.arg(version),
        None => call.arg(""),
    };
    match fill.keep_stale_copy {
        true => call.arg(milliseconds(fill.ttl + MAX_STALE)),
        false => call.arg(""),
    };
}
