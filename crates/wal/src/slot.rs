//! The logical replication slot: what Postgres keeps for the reader of the log.

use pgwire_replication::Lsn;
use sqlx::postgres::PgRow;
use sqlx::{PgPool, Row};

use crate::name::{InvalidName, check_name};

/// What Postgres says of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// Decoding plugin.
    pub plugin: String,
    /// Database it belongs to.
    pub database: String,
    /// Process that reads it.
    pub active_pid: Option<i32>,
    /// `application_name` of that process.
    pub reader: Option<String>,
    /// `reserved`, `extended`, `unreserved` or `lost`: whether the log it needs is still there.
    pub wal_status: String,
    /// Everything before it is published.
    pub confirmed: Lsn,
    /// Log that is not confirmed, in bytes.
    pub lag_bytes: i64,
    /// Log that is kept for it, in bytes.
    pub retained_bytes: i64,
    /// How much more log fits before the slot is lost; `None` without a limit.
    pub safe_bytes: Option<i64>,
    /// End of the log that the server has written, or a standby replayed.
    pub written: Lsn,
    /// Why Postgres gave the slot up, as it says since version 17.
    pub invalidation: Option<String>,
    /// Whether standbys may keep a copy of it; `None` before version 17.
    pub failover: Option<bool>,
}

/// The first Postgres whose standbys can keep copies of logical slots.
pub const KEEPS_SLOTS_ON_STANDBYS: i32 = 170_000;

impl SlotState {
    /// Whether the log it needs is gone: it can never be read again.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.wal_status == "lost"
    }

    /// The reason why Postgres gave the slot up, and the setting behind it.
    #[must_use]
    pub fn lost_because(&self) -> &'static str {
        match self.invalidation.as_deref() {
            Some("idle_timeout") => "nobody read it for longer than idle_replication_slot_timeout",
            Some("rows_removed") => "Postgres has removed rows of the catalog that it needed",
            Some("wal_level_insufficient") => "wal_level was lower than logical",
            _ => "Postgres has removed log that was not read yet (max_slot_wal_keep_size)",
        }
    }
}

/// Why a slot cannot be used or created.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Not a name.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The server does not write what decoding needs.
    #[error("wal_level is {0}; set wal_level = logical in postgresql.conf and restart Postgres")]
    WalLevel(String),
    /// No free slot.
    #[error(
        "all {0} replication slots are taken; raise max_replication_slots and restart Postgres, or drop one"
    )]
    NoneFree(i32),
    /// The role may not.
    #[error(
        "the role may not create a replication slot; `alter role … replication` (on RDS: grant rds_replication)"
    )]
    NotPermitted(#[source] sqlx::Error),
    /// It is somebody else's.
    #[error(
        "slot {name} decodes database {database} with {plugin}, not this one with pgoutput; \
         choose another name in RELAY_SLOT"
    )]
    Foreign {
        /// Its name.
        name: String,
        /// Its database.
        database: String,
        /// Its plugin.
        plugin: String,
    },
    /// Anything else.
    #[error("cannot look after the slot")]
    Database(#[from] sqlx::Error),
}

