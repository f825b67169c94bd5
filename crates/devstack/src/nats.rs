//! A NATS server with JetStream.

pub(crate) mod cluster;
mod wire;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use cluster::NatsCluster;

use crate::binaries::Binary;
use crate::copy::{remove_directory, replace_directory};
use crate::directory::StackDirectory;
use crate::ports::Port;
use crate::process::Process;
use crate::proxy::FaultProxy;
use crate::readiness::wait_until_ready;

/// The first version that knows `sync_interval`; an older one refuses to start with it.
const SYNC_INTERVAL_SINCE: (u32, u32) = (2, 10);

/// How to run NATS.
#[derive(Clone, Debug, Default)]
pub struct NatsOptions {
    /// Largest message in bytes; the server's default is 1 MiB.
    pub max_payload: Option<u32>,
    /// Write to the disk before acknowledging. Servers before 2.10 cannot, and run without.
    pub sync_always: bool,
    /// More lines for the configuration file.
    pub configuration: String,
}

/// A NATS server with JetStream in files.
#[derive(Debug)]
pub struct Nats {
    process: Process,
    port: Port,
    home: PathBuf,
    /// Where the other members of the cluster connect, if it is in one.
    route: Option<Port>,
}

impl Nats {
    /// Starts a server in a directory of its own.
    ///
    /// # Errors
    /// [`MissingBinaries`](crate::MissingBinaries), or whatever keeps the server from starting, with its log.
    pub async fn start_alone(options: NatsOptions) -> Result<Self> {
        Self::start_in(&StackDirectory::create()?, options).await
    }

    /// Starts a server in `directory`.
    ///
    /// # Errors
    /// As [`start_alone`](Self::start_alone).
    pub async fn start_in(directory: &Arc<StackDirectory>, options: NatsOptions) -> Result<Self> {
        let nats = Self::prepare(directory, Port::reserve()?, &options, None)?;
        nats.start().await?;
        Ok(nats)
    }

    /// Starts a cluster of `size` servers in a directory of its own.
    ///
    /// # Errors
    /// As [`start_alone`](Self::start_alone).
    pub async fn cluster(size: usize) -> Result<NatsCluster> {
        NatsCluster::start_in(&StackDirectory::create()?, size, NatsOptions::default()).await
    }

    /// Writes the configuration of a server that is not started yet.
    fn prepare(
        directory: &Arc<StackDirectory>,
        port: Port,
        options: &NatsOptions,
        cluster: Option<(Port, String)>,
    ) -> Result<Self> {
        let binary = Binary::NatsServer.find()?;
        let name = directory.unique_name("nats");
        let home = directory.create_subdirectory(&name)?;
        let sync = options.sync_always && version(&binary)? >= SYNC_INTERVAL_SINCE;
        let sync = if sync { "sync_interval: always" } else { "" };
        let payload = options.max_payload.map(|bytes| format!("max_payload: {bytes}\n")).unwrap_or_default();
        let (route, cluster) = cluster.map_or((None, String::new()), |(port, block)| (Some(port), block));
        let configuration = format!(
            "server_name: {name}\nlisten: \"{}\"\njetstream {{ store_dir: \"{}\"\n{sync} }}\n{payload}{cluster}\n{}\n",
            port.address(),
            home.join("data").display(),
            options.configuration,
        );
        std::fs::write(home.join("nats.conf"), configuration)?;
        let mut command = Command::new(binary);
        command.arg("--config").arg(home.join("nats.conf")).current_dir(&home);
        Ok(Self { process: Process::prepare(directory, &name, command), port, home, route })
    }

    /// Starts the server again on the same port and data, and waits until it answers; a single server with JetStream,
    /// a cluster member only to a ping, as it may lack a quorum.
    ///
    /// # Errors
    /// When it is running, or does not become ready.
    pub async fn start(&self) -> Result<()> {
        self.process.start()?;
        wait_until_ready(&self.process, async || match self.route {
            Some(_) => wire::Connection::open(self.address()).await.map(drop),
            None => self.request("$JS.API.INFO", "").await.map(drop),
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

    /// Stops the server cleanly.
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

    /// Where the server listens for clients.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// URL for clients.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    /// URL for clients through a proxy in front of this server.
    #[must_use]
    pub fn url_through(&self, proxy: &FaultProxy) -> String {
        format!("nats://{}", proxy.addr())
    }

    /// Sends a request to a JetStream API subject and returns the reply's JSON.
    ///
    /// # Errors
    /// When the server cannot be reached or replies with an error.
    pub async fn request(&self, subject: &str, payload: &str) -> Result<String> {
        let reply = wire::Connection::open(self.address()).await?.request(subject, payload).await?;
        ensure!(!reply.contains("\"error\":{"), "{subject}: {reply}");
        Ok(reply)
    }

    /// Deletes everything the stopped server has stored, as if its disk had been replaced.
    ///
    /// # Errors
    /// When it is running.
    pub fn wipe_data(&self) -> Result<()> {
        self.ensure_stopped()?;
        remove_directory(&self.data())
    }

    /// Copies the stopped server's data aside.
    ///
    /// # Errors
    /// When it is running.
    pub fn save_data(&self, label: &str) -> Result<()> {
        self.ensure_stopped()?;
        replace_directory(&self.data(), &self.saved(label))
    }

    /// Replaces the stopped server's data by what was saved under `label`.
    ///
    /// # Errors
    /// When it is running, or nothing was saved under that label.
    pub fn restore_data(&self, label: &str) -> Result<()> {
        self.ensure_stopped()?;
        ensure!(self.saved(label).is_dir(), "nothing was saved as {label:?}");
        replace_directory(&self.saved(label), &self.data())
    }

    fn data(&self) -> PathBuf {
        self.home.join("data")
    }

    fn saved(&self, label: &str) -> PathBuf {
        self.home.join(format!("saved-{label}"))
    }

    fn ensure_stopped(&self) -> Result<()> {
        ensure!(!self.is_running(), "{} is running", self.process.name());
        Ok(())
    }
}

/// Major and minor version, from `nats-server: v2.10.1`.
fn version(binary: &Path) -> Result<(u32, u32)> {
    let output = Command::new(binary).arg("--version").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = text.trim().rsplit('v').next().unwrap_or_default().split('.').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => None.with_context(|| format!("cannot read a version from {text:?}")),
    }
}
