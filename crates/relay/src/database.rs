//! The relay's connections to Postgres.

use std::str::FromStr;
use std::time::Duration;

use outbox::SchemaState;
use service::{Backoff, SecretUrl};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::time::Instant;

/// How long to wait for a connection before a claim counts as failed.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

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
        source: sqlx::Error,
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
        .map_err(|source| DatabaseError::Url { url: url.clone(), source })?
        .application_name("relay");
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    loop {
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .min_connections(1)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // A ping before every claim would double its round trips; a dead connection shows soon enough.
            .test_before_acquire(false)
            .connect_with(options.clone())
            .await;
        let source = match pool {
            Ok(pool) => return Ok(pool),
            Err(error) => error,
        };
        if is_refusal(&source) {
            return Err(DatabaseError::Refused { url: url.clone(), source });
        }
        let delay = backoff.next_delay();
        if started.elapsed() + delay >= patience {
            return Err(DatabaseError::Unreachable { url: url.clone(), waited: patience, source });
        }
        tokio::time::sleep(delay).await;
    }
}

/// Authorization failures (class 28) and a database that does not exist (3D000); not a server that is still starting.
fn is_refusal(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code.starts_with("28") || code == "3D000")
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
            return Err(DatabaseError::Refused { url: url.clone(), source });
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