/// What decides whether slots work on a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// `server_version_num`.
    pub version: i32,
    /// Database of the connection.
    pub database: String,
    /// `wal_level`.
    pub wal_level: String,
    /// `max_replication_slots`.
    pub max_slots: i32,
    /// Slots that exist.
    pub slots: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_slot_wal_keep_size` in megabytes; `None` without a limit.
    pub keep_limit_mb: Option<i32>,
    /// Whether the role may replicate.
    pub may_replicate: bool,
    /// Whether this is a standby.
    pub is_standby: bool,
}

/// Asks the server.
///
/// # Errors
/// Whatever the database says.
pub async fn server_facts(pool: &PgPool) -> Result<ServerFacts, sqlx::Error> {
    let row = sqlx::query(
        "select current_setting('server_version_num')::integer, current_database()::text,
                current_setting('wal_level'), current_setting('max_replication_slots')::integer,
                (select count(*)::integer from pg_replication_slots),
                current_setting('max_wal_senders')::integer,
                (select setting::integer from pg_settings where name = 'max_slot_wal_keep_size'),
                (select rolreplication or rolsuper or coalesce(pg_has_role(current_user,
                    (select oid from pg_roles where rolname = 'rds_replication'), 'member'), false)
                 from pg_roles where rolname = current_user),
                pg_is_in_recovery()",
    )
    .persistent(false)
    .fetch_one(pool)
    .await?;
    Ok(ServerFacts {
        version: row.try_get(0)?,
        database: row.try_get(1)?,
        wal_level: row.try_get(2)?,
        max_slots: row.try_get(3)?,
        slots: row.try_get(4)?,
        max_wal_senders: row.try_get(5)?,
        keep_limit_mb: row.try_get::<Option<i32>, _>(6)?.filter(|limit| *limit >= 0),
        may_replicate: row.try_get(7)?,
        is_standby: row.try_get(8)?,
    })
}

/// The slot, if it exists.
///
/// # Errors
/// Whatever the database says.
pub async fn find(pool: &PgPool, name: &str) -> Result<Option<SlotState>, sqlx::Error> {
    let row = sqlx::query(
        "select plugin::text, coalesce(database::text, ''), active_pid, coalesce(wal_status, 'reserved'),
                coalesce(confirmed_flush_lsn, '0/0')::text,
                pg_wal_lsn_diff(written, coalesce(confirmed_flush_lsn, restart_lsn))::bigint,
                pg_wal_lsn_diff(written, restart_lsn)::bigint, safe_wal_size,
                (select application_name from pg_stat_activity where pid = active_pid), coalesce(written, '0/0')::text,
                to_jsonb(slot) ->> 'invalidation_reason', (to_jsonb(slot) ->> 'failover')::boolean
         from pg_replication_slots slot, lateral (select case when pg_is_in_recovery() then pg_last_wal_replay_lsn()
                                             else pg_current_wal_lsn() end written) here
         where slot_name = $1",
    )
    .persistent(false)
    .bind(name)
    .fetch_optional(pool)
    .await?;
    row.as_ref().map(read).transpose()
}

fn read(row: &PgRow) -> Result<SlotState, sqlx::Error> {
    Ok(SlotState {
        plugin: row.try_get::<Option<String>, _>(0)?.unwrap_or_default(),
        database: row.try_get(1)?,
        active_pid: row.try_get(2)?,
        wal_status: row.try_get(3)?,
        confirmed: position(row.try_get(4)?)?,
        lag_bytes: row.try_get::<Option<i64>, _>(5)?.unwrap_or(0).max(0),
        retained_bytes: row.try_get::<Option<i64>, _>(6)?.unwrap_or(0).max(0),
        safe_bytes: row.try_get(7)?,
        reader: row.try_get(8)?,
        written: position(row.try_get(9)?)?,
        invalidation: row.try_get(10)?,
        failover: row.try_get(11)?,
    })
}

fn position(text: &str) -> Result<Lsn, sqlx::Error> {
    text.parse().map_err(|_| sqlx::Error::Protocol(format!("'{text}' is no position in the log")))
}

/// Creates the slot, since Postgres 17 one that standbys may keep a copy of. It decodes what commits from now on. Not in a transaction: Postgres refuses that once something was
/// written in it. Waits for all transactions that are open.
///
/// # Errors
/// [`SlotError`].
pub async fn create(pool: &PgPool, name: &str) -> Result<Lsn, SlotError> {
    check_name(name)?;
    let facts = server_facts(pool).await?;
    if facts.wal_level != "logical" {
        return Err(SlotError::WalLevel(facts.wal_level));
    }
    let statement = if facts.version >= KEEPS_SLOTS_ON_STANDBYS {
        "select lsn::text from pg_create_logical_replication_slot($1, 'pgoutput', failover => true)"
    } else {
        "select lsn::text from pg_create_logical_replication_slot($1, 'pgoutput')"
    };
    let created = sqlx::query(statement).persistent(false).bind(name).fetch_one(pool).await;
    let code =
        |error: &sqlx::Error| error.as_database_error().and_then(|error| error.code()).map(String::from);
    match created {
        Ok(row) => Ok(row.try_get::<String, _>(0)?.parse().unwrap_or_default()),
        Err(error) => Err(match code(&error).as_deref() {
            // insufficient_privilege, configuration_limit_exceeded
            Some("42501") => SlotError::NotPermitted(error),
            Some("53400") => SlotError::NoneFree(facts.max_slots),
            _ => SlotError::Database(error),
        }),
    }
}

/// Drops the slot, if it exists. Fails while somebody reads it.
///
/// # Errors
/// Whatever the database says.
pub async fn discard(pool: &PgPool, name: &str) -> Result<(), sqlx::Error> {
    sqlx::query("select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1")
        .persistent(false)
        .bind(name)
        .execute(pool)
        .await
        .map(drop)
}

/// Whether the slot is one that this reader can read.
///
/// # Errors
/// [`SlotError::Foreign`].
pub fn check(name: &str, state: &SlotState, facts: &ServerFacts) -> Result<(), SlotError> {
    if state.plugin == "pgoutput" && state.database == facts.database {
        return Ok(());
    }
    let (database, plugin) = (state.database.clone(), state.plugin.clone());
    Err(SlotError::Foreign { name: name.to_owned(), database, plugin })
}

/// Standbys of the server, as far as a slot is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standbys {
    /// How many receive the log at the moment.
    pub connected: i64,
    /// `synchronized_standby_slots`: logical slots do not run ahead of these. `None` before version 17.
    pub awaited: Option<String>,
}

/// Asks the server for its standbys.
///
/// # Errors
/// Whatever the database says.
pub async fn standbys(pool: &PgPool) -> Result<Standbys, sqlx::Error> {
    let row = sqlx::query(
        "select count(*), current_setting('synchronized_standby_slots', true) from pg_stat_replication r
         where not exists (select from pg_replication_slots s where s.active_pid = r.pid and s.slot_type = 'logical')",
    )
    .persistent(false)
    .fetch_one(pool)
    .await?;
    Ok(Standbys { connected: row.try_get(0)?, awaited: row.try_get(1)? })
}

/// Writes a message to the log that belongs to no transaction, so that there is something to decode, and thus to
/// confirm, in a database where nothing else happens.
///
/// # Errors
/// Whatever the database says.
pub async fn heartbeat(pool: &PgPool) -> Result<(), sqlx::Error> {
    // As text: the driver looks up a type it does not know, and forgets the statement over it.
    sqlx::query("select pg_logical_emit_message(false, 'outbox-heartbeat', '')::text")
        .persistent(false)
        .execute(pool)
        .await
        .map(drop)
}
