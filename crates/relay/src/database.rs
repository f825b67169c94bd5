//! The relay's connections to Postgres.

mod servers;
mod session;
mod trust;

use std::time::Duration;

use outbox::SchemaState;
use service::{SecretUrl, UsageError};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::time::timeout;

pub use servers::{NoServer, Servers};
pub use session::{Access, Unfit};
pub use trust::within;

/// How the connections show in `pg_stat_activity`.
pub const APPLICATION_NAME: &str = "relay";

/// Time to wait for a connection before a claim counts as failed.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time that Postgres may take to answer what should take milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// SQLSTATE insufficient_privilege.
const LACKS_RIGHT: &str = "42501";

/// Closes the pool. Connections that are stuck are left to the end of the process.
pub async fn close(pool: &PgPool) {
    if timeout(trust::SUSPECT_PATIENCE, pool.close()).await.is_err() {
        tracing::warn!("connections to Postgres do not close; leaving them");
    }
}

/// Reasons why the database cannot be used.
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
    /// Nobody answers there, or nobody who can write.
    #[error("cannot connect to Postgres at {url}; check DATABASE_URL and that the server runs")]
    Unreachable {
        /// The URL, without its password.
        url: SecretUrl,
        /// The servers and their failures.
        #[source]
        source: NoServer,
    },
    /// It went away.
    #[error("Postgres at {url} went away")]
    Interrupted {
        /// The URL, without its password.
        url: SecretUrl,
        /// The failure.
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

impl DatabaseError {
    /// Tells if it may pass without anybody doing something.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Interrupted { .. })
    }
}

/// Looks for a server that can be used, and connects with up to `connections`.
///
/// # Errors
/// [`DatabaseError`].
pub async fn connect(servers: &Servers, connections: u32, access: Access) -> Result<PgPool, DatabaseError> {
    let options = servers.locate(access).await.map_err(|none| no_server(servers.url(), none))?;
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .min_connections(1)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .after_connect(move |connection, _| {
            Box::pin(async move {
                let prepared = session::prepare(connection, access).await;
                prepared.inspect_err(|error| servers::note(Some(servers::text(error))))
            })
        })
        // Not a ping: it would double the round trips of every claim.
        .test_before_acquire(false)
        .before_acquire(move |connection, _| Box::pin(trust::check_acquire(connection, access)))
        .after_release(|connection, _| Box::pin(trust::check_release(connection)));
    Ok(pool.connect_lazy_with(options))
}

/// The operator has to do something if every server refuses, and else a server may come back.
fn no_server(url: &SecretUrl, none: NoServer) -> DatabaseError {
    let url = url.clone();
    if !none.causes().all(is_refusal) {
        return DatabaseError::Unreachable { url, source: none };
    }
    match none.into_cause() {
        Some(source) => refused(url, source),
        None => unreachable!("a URL names at least one server"),
    }
}

/// Tells what the operator has to change: a missing right (42501), authorization failures (class 28) and a database that
/// does not exist (3D000). Anything else may pass, such as a server that is still starting.
fn is_refusal(cause: &sqlx::Error) -> bool {
    let code = cause.as_database_error().and_then(|error| error.code()).unwrap_or_default();
    code == LACKS_RIGHT || code.starts_with("28") || code == "3D000"
}

fn refused(url: SecretUrl, source: sqlx::Error) -> DatabaseError {
    match source.as_database_error().and_then(|error| error.code()) {
        Some(code) if code == LACKS_RIGHT => DatabaseError::Forbidden { url, source: source.into() },
        _ => DatabaseError::Refused { url, source },
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

/// Makes sure the schema is there and new enough.
///
/// # Errors
/// [`DatabaseError`].
pub async fn check_schema(pool: &PgPool, url: &SecretUrl) -> Result<(), DatabaseError> {
    match within(PATIENCE, outbox::schema_state(pool)).await {
        Ok(SchemaState::Current) => Ok(()),
        Ok(SchemaState::Missing) => Err(DatabaseError::NotInstalled),
        Ok(SchemaState::Older { installed, needed }) => Err(DatabaseError::TooOld { installed, needed }),
        Err(source) if is_refusal(&source) => Err(refused(url.clone(), source)),
        Err(source) if is_interruption(&source) => {
            Err(DatabaseError::Interrupted { url: url.clone(), source })
        }
        Err(source) => Err(DatabaseError::Unexpected { url: url.clone(), source }),
    }
}

/// Tells if the server, or the way to it, went away: no answer at all, or one of the classes connection exception (08)
/// and operator intervention (57P).
pub fn is_interruption(error: &sqlx::Error) -> bool {
    match error.as_database_error() {
        Some(answer) => answer.code().is_some_and(|code| code.starts_with("08") || code.starts_with("57P")),
        None => true,
    }
}
