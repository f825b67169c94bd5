//! The relay: takes committed events from the outbox and publishes them to NATS JetStream.

use std::process::ExitCode;

use crate::admin::{self, Command};
use crate::{Config, FAILPOINTS};
use clap::Parser;
use service::Boot;

/// Publishes the cache invalidations of committed Postgres transactions to NATS JetStream
#[derive(Debug, Parser)]
#[command(name = "relay", version)]
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
    let boot = Boot { name: "relay", failpoints: FAILPOINTS };
    match cli.command {
        None | Some(Command::Run) => {
            boot.run(&options, async move |shutdown| crate::run(cli.config, shutdown).await)
        }
        Some(command) => boot.run_command(&options, admin::execute(command, &cli.config)),
    }
}
