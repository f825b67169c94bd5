//! Servers, the pair, readers and writers, and the lines between them, which can be cut.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use devstack::proxy::FaultProxy;
use devstack::{Process, RedisOptions, Stack, StackOptions};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::sync::Mutex;

use super::child::Role;
use super::mode::Mode;
use super::rows;
use crate::daemon::Daemon;
use crate::programs::Programs;

/// Redis as strict writes need it: what it has acknowledged survives its death.
const REDIS: &str = "appendfsync always";

/// A message in the hands of a subscriber that was killed comes again after this.
const ACK_WAIT: &str = "2s";

const SIGTERM: i32 = 15;

/// Tasks of a process. Many readers, as each waits most of the time and Redis carries out what they ask for together.
const READER_TASKS: usize = 32;
const WRITER_TASKS: usize = 3;

/// Something that can be in one kind of trouble at a time.
#[derive(Debug)]
pub struct Target<T> {
    pub name: String,
    pub it: T,
    /// Held by whoever makes the trouble.
    pub busy: Mutex<()>,
}

impl<T> Target<T> {
    fn new(name: impl Into<String>, it: T) -> Self {
        Self { name: name.into(), it, busy: Mutex::default() }
    }
}

/// How to set it up.
#[derive(Debug, Clone)]
pub struct Setup {
    pub mode: Mode,
    pub seed: u64,
    pub rows: u32,
    pub readers: usize,
    pub writers: usize,
    /// Whether readers and writers give up some of what they do halfway.
    pub cancel: bool,
}

/// Everything that takes part.
#[derive(Debug)]
pub struct Field {
    pub stack: Stack,
    /// Past all lines.
    pub pool: PgPool,
    pub lines: Vec<Target<FaultProxy>>,
    pub relay: Option<Target<Daemon>>,
    pub subscriber: Option<Target<Daemon>>,
    pub readers: Vec<Target<Process>>,
    pub writers: Vec<Target<Process>>,
    pub postgres_trouble: Mutex<()>,
    pub redis_trouble: Mutex<()>,
    pub nats_trouble: Mutex<()>,
}

/// URLs through lines of their own.
struct Lines {
    targets: Vec<Target<FaultProxy>>,
}

impl Lines {
    async fn postgres(&mut self, stack: &Stack, who: &str) -> anyhow::Result<String> {
        let proxy = FaultProxy::start(stack.postgres.address()).await?;
        let url = stack.postgres.url_through(&proxy, "postgres");
        self.targets.push(Target::new(format!("{who} → Postgres"), proxy));
        Ok(url)
    }

    async fn redis(&mut self, stack: &Stack, who: &str) -> anyhow::Result<String> {
        let proxy = FaultProxy::start(stack.redis.address()).await?;
        let url = stack.redis.url_through(&proxy);
        self.targets.push(Target::new(format!("{who} → Redis"), proxy));
        Ok(url)
    }

    async fn nats(&mut self, stack: &Stack, who: &str) -> anyhow::Result<String> {
        let proxy = FaultProxy::start(stack.nats.address()).await?;
        let url = stack.nats.url_through(&proxy);
        self.targets.push(Target::new(format!("{who} → NATS"), proxy));
        Ok(url)
    }
}

