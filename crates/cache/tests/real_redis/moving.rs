//! A slot of a cluster that is moving from one node to another, or was left so by a resharding that was broken off.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use cache::{Acquired, Cache, CacheConfig, LeaseToken};
use devstack::eventually;
use event::{CacheKey, Change};
use futures::future::join_all;

use crate::cluster::Nodes;
use crate::reader::{Loads, find};
use crate::support::{MINUTE, SOON, committed, deleted, granted, key, mark, orphans, plain, updated, work};

const SLOTS: usize = 16_384;

/// Where a name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Nowhere,
    Source,
    Target,
}

const EVERYWHERE: [At; 3] = [At::Nowhere, At::Source, At::Target];

/// A slot on its way.
struct Move<'a> {
    slot: String,
    source: &'a devstack::Redis,
    target: &'a devstack::Redis,
}

impl<'a> Move<'a> {
    /// Begins to move the slot of `key` to the next master.
    async fn begin(nodes: &'a Nodes, key: &CacheKey) -> Self {
        let masters = nodes.cluster.nodes.len();
        Self::between(nodes, key, (Self::owner(nodes, key, masters).await.0 + 1) % masters).await
    }

    async fn owner(nodes: &Nodes, key: &CacheKey, masters: usize) -> (usize, String) {
        let slot = nodes.cluster.nodes[0].command(&["CLUSTER", "KEYSLOT", key.as_str()]).await.unwrap();
        let number: usize = slot.parse().unwrap();
        ((0..masters).rfind(|index| SLOTS * index / masters <= number).unwrap(), slot)
    }

    /// Begins to move the slot of `key`, which is at one of the first two nodes if there is a choice, to that node.
    async fn between(nodes: &'a Nodes, key: &CacheKey, target: usize) -> Self {
        let all = &nodes.cluster.nodes;
        let masters = if all.len() == 4 { 2 } else { all.len() };
        let (owner, slot) = Self::owner(nodes, key, masters).await;
        let (source, target) = (&all[owner], &all[target]);
        let moving = Self { slot, source, target };
        moving.set_slot(target, "IMPORTING", source).await;
        moving.set_slot(source, "MIGRATING", target).await;
        moving
    }

    async fn set_slot(&self, node: &devstack::Redis, state: &str, other: &devstack::Redis) {
        let other = other.command(&["CLUSTER", "MYID"]).await.unwrap();
        node.command(&["CLUSTER", "SETSLOT", &self.slot, state, &other]).await.unwrap();
    }

    /// Moves one name. Fails if the target has one like it.
    async fn migrate(&self, name: &str) {
        let port = self.target.address().port().to_string();
        let command = ["MIGRATE", "127.0.0.1", &port, name, "0", "5000"];
        assert_eq!(self.source.command(&command).await.unwrap(), "OK", "{name}");
    }

    /// Puts a value at a name that nothing has.
    async fn put(&self, name: &str, value: &str, at: At) {
        if at == At::Nowhere {
            return;
        }
        // The source takes no new name of this slot any more.
        self.source.command(&["CLUSTER", "SETSLOT", &self.slot, "STABLE"]).await.unwrap();
        self.source.command(&["SET", name, value, "PX", "60000"]).await.unwrap();
        self.set_slot(self.source, "MIGRATING", self.target).await;
        if at == At::Target {
            self.migrate(name).await;
        }
    }

    /// Leaves the slot where it was.
    async fn abort(self) {
        for node in [self.source, self.target] {
            node.command(&["CLUSTER", "SETSLOT", &self.slot, "STABLE"]).await.unwrap();
        }
    }

    /// Moves what is left, and then the slot itself.
    async fn finish(self) {
        let left = self.source.command(&["CLUSTER", "GETKEYSINSLOT", &self.slot, "1000"]).await.unwrap();
        for name in left.lines().filter(|name| !name.is_empty()) {
            self.migrate(name).await;
        }
        for node in [self.target, self.source] {
            self.set_slot(node, "NODE", self.target).await;
        }
    }
}

/// Keys that are in no other test's way, each in a slot of its own.
fn others() -> Vec<CacheKey> {
    (0..20).map(|n| key(&format!("other:{n}"))).collect()
}

fn all_of<'a>(key: &'a CacheKey, others: &'a [CacheKey]) -> Vec<&'a CacheKey> {
    std::iter::once(key).chain(others).collect()
}

async fn fill(nodes: &Nodes, keys: &[CacheKey]) {
    for key in keys {
        let lease = granted(nodes.redis.acquire(key, LeaseToken::generate(), MINUTE, false).await.unwrap());
        assert!(nodes.redis.fill(key, &lease, plain("old")).await.unwrap());
    }
}

