//! A process and everything it started.
//!
//! Postgres backends are sessions of their own, so a process group does not reach them; walking from parent to child
//! does.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

/// A killed process is gone within milliseconds, unless the kernel is writing for it.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);

/// One row of the process table.
struct Row {
    process: u32,
    parent: u32,
    /// A zombie holds no port, no file and no memory.
    dead: bool,
}

/// Sends `signal` to the root, then to its descendants.
pub(crate) fn signal(root: u32, signal: Signal) -> Result<()> {
    send(root, signal)?;
    descendants(root)?.into_iter().try_for_each(|process| send(process, signal))
}

/// Kills the root and its descendants, and waits until they are gone. The caller reaps the root.
pub(crate) fn kill(root: u32) -> Result<()> {
    // A stopped parent starts no new children, so the list is complete.
    send(root, Signal::STOP)?;
    let mut processes = descendants(root)?;
    processes.insert(0, root);
    processes.iter().try_for_each(|&process| send(process, Signal::KILL))?;
    let deadline = Instant::now() + DEATH_TIMEOUT;
    while any_alive(&processes)? {
        ensure!(Instant::now() < deadline, "process {root} or a child of it survives SIGKILL");
        std::thread::sleep(Duration::from_millis(1));
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
        found.extend(table.iter().filter(|row| row.parent == parent && !row.dead).map(|row| row.process));
        next += 1;
    }
    found.remove(0);
    Ok(found)
}

fn any_alive(processes: &[u32]) -> Result<bool> {
    Ok(table()?.iter().any(|row| !row.dead && processes.contains(&row.process)))
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
    Some(Row {
        process,
        parent: fields.get(1)?.parse().ok()?,
        dead: matches!(fields.first()?.as_str(), "Z" | "X"),
    })
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
    let output = Command::new("ps").args(["-A", "-o", "pid=,ppid=,state="]).output().context("cannot run ps")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let row = |line: &str| {
        let mut fields = line.split_whitespace();
        Some(Row {
            process: fields.next()?.parse().ok()?,
            parent: fields.next()?.parse().ok()?,
            dead: fields.next()?.starts_with('Z'),
        })
    };
    Ok(text.lines().filter_map(row).collect())
}
