//! The rights that the README grants to services and subscribers on Redis are enough for everything they do.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use cache::{Acquired, Cache, CacheConfig, LeaseToken, Options, Raw, RedisConfig, RedisError};
use devstack::{
    Redis, RedisCluster, RedisOptions, RedisReplicaPair, StackDirectory, StackOptions, eventually,
};
use outbox::{CacheKey, Event, Marks, Writer};
use sqlx::{Postgres, Transaction};
use tests::{Daemon, Pair, PairOptions, SETTLED};

const MINUTE: Duration = Duration::from_secs(60);

/// The users of the README as lines of a configuration file, so that they are there after a restart.
fn users() -> String {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("crates/cache/README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let (_, rest) = readme.split_once("<!-- acl:begin -->").unwrap();
    let (block, _) = rest.split_once("<!-- acl:end -->").unwrap();
    let lines = block.lines().filter_map(|line| line.strip_prefix("ACL SETUSER "));
    let users: Vec<String> = lines.map(|rules| format!("user {rules}\n")).collect();
    assert_eq!(users.len(), 2, "a service and a subscriber: {users:?}");
    users.concat()
}

fn options() -> RedisOptions {
    RedisOptions { configuration: users(), ..Default::default() }
}

fn service(url: &str) -> cache::Redis {
    cache::Redis::new(RedisConfig { url: url.to_owned(), ..Default::default() }).unwrap()
}

fn with_user(url: &str, user: &str) -> String {
    url.replace("://", &format!("://{user}:secret@"))
}

async fn begin(pair: &Pair) -> Transaction<'static, Postgres> {
    pair.pool.begin().await.unwrap()
}

async fn enqueue(pair: &Pair, event: &Event) -> outbox::Xid {
    let mut tx = begin(pair).await;
    let receipt = outbox::enqueue(&mut tx, event).await.unwrap();
    tx.commit().await.unwrap();
    receipt.xid
}

/// What Redis denied.
async fn denials(servers: &[&Redis]) -> String {
    let mut log = String::new();
    for server in servers {
        log.push_str(&server.command(&["ACL", "LOG"]).await.unwrap());
    }
    log
}

/// Every kind of read and of write that a service makes.
async fn be_a_service(pair: &Pair, redis: &cache::Redis) {
    let cache = Cache::new(redis.clone(), CacheConfig::default());
    redis.ping().await.unwrap();
    for _ in 0..2 {
        let load = || async { Ok::<_, std::io::Error>(7_u32) };
        assert_eq!(cache.get_or_load("user:1", MINUTE, load).await.unwrap(), 7);
    }
    let failed = async || Err::<u32, _>(std::io::Error::other("no database"));
    assert!(cache.get_or_load("user:none", MINUTE, failed).await.is_err());
    let keys = ["user:1", "user:2", "order:1"];
    let load = async |missing: Vec<&&str>| {
        Ok::<_, std::io::Error>(
            missing.into_iter().map(|key| ((*key).to_owned(), 8_u32)).collect::<HashMap<_, _>>(),
        )
    };
    assert_eq!(cache.get_many(&keys, MINUTE, load).await.unwrap(), [Some(7), Some(8), Some(8)]);
    // With a stale copy, which is read when the value is gone and somebody else is loading.
    let options = Options::<Raw> { ttl: MINUTE, stale_for: Some(MINUTE), ..Default::default() };
    let load = || async { Ok::<_, std::io::Error>(b"stale".to_vec()) };
    let read: Vec<u8> = cache.get_or_load_with("user:3", &options, load).await.unwrap();
    assert_eq!(read, b"stale");
    let key = CacheKey::new("user:3").unwrap();
    redis.invalidate(std::slice::from_ref(&key)).await.unwrap();
    let acquired = redis.acquire(&key, LeaseToken::generate(), MINUTE, false).await.unwrap();
    assert!(matches!(acquired, Acquired::Grant(_)), "{acquired:?}");
    let read: Vec<u8> = cache.get_or_load_with("user:3", &options, load).await.unwrap();
    assert_eq!(read, b"stale");

    let writer = Writer::new(redis.clone());
    let event = || [Event::delete(["user:1", "order:1"]).unwrap()];
    assert!(writer.commit_strict(begin(pair).await, &event()).await.unwrap().finished);
    let _ = writer.commit_and_invalidate(begin(pair).await, &event()).await.unwrap();
}

