//! Servers, a relay and a subscriber.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use devstack::{Stack, StackOptions};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

use crate::daemon::Daemon;
use crate::programs::Programs;
use crate::wait;

/// How long a migration may take on a busy machine.
const ADMINISTERED: Duration = Duration::from_secs(60);

/// A variable of the environment and its value.
pub type Variable = (&'static str, String);

/// Real servers and what it takes to run our programs on them.
#[derive(Debug)]
pub struct Ground {
    /// The servers.
    pub stack: Stack,
    /// Connections of the service that writes.
    pub pool: PgPool,
    programs: Programs,
}

impl Ground {
    /// Starts the servers.
    pub async fn start(programs: &Programs, options: StackOptions) -> anyhow::Result<Self> {
        let stack = Stack::start(options).await?;
        let pool = PgPoolOptions::new().max_connections(40).connect(&stack.postgres_url()).await?;
        Ok(Self { stack, pool, programs: programs.clone() })
    }

    /// Runs `relay migrate` and returns what it says in the end.
    pub async fn migrate(&self) -> anyhow::Result<String> {
        self.administer(&["migrate"]).await
    }

    /// Runs a command of the relay that ends by itself, and returns what it says in the end.
    pub async fn administer(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = std::process::Command::new(&self.programs.relay);
        command.args(arguments).env("DATABASE_URL", self.stack.postgres_url());
        let process = self.stack.spawn("relay-admin", command)?;
        let status = process.wait_exit(ADMINISTERED).await?;
        ensure!(status.success(), "relay {} failed ({status}): {}", arguments.join(" "), process.log());
        Ok(process.log().trim().lines().last().unwrap_or_default().to_owned())
    }

    /// Starts a relay with more environment. Does not wait until it is ready.
    pub fn spawn_relay(&self, more: &[Variable]) -> anyhow::Result<Daemon> {
        let own = [("DATABASE_URL", self.stack.postgres_url()), ("NATS_URL", self.stack.nats_url())];
        Daemon::spawn(self.stack.directory(), &self.programs.relay, &[&own, more].concat())
    }

    /// Starts a subscriber. Does not wait until it is ready.
    pub fn spawn_subscriber(&self) -> anyhow::Result<Daemon> {
        self.spawn_subscriber_with(&[])
    }

    /// Starts a subscriber with more environment. Does not wait until it is ready.
    pub fn spawn_subscriber_with(&self, more: &[Variable]) -> anyhow::Result<Daemon> {
        let own = [("REDIS_URL", self.stack.redis_url()), ("NATS_URL", self.stack.nats_url())];
        Daemon::spawn(self.stack.directory(), &self.programs.subscriber, &[&own, more].concat())
    }

    /// Starts a service that reads and writes. Does not wait until it serves.
    pub fn spawn_service(&self, program: &Path) -> anyhow::Result<Daemon> {
        let own = [("DATABASE_URL", self.stack.postgres_url()), ("REDIS_URL", self.stack.redis_url())];
        Daemon::spawn(self.stack.directory(), program, &own)
    }

    /// Starts a relay and a subscriber and waits until both are ready.
    pub async fn spawn_pair(&self) -> anyhow::Result<(Daemon, Daemon)> {
        let (relay, subscriber) = (self.spawn_relay(&[])?, self.spawn_subscriber()?);
        tokio::try_join!(relay.until_ready(), subscriber.until_ready())?;
        Ok((relay, subscriber))
    }

    /// Waits until nothing is in the outbox.
    pub async fn until_outbox_empty(&self, deadline: Duration) -> anyhow::Result<()> {
        wait::until("the outbox is empty", deadline, async || {
            let backlog =
                outbox::backlog::measure(&self.pool, 1).await.context("cannot count the backlog")?;
            Ok((backlog.events == 0).then_some(()))
        })
        .await
    }
}
