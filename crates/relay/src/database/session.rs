//! A connection as the relay needs it, whatever server, database and role have as defaults.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Executor, PgConnection, Row};
use tokio::time::timeout;

/// Time for the statements that prepare a connection.
const PREPARE_PATIENCE: Duration = Duration::from_secs(5);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Writes; a server that cannot is refused.
    Write,
    /// Writes through a pooler in transaction mode: settings would stay with a connection that others use next.
    WritePooled,
    /// Looks only, at a standby as well.
    Look,
}

/// Settings that the relay's statements rely on. Each of them can be changed for a server, a database or a role.
///
/// `default_transaction_read_only` is off also where an operator or a provider has stopped the writers of a primary: the
/// events of what they have written must still come out. A standby refuses all the same.
const SETTINGS: [(&str, &str); 15] = [
    // A wait sees nothing new in a snapshot of its beginning, and claims of several relays would fail.
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_deferrable", "off"),
    // The relay has limits of its own.
    ("lock_timeout", "0"),
    ("transaction_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    // A time or a limit must not be read in another way than it was written.
    ("standard_conforming_strings", "on"),
    ("array_nulls", "on"),
    ("bytea_output", "hex"),
    ("intervalstyle", "postgres"),
    // Claims need the index, in a table that is mostly dead rows.
    ("enable_indexscan", "on"),
    ("plan_cache_mode", "auto"),
    // `relay migrate` creates ordinary tables where the database keeps its own.
    ("default_table_access_method", "heap"),
    ("check_function_bodies", "on"),
];

/// Settings that may keep the statement for all the others from coming to its end.
const HURRIED: &str = "set statement_timeout = 0; set jit = off";

/// A commit must survive a crash of Postgres, or the relay would remember what Postgres has forgotten. Waiting for standbys
/// is left as it is set.
const DURABLE: &str = "select pg_catalog.set_config('synchronous_commit', 'local', false)
    where pg_catalog.current_setting('synchronous_commit') = 'off'";

/// Why a server is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It follows another server.
    #[error("the server is a standby and cannot write; DATABASE_URL must lead to the primary")]
    Standby,
    /// Its sessions are read-only.
    #[error("sessions of the server are read-only (default_transaction_read_only), and a pooler keeps it so")]
    ReadOnly,
}

/// Makes a new connection independent of defaults, and refuses a server that cannot do what the connection is for.
pub(super) async fn prepare(connection: &mut PgConnection, access: Access) -> Result<(), sqlx::Error> {
    let preparing = async {
        if access != Access::WritePooled {
            connection.execute(sqlx::raw_sql(AssertSqlSafe(set_statement()))).await?;
        }
        check(connection, access).await
    };
    let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, "the server does not answer");
    timeout(PREPARE_PATIENCE, preparing).await.unwrap_or_else(|_| Err(late().into()))
}

/// Refuses a server that cannot do what the connection is for.
pub(super) async fn check(connection: &mut PgConnection, access: Access) -> Result<(), sqlx::Error> {
    let state =
        "select pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only')::boolean";
    let row = connection.fetch_one(sqlx::raw_sql(state)).await?;
    let unfit = match (row.try_get(0)?, row.try_get(1)?) {
        _ if access == Access::Look => return Ok(()),
        (true, _) => Unfit::Standby,
        (false, true) => Unfit::ReadOnly,
        (false, false) => return Ok(()),
    };
    Err(sqlx::Error::Configuration(Box::new(unfit)))
}

/// One statement for all settings; a server has no setting that it is too old for.
fn set_statement() -> String {
    let wanted: Vec<String> = SETTINGS.iter().map(|(name, value)| format!("('{name}', '{value}')")).collect();
    format!(
        "{HURRIED}; select pg_catalog.set_config(s.name, w.value, false)
         from (values {}) w (name, value) join pg_catalog.pg_settings s on pg_catalog.lower(s.name) = w.name; {DURABLE}",
        wanted.join(", ")
    )
}
