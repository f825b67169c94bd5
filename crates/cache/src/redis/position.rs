use deadpool_redis::redis::Cmd;

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
        self.query_one_key(&get).await
    }

    /// Stores how far the subscriber `durable` has come, without a TTL.
    ///
    /// # Errors
    /// Any [`RedisError`].
    pub async fn store_position(&self, durable: &str, record: &[u8]) -> Result<(), RedisError> {
        let mut set = Cmd::new();
        set.arg("SET").arg(names::position(durable)).arg(record);
        self.query_one_key(&set).await
    }
}
