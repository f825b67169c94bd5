//! Readers when Redis does not answer.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cache::{Cache, CacheConfig, Fill};
use devstack::eventually;
use devstack::proxy::{FaultProxy, Mode};
use tokio::task::JoinSet;

use crate::reader::{Loads, find};
use crate::support::{Bed, MINUTE, SOON, connect, deleted, key, mark, plain, updated, work};

/// Far less than a connection's own limits, so that a test sees which one applied.
const IMPATIENT: Duration = Duration::from_millis(50);

/// A generous bound for "did not wait for the connection's own limits", which are seconds.
const QUICK: Duration = Duration::from_millis(1_500);

fn impatient(url: &str) -> Cache {
    let config = CacheConfig {
        redis_timeout: IMPATIENT,
        breaker_failures: 3,
        breaker_pause: Duration::from_millis(100),
        ..CacheConfig::default()
    };
    Cache::new(connect(url), config)
}

#[tokio::test]
async fn without_redis_readers_load_and_notice_when_it_is_back() {
    let (bed, loads) = (Bed::new().await, Loads::default());
    let cache = impatient(&bed.server.url());
    bed.server.terminate().await.unwrap();
    for _ in 0..20 {
        assert_eq!(cache.get_or_load("n", MINUTE, || loads.find(7)).await, Ok(7));
    }
    assert_eq!(loads.count(), 20);
    bed.server.start().await.unwrap();
    eventually(SOON, async || {
        cache.get_or_load("n", MINUTE, || find(7)).await.unwrap();
        bed.raw(&["GET", "n"]).await == "7"
    })
    .await;
}

#[tokio::test]
async fn a_redis_that_hangs_delays_a_reader_by_its_own_limit_only() {
    let bed = Bed::new().await;
    let proxy = FaultProxy::start(bed.server.address()).await.unwrap();
    let cache = impatient(&bed.server.url_through(&proxy));
    assert_eq!(cache.get_or_load("n", MINUTE, || find(7)).await, Ok(7));
    proxy.set_mode(Mode::Stall);
    let began = Instant::now();
    assert_eq!(cache.get_or_load("n", MINUTE, || find(8)).await, Ok(8));
    assert!(began.elapsed() < QUICK, "{:?}", began.elapsed());
}

