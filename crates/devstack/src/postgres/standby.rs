//! A standby that follows a primary, and can take its place.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::template::SUPERUSER;
use super::wire::Connection;
use super::{DEFAULT_DATABASE, Postgres, PostgresOptions};
use crate::account::Account;
use crate::copy::copy_live_directory;
use crate::directory::StackDirectory;

/// Parts of a data directory that belong to the running server, and the log, which is copied last.
const NOT_COPIED: &[&str] = &["pg_wal", "pg_replslot", "postmaster.pid", "postmaster.opts"];

impl Postgres {
    /// Starts a server in `directory` that begins as a copy of `primary` and follows it (streaming replication). It
    /// answers queries, has the settings of `options`, and none of the primary's replication slots.
    ///
    /// # Errors
    /// As [`start_in`](Self::start_in); also when the primary cannot be copied.
    pub async fn start_standby_in(
        directory: &Arc<StackDirectory>,
        primary: &Self,
        options: PostgresOptions,
    ) -> Result<Self> {
        Self::launch(directory, options, async |_, data, account| copy_primary(primary, data, account).await)
            .await
    }

    /// Makes a standby a primary, whatever its primary does, on a timeline of its own, and waits until it is one.
    ///
    /// # Errors
    /// When it is not a standby, or does not get there within a minute.
    pub async fn promote(&self) -> Result<()> {
        let promoted = self.query("select pg_promote(wait_seconds => 60)").await?;
        ensure!(promoted == [[Some("t".to_owned())]], "{} was not promoted", self.process().name());
        Ok(())
    }
}

/// Copies the primary's data directory while the primary runs, with Postgres' own low-level backup functions. Not with
/// `pg_basebackup`, which packages of the bare server do not have.
///
/// Source: Postgres manual, "Making a Base Backup Using the Low Level API".
async fn copy_primary(primary: &Postgres, data: &Path, account: Option<Account>) -> Result<()> {
    let mut session = Connection::open(primary.address(), SUPERUSER, DEFAULT_DATABASE).await?;
    let source = PathBuf::from(value(session.query("show data_directory").await?)?);
    session.query("select pg_backup_start('devstack', true)").await?;
    let copied = blocking_copy(&source, data, NOT_COPIED, account).await;
    let label = value(session.query("select labelfile from pg_backup_stop(false)").await?)?;
    copied?;
    // The log since the backup began. Later log comes from the primary.
    std::fs::remove_dir(data.join("pg_wal"))?;
    blocking_copy(&source.join("pg_wal"), &data.join("pg_wal"), &[], account).await?;
    let address = primary.address();
    let (host, port) = (address.ip(), address.port());
    let follow = format!("\nprimary_conninfo = 'host={host} port={port} user={SUPERUSER}'\n");
    let settings = std::fs::read_to_string(data.join("postgresql.auto.conf"))? + &follow;
    for (file, text) in
        [("backup_label", &label), ("standby.signal", &String::new()), ("postgresql.auto.conf", &settings)]
    {
        std::fs::write(data.join(file), text)?;
        account.map_or(Ok(()), |account| account.own(&data.join(file)))?;
    }
    Ok(())
}

/// Returns the only value of an answer.
fn value(rows: Vec<Vec<Option<String>>>) -> Result<String> {
    rows.into_iter().flatten().next().flatten().context("the server answered nothing")
}

async fn blocking_copy(
    source: &Path,
    target: &Path,
    left_out: &'static [&'static str],
    account: Option<Account>,
) -> Result<()> {
    let (source, target) = (source.to_owned(), target.to_owned());
    tokio::task::spawn_blocking(move || copy_live_directory(&source, &target, left_out, account)).await?
}
