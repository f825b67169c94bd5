//! Every read of a few seconds is checked, in each mode: `cargo xtask check-history` in short.

use std::process::{Command, ExitStatus};
use std::time::Duration;

use devstack::{StackDirectory, eventually};
use serde_json::Value;
use tests::program;

/// How long a run may take, coming to rest included.
const PATIENCE: Duration = Duration::from_secs(300);

/// Fewer reads, commits or faults would show nothing; many times as many are usual.
const ENOUGH_READS: u64 = 1_000;
const ENOUGH_COMMITS: u64 = 20;
const ENOUGH_FAULTS: u64 = 3;

struct Run {
    status: ExitStatus,
    figures: Value,
    report: String,
}

impl Run {
    fn count(&self, name: &str) -> u64 {
        self.figures[name].as_u64().unwrap()
    }

    #[track_caller]
    fn assert_kept(&self) {
        assert!(self.status.success(), "{}", self.report);
        assert!(self.count("reads") >= ENOUGH_READS, "{}", self.report);
        assert!(self.count("commits") >= ENOUGH_COMMITS, "{}", self.report);
        assert!(self.count("cached") > 0, "{}", self.report);
    }

    #[track_caller]
    fn assert_faults(&self) {
        let faults = self.figures["faults"].as_object().unwrap();
        let count: u64 = faults.values().filter_map(Value::as_u64).sum();
        assert!(count >= ENOUGH_FAULTS, "{}", self.report);
    }
}

async fn check(mode: &str, seconds: u64, faults: &str) -> Run {
    let directory = StackDirectory::create().unwrap();
    let summary = directory.path().join("summary");
    let mut command = Command::new(program("xtask").unwrap());
    command.args(["check-history", "--mode", mode, "--seconds", &seconds.to_string(), "--faults", faults]);
    command.arg("--relay").arg(program("relay").unwrap());
    command.arg("--subscriber").arg(program("subscriber").unwrap());
    command.arg("--summary").arg(&summary).env("NO_COLOR", "1");
    let process = devstack::Process::spawn(&directory, "check-history", command).unwrap();
    let status = eventually(PATIENCE, async || process.exit_status().ok_or_else(|| process.log())).await;
    let report = process.log();
    println!("{report}");
    let figures = std::fs::read_to_string(&summary).unwrap_or_else(|_| panic!("{report}"));
    Run { status, figures: serde_json::from_str(&figures).unwrap(), report }
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_reads_are_never_stale_whatever_fails() {
    let run = check("strict", 6, "all").await;
    run.assert_kept();
    run.assert_faults();
    assert_eq!([run.count("stale"), run.count("backwards"), run.count("stuck")], [0; 3], "{}", run.report);
}

#[tokio::test(flavor = "multi_thread")]
async fn default_reads_are_stale_for_a_while_and_no_stale_value_stays_whatever_fails() {
    let run = check("default", 6, "all").await;
    run.assert_kept();
    run.assert_faults();
    assert_eq!(run.count("stuck"), 0, "{}", run.report);
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_cache_aside_is_seen_to_be_stale() {
    let run = check("naive", 4, "none").await;
    run.assert_kept();
    assert!(run.count("stale") > 0, "{}", run.report);
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_writes_without_marks_are_found_out() {
    let run = check("unmarked", 4, "none").await;
    assert!(!run.status.success() && run.count("backwards") > 0, "{}", run.report);
    assert!(run.report.contains("went backwards") && run.report.contains("got version"), "{}", run.report);
}
