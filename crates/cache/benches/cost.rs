//! How fast batches of invalidations are applied: `cargo bench -p cache`. What reads and strict writes cost is measured
//! by `cargo xtask bench --only cache`.

use std::time::{Duration, Instant};

use cache::{Redis, RedisConfig, Work};
use event::{CacheKey, Change, CommittedEvent, EventId};

const KEYS_PER_BATCH: usize = 2_000;
const BATCHES: usize = 300;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run())
}

async fn run() -> anyhow::Result<()> {
    let server = devstack::Redis::start_alone(devstack::RedisOptions::default()).await?;
    let redis = Redis::new(RedisConfig { url: server.url(), ..RedisConfig::default() })?;
    for present in [false, true] {
        apply(&redis, "one server", present.then_some(&server)).await?;
    }
    apply_in_cluster().await
}

async fn apply_in_cluster() -> anyhow::Result<()> {
    let cluster = devstack::RedisCluster::start(3, 0).await?;
    let hosts: Vec<String> = cluster.nodes.iter().map(|node| node.address().to_string()).collect();
    let url = format!("redis+cluster://{}", hosts.join(","));
    apply(&Redis::new(RedisConfig { url, ..RedisConfig::default() })?, "a cluster of three", None).await
}

/// Applies batches of deletes, one after the other; with a server given, of keys that were put there before.
async fn apply(redis: &Redis, place: &str, present_on: Option<&devstack::Redis>) -> anyhow::Result<()> {
    let mut total = Duration::ZERO;
    let mut work = Work::new();
    let mut deleted = 0;
    for batch in 0..BATCHES {
        let events = deletes(batch)?;
        if let Some(server) = present_on {
            let mut set = vec!["MSET"];
            set.extend(events.iter().flat_map(|event| [event.keys[0].as_str(), "value"]));
            server.command(&set).await?;
        }
        let began = Instant::now();
        work.clear();
        for event in &events {
            work.add(event);
        }
        deleted += redis.apply(&work).await?.deleted;
        total += began.elapsed();
    }
    let per_second = (KEYS_PER_BATCH * BATCHES) as f64 / total.as_secs_f64();
    println!("apply to {place}: {per_second:.0} keys/s ({deleted} of them were there)");
    Ok(())
}

fn deletes(batch: usize) -> anyhow::Result<Vec<CommittedEvent>> {
    (0..KEYS_PER_BATCH)
        .map(|n| {
            Ok(CommittedEvent {
                id: EventId::generate(),
                keys: vec![CacheKey::new(format!("user:{batch}:{n}:profile"))?],
                change: Change::Delete,
                xids: vec![n as u64],
                history: None,
                at_us: 0,
                traceparent: None,
            })
        })
        .collect()
}
