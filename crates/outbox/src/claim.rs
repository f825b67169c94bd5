use std::sync::LazyLock;
use std::time::Duration;

use chrono::{DateTime, Utc};
use event::{
    CacheKey, Change, CommittedEvent, EventId, HISTORY_SQL, InvalidEvent, MAX_VALUE_BYTES, Topic,
    Traceparent, check_key_count,
};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, PgPool, Postgres, Row, Transaction};
use uuid::Uuid;

use crate::enqueue::{read_history, update_columns};
use crate::statement::{BEGIN, whole};

/// How to claim.
#[derive(Debug, Clone, Copy)]
pub struct ClaimOptions {
    /// Most rows to take at once.
    pub limit: i64,
    /// Most bytes of keys and values to take at once; a single row may exceed it.
    pub max_bytes: i64,
    /// Skip rows below this `seq`: what was deleted there is still in the index until vacuum, and scanning it costs.
    /// Rows of transactions that commit late can be below it, so claim from 0 now and then.
    pub from_seq: i64,
    /// Keep statements prepared on the connection. Not behind a transaction pooler that does not know of them.
    pub prepared: bool,
}

/// Rows taken from the outbox, deleted in a transaction that is still open.
///
/// The row locks are the lease: [`Claim::settle`] after the broker acknowledged makes the deletion final, and whatever
/// else happens (an error, a drop, a dead process, a lost connection) gives the rows back at once.
#[derive(Debug)]
pub struct Claim {
    tx: Transaction<'static, Postgres>,
    prepared: bool,
}

/// One claimed row.
#[derive(Debug)]
pub struct Claimed {
    /// Its place in the outbox.
    pub seq: i64,
    /// Topic to publish it under.
    pub topic: Topic,
    /// The event.
    pub event: CommittedEvent,
}

/// A claimed row that can never be published, with the reason.
#[derive(Debug)]
pub struct Poison {
    row: Columns,
    /// Why it can never be published.
    pub reason: String,
}

/// The columns of `outbox.events` as they are, valid or not.
#[derive(Debug)]
struct Columns {
    seq: i64,
    id: Uuid,
    topic: String,
    keys: Vec<Option<String>>,
    value: Option<Vec<u8>>,
    version: Option<i64>,
    ttl_ms: Option<i64>,
    xid: u64,
    traceparent: Option<String>,
    created_at: DateTime<Utc>,
    namespace: bool,
    /// Stored size of the keys, which are not here if there are too many of them.
    keys_bytes: i64,
}

/// The planner must not choose anything but the index because the table was empty when the statement was planned: the
/// plan is kept, and the table may have a million rows the next time. What is switched off counts as immensely expensive
/// where there is no other way, and would have every claim compiled just in time, for 50 to 100 ms: so no JIT either.
pub(crate) const PLANNER: &str =
    "set local enable_seqscan = off; set local enable_bitmapscan = off; set local jit = off";

/// Every row must come out, whatever it holds, or nothing ever would again: arrays in one dimension that begin at 1, and a
/// time that a client can represent. A row may have a gigabyte, so what no event may have is not fetched.
///
/// Rows are deleted by physical address, which the row lock pins: no second descent of the index. Of the locked rows only
/// those are taken that fit the byte budget, and always the first; the others are free again at the end of the claim.
///
/// The history is the same for all rows, and evaluated once. A row that was written before the server was promoted gets
/// the server's new history, which continues that of its transaction.
pub(crate) static TAKE: LazyLock<String> = LazyLock::new(|| {
    format!(
        "
    delete from outbox.events
    where ctid = any(array(
        select ctid from (
            select ctid, sum(bytes) over (order by seq) - bytes as bytes_before from (
                select ctid, seq, coalesce(octet_length(value), 0) + pg_column_size(keys) as bytes
                from outbox.events where seq >= $1 order by seq limit $2 for update skip locked
            ) locked
        ) measured where bytes_before < $3))
    returning seq, id, topic,
        case when pg_column_size(keys) > {MAX_KEYS_BYTES} then '{{}}'
            when array_ndims(keys) = 1 and array_lower(keys, 1) = 1 then keys
            else array(select unnest(keys)) end,
        case when octet_length(value) <= {MAX_VALUE_BYTES} then value end, version, ttl_ms, xid::text::bigint, traceparent,
        least(greatest(created_at, timestamptz 'epoch'), clock_timestamp()), namespace, {HISTORY_SQL},
        pg_column_size(keys)::bigint"
    )
});

