//! Signals that come while a program waits for a server.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use devstack::{Stack, StackOptions, eventually};
use rustix::process::{Pid, Signal, kill_process};
use tests::program;
use tokio::net::TcpListener;

/// Well below the time for which a program tries to reach a server.
const SOON: Duration = Duration::from_secs(15);

/// Starts a program whose server accepts the connection and says nothing, sends the signal, and returns how it ended.
async fn end_of(name: &str, arguments: &[&str], variables: &[(&str, String)], signal: Signal) -> ExitStatus {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let mut command = Command::new(program(name).unwrap());
    command
        .args(arguments)
        .env("DATABASE_URL", format!("postgres://app@{address}/app"))
        .env("NATS_URL", format!("nats://{address}"))
        .env("REDIS_URL", "redis://127.0.0.1:1")
        .env("HTTP_ADDR", "127.0.0.1:0")
        .env("RELAY_STARTUP_TIMEOUT", "5m")
        .env("SUBSCRIBER_STARTUP_TIMEOUT", "5m")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .envs(variables.iter().map(|(name, value)| (name, value)));
    let mut child = Ended(command.spawn().unwrap());
    let _held = silent.accept().await.unwrap();
    kill_process(Pid::from_child(&child.0), signal).unwrap();
    eventually(SOON, async || {
        let ended = child.0.try_wait().unwrap();
        ended.ok_or_else(|| format!("{name} {arguments:?} goes on after {signal:?}"))
    })
    .await
}

/// Leaves no process behind when a test fails.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_told_to_stop_while_it_starts_stops_at_once() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let pool = sqlx::PgPool::connect(&stack.postgres_url()).await.unwrap();
    outbox::migrate(&pool).await.unwrap();
    let database = [("DATABASE_URL", stack.postgres_url())];
    for (name, variables) in [("relay", &[][..]), ("relay", &database), ("subscriber", &[])] {
        let status = end_of(name, &[], variables, Signal::TERM).await;
        assert_eq!(status.code(), Some(0), "{name} {variables:?}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_ends_at_the_first_signal() {
    for (name, signal, code) in
        [("relay", Signal::TERM, 143), ("relay", Signal::INT, 130), ("subscriber", Signal::INT, 130)]
    {
        let status = end_of(name, &["status"], &[], signal).await;
        assert_eq!((status.code(), status.signal()), (Some(code), None), "{name} {signal:?}");
    }
}
