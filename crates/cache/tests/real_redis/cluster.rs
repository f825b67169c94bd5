//! A Redis Cluster: names that belong together live together, and every step finds its node.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::time::Duration;

use cache::{Acquired, Applied, Cache, CacheConfig, Fill, LeaseToken, Options, Redis, RedisConfig};
use devstack::{RedisCluster, eventually};
use event::{CacheKey, Change};

use crate::reader::{Loads, find};
use crate::support::{
    MINUTE, SOON, committed, connect, deleted, granted, key, mark, orphans, plain, updated, work,
};

pub(crate) struct Nodes {
    pub(crate) cluster: RedisCluster,
    pub(crate) redis: Redis,
}

impl Nodes {
    pub(crate) async fn start(masters: usize, replicas: usize) -> Self {
        let cluster = RedisCluster::start(masters, replicas).await.unwrap();
        let hosts: Vec<String> = cluster.nodes.iter().map(|node| node.address().to_string()).collect();
        let redis = connect(&format!("redis+cluster://{}", hosts.join(",")));
        Self { cluster, redis }
    }

    /// Everything in the cluster.
    pub(crate) async fn names(&self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for node in &self.cluster.nodes {
            let found = node.command(&["KEYS", "*"]).await.unwrap();
            names.extend(found.lines().map(str::to_owned));
        }
        names
    }
}

/// Keys of all forms, spread over all nodes.
fn keys() -> Vec<CacheKey> {
    let plain = (0..30).map(|n| format!("user:{n}"));
    let tagged = (0..10).map(|n| format!("{{tenant}}:{n}"));
    let braces = ["{", "}", "{}", "a}b", "{}{a}", "{a}{b}", "a{", "a}{b}", "}{", "foo", "{foo}"];
    plain.chain(tagged).chain(braces.map(str::to_owned)).map(|text| key(&text)).collect()
}

#[tokio::test]
async fn the_whole_protocol_works_on_keys_of_every_form() {
    let nodes = Nodes::start(3, 0).await;
    let (redis, keys) = (&nodes.redis, keys());
    for key in &keys {
        let token = LeaseToken::generate();
        let lease = granted(redis.acquire(key, token, MINUTE, false).await.unwrap());
        let fill = Fill { version: Some(1), keep_stale_copy: true, ..plain("one") };
        assert!(redis.fill(key, &lease, fill).await.unwrap(), "{key}");
    }
    let updates = keys.iter().map(|key| updated(key, "two", 2, 7));
    let applied = redis.apply(&work(updates)).await.unwrap();
    assert_eq!(applied, Applied { updated: keys.len() as u64, ..Applied::default() });

    redis.mark(&keys, mark(7)).await.unwrap();
    for key in &keys {
        let acquired = redis.acquire(key, LeaseToken::generate(), MINUTE, false).await.unwrap();
        assert_eq!(acquired, Acquired::Bypass, "{key}");
    }
    let all: Vec<&CacheKey> = keys.iter().collect();
    let applied = redis.apply(&work([deleted(&all, &[6])])).await.unwrap();
    assert_eq!(applied.unmarked, 0);
    let applied = redis.apply(&work([deleted(&all, &[7])])).await.unwrap();
    assert_eq!(applied.unmarked, keys.len() as u64);
    let left = nodes.names().await;
    assert!(left.iter().all(|name| name.starts_with("\u{1f}s")), "{left:?}");
}

#[tokio::test]
async fn forgotten_marks_of_all_nodes_are_listed_and_resolved() {
    let nodes = Nodes::start(3, 0).await;
    let keys = keys();
    nodes.redis.mark(&keys, mark(7)).await.unwrap();
    let orphans = eventually(SOON, async || {
        let orphans = orphans(&nodes.redis, Duration::from_millis(1)).await;
        (orphans.len() == keys.len()).then_some(orphans)
    })
    .await;
    assert_eq!(orphans.iter().map(|(key, _)| key).collect::<BTreeSet<_>>(), keys.iter().collect());
    for (key, xid) in &orphans {
        nodes.redis.resolve(&[(key.clone(), mark(*xid))]).await.unwrap();
    }
    assert_eq!(nodes.names().await, BTreeSet::new());
}

#[tokio::test]
async fn readers_read_one_and_many_keys_across_nodes() {
    let nodes = Nodes::start(3, 0).await;
    let (cache, loads) = (Cache::new(nodes.redis.clone(), CacheConfig::default()), Loads::default());
    let keys: Vec<String> = keys().iter().map(ToString::to_string).collect();
    for key in &keys[..20] {
        for _ in 0..2 {
            assert_eq!(cache.get_or_load(key, MINUTE, || loads.find(1)).await, Ok(1));
        }
    }
    assert_eq!(loads.count(), 20);
    let load = |missing: Vec<&String>| {
        let rows: HashMap<String, i32> = missing.into_iter().map(|key| (key.clone(), 2)).collect();
        assert_eq!(rows.len(), keys.len() - 20);
        find(rows)
    };
    let read = cache.get_many(&keys, MINUTE, load).await.unwrap();
    let expected = keys.iter().enumerate().map(|(at, _)| Some(if at < 20 { 1 } else { 2 }));
    assert_eq!(read, expected.collect::<Vec<_>>());
    let no_load = async |_: Vec<&String>| -> Result<HashMap<String, i32>, Infallible> {
        unreachable!("everything is cached")
    };
    assert_eq!(cache.get_many(&keys, MINUTE, no_load).await.unwrap(), read);
}

