//! The relay's connections to Postgres.

use std::str::FromStr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use chrono::Utc;
use outbox::SchemaState;
use service::{Backoff, SecretUrl, UsageError};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::time::{Instant, timeout};

/// How the connections show in `pg_stat_activity`.
pub const APPLICATION_NAME: &str = "relay";

/// How long to wait for a connection before a claim counts as failed.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a suspect connection may take to answer.
const RELEASE_PATIENCE: Duration = Duration::from_secs(2);

/// How long Postgres may take to answer what should take milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How long the attempt may take that finds out why there is no connection.
const EXPLAIN_PATIENCE: Duration = Duration::from_secs(2);

/// SQLSTATE insufficient_privilege.
const LACKS_RIGHT: &str = "42501";

/// How long a connection is suspect after one of the pool fell silent.
const SUSPECT_FOR: Duration = Duration::from_mins(1);

/// When a connection last fell silent, in seconds since the Unix epoch. One pool a process.
static SILENT_AT: AtomicI64 = AtomicI64::new(i64::MIN);

/// Waits for an answer for `patience` at most. A host that lost its power, or a firewall that forgot the connection, says
/// nothing, and nothing else would notice: the connection is closed then, rather than returned to the pool.
///
/// # Errors
/// What the database says, or [`sqlx::Error::Io`] of the kind `TimedOut`.
pub async fn within<T, E: From<sqlx::Error>>(
    patience: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::pin!(answer);
    tokio::select! {
        answered = &mut answer => answered,
        () = tokio::time::sleep(patience) => {
            // Before the future is dropped, and its connection with it.
            SILENT_AT.store(Utc::now().timestamp(), Ordering::Relaxed);
            let silence = format!("no answer within {patience:?}");
            let error = std::io::Error::new(std::io::ErrorKind::TimedOut, silence);
            Err(sqlx::Error::Io(error).into())
        }
    }
}

/// Whether a connection may go back to the pool. The pool asks the server, and would wait for ever for one that is silent.
async fn check_release(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let silent_for = Utc::now().timestamp().saturating_sub(SILENT_AT.load(Ordering::Relaxed));
    if silent_for.unsigned_abs() > SUSPECT_FOR.as_secs() {
        return Ok(true);
    }
    let answered = timeout(RELEASE_PATIENCE, connection.ping()).await;
    answered.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))?;
    Ok(true)
}

/// Closes the pool. Connections that are stuck are left to the end of the process.
pub async fn close(pool: &PgPool) {
    if timeout(RELEASE_PATIENCE, pool.close()).await.is_err() {
        tracing::warn!("connections to Postgres do not close; leaving them");
    }
}

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// The URL is not one of Postgres.
    #[error("DATABASE_URL (--database-url) {url} is not a Postgres URL")]
    Url {
        /// The URL, without its password.
        url: SecretUrl,
        /// What is wrong.
        #[source]
        source: UsageError,
    },
    /// The server refuses the role, its password or the database.
    #[error("Postgres at {url} refuses the connection; check user, password and database in DATABASE_URL")]
    Refused {
        /// The URL, without its password.
        url: SecretUrl,
        /// What the server said.
        #[source]
        source: sqlx::Error,
    },
    /// The role lacks a right.
    #[error(
        "the role that DATABASE_URL {url} names lacks a right; run the grants of the README, section Roles"
    )]
    Forbidden {
        /// The URL, without its password.
        url: SecretUrl,
        /// What the server said.
        #[source]
        source: anyhow::Error,
    },
    /// It answers something else than what was asked.
    #[error("Postgres at {url} does not say what is installed in the schema `outbox`")]
    Unexpected {
        /// The URL, without its password.
        url: SecretUrl,
        /// What the server said.
        #[source]
        source: sqlx::Error,
    },
    /// Nobody answers there.
    #[error(
        "cannot connect to Postgres at {url} within {waited:?}; check DATABASE_URL and that the server runs"
    )]
    Unreachable {
        /// The URL, without its password.
        url: SecretUrl,
        /// How long it was tried.
        waited: Duration,
        /// The last failure.
        #[source]
        source: sqlx::Error,
    },
    /// The schema is not there.
    #[error("the database has no schema `outbox`; run `relay migrate`")]
    NotInstalled,
    /// The schema is older than this program.
    #[error("the schema `outbox` is at version {installed}, this relay needs {needed}; run `relay migrate`")]
    TooOld {
        /// Version that is installed.
        installed: i64,
        /// Version this program needs.
        needed: i64,
    },
}

