//! What was published lately: kept in case the broker loses it, and given to it again when it did.
//!
//! A stream is known by its creation time. An envelope that was acknowledged by another stream than the present one,
//! or with a sequence the present one has not reached, is lost there.

use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, Row, Transaction};

use crate::Claim;

/// One message as it was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// NATS subject.
    pub subject: String,
    /// `Nats-Msg-Id`.
    pub message_id: String,
    /// `traceparent` header.
    pub traceparent: Option<String>,
    /// How many outbox rows it settled.
    pub events: i32,
    /// The encoded envelope.
    pub body: Bytes,
    /// Sequence the stream gave it.
    pub stream_seq: i64,
}

/// A stream at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamPosition {
    /// When it was created: its identity.
    pub created: DateTime<Utc>,
    /// Last sequence in it.
    pub last_seq: i64,
}

/// From when on the consumers of a stream can rely on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Every event published since is, or was, in that stream. `None` if no relay has met the stream yet.
    pub complete_since: Option<DateTime<Utc>>,
    /// Everything published since is retained here, and is published again if the stream loses it.
    pub retained_since: DateTime<Utc>,
}

/// How long rotation waits for a lock before it leaves the turn to the next attempt: claims must never queue behind it.
const ROTATE_LOCK_TIMEOUT: &str = "set local lock_timeout = '200ms'";

/// Two relays must not both republish; the number only has to differ from other users of advisory locks.
const REPUBLISH_LOCK: i64 = 0x6f75_7462_6f78_0001;

impl Claim {
    /// Keeps the acknowledged envelopes, in the transaction that settles their rows.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn retain(
        &mut self,
        created: DateTime<Utc>,
        envelopes: &[Published],
    ) -> Result<(), sqlx::Error> {
        let (connection, prepared) = self.connection();
        retain(connection, prepared, created, envelopes).await
    }
}

/// Keeps acknowledged envelopes.
pub(crate) async fn retain(
    connection: &mut PgConnection,
    prepared: bool,
    created: DateTime<Utc>,
    envelopes: &[Published],
) -> Result<(), sqlx::Error> {
    if envelopes.is_empty() {
        return Ok(());
    }
    let column = |of: fn(&Published) -> &str| envelopes.iter().map(of).collect::<Vec<_>>();
    sqlx::query(
        "insert into outbox.published
            (half, stream_created, subject, message_id, traceparent, events, body, stream_seq)
         select r.half, $1, e.* from outbox.retention r, unnest(
            $2::text[], $3::text[], $4::text[], $5::integer[], $6::bytea[], $7::bigint[]) e",
    )
    .persistent(prepared)
    .bind(created)
    .bind(column(|envelope| &envelope.subject))
    .bind(column(|envelope| &envelope.message_id))
    .bind(envelopes.iter().map(|envelope| envelope.traceparent.as_deref()).collect::<Vec<_>>())
    .bind(envelopes.iter().map(|envelope| envelope.events).collect::<Vec<_>>())
    .bind(envelopes.iter().map(|envelope| envelope.body.as_ref()).collect::<Vec<_>>())
    .bind(envelopes.iter().map(|envelope| envelope.stream_seq).collect::<Vec<_>>())
    .execute(connection)
    .await
    .map(drop)
}

/// Empties the older partition and lets it take its turn, if the present one has been filling for `window`. Says
/// whether it did. With turns of `window`, an envelope is kept for between one and two of them.
///
/// # Errors
/// Whatever the database says.
pub async fn rotate(pool: &PgPool, window: Duration) -> Result<bool, sqlx::Error> {
    let mut tx = pool.begin_with(AssertSqlSafe(format!("begin; {ROTATE_LOCK_TIMEOUT}"))).await?;
    let due = sqlx::query(
        "select half from outbox.retention
         where rotated_at < clock_timestamp() - $1 * interval '1 second' for update skip locked",
    )
    .persistent(false)
    .bind(window.as_secs_f64())
    .fetch_optional(&mut *tx)
    .await?;
    let Some(row) = due else { return Ok(false) };
    let truncate = if row.try_get::<i16, _>(0)? == 0 {
        "truncate outbox.published_1"
    } else {
        "truncate outbox.published_0"
    };
    sqlx::query(truncate).persistent(false).execute(&mut *tx).await?;
    sqlx::query(
        "update outbox.retention
         set half = 1 - half, retained_since = rotated_at, rotated_at = clock_timestamp()",
    )
    .persistent(false)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(true)
}

