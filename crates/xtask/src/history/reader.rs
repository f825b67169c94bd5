//! Reads rows through the cache, or plainly beside it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cache::{Cache, CacheConfig, Loaded, Options};
use rand::Rng;
use rand::rngs::StdRng;
use tokio::time::timeout;

use super::child::Shared;
use super::clock::now_ns;
use super::mode::Mode;
use super::plain::Plain;
use super::record::{Kind, Record};
use super::rows;

/// Reads between two pauses of a task, and the longest pause, which leaves the processor to the others.
const BURST: usize = 8;
const LONGEST_PAUSE_MS: u64 = 12;

/// A lease is short, so that processes that were stopped come back without it.
const LEASE: Duration = Duration::from_millis(400);

/// Values expire while the test runs.
const TTL: Duration = Duration::from_secs(4);

/// Longest time for a query.
const LOADED: Duration = Duration::from_secs(2);

/// One of so many loads takes longer after its query, as a service may have more to do before it stores a value.
const SLOW_EVERY: u32 = 3;
const SLOW_WITHIN_MS: u64 = 8;

/// One of so many reads is of several rows, if the mode has that; one of so many is given up halfway, if asked for.
const MANY_EVERY: u32 = 24;
const MANY_ROWS: usize = 4;
/// Before one of so many reads the reader looks at the database itself: then the commit that it reads of is visible,
/// whether or not its writer knows by now.
const LOOK_EVERY: u32 = 16;

const CANCEL_EVERY: u32 = 100;
const CANCEL_WITHIN_MS: u64 = 3;

/// How this process reads.
#[derive(Debug, Clone)]
pub struct Reader {
    cache: Cache,
}

impl Reader {
    /// With one cache for all tasks.
    pub fn new(shared: &Shared) -> Self {
        let config = CacheConfig {
            lease: LEASE,
            // Comes back soon after a fault, so that more of the run uses the cache.
            breaker_pause: Duration::from_millis(100),
            ..CacheConfig::default()
        };
        Self { cache: Cache::new(shared.redis.clone(), config) }
    }

    async fn one(&self, shared: &Shared, row: u32) -> Record {
        let options = Options { ttl: TTL, ..Options::<cache::Json>::default() };
        let loaded = AtomicBool::new(false);
        let load = async || {
            loaded.store(true, Ordering::Relaxed);
            let version = load_in_time(rows::load(&shared.pool, row)).await?;
            Ok::<_, LoadError>(Loaded::versioned(version, version))
        };
        let key = rows::key(row);
        let began_ns = now_ns();
        let outcome = self.cache.get_or_load_versioned(key, &options, load).await;
        let ended_ns = now_ns();
        let kind = match outcome {
            Err(_) => Kind::FailedRead,
            Ok(_) if loaded.load(Ordering::Relaxed) => Kind::Load,
            Ok(_) => Kind::Hit,
        };
        Record { kind, row, version: outcome.unwrap_or(0).cast_unsigned(), began_ns, ended_ns }
    }

    async fn many(&self, shared: &Shared, rows: &[u32]) -> Vec<Record> {
        let keys: HashMap<String, u32> = rows.iter().map(|row| (rows::key(*row), *row)).collect();
        let names: Vec<&String> = keys.keys().collect();
        let mut loaded = Vec::new();
        let load = async |missing: Vec<&&String>| {
            loaded = missing.iter().map(|name| keys[**name]).collect();
            let found = load_in_time(rows::load_many(&shared.pool, &loaded)).await?;
            Ok::<_, LoadError>(found.into_iter().map(|(row, version)| (rows::key(row), version)).collect())
        };
        let began_ns = now_ns();
        let outcome = self.cache.get_many::<i64, _, _, _, _>(&names, TTL, load).await;
        let ended_ns = now_ns();
        let failed = vec![None; names.len()];
        let versions = outcome.unwrap_or(failed).into_iter();
        let record = |(name, version): (&&String, Option<i64>)| {
            let row = keys[*name];
            let kind = match version {
                None => Kind::FailedRead,
                Some(_) if loaded.contains(&row) => Kind::Load,
                Some(_) => Kind::Hit,
            };
            Record { kind, row, version: version.unwrap_or(0).cast_unsigned(), began_ns, ended_ns }
        };
        names.iter().zip(versions).map(record).collect()
    }
}

/// The database did not answer in time, or not well.
#[derive(Debug)]
struct LoadError;

async fn load_in_time<T>(query: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, LoadError> {
    let loaded = timeout(LOADED, query).await.map_err(|_| LoadError)?.map_err(|_| LoadError)?;
    if rand::random_ratio(1, SLOW_EVERY) {
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..=SLOW_WITHIN_MS))).await;
    }
    Ok(loaded)
}

/// One task: reads, until the process is told to end.
pub async fn run(reader: Reader, shared: Arc<Shared>, mut random: StdRng) -> anyhow::Result<()> {
    let arguments = &shared.arguments;
    let mut plain = Plain::new(&arguments.redis);
    while !shared.is_stopping() {
        for _ in 0..BURST {
            let several = arguments.mode != Mode::Naive && random.random_ratio(1, MANY_EVERY);
            let count = if several { MANY_ROWS } else { 1 };
            let some: Vec<u32> = (0..count).map(|_| rows::pick(arguments.rows, &mut random)).collect();
            let gives_up = arguments.cancel && random.random_ratio(1, CANCEL_EVERY);
            let patience = Duration::from_millis(random.random_range(0..=CANCEL_WITHIN_MS));
            if random.random_ratio(1, LOOK_EVERY) {
                shared.log.add(look(&shared, some[0]).await.as_slice())?;
            }
            let read = async {
                match (arguments.mode, some.as_slice()) {
                    (Mode::Naive, [row, ..]) => vec![naive(&mut plain, &shared, *row).await],
                    (_, [row]) => vec![reader.one(&shared, *row).await],
                    (_, rows) => reader.many(&shared, rows).await,
                }
            };
            let records =
                if gives_up { timeout(patience, read).await.unwrap_or_default() } else { read.await };
            shared.log.add(&records)?;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(1..=LONGEST_PAUSE_MS))).await;
    }
    Ok(())
}

async fn look(shared: &Shared, row: u32) -> Option<Record> {
    let began_ns = now_ns();
    let version = timeout(LOADED, rows::load(&shared.pool, row)).await.ok()?.ok()?.cast_unsigned();
    Some(Record { kind: Kind::Look, row, version, began_ns, ended_ns: now_ns() })
}

/// Cache-aside as everybody writes it first.
async fn naive(plain: &mut Plain, shared: &Shared, row: u32) -> Record {
    let key = rows::key(row);
    let began_ns = now_ns();
    let cached = plain.command(&["GET", &key]).await.and_then(|version| version.parse().ok());
    let (kind, version) = match cached {
        Some(version) => (Kind::Hit, version),
        None => match load_in_time(rows::load(&shared.pool, row)).await {
            Ok(version) => {
                let seconds = TTL.as_secs().to_string();
                plain.command(&["SET", &key, &version.to_string(), "EX", &seconds]).await;
                (Kind::Load, version)
            }
            Err(LoadError) => (Kind::FailedRead, 0),
        },
    };
    Record { kind, row, version: version.cast_unsigned(), began_ns, ended_ns: now_ns() }
}
