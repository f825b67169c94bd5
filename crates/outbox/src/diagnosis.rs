//! Facts about the database that decide whether the outbox stays fast; the relay's `doctor` judges them.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{AssertSqlSafe, PgPool, Row};

use crate::claim::{PLANNER, TAKE};
use crate::statement::whole;

/// What the doctor looks at.
#[derive(Debug, Clone)]
pub struct Facts {
    /// `server_version`.
    pub server_version: String,
    /// `server_version_num`, for example 150018.
    pub server_version_number: i32,
    /// Plan of the claim, one line per node.
    pub claim_plan: Vec<String>,
    /// Whether autovacuum is on, for the server and for the table.
    pub autovacuum: bool,
    /// Rows in `outbox.events` that are dead but not vacuumed, by the statistics.
    pub dead_tuples: i64,
    /// When the table was last vacuumed, by hand or automatically.
    pub last_vacuum: Option<DateTime<Utc>>,
    /// Size of `outbox.events` with its indexes in bytes.
    pub table_bytes: i64,
    /// Whether a crash of the database can lose acknowledged commits.
    pub synchronous_commit: String,
    /// Whoever holds back vacuum the longest.
    pub oldest_transaction: Option<OldTransaction>,
    /// Clock of the database when it was asked.
    pub now: DateTime<Utc>,
}

/// A session whose transaction or snapshot keeps dead rows from being vacuumed.
#[derive(Debug, Clone)]
pub struct OldTransaction {
    /// Backend process.
    pub pid: i32,
    /// `application_name`.
    pub application: String,
    /// `state`, for example `idle in transaction`.
    pub state: String,
    /// How long the transaction has been open.
    pub age: Duration,
}

/// Collects them.
///
/// # Errors
/// Whatever the database says.
pub async fn facts(pool: &PgPool) -> Result<Facts, sqlx::Error> {
    let row = whole(
        "select current_setting('server_version'), current_setting('server_version_num')::integer,
                current_setting('autovacuum')::boolean and not exists (
                    select from pg_class where oid = 'outbox.events'::regclass
                    and 'autovacuum_enabled=false' = any(reloptions)),
                coalesce(s.n_dead_tup, 0), greatest(s.last_vacuum, s.last_autovacuum),
                pg_total_relation_size('outbox.events'), current_setting('synchronous_commit'), clock_timestamp()
         from (select 1) one left join pg_stat_all_tables s on s.relid = 'outbox.events'::regclass",
    )
    .fetch_one(pool)
    .await?;
    Ok(Facts {
        server_version: row.try_get(0)?,
        server_version_number: row.try_get(1)?,
        autovacuum: row.try_get(2)?,
        dead_tuples: row.try_get(3)?,
        last_vacuum: row.try_get(4)?,
        table_bytes: row.try_get(5)?,
        synchronous_commit: row.try_get(6)?,
        now: row.try_get(7)?,
        claim_plan: claim_plan(pool).await?,
        oldest_transaction: oldest_transaction(pool).await?,
    })
}

/// The plan of the claim, under the settings of a claim.
async fn claim_plan(pool: &PgPool) -> Result<Vec<String>, sqlx::Error> {
    let mut tx = pool.begin_with(AssertSqlSafe(format!("begin; {PLANNER}"))).await?;
    let rows = sqlx::query(AssertSqlSafe(format!("explain (costs off) {}", *TAKE)))
        .persistent(false)
        .bind(0_i64)
        .bind(1000_i64)
        .bind(1_000_000_i64)
        .fetch_all(&mut *tx)
        .await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}

async fn oldest_transaction(pool: &PgPool) -> Result<Option<OldTransaction>, sqlx::Error> {
    let row = whole(
        "select pid, coalesce(application_name, ''), coalesce(state, ''),
                extract(epoch from clock_timestamp() - xact_start)::float8
         from pg_stat_activity
         where xact_start is not null and pid <> pg_backend_pid() and backend_type = 'client backend'
           and (backend_xmin is not null or backend_xid is not null)
         order by xact_start limit 1",
    )
    .fetch_optional(pool)
    .await?;
    row.map(|row| {
        Ok(OldTransaction {
            pid: row.try_get(0)?,
            application: row.try_get(1)?,
            state: row.try_get(2)?,
            age: Duration::from_secs_f64(row.try_get::<f64, _>(3)?.max(0.0)),
        })
    })
    .transpose()
}
