//! Leases: what makes a late fill harmless.

use std::time::Duration;

use cache::{Acquired, LeaseToken};
use devstack::eventually;

use crate::support::{Bed, MINUTE, SOON, granted, key, mark, plain};

#[tokio::test]
async fn a_fill_under_the_lease_stores_exactly_the_users_bytes_at_exactly_the_users_key() {
    let bed = Bed::new().await;
    let key = key("user:123:profile");
    let lease = bed.grant(&key).await;
    assert!(bed.fill(&key, &lease, "{\"name\":\"Ada\"}").await);
    assert_eq!(bed.raw(&["GET", "user:123:profile"]).await, "{\"name\":\"Ada\"}");
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "user:123:profile");
    let ttl_ms: u64 = bed.raw(&["PTTL", "user:123:profile"]).await.parse().unwrap();
    assert!((1..=60_000).contains(&ttl_ms));
}

#[tokio::test]
async fn a_late_fill_is_refused_after_a_delete() {
    let bed = Bed::new().await;
    let key = key("k");
    let lease = bed.grant(&key).await;
    bed.delete(&key, 1).await;
    assert!(!bed.fill(&key, &lease, "old").await);
    assert!(!bed.exists("k").await);
}

#[tokio::test]
async fn a_late_fill_is_refused_after_a_delete_even_if_another_reader_has_a_new_lease() {
    let bed = Bed::new().await;
    let key = key("k");
    let late = bed.grant(&key).await;
    bed.delete(&key, 1).await;
    let fresh = bed.grant(&key).await;
    assert!(!bed.fill(&key, &late, "old").await);
    assert!(bed.fill(&key, &fresh, "new").await);
    assert!(!bed.fill(&key, &late, "old").await);
    assert_eq!(bed.raw(&["GET", "k"]).await, "new");
}

#[tokio::test]
async fn a_fill_is_refused_after_the_lease_was_evicted() {
    let bed = Bed::new().await;
    let key = key("k");
    let lease = bed.grant(&key).await;
    assert_eq!(bed.raw(&["DEL", "\u{1f}g{k}"]).await, "1");
    assert!(!bed.fill(&key, &lease, "old").await);
    assert!(!bed.exists("k").await);
}

#[tokio::test]
async fn a_fill_is_refused_after_the_lease_has_expired() {
    let bed = Bed::new().await;
    let key = key("k");
    let (token, shortest) = (LeaseToken::generate(), Duration::from_millis(1));
    let lease = granted(bed.redis.acquire(&key, token, shortest, false).await.unwrap());
    eventually(SOON, async || !bed.exists("\u{1f}g{k}").await).await;
    assert!(!bed.fill(&key, &lease, "old").await);
}

#[tokio::test]
async fn only_one_reader_holds_the_lease_and_the_others_are_told_to_wait() {
    let bed = Bed::new().await;
    let key = key("k");
    let lease = bed.grant(&key).await;
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Wait);
    assert!(bed.fill(&key, &lease, "v").await);
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Value(b"v".to_vec()));
}

#[tokio::test]
async fn a_reader_whose_answer_was_lost_is_granted_its_own_lease_again() {
    let bed = Bed::new().await;
    let key = key("k");
    let token = LeaseToken::generate();
    let lost = bed.acquire(&key, token).await;
    let lease = granted(bed.acquire(&key, token).await);
    assert_eq!(lost, Acquired::Grant(lease.clone()));
    assert!(bed.fill(&key, &lease, "v").await);
}

#[tokio::test]
async fn a_copy_of_a_request_for_a_lease_that_arrives_after_the_delete_does_not_let_the_old_fill_in() {
    let bed = Bed::new().await;
    let (deleted, marked) = (key("deleted"), key("marked"));
    for key in [&deleted, &marked] {
        let token = LeaseToken::generate();
        let lease = granted(bed.acquire(key, token).await);
        if key == &deleted {
            bed.delete(key, 1).await;
        } else {
            bed.redis.mark(std::slice::from_ref(key), mark(7)).await.unwrap();
            bed.redis.unmark(std::slice::from_ref(key), mark(7)).await.unwrap();
        }
        let nobodys = granted(bed.acquire(key, token).await);
        assert!(!bed.fill(key, &lease, "old").await, "{key}");
        assert!(!bed.exists(key.as_str()).await, "{key}");
        assert_ne!(lease, nobodys);
    }
}

#[tokio::test]
async fn a_released_lease_goes_to_the_next_reader_and_a_strangers_release_changes_nothing() {
    let bed = Bed::new().await;
    let key = key("k");
    let token = LeaseToken::generate();
    granted(bed.acquire(&key, token).await);
    bed.redis.release(&key, LeaseToken::generate()).await.unwrap();
    assert_eq!(bed.acquire(&key, LeaseToken::generate()).await, Acquired::Wait);
    bed.redis.release(&key, token).await.unwrap();
    bed.grant(&key).await;
}

#[tokio::test]
async fn every_guard_has_a_time_to_live() {
    let bed = Bed::new().await;
    let key = key("k");
    let ttl_ms = async || bed.raw(&["PTTL", "\u{1f}g{k}"]).await.parse::<i64>().unwrap();
    let lease = bed.grant(&key).await;
    assert!(ttl_ms().await > 0);
    let fill = cache::Fill { version: Some(7), ..plain("v") };
    assert!(bed.redis.fill(&key, &lease, fill).await.unwrap());
    assert!((1..=60_000).contains(&ttl_ms().await));
}

#[tokio::test]
async fn values_and_guards_of_the_wrong_type_count_as_absent_and_are_replaced() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.raw(&["HSET", "k", "field", "value"]).await;
    bed.raw(&["RPUSH", "\u{1f}g{k}", "element"]).await;
    let lease = bed.grant(&key).await;
    assert!(bed.fill(&key, &lease, "v").await);
    assert_eq!(bed.raw(&["GET", "k"]).await, "v");
}

#[tokio::test]
async fn a_value_that_the_reader_cannot_use_does_not_keep_it_from_the_lease() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.raw(&["SET", "k", "from another schema"]).await;
    let token = LeaseToken::generate();
    let lease = granted(bed.redis.acquire(&key, token, MINUTE, true).await.unwrap());
    assert!(bed.fill(&key, &lease, "v").await);
    assert_eq!(bed.raw(&["GET", "k"]).await, "v");
}
