//! What readers count.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cache::{Cache, CacheConfig};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use tokio::sync::Notify;

use crate::reader::{find, waits};
use crate::support::{Bed, MINUTE, connect, key};

/// Keeps counters in memory.
#[derive(Default)]
struct Memory(Mutex<BTreeMap<String, Arc<AtomicU64>>>);

impl Memory {
    fn cell(&self, key: &Key) -> Arc<AtomicU64> {
        let labels: Vec<&str> = key.labels().map(metrics::Label::value).collect();
        let name = format!("{} {}", key.name(), labels.join(" ")).trim_end().to_owned();
        Arc::clone(self.0.lock().unwrap().entry(name).or_default())
    }

    /// Everything that is not zero, without the prefix that all names share.
    fn counted(&self) -> Vec<String> {
        let cells = self.0.lock().unwrap();
        let counted = cells.iter().map(|(name, cell)| (name, cell.load(Ordering::Relaxed)));
        let counted = counted.filter(|(_, count)| *count > 0);
        counted.map(|(name, count)| format!("{} {count}", name.strip_prefix("cache_").unwrap())).collect()
    }
}

impl Recorder for Memory {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.cell(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.cell(key))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

fn counting(url: &str, config: CacheConfig) -> (Cache, Memory) {
    let memory = Memory::default();
    let cache = metrics::with_local_recorder(&memory, || Cache::new(connect(url), config));
    (cache, memory)
}

#[tokio::test]
async fn hits_misses_loads_and_what_becomes_of_fills_are_counted() {
    let bed = Bed::new().await;
    let (cache, memory) = counting(&bed.server.url(), CacheConfig::default());
    for _ in 0..3 {
        cache.get_or_load("n", MINUTE, || find(1)).await.unwrap();
    }
    let invalidated_meanwhile = async || {
        bed.delete(&key("m"), 1).await;
        find(1).await
    };
    cache.get_or_load("m", MINUTE, invalidated_meanwhile).await.unwrap();
    bed.raw(&["SET", "n", "not a number"]).await;
    cache.get_or_load("n", MINUTE, || find(1)).await.unwrap();
    cache.get_or_load("", MINUTE, || find(1)).await.unwrap();
    let expected = [
        "fills_total refused 1",
        "fills_total stored 2",
        "hits_total 2",
        "invalid_keys_total 1",
        "leases_total grant 3",
        "loads_total 4",
        "misses_total 3",
        "undecodable_total 1",
    ];
    assert_eq!(memory.counted(), expected);
}

#[tokio::test]
async fn a_reader_who_came_during_a_load_shares_it_if_it_was_stored() {
    let bed = Bed::new().await;
    let (cache, memory) = counting(&bed.server.url(), CacheConfig::default());
    let (loading, go) = (Notify::new(), Notify::new());
    let slowly = async || {
        loading.notify_one();
        go.notified().await;
        find(1).await
    };
    let first = cache.get_or_load("n", MINUTE, slowly);
    let second = async {
        loading.notified().await;
        let mut read = std::pin::pin!(cache.get_or_load("n", MINUTE, || find(2)));
        assert!(waits(read.as_mut()).await);
        go.notify_one();
        read.await
    };
    assert_eq!(tokio::join!(first, second), (Ok(1), Ok(1)));
    let expected = [
        "fills_total stored 1",
        "leases_total grant 1",
        "loads_total 1",
        "misses_total 2",
        "shared_loads_total 1",
    ];
    assert_eq!(memory.counted(), expected);
}

#[tokio::test]
async fn a_dead_redis_is_counted_until_the_breaker_opens_and_then_every_read_that_goes_past_it() {
    let bed = Bed::new().await;
    bed.server.terminate().await.unwrap();
    let config = CacheConfig {
        redis_timeout: Duration::from_secs(5),
        breaker_failures: 2,
        breaker_pause: MINUTE,
        ..CacheConfig::default()
    };
    let (cache, memory) = counting(&bed.server.url(), config);
    for _ in 0..5 {
        cache.get_or_load("n", MINUTE, || find(1)).await.unwrap();
    }
    let open = format!("breaker_open {}", 1.0_f64.to_bits());
    let expected =
        [open.as_str(), "breaker_skips_total 3", "loads_total 5", "misses_total 5", "redis_errors_total 2"];
    assert_eq!(memory.counted(), expected);
}
