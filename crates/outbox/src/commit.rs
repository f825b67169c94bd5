//! Commits that tell the cache themselves, before or after, instead of leaving it to the event alone.

mod marks;
mod writer;

use std::time::Duration;

use cache::RedisError;
use event::{CacheKey, Change, Event};
use sqlx::postgres::{PgDatabaseError, PgSeverity};
use sqlx::{Postgres, Transaction};

pub use marks::Marks;
pub use writer::Writer;

use crate::{EnqueueError, Receipt};

/// Longest waits of a [`Writer`].
#[derive(Debug, Clone, Copy)]
pub struct CommitLimits {
    /// For the enqueue, and again for the answer to `COMMIT`. A commit that takes longer has an unknown outcome, so this
    /// is generous: a synchronous standby that is away holds it up.
    pub database: Duration,
    /// For marking. The transaction holds its locks meanwhile.
    pub mark: Duration,
    /// For the cache after the commit. What does not happen in time is done by the event.
    pub finish: Duration,
}

impl Default for CommitLimits {
    fn default() -> Self {
        Self {
            database: Duration::from_secs(30),
            mark: Duration::from_secs(1),
            finish: Duration::from_millis(500),
        }
    }
}

/// A transaction that has committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Of its events, in their order.
    pub receipts: Vec<Receipt>,
    /// Whether everything in the cache is done too. If not (it has been logged), the event does it: until then the keys
    /// of a strict write are not cached, and those of a default one may be stale.
    pub finished: bool,
}

/// Why a write did not, or may not have, come to pass.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Nothing has changed: what was given is a savepoint, that is, was begun in another transaction. It has been rolled
    /// back; the transaction around it goes on as if it had not been begun. Give that one, once everything is done.
    #[error("rolled back to the savepoint given, since only the outermost transaction can be committed")]
    Savepoint,
    /// Nothing has changed: the events could not be enqueued.
    #[error("rolled back, since the events of the transaction could not be enqueued")]
    Enqueue(#[source] EnqueueError),
    /// Nothing has changed: the cache could not be told before the commit. Try again, or write in default mode.
    #[error("rolled back, since the cache could not be told before the commit")]
    Mark(#[source] RedisError),
    /// Nothing has changed: Postgres refused the commit, for example because of a deferred constraint or a serialization
    /// failure.
    #[error("rolled back, since the database refused the commit")]
    Refused(#[source] sqlx::Error),
    /// Nobody knows: the connection was lost, or no answer came in time, after `COMMIT` had been sent. It may still
    /// commit at any later time. The cache stays right either way; the keys of a strict write are not cached until
    /// Postgres knows.
    #[error("the outcome of the commit is not known")]
    Unknown(#[source] sqlx::Error),
}

impl CommitError {
    /// Whether it is certain that the transaction changed nothing, now and later.
    #[must_use]
    pub fn is_rolled_back(&self) -> bool {
        !matches!(self, Self::Unknown(_))
    }
}

/// Errors that Postgres or a pooler also answers when the commit may have happened: lost connection, statement completion
/// unknown, shutdown, failure of the system, internal error.
const UNCERTAIN: [&str; 5] = ["08", "40003", "57P", "58", "XX"];

/// Sends `COMMIT` and tells apart what the answer means.
async fn commit(tx: Transaction<'_, Postgres>, limit: Duration) -> Result<(), CommitError> {
    match tokio::time::timeout(limit, tx.commit()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) if is_refusal(&error) => Err(CommitError::Refused(error)),
        Ok(Err(error)) => Err(CommitError::Unknown(error)),
        Err(_) => Err(CommitError::Unknown(timed_out())),
    }
}

/// Only an error that leaves the session alive comes before the point of no return. A session that ends while it waits
/// for a standby answers `FATAL`, and has committed.
fn is_refusal(error: &sqlx::Error) -> bool {
    let answer = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    answer.is_some_and(|answer| means_refusal(answer.severity(), answer.code()))
}

fn means_refusal(severity: PgSeverity, code: &str) -> bool {
    severity == PgSeverity::Error && !UNCERTAIN.iter().any(|class| code.starts_with(class))
}

/// The keys that can be told to the cache by name. Namespaces are left to the event.
fn exact_keys(event: &Event) -> &[CacheKey] {
    if *event.change() == Change::Namespace { &[] } else { event.keys() }
}

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn only_an_error_that_leaves_the_session_alive_means_that_nothing_was_committed() {
        // Unique, foreign key, exclusion, raised in a deferred trigger, serialization, deadlock, cancelled, failed before.
        for code in ["23505", "23503", "23P01", "P0001", "40001", "40P01", "57014", "25P02"] {
            assert!(means_refusal(PgSeverity::Error, code), "{code}");
            for severity in [PgSeverity::Fatal, PgSeverity::Panic, PgSeverity::Warning, PgSeverity::Notice] {
                assert!(!means_refusal(severity, code), "{severity:?} {code}");
            }
        }
        // Connection lost, completion unknown, shutdown, I/O, internal, and what poolers answer when the server is gone.
        for code in [
            "08006", "08P01", "08000", "40003", "57P01", "57P02", "57P03", "57P05", "58030", "58000", "XX000",
        ] {
            assert!(!means_refusal(PgSeverity::Error, code), "{code}");
        }
    }

    #[test]
    fn a_lost_connection_means_nothing() {
        let lost = [io::ErrorKind::ConnectionReset, io::ErrorKind::UnexpectedEof, io::ErrorKind::BrokenPipe];
        for kind in lost {
            assert!(!is_refusal(&sqlx::Error::Io(kind.into())), "{kind:?}");
        }
        assert!(!is_refusal(&timed_out()) && !is_refusal(&sqlx::Error::PoolClosed));
        assert!(!is_refusal(&sqlx::Error::Protocol("garbage".to_owned())));
        assert!(!is_refusal(&sqlx::Error::WorkerCrashed));
    }
}
