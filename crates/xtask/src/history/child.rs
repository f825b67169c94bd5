//! A reader or a writer process: this very program, started with a command that people do not see.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use cache::{Redis, RedisConfig};
use clap::ValueEnum;
use rand::SeedableRng;
use rand::rngs::StdRng;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use super::mode::Mode;
use super::record::Log;
use super::{reader, writer};

/// Threads of a process: two, so that its tasks really run at the same time.
const THREADS: usize = 2;

/// How often records that were held back are written.
const FLUSH_INTERVAL: Duration = Duration::from_millis(50);

/// Connections to Postgres that a process has at most.
const MAX_CONNECTIONS: u32 = 10;

/// Longest wait for a connection to Postgres.
const CONNECTED: Duration = Duration::from_secs(2);

/// Longest time for a request to Redis.
const REDIS_TIMEOUT: Duration = Duration::from_secs(1);

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Reads rows.
    Reader,
    /// Changes rows.
    Writer,
}

/// Its arguments.
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    #[arg(long)]
    pub role: Role,
    #[arg(long)]
    pub mode: Mode,
    #[arg(long)]
    pub postgres: String,
    #[arg(long)]
    pub redis: String,
    #[arg(long)]
    pub records: PathBuf,
    #[arg(long)]
    pub seed: u64,
    #[arg(long)]
    pub rows: u32,
    #[arg(long)]
    pub tasks: usize,
    /// Give up some reads and writes halfway.
    #[arg(long)]
    pub cancel: bool,
}

/// What all tasks of a process share.
#[derive(Debug)]
pub struct Shared {
    pub arguments: Arguments,
    pub pool: PgPool,
    pub redis: Redis,
    pub log: Log,
    stop: AtomicBool,
}

impl Shared {
    /// Whether the process was told to end.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Reads or writes until told to end by SIGTERM.
pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    runtime.block_on(work(arguments))
}

async fn work(arguments: Arguments) -> anyhow::Result<()> {
    // From the first moment on: whoever dies of the signal has done nothing yet.
    let mut told_to_end = signal(SignalKind::terminate())?;
    let log = Log::open(&arguments.records)?;
    // A process that replaces a killed one goes on rather than doing the same again.
    let mut random = StdRng::seed_from_u64(arguments.seed ^ log.records_before());
    let connections = u32::try_from(arguments.tasks)?.min(MAX_CONNECTIONS);
    let options = PgPoolOptions::new().max_connections(connections).acquire_timeout(CONNECTED);
    let redis = RedisConfig {
        url: arguments.redis.clone(),
        connect_timeout: REDIS_TIMEOUT,
        response_timeout: REDIS_TIMEOUT,
        ..RedisConfig::default()
    };
    let shared = Arc::new(Shared {
        pool: options.connect_lazy(&arguments.postgres)?,
        redis: Redis::new(redis)?,
        log,
        stop: AtomicBool::new(false),
        arguments,
    });
    let mut tasks = JoinSet::new();
    let reading = reader::Reader::new(&shared);
    for _ in 0..shared.arguments.tasks {
        let random = StdRng::from_rng(&mut random);
        match shared.arguments.role {
            Role::Reader => tasks.spawn(reader::run(reading.clone(), Arc::clone(&shared), random)),
            Role::Writer => tasks.spawn(writer::run(Arc::clone(&shared), random)),
        };
    }
    loop {
        tokio::select! {
            _ = told_to_end.recv() => break,
            () = tokio::time::sleep(FLUSH_INTERVAL) => shared.log.flush()?,
            ended = tasks.join_next() => ended.context("no tasks")???,
        }
    }
    shared.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    shared.log.flush()
}