/// Connects with up to `connections`, trying again for up to `patience` while nobody answers.
///
/// # Errors
/// [`DatabaseError`].
pub async fn connect(url: &SecretUrl, connections: u32, patience: Duration) -> Result<PgPool, DatabaseError> {
    let options = PgConnectOptions::from_str(url.expose())
        .map_err(|error| DatabaseError::Url { url: url.clone(), source: UsageError::of(&error) })?
        .application_name(APPLICATION_NAME);
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    loop {
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .min_connections(1)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // A ping before every claim would double its round trips; a dead connection shows soon enough.
            .test_before_acquire(false)
            .after_release(|connection, _| Box::pin(check_release(connection)))
            .connect_with(options.clone())
            .await;
        let source = match pool {
            Ok(pool) => return Ok(pool),
            Err(error) => error,
        };
        let source = match refusal(url, source) {
            Ok(refused) => return Err(refused),
            Err(source) => source,
        };
        let delay = backoff.next_delay();
        if started.elapsed() + delay >= patience {
            let source = explain(&options, source).await;
            return Err(DatabaseError::Unreachable { url: url.clone(), waited: patience, source });
        }
        tokio::time::sleep(delay).await;
    }
}

/// The pool tries again by itself, and in the end says only that it took too long: one plain attempt says why.
pub async fn explain(options: &PgConnectOptions, error: sqlx::Error) -> sqlx::Error {
    if !matches!(error, sqlx::Error::PoolTimedOut) {
        return error;
    }
    let address = format!("{}:{}", options.get_host(), options.get_port());
    let failed = |kind, cause| {
        let text = format!("cannot connect to {address}: {cause}");
        sqlx::Error::Io(std::io::Error::new(kind, text))
    };
    match timeout(EXPLAIN_PATIENCE, PgConnection::connect_with(options)).await {
        Ok(Err(sqlx::Error::Io(cause))) => failed(cause.kind(), cause.to_string()),
        Ok(Err(cause)) => cause,
        Err(_) => failed(std::io::ErrorKind::TimedOut, format!("no answer within {EXPLAIN_PATIENCE:?}")),
        Ok(Ok(_)) => error,
    }
}

/// What the operator has to change: a missing right (42501), authorization failures (class 28) and a database that does not
/// exist (3D000). Anything else is given back, such as a server that is still starting.
fn refusal(url: &SecretUrl, source: sqlx::Error) -> Result<DatabaseError, sqlx::Error> {
    let code = source.as_database_error().and_then(|error| error.code()).unwrap_or_default();
    let url = url.clone();
    if code == LACKS_RIGHT {
        Ok(DatabaseError::Forbidden { url, source: source.into() })
    } else if code.starts_with("28") || code == "3D000" {
        Ok(DatabaseError::Refused { url, source })
    } else {
        Err(source)
    }
}

/// Installs or upgrades the schema `outbox`.
///
/// # Errors
/// What [`outbox::migrate`] says, and what to do if the role may not.
pub async fn migrate(pool: &PgPool, url: &SecretUrl) -> anyhow::Result<()> {
    outbox::migrate(pool).await.map_err(|error| {
        let source = anyhow::Error::from(error);
        let lacks_right = |cause: &sqlx::Error| {
            cause.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == LACKS_RIGHT)
        };
        if source.chain().filter_map(|cause| cause.downcast_ref()).any(lacks_right) {
            DatabaseError::Forbidden { url: url.clone(), source }.into()
        } else {
            source
        }
    })
}

/// Makes sure the schema is there and new enough, trying again for up to `patience` while the connection is lost: a
/// server that goes down accepts connections until it does.
///
/// # Errors
/// [`DatabaseError`].
pub async fn check_schema(pool: &PgPool, url: &SecretUrl, patience: Duration) -> Result<(), DatabaseError> {
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    let state = loop {
        let source = match outbox::schema_state(pool).await {
            Ok(state) => break state,
            Err(error) => error,
        };
        if !is_interruption(&source) {
            return Err(refusal(url, source)
                .unwrap_or_else(|source| DatabaseError::Unexpected { url: url.clone(), source }));
        }
        let delay = backoff.next_delay();
        if started.elapsed() + delay >= patience {
            return Err(DatabaseError::Unreachable { url: url.clone(), waited: patience, source });
        }
        tokio::time::sleep(delay).await;
    };
    match state {
        SchemaState::Current => Ok(()),
        SchemaState::Missing => Err(DatabaseError::NotInstalled),
        SchemaState::Older { installed, needed } => Err(DatabaseError::TooOld { installed, needed }),
    }
}

/// Whether the server, or the way to it, went away: no answer at all, or one of the classes connection exception (08)
/// and operator intervention (57P).
fn is_interruption(error: &sqlx::Error) -> bool {
    match error.as_database_error() {
        Some(answer) => answer.code().is_some_and(|code| code.starts_with("08") || code.starts_with("57P")),
        None => true,
    }
}
