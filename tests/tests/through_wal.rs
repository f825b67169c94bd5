//! `outbox::through_wal()`, a switch of the whole process and therefore in a process of its own.
#![expect(clippy::unwrap_used, reason = "a failure in a test is a panic")]

use std::time::Duration;

use cache::{Acquired, Fill, LeaseToken, Redis};
use devstack::eventually;
use outbox::{CacheKey, Event, Writer};
use tests::{Pair, PairOptions, SETTLED};

const SCHEMA: &str = "create table users (id bigint primary key, name text)";
const RULES: &str = "[[table]]\nname = 'users'\nkeys = ['user:{id}']\non_truncate = ['user:']\n";

fn delete(key: &str) -> Event {
    Event::delete([key]).unwrap()
}

async fn enqueue_three(pair: &Pair, [one, two, all]: [&str; 3], commit: bool) {
    let mut tx = pair.pool.begin().await.unwrap();
    let _ = outbox::enqueue(&mut tx, &delete(one)).await.unwrap();
    let update = Event::update(two, "new", 7, Duration::from_secs(60)).unwrap();
    let namespaces = Event::delete_namespaces([all]).unwrap();
    let receipts = outbox::enqueue_all(&mut tx, &[update.clone(), namespaces]).await.unwrap();
    assert_eq!(receipts[0].event_id, update.id());
    if commit {
        tx.commit().await.unwrap();
    } else {
        tx.rollback().await.unwrap();
    }
}

/// Caches a value that an update of a later version replaces.
async fn fill_version(cache: &Redis, key: &str, version: i64) {
    let key = CacheKey::new(key).unwrap();
    let Acquired::Grant(lease) = cache.acquire(&key, LeaseToken::generate(), SETTLED, false).await.unwrap()
    else {
        panic!("nobody else fills it");
    };
    let fill = Fill { value: b"cached", ttl: SETTLED, version: Some(version), keep_stale_copy: false };
    assert!(cache.fill(&key, &lease, fill).await.unwrap());
}

async fn value(pair: &Pair, key: &str) -> String {
    pair.stack.redis.command(&["GET", key]).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_switch_no_event_leaves_a_row_and_all_arrive_through_the_log() {
    let relay = vec![("RELAY_SOURCE", "wal".to_owned())];
    let options = PairOptions { schema: SCHEMA, rules: RULES, relay, ..Default::default() };
    let pair = Pair::start_with(options).await.unwrap();
    // Before it: a row, which nobody claims here.
    pair.enqueue(&["cart:0"]).await.unwrap();
    assert_eq!(pair.backlog().await.unwrap(), 1);

    outbox::through_wal();
    let cache = pair.cache().unwrap();
    fill_version(&cache, "cart:2", 6).await;
    for key in ["cart:1", "page:1", "page:2", "void:1", "void:2", "void:page:1", "strict:1", "inline:1"] {
        pair.fill(key).await.unwrap();
    }
    enqueue_three(&pair, ["void:1", "void:2", "void:page:"], false).await;
    enqueue_three(&pair, ["cart:1", "cart:2", "page:"], true).await;
    pair.until_none("cart:1").await;
    pair.until_none("page:*").await;
    eventually(SETTLED, async || match value(&pair, "cart:2").await.as_str() {
        "new" => Ok(()),
        other => Err(format!("cart:2 is {other:?}")),
    })
    .await;

    let writer = Writer::new(cache.clone());
    let committed =
        writer.commit_strict(pair.pool.begin().await.unwrap(), &[delete("strict:1")]).await.unwrap();
    assert!(committed.finished && committed.receipts[0].xid.0 > 0);
    assert!(!pair.is_cached("strict:1").await.unwrap());
    let _ =
        writer.commit_and_invalidate(pair.pool.begin().await.unwrap(), &[delete("inline:1")]).await.unwrap();
    assert!(!pair.is_cached("inline:1").await.unwrap());

    // A writer that dies after its commit: the event alone removes the mark.
    let mut tx = pair.pool.begin().await.unwrap();
    let events = [delete("strict:2")];
    outbox::enqueue_all(&mut tx, &events).await.unwrap();
    let transaction = outbox::transaction_id(&mut tx).await.unwrap();
    let marks = outbox::Marks::new(cache.clone(), &events, transaction);
    marks.set(SETTLED).await.unwrap();
    tx.commit().await.unwrap();
    let key = CacheKey::new("strict:2").unwrap();
    eventually(SETTLED, async || {
        let acquired = cache.acquire(&key, LeaseToken::generate(), SETTLED, false).await.unwrap();
        if matches!(acquired, Acquired::Grant(_)) { Ok(()) } else { Err(format!("{acquired:?}")) }
    })
    .await;

    // Everything that committed has arrived by now, and nothing else.
    for key in ["void:1", "void:2", "void:page:1"] {
        assert_eq!(value(&pair, key).await, "cached", "{key} was rolled back");
    }
    assert_eq!(pair.backlog().await.unwrap(), 1, "the row from before");
    assert_eq!(pair.dead_letters().await.unwrap(), 0);
}