/// Most bytes of the keys of one row that are fetched: more than any valid event has.
const MAX_KEYS_BYTES: i64 = 16 * 1024 * 1024;

/// How long [`wait_for_events`] stays in the server when nothing comes: short enough for a relay that is to drain or to
/// sweep, and long enough to cost next to nothing.
const PATIENCE: Duration = Duration::from_millis(250);

/// Waits until there is a committed row at or above `from_seq`, claimed by another relay or not, and says whether there
/// is one; for a quarter of a second at most. The server looks again and again, with pauses that grow from `min_pause`
/// to `max_pause`; the caller makes one round trip of the simple protocol, without a transaction.
///
/// # Errors
/// Whatever the database says.
pub async fn wait_for_events(
    pool: &PgPool,
    from_seq: i64,
    min_pause: Duration,
    max_pause: Duration,
) -> Result<bool, sqlx::Error> {
    let [min, max, patience] = [min_pause, max_pause.min(PATIENCE), PATIENCE].map(|time| time.as_secs_f64());
    let sql = format!("select outbox.wait_for_events({from_seq}, {min}, {max}, {patience})");
    whole(sql).fetch_one(pool).await?.try_get(0)
}

impl Claim {
    /// Takes up to `options.limit` committed rows that nobody else holds. The rows come in no particular order; those
    /// that are not valid events come as [`Poison`].
    ///
    /// `lease` bounds how long the server lets the transaction sit idle before it takes the rows back.
    ///
    /// # Errors
    /// Whatever the database says. Cancel-safe: a dropped call gives the rows back.
    pub async fn take(
        pool: &PgPool,
        options: ClaimOptions,
        lease: Duration,
    ) -> Result<(Self, Vec<Claimed>, Vec<Poison>), sqlx::Error> {
        // The server takes the rows back if the relay hangs with them in hand.
        let lease_ms = lease.as_millis().max(1);
        let begin = format!("{BEGIN}; {PLANNER}; set local idle_in_transaction_session_timeout = {lease_ms}");
        let mut tx = pool.begin_with(AssertSqlSafe(begin)).await?;
        let rows = sqlx::query(AssertSqlSafe(TAKE.as_str()))
            .persistent(options.prepared)
            .bind(options.from_seq)
            .bind(options.limit)
            .bind(options.max_bytes)
            .fetch_all(&mut *tx)
            .await?;
        let mut claimed = Vec::with_capacity(rows.len());
        let mut poison = Vec::new();
        let history = rows.first().map(|row| read_history(row, 11)).transpose()?;
        for row in rows {
            match Columns::read(&row)?.into_claimed() {
                Ok(mut row) => {
                    row.event.history = history;
                    claimed.push(row);
                }
                Err(row) => poison.push(*row),
            }
        }
        Ok((Self { tx, prepared: options.prepared }, claimed, poison))
    }

    /// Moves rows that can never be published to `outbox.dead_letters`, in the same transaction.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn set_aside(&mut self, poison: &[Poison]) -> Result<(), sqlx::Error> {
        set_aside(&mut self.tx, self.prepared, poison).await
    }

    /// Makes the deletion final. Only after every event in hand was acknowledged or set aside.
    ///
    /// # Errors
    /// Whatever the database says; the rows may then come again, which is harmless.
    pub async fn settle(self) -> Result<(), sqlx::Error> {
        self.tx.commit().await
    }

    /// Gives the rows back now rather than when the connection is next used.
    ///
    /// # Errors
    /// Whatever the database says; the rows are free in that case too.
    pub async fn give_back(self) -> Result<(), sqlx::Error> {
        self.tx.rollback().await
    }

    pub(crate) fn connection(&mut self) -> (&mut PgConnection, bool) {
        (&mut self.tx, self.prepared)
    }
}