#[tokio::test]
async fn stale_copies_lie_beside_their_keys() {
    let nodes = Nodes::start(3, 0).await;
    let config = CacheConfig { wait: Duration::from_millis(5), ..CacheConfig::default() };
    let cache = Cache::new(nodes.redis.clone(), config);
    let options = Options { stale_for: Some(MINUTE), ..Options::<cache::Json>::default() };
    for key in keys() {
        cache.get_or_load_with(&key, &options, || find(1)).await.unwrap();
        nodes.redis.apply(&work([deleted(&[&key], &[1])])).await.unwrap();
        nodes.redis.acquire(&key, LeaseToken::generate(), MINUTE, false).await.unwrap();
        assert_eq!(cache.get_or_load_with(&key, &options, || find(2)).await, Ok(1), "{key}");
    }
}

#[tokio::test]
async fn a_flush_reaches_all_nodes_and_keeps_bookkeeping() {
    let nodes = Nodes::start(3, 0).await;
    let cache = Cache::new(nodes.redis.clone(), CacheConfig::default());
    for key in keys() {
        cache.get_or_load(&key, MINUTE, || find(1)).await.unwrap();
    }
    assert_eq!(nodes.redis.delete_matching(&["user:*".to_owned()]).await.unwrap(), 30);
    nodes.redis.mark(&[key("user:1")], mark(7)).await.unwrap();
    nodes.redis.store_position("redis", b"record").await.unwrap();
    assert_eq!(nodes.redis.flush_all_keys().await.unwrap(), 21);
    assert_eq!(nodes.names().await.len(), 3);
    assert_eq!(nodes.redis.load_position("redis").await.unwrap().unwrap(), b"record");
}

#[tokio::test]
async fn every_master_counts_as_an_instance_and_as_a_place_to_check() {
    let nodes = Nodes::start(3, 0).await;
    let before = nodes.redis.instances().await.unwrap();
    assert_eq!(before.len(), 3);
    assert_eq!(nodes.redis.eviction_policy().await.unwrap().as_str(), "noeviction");
    assert_eq!(nodes.redis.longest_snapshot_interval().await.unwrap(), None);
    let last = &nodes.cluster.nodes[2];
    last.command(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lfu"]).await.unwrap();
    last.command(&["CONFIG", "SET", "save", "60 1"]).await.unwrap();
    assert!(nodes.redis.eviction_policy().await.is_err());
    assert_eq!(nodes.redis.longest_snapshot_interval().await.unwrap(), Some(MINUTE));
}

#[tokio::test]
async fn a_cluster_of_one_node_that_does_not_know_its_own_address_works() {
    let nodes = Nodes::start(1, 0).await;
    nodes.redis.mark(&keys(), mark(7)).await.unwrap();
    assert_eq!(nodes.redis.instances().await.unwrap().len(), 1);
    assert_eq!(nodes.redis.flush_all_keys().await.unwrap(), 0);
    eventually(SOON, async || orphans(&nodes.redis, Duration::from_millis(1)).await.len() == keys().len())
        .await;
}

#[tokio::test]
async fn when_a_replica_takes_over_invalidations_go_on_and_the_change_is_noticed() {
    let nodes = Nodes::start(3, 1).await;
    let before = nodes.redis.instances().await.unwrap();
    let keys = keys();
    let all: Vec<&CacheKey> = keys.iter().collect();
    nodes.redis.apply(&work([deleted(&all, &[1])])).await.unwrap();
    nodes.cluster.nodes[0].kill().unwrap();
    let failover = Duration::from_secs(60);
    eventually(failover, async || nodes.redis.apply(&work([deleted(&all, &[1])])).await).await;
    let after = eventually(SOON, async || nodes.redis.instances().await).await;
    assert_eq!(after.len(), 3);
    assert_ne!(before, after);
}

#[tokio::test]
async fn a_node_that_hangs_does_not_keep_the_others_from_being_invalidated() {
    let nodes = Nodes::start(3, 0).await;
    let all = &nodes.cluster.nodes;
    for node in all {
        node.command(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]).await.unwrap();
    }
    let keys: Vec<CacheKey> = (0..3_000).map(|n| key(&format!("user:{n}"))).collect();
    let mut at_others = 0;
    for key in &keys {
        for (nth, node) in all.iter().enumerate() {
            if node.command(&["SET", key.as_str(), "v"]).await.is_ok() {
                at_others += usize::from(nth > 0);
            }
        }
    }
    assert!(at_others > 1_000);
    // All connections are there before it hangs.
    for _ in 0..RedisConfig::default().pool_size {
        nodes.redis.ping().await.unwrap();
    }
    all[0].stop().unwrap();
    let error = nodes.redis.invalidate(&keys).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    for node in &all[1..] {
        assert_eq!(node.command(&["DBSIZE"]).await.unwrap(), "0");
    }
    all[0].resume().unwrap();
    eventually(SOON, async || nodes.redis.invalidate(&keys).await).await;
    assert_eq!(nodes.names().await, BTreeSet::new());
}

#[tokio::test]
async fn a_namespace_is_invalidated_on_every_master() {
    let nodes = Nodes::start(3, 0).await;
    let (redis, keys) = (&nodes.redis, keys());
    let mut leases = Vec::new();
    for key in &keys {
        leases.push(granted(redis.acquire(key, LeaseToken::generate(), MINUTE, false).await.unwrap()));
    }
    let namespace = committed(&[&key("user:")], Change::Namespace, &[7]);
    redis.apply(&work([namespace])).await.unwrap();
    for (key, lease) in keys.iter().zip(&leases) {
        let filled = redis.fill(key, lease, plain("old")).await.unwrap();
        assert_eq!(filled, !key.as_str().starts_with("user:"), "{key}");
    }
    let namespace = committed(&[&key("{tenant}:")], Change::Namespace, &[8]);
    assert_eq!(redis.apply(&work([namespace])).await.unwrap().deleted, 10);
}
