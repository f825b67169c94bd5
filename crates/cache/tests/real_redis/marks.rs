//! Marks: what makes strict writes strict.

use std::time::Duration;

use cache::{Acquired, LeaseToken, Mark};
use devstack::eventually;
use event::{CacheKey, TransactionId};

use crate::support::{Bed, MINUTE, SOON, deleted, history, key, mark, orphans, work};

#[tokio::test]
async fn while_a_key_is_marked_no_value_can_appear() {
    let bed = Bed::new().await;
    let key = key("k");
    let early = bed.grant(&key).await;
    bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    assert!(!bed.fill(&key, &early, "old").await);
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Bypass);
    assert!(!bed.exists("k").await);
}

#[tokio::test]
async fn a_load_that_straddles_mark_and_unmark_is_not_stored() {
    let bed = Bed::new().await;
    let key = key("k");
    let straddling = bed.grant(&key).await;
    bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    assert_eq!(bed.redis.unmark(std::slice::from_ref(&key), mark(7)).await.unwrap(), 1);
    assert!(!bed.fill(&key, &straddling, "old").await);
    let fresh = bed.grant(&key).await;
    assert!(bed.fill(&key, &fresh, "new").await);
}

#[tokio::test]
async fn marking_removes_the_value_and_unmarking_removes_what_came_in_between() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.raw(&["SET", "k", "v"]).await;
    bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    assert!(!bed.exists("k").await);
    // By a client that does not keep to the protocol.
    bed.raw(&["SET", "k", "v"]).await;
    bed.redis.unmark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    assert!(!bed.exists("k").await);
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
}

#[tokio::test]
async fn marks_and_their_registry_have_no_time_to_live() {
    let bed = Bed::new().await;
    bed.redis.mark(&[key("k")], mark(7)).await.unwrap();
    assert_eq!(bed.raw(&["PTTL", "\u{1f}m{k}"]).await, "-1");
    assert_eq!(bed.raw(&["PTTL", "\u{1f}marks"]).await, "-1");
}

#[tokio::test]
async fn each_transaction_removes_only_its_own_mark() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    bed.redis.mark(std::slice::from_ref(&key), mark(8)).await.unwrap();
    bed.redis.unmark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Bypass);
    bed.redis.unmark(std::slice::from_ref(&key), mark(8)).await.unwrap();
    bed.grant(&key).await;
}

#[tokio::test]
async fn the_event_of_another_transaction_does_not_remove_a_mark() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    assert_eq!(bed.delete(&key, 6).await.unmarked, 0);
    bed.redis.invalidate(std::slice::from_ref(&key)).await.unwrap();
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Bypass);
}

#[tokio::test]
async fn the_event_of_a_transaction_removes_the_marks_that_its_dead_writer_left() {
    let bed = Bed::new().await;
    let keys = [key("a"), key("b"), key("{t}:c"), key("d}")];
    bed.redis.mark(&keys, mark(7)).await.unwrap();
    let named: Vec<&CacheKey> = keys.iter().collect();
    let applied = bed.redis.apply(&work([deleted(&named, &[6, 7])])).await.unwrap();
    assert_eq!(applied.unmarked, 4);
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
}

#[tokio::test]
async fn an_event_removes_its_mark_however_many_others_there_are() {
    let bed = Bed::new().await;
    let others: Vec<CacheKey> = (0..1_500).map(|n| key(&format!("other:{n}"))).collect();
    bed.redis.mark(&others, mark(6)).await.unwrap();
    let key = key("zzz");
    bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    assert_eq!(bed.delete(&key, 7).await.unmarked, 1);
    bed.grant(&key).await;
    assert_eq!(bed.raw(&["ZCARD", "\u{1f}marks"]).await, "1500");
}

#[tokio::test]
async fn forgotten_marks_are_listed_when_they_are_old_enough_and_resolving_removes_them() {
    let bed = Bed::new().await;
    let keys = [key("a"), key("{t}:b:c")];
    bed.redis.mark(&keys, mark(u64::MAX)).await.unwrap();
    assert_eq!(orphans(&bed.redis, MINUTE).await, []);
    let orphans = eventually(SOON, async || {
        let orphans = orphans(&bed.redis, Duration::from_millis(1)).await;
        (orphans.len() == 2).then_some(orphans)
    })
    .await;
    for (key, xid) in &orphans {
        assert!(keys.contains(key));
        assert_eq!(*xid, u64::MAX);
        bed.raw(&["SET", key.as_str(), "whatever"]).await;
        bed.redis.resolve(&[(key.clone(), mark(*xid))]).await.unwrap();
    }
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
}

