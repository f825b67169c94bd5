use deadpool_redis::redis::{Cmd, Value};

use super::Redis;
use crate::{RedisError, names};

impl Redis {
    /// What the subscriber `durable` last stored about how far it has come. It lives in the cache itself, so that a
    /// cache that comes back with old data comes back with an old position too.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn load_position(&self, durable: &str) -> Result<Option<Vec<u8>>, RedisError> {
        let mut get = Cmd::new();
        get.arg("GET").arg(names::position(durable));
        self.query(&get).await
    }

    /// Stores how far the subscriber `durable` has come, without a TTL.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn store_position(&self, durable: &str, record: &[u8]) -> Result<(), RedisError> {
        let mut set = Cmd::new();
        set.arg("SET").arg(names::position(durable)).arg(record);
        self.query(&set).await
    }

    /// Loads the id under which the subscriber `durable` knows this cache. The id is part of the data: a promoted replica
    /// has the same, another database of the same server has another.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn load_identity(&self, durable: &str) -> Result<Option<String>, RedisError> {
        let mut get = Cmd::new();
        get.arg("GET").arg(names::identity(durable));
        self.query(&get).await
    }

    /// Stores `id` as the id of this cache unless it has one, and returns the id that counts.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn keep_identity(&self, durable: &str, id: &str) -> Result<String, RedisError> {
        let mut set = Cmd::new();
        set.arg("SET").arg(names::identity(durable)).arg(id).arg("NX");
        self.query::<Value>(&set).await?;
        self.load_identity(durable).await?.ok_or_else(|| RedisError::unavailable("Redis did not keep the id"))
    }

    /// Generates an id for a cache that has none.
    #[must_use]
    pub fn generate_identity() -> String {
        format!("{:016x}", rand::random::<u64>())
    }
}
