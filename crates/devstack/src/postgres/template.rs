//! One `initdb` per machine and server version; every stack copies its result.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::account::Account;
use crate::base_directory::base_directory;
use crate::copy::copy_directory;
use crate::directory::StackDirectory;
use crate::process::Process;

/// `initdb` takes seconds; this allows for a machine with many times more work than processors.
const INITDB_TIMEOUT: Duration = Duration::from_secs(180);

/// The superuser of every cluster; there are no passwords, as the server only listens on the loopback address.
pub(crate) const SUPERUSER: &str = "postgres";

/// Creates the data directory `target`, owned by `account` if given, as a copy of the template.
pub(crate) async fn create_data(
    directory: &Arc<StackDirectory>,
    postgres: &Path,
    target: PathBuf,
    account: Option<Account>,
) -> Result<()> {
    let template = template_path(postgres)?;
    if !template.exists() {
        let lock = lock(template.with_extension("lock")).await?;
        // Another process may have made it while this one waited.
        if !template.exists() {
            initialize(directory, postgres, &template, account).await?;
        }
        drop(lock);
    }
    tokio::task::spawn_blocking(move || copy_directory(&template, &target, account)).await?
}

fn template_path(postgres: &Path) -> Result<PathBuf> {
    let output = Command::new(postgres).arg("--version").output()?;
    ensure!(output.status.success(), "{} does not run", postgres.display());
    let version: String = String::from_utf8_lossy(&output.stdout)
        .trim()
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() || letter == '.' { letter } else { '-' })
        .collect();
    // `with_extension` must not take the minor version for one.
    Ok(base_directory()?.join(format!("template-{version}.data")))
}

async fn lock(path: PathBuf) -> Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    tokio::task::spawn_blocking(move || file.lock().map(|()| file)).await?.context("cannot lock the template")
}

/// Runs `initdb` inside the stack directory, where the watchdog removes a half-made cluster, and moves the result.
pub(super) async fn initialize(
    directory: &Arc<StackDirectory>,
    postgres: &Path,
    target: &Path,
    account: Option<Account>,
) -> Result<()> {
    let parent = directory.create_subdirectory("initdb")?;
    let mut command = Command::new(postgres.with_file_name("initdb"));
    command
        .args(["--username", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"])
        .arg("--pgdata")
        .arg(parent.join("data"))
        .current_dir(&parent);
    if let Some(account) = account {
        account.own(&parent)?;
        account.apply(&mut command);
    }
    let initdb = Process::spawn(directory, "initdb", command)?;
    let status = initdb.wait_exit(INITDB_TIMEOUT).await?;
    ensure!(status.success(), "initdb failed ({status})\n{}", initdb.log_tail());
    std::fs::rename(parent.join("data"), target)
        .with_context(|| format!("cannot move a new cluster to {}", target.display()))
}
