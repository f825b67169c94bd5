//! What the pair is for, without faults.

use outbox::Event;
use tests::Pair;

#[tokio::test(flavor = "multi_thread")]
async fn committed_event_removes_the_key_and_only_it() {
    let pair = Pair::start().await.unwrap();
    pair.fill("user:123:profile").await.unwrap();
    pair.fill("user:124:profile").await.unwrap();
    pair.enqueue(&["user:123:profile"]).await.unwrap();
    pair.until_none("user:123:profile").await;
    assert!(pair.is_cached("user:124:profile").await.unwrap());
    pair.until_outbox_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rolled_back_event_is_never_published() {
    let pair = Pair::start().await.unwrap();
    pair.fill("user:1").await.unwrap();
    pair.fill("user:2").await.unwrap();
    let mut tx = pair.pool.begin().await.unwrap();
    let _ = outbox::enqueue(&mut tx, &Event::delete(["user:1"]).unwrap()).await.unwrap();
    tx.rollback().await.unwrap();
    // An event behind it shows that the pair has been past it.
    pair.enqueue(&["user:2"]).await.unwrap();
    pair.until_none("user:2").await;
    assert!(pair.is_cached("user:1").await.unwrap());
}
