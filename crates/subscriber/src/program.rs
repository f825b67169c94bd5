//! The subscriber: invalidates the Redis keys named by events from NATS JetStream.

use std::process::ExitCode;

use crate::admin::{self, Command};
use crate::{Config, FAILPOINTS};
use clap::Parser;
use service::Boot;

/// Invalidates the Redis keys that committed Postgres transactions made stale
#[derive(Debug, Parser)]
#[command(name = "subscriber", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: Config,
}

/// Runs the program with the arguments of this process.
#[must_use]
pub fn program() -> ExitCode {
    let cli: Cli = service::parse();
    let options = cli.config.service.clone();
    let boot = Boot { name: "subscriber", failpoints: FAILPOINTS };
    match cli.command {
        None | Some(Command::Run) => {
            boot.run(&options, async move |shutdown| crate::run(cli.config, shutdown).await)
        }
        Some(command) => boot.run_command(&options, admin::execute(command, &cli.config)),
    }
}
