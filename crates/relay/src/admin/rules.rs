use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use outbox::testing;
use rules::catalog::{self, Facts};
use rules::coverage::coverage;
use rules::triggers::{self, Plan};
use rules::{Image, JsonImage, Lock, Rules};
use service::parse_duration;
use service::printable;
use sqlx::{AssertSqlSafe, PgConnection, PgPool};

use crate::Config;

/// What to do with the rules. They are read from RELAY_RULES (--rules).
#[derive(Debug, Clone, Subcommand)]
pub enum RulesCommand {
    /// Compare the rules with the database and the installed triggers; exits with 1 if something does not fit
    Check {
        /// For capture from the write-ahead log: check replica identities rather than triggers
        #[arg(long)]
        wal: bool,
        /// For Debezium: check replica identities rather than triggers, and write the types of the columns to this file,
        /// which the subscriber reads (SUBSCRIBER_RULES_LOCK)
        #[arg(long, value_name = "FILE", conflicts_with = "wal")]
        lock: Option<PathBuf>,
    },
    /// Print the keys that a changed row would invalidate; needs no database
    Test(Trial),
    /// Run a statement in a transaction that is rolled back, and print what it would invalidate; writers of its rows wait
    /// meanwhile, and writers of every watched table whose triggers are not installed
    Explain {
        /// SELECT, INSERT, UPDATE, DELETE, TRUNCATE, MERGE or WITH
        statement: String,
        /// How long to wait for locks of others
        #[arg(long, default_value = "2s", value_parser = parse_duration)]
        lock_timeout: Duration,
        /// How long the statement may take
        #[arg(long, default_value = "10s", value_parser = parse_duration)]
        statement_timeout: Duration,
    },
    /// List tables and columns that no rule watches
    Coverage,
    /// Print the SQL that installs the triggers
    Sql,
    /// Install, update and remove triggers until they are what the rules say, table by table
    Apply {
        /// How long to wait for the lock of each table; its writers wait as long
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        lock_timeout: Duration,
    },
    /// Remove every trigger that was installed, table by table; needs no rules file
    Remove {
        /// How long to wait for the lock of each table; its writers wait as long
        #[arg(long, default_value = "5s", value_parser = parse_duration)]
        lock_timeout: Duration,
    },
}

/// A changed row.
#[derive(Debug, Clone, Args)]
pub struct Trial {
    /// Table, with its schema unless that is public
    #[arg(long)]
    table: String,
    /// The row as it was, as JSON; none for an INSERT
    #[arg(long, required_unless_present = "new")]
    old: Option<String>,
    /// The row as it is, as JSON; none for a DELETE
    #[arg(long)]
    new: Option<String>,
}

/// Said when something was in the way for longer than allowed.
const BUSY: &str = "if a table was busy, run the command again, perhaps with a longer --lock-timeout";

/// Said when two operators change triggers at the same time.
const NOT_ALONE: &str = "cannot begin: another `relay rules` may be changing the triggers";

/// Statements that `explain` runs: none that could end the transaction it rolls back.
const EXPLAINABLE: [&str; 7] = ["insert", "update", "delete", "truncate", "merge", "with", "select"];

pub(super) async fn execute(pool: &PgPool, command: RulesCommand, config: &Config) -> anyhow::Result<()> {
    if let RulesCommand::Remove { lock_timeout } = command {
        return remove(pool, lock_timeout).await;
    }
    let rules = load(config)?;
    match command {
        RulesCommand::Apply { lock_timeout } => return apply(pool, &rules, lock_timeout).await,
        RulesCommand::Explain { statement, lock_timeout, statement_timeout } => {
            return explain(pool, &rules, &statement, lock_timeout, statement_timeout).await;
        }
        _ => {}
    }
    let mut connection = pool.acquire().await?;
    let facts = catalog::check(&mut connection, &rules).await?;
    match command {
        RulesCommand::Check { lock: Some(file), .. } => lock(&mut connection, &rules, &facts, &file).await,
        RulesCommand::Check { wal: true, .. } => {
            drop(connection);
            crate::capture::check_rules(pool, &config.capture, &rules).await?;
            println!("{} tables fit the database and its replica identities", facts.len());
            Ok(())
        }
        RulesCommand::Check { wal: false, .. } => {
            println!("{} tables fit the database", facts.len());
            let plan = triggers::plan(&mut connection, &rules, &facts).await?;
            warn(&mut connection, &rules, &facts).await?;
            match plan.steps.len() {
                0 => println!("the triggers are installed and current"),
                count => {
                    print_steps(&plan);
                    bail!(
                        "{count} steps are missing until the triggers are what the rules say; run `relay rules apply`"
                    );
                }
            }
            Ok(())
        }
        RulesCommand::Test(_)
        | RulesCommand::Remove { .. }
        | RulesCommand::Apply { .. }
        | RulesCommand::Explain { .. } => unreachable!("handled before"),
        RulesCommand::Coverage => print_coverage(&mut connection, &rules, &facts).await,
        RulesCommand::Sql => {
            print!("{}", triggers::script(&rules, &facts));
            Ok(())
        }
    }
}