#[tokio::test]
async fn once_the_breaker_is_open_a_dead_redis_costs_readers_nothing() {
    let bed = Bed::new().await;
    let proxy = FaultProxy::start(bed.server.address()).await.unwrap();
    let config = CacheConfig {
        redis_timeout: IMPATIENT,
        breaker_failures: 3,
        breaker_pause: MINUTE,
        ..CacheConfig::default()
    };
    let cache = Cache::new(connect(&bed.server.url_through(&proxy)), config);
    proxy.set_mode(Mode::Stall);
    for _ in 0..3 {
        cache.get_or_load("n", MINUTE, || find(7)).await.unwrap();
    }
    let began = Instant::now();
    for _ in 0..1_000 {
        cache.get_or_load("n", MINUTE, || find(7)).await.unwrap();
    }
    // A thousand reads that each waited would take 50 s.
    assert!(began.elapsed() < QUICK, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_that_hung_is_replaced_and_never_answers_another_request() {
    let bed = Bed::new().await;
    let proxy = FaultProxy::start(bed.server.address()).await.unwrap();
    let cache = impatient(&bed.server.url_through(&proxy));
    for n in 0..8_u32 {
        bed.raw(&["SET", &format!("n:{n}"), &n.to_string()]).await;
    }
    for round in 0..8_u32 {
        proxy.set_mode(Mode::Stall);
        let stalled = format!("n:{round}");
        cache.get_or_load(&stalled, MINUTE, || find(round)).await.unwrap();
        // Late answers arrive now.
        proxy.set_mode(Mode::Pass);
        for n in 0..8 {
            assert_eq!(cache.get_or_load(&format!("n:{n}"), MINUTE, || find(n)).await, Ok(n));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_readers_of_a_dead_redis_share_loads_that_began_after_they_came() {
    let bed = Bed::new().await;
    bed.server.terminate().await.unwrap();
    let (cache, loads) = (impatient(&bed.server.url()), Arc::new(Loads::default()));
    let mut readers = JoinSet::new();
    for _ in 0..200 {
        let (cache, loads) = (cache.clone(), Arc::clone(&loads));
        readers.spawn(async move {
            let load = async || {
                tokio::time::sleep(Duration::from_millis(20)).await;
                loads.find(7).await
            };
            cache.get_or_load("n", MINUTE, load).await
        });
    }
    assert!(readers.join_all().await.iter().all(|read| *read == Ok(7)));
    assert!(loads.count() < 100, "{}", loads.count());
}

#[tokio::test]
async fn a_fill_whose_answer_was_lost_is_not_shared_and_does_not_fail_the_reader() {
    let bed = Bed::new().await;
    let proxy = FaultProxy::start(bed.server.address()).await.unwrap();
    let cache = impatient(&bed.server.url_through(&proxy));
    let load = async || {
        proxy.set_mode(Mode::DropToClient);
        Ok::<_, Infallible>(7)
    };
    assert_eq!(cache.get_or_load("n", MINUTE, load).await, Ok(7));
    proxy.set_mode(Mode::Pass);
    // It was stored, or the lease is still there; in either case a delete makes room for the next value.
    bed.delete(&key("n"), 1).await;
    eventually(SOON, async || cache.get_or_load("n", MINUTE, || find(8)).await == Ok(8)).await;
}

#[tokio::test]
async fn wrong_credentials_do_not_keep_readers_from_their_values() {
    let options =
        devstack::RedisOptions { configuration: "maxclients 100\n".to_owned(), ..Default::default() };
    let bed = Bed::with(options).await;
    let url = bed.server.url().replace("redis://", "redis://nobody:secret@");
    let (cache, loads) = (impatient(&url), Loads::default());
    for _ in 0..5 {
        assert_eq!(cache.get_or_load("n", MINUTE, || loads.find(7)).await, Ok(7));
    }
    assert_eq!(loads.count(), 5);
}

#[tokio::test]
async fn a_full_redis_goes_on_serving_hits_while_misses_are_refused() {
    let bed = Bed::new().await;
    let cache = impatient(&bed.server.url());
    assert_eq!(cache.get_or_load("hit", MINUTE, || find(1)).await, Ok(1));
    bed.raw(&["CONFIG", "SET", "maxmemory", "1"]).await;
    // As many misses in a row as open the breaker, and more.
    for number in 0..10 {
        assert_eq!(cache.get_or_load(format!("miss:{number}"), MINUTE, || find(7)).await, Ok(7));
    }
    let misses = (0..10).map(|number| cache.get_or_load(format!("again:{number}"), MINUTE, || find(7)));
    futures::future::join_all(misses).await;
    let loads = Loads::default();
    assert_eq!(cache.get_or_load("hit", MINUTE, || loads.find(2)).await, Ok(1));
    assert_eq!(loads.count(), 0);
}

#[tokio::test]
async fn times_without_end_are_cut_to_what_redis_takes() {
    let bed = Bed::new().await;
    let forever = Duration::MAX;
    let config = CacheConfig { ttl_jitter: 0.0, lease: forever, wait: forever, ..CacheConfig::default() };
    let cache = Cache::new(connect(&bed.server.url()), config);
    assert_eq!(cache.get_or_load("n", forever, || find(7)).await, Ok(7));
    assert_eq!(bed.raw(&["GET", "n"]).await, "7");
}

#[tokio::test]
async fn a_full_redis_refuses_marks_for_now_and_turns_updates_into_deletes() {
    let bed = Bed::new().await;
    let (unmarked, key, other) = (key("unmarked"), key("k"), key("other"));
    let lease = bed.grant(&key).await;
    let versioned = Fill { version: Some(1), ..plain("one") };
    assert!(bed.redis.fill(&key, &lease, versioned).await.unwrap());
    let waiting = bed.grant(&other).await;
    bed.raw(&["CONFIG", "SET", "maxmemory", "1"]).await;

    // In a pipeline and alone.
    let refused = [
        bed.redis.mark(&[unmarked], mark(7)).await.unwrap_err(),
        bed.redis.store_position("d", b"p").await.unwrap_err(),
    ];
    for error in refused {
        assert!(error.is_out_of_memory() && error.is_retryable(), "{error:?}");
    }
    // A pipeline with an update, a delete that voids a lease, and what follows them.
    let batch = work([updated(&key, "two", 2, 1), deleted(&[&other], &[1])]);
    bed.redis.apply(&batch).await.unwrap();
    assert_eq!(bed.raw(&["KEYS", "*"]).await, "");
    bed.raw(&["CONFIG", "SET", "maxmemory", "0"]).await;
    assert!(!bed.fill(&other, &waiting, "old").await);
}
