use std::sync::atomic::{AtomicBool, Ordering};

use event::{Change, Event, EventId, HISTORY_SQL, History, InvalidHistory, TransactionId, log_event};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Postgres, Row, Transaction};
use uuid::Uuid;

use crate::statement::whole;

/// A Postgres transaction id that never wraps around (`xid8`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Xid(pub u64);

impl std::fmt::Display for Xid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What the database said of an enqueued event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// Identity of the event.
    pub event_id: EventId,
    /// The transaction that it belongs to.
    pub xid: Xid,
    /// Its place in the outbox; its position in the log after [`through_wal`].
    pub seq: i64,
}

/// Why an event could not be enqueued. The transaction is aborted by then, as after any failed statement.
#[derive(Debug, thiserror::Error)]
pub enum EnqueueError {
    /// The schema `outbox` is missing or too old in this database.
    #[error("the outbox is not installed in this database; run `relay migrate` on it")]
    NotInstalled(#[source] sqlx::Error),
    /// The role may not enqueue.
    #[error(
        "the role may not enqueue; grant it usage on schema outbox, and insert and select (id, xid, seq) on outbox.events"
    )]
    NotPermitted(#[source] sqlx::Error),
    /// Anything else, such as a lost connection or a serialization failure: roll back and try the transaction again.
    #[error("could not enqueue the event")]
    Database(#[source] sqlx::Error),
}

impl From<sqlx::Error> for EnqueueError {
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
        match code.as_ref() {
            // invalid_schema_name, undefined_function, undefined_table
            "3F000" | "42883" | "42P01" => Self::NotInstalled(error),
            "42501" => Self::NotPermitted(error),
            _ => Self::Database(error),
        }
    }
}

/// Whether statements may stay prepared on the connections of this process.
static PREPARED: AtomicBool = AtomicBool::new(true);

/// For a process that reaches Postgres through a pooler in transaction mode that does not know of prepared statements
/// (PgBouncer before 1.21): call it once at the start. Statements are then sent whole each time, which costs a second
/// round trip per call.
pub fn without_prepared_statements() {
    PREPARED.store(false, Ordering::Relaxed);
}

/// Whether events go to the write-ahead log alone.
static THROUGH_LOG: AtomicBool = AtomicBool::new(false);

/// For a process whose events shall be written to the write-ahead log alone, not to the table `outbox.events`: call it
/// once at the start. Nothing is inserted, nothing deleted, nothing to vacuum; rolled back with the transaction all the
/// same. **Only a relay that runs with `--source wal` sees such events.** Needs Postgres 14 with `wal_level = logical`.
pub fn through_wal() {
    THROUGH_LOG.store(true, Ordering::Relaxed);
}

/// Records in the caller's transaction that the keys of `event` change when it commits. One statement.
///
/// # Errors
/// [`EnqueueError`]. Not cancel-safe: after a cancelled call roll the transaction back.
pub async fn enqueue(tx: &mut Transaction<'_, Postgres>, event: &Event) -> Result<Receipt, EnqueueError> {
    if THROUGH_LOG.load(Ordering::Relaxed) {
        return Ok(enqueue_through_wal(tx, std::slice::from_ref(event)).await?.swap_remove(0));
    }
    if *event.change() == Change::Namespace {
        return enqueue_namespaces(tx, event).await;
    }
    let (value, version, ttl_ms) = update_columns(event.change());
    let row = sqlx::query(
        "insert into outbox.events (keys, topic, value, version, ttl_ms, traceparent, id)
         values ($1, $2, $3, $4, $5, $6, $7) returning id, xid::text::bigint, seq",
    )
    .persistent(PREPARED.load(Ordering::Relaxed))
    .bind(event.keys().iter().map(event::CacheKey::as_str).collect::<Vec<_>>())
    .bind(event.topic().as_str())
    .bind(value)
    .bind(version)
    .bind(ttl_ms)
    .bind(event.traceparent().map(event::Traceparent::as_str))
    .bind(event.id().0)
    .fetch_one(&mut **tx)
    .await?;
    receipt(&row)
}

/// A statement of its own: the usual one is not to pay for what is rare.
async fn enqueue_namespaces(
    tx: &mut Transaction<'_, Postgres>,
    event: &Event,
) -> Result<Receipt, EnqueueError> {
    let row = sqlx::query(
        "insert into outbox.events (keys, namespace, topic, traceparent, id)
         values ($1, true, $2, $3, $4) returning id, xid::text::bigint, seq",
    )
    .persistent(PREPARED.load(Ordering::Relaxed))
    .bind(event.keys().iter().map(event::CacheKey::as_str).collect::<Vec<_>>())
    .bind(event.topic().as_str())
    .bind(event.traceparent().map(event::Traceparent::as_str))
    .bind(event.id().0)
    .fetch_one(&mut **tx)
    .await?;
    receipt(&row)
}