/// Writes the lock file, for a subscriber that has Debezium's messages and no database.
async fn lock(
    connection: &mut PgConnection,
    rules: &Rules,
    facts: &[Facts],
    file: &Path,
) -> anyhow::Result<()> {
    catalog::check_identity(connection, rules, facts).await?;
    let lock = Lock::of(rules, facts);
    std::fs::write(file, lock.to_string())
        .with_context(|| format!("cannot write the lock file {}", file.display()))?;
    println!("{} tables fit the database and its replica identities", facts.len());
    println!("{} has the types of their columns; give it to the subscriber beside the rules", file.display());
    for (table, column, kind) in lock.unreadable() {
        println!(
            "!! table {table}, column {column}: Debezium does not send values of type {kind} as Postgres writes them, so \
             the key prefixes are invalidated instead of single keys; use an ordinary text column that a trigger fills"
        );
    }
    Ok(())
}

/// How the installed triggers differ from the rules, for the doctor; `None` without rules.
pub(super) async fn missing(pool: &PgPool, config: &Config) -> anyhow::Result<Option<Vec<String>>> {
    if config.capture.rules.is_none() {
        return Ok(None);
    }
    let rules = load(config)?;
    let mut connection = pool.acquire().await?;
    let facts = catalog::check(&mut connection, &rules).await?;
    let plan = triggers::plan(&mut connection, &rules, &facts).await?;
    Ok(Some(plan.steps.into_iter().map(|step| step.what).collect()))
}

fn load(config: &Config) -> anyhow::Result<Rules> {
    let file = config.capture.rules.as_ref().context("RELAY_RULES (--rules) is not set")?;
    Ok(Rules::load(file)?)
}

/// Prints the keys of a changed row, without a database.
pub(super) fn test(config: &Config, trial: &Trial) -> anyhow::Result<()> {
    let rules = load(config)?;
    let (schema, name) = trial.table.split_once('.').unwrap_or(("public", &trial.table));
    let table = rules
        .table(schema, name)
        .with_context(|| format!("{} has no rules for table {schema}.{name}", rules.file()))?;
    let image = |text: &Option<String>, option: &str| -> anyhow::Result<Option<JsonImage>> {
        text.as_deref().map(JsonImage::parse).transpose().with_context(|| format!("{option} is not a row"))
    };
    let (old, new) = (image(&trial.old, "--old")?, image(&trial.new, "--new")?);
    let expansion = table.keys(as_image(old.as_ref()), as_image(new.as_ref()))?;
    for key in &expansion.keys {
        println!("{}", printable(key.as_str()));
    }
    for refused in &expansion.refused {
        println!("!! {}", printable(&refused.to_string()));
    }
    if expansion.keys.is_empty() && expansion.refused.is_empty() {
        println!("no key");
    }
    if !table.expand.is_empty() {
        println!("and what expand finds, which only the database knows");
    }
    Ok(())
}

fn as_image(image: Option<&JsonImage>) -> Option<&dyn Image> {
    image.map(|image| image as &dyn Image)
}

