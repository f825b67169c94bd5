//! Reading values.

use std::time::Duration;

use deadpool_redis::redis::{self, Cmd, Pipeline, Value};
use event::CacheKey;
use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::Redis;
use super::batch::{Request, read, requests};
use super::lease::MAX_STALE;
use crate::RedisError;
use crate::names::{marks, stale};

/// Most reads in flight at once of keys that have to be read one by one.
const MAX_SINGLE_READS: usize = 256;

/// What stands at a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Nothing,
    Value(Vec<u8>),
    /// A list, a hash, …: nothing that a reader of this cache has put there.
    WrongType,
}

impl Found {
    fn value(self) -> Option<Vec<u8>> {
        if let Self::Value(value) = self { Some(value) } else { None }
    }
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
            // Not found at either node, with others asking there at the same time.
            Err(error) if error.is_slot_moving() => Ok(Found::Nothing),
            Err(error) => Err(error),
        }
    }

    /// One `MGET`, in a cluster one per slot. A value of the wrong type counts as absent.
    pub(crate) async fn get_many(&self, keys: &[&CacheKey]) -> Result<Vec<Option<Vec<u8>>>, RedisError> {
        let groups = self.group(keys.iter().enumerate(), |(_, key)| key.as_str().as_bytes());
        let requests = requests(&groups, |group| {
            let mut pipeline = Pipeline::with_capacity(1);
            pipeline.cmd("MGET");
            for (_, key) in &group.items {
                pipeline.arg(key.as_str());
            }
            pipeline
        });
        let mut values = vec![None; keys.len()];
        for (group, answers) in groups.iter().zip(self.run_each(&requests).await) {
            let found = match answers {
                Ok(answers) => read(answers.into_iter().next().unwrap_or(Value::Nil))?,
                Err(error) if error.is_slot_moving() => self.get_one_by_one(&group.items).await?,
                Err(error) => return Err(error),
            };
            for ((at, _), value) in group.items.iter().zip(found) {
                values[*at] = value;
            }
        }
        Ok(values)
    }

    /// For keys that are not all at one node.
    async fn get_one_by_one(&self, keys: &[(usize, &&CacheKey)]) -> Result<Vec<Option<Vec<u8>>>, RedisError> {
        let each: Vec<_> = keys.iter().map(|(_, key)| self.get(key)).collect();
        let found = stream::iter(each).buffered(MAX_SINGLE_READS).try_collect::<Vec<_>>().await?;
        Ok(found.into_iter().map(Found::value).collect())
    }

    /// The stale copy of a value that was invalidated, or has expired, at most `longest` ago, unless the key is marked.
    pub(crate) async fn get_stale(
        &self,
        key: &CacheKey,
        longest: Duration,
    ) -> Result<Option<Vec<u8>>, RedisError> {
        let key = key.as_str();
        let mut pipeline = Pipeline::with_capacity(3);
        pipeline.cmd("EXISTS").arg(marks(key)).cmd("PTTL").arg(stale(key)).cmd("GET").arg(stale(key));
        let request = Request { shard: self.shard_of(key), pipeline };
        let answers = match self.run_each(&[request]).await.pop() {
            Some(Err(error)) if error.is_slot_moving() => return Ok(None),
            answers => answers.unwrap_or(Ok(Vec::new()))?,
        };
        let [marked, remaining, value]: [Value; 3] =
            answers.try_into().map_err(|_| RedisError::unexpected("not as many answers as commands"))?;
        let remaining_ms = u64::try_from(read::<i64>(remaining)?).unwrap_or(0);
        let age = MAX_STALE.saturating_sub(Duration::from_millis(remaining_ms));
        let acceptable = !read::<bool>(marked)? && remaining_ms > 0 && age <= longest;
        if acceptable { read(value) } else { Ok(None) }
    }
}

fn is_wrong_type(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref::<redis::RedisError>().is_some_and(|error| error.code() == Some("WRONGTYPE"))
}
