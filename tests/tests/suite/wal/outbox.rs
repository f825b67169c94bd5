//! Events without a table: written to the log alone.

use outbox::Event;
use tests::Pair;

use super::{fence, sql, users};

async fn enqueue(pair: &Pair, key: &str, commit: bool) {
    let mut tx = pair.pool.begin().await.unwrap();
    let receipts = outbox::enqueue_through_wal(&mut tx, &[Event::delete([key]).unwrap()]).await.unwrap();
    assert!(receipts[0].xid.0 > 0 && receipts[0].seq > 0);
    if commit {
        tx.commit().await.unwrap();
    } else {
        tx.rollback().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_in_the_log_invalidates_if_its_transaction_commits_and_leaves_no_row() {
    let pair = users().await;
    pair.fill("cart:1").await.unwrap();
    pair.fill("cart:2").await.unwrap();
    enqueue(&pair, "cart:2", false).await;
    enqueue(&pair, "cart:1", true).await;
    pair.until_none("cart:1").await;
    fence(&pair).await;
    assert!(pair.is_cached("cart:2").await.unwrap(), "that was rolled back");
    assert_eq!(pair.backlog().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_event_is_set_aside_and_stops_nothing() {
    let pair = users().await;
    sql(&pair, "select pg_logical_emit_message(true, 'outbox', 'nonsense')").await;
    fence(&pair).await;
    devstack::eventually(tests::SETTLED, async || match pair.dead_letters().await {
        Ok(1) => Ok(()),
        other => Err(format!("{other:?} dead letters")),
    })
    .await;
    sql(&pair, "select pg_logical_emit_message(true, 'somebody else', 'nonsense')").await;
    fence(&pair).await;
    assert_eq!(pair.dead_letters().await.unwrap(), 1);
}
