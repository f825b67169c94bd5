//! A standby that follows a primary, and can take its place.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::template::SUPERUSER;
use super::{Postgres, PostgresOptions};
use crate::account::Account;
use crate::directory::StackDirectory;
use crate::process::Process;

/// A copy takes a second; this allows for a machine with many times more work than processors.
const COPY_TIMEOUT: Duration = Duration::from_secs(120);

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
        Self::launch(directory, options, async |binary, data, account| {
            copy_primary(directory, primary, binary, data, account).await
        })
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

async fn copy_primary(
    directory: &Arc<StackDirectory>,
    primary: &Postgres,
    binary: &Path,
    data: &Path,
    account: Option<Account>,
) -> Result<()> {
    let mut command = Command::new(binary.with_file_name("pg_basebackup"));
    command.args(["--host", "127.0.0.1", "--port", &primary.address().port().to_string()]);
    command.args(["--username", SUPERUSER, "--checkpoint=fast", "--no-sync", "--write-recovery-conf"]);
    command.arg("--pgdata").arg(data);
    command.current_dir(data.parent().context("the data directory is in another")?);
    if let Some(account) = account {
        account.apply(&mut command);
    }
    let backup = Process::spawn(directory, "pg_basebackup", command)?;
    let status = backup.wait_exit(COPY_TIMEOUT).await?;
    ensure!(status.success(), "pg_basebackup failed ({status})\n{}", backup.log_tail());
    Ok(())
}
