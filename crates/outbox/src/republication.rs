//! What is retained and has to be published to the stream again, in parts that relays share.
//!
//! A part is a range of one partition of `outbox.published`. To say that everything is to be published again costs a row
//! for each `PART_BLOCKS`, and to take the next page costs the same for the first and for the last: nothing is searched
//! and no message is changed. The partitions are not emptied while there are parts.

use std::time::Duration;

use chrono::{DateTime, Utc};
use event::Envelope;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgPool, Postgres, Row, Transaction};

use crate::retention::{Published, published, retain};
use crate::statement::{BEGIN, time, whole};
use crate::stream::lock;

/// Size of a part in blocks of 8 KiB: several thousand small messages, and few parts however much is retained.
const PART_BLOCKS: i64 = 256;

/// Most messages in a page.
const PAGE_MESSAGES: usize = 8_000;

/// Bytes of bodies after which a page ends.
const PAGE_BYTES: i64 = 4 * 1024 * 1024;

/// Messages in a block while Postgres has not counted any.
const GUESSED_PER_BLOCK: i64 = 25;

/// Where the last part of a partition ends.
const END: &str = "(4294967295,0)";

/// The earliest time: nothing was published before.
const EVER: &str = "timestamptz '0001-01-01 00:00:00+00'";

/// Waits for those who are about to record what they published before the loss. Rolled back to let go of the lock, which
/// keeps all others from recording.
const BARRIER: [&str; 3] =
    ["savepoint barrier; set local lock_timeout = '500ms'", "", "rollback to savepoint barrier"];

/// What is to be published again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// The stream that lacks it.
    pub(crate) created: DateTime<Utc>,
    /// Messages recorded since; all if not set.
    pub(crate) since: Option<DateTime<Utc>>,
    /// But not those of this content.
    pub(crate) not_of: Option<DateTime<Utc>>,
}

/// A page of messages that the stream lacks, in the hands of one relay.
#[derive(Debug)]
pub struct Page {
    tx: Transaction<'static, Postgres>,
    created: DateTime<Utc>,
    /// The part it belongs to.
    part: i64,
    /// Where it ends.
    last_place: Option<String>,
    /// Whether nothing of the part is left behind it.
    ends_part: bool,
    /// The messages.
    pub messages: Vec<Published>,
}

impl Page {
    /// Takes the next page of a part that no other relay has in hand; `None` if there is none. The server takes it back if
    /// the relay hangs for longer than `lease`.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn take(
        pool: &PgPool,
        created: DateTime<Utc>,
        lease: Duration,
    ) -> Result<Option<Self>, sqlx::Error> {
        let lease_ms = lease.as_millis().max(1);
        let begin = format!("{BEGIN}; set local idle_in_transaction_session_timeout = {lease_ms}");
        let mut tx = pool.begin_with(AssertSqlSafe(begin)).await?;
        let part = sqlx::query(
            "select id, half, after_place::text, before_place::text, since, not_of
             from outbox.republications where stream_created = $1 order by id limit 1 for update skip locked",
        )
        .persistent(false)
        .bind(created)
        .fetch_optional(&mut *tx)
        .await?;
        let Some(part) = part else { return Ok(None) };
        let rows = read(&mut tx, &part).await?;
        let messages = rows.iter().map(published).collect::<Result<Vec<_>, _>>()?;
        let bytes: usize = messages.iter().map(|message| message.body.len()).sum();
        Ok(Some(Self {
            created,
            part: part.try_get(0)?,
            last_place: rows.last().map(|row| row.try_get(6)).transpose()?,
            ends_part: messages.len() < PAGE_MESSAGES && (bytes as u64) < PAGE_BYTES.unsigned_abs(),
            messages,
            tx,
        }))
    }

    /// The same for whoever takes this part, and for no other part.
    #[must_use]
    pub fn name(&self) -> String {
        self.part.to_string()
    }

    /// Records that the stream has acknowledged them all. `newest` is what it acknowledged with the highest sequence: it is
    /// noticed later if the stream does not hold it any more.
    ///
    /// # Errors
    /// Whatever the database says; the messages are then published once more later, which is harmless.
    pub async fn settle(mut self, newest: Option<Newest>) -> Result<(), sqlx::Error> {
        if let Some(Newest { subject, message_id, stream_seq }) = newest {
            let body = Envelope::default().encode().into();
            let mark = Published { subject, message_id, traceparent: None, events: 0, body, stream_seq };
            retain(&mut self.tx, false, self.created, &[mark]).await?;
        }
        let done = match self.last_place.filter(|_| !self.ends_part) {
            Some(place) => {
                format!("update outbox.republications set after_place = '{place}' where id = {}", self.part)
            }
            None => format!("delete from outbox.republications where id = {}", self.part),
        };
        whole(done).execute(&mut *self.tx).await?;
        self.tx.commit().await
    }
}

/// The last message of a page as it was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    /// NATS subject.
    pub subject: String,
    /// `Nats-Msg-Id`.
    pub message_id: String,
    /// Sequence the stream gave it.
    pub stream_seq: i64,
}

