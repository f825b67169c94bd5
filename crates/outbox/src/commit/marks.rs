use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use cache::{Mark, Redis, RedisError};
use event::{CacheKey, Event, TransactionId};

use super::exact_keys;

/// How often to try to mark. Connections that died unnoticed, as all do when Redis restarts, should not fail a write:
/// one attempt more than a [`RedisConfig`](cache::RedisConfig) has by default.
const ATTEMPTS: usize = 5;

/// Pause between attempts: all together outlast a connection attempt that failed just now and is not repeated at once.
const PAUSE: Duration = Duration::from_millis(20);

/// The marks of one transaction: the steps of [`Writer::commit_strict`](crate::Writer::commit_strict) one by one, for
/// those who commit by other means.
///
/// Enqueue, ask for [`transaction_id`](crate::transaction_id), [`set`](Self::set) as the last thing before `COMMIT`, then
/// commit.
///
/// | What happened | What to do |
/// |---|---|
/// | `set` failed | roll back, then [`remove`](Self::remove) as far as possible |
/// | committed or rolled back, surely | [`remove`](Self::remove) |
/// | the answer to `COMMIT` did not arrive | nothing: event and resolver remove them when Postgres knows |
///
/// Dropping it removes nothing, which is always safe.
#[derive(Debug, Clone)]
pub struct Marks {
    redis: Redis,
    keys: Arc<[CacheKey]>,
    mark: Mark,
}

impl Marks {
    /// Prepares the marks for every key of `events`, which must be all events of `transaction`: see
    /// [`transaction_id`](crate::transaction_id). Does nothing yet.
    ///
    /// To be made anew for every attempt to commit: the marks of each are told from all others.
    #[must_use]
    pub fn new(redis: Redis, events: &[Event], transaction: TransactionId) -> Self {
        let distinct: BTreeSet<_> = events.iter().flat_map(exact_keys).collect();
        Self { redis, keys: distinct.into_iter().cloned().collect(), mark: Mark::generate(transaction) }
    }

    /// Sets them, within `limit`. From its success on no reader finds a value of these keys, and none can be stored,
    /// until the marks are removed.
    ///
    /// # Errors
    /// Any [`RedisError`], and then the transaction must not commit. Marks may exist all the same, even later (a
    /// request without an answer may still be carried out); they cost hits, until the resolver removes them.
    pub async fn set(&self, limit: Duration) -> Result<(), RedisError> {
        let attempts = async {
            let mut more_attempts = ATTEMPTS - 1;
            loop {
                match self.mark().await {
                    Err(error) if error.is_retryable() && more_attempts > 0 => {
                        more_attempts -= 1;
                        tokio::time::sleep(PAUSE).await;
                    }
                    marked => return marked,
                }
            }
        };
        tokio::time::timeout(limit, attempts).await.unwrap_or_else(|elapsed| Err(too_late(elapsed)))
    }

    async fn mark(&self) -> Result<(), RedisError> {
        let Self { redis, keys, mark } = self.clone();
        finishing(async move { redis.mark(&keys, mark).await }).await
    }

    /// Removes them, within `limit`, deleting the keys first. Only when the outcome of the transaction is known.
    ///
    /// # Errors
    /// Any [`RedisError`]; the event of the transaction or the resolver removes what is left.
    pub async fn remove(&self, limit: Duration) -> Result<(), RedisError> {
        let Self { redis, keys, mark } = self.clone();
        within(limit, async move { redis.unmark(&keys, mark).await.map(drop) }).await
    }
}

/// Waits for a request at most as long as `limit`. The request itself goes on until the client's own limit.
pub(super) async fn within(
    limit: Duration,
    request: impl Future<Output = Result<(), RedisError>> + Send + 'static,
) -> Result<(), RedisError> {
    let waiting = tokio::time::timeout(limit, finishing(request));
    waiting.await.unwrap_or_else(|elapsed| Err(too_late(elapsed)))
}

/// Runs a request to its end even if nobody waits for it any more. The client replaces a connection that does not answer
/// when a request on it times out; a request that is dropped before would leave the dead connection to the next write.
async fn finishing(
    request: impl Future<Output = Result<(), RedisError>> + Send + 'static,
) -> Result<(), RedisError> {
    tokio::spawn(request).await.unwrap_or_else(|stopped| Err(RedisError::Unavailable(stopped.into())))
}

fn too_late(elapsed: tokio::time::error::Elapsed) -> RedisError {
    RedisError::Unavailable(elapsed.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_every_event_is_marked_once() {
        let redis = Redis::new(cache::RedisConfig::default()).unwrap();
        let events = [Event::delete(["b", "a"]).unwrap(), Event::delete(["c", "a"]).unwrap()];
        let marks = Marks::new(redis, &events, TransactionId { history: None, xid: 7 });
        let keys: Vec<_> = marks.keys.iter().map(CacheKey::as_str).collect();
        assert_eq!(keys, ["a", "b", "c"]);
    }
}