/// Whether the stream is new to the relays, or lacks something that is retained.
///
/// # Errors
/// Whatever the database says.
pub async fn is_incomplete(pool: &PgPool, stream: StreamPosition) -> Result<bool, sqlx::Error> {
    sqlx::query(
        "select not exists (select from outbox.streams where created = $1)
             or exists (select from outbox.published where stream_created < $1)
             or exists (select from outbox.published where stream_created > $1)
             or exists (select from outbox.published where stream_created = $1 and stream_seq > $2)",
    )
    .persistent(false)
    .bind(stream.created)
    .bind(stream.last_seq)
    .fetch_one(pool)
    .await?
    .try_get(0)
}

/// A republication in progress, by one relay at a time.
#[derive(Debug)]
pub struct Republication {
    tx: Transaction<'static, Postgres>,
    stream: StreamPosition,
}

impl Republication {
    /// Starts one; `None` while another relay is at it.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn begin(pool: &PgPool, stream: StreamPosition) -> Result<Option<Self>, sqlx::Error> {
        // One snapshot for the cursor and for the final update: what a claim settles meanwhile under the old identity is
        // in neither, so it stays marked as lost and is found the next time.
        let mut tx = pool.begin_with("begin isolation level repeatable read").await?;
        let mine: bool = sqlx::query("select pg_try_advisory_xact_lock($1)")
            .persistent(false)
            .bind(REPUBLISH_LOCK)
            .fetch_one(&mut *tx)
            .await?
            .try_get(0)?;
        if !mine {
            return Ok(None);
        }
        // A cursor, so that memory stays bounded however much is retained.
        sqlx::query(AssertSqlSafe(format!(
            "declare lost no scroll cursor for
             select subject, message_id, traceparent, events, body, stream_seq from outbox.published
             where stream_created <> '{created}' or stream_seq > {last_seq} order by published_at",
            created = stream.created.to_rfc3339(),
            last_seq = stream.last_seq,
        )))
        .persistent(false)
        .execute(&mut *tx)
        .await?;
        Ok(Some(Self { tx, stream }))
    }

    /// The next envelopes that the stream lacks, up to `limit`; none when all were returned.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn next(&mut self, limit: u16) -> Result<Vec<Published>, sqlx::Error> {
        let rows = sqlx::query(AssertSqlSafe(format!("fetch {limit} from lost")))
            .persistent(false)
            .fetch_all(&mut *self.tx)
            .await?;
        rows.iter().map(published).collect()
    }

    /// Records that the stream has acknowledged them all, the last one at or before sequence `last_seq`.
    ///
    /// # Errors
    /// Whatever the database says; the envelopes are then published once more later, which is harmless.
    pub async fn finish(mut self, last_seq: i64) -> Result<(), sqlx::Error> {
        sqlx::query("close lost").persistent(false).execute(&mut *self.tx).await?;
        sqlx::query(
            "update outbox.published set stream_created = $1, stream_seq = $3
             where stream_created <> $1 or stream_seq > $2",
        )
        .persistent(false)
        .bind(self.stream.created)
        .bind(self.stream.last_seq)
        .bind(last_seq)
        .execute(&mut *self.tx)
        .await?;
        record_stream(&mut self.tx, self.stream.created).await?;
        self.tx.commit().await
    }
}

async fn record_stream(connection: &mut PgConnection, created: DateTime<Utc>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into outbox.streams (created, complete_since)
         select $1, retained_since from outbox.retention
         on conflict (created) do nothing",
    )
    .persistent(false)
    .bind(created)
    .execute(connection)
    .await
    .map(drop)
}

/// What consumers of the stream created at `created` can rely on.
///
/// # Errors
/// Whatever the database says.
pub async fn coverage(pool: &PgPool, created: DateTime<Utc>) -> Result<Coverage, sqlx::Error> {
    let row = sqlx::query(
        "select retained_since, (select complete_since from outbox.streams where created = $1)
         from outbox.retention",
    )
    .persistent(false)
    .bind(created)
    .fetch_one(pool)
    .await?;
    Ok(Coverage { retained_since: row.try_get(0)?, complete_since: row.try_get(1)? })
}

fn published(row: &PgRow) -> Result<Published, sqlx::Error> {
    Ok(Published {
        subject: row.try_get(0)?,
        message_id: row.try_get(1)?,
        traceparent: row.try_get(2)?,
        events: row.try_get(3)?,
        body: row.try_get::<Vec<u8>, _>(4)?.into(),
        stream_seq: row.try_get(5)?,
    })
}