#[tokio::test]
async fn marking_twice_keeps_the_first_time_so_that_a_forgotten_mark_grows_old() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    let first = bed.raw(&["ZSCORE", "\u{1f}marks", "7:k"]).await;
    eventually(SOON, async || !orphans(&bed.redis, Duration::from_millis(5)).await.is_empty()).await;
    bed.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
    assert_eq!(bed.raw(&["ZSCORE", "\u{1f}marks", "7:k"]).await, first);
}

#[tokio::test]
async fn a_mark_that_redis_did_not_answer_is_an_error() {
    let bed = Bed::new().await;
    bed.server.terminate().await.unwrap();
    let error = bed.redis.mark(&[key("k")], mark(7)).await.unwrap_err();
    assert!(error.is_retryable());
}

#[tokio::test]
async fn a_late_unmark_leaves_the_mark_of_a_later_transaction_with_the_same_id() {
    let bed = Bed::new().await;
    let key = key("k");
    let keys = std::slice::from_ref(&key);
    let transaction = TransactionId { history: Some(history()), xid: 732 };
    let [first, second] = [Mark::generate(transaction), Mark::generate(transaction)];
    bed.redis.mark(keys, second).await.unwrap();
    assert_eq!(bed.redis.unmark(keys, first).await.unwrap(), 0);
    bed.redis.resolve(&[(key.clone(), first)]).await.unwrap();
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Bypass);
    assert_eq!(bed.redis.unmark(keys, second).await.unwrap(), 1);
    bed.grant(&key).await;
}

/// Marks of transaction 7 of several histories, beside so many others.
async fn marks_removed_by_an_event(others: usize, of: Option<&str>) -> Vec<&'static str> {
    let bed = Bed::new().await;
    let key = key("zzz");
    let others: Vec<CacheKey> = (0..others).map(|n| CacheKey::new(format!("other:{n}")).unwrap()).collect();
    if !others.is_empty() {
        bed.redis.mark(&others, mark(6)).await.unwrap();
    }
    let all = [
        "d0000000001.1:7:00000000000000aa",
        "d0000000001.2:7:00000000000000bb",
        "d0000000001.3:7:00000000000000cc",
    ];
    let all = [&all[..], &["d0000000002.2:7:00000000000000dd", "7"]].concat();
    for text in &all {
        bed.redis.mark(std::slice::from_ref(&key), Mark::parse(text).unwrap()).await.unwrap();
    }
    let history = of.map(|history| history.parse().unwrap());
    let event = event::CommittedEvent { history, ..deleted(&[&key], &[5, 7]) };
    bed.redis.apply(&work([event])).await.unwrap();
    let left = bed.raw(&["SMEMBERS", "\u{1f}m{zzz}"]).await;
    let registered = bed.raw(&["ZRANGE", "\u{1f}marks", "0", "-1"]).await;
    for text in &all {
        let is_left = left.lines().any(|line| line == *text);
        let is_registered = registered.lines().any(|line| line == format!("{text}:zzz"));
        assert_eq!(is_left, is_registered, "{text}");
    }
    all.into_iter().filter(|text| !left.lines().any(|line| line == *text)).collect()
}

#[tokio::test]
async fn an_event_removes_marks_of_its_own_transaction_in_its_own_history_only() {
    for others in [0, 1_500] {
        let [past, own, _, _, unnamed] = [
            "d0000000001.1:7:00000000000000aa",
            "d0000000001.2:7:00000000000000bb",
            "d0000000001.3:7:00000000000000cc",
            "d0000000002.2:7:00000000000000dd",
            "7",
        ];
        let removed = marks_removed_by_an_event(others, Some("d0000000001.2")).await;
        assert_eq!(removed, [past, own, unnamed], "beside {others}");
        // An event of an older relay knows no history, and knows only marks that name none.
        assert_eq!(marks_removed_by_an_event(others, None).await, [unnamed], "beside {others}");
    }
}

#[tokio::test]
async fn every_old_mark_is_found_however_many_there_are() {
    let bed = Bed::new().await;
    let keys: Vec<CacheKey> = (0..2_500).map(|n| CacheKey::new(format!("k:{n}")).unwrap()).collect();
    bed.redis.mark(&keys, mark(7)).await.unwrap();
    bed.redis.mark(&[key("orphan")], mark(8)).await.unwrap();
    eventually(SOON, async || {
        let orphans = orphans(&bed.redis, Duration::from_millis(1)).await;
        orphans.len() == 2_501 && orphans.contains(&(key("orphan"), 8))
    })
    .await;
}

#[tokio::test]
async fn a_mark_with_a_time_from_the_future_is_old() {
    let bed = Bed::new().await;
    bed.redis.mark(&[key("k")], mark(7)).await.unwrap();
    let member = format!("{}:k", mark(7));
    bed.raw(&["ZADD", "\u{1f}marks", "9999999999999", &member]).await;
    assert_eq!(orphans(&bed.redis, MINUTE).await, [(key("k"), 7)]);
}
