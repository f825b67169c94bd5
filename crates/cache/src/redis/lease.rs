//! Leases: permission for one reader to fill one key after a miss.

use std::time::Duration;

use deadpool_redis::redis::{RedisWrite, ToRedisArgs, Value};
use event::CacheKey;

use super::Redis;
use super::apply::milliseconds;
use super::batch::read;
use crate::RedisError;
use crate::names::{Shard, guard, marks, stale};
use crate::script::{ACQUIRE, FILL, RELEASE};

/// Longest time that a value may be served after its invalidation, to readers who ask for stale values. All parts of
/// the system agree on it, so a copy's remaining time to live tells how long ago its value was invalidated.
pub const MAX_STALE: Duration = Duration::from_secs(60);

/// Names a reader that asks for leases. Made by chance, never twice.
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

/// Names one lease: the token of its reader and what Redis added when it granted it. A request for a lease that arrives
/// twice gets the same lease as long as that is alive, and never its name after that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseId(String);

impl std::fmt::Display for LeaseId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a reader that missed may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// Load the value and fill it; nobody else may until the lease ends.
    Grant(LeaseId),
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
        let arguments = AcquireArguments { key: key.as_str(), token, lease, unusable };
        read_acquired(self.call(&ACQUIRE, key.as_str(), &arguments, bypass()).await?)
    }

    /// As [`acquire`](Self::acquire) for many keys in one round trip per server. Answers are in the order of the keys.
    pub(crate) async fn acquire_many(
        &self,
        keys: &[(&CacheKey, bool)],
        token: LeaseToken,
        lease: Duration,
    ) -> Result<Vec<Acquired>, RedisError> {
        let arguments = keys.iter().map(|&(key, unusable)| {
            (key.as_str(), AcquireArguments { key: key.as_str(), token, lease, unusable })
        });
        self.call_many(&ACQUIRE, arguments, &bypass()).await?.into_iter().map(read_acquired).collect()
    }

    /// Stores a loaded value if the lease is still held, and says whether it was. The load must have begun after the
    /// lease was granted, on the primary, in no older snapshot.
    ///
    /// # Errors
    /// Any [`RedisError`]; the value may have been stored.
    pub async fn fill(&self, key: &CacheKey, lease: &LeaseId, fill: Fill<'_>) -> Result<bool, RedisError> {
        self.call(&FILL, key.as_str(), &self.fill_arguments(key, lease, fill), false).await
    }

    /// As [`fill`](Self::fill) for many keys in one round trip per server. Answers are in the order of the keys.
    pub(crate) async fn fill_many(
        &self,
        fills: &[(&CacheKey, &LeaseId, Fill<'_>)],
    ) -> Result<Vec<bool>, RedisError> {
        let arguments =
            fills.iter().map(|&(key, lease, fill)| (key.as_str(), self.fill_arguments(key, lease, fill)));
        self.call_many(&FILL, arguments, &Value::Int(0)).await?.into_iter().map(read).collect()
    }

    /// Gives back, without filling, the lease of `key` that this token was granted, if it was.
    ///
    /// # Errors
    /// Any [`RedisError`]; the lease ends by itself.
    pub async fn release(&self, key: &CacheKey, token: LeaseToken) -> Result<(), RedisError> {
        let arguments = ReleaseArguments { key: key.as_str(), token };
        self.call(&RELEASE, key.as_str(), &arguments, Value::Nil).await.map(drop)
    }

    fn fill_arguments<'a>(&self, key: &'a CacheKey, lease: &'a LeaseId, fill: Fill<'a>) -> FillArguments<'a> {
        let key = key.as_str();
        FillArguments { key, shard: self.shard_of(key), lease, fill }
    }
}

struct AcquireArguments<'a> {
    key: &'a str,
    token: LeaseToken,
    lease: Duration,
    unusable: bool,
}

impl ToRedisArgs for AcquireArguments<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        let Self { key, token, lease, unusable } = self;
        (3, key, guard(key), marks(key)).write_redis_args(out);
        (token.to_string(), milliseconds(*lease), u8::from(*unusable)).write_redis_args(out);
    }
}

struct FillArguments<'a> {
    key: &'a str,
    shard: Shard,
    lease: &'a LeaseId,
    fill: Fill<'a>,
}

impl ToRedisArgs for FillArguments<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        let Self { key, shard, lease, fill } = self;
        (4, key, guard(key), stale(key), shard.has_stale_copies()).write_redis_args(out);
        (&lease.0, fill.value, milliseconds(fill.ttl)).write_redis_args(out);
        match fill.version {
            Some(version) => version.write_redis_args(out),
            None => "".write_redis_args(out),
        }
        match fill.keep_stale_copy {
            true => milliseconds(fill.ttl + MAX_STALE).write_redis_args(out),
            false => "".write_redis_args(out),
        }
    }
}

struct ReleaseArguments<'a> {
    key: &'a str,
    token: LeaseToken,
}

impl ToRedisArgs for ReleaseArguments<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        (1, guard(self.key), self.token.to_string()).write_redis_args(out);
    }
}

/// The answer of ACQUIRE when nothing can be stored.
fn bypass() -> Value {
    Value::Array(vec![Value::BulkString(b"BYPASS".to_vec())])
}

fn read_acquired(answer: Value) -> Result<Acquired, RedisError> {
    let mut parts = read::<Vec<Vec<u8>>>(answer)?.into_iter();
    match (parts.next().as_deref(), parts.next()) {
        (Some(b"GRANT"), Some(lease)) => match String::from_utf8(lease) {
            Ok(lease) => Ok(Acquired::Grant(LeaseId(lease))),
            Err(_) => Err(RedisError::unexpected("ACQUIRE has granted a lease with no such name")),
        },
        (Some(b"WAIT"), None) => Ok(Acquired::Wait),
        (Some(b"BYPASS"), None) => Ok(Acquired::Bypass),
        (Some(b"VALUE"), Some(value)) => Ok(Acquired::Value(value)),
        _ => Err(RedisError::unexpected("ACQUIRE has no such answer")),
    }
}
