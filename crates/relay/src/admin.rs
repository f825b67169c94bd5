//! What an operator asks of the relay on the command line.

mod dead;
mod doctor;
mod rules;
mod slot;
mod status;

use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;
use outbox::republication;
use service::nats::Nats;
use sqlx::PgPool;

use crate::database::{Access, Servers};
use crate::stream::{self, Looked};
use crate::{Config, database, run};

pub use dead::DeadCommand;
pub use rules::RulesCommand;
pub use slot::SlotCommand;

/// An operator waits in front of the terminal: give up early.
const PATIENCE: Duration = Duration::from_secs(5);

/// Administrative commands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Publish committed events until told to stop (the default)
    Run,
    /// Install or upgrade the schema `outbox` in the database
    Migrate,
    /// Show backlog, rate and stream
    Status,
    /// List, show, replay or discard events that could not be published
    #[command(subcommand)]
    Dead(DeadCommand),
    /// Check, try and install the rules: which cache keys depend on which table
    #[command(subcommand)]
    Rules(RulesCommand),
    /// Show the replication slot, accept what it has missed, or drop it
    #[command(subcommand)]
    Slot(SlotCommand),
    /// Let the running relays publish again what they published lately and is still retained
    Republish {
        /// How far back, for example 5m
        #[arg(long, value_name = "DURATION", value_parser = service::parse_duration)]
        since: Duration,
    },
    /// Ask the running relay at HTTP_ADDR whether it is ready; exits with 1 if not
    Health,
    /// Check database, stream and clocks, and say what to do about each finding; exits with 1 if something is wrong
    Doctor,
}

/// Carries out an administrative command; [`Command::Run`] is not one.
///
/// # Errors
/// What failed, naming what to fix.
pub async fn execute(command: Command, config: &Config) -> anyhow::Result<()> {
    if matches!(command, Command::Health) {
        println!("{}", service::http::ask_ready(config.http_addr).await?);
        return Ok(());
    }
    if let Command::Rules(RulesCommand::Test(trial)) = &command {
        return rules::test(config, trial);
    }
    let url = &config.database_url()?;
    let pool = database::connect(&Servers::parse(url)?, 2, access(&command, config)).await?;
    if matches!(command, Command::Migrate) {
        database::migrate(&pool, url).await?;
        println!("schema `outbox` is installed and current");
        return Ok(());
    }
    database::check_schema(&pool, url).await?;
    match command {
        Command::Run | Command::Health | Command::Migrate => unreachable!("handled before"),
        Command::Status => status::print(&pool, config).await,
        Command::Republish { since } => republish(&pool, since).await,
        Command::Dead(command) => dead::execute(&pool, command).await,
        Command::Slot(command) => slot::execute(&pool, config, command).await,
        Command::Doctor => doctor::print(&pool, config).await,
        Command::Rules(command) => rules::execute(&pool, command, config).await,
    }
}

/// A command that changes something needs the primary; one that looks is of use at a standby as well.
fn access(command: &Command, config: &Config) -> Access {
    let looks = match command {
        Command::Status | Command::Doctor => true,
        Command::Dead(command) => matches!(command, DeadCommand::List { .. } | DeadCommand::Show { .. }),
        Command::Slot(command) => matches!(command, SlotCommand::Show),
        Command::Rules(command) => {
            !matches!(command, RulesCommand::Apply { .. } | RulesCommand::Explain { .. })
        }
        Command::Run | Command::Migrate | Command::Health | Command::Republish { .. } => false,
    };
    match (looks, config.transaction_pooler) {
        (true, _) => Access::Look,
        (false, true) => Access::WritePooled,
        (false, false) => Access::Write,
    }
}

async fn republish(pool: &PgPool, since: Duration) -> anyhow::Result<()> {
    let Some(searched) = republication::request(pool, since).await? else {
        bail!("cannot publish anything again: no relay has published to a stream yet; start one");
    };
    println!(
        "the running relays publish again what is retained of the last {since:?}; about {searched} retained messages are \
         searched for it. `relay status` shows how many are left"
    );
    Ok(())
}

/// The stream as it is now, or what is wrong with the way to it. Looking must not create it.
async fn look_at_stream(config: &Config) -> anyhow::Result<(Nats, Option<Looked>)> {
    let nats = Nats::connect(&config.nats, "relay-admin", PATIENCE).await?;
    let jetstream = run::jetstream_context(&nats, config);
    let looked = stream::look(&nats, &jetstream).await?;
    Ok((nats, looked))
}
