//! What one reader sees.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cache::{Cache, CacheConfig, Loaded, Options, Raw};
use devstack::eventually;
use event::CacheKey;
use serde::{Deserialize, Serialize};

use crate::support::{Bed, MINUTE, SOON, key, mark, updated, work};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct User {
    name: String,
}

fn ada() -> User {
    User { name: "Ada".to_owned() }
}

impl Bed {
    /// A cache whose leases do not end while a test waits for them to be given back.
    pub(crate) fn cache(&self) -> Cache {
        let config = CacheConfig { ttl_jitter: 0.0, lease: 10 * MINUTE, ..CacheConfig::default() };
        Cache::new(self.redis.clone(), config)
    }

    async fn commands(&self) -> String {
        let statistics = self.raw(&["INFO", "commandstats"]).await;
        let calls = statistics.lines().filter(|line| !line.contains("cmdstat_info"));
        let calls = calls.filter_map(|line| line.strip_prefix("cmdstat_")?.split(",usec").next());
        calls.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(" ")
    }
}

/// A loader that finds `value`.
pub(crate) async fn find<T>(value: T) -> Result<T, Infallible> {
    Ok(value)
}

/// Lets a read run until it has nothing to do but wait for others.
pub(crate) async fn waits<F: Future>(read: Pin<&mut F>) -> bool {
    tokio::time::timeout(Duration::from_millis(50), read).await.is_err()
}

/// Counts its calls and returns what it is told to.
#[derive(Default)]
pub(crate) struct Loads(AtomicUsize);

impl Loads {
    pub(crate) async fn find<T>(&self, value: T) -> Result<T, Infallible> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(value)
    }

    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

#[tokio::test]
async fn a_value_is_loaded_once_and_then_comes_from_the_cache() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = bed.cache();
    for _ in 0..3 {
        assert_eq!(cache.get_or_load("user:1", MINUTE, || loads.find(ada())).await, Ok(ada()));
    }
    assert_eq!(loads.count(), 1);
    assert_eq!(bed.raw(&["GET", "user:1"]).await, r#"{"name":"Ada"}"#);
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "user:1");
}

#[tokio::test]
async fn a_hit_is_one_plain_get_and_nothing_else() {
    let bed = Bed::new().await;
    let cache = bed.cache();
    bed.raw(&["SET", "n", "7"]).await;
    // The connection is made first.
    cache.redis().ping().await.unwrap();
    let cache = Cache::new(cache.redis().clone(), CacheConfig::default());
    let load = async || cache.get_or_load("n", MINUTE, || find(0)).await;
    for _ in 0..8 {
        assert_eq!(load().await, Ok(7));
    }
    bed.raw(&["CONFIG", "RESETSTAT"]).await;
    for _ in 0..5 {
        assert_eq!(load().await, Ok(7));
    }
    let commands = bed.commands().await;
    // Redis names the subcommand since 7.0.
    let asked =
        commands.strip_prefix("config|resetstat:calls=1 ").or(commands.strip_prefix("config:calls=1 "));
    assert_eq!(asked, Some("get:calls=5"), "{commands}");
}

#[tokio::test]
async fn absence_is_cached_as_plain_null_for_its_own_time_and_invalidated_like_any_value() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = bed.cache();
    let options =
        Options { ttl: MINUTE, negative_ttl: Duration::from_secs(5), ..Options::<cache::Json>::default() };
    for _ in 0..2 {
        let found = cache.get_or_load_with("user:1", &options, || loads.find(None::<User>)).await;
        assert_eq!(found, Ok(None));
    }
    assert_eq!(loads.count(), 1);
    assert_eq!(bed.raw(&["GET", "user:1"]).await, "null");
    assert!(bed.raw(&["PTTL", "user:1"]).await.parse::<u64>().unwrap() <= 5_000);
    bed.redis.invalidate(&[key("user:1")]).await.unwrap();
    let found = cache.get_or_load_with("user:1", &options, || loads.find(Some(ada()))).await;
    assert_eq!(found, Ok(Some(ada())));
}

#[tokio::test]
async fn raw_bytes_are_stored_as_they_are() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let (cache, options) = (bed.cache(), Options::<Raw>::default());
    for bytes in [vec![], vec![0, 0xff, b'\r', b'\n'], b"text".to_vec()] {
        let key = format!("raw:{bytes:?}");
        for _ in 0..2 {
            let read = cache.get_or_load_with(&key, &options, || loads.find(Some(bytes.clone()))).await;
            assert_eq!(read, Ok(Some(bytes.clone())));
        }
        assert_eq!(bed.raw(&["STRLEN", &key]).await, bytes.len().to_string());
    }
    assert_eq!(loads.count(), 3);
}

#[tokio::test]
async fn a_time_to_live_of_zero_loads_without_touching_the_cache() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = bed.cache();
    bed.raw(&["SET", "n", "7"]).await;
    assert_eq!(cache.get_or_load("n", Duration::ZERO, || loads.find(8)).await, Ok(8));
    assert_eq!(bed.raw(&["GET", "n"]).await, "7");
    let options = Options { negative_ttl: Duration::ZERO, ..Options::<cache::Json>::default() };
    assert_eq!(cache.get_or_load_with("absent", &options, || loads.find(None::<u8>)).await, Ok(None));
    eventually(SOON, async || bed.raw(&["KEYS", "*"]).await == "n").await;
}

