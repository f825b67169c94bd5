//! A Postgres server.

mod standby;
mod template;
mod wire;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::account::Account;
use crate::binaries::Binary;
use crate::directory::StackDirectory;
use crate::ports::Port;
use crate::process::Process;
use crate::proxy::FaultProxy;
use crate::readiness::wait_until_ready;

pub(crate) use template::SUPERUSER;

/// The database that always exists.
const DEFAULT_DATABASE: &str = "postgres";

/// How to run Postgres.
#[derive(Clone, Debug, Default)]
pub struct PostgresOptions {
    /// Write through to the disk at commit (`fsync`). Only benchmarks need it: what is committed survives a killed
    /// server either way, it is the machine that may not lose power. `synchronous_commit` is on in both cases.
    pub durable: bool,
    /// More settings, name and value; they win over the defaults.
    pub settings: Vec<(String, String)>,
}

/// A Postgres server with logical decoding on; user `postgres`, no password.
#[derive(Debug)]
pub struct Postgres {
    process: Process,
    port: Port,
    socket_directory: PathBuf,
}

impl Postgres {
    /// Starts a server in a directory of its own.
    ///
    /// # Errors
    /// [`MissingBinaries`](crate::MissingBinaries), or whatever keeps the server from starting, with its log.
    pub async fn start_alone(options: PostgresOptions) -> Result<Self> {
        Self::start_in(&StackDirectory::create()?, options).await
    }

    /// Starts a server in `directory`.
    ///
    /// # Errors
    /// As [`start_alone`](Self::start_alone).
    pub async fn start_in(directory: &Arc<StackDirectory>, options: PostgresOptions) -> Result<Self> {
        Self::launch(directory, options, async |binary, data, account| {
            template::create_data(directory, binary, data.to_owned(), account).await
        })
        .await
    }

    /// Starts a server in `directory` that has nothing in common with others. The data of all others is copied from one
    /// template, and with it the system identifier.
    ///
    /// # Errors
    /// As [`start_alone`](Self::start_alone).
    pub async fn start_unrelated_in(
        directory: &Arc<StackDirectory>,
        options: PostgresOptions,
    ) -> Result<Self> {
        Self::launch(directory, options, async |binary, data, account| {
            template::initialize(directory, binary, data, account).await
        })
        .await
    }

    /// Starts a server on what `fill` puts into its data directory.
    async fn launch(
        directory: &Arc<StackDirectory>,
        options: PostgresOptions,
        fill: impl AsyncFnOnce(&Path, &Path, Option<Account>) -> Result<()>,
    ) -> Result<Self> {
        let binary = Binary::Postgres.find()?;
        let account = Account::instead_of_root()?;
        let port = Port::reserve()?;
        let name = directory.unique_name("postgres");
        let home = directory.create_subdirectory(&name)?;
        if let Some(account) = account {
            account.own(&home)?;
        }
        let data = home.join("data");
        fill(&binary, &data, account).await?;

        let mut configuration =
            std::fs::OpenOptions::new().append(true).open(data.join("postgresql.conf"))?;
        std::io::Write::write_all(&mut configuration, settings(&options, &port, &home).as_bytes())?;

        let mut command = Command::new(binary);
        command.arg("-D").arg(&data).current_dir(&home);
        if let Some(account) = account {
            account.apply(&mut command);
        }
        let process = Process::prepare(directory, &name, command)
            // Smart shutdown would wait for clients to leave.
            .terminate_with(Signal::INT)
            // An immediate shutdown is as quick as a kill, and takes the shared memory segment with it.
            .discard_with(Signal::QUIT);
        let postgres = Self { process, port, socket_directory: home };
        postgres.start().await?;
        Ok(postgres)
    }

    /// Starts the server again on the same port and data, and waits until it answers.
    ///
    /// # Errors
    /// When it is running, or does not become ready.
    pub async fn start(&self) -> Result<()> {
        self.process.start()?;
        wait_until_ready(&self.process, async || ping(self.address()).await).await
    }

    /// Stops the server cleanly (fast shutdown) and starts it again.
    ///
    /// # Errors
    /// When either fails.
    pub async fn restart(&self) -> Result<()> {
        self.terminate().await?;
        self.start().await
    }

