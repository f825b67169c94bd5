//! The temporary directory of a stack.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::base_directory::base_directory;
use crate::watchdog::{self, Watchdog};

/// A temporary directory that holds servers' data and logs, and the watchdog that removes it.
///
/// Invariant: every process started in it is known to the watchdog from start to end, so that none outlives the owner.
#[derive(Debug)]
pub struct StackDirectory {
    path: PathBuf,
    watchdog: Watchdog,
    names: Mutex<HashMap<String, u32>>,
    processes: Mutex<Vec<u32>>,
    kept: AtomicBool,
}

impl StackDirectory {
    /// Creates an empty directory with a short path, as unix sockets need one.
    ///
    /// # Errors
    /// When the system's temporary directory or `sh` is unusable.
    pub fn create() -> Result<Arc<Self>> {
        let path = tempfile::Builder::new()
            .prefix("")
            // Postgres may run as another user than this process.
            .permissions(std::fs::Permissions::from_mode(0o755))
            .tempdir_in(base_directory()?)
            .context("cannot create a temporary directory")?
            .keep();
        let watchdog = Watchdog::start(&path)?;
        Ok(Arc::new(Self {
            path,
            watchdog,
            names: Mutex::default(),
            processes: Mutex::default(),
            kept: AtomicBool::new(false),
        }))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `name`, or `name-2`, `name-3`, … when it was asked for before.
    pub(crate) fn unique_name(&self, name: &str) -> String {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let count = names.entry(name.to_owned()).or_default();
        *count += 1;
        if *count == 1 { name.to_owned() } else { format!("{name}-{count}") }
    }

    /// Creates a subdirectory.
    pub(crate) fn create_subdirectory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        std::fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }

    /// Puts a process that has just started under the watchdog.
    pub(crate) fn watch(&self, process: u32) -> Result<()> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner).push(process);
        self.watchdog.add(process)
    }

    /// Forgets a process that has ended.
    pub(crate) fn forget(&self, process: u32) {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner).retain(|&other| other != process);
        if !self.is_kept() {
            // Without a watchdog there is nobody to tell.
            drop(self.watchdog.remove(process));
        }
    }

    /// Whether everything stays when the owner ends.
    pub(crate) fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// Leaves the directory and the processes running in it now to the user, after this process has ended.
    ///
    /// Returns the path of a shell script that kills them and removes the directory.
    ///
    /// # Errors
    /// When the script cannot be written.
    pub fn keep(&self) -> Result<PathBuf> {
        let directory = self.path.display();
        let processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let lines: String = processes.iter().map(|process| format!("add {process}\\n")).collect();
        let stop = self.path.join("stop.sh");
        std::fs::write(self.path.join("watchdog.sh"), watchdog::SCRIPT)?;
        std::fs::write(&stop, format!("printf '{lines}' | sh '{directory}/watchdog.sh' '{directory}'\n"))
            .with_context(|| format!("cannot write {}", stop.display()))?;
        self.watchdog.keep()?;
        self.kept.store(true, Ordering::Relaxed);
        Ok(stop)
    }
}
