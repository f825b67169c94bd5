//! The process that cleans up after this one, even after a `kill -9`.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

/// What the watchdog runs; a parent-death signal would not do, it fires when the spawning *thread* ends.
pub(crate) const SCRIPT: &str = include_str!("watchdog.sh");

/// A `sh` child holding the reading end of a pipe. Dropping it closes the pipe and waits for the clean-up.
#[derive(Debug)]
pub(crate) struct Watchdog {
    child: Mutex<Child>,
}

impl Watchdog {
    /// Starts watching; the directory is removed when this object, or the whole process, is gone.
    pub(crate) fn start(directory: &Path) -> Result<Self> {
        let child = Command::new("sh")
            .args(["-c", SCRIPT, "devstack-watchdog"])
            .arg(directory)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Ctrl-C in a terminal, or a test runner killing a test's process group, must not reach it.
            .process_group(0)
            .spawn()
            .context("cannot start the watchdog shell")?;
        Ok(Self { child: Mutex::new(child) })
    }

    /// Has `process` killed with everything it started when the owner is gone.
    pub(crate) fn add(&self, process: u32) -> Result<()> {
        self.tell(&format!("add {process}\n"))
    }

    /// Forgets a process that has ended, as its id may be used again.
    pub(crate) fn remove(&self, process: u32) -> Result<()> {
        self.tell(&format!("remove {process}\n"))
    }

    /// Ends the watch and leaves everything in place.
    pub(crate) fn keep(&self) -> Result<()> {
        self.tell("keep\n")
    }

    fn tell(&self, line: &str) -> Result<()> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let pipe = child.stdin.as_mut().expect("the pipe is open until drop");
        pipe.write_all(line.as_bytes()).context("the watchdog is gone")
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // `wait` closes the pipe first. A failure has nowhere to go.
        drop(child.wait());
    }
}
