//! What the cache costs against plain commands through the same client: `cargo bench -p cache`.

use std::time::{Duration, Instant};

use cache::{Redis, RedisConfig, Work};
use event::{CacheKey, Change, CommittedEvent, EventId};

const KEYS_PER_BATCH: usize = 2_000;
const BATCHES: usize = 300;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run())
}

async fn run() -> anyhow::Result<()> {
    let server = devstack::Redis::start_alone(devstack::RedisOptions::default()).await?;
    let redis = Redis::new(RedisConfig { url: server.url(), ..RedisConfig::default() })?;
    for present in [false, true] {
        apply(&redis, &server, present).await?;
    }
    Ok(())
}

async fn apply(redis: &Redis, server: &devstack::Redis, present: bool) -> anyhow::Result<()> {
    let mut total = Duration::ZERO;
    let mut cpu = Duration::ZERO;
    let mut work = Work::new();
    let mut deleted = 0;
    for batch in 0..BATCHES {
        let events: Vec<CommittedEvent> = (0..KEYS_PER_BATCH)
            .map(|n| CommittedEvent {
                id: EventId::generate(),
                keys: vec![CacheKey::new(format!("user:{batch}:{n}:profile")).expect("valid")],
                change: Change::Delete,
                xids: vec![n as u64],
                at_us: 0,
                traceparent: None,
            })
            .collect();
        if present {
            let mut set = vec!["MSET".to_owned()];
            set.extend(
                events.iter().flat_map(|event| [event.keys[0].as_str().to_owned(), "value".to_owned()]),
            );
            let set: Vec<&str> = set.iter().map(String::as_str).collect();
            server.command(&set).await?;
        }
        let (began, began_cpu) = (Instant::now(), cpu_time());
        work.clear();
        for event in &events {
            work.add(event);
        }
        deleted += redis.apply(&work).await?.deleted;
        total += began.elapsed();
        cpu += cpu_time() - began_cpu;
    }
    let keys = (KEYS_PER_BATCH * BATCHES) as f64;
    println!(
        "apply, keys present {present}: {:.0} keys/s, {:.0} keys per second of this process's cpu ({deleted} deleted)",
        keys / total.as_secs_f64(),
        keys / cpu.as_secs_f64()
    );
    Ok(())
}

fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let nanoseconds = stat.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0);
    Duration::from_nanos(nanoseconds)
}