#[tokio::test]
async fn a_key_of_a_moving_slot_is_deleted_wherever_it_and_its_guard_are() {
    let nodes = Nodes::start(3, 0).await;
    let others = others();
    for (nth, (value, guard)) in EVERYWHERE.iter().flat_map(|v| EVERYWHERE.map(|g| (*v, g))).enumerate() {
        let key = key(&format!("user:{nth}"));
        fill(&nodes, &others).await;
        let moving = Move::begin(&nodes, &key).await;
        moving.put(key.as_str(), "old", value).await;
        moving.put(&format!("\u{1f}g{{{key}}}"), "V1", guard).await;
        let event = if nth % 2 == 0 {
            deleted(&all_of(&key, &others), &[7])
        } else {
            nodes.redis.invalidate(&others).await.unwrap();
            updated(&key, "new", 2, 7)
        };
        nodes.redis.apply(&work([event])).await.unwrap();
        assert_eq!(nodes.names().await, BTreeSet::new(), "value {value:?}, guard {guard:?}");
        moving.finish().await;
        eventually(SOON, async || nodes.redis.invalidate(std::slice::from_ref(&key)).await).await;
    }
}

#[tokio::test]
async fn a_load_from_before_the_delete_in_a_moving_slot_is_not_stored() {
    let nodes = Nodes::start(3, 0).await;
    for (nth, migrated) in [false, true].into_iter().enumerate() {
        let key = key(&format!("user:{nth}"));
        let lease = granted(nodes.redis.acquire(&key, LeaseToken::generate(), MINUTE, false).await.unwrap());
        let moving = Move::begin(&nodes, &key).await;
        if migrated {
            moving.migrate(&format!("\u{1f}g{{{key}}}")).await;
        }
        nodes.redis.invalidate(std::slice::from_ref(&key)).await.unwrap();
        moving.finish().await;
        // Once the slot is known to have moved, keys are cached again.
        let fresh = eventually(SOON, async || {
            match nodes.redis.acquire(&key, LeaseToken::generate(), MINUTE, false).await {
                Ok(Acquired::Grant(fresh)) => Some(fresh),
                _ => None,
            }
        })
        .await;
        assert!(!nodes.redis.fill(&key, &lease, plain("old")).await.unwrap());
        assert!(nodes.redis.fill(&key, &fresh, plain("new")).await.unwrap());
    }
}

#[tokio::test]
async fn a_namespace_is_invalidated_in_a_moving_slot_at_both_nodes() {
    let nodes = Nodes::start(3, 0).await;
    let key = key("{user}:1");
    let moving = Move::begin(&nodes, &key).await;
    moving.put("{user}:1", "old", At::Source).await;
    moving.put("\u{1f}g:{user}:2", "L7", At::Source).await;
    moving.put("{user}:3", "old", At::Target).await;
    moving.put("\u{1f}g:{user}:4", "L7", At::Target).await;
    let namespace = committed(&[&crate::support::key("{user}:")], Change::Namespace, &[7]);
    nodes.redis.apply(&work([namespace])).await.unwrap();
    assert_eq!(nodes.names().await, BTreeSet::new());
    moving.finish().await;
}

#[tokio::test]
async fn a_namespace_is_invalidated_at_a_node_that_is_receiving_its_first_slot() {
    let nodes = Nodes::start(2, 1).await;
    let (all, key) = (&nodes.cluster.nodes, key("{user}:1"));
    // A replica becomes a master without slots.
    let [_, _, empty, _] = all.as_slice() else { panic!("two masters, two replicas") };
    empty.command(&["CLUSTER", "RESET", "SOFT"]).await.unwrap();
    let port = all[0].address().port().to_string();
    empty.command(&["CLUSTER", "MEET", "127.0.0.1", &port]).await.unwrap();
    let name = empty.command(&["CLUSTER", "MYID"]).await.unwrap();
    eventually(SOON, async || {
        for node in &all[..2] {
            let table = node.command(&["CLUSTER", "NODES"]).await.unwrap();
            if !table.lines().any(|line| line.starts_with(&name) && line.contains("master")) {
                return Err(table);
            }
        }
        let table = empty.command(&["CLUSTER", "NODES"]).await.unwrap();
        if table.lines().count() == 4 && !table.contains("handshake") { Ok(()) } else { Err(table) }
    })
    .await;
    nodes.cluster.wait_until_ready().await.unwrap();
    let moving = Move::between(&nodes, &key, 2).await;
    moving.put("{user}:1", "old", At::Target).await;
    moving.put("\u{1f}g:{user}:2", "L7", At::Target).await;
    let namespace = committed(&[&crate::support::key("{user}:")], Change::Namespace, &[7]);
    nodes.redis.apply(&work([namespace])).await.unwrap();
    assert_eq!(empty.command(&["DBSIZE"]).await.unwrap(), "0");
}

