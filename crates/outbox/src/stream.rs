//! The stream that the relays publish to: one at a time, known by its creation time.
//!
//! The content of a stream has an identity of its own: the creation time of the stream, or the time when it last lost
//! messages. Retained messages carry the identity of the content that they became part of. So a loss costs one update,
//! however much is retained, and a message that was on its way meanwhile is not taken for one that is still there.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{PgPool, Postgres, Row, Transaction};
use uuid::Uuid;

use crate::republication::{self, Wanted};
use crate::statement::{BEGIN, time, whole};

/// A relay that has not looked at its stream for longer does not count. Relays look every two seconds.
const RELAY_SILENCE: Duration = Duration::from_secs(7);

/// A stream at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamPosition {
    /// When it was created: its identity.
    pub created: DateTime<Utc>,
    /// Last sequence in it.
    pub last_seq: i64,
}

/// A running relay that publishes to another stream.
#[derive(Debug, Clone, PartialEq)]
pub struct OtherRelay {
    /// Where it connects from, as Postgres sees it.
    pub address: String,
    /// When its stream was created.
    pub stream_created: DateTime<Utc>,
    /// Seconds since it last looked at that stream.
    pub seen_ago: f64,
}

/// What a stream is to the relays.
#[derive(Debug, Clone, PartialEq)]
pub enum Meeting {
    /// The stream they publish to.
    Known,
    /// The first one. Messages that relays of an older version retained are published to it again.
    First,
    /// Another one than before. All that is retained is published to it again.
    Recreated {
        /// About how many messages.
        messages: i64,
    },
    /// Another one than a relay that runs publishes to.
    Elsewhere(OtherRelay),
}

/// Records that the relay `relay` sees the stream created at `created`, and makes it the stream of all relays unless
/// another relay that runs sees the present one.
///
/// # Errors
/// Whatever the database says.
pub async fn meet(pool: &PgPool, relay: Uuid, created: DateTime<Utc>) -> Result<Meeting, sqlx::Error> {
    if note(pool, relay, created).await? {
        return Ok(Meeting::Known);
    }
    let mut tx = pool.begin_with(BEGIN).await?;
    let present = lock(&mut tx).await?;
    if present.created == Some(created) {
        return Ok(Meeting::Known);
    }
    if let Some(other) = other_relay(&mut tx, relay, present.created).await? {
        return Ok(Meeting::Elsewhere(other));
    }
    let identity = switch(&mut tx, created).await?;
    let wanted = Wanted { created, since: None, not_of: Some(identity) };
    let messages = republication::replace(&mut tx, wanted).await?;
    tx.commit().await?;
    Ok(if present.created.is_some() { Meeting::Recreated { messages } } else { Meeting::First })
}

/// Names the database among all others: the system identifier of its server, and its oid.
///
/// # Errors
/// Whatever the database says, for example that the role may not ask for the system identifier.
pub async fn database(pool: &PgPool) -> Result<String, sqlx::Error> {
    whole(
        "select system_identifier::text || '/' || (select oid::text from pg_database where datname = current_database())
         from pg_control_system()",
    )
    .fetch_one(pool)
    .await?
    .try_get(0)
}

/// Says that the relay `relay` has ended, so that nobody waits for what it sees.
///
/// # Errors
/// Whatever the database says.
pub async fn leave(pool: &PgPool, relay: Uuid) -> Result<(), sqlx::Error> {
    whole(format!("delete from outbox.relays where id = '{relay}'")).execute(pool).await.map(drop)
}

/// Says whether the stream is the one the relays publish to.
async fn note(pool: &PgPool, relay: Uuid, created: DateTime<Utc>) -> Result<bool, sqlx::Error> {
    let created = time(created);
    whole(format!(
        "with me as (
            insert into outbox.relays (id, address, stream_created)
            values ('{relay}', coalesce(host(inet_client_addr()), 'the host of Postgres'), {created})
            on conflict (id) do update set stream_created = excluded.stream_created, seen_at = clock_timestamp()
         ), gone as (
            delete from outbox.relays where seen_at < clock_timestamp() - interval '1 hour' and id <> '{relay}'
         )
         select coalesce(stream_created = {created}, false) from outbox.retention"
    ))
    .fetch_one(pool)
    .await?
    .try_get(0)
}

/// The row of `outbox.retention`.
pub(crate) struct Present {
    pub(crate) created: Option<DateTime<Utc>>,
    pub(crate) identity: Option<DateTime<Utc>>,
    pub(crate) retained_since: DateTime<Utc>,
}

/// Locks what is known of the stream: one at a time decides what is to be published again, and meanwhile nothing of it
/// is thrown away.
pub(crate) async fn lock(tx: &mut Transaction<'static, Postgres>) -> Result<Present, sqlx::Error> {
    let row = sqlx::query(
        "select stream_created, stream_identity, retained_since from outbox.retention for update",
    )
    .persistent(false)
    .fetch_one(&mut **tx)
    .await?;
    Ok(Present { created: row.try_get(0)?, identity: row.try_get(1)?, retained_since: row.try_get(2)? })
}

