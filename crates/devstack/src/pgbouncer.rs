//! The PgBouncer connection pooler.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::Result;
use rustix::process::Signal;

use crate::account::Account;
use crate::binaries::Binary;
use crate::ports::Port;
use crate::postgres::{Postgres, SUPERUSER, database_url, ping};
use crate::process::Process;
use crate::readiness::wait_until_ready;

/// When PgBouncer hands a server connection to another client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    /// When the client disconnects.
    Session,
    /// When the transaction ends.
    Transaction,
    /// When the statement ends.
    Statement,
}

/// A PgBouncer in front of a Postgres server, in that server's directory.
#[derive(Debug)]
pub struct PgBouncer {
    process: Process,
    port: Port,
}

impl PgBouncer {
    /// Starts a pooler with at most `pool_size` server connections per database.
    ///
    /// # Errors
    /// [`MissingBinaries`](crate::MissingBinaries), or whatever keeps it from starting, with its log.
    pub async fn start(postgres: &Postgres, mode: PoolMode, pool_size: u32) -> Result<Self> {
        let binary = Binary::PgBouncer.find()?;
        let directory = postgres.process().directory();
        let port = Port::reserve()?;
        let name = directory.unique_name("pgbouncer");
        let home = directory.create_subdirectory(&name)?;
        let file = home.join("pgbouncer.ini");
        std::fs::write(&file, configuration(postgres.address(), port.number(), mode, pool_size))?;
        let mut command = Command::new(binary);
        command.arg(&file).current_dir(&home);
        if let Some(account) = Account::instead_of_root()? {
            account.apply(&mut command);
        }
        // What SIGTERM means differs between versions; SIGINT has always waited for running queries.
        let process = Process::prepare(directory, &name, command).terminate_with(Signal::INT);
        let pgbouncer = Self { process, port };
        pgbouncer.start_again().await?;
        Ok(pgbouncer)
    }

    /// Starts the pooler again on the same port, and waits until it answers.
    ///
    /// # Errors
    /// When it is running, or does not become ready.
    pub async fn start_again(&self) -> Result<()> {
        self.process.start()?;
        wait_until_ready(&self.process, async || ping(self.address()).await).await
    }

    /// The pooler's process, to kill, stop and terminate it.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Where the pooler listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// URL of the database `postgres` through the pooler.
    #[must_use]
    pub fn url(&self) -> String {
        self.database_url("postgres")
    }

    /// URL of a database by name through the pooler.
    #[must_use]
    pub fn database_url(&self, database: &str) -> String {
        database_url(self.address(), database)
    }
}

/// Connections take turns: what is wrong with sharing them shows at once, not under load only.
fn configuration(postgres: SocketAddr, port: u16, mode: PoolMode, pool_size: u32) -> String {
    let mode = match mode {
        PoolMode::Session => "session",
        PoolMode::Transaction => "transaction",
        PoolMode::Statement => "statement",
    };
    format!(
        "[databases]\n* = host={} port={} user={SUPERUSER}\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
         pool_mode = {mode}\nserver_round_robin = 1\ndefault_pool_size = {pool_size}\nmax_client_conn = 1000\n\
         ignore_startup_parameters = extra_float_digits\n",
        postgres.ip(),
        postgres.port(),
    )
}
