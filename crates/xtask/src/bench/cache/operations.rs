//! Single operations on Redis, ours and plain ones, and how long they take.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use cache::{Acquired, Cache, CacheConfig, Fill, LeaseToken, Mark, Options, Raw, Redis, RedisConfig};
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::io::tcp::TcpSettings;
use deadpool_redis::redis::{self, IntoConnectionInfo};
use event::{CacheKey, History, TransactionId};
use tokio::task::JoinSet;

use crate::bench::numbers::ratio;

/// Keys that have a value.
const KEYS: u64 = 1_000;

const VALUE: &str = "{\"name\":\"Ada\"}";
const TTL: Duration = Duration::from_secs(3_600);
const LEASE: Duration = Duration::from_secs(10);

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// GET of a key that has a value.
    PlainGet,
    /// `get_or_load` of the same.
    Hit,
    /// GET, then SET.
    PlainGetSet,
    /// `get_or_load` of a key that nobody has asked for yet.
    MissAndFill,
    /// The part of it that gets the lease.
    Acquire,
    /// The part of it that stores the value.
    Fill,
    /// DEL.
    PlainDelete,
    /// What a strict commit does in Redis.
    MarkAndUnmark,
}

/// Both clients, with as many connections each.
#[derive(Debug, Clone)]
pub struct Operations {
    cache: Cache,
    plain: Arc<[MultiplexedConnection]>,
    next: Arc<AtomicU64>,
}

impl Operations {
    /// Connected to a server.
    pub async fn on(server: &devstack::Redis) -> anyhow::Result<Self> {
        let config = RedisConfig { url: server.url(), ..RedisConfig::default() };
        let mut plain = Vec::new();
        for _ in 0..config.pool_size {
            let settings = TcpSettings::default().set_nodelay(true);
            let info = server.url().into_connection_info()?.set_tcp_settings(settings);
            plain.push(redis::Client::open(info)?.get_multiplexed_async_connection().await?);
        }
        let cache = Cache::new(Redis::new(config)?, CacheConfig::default());
        Ok(Self { cache, plain: plain.into(), next: Arc::default() })
    }

    /// Microseconds of one operation of each kind, in the best of several rounds.
    pub async fn best_of<const N: usize>(
        &self,
        rounds: usize,
        kinds: [Kind; N],
        tasks: usize,
        count: u64,
    ) -> anyhow::Result<[f64; N]> {
        for number in 0..KEYS {
            self.timed(Kind::PlainGetSet, number).await?;
        }
        let mut best = [f64::INFINITY; N];
        for _ in 0..rounds {
            for (kind, best) in kinds.into_iter().zip(&mut best) {
                *best = best.min(self.round(kind, tasks, count).await?);
            }
        }
        Ok(best)
    }

    /// The time of one operation, as the average over a round. Where it is a part of what is done, only that counts.
    async fn round(&self, kind: Kind, tasks: usize, count: u64) -> anyhow::Result<f64> {
        let mut running = JoinSet::new();
        for task in 0..tasks {
            let operations = self.clone();
            running.spawn(async move {
                let mut total = Duration::ZERO;
                for number in (task as u64..count).step_by(tasks) {
                    total += operations.timed(kind, number % KEYS).await?;
                }
                anyhow::Ok(total)
            });
        }
        let mut total = Duration::ZERO;
        for outcome in running.join_all().await {
            total += outcome?;
        }
        Ok(total.as_secs_f64() * 1e6 / ratio(count, 1))
    }

    async fn timed(&self, kind: Kind, number: u64) -> anyhow::Result<Duration> {
        let key = format!("user:{number}:profile");
        let began = Instant::now();
        match kind {
            Kind::PlainGet => self.command("GET", &[&key]).await?,
            Kind::Hit => self.read(&key).await,
            Kind::PlainGetSet => {
                self.command("GET", &[&key]).await?;
                self.command("SET", &[&key, VALUE, "EX", "3600"]).await?;
            }
            Kind::MissAndFill => self.read(&self.new_key()).await,
            Kind::PlainDelete => self.command("DEL", &[&key]).await?,
            Kind::Acquire => return Ok(self.parts_of_a_miss().await?.0),
            Kind::Fill => return Ok(self.parts_of_a_miss().await?.1),
            Kind::MarkAndUnmark => {
                let history: History = "d0000000001.1".parse()?;
                let transaction = TransactionId { history: Some(history), xid: self.next() };
                let (keys, mark) = ([CacheKey::new(key)?], Mark::generate(transaction));
                self.cache.redis().mark(&keys, mark).await?;
                self.cache.redis().unmark(&keys, mark).await?;
            }
        }
        Ok(began.elapsed())
    }

    async fn read(&self, key: &str) {
        let options = Options::<Raw> { ttl: TTL, ..Options::default() };
        let load = async || Ok::<_, Infallible>(VALUE.as_bytes().to_vec());
        let Ok(_value) = self.cache.get_or_load_with(key, &options, load).await;
    }

    async fn parts_of_a_miss(&self) -> anyhow::Result<(Duration, Duration)> {
        let (redis, key) = (self.cache.redis(), CacheKey::new(self.new_key())?);
        let began = Instant::now();
        let acquired = redis.acquire(&key, LeaseToken::generate(), LEASE, false).await?;
        let granted = Instant::now();
        let Acquired::Grant(lease) = acquired else { bail!("a new key gives {acquired:?}") };
        let fill = Fill { value: VALUE.as_bytes(), ttl: TTL, version: None, keep_stale_copy: false };
        redis.fill(&key, &lease, fill).await?;
        Ok((granted - began, granted.elapsed()))
    }

    async fn command(&self, name: &str, arguments: &[&str]) -> redis::RedisResult<()> {
        let lane = usize::try_from(self.next()).unwrap_or(0) % self.plain.len();
        let mut connection = self.plain[lane].clone();
        // Bytes of its own, as a caller needs them.
        let answer: redis::Value = redis::cmd(name).arg(arguments).query_async(&mut connection).await?;
        drop(redis::from_redis_value::<Vec<u8>>(answer));
        Ok(())
    }

    fn new_key(&self) -> String {
        format!("miss:{}", self.next())
    }

    fn next(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}
