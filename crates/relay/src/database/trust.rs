//! Trust in connections that are open already: after a failure each one is asked before its next use.
//!
//! A connection outlives what it was opened to. Its server may have become a standby, may be about to stop, or may be
//! gone without a word.

use std::error::Error;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use chrono::Utc;
use sqlx::{Connection, PgConnection};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::servers;
use super::session::{self, Access};

/// Time that a suspect connection may take to answer.
pub(super) const SUSPECT_PATIENCE: Duration = Duration::from_secs(2);

/// Time for which all connections are suspect after one of them failed.
const SUSPECT_FOR: Duration = Duration::from_mins(1);

/// When Postgres last failed to do what was asked, in seconds since the Unix epoch. One pool a process.
static FAILED_AT: AtomicI64 = AtomicI64::new(i64::MIN);

/// Wakes the search for the primary after a failure.
pub(super) static FAILED: Notify = Notify::const_new();

/// Waits for an answer for `patience` at most. A host that lost its power, or a firewall that forgot the connection, says
/// nothing, and nothing else would notice: the connection is closed then, rather than returned to the pool.
///
/// Any failure makes all connections suspect: a statement that fails may be the only sign of a failover.
///
/// # Errors
/// What the database says, or [`sqlx::Error::Io`] of the kind `TimedOut`.
pub async fn within<T, E: From<sqlx::Error> + Error + 'static>(
    patience: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::pin!(answer);
    tokio::select! {
        answered = &mut answer => answered.map_err(|error| {
            suspect();
            servers::explain(error)
        }),
        () = tokio::time::sleep(patience) => {
            // Before the future is dropped, and its connection with it.
            suspect();
            Err(silence(patience).into())
        }
    }
}

fn suspect() {
    FAILED_AT.store(Utc::now().timestamp(), Ordering::Relaxed);
    FAILED.notify_one();
}

fn is_suspect() -> bool {
    let failed_for = Utc::now().timestamp().saturating_sub(FAILED_AT.load(Ordering::Relaxed));
    failed_for.unsigned_abs() <= SUSPECT_FOR.as_secs()
}

fn silence(patience: Duration) -> sqlx::Error {
    let silence = format!("no answer within {patience:?}");
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, silence))
}

/// Decides if a connection may be used again. One to a server that cannot write is closed, and the pool opens another.
pub(super) async fn check_acquire(
    connection: &mut PgConnection,
    access: Access,
) -> Result<bool, sqlx::Error> {
    if !is_suspect() {
        return Ok(true);
    }
    let checked = timeout(SUSPECT_PATIENCE, session::check(connection, access)).await;
    checked.unwrap_or_else(|_| Err(silence(SUSPECT_PATIENCE)))?;
    Ok(true)
}

/// Decides if a connection may go back to the pool. The pool asks the server, and would wait for ever for one that is
/// silent.
pub(super) async fn check_release(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    if !is_suspect() {
        return Ok(true);
    }
    let answered = timeout(SUSPECT_PATIENCE, connection.ping()).await;
    answered.unwrap_or_else(|_| Err(silence(SUSPECT_PATIENCE)))?;
    Ok(true)
}
