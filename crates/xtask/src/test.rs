//! The whole test suite.

use std::process::{Command, ExitCode};

use anyhow::Context;
use devstack::Binary;

use crate::{programs, servers};

/// Run all tests, installing missing servers first
///
/// Everything after `--` goes to `cargo test --workspace`: `-- rolled_back` runs the tests with that in their names,
/// `-- -- --nocapture` shows what they print.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Arguments of `cargo test`
    #[arg(last = true, value_name = "ARGUMENT")]
    arguments: Vec<String>,
}

/// Runs it and returns its exit code.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    servers::provide(Binary::ALL)?;
    let mut command = Command::new(programs::cargo());
    command.args(["test", "--workspace"]).args(&arguments.arguments).current_dir(programs::workspace());
    command.envs([programs::test_threads()]);
    let status = command.status().context("cannot start cargo")?;
    // Without a code it was killed by a signal.
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(ExitCode::from(code))
}
