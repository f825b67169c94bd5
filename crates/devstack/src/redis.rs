//! A Redis server.

pub(crate) mod cluster;
pub(crate) mod replica_pair;
mod resp;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Result, ensure};

use crate::binaries::Binary;
use crate::copy::replace_directory;
use crate::directory::StackDirectory;
use crate::ports::Port;
use crate::process::Process;
use crate::proxy::FaultProxy;
use crate::readiness::wait_until_ready;

/// How to run Redis.
#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    /// Keep an append-only file, so that a killed server loses at most its last second.
    pub append_only: bool,
    /// More lines for the configuration file; they win over the defaults.
    pub configuration: String,
}

/// A Redis server. It saves nothing by itself unless the options say so.
#[derive(Debug)]
pub struct Redis {
    process: Process,
    port: Port,
    home: PathBuf,
}

/// What a `redis-server` process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Server,
    Sentinel,
}

impl Redis {
    /// Starts a server in a directory of its own.
    ///
    /// # Errors
    /// [`MissingBinaries`](crate::MissingBinaries), or whatever keeps the server from starting, with its log.
    pub async fn start_alone(options: RedisOptions) -> Result<Self> {
        Self::start_in(&StackDirectory::create()?, options).await
    }

    /// Starts a server in `directory`.
    ///
    /// # Errors
    /// As [`start_alone`](Self::start_alone).
    pub async fn start_in(directory: &Arc<StackDirectory>, options: RedisOptions) -> Result<Self> {
        let append_only = if options.append_only { "yes" } else { "no" };
        let configuration = format!("save \"\"\nappendonly {append_only}\n{}", options.configuration);
        Self::launch(directory, Port::reserve()?, Role::Server, &configuration).await
    }

    async fn launch(
        directory: &Arc<StackDirectory>,
        port: Port,
        role: Role,
        configuration: &str,
    ) -> Result<Self> {
        let binary = Binary::RedisServer.find()?;
        let name = directory.unique_name(if role == Role::Server { "redis" } else { "redis-sentinel" });
        let home = directory.create_subdirectory(&name)?;
        let data = directory.create_subdirectory(&format!("{name}/data"))?;
        let file = home.join("redis.conf");
        let lines = format!(
            "port {}\nbind 127.0.0.1\ndir {}\ndaemonize no\n{configuration}\n",
            port.number(),
            data.display()
        );
        std::fs::write(&file, lines)?;
        let mut command = Command::new(binary);
        command.arg(&file).current_dir(&home);
        if role == Role::Sentinel {
            command.arg("--sentinel");
        }
        let redis = Self { process: Process::prepare(directory, &name, command), port, home };
        redis.start().await?;
        Ok(redis)
    }

    /// Starts the server again on the same port and data, and waits until it has loaded them.
    ///
    /// # Errors
    /// When it is running, or does not become ready.
    pub async fn start(&self) -> Result<()> {
        self.process.start()?;
        wait_until_ready(&self.process, async || {
            let reply = self.command(&["PING"]).await?;
            ensure!(reply == "PONG", "{reply}");
            Ok(())
        })
        .await
    }

    /// Stops the server cleanly and starts it again.
    ///
    /// # Errors
    /// When either fails.
    pub async fn restart(&self) -> Result<()> {
        self.terminate().await?;
        self.start().await
    }

    /// Kills the server (SIGKILL).
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub fn kill(&self) -> Result<()> {
        self.process.kill()
    }

    /// Freezes the server.
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

    /// Stops the server cleanly. Without save points it does not save its data.
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

    /// URL for clients.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// URL for clients through a proxy in front of this server.
    #[must_use]
    pub fn url_through(&self, proxy: &FaultProxy) -> String {
        format!("redis://{}", proxy.addr())
    }

    /// Runs one command. Arrays come back with one element per line, nil as an empty string.
    ///
    /// # Errors
    /// When the server cannot be reached or replies with an error.
    pub async fn command(&self, arguments: &[&str]) -> Result<String> {
        resp::command(self.address(), arguments).await
    }

    /// Saves the running server's data and copies it aside, over an earlier snapshot.
    ///
    /// The saved file also stays in the server's own directory: a server killed and started afterwards comes back
    /// with it.
    ///
    /// # Errors
    /// When the server cannot save.
    pub async fn save_snapshot(&self) -> Result<()> {
        self.command(&["SAVE"]).await?;
        replace_directory(&self.data(), &self.snapshot())
    }

    /// Replaces the stopped server's data, append-only file included, by the last snapshot.
    ///
    /// # Errors
    /// When it is running, or there is no snapshot.
    pub fn restore_snapshot(&self) -> Result<()> {
        ensure!(!self.is_running(), "{} is running", self.process.name());
        ensure!(self.snapshot().is_dir(), "there is no snapshot");
        replace_directory(&self.snapshot(), &self.data())
    }

    /// One line of the `INFO` command by its name, such as `run_id`.
    pub(crate) async fn info(&self, section: &str, name: &str) -> Result<Option<String>> {
        let info = self.command(&["INFO", section]).await?;
        Ok(info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::to_owned))
    }

    fn data(&self) -> PathBuf {
        self.home.join("data")
    }

    fn snapshot(&self) -> PathBuf {
        self.home.join("snapshot")
    }
}