/// Moves events that can never be published to `outbox.dead_letters`.
pub(crate) async fn set_aside(
    connection: &mut PgConnection,
    prepared: bool,
    poison: &[Poison],
) -> Result<(), sqlx::Error> {
    for Poison { row, reason } in poison {
        sqlx::query(
            "insert into outbox.dead_letters
                (id, seq, topic, keys, value, version, ttl_ms, xid, traceparent, created_at, namespace, reason)
             values ($1, $2, $3, $4, $5, $6, $7, $8::text::xid8, $9, $10, $11, $12)
             on conflict (id, seq) do update set reason = excluded.reason, dead_at = clock_timestamp()",
        )
        .persistent(prepared)
        .bind(row.id)
        .bind(row.seq)
        .bind(&row.topic)
        .bind(&row.keys)
        .bind(&row.value)
        .bind(row.version)
        .bind(row.ttl_ms)
        .bind(row.xid.to_string())
        .bind(&row.traceparent)
        .bind(row.created_at)
        .bind(row.namespace)
        .bind(reason)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

impl Poison {
    /// A valid event that can never be published all the same, for example since it is larger than the broker takes.
    #[must_use]
    pub fn new(claimed: &Claimed, reason: String) -> Self {
        let Claimed { seq, topic, event } = claimed;
        let (value, version, ttl_ms) = update_columns(&event.change);
        let row = Columns {
            seq: *seq,
            id: event.id.0,
            topic: topic.as_str().to_owned(),
            keys: event.keys.iter().map(|key| Some(key.as_str().to_owned())).collect(),
            value: value.map(<[u8]>::to_vec),
            version,
            ttl_ms,
            xid: event.xids.first().copied().unwrap_or_default(),
            traceparent: event.traceparent.as_ref().map(|parent| parent.as_str().to_owned()),
            created_at: DateTime::from_timestamp_micros(event.at_us).unwrap_or_default(),
            namespace: event.change == Change::Namespace,
            keys_bytes: 0,
        };
        Self { row, reason }
    }

    /// Identity of the event.
    #[must_use]
    pub fn event_id(&self) -> EventId {
        EventId(self.row.id)
    }
}

impl Columns {
    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            seq: row.try_get(0)?,
            id: row.try_get(1)?,
            topic: row.try_get(2)?,
            keys: row.try_get(3)?,
            value: row.try_get(4)?,
            version: row.try_get(5)?,
            ttl_ms: row.try_get(6)?,
            xid: row.try_get::<i64, _>(7)?.cast_unsigned(),
            traceparent: row.try_get(8)?,
            created_at: row.try_get(9)?,
            namespace: row.try_get(10)?,
            keys_bytes: row.try_get(12)?,
        })
    }

    /// Whatever was inserted past `outbox.enqueue` and this crate is checked here: it becomes a dead letter rather than
    /// a relay that stops.
    fn into_claimed(self) -> Result<Claimed, Box<Poison>> {
        if self.keys_bytes > MAX_KEYS_BYTES {
            let reason = format!(
                "keys have {} bytes, the limit is {MAX_KEYS_BYTES}; they were not kept",
                self.keys_bytes
            );
            return Err(Box::new(Poison { reason, row: self }));
        }
        match self.to_claimed() {
            Ok(claimed) => Ok(claimed),
            Err(error) => Err(Box::new(Poison { reason: error.to_string(), row: self })),
        }
    }

    fn to_claimed(&self) -> Result<Claimed, InvalidEvent> {
        let key = |(index, key): (usize, &Option<String>)| {
            CacheKey::new(key.as_deref().unwrap_or_default())
                .map_err(|reason| InvalidEvent::Key { index, reason })
        };
        let event = CommittedEvent {
            id: EventId(self.id),
            keys: self.keys.iter().enumerate().map(key).collect::<Result<_, _>>()?,
            change: self.change()?,
            xids: vec![self.xid],
            history: None,
            at_us: self.created_at.timestamp_micros(),
            traceparent: self.traceparent.as_deref().map(Traceparent::new).transpose()?,
        };
        check_key_count(&event.keys, &event.change)?;
        Ok(Claimed { seq: self.seq, topic: Topic::new(self.topic.as_str())?, event })
    }

    fn change(&self) -> Result<Change, InvalidEvent> {
        match (&self.value, self.version, self.ttl_ms) {
            _ if self.namespace => Ok(Change::Namespace),
            (Some(value), Some(version), Some(ttl_ms)) => {
                let ttl = Duration::from_millis(u64::try_from(ttl_ms).unwrap_or(0));
                Ok(Change::update(value.clone(), version, ttl)?)
            }
            // Also when one of the three is missing: to delete is always right.
            _ => Ok(Change::Delete),
        }
    }
}