impl Field {
    /// Starts everything but readers and writers, and waits until it is ready.
    pub async fn prepare(programs: &Programs, setup: &Setup) -> anyhow::Result<Self> {
        let redis = RedisOptions { append_only: true, configuration: REDIS.to_owned() };
        let stack = Stack::start(StackOptions { redis, ..Default::default() }).await?;
        let pool = PgPoolOptions::new().max_connections(4).connect(&stack.postgres_url()).await?;
        outbox::migrate(&pool).await?;
        rows::create(&pool, setup.rows).await?;
        let mut lines = Lines { targets: Vec::new() };
        let (mut relay, mut subscriber) = (None, None);
        if setup.mode.has_pair() {
            let variables = [
                ("DATABASE_URL", lines.postgres(&stack, "relay").await?),
                ("NATS_URL", lines.nats(&stack, "relay").await?),
            ];
            let daemon = Daemon::spawn(stack.directory(), &programs.relay, &variables)?;
            daemon.until_ready().await?;
            relay = Some(Target::new("relay", daemon));
            let variables = [
                ("REDIS_URL", lines.redis(&stack, "subscriber").await?),
                ("NATS_URL", lines.nats(&stack, "subscriber").await?),
                ("SUBSCRIBER_ACK_WAIT", ACK_WAIT.to_owned()),
            ];
            let daemon = Daemon::spawn(stack.directory(), &programs.subscriber, &variables)?;
            daemon.until_ready().await?;
            subscriber = Some(Target::new("subscriber", daemon));
        }
        Ok(Self {
            stack,
            pool,
            lines: lines.targets,
            relay,
            subscriber,
            readers: Vec::new(),
            writers: Vec::new(),
            postgres_trouble: Mutex::default(),
            redis_trouble: Mutex::default(),
            nats_trouble: Mutex::default(),
        })
    }

    /// Starts readers and writers. The first of each is connected directly, the others by lines that they share.
    pub async fn populate(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let mut lines = Lines { targets: std::mem::take(&mut self.lines) };
        let direct = (self.stack.postgres_url(), self.stack.redis_url());
        for (role, count) in [(Role::Reader, setup.readers), (Role::Writer, setup.writers)] {
            let who = format!("{}s", name(role));
            let shared = (lines.postgres(&self.stack, &who).await?, lines.redis(&self.stack, &who).await?);
            for index in 0..count {
                let urls = if index == 0 { &direct } else { &shared };
                let process = self.spawn(role, index, setup, urls)?;
                match role {
                    Role::Reader => self.readers.push(process),
                    Role::Writer => self.writers.push(process),
                }
            }
        }
        self.lines = lines.targets;
        Ok(())
    }

    fn spawn(
        &self,
        role: Role,
        index: usize,
        setup: &Setup,
        (postgres, redis): &(String, String),
    ) -> anyhow::Result<Target<Process>> {
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        let tasks = if role == Role::Reader { READER_TASKS } else { WRITER_TASKS };
        // Processes of one run do different things.
        let seed =
            setup.seed.wrapping_mul(31).wrapping_add(index as u64 * 2 + u64::from(role == Role::Writer));
        command.args(["history-process", "--role", name(role), "--mode", setup.mode.name()]);
        command.args(["--postgres", postgres, "--redis", redis]);
        command.arg("--records").arg(self.records(role, index));
        command.args(["--seed", &seed.to_string(), "--rows", &setup.rows.to_string()]);
        command.args(["--tasks", &tasks.to_string()]);
        command.args(setup.cancel.then_some("--cancel"));
        let name = format!("{}-{index}", name(role));
        let process = self.stack.spawn(&name, command)?;
        Ok(Target::new(name, process))
    }

    /// The records of all readers and writers.
    pub fn all_records(&self) -> Vec<PathBuf> {
        let of = |role, count| (0..count).map(move |index| self.records(role, index));
        of(Role::Reader, self.readers.len()).chain(of(Role::Writer, self.writers.len())).collect()
    }

    fn records(&self, role: Role, index: usize) -> PathBuf {
        let directory: &Path = self.stack.directory().path();
        directory.join(format!("{}-{index}.records", name(role)))
    }
}

/// Ends processes cleanly, so that their records are complete.
pub async fn end(processes: &[Target<Process>]) -> anyhow::Result<()> {
    for process in processes {
        let status = process.it.terminate().await.with_context(|| process.name.clone())?;
        // One that had just been started again may not have been ready for the signal; it has added no records then.
        let ended_early = status.signal() == Some(SIGTERM);
        ensure!(
            status.success() || ended_early,
            "{} ended with {status}: {}",
            process.name,
            process.it.log()
        );
    }
    Ok(())
}

fn name(role: Role) -> &'static str {
    match role {
        Role::Reader => "reader",
        Role::Writer => "writer",
    }
}