async fn other_relay(
    tx: &mut Transaction<'static, Postgres>,
    relay: Uuid,
    present: Option<DateTime<Utc>>,
) -> Result<Option<OtherRelay>, sqlx::Error> {
    let row = sqlx::query(
        "select address, stream_created, extract(epoch from clock_timestamp() - seen_at)::float8
         from outbox.relays
         where id <> $1 and stream_created = $2 and seen_at > clock_timestamp() - $3 * interval '1 second'
         order by seen_at desc limit 1",
    )
    .persistent(false)
    .bind(relay)
    .bind(present)
    .bind(RELAY_SILENCE.as_secs_f64())
    .fetch_optional(&mut **tx)
    .await?;
    row.map(|row| {
        Ok(OtherRelay {
            address: row.try_get(0)?,
            stream_created: row.try_get(1)?,
            seen_ago: row.try_get(2)?,
        })
    })
    .transpose()
}

/// Returns the identity of its content: a stream that comes back has lost what was published to another one meanwhile.
async fn switch(
    tx: &mut Transaction<'static, Postgres>,
    created: DateTime<Utc>,
) -> Result<DateTime<Utc>, sqlx::Error> {
    sqlx::query(
        "with met as (
            insert into outbox.streams as s (created, complete_since) select $1, retained_since from outbox.retention
            on conflict (created) do update
                set complete_since = excluded.complete_since, refilled_to = null, refilled_since = null
            returning xmax::text = '0' as is_new
         )
         update outbox.retention set stream_created = $1,
             stream_identity = case when (select is_new from met) then $1 else clock_timestamp() end
         returning stream_identity",
    )
    .persistent(false)
    .bind(created)
    .fetch_one(&mut **tx)
    .await?
    .try_get(0)
}

/// What a stream must hold if it still holds all that it acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    /// Identity of its content.
    pub identity: DateTime<Utc>,
    /// Its highest sequence that is retained.
    pub stream_seq: i64,
    /// The message ids retained for it: one of them is that of the message.
    pub message_ids: Vec<String>,
}

/// The newest message that the present stream acknowledged with a sequence up to `last_seq` since it last lost messages,
/// if any is retained.
///
/// # Errors
/// Whatever the database says.
pub async fn newest(pool: &PgPool, last_seq: i64) -> Result<Option<Newest>, sqlx::Error> {
    let row = whole(format!(
        "select stream_created, stream_seq, array_agg(message_id) from outbox.published
         where stream_created = (select stream_identity from outbox.retention) and stream_seq = (
            select p.stream_seq from outbox.published p
            where p.stream_created = (select stream_identity from outbox.retention) and p.stream_seq <= {last_seq}
            order by p.stream_seq desc limit 1)
         group by stream_created, stream_seq"
    ))
    .fetch_optional(pool)
    .await?;
    row.map(|row| {
        Ok(Newest { identity: row.try_get(0)?, stream_seq: row.try_get(1)?, message_ids: row.try_get(2)? })
    })
    .transpose()
}

/// Records that the stream created at `created` has lost messages of the content `identity`, so that all that is retained
/// is published to it again. Returns about how many messages that are; `None` if somebody else has recorded it.
///
/// # Errors
/// Whatever the database says; nothing is recorded then.
pub async fn lose(
    pool: &PgPool,
    created: DateTime<Utc>,
    identity: DateTime<Utc>,
) -> Result<Option<i64>, sqlx::Error> {
    let mut tx = pool.begin_with(BEGIN).await?;
    let present = lock(&mut tx).await?;
    if present.created != Some(created) || present.identity != Some(identity) {
        return Ok(None);
    }
    let identity = sqlx::query(
        "update outbox.retention set stream_identity = clock_timestamp() returning stream_identity",
    )
    .persistent(false)
    .fetch_one(&mut *tx)
    .await?
    .try_get(0)?;
    let wanted = Wanted { created, since: None, not_of: Some(identity) };
    let messages = republication::replace(&mut tx, wanted).await?;
    tx.commit().await?;
    Ok(Some(messages))
}

/// From when on the consumers of a stream can rely on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Every event published since is in that stream, was in it, or is about to be published to it again. `None` if the
    /// relays have not met the stream yet.
    pub complete_since: Option<DateTime<Utc>>,
    /// Everything published since is retained here, and is published again if the stream loses it.
    pub retained_since: DateTime<Utc>,
    /// About how many retained messages are still to be published to it again.
    pub remaining: i64,
}

/// What consumers of the stream created at `created` can rely on.
///
/// # Errors
/// Whatever the database says.
pub async fn coverage(pool: &PgPool, created: DateTime<Utc>) -> Result<Coverage, sqlx::Error> {
    let created = time(created);
    let row = whole(format!(
        "select retained_since,
            (select complete_since from outbox.streams s where s.created = {created} and r.stream_created = s.created),
            (select coalesce(sum(messages), 0)::bigint from outbox.republications where stream_created = {created})
         from outbox.retention r"
    ))
    .fetch_one(pool)
    .await?;
    Ok(Coverage {
        retained_since: row.try_get(0)?,
        complete_since: row.try_get(1)?,
        remaining: row.try_get(2)?,
    })
}
