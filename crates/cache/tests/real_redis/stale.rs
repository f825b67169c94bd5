//! Stale values for readers who ask for them, while one caller loads the new one.

use std::time::Duration;

use cache::{CacheConfig, Json, MAX_STALE, Options};
use tokio::sync::Notify;

use crate::reader::{Loads, find, waits};
use crate::support::{Bed, MINUTE, deleted, key, mark, updated, work};

const LENIENT: Options = Options {
    ttl: MINUTE,
    negative_ttl: MINUTE,
    stale_for: Some(Duration::from_secs(30)),
    strict: false,
    codec: Json,
};

impl Bed {
    async fn read(&self, options: &Options, loads: &Loads, value: u32) -> u32 {
        let config = CacheConfig { wait: Duration::from_millis(5), ..CacheConfig::default() };
        let cache = cache::Cache::new(self.redis.clone(), config);
        let Ok(read) = cache.get_or_load_with("n", options, || loads.find(value)).await;
        read
    }
}

#[tokio::test]
async fn while_one_reader_loads_the_others_get_the_old_value_if_they_accept_it() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    assert_eq!(bed.read(&LENIENT, &loads, 1).await, 1);
    bed.delete(&key("n"), 1).await;
    let lease = bed.grant(&key("n")).await;
    assert_eq!(bed.read(&LENIENT, &loads, 2).await, 1);
    assert_eq!(loads.count(), 1);
    assert!(bed.fill(&key("n"), &lease, "2").await);
    assert_eq!(bed.read(&LENIENT, &loads, 3).await, 2);
}

#[tokio::test]
async fn the_first_reader_after_a_delete_loads_the_new_value() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    bed.read(&LENIENT, &loads, 1).await;
    bed.delete(&key("n"), 1).await;
    assert_eq!(bed.read(&LENIENT, &loads, 2).await, 2);
}

#[tokio::test]
async fn strict_readers_and_readers_who_did_not_ask_never_get_a_stale_value() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    bed.read(&LENIENT, &loads, 1).await;
    bed.delete(&key("n"), 1).await;
    bed.grant(&key("n")).await;
    assert_eq!(bed.read(&Options { strict: true, ..LENIENT }, &loads, 2).await, 2);
    assert_eq!(bed.read(&Options { stale_for: None, ..LENIENT }, &loads, 2).await, 2);
}

#[tokio::test]
async fn a_mark_cuts_the_time_of_the_stale_copy_as_a_delete_does() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    bed.read(&Options { ttl: 60 * MINUTE, ..LENIENT }, &loads, 1).await;
    bed.redis.mark(&[key("n")], mark(7)).await.unwrap();
    bed.redis.unmark(&[key("n")], mark(7)).await.unwrap();
    let left: u128 = bed.raw(&["PTTL", "\u{1f}s{n}"]).await.parse().unwrap();
    assert!(0 < left && left <= MAX_STALE.as_millis(), "{left} ms");
}

#[tokio::test]
async fn under_a_mark_nobody_gets_a_stale_value() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    bed.read(&LENIENT, &loads, 1).await;
    let (cache, loading, go) = (bed.cache(), Notify::new(), Notify::new());
    bed.redis.mark(&[key("n")], mark(7)).await.unwrap();
    let first = cache.get_or_load_with("n", &LENIENT, async || {
        loading.notify_one();
        go.notified().await;
        find(2).await
    });
    // It comes while the first loads, which is when a stale value would be served.
    let second = async {
        loading.notified().await;
        let read = cache.get_or_load_with("n", &LENIENT, || find(3));
        let mut read = std::pin::pin!(read);
        assert!(waits(read.as_mut()).await);
        go.notify_one();
        read.await
    };
    let (first, second) = tokio::join!(first, second);
    assert_eq!((first, second), (Ok(2), Ok(3)));
}

#[tokio::test]
async fn a_delete_starts_the_clock_of_the_stale_copy_and_an_update_does_too() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let longest_ms = u64::try_from(MAX_STALE.as_millis()).unwrap();
    let remaining_ms = async || bed.raw(&["PTTL", "\u{1f}s{n}"]).await.parse::<u64>().unwrap();
    let day = Options { ttl: 60 * 24 * MINUTE, ..LENIENT };
    for event in [deleted(&[&key("n")], &[1]), updated(&key("n"), "9", 9, 1)] {
        bed.redis.flush_all_keys().await.unwrap();
        bed.read(&day, &loads, 1).await;
        assert!(remaining_ms().await > longest_ms);
        bed.redis.apply(&work([event])).await.unwrap();
        assert!((1..=longest_ms).contains(&remaining_ms().await));
        // A later invalidation does not start it again.
        bed.raw(&["PEXPIRE", "\u{1f}s{n}", "9000"]).await;
        bed.redis.apply(&work([deleted(&[&key("n"), &key("without")], &[2])])).await.unwrap();
        assert!((1..=9_000).contains(&remaining_ms().await));
        assert!(!bed.exists("\u{1f}s{without}").await);
    }
}

#[tokio::test]
async fn a_copy_that_is_older_than_the_reader_accepts_is_not_served() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    bed.read(&LENIENT, &loads, 1).await;
    bed.delete(&key("n"), 1).await;
    bed.grant(&key("n")).await;
    // As it looks 31 seconds after the delete.
    bed.raw(&["PEXPIRE", "\u{1f}s{n}", "29000"]).await;
    assert_eq!(bed.read(&LENIENT, &loads, 2).await, 2);
    bed.raw(&["PEXPIRE", "\u{1f}s{n}", "31000"]).await;
    assert_eq!(bed.read(&LENIENT, &loads, 3).await, 1);
}

#[tokio::test]
async fn without_stale_readers_there_are_no_copies_and_deletes_do_not_look_for_them() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    bed.read(&Options { stale_for: None, ..LENIENT }, &loads, 1).await;
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "n");
    bed.delete(&key("n"), 1).await;
    assert!(!bed.raw(&["INFO", "commandstats"]).await.contains("cmdstat_pexpire"));
}

#[tokio::test]
async fn a_flush_removes_stale_copies_too() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    bed.read(&LENIENT, &loads, 1).await;
    bed.redis.delete_matching(&["n".to_owned()]).await.unwrap();
    assert!(!bed.exists("\u{1f}s{n}").await);
}
