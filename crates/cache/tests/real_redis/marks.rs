//! Marks: what makes strict writes strict.

use std::time::Duration;

use cache::{Acquired, LeaseToken};
use devstack::eventually;
use event::CacheKey;

use crate::support::{Bed, MINUTE, SOON, deleted, key, work};

#[tokio::test]
async fn while_a_key_is_marked_no_value_can_appear() {
    let bed = Bed::new().await;
    let key = key("k");
    let early = bed.grant(&key).await;
    bed.redis.mark(std::slice::from_ref(&key), 7).await.unwrap();
    assert!(!bed.fill(&key, &early, "old").await);
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Bypass);
    assert!(!bed.exists("k").await);
}

#[tokio::test]
async fn a_load_that_straddles_mark_and_unmark_is_not_stored() {
    let bed = Bed::new().await;
    let key = key("k");
    let straddling = bed.grant(&key).await;
    bed.redis.mark(std::slice::from_ref(&key), 7).await.unwrap();
    assert_eq!(bed.redis.unmark(std::slice::from_ref(&key), 7).await.unwrap(), 1);
    assert!(!bed.fill(&key, &straddling, "old").await);
    let fresh = bed.grant(&key).await;
    assert!(bed.fill(&key, &fresh, "new").await);
}

#[tokio::test]
async fn marking_removes_the_value_and_unmarking_removes_what_came_in_between() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.raw(&["SET", "k", "v"]).await;
    bed.redis.mark(std::slice::from_ref(&key), 7).await.unwrap();
    assert!(!bed.exists("k").await);
    // By a client that does not keep to the protocol.
    bed.raw(&["SET", "k", "v"]).await;
    bed.redis.unmark(std::slice::from_ref(&key), 7).await.unwrap();
    assert!(!bed.exists("k").await);
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
}

#[tokio::test]
async fn marks_and_their_registry_have_no_time_to_live() {
    let bed = Bed::new().await;
    bed.redis.mark(&[key("k")], 7).await.unwrap();
    assert_eq!(bed.raw(&["PTTL", "\u{1f}m{k}"]).await, "-1");
    assert_eq!(bed.raw(&["PTTL", "\u{1f}marks"]).await, "-1");
}

#[tokio::test]
async fn each_transaction_removes_only_its_own_mark() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.redis.mark(std::slice::from_ref(&key), 7).await.unwrap();
    bed.redis.mark(std::slice::from_ref(&key), 8).await.unwrap();
    bed.redis.unmark(std::slice::from_ref(&key), 7).await.unwrap();
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Bypass);
    bed.redis.unmark(std::slice::from_ref(&key), 8).await.unwrap();
    bed.grant(&key).await;
}

#[tokio::test]
async fn the_event_of_another_transaction_does_not_remove_a_mark() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.redis.mark(std::slice::from_ref(&key), 7).await.unwrap();
    assert_eq!(bed.delete(&key, 6).await.unmarked, 0);
    bed.redis.invalidate(std::slice::from_ref(&key)).await.unwrap();
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Bypass);
}

#[tokio::test]
async fn the_event_of_a_transaction_removes_the_marks_that_its_dead_writer_left() {
    let bed = Bed::new().await;
    let keys = [key("a"), key("b"), key("{t}:c"), key("d}")];
    bed.redis.mark(&keys, 7).await.unwrap();
    let named: Vec<&CacheKey> = keys.iter().collect();
    let applied = bed.redis.apply(&work([deleted(&named, &[6, 7])])).await.unwrap();
    assert_eq!(applied.unmarked, 4);
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
}

#[tokio::test]
async fn an_event_removes_its_mark_however_many_others_there_are() {
    let bed = Bed::new().await;
    let others: Vec<CacheKey> = (0..1_500).map(|n| key(&format!("other:{n}"))).collect();
    bed.redis.mark(&others, 6).await.unwrap();
    let key = key("zzz");
    bed.redis.mark(std::slice::from_ref(&key), 7).await.unwrap();
    assert_eq!(bed.delete(&key, 7).await.unmarked, 1);
    bed.grant(&key).await;
    assert_eq!(bed.raw(&["ZCARD", "\u{1f}marks"]).await, "1500");
}

#[tokio::test]
async fn forgotten_marks_are_listed_when_they_are_old_enough_and_resolving_removes_them() {
    let bed = Bed::new().await;
    let keys = [key("a"), key("{t}:b:c")];
    bed.redis.mark(&keys, u64::MAX).await.unwrap();
    assert_eq!(bed.redis.orphan_marks(MINUTE).await.unwrap(), []);
    let orphans = eventually(SOON, async || {
        let orphans = bed.redis.orphan_marks(Duration::from_millis(1)).await.unwrap();
        (orphans.len() == 2).then_some(orphans)
    })
    .await;
    for (key, xid) in &orphans {
        assert!(keys.contains(key));
        assert_eq!(*xid, u64::MAX);
        bed.raw(&["SET", key.as_str(), "whatever"]).await;
        bed.redis.resolve(key, *xid).await.unwrap();
    }
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
}

#[tokio::test]
async fn marking_twice_keeps_the_first_time_so_that_a_forgotten_mark_grows_old() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.redis.mark(std::slice::from_ref(&key), 7).await.unwrap();
    let first = bed.raw(&["ZSCORE", "\u{1f}marks", "7:k"]).await;
    eventually(SOON, async || !bed.redis.orphan_marks(Duration::from_millis(5)).await.unwrap().is_empty())
        .await;
    bed.redis.mark(std::slice::from_ref(&key), 7).await.unwrap();
    assert_eq!(bed.raw(&["ZSCORE", "\u{1f}marks", "7:k"]).await, first);
}

#[tokio::test]
async fn a_mark_that_redis_did_not_answer_is_an_error() {
    let bed = Bed::new().await;
    bed.server.terminate().await.unwrap();
    let error = bed.redis.mark(&[key("k")], 7).await.unwrap_err();
    assert!(error.is_retryable());
}