#[tokio::test]
async fn a_key_that_moves_behind_the_search_for_its_namespace_is_found_all_the_same() {
    const KEYS: usize = 3_000;
    let nodes = Nodes::start(2, 0).await;
    let all = &nodes.cluster.nodes;
    // Nodes are searched in the order of their addresses; the target comes first, and takes a while.
    let first = usize::from(all[1].address() < all[0].address());
    let tag = (0..).map(|n| format!("{{{n}}}"));
    let owner = async |tag: &str| all[0].command(&["GET", tag]).await.map_or(1, |_| 0);
    let (mut there, mut here) = (None, None);
    for tag in tag {
        match owner(&tag).await == first {
            true => there = Some(tag),
            false => here = Some(tag),
        }
        if there.is_some() && here.is_some() {
            break;
        }
    }
    let (there, here) = (there.unwrap(), here.unwrap());
    let put = async |node: &devstack::Redis, tag: &str, kind: &str, count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("{tag}:{kind}:{n}")).collect();
        for some in names.chunks(1_000) {
            let mut command = vec!["MSET"];
            some.iter().for_each(|name| command.extend([name.as_str(), "v"]));
            node.command(&command).await.unwrap();
        }
        names
    };
    put(&all[first], &there, "unrelated", 40_000).await;
    for round in 0..3 {
        let names = put(&all[1 - first], &here, "moved", KEYS).await;
        let moving = Move::between(&nodes, &key(&here), first).await;
        let namespace = key(&format!("{here}:moved:"));
        let apply = async {
            let event = committed(&[&namespace], Change::Namespace, &[7]);
            nodes.redis.apply(&work([event])).await.unwrap();
        };
        let migrate = async {
            let port = moving.target.address().port().to_string();
            for some in names.chunks(20) {
                let mut command = vec!["MIGRATE", "127.0.0.1", port.as_str(), "", "0", "5000", "KEYS"];
                command.extend(some.iter().map(String::as_str));
                moving.source.command(&command).await.unwrap();
            }
        };
        tokio::join!(apply, migrate);
        let left = nodes.names().await;
        let left: Vec<&String> = left.iter().filter(|name| name.starts_with(namespace.as_str())).collect();
        assert!(left.is_empty(), "round {round}: {} left", left.len());
        moving.abort().await;
    }
}

#[tokio::test]
async fn marks_can_be_set_and_removed_in_a_moving_slot_and_move_with_it() {
    let nodes = Nodes::start(3, 0).await;
    let redis = &nodes.redis;
    let others = others();
    // The other transaction has marked the key before the slot began to move; what of that has gone ahead?
    for (nth, gone_ahead) in
        [&[][..], &["m"], &["marks"], &["m", "marks"], &["g", "value"]].into_iter().enumerate()
    {
        let key = key(&format!("user:{nth}"));
        let keys: Vec<CacheKey> = all_of(&key, &others).into_iter().cloned().collect();
        redis.mark(std::slice::from_ref(&key), mark(5)).await.unwrap();
        let registered = nodes.names().await;
        let moving = Move::begin(&nodes, &key).await;
        for name in registered.iter().filter(|name| {
            gone_ahead.contains(&"m") && name.starts_with("\u{1f}m{")
                || gone_ahead.contains(&"marks") && name.starts_with("\u{1f}marks")
        }) {
            moving.migrate(name).await;
        }
        if gone_ahead.contains(&"value") {
            // By a client that does not keep to the protocol.
            moving.put(key.as_str(), "foreign", At::Target).await;
            moving.put(&format!("\u{1f}g{{{key}}}"), "V1", At::Target).await;
        }
        redis.mark(&keys, mark(7)).await.unwrap();
        assert!(!nodes.names().await.contains(key.as_str()));
        let cache = Cache::new(redis.clone(), CacheConfig::default());
        assert_eq!(cache.get_or_load(&key, MINUTE, || find(3)).await, Ok(3));
        assert!(!nodes.names().await.contains(key.as_str()));
        let orphans = eventually(SOON, async || {
            let orphans = orphans(redis, Duration::from_millis(1)).await;
            (orphans.len() == keys.len() + 1).then_some(orphans)
        })
        .await;
        assert!(orphans.contains(&(key.clone(), 5)) && orphans.contains(&(key.clone(), 7)));

        // One mark goes while the slot moves, the other afterwards.
        // A mark that the first attempt has removed before the slot was found to be moving is not counted.
        let removed = redis.unmark(&keys, mark(7)).await.unwrap();
        assert!([0, 1].contains(&(keys.len() as u64 - removed)), "{removed}");
        moving.finish().await;
        let acquire = async || redis.acquire(&key, LeaseToken::generate(), MINUTE, false).await.unwrap();
        assert_eq!(acquire().await, Acquired::Bypass);
        let applied = eventually(SOON, async || redis.apply(&work([deleted(&[&key], &[5])])).await).await;
        assert_eq!(applied.unmarked, 1, "{gone_ahead:?}");
        assert_eq!(nodes.names().await, BTreeSet::new(), "{gone_ahead:?}");
        eventually(SOON, async || matches!(acquire().await, Acquired::Grant(_))).await;
        redis.invalidate(std::slice::from_ref(&key)).await.unwrap();
    }
}