/// [`enqueue`] for many events in one statement, made for thousands at once. Receipts are in the order of the events.
///
/// # Errors
/// [`EnqueueError`]; either all events are enqueued or none.
pub async fn enqueue_all(
    tx: &mut Transaction<'_, Postgres>,
    events: &[Event],
) -> Result<Vec<Receipt>, EnqueueError> {
    let rows = match THROUGH_LOG.load(Ordering::Relaxed) {
        true => write_to_log(tx, events, "").await?,
        false => insert(tx, events, "").await?,
    };
    receipts(&rows)
}

/// What [`enqueue_all`] does after [`through_wal`], for one call: writes events to the write-ahead log alone, as part of
/// the transaction.
///
/// # Errors
/// [`EnqueueError`]; either all events are enqueued or none.
pub async fn enqueue_through_wal(
    tx: &mut Transaction<'_, Postgres>,
    events: &[Event],
) -> Result<Vec<Receipt>, EnqueueError> {
    receipts(&write_to_log(tx, events, "").await?)
}

/// As [`enqueue_all`], for a writer that marks: the same statement also says which history the transaction belongs to.
/// `None` if there are no events.
#[cfg(feature = "cache")]
pub(crate) async fn enqueue_and_identify(
    tx: &mut Transaction<'_, Postgres>,
    events: &[Event],
) -> Result<(Vec<Receipt>, Option<TransactionId>), EnqueueError> {
    let history = format!(", {HISTORY_SQL}");
    let rows = match THROUGH_LOG.load(Ordering::Relaxed) {
        true => write_to_log(tx, events, &history).await?,
        false => insert(tx, events, &history).await?,
    };
    let receipts = receipts(&rows)?;
    let identify = |(row, receipt): (&PgRow, &Receipt)| {
        let history = Some(read_history(row, 3)?);
        Ok::<_, EnqueueError>(TransactionId { history, xid: receipt.xid.0 })
    };
    let transaction = rows.first().zip(receipts.first()).map(identify).transpose()?;
    Ok((receipts, transaction))
}

/// Says which transaction this is and which history it belongs to, for [`Marks`](crate::Marks). One statement. Assigns an
/// id to the transaction if it has none yet.
///
/// # Errors
/// Whatever the database says. Not cancel-safe: after a cancelled call roll the transaction back.
pub async fn transaction_id(tx: &mut Transaction<'_, Postgres>) -> Result<TransactionId, sqlx::Error> {
    let sql = format!("select pg_current_xact_id()::text::bigint, {HISTORY_SQL}");
    let row = whole(sql).fetch_one(&mut **tx).await?;
    let xid = row.try_get::<i64, _>(0)?.cast_unsigned();
    Ok(TransactionId { history: Some(read_history(&row, 1)?), xid })
}

pub(crate) fn read_history(row: &PgRow, column: usize) -> Result<History, sqlx::Error> {
    let history: &str = row.try_get(column)?;
    history.parse().map_err(|error: InvalidHistory| sqlx::Error::Decode(error.into()))
}

/// Inserts into the table. Each row of the answer is a receipt, and then what `also` asks for.
async fn insert(
    tx: &mut Transaction<'_, Postgres>,
    events: &[Event],
    also: &str,
) -> Result<Vec<PgRow>, sqlx::Error> {
    if events.is_empty() {
        return Ok(Vec::new());
    }
    let mut columns = Columns::with_capacity(events.len());
    events.iter().for_each(|event| columns.push(event));
    let sql = format!(
        "insert into outbox.events (id, topic, keys, value, version, ttl_ms, traceparent, namespace)
         select u.id, u.topic, u.keys::text[], u.value, u.version, u.ttl_ms, u.traceparent, u.namespace
         from unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::bigint[], $6::bigint[], $7::text[], $8::bool[])
             with ordinality as u (id, topic, keys, value, version, ttl_ms, traceparent, namespace, ordinal)
         order by u.ordinal
         returning id, xid::text::bigint, seq{also}"
    );
    sqlx::query(AssertSqlSafe(sql))
        .persistent(PREPARED.load(Ordering::Relaxed))
        .bind(columns.ids)
        .bind(columns.topics)
        .bind(columns.keys)
        .bind(columns.values)
        .bind(columns.versions)
        .bind(columns.ttls_ms)
        .bind(columns.traceparents)
        .bind(columns.namespaces)
        .fetch_all(&mut **tx)
        .await
}

