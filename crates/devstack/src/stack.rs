//! Postgres, NATS and Redis together.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::Result;

use crate::binaries::{Binary, require};
use crate::directory::StackDirectory;
use crate::nats::{Nats, NatsOptions};
use crate::postgres::{Postgres, PostgresOptions};
use crate::process::Process;
use crate::redis::{Redis, RedisOptions};

/// How to run the servers of a [`Stack`].
#[derive(Clone, Debug, Default)]
pub struct StackOptions {
    /// The database.
    pub postgres: PostgresOptions,
    /// The message broker.
    pub nats: NatsOptions,
    /// The cache.
    pub redis: RedisOptions,
}

/// One server of each kind. Dropping it leaves no process and no file behind, and neither does killing its owner.
#[derive(Debug)]
pub struct Stack {
    /// The database.
    pub postgres: Postgres,
    /// The message broker.
    pub nats: Nats,
    /// The cache.
    pub redis: Redis,
    directory: Arc<StackDirectory>,
}

impl Stack {
    /// Starts the three servers side by side and waits until each answers.
    ///
    /// # Errors
    /// [`MissingBinaries`](crate::MissingBinaries) with everything that is missing, or whatever keeps a server from
    /// starting, with its log.
    pub async fn start(options: StackOptions) -> Result<Self> {
        require(Binary::SERVERS)?;
        let directory = StackDirectory::create()?;
        let (postgres, nats, redis) = tokio::try_join!(
            Postgres::start_in(&directory, options.postgres),
            Nats::start_in(&directory, options.nats),
            Redis::start_in(&directory, options.redis),
        )?;
        Ok(Self { postgres, nats, redis, directory })
    }

    /// URL of the database `postgres`.
    #[must_use]
    pub fn postgres_url(&self) -> String {
        self.postgres.url()
    }

    /// URL of the NATS server.
    #[must_use]
    pub fn nats_url(&self) -> String {
        self.nats.url()
    }

    /// URL of the Redis server.
    #[must_use]
    pub fn redis_url(&self) -> String {
        self.redis.url()
    }

    /// Creates an empty database and returns its URL, so that tests can share a server.
    ///
    /// # Errors
    /// As [`Postgres::create_database`].
    pub async fn create_database(&self, name: &str) -> Result<String> {
        self.postgres.create_database(name).await
    }

    /// Starts a program of our own in the stack's directory, cleaned up like the servers.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        Process::spawn(&self.directory, name, command)
    }

    /// The directory with the data and logs of everything in the stack.
    #[must_use]
    pub fn directory(&self) -> &Arc<StackDirectory> {
        &self.directory
    }

    /// Leaves the directory and all processes running in it now to the user, also after this process has ended.
    ///
    /// Returns the path of a shell script that kills them and removes the directory.
    ///
    /// # Errors
    /// When the script cannot be written.
    pub fn keep(&self) -> Result<PathBuf> {
        self.directory.keep()
    }
}