async fn read(tx: &mut Transaction<'static, Postgres>, part: &PgRow) -> Result<Vec<PgRow>, sqlx::Error> {
    let half: i16 = part.try_get(1)?;
    let (after, before): (String, String) = (part.try_get(2)?, part.try_get(3)?);
    let (since, not_of): (DateTime<Utc>, Option<DateTime<Utc>>) = (part.try_get(4)?, part.try_get(5)?);
    if before == END {
        let lock = format!("lock table outbox.published_{half} in share mode");
        for statement in BARRIER {
            let statement = if statement.is_empty() { lock.clone() } else { statement.to_owned() };
            whole(statement).execute(&mut **tx).await?;
        }
    }
    let not_of = not_of.map(|content| format!("and stream_created <> {}", time(content))).unwrap_or_default();
    sqlx::query(AssertSqlSafe(format!(
        "select subject, message_id, traceparent, events, body, stream_seq, page.place::text
         from (select p.*, p.ctid as place, sum(octet_length(body)) over (order by p.ctid) as total
            from outbox.published_{half} p
            where p.ctid > '{after}'::tid and p.ctid < '{before}'::tid and published_at >= {} {not_of}) page
         where total - octet_length(body) < {PAGE_BYTES} order by page.place limit {PAGE_MESSAGES}",
        time(since)
    )))
    .persistent(false)
    .fetch_all(&mut **tx)
    .await
}

/// Lets everything that is wanted be published again, and nothing else that was to be.
pub(crate) async fn replace(
    tx: &mut Transaction<'static, Postgres>,
    wanted: Wanted,
) -> Result<i64, sqlx::Error> {
    // A part that a relay has in hand is left to it: it ends as it began, or stays for a stream that is no more.
    whole(
        "delete from outbox.republications
         where id in (select id from outbox.republications for update skip locked)",
    )
    .execute(&mut **tx)
    .await?;
    add(tx, wanted).await
}

/// Adds the parts; returns about how many messages they hold.
async fn add(tx: &mut Transaction<'static, Postgres>, wanted: Wanted) -> Result<i64, sqlx::Error> {
    let Wanted { created, since, not_of } = wanted;
    let (created, since) = (time(created), since.map_or_else(|| EVER.to_owned(), time));
    let not_of = not_of.map_or_else(|| "null".to_owned(), time);
    whole(format!(
        "with size as (
            select half, pg_relation_size(relation) / current_setting('block_size')::bigint as blocks,
                pg_stat_get_live_tuples(relation) as counted
            from (values (0, 'outbox.published_0'::regclass), (1, 'outbox.published_1'::regclass)) p (half, relation)
         ), part as (
            select half, first, blocks, case when first + {PART_BLOCKS} >= blocks then blocks - first else {PART_BLOCKS} end
                    * case when counted > 0 then counted::float8 / greatest(blocks, 1) else {GUESSED_PER_BLOCK} end
                as messages
            from size, generate_series(0, greatest(blocks - 1, 0), {PART_BLOCKS}) first
         ), added as (
            insert into outbox.republications
                (stream_created, half, after_place, before_place, since, not_of, messages)
            select {created}, half, format('(%s,0)', first)::tid,
                case when first + {PART_BLOCKS} >= blocks then '{END}' else format('(%s,0)', first + {PART_BLOCKS}) end::tid,
                {since}, {not_of}, round(messages)
            from part order by half, first
            returning messages
         )
         select coalesce(sum(messages), 0)::bigint from added"
    ))
    .fetch_one(&mut **tx)
    .await?
    .try_get(0)
}

/// About how many messages are still to be published again to the stream that the relays publish to; `None` if there are
/// none.
///
/// # Errors
/// Whatever the database says.
pub async fn remaining(pool: &PgPool) -> Result<Option<i64>, sqlx::Error> {
    whole(
        "select sum(p.messages)::bigint
         from outbox.republications p join outbox.retention r on p.stream_created = r.stream_created",
    )
    .fetch_one(pool)
    .await?
    .try_get(0)
}

/// What becomes of messages that a stream has lost before somebody read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refill {
    /// They are published again, with about so many others.
    Begun {
        /// How many.
        messages: i64,
    },
    /// Somebody else has asked for them.
    Asked,
    /// They are not retained any more, or the relays publish to another stream.
    Impossible,
}

/// Lets everything recorded since `since` be published again to the stream created at `created`, which lacks something
/// before the sequence `up_to`. Asked for the same again it does nothing.
///
/// # Errors
/// Whatever the database says.
pub async fn refill(
    pool: &PgPool,
    created: DateTime<Utc>,
    since: DateTime<Utc>,
    up_to: i64,
) -> Result<Refill, sqlx::Error> {
    let mut tx = pool.begin_with(BEGIN).await?;
    let present = lock(&mut tx).await?;
    if present.created != Some(created) || present.retained_since > since {
        return Ok(Refill::Impossible);
    }
    let asked = whole(format!(
        "update outbox.streams set refilled_to = {up_to}, refilled_since = {0}
         where created = {1}
           and not coalesce(refilled_to >= {up_to} and refilled_since <= {0}, false)",
        time(since),
        time(created)
    ))
    .execute(&mut *tx)
    .await?;
    if asked.rows_affected() == 0 {
        return Ok(Refill::Asked);
    }
    let messages = add(&mut tx, Wanted { created, since: Some(since), not_of: None }).await?;
    tx.commit().await?;
    Ok(Refill::Begun { messages })
}

/// Lets everything recorded within `age` be published again to the present stream; returns about how many retained messages
/// are searched for it. `None` if no relay has met a stream yet.
///
/// # Errors
/// Whatever the database says.
pub async fn request(pool: &PgPool, age: Duration) -> Result<Option<i64>, sqlx::Error> {
    let mut tx = pool.begin_with(BEGIN).await?;
    let Some(created) = lock(&mut tx).await?.created else { return Ok(None) };
    let since = sqlx::query("select clock_timestamp() - $1 * interval '1 second'")
        .persistent(false)
        .bind(age.as_secs_f64())
        .fetch_one(&mut *tx)
        .await?
        .try_get(0)?;
    let messages = add(&mut tx, Wanted { created, since: Some(since), not_of: None }).await?;
    tx.commit().await?;
    Ok(Some(messages))
}
