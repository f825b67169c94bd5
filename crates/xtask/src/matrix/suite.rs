//! One suite on one set of servers.

use std::fmt::{Display, Formatter};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::programs;

/// A suite that uses real servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    EndToEnd,
    Cache,
    Rules,
    Wal,
}

/// Result of one run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    passed: u32,
    failed: u32,
    pub failures: Vec<String>,
}

impl Suite {
    /// Every suite.
    pub const ALL: &[Self] = &[Self::EndToEnd, Self::Cache, Self::Rules, Self::Wal];

    /// Returns the heading of its column.
    pub fn title(self) -> &'static str {
        match self {
            Self::EndToEnd => "end to end",
            Self::Cache => "cache",
            Self::Rules => "rules",
            Self::Wal => "wal",
        }
    }

    /// Test target of cargo.
    fn target(self) -> &'static str {
        match self {
            Self::EndToEnd => "suite",
            Self::Cache => "real_redis",
            Self::Rules => "postgres",
            Self::Wal => "session",
        }
    }

    /// Runs it and counts, showing its output meanwhile. A workspace build, so that nothing is compiled twice.
    ///
    /// # Errors
    /// When cargo cannot be started or nothing was run, such as when it does not compile.
    pub fn run(
        self,
        servers: &str,
        environment: &[(&str, PathBuf)],
        arguments: &[String],
    ) -> Result<Outcome> {
        println!("\n== {} on {servers}", self.title());
        let mut command = Command::new(programs::cargo());
        command.args(["test", "--workspace", "--test", self.target(), "--"]).args(arguments);
        command.current_dir(programs::workspace()).stdout(Stdio::piped());
        command.envs([programs::test_threads()]).envs(environment.iter().cloned());
        let mut child = command.spawn().context("cannot start cargo")?;
        let output = child.stdout.take().context("cargo has no output")?;
        let mut outcome = Outcome::default();
        for line in BufReader::new(output).lines() {
            let line = line?;
            println!("{line}");
            outcome.note(&line);
        }
        child.wait()?;
        anyhow::ensure!(!outcome.is_empty(), "no test was run: does it compile?");
        Ok(outcome)
    }
}

impl Outcome {
    /// Counts the tests in the output of a test program.
    pub fn read(output: &str) -> Self {
        let mut outcome = Self::default();
        output.lines().for_each(|line| outcome.note(line));
        outcome
    }

    /// Tells that no test was run.
    pub fn is_empty(&self) -> bool {
        self.passed + self.failed == 0
    }

    /// Tells that nothing failed.
    pub fn passed(&self) -> bool {
        self.failed == 0
    }

    fn note(&mut self, line: &str) {
        let Some(test) = line.strip_prefix("test ") else { return };
        if test.ends_with("... ok") {
            self.passed += 1;
        } else if let Some(name) = test.strip_suffix(" ... FAILED") {
            self.failed += 1;
            self.failures.push(name.to_owned());
        }
    }
}

impl Display for Outcome {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} of {}", self.passed, self.passed + self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_counted_and_failures_named() {
        let mut outcome = Outcome::default();
        let lines = [
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test d ... ok",
            "test result: FAILED.",
        ];
        lines.iter().for_each(|line| outcome.note(line));
        assert_eq!(outcome, Outcome { passed: 2, failed: 1, failures: vec!["a::c".to_owned()] });
        assert!(!outcome.passed());
        assert_eq!(outcome.to_string(), "2 of 3");
    }
}