async fn apply(pool: &PgPool, rules: &Rules, lock_timeout: Duration) -> anyhow::Result<()> {
    let mut alone = pool.begin().await?;
    triggers::lock(&mut alone, lock_timeout).await.context(NOT_ALONE)?;
    let mut connection = pool.acquire().await?;
    let facts = catalog::check(&mut connection, rules).await?;
    let plan = triggers::plan(&mut connection, rules, &facts).await?;
    triggers::apply_in_parts(&mut connection, &plan, lock_timeout).await.context(BUSY)?;
    alone.rollback().await?;
    print_steps(&plan);
    warn(&mut connection, rules, &facts).await?;
    println!("the triggers are what the rules say; {} changes were made", plan.steps.len());
    Ok(())
}

async fn remove(pool: &PgPool, lock_timeout: Duration) -> anyhow::Result<()> {
    let mut alone = pool.begin().await?;
    triggers::lock(&mut alone, lock_timeout).await.context(NOT_ALONE)?;
    let mut connection = pool.acquire().await?;
    let plan = triggers::removal(&mut connection).await?;
    triggers::apply_in_parts(&mut connection, &plan, lock_timeout).await.context(BUSY)?;
    alone.rollback().await?;
    print_steps(&plan);
    println!("no trigger is left; {} changes were made", plan.steps.len());
    Ok(())
}

async fn explain(
    pool: &PgPool,
    rules: &Rules,
    statement: &str,
    lock_timeout: Duration,
    statement_timeout: Duration,
) -> anyhow::Result<()> {
    let first_word = statement.split_whitespace().next().unwrap_or_default().to_lowercase();
    if !EXPLAINABLE.contains(&first_word.as_str()) {
        bail!("explain runs one statement that begins with {}", EXPLAINABLE.join(", "));
    }
    let mut tx = pool.begin().await?;
    triggers::lock(&mut tx, lock_timeout).await.context(NOT_ALONE)?;
    let facts = catalog::check(&mut tx, rules).await?;
    let plan = triggers::plan(&mut tx, rules, &facts).await?;
    triggers::apply(&mut tx, &plan, lock_timeout).await.context(BUSY)?;
    let limit = format!("set local statement_timeout = {}", statement_timeout.as_millis().max(1));
    sqlx::raw_sql(AssertSqlSafe(limit)).execute(&mut *tx).await?;
    // Prepared, so that it is one statement for certain.
    let done = sqlx::query(AssertSqlSafe(statement)).execute(&mut *tx).await;
    let done = done.context("the statement failed; if it took too long, raise --statement-timeout")?;
    let events = testing::enqueued(&mut tx).await?;
    tx.rollback().await?;
    println!("{} rows, {} events; rolled back", done.rows_affected(), events.len());
    for event in &events {
        for key in &event.keys {
            let all = if event.namespace { "*" } else { "" };
            println!("{}", printable(&format!("{}  {key}{all}", event.topic)));
        }
    }
    Ok(())
}

async fn print_coverage(connection: &mut PgConnection, rules: &Rules, facts: &[Facts]) -> anyhow::Result<()> {
    let coverage = coverage(connection, rules, facts).await?;
    for table in &coverage.tables {
        println!("{:<40} no rules", printable(table));
    }
    for (table, columns) in &coverage.columns {
        println!("{}", printable(&format!("{table:<40} not watched: {}", columns.join(", "))));
    }
    println!("{} tables have rules, {} have none", facts.len(), coverage.tables.len());
    Ok(())
}

fn print_steps(plan: &Plan) {
    for step in &plan.steps {
        println!("{}", printable(&step.what));
    }
}

async fn warn(connection: &mut PgConnection, rules: &Rules, facts: &[Facts]) -> Result<(), sqlx::Error> {
    for relation in facts.iter().flat_map(|facts| &facts.relations).filter(|relation| relation.is_foreign) {
        println!(
            "!! {}.{} is a foreign table: what is changed in it directly, or where it lives, is not captured",
            printable(&relation.schema),
            printable(&relation.name)
        );
    }
    for facts in facts.iter().filter(|facts| facts.is_partitioned()) {
        println!(
            "!! {}.{} is partitioned: a MERGE that moves a row to another partition shows it to no trigger; move rows by \
             UPDATE, call outbox.enqueue in the same transaction, or capture the table from the write-ahead log",
            facts.schema, facts.name
        );
    }
    for risk in catalog::risks(connection, rules).await? {
        println!("!! {}", printable(&risk.to_string()));
    }
    Ok(())
}