/// Events of every kind, and a mark that its writer left behind.
async fn give_work(pair: &Pair, redis: &cache::Redis, subscriber: &Daemon) {
    let cache = Cache::new(redis.clone(), CacheConfig::default());
    let load = || async { Ok::<_, std::io::Error>(cache::Loaded::versioned(b"one".to_vec(), 1)) };
    let raw = Options::<Raw> { ttl: MINUTE, ..Default::default() };
    let _: Vec<u8> = cache.get_or_load_versioned("user:4", &raw, load).await.unwrap();
    enqueue(pair, &Event::update("user:4", "two", 2, MINUTE).unwrap()).await;
    eventually(SETTLED, async || {
        let never = || async { Err::<Vec<u8>, _>(std::io::Error::other("not cached")) };
        cache.get_or_load_with("user:4", &raw, never).await.is_ok_and(|value: Vec<u8>| value == b"two")
    })
    .await;

    // The time to live of a stale copy is cut down by the event.
    let stale = Options::<Raw> { ttl: MINUTE, stale_for: Some(MINUTE), ..Default::default() };
    let load = || async { Ok::<_, std::io::Error>(b"stale".to_vec()) };
    let _: Vec<u8> = cache.get_or_load_with("user:6", &stale, load).await.unwrap();
    enqueue(pair, &Event::delete(["user:6"]).unwrap()).await;

    let mut tx = begin(pair).await;
    let abandoned = [Event::delete(["user:5"]).unwrap()];
    outbox::enqueue(&mut tx, &abandoned[0]).await.unwrap();
    let transaction = outbox::transaction_id(&mut tx).await.unwrap();
    Marks::new(redis.clone(), &abandoned, transaction).set(MINUTE).await.unwrap();
    tx.rollback().await.unwrap();
    eventually(SETTLED, async || {
        let resolved = subscriber.metric("subscriber_marks_resolved_total").await.unwrap();
        if resolved >= 1.0 { Ok(()) } else { Err(subscriber.process().log()) }
    })
    .await;

    // A namespace removes what is left, the stale copies and leases too.
    enqueue(pair, &Event::delete_namespaces(["user:", "order:"]).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_the_readme_may_do_all_that_services_and_subscribers_do() {
    let stack = StackOptions { redis: options(), ..Default::default() };
    let pair = Pair::start_with(PairOptions { stack, ..Default::default() }).await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    let url = pair.stack.redis_url();
    let variables = [("REDIS_URL", with_user(&url, "subscriber"))];
    let subscriber = pair.another_subscriber(&variables).unwrap();
    let redis = service(&with_user(&url, "service"));
    subscriber.until_ready().await;
    // With a database number.
    service(&format!("{}/2", with_user(&url, "service"))).ping().await.unwrap();
    let numbered = [("REDIS_URL", format!("{}/2", with_user(&url, "subscriber")))];
    let other = [&numbered[..], &[("SUBSCRIBER_DURABLE", "numbered".to_owned())]].concat();
    pair.another_subscriber(&other).unwrap().until_ready().await;

    be_a_service(&pair, &redis).await;
    give_work(&pair, &redis, &subscriber).await;
    pair.until_none("user:*").await;
    pair.until_none("order:*").await;
    pair.until_none("\u{1f}[gs]?user*").await;
    pair.until_recorded().await;
    assert_eq!(denials(&[&pair.stack.redis]).await, "");

    // A restart is noticed, snapshots are asked about, and the stream is replayed.
    pair.stack.redis.kill().unwrap();
    pair.stack.redis.start().await.unwrap();
    eventually(SETTLED, async || {
        let log = subscriber.process().log();
        if log.contains("replayed the stream") { Ok(()) } else { Err(log) }
    })
    .await;
    subscriber.until_ready().await;
    assert_eq!(denials(&[&pair.stack.redis]).await, "");
    // They have no right beyond that.
    eventually(SETTLED, async || {
        let flushed = redis.delete_matching(&["user:*".to_owned()]).await;
        if matches!(flushed, Err(RedisError::Refused { .. })) { Ok(()) } else { Err(format!("{flushed:?}")) }
    })
    .await;
    assert!(denials(&[&pair.stack.redis]).await.contains("scan"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_the_user_may_not_touch_hold_up_no_others_and_go_when_it_may() {
    let stack = StackOptions { redis: options(), ..Default::default() };
    let pair = Pair::start_with(PairOptions { stack, ..Default::default() }).await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    pair.fill_many("user", 0..100).await.unwrap();
    pair.fill_many("product", 0..4).await.unwrap();
    // More than there are workers, and together with keys that may go.
    for number in 0..4 {
        let keys = [format!("user:{number}"), format!("product:{number}"), format!("user:{}", number + 50)];
        enqueue(&pair, &Event::delete(keys).unwrap()).await;
    }
    pair.until_outbox_empty().await;
    let variables = [("REDIS_URL", with_user(&pair.stack.redis_url(), "subscriber"))];
    let subscriber = pair.another_subscriber(&variables).unwrap();
    for number in (4..50).chain(54..100) {
        enqueue(&pair, &Event::delete([format!("user:{number}")]).unwrap()).await;
    }
    pair.until_none("user:*").await;
    assert_eq!(pair.count("product:*").await.unwrap(), 4);
    let log = subscriber.process().log();
    assert!(log.contains("redis refuses access to \"product:"), "{log}");
    assert!(log.contains("widen the key patterns (~) of its user"), "{log}");

    // Only what is refused is tried again: a key of the same messages that is cached anew stays.
    let failures = async || subscriber.metric("subscriber_redis_failures_total").await.unwrap();
    let before = failures().await;
    pair.fill("user:0").await.unwrap();
    eventually(SETTLED, async || failures().await >= before + 2.0).await;
    assert!(pair.is_cached("user:0").await.unwrap());
    assert!((subscriber.metric("subscriber_refused_keys").await.unwrap() - 4.0).abs() < 0.1);
    let reason = subscriber.until_not_ready_because("product:").await;
    assert!(reason.contains("widen the key patterns"), "{reason}");
    let status = status_of(&subscriber, &variables, &pair).await;
    assert!(status.contains("product:") && status.contains("widen the key patterns"), "{status}");

    pair.stack.redis.command(&["ACL", "SETUSER", "subscriber", "~product:*"]).await.unwrap();
    pair.until_none("product:*").await;
    subscriber.until_ready().await;
    assert!(pair.is_cached("user:0").await.unwrap());
    assert!(subscriber.metric("subscriber_refused_keys").await.unwrap() < 1.0);
}

/// What `subscriber status` prints beside a running subscriber.
async fn status_of(subscriber: &Daemon, variables: &[(&'static str, String)], pair: &Pair) -> String {
    let mut command = tokio::process::Command::new(tests::program("subscriber").unwrap());
    command.arg("status").env("NATS_URL", pair.stack.nats_url());
    command.env("HTTP_ADDR", subscriber.http().to_string()).envs(variables.iter().cloned());
    let output = command.output().await.unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_hold_up_no_single_key_and_are_searched_for_together() {
    let stack = StackOptions { redis: options(), ..Default::default() };
    let pair = Pair::start_with(PairOptions { stack, ..Default::default() }).await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    // A search that does not come to an end.
    pair.stack.redis.command(&["ACL", "SETUSER", "subscriber", "-scan"]).await.unwrap();
    let variables = [("REDIS_URL", with_user(&pair.stack.redis_url(), "subscriber"))];
    let subscriber = pair.another_subscriber(&variables).unwrap();
    subscriber.until_ready().await;
    pair.fill_many("user", 0..100).await.unwrap();
    pair.fill_many("order", 0..5).await.unwrap();
    // More than there are workers.
    for number in 0..5 {
        enqueue(&pair, &Event::delete_namespaces([format!("order:{number}")]).unwrap()).await;
    }
    subscriber.until_not_ready_because("namespaces wait").await;
    for number in 0..100 {
        enqueue(&pair, &Event::delete([format!("user:{number}")]).unwrap()).await;
    }
    pair.until_none("user:*").await;
    assert_eq!(pair.count("order:*").await.unwrap(), 5);
    eventually(SETTLED, async || subscriber.metric("subscriber_waiting_namespaces").await.unwrap() > 4.5)
        .await;
    pair.stack.redis.command(&["ACL", "SETUSER", "subscriber", "+scan"]).await.unwrap();
    pair.until_none("order:*").await;
    subscriber.until_ready().await;
    eventually(SETTLED, async || subscriber.metric("subscriber_ack_pending_messages").await.unwrap() < 1.0)
        .await;
    assert!(subscriber.metric("subscriber_waiting_namespaces").await.unwrap() < 1.0);
    let searches = subscriber.metric("subscriber_namespace_search_seconds_count").await.unwrap();
    assert!((searches - 1.0).abs() < 0.1, "{searches} searches");
    pair.until_recorded().await;
}

/// Leaves the slot of a key between two nodes.
async fn begin_to_move(cluster: &RedisCluster, key: &str) {
    let nodes = &cluster.nodes;
    let slot = nodes[0].command(&["CLUSTER", "KEYSLOT", key]).await.unwrap();
    let mut owners = 0;
    for (source, target) in nodes.iter().zip(nodes.iter().cycle().skip(1)) {
        let name = target.command(&["CLUSTER", "MYID"]).await.unwrap();
        // Others than the owner refuse.
        if source.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &name]).await.is_ok() {
            let name = source.command(&["CLUSTER", "MYID"]).await.unwrap();
            target.command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &name]).await.unwrap();
            owners += 1;
        }
    }
    assert_eq!(owners, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_the_readme_may_do_the_same_in_a_cluster() {
    let pair = Pair::start().await.unwrap();
    pair.subscriber.process().terminate().await.unwrap();
    let directory = StackDirectory::create().unwrap();
    let cluster = RedisCluster::start_in(&directory, 3, 0, options()).await.unwrap();
    let hosts: Vec<String> = cluster.nodes.iter().map(|node| node.address().to_string()).collect();
    let url = |user: &str| with_user(&format!("redis+cluster://{}", hosts.join(",")), user);
    let variables = [("REDIS_URL", url("subscriber")), ("SUBSCRIBER_DURABLE", "cluster".to_owned())];
    let subscriber = pair.another_subscriber(&variables).unwrap();
    let redis = service(&url("service"));
    subscriber.until_ready().await;
    begin_to_move(&cluster, "user:5").await;
    be_a_service(&pair, &redis).await;
    give_work(&pair, &redis, &subscriber).await;
    eventually(SETTLED, async || {
        let mut left = String::new();
        for node in &cluster.nodes {
            left.push_str(&node.command(&["KEYS", "user:*"]).await.map_err(|error| format!("{error:#}"))?);
        }
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    let nodes: Vec<&Redis> = cluster.nodes.iter().collect();
    assert_eq!(denials(&nodes).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_the_readme_may_come_by_way_of_a_sentinel() {
    let servers = RedisReplicaPair::start_with_sentinel().await.unwrap();
    for user in users().lines() {
        let rules = user.replace('"', "").replace("\\x1f", "\u{1f}");
        let mut command = vec!["ACL", "SETUSER"];
        command.extend(rules.split_whitespace().skip(1));
        servers.primary.command(&command).await.unwrap();
    }
    let sentinel = servers.sentinel.as_ref().unwrap().address();
    let url = format!("redis+sentinel://{sentinel}/{}", RedisReplicaPair::MASTER_NAME);
    for user in ["service", "subscriber"] {
        service(&with_user(&url, user)).ping().await.unwrap();
    }
    assert_eq!(denials(&[&servers.primary]).await, "");
}
