use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use devstack::{Port, Process, StackDirectory, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a daemon may take to become ready on a busy machine.
const READY: Duration = Duration::from_secs(60);

/// Path of one of our programs as built with the tests.
///
/// # Errors
/// If it is not beside them.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let file = format!("{name}-under-test");
    let tests = std::env::current_exe()?;
    // target/<profile>/deps/<test> or target/<profile>/<program>
    let folder = tests.ancestors().skip(1).take(2).find(|folder| folder.join(&file).is_file());
    Ok(folder.with_context(|| format!("{file} is not beside the tests"))?.join(file))
}

/// A relay or a subscriber as a process of its own.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    http: Port,
}

impl Daemon {
    /// Starts the program with these environment variables. Does not wait until it is ready.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(
        directory: &Arc<StackDirectory>,
        name: &str,
        variables: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        let http = Port::reserve()?;
        let mut command = Command::new(program(name)?);
        command.env("HTTP_ADDR", http.address().to_string()).env("NO_COLOR", "1").env("RUST_LOG", "info");
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        Ok(Self { process: Process::spawn(directory, name, command)?, http })
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Where it serves HTTP.
    #[must_use]
    pub fn http(&self) -> SocketAddr {
        self.http.address()
    }

    /// Waits until it says that it is ready.
    #[track_caller]
    pub fn until_ready(&self) -> impl Future<Output = ()> {
        eventually(READY, async || {
            let (status, body) = self.get("/readyz").await.map_err(|error| format!("{error:#}"))?;
            if status == 200 { Ok(()) } else { Err(format!("{status} {body}; log:\n{}", self.process.log())) }
        })
    }

    /// Waits until it says that it is not ready, and returns why.
    #[track_caller]
    pub fn until_not_ready(&self) -> impl Future<Output = String> {
        eventually(READY, async || {
            let (status, body) = self.get("/readyz").await.map_err(|error| format!("{error:#}"))?;
            if status == 503 { Ok(body) } else { Err(format!("{status} {body}")) }
        })
    }

    /// Waits until it says that it is not ready for a reason that contains `word`, and returns the reason.
    #[track_caller]
    pub fn until_not_ready_because(&self, word: &str) -> impl Future<Output = String> {
        eventually(READY, async move || {
            let (status, body) = self.get("/readyz").await.map_err(|error| format!("{error:#}"))?;
            if status == 503 && body.contains(word) { Ok(body) } else { Err(format!("{status} {body}")) }
        })
    }

    /// One HTTP request: status and body.
    ///
    /// # Errors
    /// If nobody answers.
    pub async fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let mut connection = TcpStream::connect(self.http()).await?;
        connection.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await?;
        let status = answer.split_whitespace().nth(1).and_then(|status| status.parse().ok());
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        Ok((status.context("no status line")?, body.trim().to_owned()))
    }

    /// The sum of a metric over its labels, 0 if it has not been recorded yet.
    ///
    /// # Errors
    /// If nobody answers.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let (_, text) = self.get("/metrics").await?;
        let of_metric =
            |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        Ok(text
            .lines()
            .filter(of_metric)
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }
}
