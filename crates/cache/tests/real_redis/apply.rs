//! Batches of events.

use cache::{Applied, Work};
use event::CacheKey;

use crate::support::{Bed, deleted, key, updated, work};

#[tokio::test]
async fn a_batch_removes_every_key_it_names_and_nothing_else() {
    let bed = Bed::new().await;
    let keys: Vec<CacheKey> = ["a", "b:c", "{t}:d", "e}f", "{}g", "h{", "профиль:7"].map(key).into();
    for name in keys.iter().map(CacheKey::as_str).chain(["a:other", "{a}"]) {
        bed.raw(&["SET", name, "v"]).await;
    }
    let events = keys.iter().map(|key| deleted(&[key], &[1]));
    assert_eq!(bed.redis.apply(&work(events)).await.unwrap().deleted, 7);
    let mut left: Vec<String> = bed.raw(&["KEYS", "*"]).await.lines().map(str::to_owned).collect();
    left.sort();
    assert_eq!(left, ["a:other", "{a}"]);
}

#[tokio::test]
async fn applying_a_batch_again_does_no_harm() {
    let bed = Bed::new().await;
    let key = key("k");
    bed.raw(&["SET", "k", "v"]).await;
    assert_eq!(bed.delete(&key, 1).await, Applied { deleted: 1, ..Applied::default() });
    assert_eq!(bed.delete(&key, 1).await, Applied::default());
}

#[tokio::test]
async fn an_empty_batch_is_no_request() {
    let bed = Bed::new().await;
    bed.server.terminate().await.unwrap();
    assert_eq!(bed.redis.apply(&Work::new()).await.unwrap(), Applied::default());
}

#[tokio::test]
async fn a_batch_of_thousands_of_keys_is_applied_whole() {
    let bed = Bed::new().await;
    let keys: Vec<CacheKey> = (0..5_000).map(|n| key(&format!("user:{n}"))).collect();
    let mut set = vec!["MSET"];
    set.extend(keys.iter().flat_map(|key| [key.as_str(), "v"]));
    bed.raw(&set).await;
    let events = keys.iter().map(|key| deleted(&[key], &[1]));
    assert_eq!(bed.redis.apply(&work(events)).await.unwrap().deleted, 5_000);
    assert_eq!(bed.raw(&["DBSIZE"]).await, "0");
}

#[tokio::test]
async fn deletes_and_updates_share_a_batch() {
    let bed = Bed::new().await;
    let (gone, old, new) = (key("gone"), key("old"), key("new"));
    for (name, version) in [("old", "V1"), ("new", "V9")] {
        bed.raw(&["SET", name, "cached"]).await;
        bed.raw(&["SET", &format!("\u{1f}g{{{name}}}"), version]).await;
    }
    bed.raw(&["SET", "gone", "v"]).await;
    let events = [deleted(&[&gone], &[1]), updated(&old, "two", 2, 1), updated(&new, "two", 2, 1)];
    let applied = bed.redis.apply(&work(events)).await.unwrap();
    assert_eq!(applied, Applied { deleted: 1, updated: 1, ignored: 1, unmarked: 0 });
    assert_eq!(bed.raw(&["MGET", "gone", "old", "new"]).await, "\ntwo\ncached");
}

#[tokio::test]
async fn a_position_is_kept_byte_for_byte_per_durable() {
    let bed = Bed::new().await;
    assert_eq!(bed.redis.load_position("redis").await.unwrap(), None);
    let record = [0, 0xff, b'{', b'\n'];
    bed.redis.store_position("redis", &record).await.unwrap();
    bed.redis.store_position("other {durable}", b"elsewhere").await.unwrap();
    assert_eq!(bed.redis.load_position("redis").await.unwrap().unwrap(), record);
    assert_eq!(bed.raw(&["PTTL", "\u{1f}position:redis"]).await, "-1");
}