#[tokio::test]
async fn an_event_removes_the_mark_of_a_dead_writer_in_a_moving_slot() {
    let nodes = Nodes::start(3, 0).await;
    for (nth, migrated) in [false, true].into_iter().enumerate() {
        let key = key(&format!("user:{nth}"));
        nodes.redis.mark(std::slice::from_ref(&key), mark(7)).await.unwrap();
        let names = nodes.names().await;
        let moving = Move::begin(&nodes, &key).await;
        for name in names.iter().filter(|_| migrated) {
            moving.migrate(name).await;
        }
        assert_eq!(nodes.redis.apply(&work([deleted(&[&key], &[7])])).await.unwrap().unmarked, 1);
        assert_eq!(nodes.names().await, BTreeSet::new());
        moving.finish().await;
    }
}

#[tokio::test]
async fn readers_load_what_is_in_a_moving_slot_and_find_everything_else() {
    let nodes = Nodes::start(3, 0).await;
    let (cache, loads) = (Cache::new(nodes.redis.clone(), CacheConfig::default()), Loads::default());
    let others: Vec<String> = others().iter().map(ToString::to_string).collect();
    for key in others.iter().map(String::as_str).chain(["{t}:source", "{t}:target"]) {
        cache.get_or_load(key, MINUTE, || loads.find(1)).await.unwrap();
    }
    let moving = Move::begin(&nodes, &key("{t}")).await;
    moving.migrate("{t}:target").await;
    let before = loads.count();
    // More often than the breaker forgives.
    for _ in 0..10 {
        assert_eq!(cache.get_or_load("{t}:missing", MINUTE, || loads.find(2)).await, Ok(2));
        assert_eq!(cache.get_or_load("{t}:source", MINUTE, || loads.find(2)).await, Ok(1));
        assert_eq!(cache.get_or_load("{t}:target", MINUTE, || loads.find(2)).await, Ok(1));
        let keys: Vec<String> =
            others.iter().cloned().chain(["{t}:target", "{t}:missing"].map(str::to_owned)).collect();
        let read = cache
            .get_many(&keys, MINUTE, |missing: Vec<&String>| {
                assert_eq!(missing, ["{t}:missing"]);
                find(HashMap::from([("{t}:missing".to_owned(), 2)]))
            })
            .await
            .unwrap();
        assert_eq!(read.iter().flatten().sum::<i32>(), 21 + 2);
    }
    assert_eq!(loads.count() - before, 10);
    nodes.redis.store_position("redis", b"record").await.unwrap();
    moving.finish().await;
    eventually(SOON, async || {
        cache.get_or_load("{t}:missing", MINUTE, || loads.find(2)).await.unwrap();
        !nodes.names().await.is_disjoint(&BTreeSet::from(["{t}:missing".to_owned()]))
    })
    .await;
}

#[tokio::test]
async fn many_at_once_do_not_take_each_others_leave_to_ask_at_the_target() {
    let nodes = Nodes::start(3, 0).await;
    let moving = Move::begin(&nodes, &key("{t}")).await;
    let keys: Vec<CacheKey> = (0..50).map(|n| key(&format!("{{t}}:{n}"))).collect();
    for (nth, key) in keys.iter().enumerate() {
        moving.put(key.as_str(), "old", EVERYWHERE[nth % 3]).await;
    }
    let read_on = async {
        let reads = keys.iter().map(|key| nodes.redis.invalidate(std::slice::from_ref(key)));
        for outcome in join_all(reads).await {
            outcome.unwrap();
        }
    };
    let marks = async {
        for outcome in
            join_all(keys.iter().map(|key| nodes.redis.mark(std::slice::from_ref(key), mark(7)))).await
        {
            outcome.unwrap();
        }
    };
    let position = async {
        for _ in 0..50 {
            nodes.redis.store_position("{t}", b"record").await.unwrap();
        }
    };
    tokio::join!(read_on, marks, position);
    assert!(nodes.names().await.iter().all(|name| !name.starts_with("{t}")));
    assert_eq!(nodes.redis.unmark(&keys, mark(7)).await.unwrap(), 50);
    assert_eq!(nodes.names().await.len(), 1, "the position");
    moving.finish().await;
}
