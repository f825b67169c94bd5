//! A process and everything it started.
//!
//! Postgres backends are sessions of their own, so a process group does not reach them; walking from parent to child
//! does.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

/// A killed process is gone within milliseconds, unless the kernel is writing for it.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);

const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// One row of the process table.
struct Row {
    process: u32,
    parent: u32,
    /// As `ps` abbreviates it.
    state: char,
}

impl Row {
    /// A zombie holds no port, no file and no memory.
    fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }

    fn is_running(&self) -> bool {
        self.is_alive() && !matches!(self.state, 'T' | 't')
    }
}

/// Sends `signal` to the root, then to its descendants.
pub(crate) fn signal(root: u32, signal: Signal) -> Result<()> {
    send(root, signal)?;
    descendants(root)?.into_iter().try_for_each(|process| send(process, signal))
}

/// Kills the root and its descendants, and waits until they are gone. The caller reaps the root.
pub(crate) fn kill(root: u32) -> Result<()> {
    let deadline = Instant::now() + DEATH_TIMEOUT;
    // A stopped parent starts no new children, so the list is complete.
    send(root, Signal::STOP)?;
    while row(root)?.is_some_and(|row| row.is_running()) {
        ensure!(Instant::now() < deadline, "process {root} does not stop");
        std::thread::sleep(POLL_INTERVAL);
    }
    let mut processes = descendants(root)?;
    processes.insert(0, root);
    processes.iter().try_for_each(|&process| send(process, Signal::KILL))?;
    for process in processes {
        while row(process)?.is_some_and(|row| row.is_alive()) {
            ensure!(Instant::now() < deadline, "process {process} survives SIGKILL");
            std::thread::sleep(POLL_INTERVAL);
        }
    }
    Ok(())
}

/// Sends `signal` to one process; one that has ended is no error.
pub(crate) fn send(process: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).context("not a process id")?;
    match kill_process(pid, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot signal process {process}")),
    }
}

/// Every living descendant of `root`, parents before children.
pub(crate) fn descendants(root: u32) -> Result<Vec<u32>> {
    let table = table()?;
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found
            .extend(table.iter().filter(|row| row.parent == parent && row.is_alive()).map(|row| row.process));
        next += 1;
    }
    found.remove(0);
    Ok(found)
}

/// One process, if it exists.
fn row(process: u32) -> Result<Option<Row>> {
    if Path::new("/proc/self").exists() {
        return Ok(row_from_proc(process));
    }
    Ok(table_from_ps()?.into_iter().find(|row| row.process == process))
}

fn table() -> Result<Vec<Row>> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return table_from_ps();
    };
    let processes = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    Ok(processes.filter_map(row_from_proc).collect())
}

fn row_from_proc(process: u32) -> Option<Row> {
    let fields = stat_fields(process)?;
    Some(Row { process, parent: fields.get(1)?.parse().ok()?, state: fields.first()?.chars().next()? })
}

/// The fields of `/proc/<process>/stat` from the state on, which is the third.
pub(crate) fn stat_fields(process: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The command name before them may contain spaces and brackets.
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// For systems without `/proc`.
fn table_from_ps() -> Result<Vec<Row>> {
    let output =
        Command::new("ps").args(["-A", "-o", "pid=,ppid=,state="]).output().context("cannot run ps")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let row = |line: &str| {
        let mut fields = line.split_whitespace();
        Some(Row {
            process: fields.next()?.parse().ok()?,
            parent: fields.next()?.parse().ok()?,
            state: fields.next()?.chars().next()?,
        })
    };
    Ok(text.lines().filter_map(row).collect())
}
