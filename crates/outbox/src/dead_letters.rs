//! Events set aside because publishing them can never succeed.

use chrono::{DateTime, Utc};
use event::EventId;
use sqlx::postgres::PgRow;
use sqlx::{PgPool, Row};

use crate::statement::whole;

/// One event that was set aside.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// Identity of the event.
    pub id: EventId,
    /// Its topic.
    pub topic: String,
    /// Its keys.
    pub keys: Vec<String>,
    /// Size of the value in bytes, for an update.
    pub value_bytes: Option<i32>,
    /// Version of the value, for an update.
    pub version: Option<i64>,
    /// When it was enqueued.
    pub created_at: DateTime<Utc>,
    /// When it was set aside.
    pub dead_at: DateTime<Utc>,
    /// Why.
    pub reason: String,
}

const SELECT: &str = "
    select id, topic, array_replace(keys, null, ''), octet_length(value), version, created_at, dead_at, reason
    from outbox.dead_letters";

/// The newest dead letters, up to `limit`.
///
/// # Errors
/// Whatever the database says.
pub async fn list(pool: &PgPool, limit: i64) -> Result<Vec<DeadLetter>, sqlx::Error> {
    let rows = whole(format!("{SELECT} order by dead_at desc limit {limit}")).fetch_all(pool).await?;
    rows.iter().map(read).collect()
}

/// One dead letter.
///
/// # Errors
/// Whatever the database says.
pub async fn find(pool: &PgPool, id: EventId) -> Result<Option<DeadLetter>, sqlx::Error> {
    let row = whole(format!("{SELECT} where id = '{}'", id.0)).fetch_optional(pool).await?;
    row.as_ref().map(read).transpose()
}

/// How many there are.
///
/// # Errors
/// Whatever the database says.
pub async fn count(pool: &PgPool) -> Result<i64, sqlx::Error> {
    whole("select count(*) from outbox.dead_letters").fetch_one(pool).await?.try_get(0)
}

/// Puts dead letters back into the outbox, all of them or the given ones. Says how many.
///
/// They get new identities: under the old message id JetStream would take them for duplicates within its window and
/// swallow them silently.
///
/// # Errors
/// Whatever the database says; nothing has changed then.
pub async fn replay(pool: &PgPool, ids: Option<&[EventId]>) -> Result<u64, sqlx::Error> {
    let done = whole(format!(
        "with back as (
            delete from outbox.dead_letters where {} and cardinality(keys) > 0 returning *)
         insert into outbox.events (id, topic, keys, value, version, ttl_ms, xid, traceparent, created_at, namespace)
         select outbox.new_id(), topic, keys, value, version, ttl_ms, xid, traceparent, created_at, namespace from back",
        chosen(ids)
    ))
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// Deletes dead letters for good, all of them or the given ones. Says how many.
///
/// # Errors
/// Whatever the database says.
pub async fn discard(pool: &PgPool, ids: Option<&[EventId]>) -> Result<u64, sqlx::Error> {
    let done = whole(format!("delete from outbox.dead_letters where {}", chosen(ids))).execute(pool).await?;
    Ok(done.rows_affected())
}

/// The condition that is true of the given ones, or of all.
fn chosen(ids: Option<&[EventId]>) -> String {
    match ids {
        None => "true".to_owned(),
        Some(ids) => {
            let ids: Vec<String> = ids.iter().map(|id| id.0.to_string()).collect();
            format!("id = any('{{{}}}'::uuid[])", ids.join(","))
        }
    }
}

fn read(row: &PgRow) -> Result<DeadLetter, sqlx::Error> {
    Ok(DeadLetter {
        id: EventId(row.try_get(0)?),
        topic: row.try_get(1)?,
        keys: row.try_get(2)?,
        value_bytes: row.try_get(3)?,
        version: row.try_get(4)?,
        created_at: row.try_get(5)?,
        dead_at: row.try_get(6)?,
        reason: row.try_get(7)?,
    })
}
