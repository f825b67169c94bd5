//! A whole process: signals, failpoints, exit codes and the last word on standard error.
//!
//! Each test starts this test binary again to run `daemon` alone, told what to do by environment variables; only a
//! process of its own can be killed, or given an environment.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};
use service::{Boot, ServiceOptions, Shutdown, UsageError, failpoint};

/// Tells the process that it is the daemon, and how to end: `stop`, `hang`, `fail` or `misuse`.
const ENDING: &str = "SERVICE_TEST_ENDING";

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    service: ServiceOptions,
}

/// The daemon when started by another test; otherwise nothing.
#[test]
fn daemon() {
    let Ok(ending) = std::env::var(ENDING) else { return };
    let cli: Cli = service::parse_from(["daemon"]).unwrap_or_else(|error| error.exit());
    let boot = Boot { name: "daemon", failpoints: &["daemon.started"] };
    let code = boot.run(&cli.service, |shutdown| run(ending, shutdown));
    let known = [(ExitCode::SUCCESS, 0), (ExitCode::FAILURE, 1), (ExitCode::from(2), 2)];
    let code = known.iter().find(|(known, _)| *known == code).map_or(99, |(_, number)| *number);
    std::process::exit(code);
}

async fn run(ending: String, shutdown: Shutdown) -> anyhow::Result<()> {
    for _ in 0..2 {
        tracing::info_span!("starting").in_scope(|| tracing::info!("started"));
        failpoint::hit("daemon.started").await;
    }
    match ending.as_str() {
        "fail" => Err(anyhow::anyhow!("the broker is gone")),
        "misuse" => Err(UsageError("TOPIC is empty".to_owned()).into()),
        _ => {
            tracing::info!("waiting");
            shutdown.requested().await;
            if ending == "hang" {
                std::future::pending::<()>().await;
            }
            Ok(())
        }
    }
}

struct Daemon {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    log: String,
}

fn start(ending: &str, environment: &[(&str, &str)]) -> Daemon {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "daemon", "--nocapture"])
        .env(ENDING, ending)
        .env("RUST_LOG", "info")
        .envs(environment.iter().copied())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    Daemon { child, stderr, log: String::new() }
}

impl Daemon {
    fn read_until(&mut self, text: &str) {
        while !self.log.contains(text) {
            let read = self.stderr.read_line(&mut self.log).unwrap();
            assert!(read > 0, "ended before {text:?}:\n{}", self.log);
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(mut self) -> (ExitStatus, String) {
        self.stderr.read_to_string(&mut self.log).unwrap();
        (self.child.wait().unwrap(), std::mem::take(&mut self.log))
    }
}

impl Drop for Daemon {
    /// Leaves no process behind when a test fails.
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
    }
}

#[test]
fn a_daemon_told_to_stop_exits_with_zero() {
    let mut daemon = start("stop", &[]);
    daemon.read_until("waiting");
    daemon.signal(Signal::TERM);
    let (status, log) = daemon.end();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("SIGTERM received"), "{log}");
}

#[test]
fn a_second_signal_ends_a_hanging_daemon_at_once() {
    for (second, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut daemon = start("hang", &[]);
        daemon.read_until("waiting");
        daemon.signal(Signal::INT);
        daemon.read_until("SIGINT received");
        daemon.signal(second);
        let (status, log) = daemon.end();
        assert_eq!(status.code(), Some(code), "{log}");
    }
}

#[test]
fn an_error_is_the_last_line_and_exits_with_one() {
    let (status, log) = start("fail", &[]).end();
    assert_eq!(status.code(), Some(1), "{log}");
    assert_eq!(log.lines().last(), Some("error: the broker is gone"), "{log}");
}

#[test]
fn a_json_log_ends_in_json_too() {
    let (_, log) = start("fail", &[("LOG_FORMAT", "json")]).end();
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    assert_eq!(lines[0]["message"], "started");
    assert_eq!(lines.last().unwrap()["message"], "the broker is gone");
}

#[test]
fn an_empty_variable_counts_as_not_set() {
    let empty = ["DRAIN_TIMEOUT", "LOG_FORMAT", "RUST_LOG", "OTEL_EXPORTER_OTLP_ENDPOINT", "FAILPOINTS"];
    let (status, log) = start("fail", &empty.map(|variable| (variable, ""))).end();
    assert_eq!(status.code(), Some(1), "{log}");
    assert_eq!(log.lines().last(), Some("error: the broker is gone"), "{log}");
}

#[test]
#[cfg(not(feature = "otlp"))]
fn a_collector_is_refused_by_a_program_that_cannot_export_to_it() {
    let (status, log) = start("fail", &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")]).end();
    assert_eq!(status.code(), Some(2), "{log}");
    assert!(log.contains("OTEL_EXPORTER_OTLP_ENDPOINT") && log.contains("feature `otlp`"), "{log}");
}

#[test]
#[cfg(feature = "otlp")]
fn an_unreachable_collector_is_reported_once_and_does_not_hold_up_the_exit() {
    let begin = Instant::now();
    let (status, log) = start("fail", &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")]).end();
    assert_eq!(status.code(), Some(1), "{log}");
    assert_eq!(log.matches("spans cannot be exported").count(), 1, "{log}");
    assert_eq!(log.lines().last(), Some("error: the broker is gone"), "{log}");
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}: {log}", begin.elapsed());
}

#[test]
fn misuse_and_bad_variables_exit_with_two_and_name_what_is_wrong() {
    for (environment, part) in [
        (("RUST_LOG", "info"), "TOPIC is empty"),
        (("RUST_LOG", "daemon=loud"), "'--log <FILTER> from environment variable RUST_LOG'"),
        (
            ("DRAIN_TIMEOUT", "10"),
            "'--drain-timeout <DURATION> from environment variable DRAIN_TIMEOUT': not a duration",
        ),
        (("LOG_FORMAT", "xml"), "'--log-format <LOG_FORMAT> from environment variable LOG_FORMAT'"),
        (
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector"),
            "variable OTEL_EXPORTER_OTLP_ENDPOINT': only http://",
        ),
        (
            ("FAILPOINTS", "daemon.nowhere=kill"),
            "error: FAILPOINTS: this program has no failpoint \"daemon.nowhere\"",
        ),
    ] {
        let (status, log) = start("misuse", &[environment]).end();
        assert_eq!(status.code(), Some(2), "{environment:?}: {log}");
        assert!(log.contains(part), "{environment:?}: {log}");
    }
}

#[test]
fn a_killing_failpoint_kills_at_the_hit_it_names() {
    for (failpoints, hits) in [("daemon.started=kill", 1), ("daemon.started=kill@2", 2)] {
        let (status, log) = start("stop", &[("FAILPOINTS", failpoints)]).end();
        assert_eq!(status.signal(), Some(Signal::KILL.as_raw()), "{log}");
        assert_eq!(log.matches(": started").count(), hits, "{log}");
        assert!(log.contains("failpoint daemon.started is armed"), "{log}");
    }
}

#[test]
fn a_sleeping_failpoint_delays_and_a_pausing_one_holds() {
    let begin = Instant::now();
    let (status, log) = start("fail", &[("FAILPOINTS", "daemon.started=sleep(300ms)@2")]).end();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(begin.elapsed() >= Duration::from_millis(300));

    let mut paused = start("stop", &[("FAILPOINTS", "daemon.started=pause@2")]);
    paused.read_until("fires");
    paused.child.kill().unwrap();
    let (_, log) = paused.end();
    assert!(!log.contains("waiting"), "{log}");
}