    /// Kills the server with all backends (SIGKILL) and waits until they are gone.
    ///
    /// # Errors
    /// When a process cannot be signalled.
    pub fn kill(&self) -> Result<()> {
        self.process.kill()
    }

    /// Freezes the server with all backends.
    ///
    /// # Errors
    /// When it is not running.
    pub fn stop(&self) -> Result<()> {
        self.process.stop()
    }

    /// Undoes [`stop`](Self::stop).
    ///
    /// # Errors
    /// When it is not running.
    pub fn resume(&self) -> Result<()> {
        self.process.resume()
    }

    /// Stops the server cleanly: sessions are cut off, data is checkpointed.
    ///
    /// # Errors
    /// When it is not running or does not end.
    pub async fn terminate(&self) -> Result<()> {
        self.process.terminate().await.map(drop)
    }

    /// Whether the server process exists.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }

    /// The server process, for its log and what it costs.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Where the server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// The directory of the server's unix socket.
    #[must_use]
    pub fn socket_directory(&self) -> &Path {
        &self.socket_directory
    }

    /// URL of the database `postgres`.
    #[must_use]
    pub fn url(&self) -> String {
        self.database_url(DEFAULT_DATABASE)
    }

    /// URL of a database by name.
    #[must_use]
    pub fn database_url(&self, database: &str) -> String {
        database_url(self.address(), database)
    }

    /// URL of a database through a proxy in front of this server.
    #[must_use]
    pub fn url_through(&self, proxy: &FaultProxy, database: &str) -> String {
        database_url(proxy.addr(), database)
    }

    /// Creates an empty database and returns its URL.
    ///
    /// # Errors
    /// When the name is taken or not made of lower-case letters, digits and `_`.
    pub async fn create_database(&self, name: &str) -> Result<String> {
        let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
        ensure!(name.chars().all(plain), "{name:?} would need quoting as a database name");
        self.query(&format!("create database {name}")).await?;
        Ok(self.database_url(name))
    }

    /// Runs SQL in the database `postgres` over a connection of its own; returns the rows of all statements as text.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses a statement.
    pub async fn query(&self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        self.query_in(DEFAULT_DATABASE, sql).await
    }

    /// As [`query`](Self::query), in another database.
    ///
    /// # Errors
    /// As [`query`](Self::query).
    pub async fn query_in(&self, database: &str, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        let mut connection = wire::Connection::open(self.address(), SUPERUSER, database).await?;
        connection.query(sql).await.with_context(|| format!("query failed: {sql}"))
    }
}

/// Runs an empty query on the default database of whatever speaks Postgres at `address`.
pub(crate) async fn ping(address: SocketAddr) -> Result<()> {
    wire::Connection::open(address, SUPERUSER, DEFAULT_DATABASE).await?.query("select 1").await.map(drop)
}

pub(crate) fn database_url(address: SocketAddr, database: &str) -> String {
    format!("postgres://{SUPERUSER}@{address}/{database}")
}

/// The lines appended to `postgresql.conf`; of a setting given twice the last counts.
fn settings(options: &PostgresOptions, port: &Port, socket_directory: &Path) -> String {
    let fixed = [
        ("listen_addresses", "127.0.0.1".to_owned()),
        ("port", port.number().to_string()),
        ("unix_socket_directories", socket_directory.display().to_string()),
        ("shared_buffers", "128MB".to_owned()),
        // Posix segments of a killed server would stay in /dev/shm; these are files in the data directory.
        ("dynamic_shared_memory_type", "mmap".to_owned()),
        ("max_connections", "200".to_owned()),
        ("max_prepared_transactions", "20".to_owned()),
        ("wal_level", "logical".to_owned()),
        ("max_replication_slots", "50".to_owned()),
        ("max_wal_senders", "50".to_owned()),
        ("autovacuum", "on".to_owned()),
        ("synchronous_commit", "on".to_owned()),
        ("fsync", if options.durable { "on" } else { "off" }.to_owned()),
        ("log_line_prefix", "%m [%p] %d %a ".to_owned()),
    ];
    let extra = options.settings.iter().map(|(name, value)| (name.as_str(), value.clone()));
    let mut lines = String::from("\n");
    for (name, value) in fixed.into_iter().chain(extra) {
        let quoted = value.replace('\'', "''");
        writeln!(lines, "{name} = '{quoted}'").expect("writing to a string cannot fail");
    }
    lines
}
