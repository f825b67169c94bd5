//! What the cache costs against plain commands through the same client: `cargo bench -p cache`.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cache::{Cache, CacheConfig, Options, Raw, Redis, RedisConfig, Work};
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::io::tcp::TcpSettings;
use deadpool_redis::redis::{self, IntoConnectionInfo};
use event::{CacheKey, Change, CommittedEvent, EventId};

const KEYS_PER_BATCH: usize = 2_000;
const BATCHES: usize = 300;
const OPERATIONS: usize = 40_000;
const KEYS: usize = 1_000;
const ROUNDS: usize = 5;
const TTL: Duration = Duration::from_secs(3_600);

/// What is measured, in this order in every round.
const READS: [Kind; 2] = [Kind::PlainGet, Kind::Hit];
const REST: [Kind; 4] = [Kind::PlainGetSet, Kind::MissAndFill, Kind::PlainDelete, Kind::StrictWrite];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    PlainGet,
    Hit,
    PlainGetSet,
    MissAndFill,
    PlainDelete,
    StrictWrite,
}

#[derive(Clone)]
struct Bench {
    cache: Cache,
    plain: Arc<[MultiplexedConnection]>,
    next: Arc<AtomicUsize>,
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run())
}

async fn run() -> anyhow::Result<()> {
    let server = devstack::Redis::start_alone(devstack::RedisOptions::default()).await?;
    let config = RedisConfig { url: server.url(), ..RedisConfig::default() };
    let mut plain = Vec::new();
    for _ in 0..config.pool_size {
        let settings = TcpSettings::default().set_nodelay(true);
        let info = server.url().into_connection_info()?.set_tcp_settings(settings);
        plain.push(redis::Client::open(info)?.get_multiplexed_async_connection().await?);
    }
    let redis = Redis::new(config)?;
    for present in [false, true] {
        apply(&redis, "one server", present.then_some(&server)).await?;
    }
    apply_in_cluster().await?;
    let cache = Cache::new(redis, CacheConfig::default());
    let bench = Bench { cache, plain: plain.into(), next: Arc::default() };
    for tasks in [1, 64] {
        bench.compare(&READS, tasks).await?;
        bench.compare(&REST, tasks).await?;
    }
    Ok(())
}

impl Bench {
    /// Measures the kinds in turn, several times, and prints the best of each.
    async fn compare(&self, kinds: &[Kind], tasks: usize) -> anyhow::Result<()> {
        for n in 0..KEYS {
            self.one(Kind::PlainGetSet, n).await?;
        }
        let mut best = vec![Duration::MAX; kinds.len()];
        for _ in 0..ROUNDS {
            for (kind, best) in kinds.iter().zip(&mut best) {
                *best = (*best).min(self.round(*kind, tasks).await?);
            }
        }
        for (kind, took) in kinds.iter().zip(best) {
            let per_second = OPERATIONS as f64 / took.as_secs_f64();
            let each = took.as_secs_f64() * 1e6 * tasks as f64 / OPERATIONS as f64;
            println!("{tasks:>3} tasks  {kind:<14?} {per_second:>9.0}/s  {each:>6.1} µs each");
        }
        Ok(())
    }

    async fn round(&self, kind: Kind, tasks: usize) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for task in 0..tasks {
            let bench = self.clone();
            running.spawn(async move {
                for n in (task..OPERATIONS).step_by(tasks) {
                    bench.one(kind, n % KEYS).await?;
                }
                anyhow::Ok(())
            });
        }
        for outcome in running.join_all().await {
            outcome?;
        }
        Ok(began.elapsed())
    }

    async fn one(&self, kind: Kind, n: usize) -> anyhow::Result<()> {
        let key = format!("user:{n}:profile");
        match kind {
            Kind::PlainGet => drop(self.command("GET", &[&key]).await?),
            Kind::Hit => self.read(&key).await,
            Kind::PlainGetSet => {
                self.command("GET", &[&key]).await?;
                self.command("SET", &[&key, "{\"name\":\"Ada\"}", "EX", "3600"]).await?;
            }
            Kind::MissAndFill => {
                // A key nobody has asked for yet.
                self.read(&format!("miss:{}", self.next.fetch_add(1, Ordering::Relaxed))).await;
            }
            Kind::PlainDelete => drop(self.command("DEL", &[&key]).await?),
            Kind::StrictWrite => {
                let keys = [CacheKey::new(key)?];
                let xid = self.next.fetch_add(1, Ordering::Relaxed) as u64;
                self.cache.redis().mark(&keys, xid).await?;
                self.cache.redis().unmark(&keys, xid).await?;
            }
        }
        Ok(())
    }

    async fn read(&self, key: &str) {
        let options = Options::<Raw> { ttl: TTL, ..Options::default() };
        let load = async || Ok::<_, Infallible>(b"{\"name\":\"Ada\"}".to_vec());
        let Ok(value) = self.cache.get_or_load_with(key, &options, load).await;
        assert!(!value.is_empty());
    }

    async fn command(&self, name: &str, arguments: &[&str]) -> redis::RedisResult<Option<Vec<u8>>> {
        let lane = self.next.fetch_add(1, Ordering::Relaxed) % self.plain.len();
        let mut connection = self.plain[lane].clone();
        let answer: redis::Value = redis::cmd(name).arg(arguments).query_async(&mut connection).await?;
        Ok(redis::from_redis_value(answer).ok())
    }
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
                at_us: 0,
                traceparent: None,
            })
        })
        .collect()
}
