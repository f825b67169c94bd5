use cache::{Redis, RedisError};
use event::Event;
use sqlx::postgres::PgTransactionManager;
use sqlx::{Postgres, Transaction};
// The one thing that sqlx does not pass on: how many transactions are open, one inside the other.
use sqlx_core::transaction::TransactionManager;

use super::marks::within;
use super::{CommitError, CommitLimits, Committed, Marks, commit, exact_keys, timed_out};
use crate::enqueue::enqueue_and_identify;
use crate::{EnqueueError, Receipt, enqueue_all};

/// Commits transactions together with their events and tells the cache. Cheap to clone; one per process is enough.
#[derive(Debug, Clone)]
pub struct Writer {
    redis: Redis,
    limits: CommitLimits,
}

impl Writer {
    /// A writer whose readers use `redis`.
    #[must_use]
    pub fn new(redis: Redis) -> Self {
        Self::with_limits(redis, CommitLimits::default())
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_limits(redis: Redis, limits: CommitLimits) -> Self {
        Self { redis, limits }
    }

    /// Strict write: enqueues `events`, marks their keys, commits, removes the marks. No read that begins after it has
    /// returned finds an older value in the cache, not even for a moment.
    ///
    /// `tx` is the outermost transaction, not a savepoint that was begun in one.
    ///
    /// `events` must name every key that the transaction changes; only what is named here is marked, so an event that
    /// was enqueued before, or by a trigger, is delivered in default mode, and so are namespaces. The transaction holds its locks during one
    /// round trip to Redis.
    ///
    /// # Errors
    /// [`CommitError`]; after [`CommitError::Unknown`] the keys are not cached until Postgres knows the outcome.
    ///
    /// Dropped halfway it leaves the cache right: the transaction rolls back unless `COMMIT` was sent, and marks that
    /// were set stay until the event or the resolver removes them, seconds later. Where callers go away often, as HTTP
    /// clients do, run it in a task of its own.
    pub async fn commit_strict(
        &self,
        tx: Transaction<'_, Postgres>,
        events: &[Event],
    ) -> Result<Committed, CommitError> {
        let mut tx = self.whole(tx).await?;
        let (receipts, transaction) = match events {
            [] => (self.nothing_to_enqueue(&mut tx).await?, None),
            _ => self.enqueued(enqueue_and_identify(&mut tx, events)).await?,
        };
        let Some(transaction) = transaction else {
            commit(tx, self.limits.database).await?;
            return Ok(Committed { receipts, finished: true });
        };
        let marks = Marks::new(self.redis.clone(), events, transaction);
        if let Err(error) = marks.set(self.limits.mark).await {
            self.roll_back(tx).await;
            self.forget(marks);
            return Err(CommitError::Mark(error));
        }
        match commit(tx, self.limits.database).await {
            Ok(()) => {
                let finished = noted(marks.remove(self.limits.finish).await, "remove marks");
                Ok(Committed { receipts, finished })
            }
            Err(error) => {
                if error.is_rolled_back() {
                    self.forget(marks);
                }
                Err(error)
            }
        }
    }

    /// Default write: enqueues `events`, commits, then invalidates their keys at once. The event repeats it, in case
    /// this process dies in between; a reader may see the old value for as long as the round trip takes. `tx` is the
    /// outermost transaction, not a savepoint that was begun in one.
    ///
    /// # Errors
    /// [`CommitError`], never [`CommitError::Mark`]: trouble with Redis does not fail the write.
    pub async fn commit_and_invalidate(
        &self,
        tx: Transaction<'_, Postgres>,
        events: &[Event],
    ) -> Result<Committed, CommitError> {
        let mut tx = self.whole(tx).await?;
        let receipts = match events {
            [] => self.nothing_to_enqueue(&mut tx).await?,
            _ => self.enqueued(enqueue_all(&mut tx, events)).await?,
        };
        commit(tx, self.limits.database).await?;
        let keys: Vec<_> = events.iter().flat_map(exact_keys).cloned().collect();
        let redis = self.redis.clone();
        let invalidation = async move { redis.invalidate(&keys).await.map(drop) };
        let invalidated = within(self.limits.finish, invalidation).await;
        Ok(Committed { receipts, finished: noted(invalidated, "invalidate keys") })
    }

    /// Refuses a savepoint, which has the same type. To commit it is to release it: the transaction it belongs to stays
    /// open, and its marks would be removed before anybody can see what it has changed.
    async fn whole<'a>(
        &self,
        tx: Transaction<'a, Postgres>,
    ) -> Result<Transaction<'a, Postgres>, CommitError> {
        if PgTransactionManager::get_transaction_depth(&tx) <= 1 {
            return Ok(tx);
        }
        self.roll_back(tx).await;
        Err(CommitError::Savepoint)
    }

    async fn enqueued<T>(
        &self,
        enqueue: impl Future<Output = Result<T, EnqueueError>>,
    ) -> Result<T, CommitError> {
        tokio::time::timeout(self.limits.database, enqueue)
            .await
            .unwrap_or_else(|_| Err(EnqueueError::Database(timed_out())))
            .map_err(CommitError::Enqueue)
    }

    /// Finds out whether a transaction without events has failed. The server answers `COMMIT` without an error then, and
    /// rolls back.
    async fn nothing_to_enqueue(
        &self,
        tx: &mut Transaction<'_, Postgres>,
    ) -> Result<Vec<Receipt>, CommitError> {
        let asked = tokio::time::timeout(self.limits.database, sqlx::raw_sql("select 1").execute(&mut **tx));
        asked.await.unwrap_or_else(|_| Err(timed_out())).map_err(CommitError::Refused)?;
        Ok(Vec::new())
    }

    /// If this takes too long or fails, the server rolls back when it notices that the connection is gone: `COMMIT` was
    /// never sent.
    async fn roll_back(&self, tx: Transaction<'_, Postgres>) {
        let rolled_back = tokio::time::timeout(self.limits.finish, tx.rollback()).await;
        if let Ok(Err(error)) = rolled_back {
            tracing::debug!(%error, "could not roll back a transaction; the server does it by itself");
        }
    }

    /// Removes the marks of a transaction that rolled back, without letting the caller wait. A request to mark that is
    /// carried out later still leaves a mark, to the resolver.
    fn forget(&self, marks: Marks) {
        let limit = self.limits.finish;
        tokio::spawn(async move {
            if let Err(error) = marks.remove(limit).await {
                tracing::debug!(%error, "could not remove marks of a transaction that rolled back; the resolver will");
            }
        });
    }
}

/// What is left to the event is no failure of the write, but worth a line.
fn noted(done: Result<(), RedisError>, what: &str) -> bool {
    if let Err(error) = &done {
        tracing::warn!(%error, "could not {what} after a commit; its event will");
    }
    done.is_ok()
}
