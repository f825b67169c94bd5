//! Every future can be spawned, which the compiler decides only where it is done.

use std::collections::HashMap;
use std::time::Duration;

use cache::{Cache, LeaseToken, Redis, Work};

use crate::reader::find;
use crate::support::{Bed, MINUTE, granted, key, mark, orphans, plain};

async fn requests(redis: &Redis) {
    let keys = vec![key("a"), key("b")];
    let work = Work::new();
    redis.ping().await.unwrap();
    redis.apply(&work).await.unwrap();
    redis.invalidate(&keys).await.unwrap();
    redis.mark(&keys, mark(7)).await.unwrap();
    redis.unmark(&keys, mark(7)).await.unwrap();
    redis.resolve(&[(keys[0].clone(), mark(7))]).await.unwrap();
    orphans(redis, Duration::ZERO).await;
    redis.delete_matching(&["*".to_owned()]).await.unwrap();
    redis.flush_all_keys().await.unwrap();
    redis.store_position("redis", b"record").await.unwrap();
    redis.load_position("redis").await.unwrap();
    redis.instances().await.unwrap();
    redis.eviction_policy().await.unwrap();
    redis.longest_snapshot_interval().await.unwrap();
    let token = LeaseToken::generate();
    let lease = granted(redis.acquire(&keys[0], token, MINUTE, false).await.unwrap());
    redis.fill(&keys[0], &lease, plain("1")).await.unwrap();
    redis.release(&keys[0], token).await.unwrap();
}

async fn reads(cache: &Cache) {
    cache.get_or_load("a", MINUTE, || find(1)).await.unwrap();
    let load = |missing: Vec<&String>| {
        let rows: HashMap<String, i32> = missing.into_iter().map(|key| (key.clone(), 1)).collect();
        find(rows)
    };
    cache.get_many(&["a".to_owned(), "b".to_owned()], MINUTE, load).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_can_be_made_from_a_task_of_its_own() {
    let bed = Bed::new().await;
    let (redis, cache) = (bed.redis.clone(), bed.cache());
    tokio::spawn(async move { requests(&redis).await }).await.unwrap();
    tokio::spawn(async move { reads(&cache).await }).await.unwrap();
}
