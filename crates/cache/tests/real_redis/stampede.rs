//! Many readers of one key at once.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cache::{Cache, CacheConfig};
use devstack::eventually;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::reader::{Loads, find, waits};
use crate::support::{Bed, MINUTE, SOON, connect, key};

const READERS: usize = 500;

/// A row that a load takes a while to read; what a load returns is what was there when it began.
#[derive(Default)]
struct SlowRow {
    version: AtomicUsize,
    loads: AtomicUsize,
    go: Notify,
}

impl SlowRow {
    async fn load(&self) -> Result<usize, Infallible> {
        let version = self.version.load(Ordering::SeqCst);
        self.loads.fetch_add(1, Ordering::SeqCst);
        self.go.notified().await;
        Ok(version)
    }

    fn loads(&self) -> usize {
        self.loads.load(Ordering::SeqCst)
    }

    async fn wait_for_loads(&self, count: usize) {
        eventually(SOON, async || self.loads() == count).await;
    }
}

fn spawn_readers(cache: &Cache, row: &Arc<SlowRow>, readers: &mut JoinSet<usize>) {
    for _ in 0..READERS {
        let (cache, row) = (cache.clone(), Arc::clone(row));
        readers.spawn(async move {
            let Ok(version) = cache.get_or_load("hot", MINUTE, || row.load()).await;
            version
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_readers_of_a_missing_key_cause_one_load() {
    let bed = Bed::new().await;
    let (cache, row) = (bed.cache(), Arc::new(SlowRow::default()));
    let mut readers = JoinSet::new();
    spawn_readers(&cache, &row, &mut readers);
    row.wait_for_loads(1).await;
    row.go.notify_one();
    let seen = readers.join_all().await;
    assert!(seen.iter().all(|&version| version == 0));
    assert_eq!(row.loads(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_key_invalidated_under_five_hundred_readers_causes_two_loads_and_no_stale_read_after_it() {
    let bed = Bed::new().await;
    let (cache, row) = (bed.cache(), Arc::new(SlowRow::default()));
    let mut early = JoinSet::new();
    spawn_readers(&cache, &row, &mut early);
    row.wait_for_loads(1).await;

    // The row changes during the load; readers who come after the invalidation must not get the load's result.
    row.version.store(1, Ordering::SeqCst);
    bed.delete(&key("hot"), 1).await;
    let mut late = JoinSet::new();
    spawn_readers(&cache, &row, &mut late);
    bed.wait_for_reads(2 * READERS).await;
    row.go.notify_one();
    row.wait_for_loads(2).await;
    row.go.notify_one();
    assert!(early.join_all().await.iter().all(|&version| version <= 1));
    assert!(late.join_all().await.iter().all(|&version| version == 1));
    assert_eq!(row.loads(), 2);
    assert_eq!(bed.raw(&["GET", "hot"]).await, "1");
}

#[tokio::test]
async fn a_load_whose_fill_was_refused_is_not_shared_with_a_reader_who_came_after_it_began() {
    let bed = Bed::new().await;
    let (cache, row) = (bed.cache(), Arc::new(SlowRow::default()));
    let first = read(&cache, &row);
    row.wait_for_loads(1).await;
    row.version.store(1, Ordering::SeqCst);
    bed.delete(&key("hot"), 1).await;
    let mut second = std::pin::pin!(cache.get_or_load("hot", MINUTE, || row.load()));
    // It has missed and waits for the first; it would be told 0 if the result were simply shared.
    assert!(waits(second.as_mut()).await);
    row.go.notify_one();
    assert_eq!(first.await.unwrap(), 0);
    assert!(waits(second.as_mut()).await);
    row.go.notify_one();
    assert_eq!(second.await, Ok(1));
    assert_eq!(row.loads(), 2);
}

fn read(cache: &Cache, row: &Arc<SlowRow>) -> tokio::task::JoinHandle<usize> {
    let (cache, row) = (cache.clone(), Arc::clone(row));
    tokio::spawn(async move {
        let Ok(version) = cache.get_or_load("hot", MINUTE, || row.load()).await;
        version
    })
}

#[tokio::test]
async fn a_process_waits_for_the_load_of_another_and_takes_its_value() {
    let bed = Bed::new().await;
    let row = Arc::new(SlowRow::default());
    let patient = CacheConfig { wait: MINUTE, ..CacheConfig::default() };
    let here = Cache::new(bed.redis.clone(), patient.clone());
    let there = Cache::new(connect(&bed.server.url()), patient);
    let loading = read(&here, &row);
    row.wait_for_loads(1).await;
    let waiting = read(&there, &row);
    bed.wait_for_lease_requests(2).await;
    row.go.notify_one();
    assert_eq!((loading.await.unwrap(), waiting.await.unwrap()), (0, 0));
    assert_eq!(row.loads(), 1);
}

#[tokio::test]
async fn a_process_that_has_waited_long_enough_loads_without_storing() {
    let bed = Bed::new().await;
    let lease = bed.grant(&key("n")).await;
    let config = CacheConfig { wait: Duration::from_millis(5), ..CacheConfig::default() };
    let (cache, loads) = (Cache::new(bed.redis.clone(), config), Loads::default());
    assert_eq!(cache.get_or_load("n", MINUTE, || loads.find(1)).await, Ok(1));
    assert!(!bed.exists("n").await);
    assert!(bed.fill(&key("n"), &lease, "2").await);
}

#[tokio::test]
async fn a_waiting_process_takes_over_when_the_lease_is_voided() {
    let bed = Bed::new().await;
    let lease = bed.grant(&key("n")).await;
    let patient = CacheConfig { wait: MINUTE, ..CacheConfig::default() };
    let cache = Cache::new(bed.redis.clone(), patient);
    let waiting = tokio::spawn(async move { cache.get_or_load("n", MINUTE, || find(1)).await });
    bed.wait_for_lease_requests(2).await;
    bed.delete(&key("n"), 1).await;
    assert_eq!(waiting.await.unwrap(), Ok(1));
    assert_eq!(bed.raw(&["GET", "n"]).await, "1");
    assert!(!bed.fill(&key("n"), &lease, "0").await);
}

#[tokio::test]
async fn when_the_reader_that_loads_loses_interest_another_loads() {
    let bed = Bed::new().await;
    let (cache, row) = (bed.cache(), Arc::new(SlowRow::default()));
    let first = read(&cache, &row);
    row.wait_for_loads(1).await;
    let mut second = std::pin::pin!(cache.get_or_load("hot", MINUTE, || row.load()));
    assert!(waits(second.as_mut()).await);
    assert_eq!(row.loads(), 1);
    first.abort();
    assert!(waits(second.as_mut()).await);
    assert_eq!(row.loads(), 2);
    row.go.notify_one();
    assert_eq!(second.await, Ok(0));
}

#[tokio::test]
async fn readers_waiting_for_a_load_that_fails_load_for_themselves() {
    let bed = Bed::new().await;
    let cache = bed.cache();
    let go = Arc::new(Notify::new());
    let (other_cache, other_go) = (cache.clone(), Arc::clone(&go));
    let failing = tokio::spawn(async move {
        let load = async || {
            other_go.notified().await;
            Err::<u32, _>("down")
        };
        other_cache.get_or_load("n", MINUTE, load).await
    });
    bed.wait_for_lease_requests(1).await;
    let mut waiting = std::pin::pin!(cache.get_or_load("n", MINUTE, || find(7)));
    assert!(waits(waiting.as_mut()).await);
    go.notify_one();
    assert_eq!(failing.await.unwrap(), Err("down"));
    assert_eq!(waiting.await, Ok(7));
}

impl Bed {
    /// Waits until ACQUIRE was called at least so often. The first call of a script fails by name and is repeated by
    /// text, but it is a call.
    async fn wait_for_lease_requests(&self, count: usize) {
        eventually(SOON, async || self.calls("evalsha").await >= count).await;
    }

    async fn wait_for_reads(&self, count: usize) {
        eventually(SOON, async || self.calls("get").await >= count).await;
    }

    async fn calls(&self, command: &str) -> usize {
        let statistics = self.raw(&["INFO", "commandstats"]).await;
        let prefix = format!("cmdstat_{command}:calls=");
        let line = statistics.lines().find_map(|line| line.strip_prefix(&prefix));
        line.and_then(|line| line.split(',').next()?.parse().ok()).unwrap_or(0)
    }
}
