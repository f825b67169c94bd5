//! How far the write-ahead log was published.
//!
//! A position is recorded here, in the transaction that retains what was published before it, and only then confirmed to
//! the slot. A slot that is ahead of what is recorded is therefore not the one that was read: changes are missing.

use chrono::{DateTime, Utc};
use sqlx::{PgPool, Postgres, Row, Transaction};

use crate::Poison;
use crate::claim::set_aside;
use crate::retention::{Published, retain};

/// Where a reader of the log was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Identity of the Postgres cluster.
    pub system_id: String,
    /// Timeline of the cluster.
    pub timeline: i64,
    /// Everything before it is published.
    pub confirmed: u64,
}

/// What was published of the log.
#[derive(Debug, Default)]
pub struct Settlement {
    /// Acknowledged envelopes, by the stream that acknowledged them.
    pub published: Vec<(DateTime<Utc>, Vec<Published>)>,
    /// Events that can never be published.
    pub poison: Vec<Poison>,
}

/// What is recorded of the reader of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it was.
    pub position: Position,
    /// Fingerprint of the publication that it read; none by a release that did not record it.
    pub publication: Option<String>,
    /// Whether an operator wants it to begin anew, with a new slot.
    pub begin_anew: bool,
}

/// What is recorded of the reader of `slot`, if there ever was one.
///
/// # Errors
/// Whatever the database says.
pub async fn find(pool: &PgPool, slot: &str) -> Result<Option<Record>, sqlx::Error> {
    let row = sqlx::query(
        "select system_id, timeline, (confirmed - '0/0'::pg_lsn)::bigint, publication, begin_anew
         from outbox.capture where slot = $1",
    )
    .persistent(false)
    .bind(slot)
    .fetch_optional(pool)
    .await?;
    row.map(|row| {
        let position = Position {
            system_id: row.try_get(0)?,
            timeline: row.try_get(1)?,
            confirmed: row.try_get::<i64, _>(2)?.cast_unsigned(),
        };
        Ok(Record { position, publication: row.try_get(3)?, begin_anew: row.try_get(4)? })
    })
    .transpose()
}

/// Records where the reader of `slot` begins, and the fingerprint of the publication it reads. On the same cluster never
/// before what is recorded already. What an operator wanted is done with this.
///
/// # Errors
/// Whatever the database says.
pub async fn begin(
    pool: &PgPool,
    slot: &str,
    position: &Position,
    publication: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into outbox.capture (slot, system_id, timeline, confirmed, publication)
         values ($1, $2, $3, '0/0'::pg_lsn + $4::bigint, $5)
         on conflict (slot) do update set system_id = excluded.system_id, timeline = excluded.timeline,
             confirmed = case when capture.system_id = excluded.system_id
                 then greatest(capture.confirmed, excluded.confirmed) else excluded.confirmed end,
             publication = excluded.publication, begin_anew = false, recorded_at = clock_timestamp()",
    )
    .persistent(false)
    .bind(slot)
    .bind(&position.system_id)
    .bind(position.timeline)
    .bind(position.confirmed.cast_signed())
    .bind(publication)
    .execute(pool)
    .await
    .map(drop)
}

/// Records the fingerprint of the publication that the reader of `slot` reads, if there is such a reader. In the
/// transaction that declares stale what the publication may have hidden until then.
///
/// # Errors
/// Whatever the database says.
pub async fn record_publication(
    tx: &mut Transaction<'_, Postgres>,
    slot: &str,
    publication: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query("update outbox.capture set publication = $2 where slot = $1")
        .persistent(false)
        .bind(slot)
        .bind(publication)
        .execute(&mut **tx)
        .await
        .map(drop)
}

/// Has the next reader of `slot` begin anew, with a new slot, and declare stale whatever it may have missed. Says whether
/// there ever was a reader.
///
/// # Errors
/// Whatever the database says.
pub async fn begin_anew(pool: &PgPool, slot: &str) -> Result<bool, sqlx::Error> {
    let marked = sqlx::query("update outbox.capture set begin_anew = true where slot = $1")
        .persistent(false)
        .bind(slot)
        .execute(pool)
        .await?;
    Ok(marked.rows_affected() > 0)
}

/// Keeps what was published and records that everything before `confirmed` is, in one transaction. The slot may be
/// told when this has returned.
///
/// # Errors
/// Whatever the database says; nothing is recorded then.
pub async fn settle(
    pool: &PgPool,
    slot: &str,
    confirmed: u64,
    settlement: &Settlement,
) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    for (created, envelopes) in &settlement.published {
        retain(&mut tx, true, *created, envelopes).await?;
    }
    set_aside(&mut tx, true, &settlement.poison).await?;
    record(&mut tx, slot, confirmed).await?;
    tx.commit().await
}

/// Never goes back: a reader that was thought dead must not undo what its successor recorded.
async fn record(tx: &mut Transaction<'_, Postgres>, slot: &str, confirmed: u64) -> Result<(), sqlx::Error> {
    let recorded = sqlx::query(
        "update outbox.capture set confirmed = greatest(confirmed, '0/0'::pg_lsn + $2::bigint),
             recorded_at = clock_timestamp()
         where slot = $1",
    )
    .bind(slot)
    .bind(confirmed.cast_signed())
    .execute(&mut **tx)
    .await?;
    // Somebody has made the relay forget the slot: it has to begin anew rather than go on unrecorded.
    if recorded.rows_affected() == 0 { Err(sqlx::Error::RowNotFound) } else { Ok(()) }
}
