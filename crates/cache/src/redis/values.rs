//! Reading values.

use std::time::Duration;

use deadpool_redis::redis::{self, Cmd, Pipeline, Value};
use event::CacheKey;

use super::Redis;
use super::batch::read;
use super::lease::MAX_STALE;
use crate::RedisError;
use crate::names::stale;

/// What stands at a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Nothing,
    Value(Vec<u8>),
    /// A list, a hash, …: nothing that a reader of this cache has put there.
    WrongType,
}

impl Redis {
    /// One plain `GET`.
    pub(crate) async fn get(&self, key: &CacheKey) -> Result<Found, RedisError> {
        let mut get = Cmd::with_capacity(2, key.as_str().len() + 3);
        get.arg("GET").arg(key.as_str());
        match self.query(&get).await {
            Ok(Some(value)) => Ok(Found::Value(value)),
            Ok(None) => Ok(Found::Nothing),
            Err(RedisError::Unexpected(cause)) if is_wrong_type(&*cause) => Ok(Found::WrongType),
            Err(error) => Err(error),
        }
    }

    /// One `MGET`, in a cluster one per slot. A value of the wrong type counts as absent.
    pub(crate) async fn get_many(&self, keys: &[&CacheKey]) -> Result<Vec<Option<Vec<u8>>>, RedisError> {
        let mut get = Cmd::new();
        get.arg("MGET");
        for key in keys {
            get.arg(key.as_str());
        }
        self.query(&get).await
    }

    /// The stale copy of a value that was invalidated, or has expired, at most `longest` ago.
    pub(crate) async fn get_stale(
        &self,
        key: &CacheKey,
        longest: Duration,
    ) -> Result<Option<Vec<u8>>, RedisError> {
        let mut pipeline = Pipeline::with_capacity(2);
        pipeline.cmd("PTTL").arg(stale(key.as_str())).cmd("GET").arg(stale(key.as_str()));
        let lane = self.lane().await?;
        let mut answers = self.pipeline_on(&lane, &pipeline).await?.into_iter();
        let (Some(remaining), Some(value)) = (answers.next(), answers.next()) else {
            return Err(RedisError::unexpected("fewer answers than commands"));
        };
        let remaining_ms = u64::try_from(read::<i64>(remaining)?).unwrap_or(0);
        if remaining_ms == 0 || value == Value::Nil {
            return Ok(None);
        }
        let age = MAX_STALE.saturating_sub(Duration::from_millis(remaining_ms));
        if age > longest { Ok(None) } else { read(value) }
    }
}

fn is_wrong_type(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref::<redis::RedisError>().is_some_and(|error| error.code() == Some("WRONGTYPE"))
}