/// Writes to the log. Answers as [`insert`] does, with the position in the log in the place of `seq`.
async fn write_to_log(
    tx: &mut Transaction<'_, Postgres>,
    events: &[Event],
    also: &str,
) -> Result<Vec<PgRow>, sqlx::Error> {
    if events.is_empty() {
        return Ok(Vec::new());
    }
    let sql = format!(
        "select u.id, pg_current_xact_id()::text::bigint,
                (pg_logical_emit_message(true, $1, u.content) - '0/0'::pg_lsn)::bigint{also}
         from unnest($2::uuid[], $3::bytea[]) u (id, content)"
    );
    sqlx::query(AssertSqlSafe(sql))
        .persistent(PREPARED.load(Ordering::Relaxed))
        .bind(log_event::PREFIX)
        .bind(events.iter().map(|event| event.id().0).collect::<Vec<_>>())
        .bind(events.iter().map(log_event::encode).collect::<Vec<_>>())
        .fetch_all(&mut **tx)
        .await
}

fn receipts(rows: &[PgRow]) -> Result<Vec<Receipt>, EnqueueError> {
    rows.iter().map(receipt).collect()
}

/// Events turned on their side, one array per column; the keys of an event are an array literal, since Postgres cannot
/// unnest arrays of arrays of different lengths.
struct Columns<'a> {
    ids: Vec<Uuid>,
    topics: Vec<&'a str>,
    keys: Vec<String>,
    values: Vec<Option<&'a [u8]>>,
    versions: Vec<Option<i64>>,
    ttls_ms: Vec<Option<i64>>,
    traceparents: Vec<Option<&'a str>>,
    namespaces: Vec<bool>,
}

impl<'a> Columns<'a> {
    fn with_capacity(events: usize) -> Self {
        Self {
            ids: Vec::with_capacity(events),
            topics: Vec::with_capacity(events),
            keys: Vec::with_capacity(events),
            values: Vec::with_capacity(events),
            versions: Vec::with_capacity(events),
            ttls_ms: Vec::with_capacity(events),
            traceparents: Vec::with_capacity(events),
            namespaces: Vec::with_capacity(events),
        }
    }

    fn push(&mut self, event: &'a Event) {
        let (value, version, ttl_ms) = update_columns(event.change());
        self.ids.push(event.id().0);
        self.topics.push(event.topic().as_str());
        self.keys.push(array_literal(event.keys()));
        self.values.push(value);
        self.versions.push(version);
        self.ttls_ms.push(ttl_ms);
        self.traceparents.push(event.traceparent().map(event::Traceparent::as_str));
        self.namespaces.push(*event.change() == Change::Namespace);
    }
}

pub(crate) fn update_columns(change: &Change) -> (Option<&[u8]>, Option<i64>, Option<i64>) {
    match change {
        Change::Delete | Change::Namespace => (None, None, None),
        Change::Update { value, version, ttl } => {
            let ttl_ms = i64::try_from(ttl.as_millis()).expect("at most MAX_TTL");
            (Some(value.as_slice()), Some(*version), Some(ttl_ms))
        }
    }
}

fn receipt(row: &PgRow) -> Result<Receipt, EnqueueError> {
    Ok(Receipt {
        event_id: EventId(row.try_get(0)?),
        // As `bigint`: sqlx would look up the unknown type `xid8` with a statement of its own, which replaces the
        // unnamed one that it has just prepared.
        xid: Xid(row.try_get::<i64, _>(1)?.cast_unsigned()),
        seq: row.try_get(2)?,
    })
}

/// The text form of a Postgres array: `{"a","b\"c"}`.
fn array_literal(keys: &[event::CacheKey]) -> String {
    let mut literal = String::with_capacity(keys.iter().map(|key| key.as_str().len() + 3).sum::<usize>() + 2);
    literal.push('{');
    for (index, key) in keys.iter().enumerate() {
        literal.push_str(if index == 0 { "\"" } else { ",\"" });
        for character in key.as_str().chars() {
            if matches!(character, '"' | '\\') {
                literal.push('\\');
            }
            literal.push(character);
        }
        literal.push('"');
    }
    literal.push('}');
    literal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn array_literals_quote_what_postgres_would_interpret() {
        let keys = [r#"a"b"#, r"c\d", "{e},f", "NULL"].map(|key| event::CacheKey::new(key).unwrap());
        assert_eq!(array_literal(&keys), r#"{"a\"b","c\\d","{e},f","NULL"}"#);
    }
}
