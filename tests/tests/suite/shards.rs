//! One node of a Redis Cluster is frozen, killed or failing over: what belongs to the others goes on.

use std::time::{Duration, Instant};

use devstack::{Redis, RedisCluster, RedisOptions, StackDirectory, eventually};
use outbox::Event;
use tests::{Daemon, Pair, SETTLED};

const SLOTS: usize = 16_384;

/// A cluster of three masters, and a subscriber of it beside a pair whose own is not needed.
struct Bed {
    pair: Pair,
    cluster: RedisCluster,
    subscriber: Daemon,
}

impl Bed {
    async fn start(replicas_per_master: usize) -> Self {
        let pair = Pair::start().await.unwrap();
        pair.subscriber.process().terminate().await.unwrap();
        let options = RedisOptions {
            configuration: "cluster-require-full-coverage no\n".to_owned(),
            ..Default::default()
        };
        let directory = StackDirectory::create().unwrap();
        let cluster = RedisCluster::start_in(&directory, 3, replicas_per_master, options).await.unwrap();
        let subscriber = Self::spawn(&pair, &cluster);
        subscriber.until_ready().await;
        Self { pair, cluster, subscriber }
    }

    fn spawn(pair: &Pair, cluster: &RedisCluster) -> Daemon {
        let hosts: Vec<String> = cluster.nodes.iter().map(|node| node.address().to_string()).collect();
        let variables = [
            ("REDIS_URL", format!("redis+cluster://{}", hosts.join(","))),
            ("SUBSCRIBER_DURABLE", "cluster".to_owned()),
            ("SUBSCRIBER_ACK_WAIT", "3s".to_owned()),
        ];
        pair.another_subscriber(&variables).unwrap()
    }

    /// The position of the node that has a key at the beginning.
    async fn owner(&self, key: &str) -> usize {
        let some = self.cluster.nodes.last().unwrap();
        let slot: usize = some.command(&["CLUSTER", "KEYSLOT", key]).await.unwrap().parse().unwrap();
        (0..3).rfind(|index| SLOTS * index / 3 <= slot).unwrap()
    }

    /// Keys of one node.
    async fn keys_of(&self, node: usize, prefix: &str, count: usize) -> Vec<String> {
        let mut keys = Vec::new();
        for number in 0.. {
            let key = format!("{prefix}:{number}");
            if self.owner(&key).await == node {
                keys.push(key);
            }
            if keys.len() == count {
                break;
            }
        }
        keys
    }

    async fn fill(&self, node: &Redis, keys: &[String]) {
        for key in keys {
            node.command(&["SET", key, "cached"]).await.unwrap();
        }
    }

    async fn enqueue(&self, keys: &[&str]) {
        let mut tx = self.pair.pool.begin().await.unwrap();
        outbox::enqueue(&mut tx, &Event::delete(keys.iter().copied()).unwrap()).await.unwrap();
        tx.commit().await.unwrap();
    }

    async fn left(&self, node: &Redis, keys: &[String]) -> Result<usize, String> {
        let mut left = 0;
        for key in keys {
            let exists = node.command(&["EXISTS", key]).await.map_err(|error| format!("{error:#}"))?;
            left += usize::from(exists == "1");
        }
        Ok(left)
    }

    async fn until_gone(&self, node: &Redis, keys: &[String]) {
        eventually(SETTLED, async || match self.left(node, keys).await {
            Ok(0) => Ok(()),
            other => Err(format!("{other:?} left; log:\n{}", self.subscriber.process().log())),
        })
        .await;
    }

    /// Keys of a node that answers go although every message has a key of the one that does not, and more messages than
    /// are ever in hand have nothing but those. Returns the longest time that one took.
    async fn go_on(&self, live: usize, dead: &[String], prefix: &str) -> Duration {
        for key in dead {
            self.enqueue(&[key]).await;
        }
        let node = &self.cluster.nodes[live];
        let mut longest = Duration::ZERO;
        for (key, dead) in self.keys_of(live, prefix, 20).await.iter().zip(dead.iter().cycle()) {
            let key = std::slice::from_ref(key);
            self.fill(node, key).await;
            let began = Instant::now();
            self.enqueue(&[&key[0], dead]).await;
            self.until_gone(node, key).await;
            longest = longest.max(began.elapsed());
        }
        longest
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_or_killed_node_of_a_cluster_holds_up_only_its_own_keys() {
    let bed = Bed::start(0).await;
    // The record of the subscriber is at another node, so that one that starts meanwhile can read it.
    let frozen = (bed.owner("\u{1f}position:cluster").await + 1) % 3;
    let (live, node) = ((frozen + 1) % 3, &bed.cluster.nodes[frozen]);
    let dead = bed.keys_of(frozen, "dead", 300).await;
    bed.fill(node, &dead).await;
    node.stop().unwrap();
    let longest = bed.go_on(live, &dead, "frozen").await;
    println!("frozen: at most {longest:?}");

    let name = node.address().to_string();
    let reason = bed.subscriber.until_not_ready_because(&name).await;
    assert!(reason.contains("leftover keys"), "{reason}");
    let up = format!("subscriber_redis_node_up{{node=\"{name}\"}}");
    eventually(SETTLED, async || {
        let (_, text) = bed.subscriber.get("/metrics").await.map_err(|error| error.to_string())?;
        text.lines().any(|line| line == format!("{up} 0")).then_some(()).ok_or(text)
    })
    .await;
    assert!(bed.subscriber.metric("subscriber_held_messages").await.unwrap() > 1.0);

    // One that starts meanwhile works too.
    bed.subscriber.process().terminate().await.unwrap();
    let another = Bed::spawn(&bed.pair, &bed.cluster);
    let started = bed.go_on(live, &dead[..1], "started").await;
    println!("started meanwhile: at most {started:?}");

    node.resume().unwrap();
    bed.until_gone(node, &dead).await;
    another.until_ready().await;
    eventually(SETTLED, async || {
        another.metric("subscriber_held_messages").await.unwrap() < 1.0
            && another.metric("subscriber_ack_pending_messages").await.unwrap() < 1.0
    })
    .await;
    assert!(!another.process().log().contains("replaying the stream"), "{}", another.process().log());

    node.kill().unwrap();
    let killed = bed.go_on(live, &dead, "killed").await;
    println!("killed: at most {killed:?}");
    node.start().await.unwrap();
    another.until_ready().await;
    bed.until_gone(node, &dead).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_in_a_cluster_holds_up_only_the_keys_of_its_node() {
    let bed = Bed::start(1).await;
    let (failing, live) = (0, 1);
    let dead = bed.keys_of(failing, "dead", 200).await;
    bed.fill(&bed.cluster.nodes[failing], &dead).await;
    let replica = &bed.cluster.nodes[3 + failing];
    let count = async || {
        let found = replica.command(&["KEYS", "dead:*"]).await.map_err(|error| format!("{error:#}"))?;
        Ok::<_, String>(found.lines().filter(|line| !line.is_empty()).count())
    };
    eventually(SETTLED, async || count().await == Ok(dead.len())).await;
    bed.cluster.nodes[failing].kill().unwrap();
    let longest = bed.go_on(live, &dead, "failing").await;
    println!("failing over: at most {longest:?}");
    eventually(SETTLED, async || replica.command(&["ROLE"]).await.unwrap().starts_with("master")).await;
    eventually(SETTLED, async || match count().await {
        Ok(0) => Ok(()),
        left => Err(format!("{left:?}; {}", bed.subscriber.process().log())),
    })
    .await;
    bed.subscriber.until_ready().await;
}
