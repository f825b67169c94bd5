//! What was published lately: kept in case the broker loses it, and given to it again when it did.
//!
//! A stream is known by its creation time, and what it holds by the envelope that it gave its highest sequence. An
//! envelope that was acknowledged by another stream than the present one, or with a sequence that the present one has not
//! reached or has given to another message since, is lost there. It is marked as lost before anything is published, since
//! every message makes the stream look more like what it was.

use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, Row, Transaction};

use crate::Claim;
use crate::statement::{BEGIN, time, whole};

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

/// What a stream must hold if it still holds all that it acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    /// Its highest sequence that is retained.
    pub stream_seq: i64,
    /// The message ids retained for it: one of them is that of the message.
    pub message_ids: Vec<String>,
}

/// The newest envelope that the stream created at `created` acknowledged with a sequence up to `last_seq`, if any is
/// retained.
///
/// # Errors
/// Whatever the database says.
pub async fn newest(
    pool: &PgPool,
    created: DateTime<Utc>,
    last_seq: i64,
) -> Result<Option<Newest>, sqlx::Error> {
    let created = time(created);
    let row = whole(format!(
        "select stream_seq, array_agg(message_id) from outbox.published
         where stream_created = {created} and stream_seq = (
            select stream_seq from outbox.published where stream_created = {created} and stream_seq <= {last_seq}
            order by stream_seq desc limit 1)
         group by stream_seq"
    ))
    .fetch_optional(pool)
    .await?;
    row.map(|row| Ok(Newest { stream_seq: row.try_get(0)?, message_ids: row.try_get(1)? })).transpose()
}

/// Marks what the stream acknowledged with a sequence above `last_seq` as lost, for good until it is published again.
/// Says how many envelopes that are.
///
/// # Errors
/// Whatever the database says.
pub async fn mark_lost(pool: &PgPool, stream: StreamPosition) -> Result<u64, sqlx::Error> {
    let done = whole(format!(
        "update outbox.published set stream_created = '-infinity' where stream_created = {} and stream_seq > {}",
        time(stream.created),
        stream.last_seq
    ))
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// Whether the stream created at `created` is new to the relays, or lacks something that is retained.
///
/// # Errors
/// Whatever the database says.
pub async fn is_incomplete(pool: &PgPool, created: DateTime<Utc>) -> Result<bool, sqlx::Error> {
    let created = time(created);
    whole(format!(
        "select not exists (select from outbox.streams where created = {created})
             or exists (select from outbox.published where stream_created < {created})
             or exists (select from outbox.published where stream_created > {created})"
    ))
    .fetch_one(pool)
    .await?
    .try_get(0)
}

/// Envelopes that a stream lacks, in the hands of one relay.
#[derive(Debug)]
pub struct Lost {
    tx: Transaction<'static, Postgres>,
    created: DateTime<Utc>,
    /// Where they are: partition and address.
    places: Vec<(i16, String)>,
    /// The envelopes.
    pub envelopes: Vec<Published>,
}

impl Lost {
    /// Takes up to `limit` envelopes that the stream created at `created` lacks and no other relay has in hand; `None` if
    /// there are none. The server takes them back if the relay hangs for longer than `lease`.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn take(
        pool: &PgPool,
        created: DateTime<Utc>,
        limit: u16,
        lease: Duration,
    ) -> Result<Option<Self>, sqlx::Error> {
        let lease_ms = lease.as_millis().max(1);
        let begin = format!("{BEGIN}; set local idle_in_transaction_session_timeout = {lease_ms}");
        let mut tx = pool.begin_with(AssertSqlSafe(begin)).await?;
        // Two ranges of the index rather than one condition that has to look at everything.
        for side in ["<", ">"] {
            let rows = sqlx::query(AssertSqlSafe(format!(
                "select subject, message_id, traceparent, events, body, stream_seq, half, ctid::text
                 from outbox.published where stream_created {side} $1
                 order by stream_created, stream_seq limit $2 for update skip locked"
            )))
            .persistent(false)
            .bind(created)
            .bind(i64::from(limit))
            .fetch_all(&mut *tx)
            .await?;
            if !rows.is_empty() {
                let envelopes = rows.iter().map(published).collect::<Result<_, _>>()?;
                let place = |row: &PgRow| Ok((row.try_get(6)?, row.try_get(7)?));
                let places = rows.iter().map(place).collect::<Result<_, sqlx::Error>>()?;
                return Ok(Some(Self { tx, created, places, envelopes }));
            }
        }
        Ok(None)
    }

    /// Records that the stream has acknowledged them all, the last one at sequence `last_seq`.
    ///
    /// # Errors
    /// Whatever the database says; the envelopes are then published once more later, which is harmless.
    pub async fn settle(mut self, last_seq: i64) -> Result<(), sqlx::Error> {
        for half in [0, 1] {
            let places = self.places.iter().filter(|(of, _)| *of == half).map(|(_, place)| place.as_str());
            sqlx::query(
                "update outbox.published set stream_created = $1, stream_seq = $2
                 where half = $3 and ctid = any($4::text[]::tid[])",
            )
            .persistent(false)
            .bind(self.created)
            .bind(last_seq)
            .bind(half)
            .bind(places.collect::<Vec<_>>())
            .execute(&mut *self.tx)
            .await?;
        }
        self.tx.commit().await
    }
}

/// Records that the stream created at `created` has everything that is retained.
///
/// # Errors
/// Whatever the database says.
pub async fn complete(pool: &PgPool, created: DateTime<Utc>) -> Result<(), sqlx::Error> {
    whole(format!(
        "insert into outbox.streams (created, complete_since)
         select {}, retained_since from outbox.retention
         on conflict (created) do nothing",
        time(created)
    ))
    .execute(pool)
    .await
    .map(drop)
}

/// What consumers of the stream created at `created` can rely on.
///
/// # Errors
/// Whatever the database says.
pub async fn coverage(pool: &PgPool, created: DateTime<Utc>) -> Result<Coverage, sqlx::Error> {
    let row = whole(format!(
        "select retained_since, (select complete_since from outbox.streams where created = {})
         from outbox.retention",
        time(created)
    ))
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
