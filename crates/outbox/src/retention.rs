//! What was published lately: kept in case the broker loses it.
//!
//! Rows are written once and never changed. Two partitions take turns and are emptied by TRUNCATE.

use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row};

use crate::Claim;
use crate::statement::{BEGIN, whole};

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

/// How long rotation waits for a lock before it leaves the turn to the next attempt: claims must never queue behind it.
const ROTATE_LOCK_TIMEOUT: &str = "set local lock_timeout = '200ms'";

/// Since when everything is retained, if nothing is: never.
const NEVER: &str = "timestamptz '9999-01-01 00:00:00+00'";

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

/// Keeps what the stream created at `created` has acknowledged. Fails if the relays publish to another stream by now.
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
    let kept = sqlx::query(
        "insert into outbox.published
            (half, stream_created, subject, message_id, traceparent, events, body, stream_seq)
         select r.half, r.stream_identity, e.* from outbox.retention r, unnest(
            $2::text[], $3::text[], $4::text[], $5::integer[], $6::bytea[], $7::bigint[]) e
         where r.stream_created = $1",
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
    .await?;
    if kept.rows_affected() == 0 { Err(other_stream()) } else { Ok(()) }
}

/// What is published to a stream that the relays have left is not kept, so it must be published again.
fn other_stream() -> sqlx::Error {
    sqlx::Error::Protocol("the relays of this database publish to another stream by now".to_owned())
}

/// Empties the older partition and lets it take its turn, if the present one has been filling for `window`. Says
/// whether it did. With turns of `window`, an envelope is kept for between one and two of them, and longer while some of
/// them are to be published again.
///
/// # Errors
/// Whatever the database says.
pub async fn rotate(pool: &PgPool, window: Duration) -> Result<bool, sqlx::Error> {
    let mut tx = pool.begin_with(AssertSqlSafe(format!("{BEGIN}; {ROTATE_LOCK_TIMEOUT}"))).await?;
    let due = sqlx::query(
        "select half from outbox.retention
         where rotated_at < clock_timestamp() - $1 * interval '1 second' for update skip locked",
    )
    .persistent(false)
    .bind(window.as_secs_f64())
    .fetch_optional(&mut *tx)
    .await?;
    let Some(row) = due else { return Ok(false) };
    // A statement of its own: its snapshot is later than the lock, which everybody holds who adds republications.
    let waits = sqlx::query(
        "select from outbox.republications p join outbox.retention r on p.stream_created = r.stream_created limit 1",
    )
    .persistent(false)
    .fetch_optional(&mut *tx)
    .await?;
    if waits.is_some() {
        return Ok(false);
    }
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

/// Everything that is published from now on is retained: to be said again and again by relays that do.
///
/// # Errors
/// Whatever the database says.
pub async fn keep(pool: &PgPool) -> Result<(), sqlx::Error> {
    let sql = format!(
        "update outbox.retention set retained_since = clock_timestamp(), rotated_at = clock_timestamp()
         where retained_since >= {NEVER}"
    );
    whole(sql).execute(pool).await.map(drop)
}

/// Nothing is retained: to be said again and again by relays that publish without.
///
/// # Errors
/// Whatever the database says.
pub async fn keep_nothing(pool: &PgPool) -> Result<(), sqlx::Error> {
    let sql = format!("update outbox.retention set retained_since = {NEVER} where retained_since < {NEVER}");
    whole(sql).execute(pool).await.map(drop)
}

/// Reads the first six columns of a row as a message.
pub(crate) fn published(row: &PgRow) -> Result<Published, sqlx::Error> {
    Ok(Published {
        subject: row.try_get(0)?,
        message_id: row.try_get(1)?,
        traceparent: row.try_get(2)?,
        events: row.try_get(3)?,
        body: row.try_get::<Vec<u8>, _>(4)?.into(),
        stream_seq: row.try_get(5)?,
    })
}