#[tokio::test]
async fn times_to_live_are_spread_but_never_longer_than_asked() {
    let bed = Bed::new().await;
    let cache = Cache::new(bed.redis.clone(), CacheConfig { ttl_jitter: 0.5, ..CacheConfig::default() });
    let mut seen = BTreeSet::new();
    for n in 0..20 {
        let key = format!("n:{n}");
        cache.get_or_load(&key, MINUTE, || find(n)).await.unwrap();
        let ttl_ms: u64 = bed.raw(&["PTTL", &key]).await.parse().unwrap();
        assert!((20_000..=60_000).contains(&ttl_ms), "{ttl_ms}");
        seen.insert(ttl_ms / 1_000);
    }
    assert!(seen.len() > 5, "{seen:?}");
}

#[tokio::test]
async fn keys_that_cannot_be_cached_are_loaded_every_time() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = bed.cache();
    let huge = "k".repeat(event::MAX_KEY_BYTES + 1);
    for key in ["", "line\nbreak", "\u{1f}g{k}", &huge] {
        assert_eq!(cache.get_or_load(key, MINUTE, || loads.find(7)).await, Ok(7));
        assert_eq!(cache.get_or_load(key, MINUTE, || loads.find(7)).await, Ok(7));
    }
    assert_eq!(loads.count(), 8);
    assert_eq!(bed.raw(&["DBSIZE"]).await, "0");
}

#[tokio::test]
async fn keys_with_any_braces_are_cached_and_invalidated() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = bed.cache();
    for text in ["{", "}", "{}", "a}b", "{}{a}", "{a}{b}", "a{", "{user}:1", &"{".repeat(1024), "🦀"] {
        let before = loads.count();
        for _ in 0..2 {
            cache.get_or_load(text, MINUTE, || loads.find(1)).await.unwrap();
        }
        assert_eq!(loads.count(), before + 1, "{text}");
        assert_eq!(bed.redis.invalidate(&[CacheKey::new(text).unwrap()]).await.unwrap(), 1);
        cache.get_or_load(text, MINUTE, || loads.find(1)).await.unwrap();
        assert_eq!(loads.count(), before + 2, "{text}");
    }
}

#[tokio::test]
async fn what_cannot_be_decoded_or_has_the_wrong_type_is_replaced() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = bed.cache();
    bed.raw(&["SET", "schema", r#"{"full_name":"from before the schema changed"}"#]).await;
    bed.raw(&["HSET", "type", "field", "value"]).await;
    for key in ["schema", "type"] {
        for _ in 0..2 {
            assert_eq!(cache.get_or_load(key, MINUTE, || loads.find(ada())).await, Ok(ada()));
        }
        assert_eq!(bed.raw(&["GET", key]).await, r#"{"name":"Ada"}"#);
    }
    assert_eq!(loads.count(), 2);
}

#[tokio::test]
async fn a_value_that_is_too_large_or_has_no_json_is_returned_but_not_cached() {
    let bed = Bed::new().await;
    let config = CacheConfig { max_value_bytes: 10, ..CacheConfig::default() };
    let (cache, loads) = (Cache::new(bed.redis.clone(), config), Loads::default());
    let large = "12345678901".to_owned();
    assert_eq!(cache.get_or_load("large", MINUTE, || loads.find(large.clone())).await, Ok(large));
    let unprintable = std::collections::BTreeMap::from([(vec![1_u8], 1)]);
    assert_eq!(cache.get_or_load("map", MINUTE, || loads.find(unprintable.clone())).await, Ok(unprintable));
    eventually(SOON, async || bed.raw(&["DBSIZE"]).await == "0").await;
}

#[tokio::test]
async fn a_failing_loader_returns_its_own_error_and_leaves_the_lease_to_the_next() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = bed.cache();
    let failed = cache.get_or_load("n", MINUTE, async || Err::<u32, _>("no such table")).await;
    assert_eq!(failed, Err("no such table"));
    eventually(SOON, async || bed.raw(&["DBSIZE"]).await == "0").await;
    assert_eq!(cache.get_or_load("n", MINUTE, || loads.find(7)).await, Ok(7));
    assert_eq!(bed.raw(&["GET", "n"]).await, "7");
}

#[tokio::test]
async fn a_reader_that_loses_interest_gives_its_lease_back() {
    let bed = Bed::new().await;
    let cache = bed.cache();
    let never = || std::future::pending::<Result<u32, Infallible>>();
    {
        let mut read = std::pin::pin!(cache.get_or_load("n", MINUTE, never));
        let waiting = async || bed.exists("\u{1f}g{n}").await;
        tokio::select! {
            _ = &mut read => unreachable!("the loader never ends"),
            () = eventually(SOON, waiting) => {}
        }
    }
    eventually(SOON, async || !bed.exists("\u{1f}g{n}").await).await;
}

#[tokio::test]
async fn a_versioned_load_is_replaced_by_the_update_of_a_newer_version() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let (cache, options) = (bed.cache(), Options::<cache::Json>::default());
    let load = || loads.find(Loaded::versioned(10, 1));
    assert_eq!(cache.get_or_load_versioned("n", &options, load).await, Ok(10));
    bed.redis.apply(&work([updated(&key("n"), "20", 2, 1)])).await.unwrap();
    assert_eq!(cache.get_or_load_versioned("n", &options, load).await, Ok(20));
    assert_eq!(loads.count(), 1);
}

#[tokio::test]
async fn under_a_mark_readers_load_without_storing() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = bed.cache();
    bed.redis.mark(&[key("n")], mark(7)).await.unwrap();
    for n in 0..3 {
        assert_eq!(cache.get_or_load("n", MINUTE, || loads.find(n)).await, Ok(n));
    }
    assert_eq!(loads.count(), 3);
    bed.redis.unmark(&[key("n")], mark(7)).await.unwrap();
    for _ in 0..3 {
        assert_eq!(cache.get_or_load("n", MINUTE, || loads.find(9)).await, Ok(9));
    }
    assert_eq!(loads.count(), 4);
}
