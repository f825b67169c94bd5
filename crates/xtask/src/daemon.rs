//! A relay, a subscriber or a service as a process.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use devstack::{Port, Process, StackDirectory};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::wait;

/// How long one may take to become ready on a busy machine.
const READY: Duration = Duration::from_secs(60);

/// The process and where it serves HTTP.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    http: Port,
}

impl Daemon {
    /// Starts the program with these environment variables. Does not wait until it is ready.
    pub fn spawn(
        directory: &Arc<StackDirectory>,
        program: &Path,
        variables: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        let name = program.file_stem().context("a program has a name")?.to_string_lossy();
        let http = Port::reserve()?;
        let mut command = Command::new(program);
        command.env("HTTP_ADDR", http.address().to_string()).env("NO_COLOR", "1");
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        Ok(Self { process: Process::spawn(directory, &name, command)?, http })
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Where it serves HTTP.
    pub fn http_url(&self) -> String {
        format!("http://{}", self.http.address())
    }

    /// Waits until it says that it is ready.
    pub async fn until_ready(&self) -> anyhow::Result<()> {
        let what = format!("{} is ready", self.process.name());
        let ready = wait::until(&what, READY, async || {
            ensure!(self.process.is_running(), "it has ended");
            Ok((self.get("/readyz").await?.0 == 200).then_some(()))
        });
        ready.await.with_context(|| self.process.log())
    }

    /// Waits until it says that it is not ready, and returns why.
    pub async fn until_not_ready(&self) -> anyhow::Result<String> {
        let what = format!("{} is not ready", self.process.name());
        wait::until(&what, READY, async || {
            let (status, body) = self.get("/readyz").await?;
            Ok((status != 200).then_some(body))
        })
        .await
    }

    /// Stops it cleanly.
    pub async fn terminate(&self) -> anyhow::Result<()> {
        let status = self.process.terminate().await?;
        ensure!(status.success(), "{} ended with {status}\n{}", self.process.name(), self.process.log());
        Ok(())
    }

    /// The sum of a metric over its labels, 0 if it has not been recorded yet.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let (_, text) = self.get("/metrics").await?;
        let of_metric =
            |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let value = |line: &str| line.rsplit(' ').next()?.parse::<f64>().ok();
        Ok(text.lines().filter(of_metric).filter_map(value).sum())
    }

    async fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        self.request("GET", path, "").await
    }

    /// One HTTP request with a JSON body, if any: status and body of the answer.
    pub async fn request(&self, method: &str, path: &str, body: &str) -> anyhow::Result<(u16, String)> {
        let mut connection = TcpStream::connect(self.http.address()).await?;
        let about_body = format!("Content-Type: application/json\r\nContent-Length: {}", body.len());
        let request = format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\n{about_body}\r\n\r\n{body}");
        connection.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await?;
        let status = answer.split_whitespace().nth(1).and_then(|status| status.parse().ok());
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        Ok((status.context("no status line")?, body.trim().to_owned()))
    }
}
