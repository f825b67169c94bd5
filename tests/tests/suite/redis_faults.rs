//! Redis is down, full, comes back with old data, fails over, or is a cluster.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cache::{Acquired, Fill, LeaseToken, Mark};
use devstack::proxy::{FaultProxy, Mode};
use devstack::{RedisCluster, RedisReplicaPair, eventually};
use event::CacheKey;
use outbox::{Event, Marks, TransactionId};
use tests::{Pair, PairOptions};

#[tokio::test(flavor = "multi_thread")]
async fn redis_down_and_back_loses_nothing_and_nothing_is_set_aside() {
    let subscriber = vec![("SUBSCRIBER_ACK_WAIT", "2s".to_owned())];
    let mut options = PairOptions { subscriber, ..Default::default() };
    options.stack.redis.append_only = true;
    let pair = Pair::start_with(options).await.unwrap();
    pair.fill_many("down", 0..200).await.unwrap();
    pair.stack.redis.kill().unwrap();
    for number in 0..200 {
        pair.enqueue(&[&format!("down:{number}")]).await.unwrap();
    }
    pair.until_outbox_empty().await;
    let reason = pair.subscriber.until_not_ready().await;
    assert!(reason.contains("Redis"), "{reason}");
    pair.stack.redis.start().await.unwrap();
    pair.until_none("down:*").await;
    pair.subscriber.until_ready().await;
    assert!(pair.subscriber.metric("subscriber_dead_letters_total").await.unwrap() < 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_while_redis_is_down_is_counted() {
    let pair = Pair::start().await.unwrap();
    let waiting = async |subscriber: &tests::Daemon| {
        let pending = subscriber.metric("subscriber_pending_messages").await.unwrap();
        pending + subscriber.metric("subscriber_ack_pending_messages").await.unwrap()
    };
    pair.enqueue(&["first"]).await.unwrap();
    pair.until_recorded().await;
    assert!(waiting(&pair.subscriber).await < 1.0);
    pair.stack.redis.kill().unwrap();
    // One message after the other, or the relay might put two events in one.
    for number in 1..=3 {
        pair.enqueue(&[&format!("waits:{number}")]).await.unwrap();
        eventually(Duration::from_secs(60), async || waiting(&pair.subscriber).await >= f64::from(number))
            .await;
    }
    // A subscriber that starts now does not know Redis, but it knows the stream.
    let another = pair.another_subscriber(&[]).unwrap();
    eventually(Duration::from_secs(60), async || {
        another.get("/metrics").await.is_ok() && waiting(&another).await >= 3.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_killed_while_redis_hangs_has_acknowledged_nothing() {
    // Redis is the same afterwards, so no replay makes up for a message that was acknowledged too early.
    let subscriber =
        vec![("SUBSCRIBER_ACK_WAIT", "2s".to_owned()), ("SUBSCRIBER_REDIS_TIMEOUT", "500ms".to_owned())];
    let pair = Pair::start_with(PairOptions { subscriber, ..Default::default() }).await.unwrap();
    pair.fill_many("hang", 0..50).await.unwrap();
    pair.enqueue(&["warm-up"]).await.unwrap();
    pair.until_recorded().await;
    pair.stack.redis.stop().unwrap();
    for number in 0..50 {
        pair.enqueue(&[&format!("hang:{number}")]).await.unwrap();
    }
    pair.until_outbox_empty().await;
    eventually(Duration::from_secs(30), async || {
        pair.subscriber.metric("subscriber_redis_failures_total").await.is_ok_and(|failures| failures >= 2.0)
    })
    .await;
    pair.subscriber.process().kill().unwrap();
    pair.stack.redis.resume().unwrap();
    pair.subscriber.process().start().unwrap();
    pair.until_none("hang:*").await;
    assert!(!pair.subscriber.process().log().contains("replaying the stream"));
}

/// Keeps Redis busy for a number of turns. Not for a time: since 7.2 time stands still in a script.
const SPIN: &str = "local n = 0 for i = 1, tonumber(ARGV[1]) do n = n + i % 7 end return n";

/// Returns how many turns of [`SPIN`] take so long.
async fn turns_in(pair: &Pair, time: Duration) -> String {
    const TURNS: f64 = 2_000_000.0;
    let started = Instant::now();
    pair.stack.redis.command(&["EVAL", SPIN, "0", &TURNS.to_string()]).await.unwrap();
    format!("{:.0}", TURNS * time.as_secs_f64() / started.elapsed().as_secs_f64())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_has_not_answered_is_not_acknowledged_however_often_it_was_tried() {
    let pair = Pair::start().await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    let proxy = FaultProxy::start(pair.stack.redis.address()).await.unwrap();
    let variables = [
        ("REDIS_URL", pair.stack.redis.url_through(&proxy)),
        ("SUBSCRIBER_ACK_WAIT", "2s".to_owned()),
        ("SUBSCRIBER_REDIS_TIMEOUT", "100ms".to_owned()),
    ];
    let subscriber = pair.another_subscriber(&variables).unwrap();
    subscriber.until_ready().await;
    pair.fill_many("lost", 0..50).await.unwrap();
    pair.enqueue(&["warm-up"]).await.unwrap();
    pair.until_recorded().await;
    // The requests are lost for good, and Redis is the same afterwards: nothing makes up for what was acknowledged.
    proxy.set_mode(Mode::DropToServer);
    for number in 0..50 {
        pair.enqueue(&[&format!("lost:{number}")]).await.unwrap();
    }
    pair.until_outbox_empty().await;
    let failures = async || subscriber.metric("subscriber_redis_failures_total").await.unwrap_or_default();
    eventually(Duration::from_secs(90), async || failures().await >= 12.0).await;
    subscriber.process().kill().unwrap();
    proxy.set_mode(Mode::Pass);
    assert_eq!(pair.count("lost:*").await.unwrap(), 50);
    subscriber.process().start().unwrap();
    pair.until_none("lost:*").await;
    assert!(!subscriber.process().log().contains("replaying the stream"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_gets_through_a_redis_that_is_too_slow_for_it() {
    let subscriber = vec![("SUBSCRIBER_REDIS_TIMEOUT", "200ms".to_owned())];
    let pair = Pair::start_with(PairOptions { subscriber, ..Default::default() }).await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    pair.fill_many("slow", 0..20_000).await.unwrap();
    for half in [0..10_000, 10_000..20_000] {
        let keys: Vec<String> = half.map(|number| format!("slow:{number}")).collect();
        pair.enqueue(&keys.iter().map(String::as_str).collect::<Vec<_>>()).await.unwrap();
    }
    pair.until_outbox_empty().await;
    let applied = AtomicBool::new(false);
    let turns = turns_in(&pair, Duration::from_millis(20)).await;
    // Redis reads 16 KiB of each connection at a time, and then lets the others have their turn.
    let busy = async || {
        while !applied.load(Ordering::Relaxed) {
            pair.stack.redis.command(&["EVAL", SPIN, "0", &turns]).await.unwrap();
        }
    };
    let invalidated = async {
        pair.subscriber.process().start().unwrap();
        pair.until_none("slow:*").await;
        pair.subscriber.until_ready().await;
        let failures = pair.subscriber.metric("subscriber_redis_failures_total").await.unwrap();
        applied.store(true, Ordering::Relaxed);
        failures
    };
    let (failures, ..) = tokio::join!(invalidated, busy(), busy(), busy(), busy());
    assert!(failures >= 1.0, "Redis was not slow");
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_come_back_with_an_old_snapshot_are_removed_by_a_replay() {
    let pair = Pair::start().await.unwrap();
    pair.fill("untouched").await.unwrap();
    pair.fill_many("snapshot", 0..50).await.unwrap();
    pair.enqueue(&["warm-up"]).await.unwrap();
    pair.until_recorded().await;
    pair.stack.redis.save_snapshot().await.unwrap();
    for number in 0..50 {
        pair.enqueue(&[&format!("snapshot:{number}")]).await.unwrap();
    }
    pair.until_none("snapshot:*").await;
    pair.until_recorded().await;
    pair.stack.redis.kill().unwrap();
    pair.stack.redis.restore_snapshot().unwrap();
    pair.stack.redis.start().await.unwrap();
    pair.until_none("snapshot:*").await;
    assert!(pair.is_cached("untouched").await.unwrap(), "the old snapshot was not loaded");
    assert!(pair.subscriber.process().log().contains("replaying the stream"));
}

#[tokio::test(flavor = "multi_thread")]
async fn old_snapshot_is_noticed_by_a_subscriber_that_was_away_as_well() {
    let pair = Pair::start().await.unwrap();
    pair.fill("untouched").await.unwrap();
    pair.fill_many("snapshot", 0..50).await.unwrap();
    pair.enqueue(&["warm-up"]).await.unwrap();
    pair.until_recorded().await;
    pair.stack.redis.save_snapshot().await.unwrap();
    for number in 0..50 {
        pair.enqueue(&[&format!("snapshot:{number}")]).await.unwrap();
    }
    pair.until_none("snapshot:*").await;
    pair.until_recorded().await;
    pair.subscriber.process().kill().unwrap();
    pair.stack.redis.kill().unwrap();
    pair.stack.redis.restore_snapshot().unwrap();
    pair.stack.redis.start().await.unwrap();
    assert_eq!(pair.count("snapshot:*").await.unwrap(), 50);
    pair.subscriber.process().start().unwrap();
    pair.until_none("snapshot:*").await;
    assert!(pair.is_cached("untouched").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn promoted_replica_that_lagged_is_replayed_to() {
    let pair = Pair::start().await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    let redis = RedisReplicaPair::start_with_sentinel().await.unwrap();
    let sentinel = redis.sentinel.as_ref().unwrap().address();
    let url = format!("redis+sentinel://{sentinel}/{}", RedisReplicaPair::MASTER_NAME);
    let variables = [
        ("REDIS_URL", url),
        ("SUBSCRIBER_DURABLE", "pair".to_owned()),
        // The record that the replica has says how old its data is, not the margin.
        ("SUBSCRIBER_REPLAY_MARGIN", "1s".to_owned()),
    ];
    let subscriber = pair.another_subscriber(&variables).unwrap();
    subscriber.until_ready().await;
    redis.primary.command(&["MSET", "lag:1", "old", "lag:2", "old", "kept", "value"]).await.unwrap();
    redis.wait_in_sync().await.unwrap();

    // The replica misses the deletes and is promoted.
    redis.replica.stop().unwrap();
    // Without this they would wait in its socket and be carried out when it goes on.
    assert_eq!(redis.primary.command(&["CLIENT", "KILL", "TYPE", "replica"]).await.unwrap(), "1");
    pair.enqueue(&["lag:1", "lag:2"]).await.unwrap();
    eventually(Duration::from_secs(30), async || {
        redis.primary.command(&["EXISTS", "lag:1", "lag:2"]).await.is_ok_and(|n| n == "0")
    })
    .await;
    let end = Instant::now() + Duration::from_secs(6);
    while Instant::now() < end {
        pair.enqueue(&["other"]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    redis.primary.kill().unwrap();
    redis.replica.resume().unwrap();
    eventually(Duration::from_secs(60), async || {
        let role = redis.replica.command(&["ROLE"]).await.map_err(|error| format!("{error:#}"))?;
        if role.starts_with("master") { Ok(()) } else { Err(role) }
    })
    .await;
    eventually(Duration::from_secs(60), async || {
        let left = redis
            .replica
            .command(&["EXISTS", "lag:1", "lag:2"])
            .await
            .map_err(|error| format!("{error:#}"))?;
        if left == "0" { Ok(()) } else { Err(format!("{left} stale keys; {}", subscriber.process().log())) }
    })
    .await;
    assert_eq!(redis.replica.command(&["EXISTS", "kept"]).await.unwrap(), "1");
}

const MINUTE: Duration = Duration::from_secs(60);

/// Of values that must not disappear by themselves.
const HOUR: Duration = Duration::from_secs(3600);

async fn enqueue(pair: &Pair, event: &Event) -> TransactionId {
    let mut tx = pair.pool.begin().await.unwrap();
    outbox::enqueue(&mut tx, event).await.unwrap();
    let transaction = outbox::transaction_id(&mut tx).await.unwrap();
    tx.commit().await.unwrap();
    transaction
}

async fn set_memory_limit(redis: &devstack::Redis, bytes: &str) {
    redis.command(&["CONFIG", "SET", "maxmemory", bytes]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_that_restarts_while_redis_is_full_goes_on_with_every_kind_of_event() {
    let pair = Pair::start().await.unwrap();
    let redis = pair.cache().unwrap();
    pair.enqueue(&["warm-up"]).await.unwrap();
    pair.until_recorded().await;
    pair.subscriber.process().terminate().await.unwrap();
    pair.fill_many("full", 0..50).await.unwrap();
    pair.fill_many("space", 0..50).await.unwrap();
    let updated = CacheKey::new("updated").unwrap();
    let lease = redis.acquire(&updated, LeaseToken::generate(), MINUTE, false).await.unwrap();
    let Acquired::Grant(lease) = lease else { panic!("{lease:?}") };
    let fill = Fill { value: b"one", ttl: HOUR, version: Some(1), keep_stale_copy: false };
    assert!(redis.fill(&updated, &lease, fill).await.unwrap());
    let marked = Event::delete(["marked"]).unwrap();
    let transaction = enqueue(&pair, &marked).await;
    Marks::new(redis.clone(), &[marked], transaction).set(MINUTE).await.unwrap();

    // No policy is set, so nothing is evicted, and much more is in use.
    set_memory_limit(&pair.stack.redis, "1").await;
    assert!(pair.fill("refused").await.unwrap_err().to_string().contains("OOM"));
    let refused =
        redis.mark(&[CacheKey::new("unmarked").unwrap()], Mark::generate(transaction)).await.unwrap_err();
    assert!(refused.is_out_of_memory(), "{refused:?}");
    let keys: Vec<String> = (0..50).map(|number| format!("full:{number}")).collect();
    pair.enqueue(&keys.iter().map(String::as_str).collect::<Vec<_>>()).await.unwrap();
    enqueue(&pair, &Event::update("updated", "two", 2, HOUR).unwrap()).await;
    enqueue(&pair, &Event::delete_namespaces(["space:"]).unwrap()).await;
    pair.until_outbox_empty().await;
    pair.subscriber.process().start().unwrap();
    for pattern in ["full:*", "updated", "space:*", "\u{1f}[gm]*"] {
        pair.until_none(pattern).await;
    }
    let log = || pair.subscriber.process().log();
    eventually(MINUTE, async || if log().contains("Redis is full") { Ok(()) } else { Err(log()) }).await;
    pair.subscriber.until_ready().await;

    set_memory_limit(&pair.stack.redis, "0").await;
    pair.until_recorded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_without_a_record_waits_for_room_in_a_redis_that_is_full() {
    let pair = Pair::start().await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    pair.fill("kept").await.unwrap();
    set_memory_limit(&pair.stack.redis, "1").await;
    pair.enqueue(&["kept"]).await.unwrap();
    let other = pair.another_subscriber(&[("SUBSCRIBER_DURABLE", "other".to_owned())]).unwrap();
    let reason = other.until_not_ready_because("Redis is full (maxmemory)").await;
    assert!(reason.contains("make room"), "{reason}");
    assert!(pair.is_cached("kept").await.unwrap());
    set_memory_limit(&pair.stack.redis, "0").await;
    pair.until_none("kept").await;
    other.until_ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eviction_policy_that_is_changed_while_the_subscriber_runs_is_noticed() {
    let pair = Pair::start().await.unwrap();
    let evictable = async || pair.subscriber.metric("subscriber_marks_evictable").await.unwrap();
    assert!(evictable().await < 1.0);
    let set = async |policy| pair.stack.redis.command(&["CONFIG", "SET", "maxmemory-policy", policy]).await;
    set("allkeys-lru").await.unwrap();
    eventually(MINUTE, async || evictable().await > 0.0).await;
    assert!(pair.subscriber.process().log().contains("maxmemory-policy allkeys-lru"));
    set("volatile-ttl").await.unwrap();
    eventually(MINUTE, async || evictable().await < 1.0).await;
}

/// How many `spread:*` keys the masters of the cluster hold together.
async fn spread(cluster: &RedisCluster) -> Result<usize, String> {
    let mut count = 0;
    for node in &cluster.nodes {
        if !node.is_running() {
            continue;
        }
        let text = |error: anyhow::Error| format!("{error:#}");
        if node.command(&["ROLE"]).await.map_err(text)?.starts_with("master") {
            let keys = node.command(&["KEYS", "spread:*"]).await.map_err(text)?;
            count += keys.lines().filter(|line| !line.is_empty()).count();
        }
    }
    Ok(count)
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_cluster_is_invalidated_over_all_slots_and_survives_a_killed_primary() {
    let pair = Pair::start().await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    let cluster = RedisCluster::start(3, 1).await.unwrap();
    let hosts: Vec<String> = cluster.nodes.iter().map(|node| node.address().to_string()).collect();
    let url = format!("redis+cluster://{}", hosts.join(","));
    let subscriber = pair
        .another_subscriber(&[("REDIS_URL", url.clone()), ("SUBSCRIBER_DURABLE", "cluster".to_owned())])
        .unwrap();
    subscriber.until_ready().await;
    let keys: Vec<String> = (0..300).map(|number| format!("spread:{number}")).collect();
    fill_cluster(&cluster, &keys).await;
    assert_eq!(spread(&cluster).await.unwrap(), 300);
    for some in keys.chunks(50) {
        pair.enqueue(&some.iter().map(String::as_str).collect::<Vec<_>>()).await.unwrap();
    }
    until_spread_is_gone(&cluster, &subscriber).await;

    fill_cluster(&cluster, &keys).await;
    // Acknowledged by the replicas too, so that the one that takes over has the values.
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.nodes[0].kill().unwrap();
    for some in keys.chunks(50) {
        pair.enqueue(&some.iter().map(String::as_str).collect::<Vec<_>>()).await.unwrap();
    }
    until_spread_is_gone(&cluster, &subscriber).await;
    subscriber.until_ready().await;
}

async fn until_spread_is_gone(cluster: &RedisCluster, subscriber: &tests::Daemon) {
    eventually(Duration::from_secs(90), async || match spread(cluster).await {
        Ok(0) => Ok(()),
        other => Err(format!("{other:?} left; log:\n{}", subscriber.process().log())),
    })
    .await;
}

/// Sets every key on the node that owns its slot: the others refuse.
async fn fill_cluster(cluster: &RedisCluster, keys: &[String]) {
    for key in keys {
        let mut owners = 0;
        for node in &cluster.nodes {
            if node.command(&["SET", key, "cached"]).await.is_ok() {
                owners += 1;
                break;
            }
        }
        assert_eq!(owners, 1, "no node takes {key}");
    }
}
