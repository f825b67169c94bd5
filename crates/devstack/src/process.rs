//! A child process that can be killed, stopped and started again.

mod log;
mod usage;

use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::directory::StackDirectory;
use crate::process_tree;

const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// How long a clean stop may take before it is an error.
const TERMINATE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a process may take over its own clean-up when it is dropped, before it is killed.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(3);

/// A child process with its log file. Dropping it kills it and everything it started.
///
/// All methods take `&self`, so that a test can share a process between tasks.
#[derive(Debug)]
pub struct Process {
    name: String,
    log_path: PathBuf,
    terminate_signal: Signal,
    discard_signal: Option<Signal>,
    state: Mutex<State>,
    directory: Arc<StackDirectory>,
}

#[derive(Debug)]
struct State {
    command: Command,
    child: Option<Child>,
    exit: Option<ExitStatus>,
    /// Length of the log when the process last started.
    log_start: u64,
}

impl Process {
    /// Starts `command` with standard output and error going to `<name>.log` in the directory.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(directory: &Arc<StackDirectory>, name: &str, command: Command) -> Result<Self> {
        let process = Self::prepare(directory, &directory.unique_name(name), command);
        process.start()?;
        Ok(process)
    }

    /// A process that is not started yet. `name` is unique in the directory.
    pub(crate) fn prepare(directory: &Arc<StackDirectory>, name: &str, mut command: Command) -> Self {
        // A Ctrl-C meant for the owner must not take the servers down under it.
        command.process_group(0).stdin(Stdio::null());
        Self {
            name: name.to_owned(),
            log_path: directory.path().join(format!("{name}.log")),
            terminate_signal: Signal::TERM,
            discard_signal: None,
            state: Mutex::new(State { command, child: None, exit: None, log_start: 0 }),
            directory: Arc::clone(directory),
        }
    }

    /// Replaces SIGTERM as the signal for a clean stop.
    pub(crate) fn terminate_with(mut self, signal: Signal) -> Self {
        self.terminate_signal = signal;
        self
    }

    /// Sends `signal` on drop and waits a moment before killing.
    pub(crate) fn discard_with(mut self, signal: Signal) -> Self {
        self.discard_signal = Some(signal);
        self
    }

    /// The name given at the start, made unique.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts the same command again; the log goes on in the same file.
    ///
    /// # Errors
    /// When it is running already, or cannot be started.
    pub fn start(&self) -> Result<()> {
        let mut state = self.state();
        ensure!(state.child.is_none(), "{} is running already", self.name);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log_path)
            .with_context(|| format!("cannot open {}", self.log_path.display()))?;
        state.log_start = log.metadata()?.len();
        state.command.stdout(log.try_clone()?).stderr(log);
        let child = state.command.spawn().with_context(|| format!("cannot start {}", self.name))?;
        let watched = self.directory.watch(child.id());
        state.child = Some(child);
        state.exit = None;
        watched
    }

    /// Kills the process and everything it started with SIGKILL, and waits until they are gone. Blocks for some
    /// milliseconds. Does nothing when it is not running.
    ///
    /// # Errors
    /// When a process cannot be signalled.
    pub fn kill(&self) -> Result<()> {
        let mut state = self.state();
        let Some(child) = &mut state.child else {
            return Ok(());
        };
        process_tree::kill(child.id())?;
        let status = child.wait()?;
        self.ended(&mut state, status);
        Ok(())
    }

    /// Freezes the process and everything it started (SIGSTOP): connections stay open and nothing answers.
    ///
    /// # Errors
    /// When it is not running.
    pub fn stop(&self) -> Result<()> {
        process_tree::signal(self.pid()?, Signal::STOP)
    }

    /// Undoes [`stop`](Self::stop).
    ///
    /// # Errors
    /// When it is not running.
    pub fn resume(&self) -> Result<()> {
        process_tree::signal(self.pid()?, Signal::CONT)
    }

    /// Asks the process to end cleanly and waits until it has.
    ///
    /// # Errors
    /// When it is not running, or still is after half a minute.
    pub async fn terminate(&self) -> Result<ExitStatus> {
        let pid = self.pid()?;
        process_tree::send(pid, self.terminate_signal)?;
        process_tree::signal(pid, Signal::CONT)?;
        self.wait_exit(TERMINATE_TIMEOUT).await
    }

    /// Waits until the process has ended by itself.
    ///
    /// # Errors
    /// When it is still running after `deadline`, or was never started.
    pub async fn wait_exit(&self, deadline: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + deadline;
        while self.is_running() {
            ensure!(
                Instant::now() < end,
                "{} has not ended within {deadline:?}\n{}",
                self.name,
                self.log_tail()
            );
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        self.state().exit.with_context(|| format!("{} was never started", self.name))
    }

    /// Whether the process exists; a stopped one does, a zombie does not.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state().child.is_some()
    }

    /// The process id.
    ///
    /// # Errors
    /// When it is not running.
    pub fn pid(&self) -> Result<u32> {
        self.state().child.as_ref().map(Child::id).with_context(|| format!("{} is not running", self.name))
    }

    /// The exit status of the last run, once it is over.
    #[must_use]
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.state().exit
    }

    /// The directory this process belongs to.
    pub(crate) fn directory(&self) -> &Arc<StackDirectory> {
        &self.directory
    }

    /// The state, after noticing that the process may have ended.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Ok(Some(status))) = state.child.as_mut().map(Child::try_wait) {
            self.ended(&mut state, status);
        }
        state
    }

    fn ended(&self, state: &mut State, status: ExitStatus) {
        if let Some(child) = state.child.take() {
            self.directory.forget(child.id());
        }
        state.exit = Some(status);
    }

    /// Lets the process clean up after itself, within limits.
    fn discard(&self, signal: Signal) -> Result<()> {
        let pid = self.pid()?;
        process_tree::send(pid, signal)?;
        process_tree::signal(pid, Signal::CONT)?;
        let end = Instant::now() + DISCARD_TIMEOUT;
        while self.is_running() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.directory.is_kept() {
            return;
        }
        // What fails here is left to the watchdog.
        if let Some(signal) = self.discard_signal {
            drop(self.discard(signal));
        }
        drop(self.kill());
    }
}
