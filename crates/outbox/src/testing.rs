//! For the tests of services that enqueue: check inside the transaction what it would tell the caches.

use sqlx::postgres::PgRow;
use sqlx::{Postgres, Row, Transaction};

/// Keys that the transaction has enqueued so far, in order, duplicates included.
///
/// # Errors
/// Whatever the database says. Needs `select` on `outbox.events`, which the owner of the schema has.
pub async fn enqueued_keys(tx: &mut Transaction<'_, Postgres>) -> Result<Vec<String>, sqlx::Error> {
    let rows = sqlx::query(
        "select k.key from outbox.events e, unnest(e.keys) with ordinality k (key, ordinal)
         where e.xid = pg_current_xact_id_if_assigned() order by e.seq, k.ordinal",
    )
    .persistent(false)
    .fetch_all(&mut **tx)
    .await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}

/// One event of an open transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enqueued {
    /// Its topic.
    pub topic: String,
    /// Its keys.
    pub keys: Vec<String>,
    /// Whether they are namespaces.
    pub namespace: bool,
}

/// Events that the transaction has enqueued so far, in order.
///
/// # Errors
/// Whatever the database says. Needs `select` on `outbox.events`, which the owner of the schema has.
pub async fn enqueued(tx: &mut Transaction<'_, Postgres>) -> Result<Vec<Enqueued>, sqlx::Error> {
    let rows = sqlx::query(
        "select topic, keys, namespace from outbox.events where xid = pg_current_xact_id_if_assigned() order by seq",
    )
    .persistent(false)
    .fetch_all(&mut **tx)
    .await?;
    let read = |row: &PgRow| {
        Ok(Enqueued { topic: row.try_get(0)?, keys: row.try_get(1)?, namespace: row.try_get(2)? })
    };
    rows.iter().map(read).collect()
}

/// Panics unless the transaction has enqueued `key`; the message lists what it has enqueued instead.
///
/// ```rust,no_run
/// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let mut tx = pool.begin().await?;
/// // rename_user(&mut tx, 123, "Ada").await?;
/// outbox::testing::assert_enqueued(&mut tx, "user:123:profile").await;
/// tx.rollback().await?;
/// # Ok(())
/// # }
/// ```
///
/// # Panics
/// If the key is not there, or the database cannot be asked.
pub async fn assert_enqueued(tx: &mut Transaction<'_, Postgres>, key: &str) {
    let keys = enqueued_keys(tx).await.expect("the transaction can be asked what it enqueued");
    assert!(
        keys.iter().any(|enqueued| enqueued == key),
        "the transaction did not enqueue {key:?}; it enqueued {keys:?}"
    );
}
