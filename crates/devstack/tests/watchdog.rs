//! Nothing outlives its owner.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test, also in its helper functions")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use devstack::{Stack, StackOptions, eventually};

const DEADLINE: Duration = Duration::from_secs(60);

/// When set, this test program is the owner that gets killed; it writes what it started to the file of that name.
const OWNER_FILE: &str = "DEVSTACK_TEST_OWNER_FILE";

/// As [`OWNER_FILE`], and the stack is to be kept.
const KEEP: &str = "DEVSTACK_TEST_KEEP";

struct Owner {
    child: Child,
    directory: PathBuf,
    processes: Vec<String>,
}

/// Runs the test `owner_process` of this program in a child, and waits until its stack is up.
async fn start_owner(keep: bool) -> Owner {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "owner_process"]).env(OWNER_FILE, file.path()).stdout(Stdio::null());
    if keep {
        command.env(KEEP, "1");
    }
    let child = command.spawn().unwrap();
    let text = eventually(DEADLINE, async || {
        let text = std::fs::read_to_string(file.path()).unwrap();
        text.ends_with("\n\n").then_some(text)
    })
    .await;
    let mut lines = text.trim().lines().map(str::to_owned);
    let directory = PathBuf::from(lines.next().unwrap());
    Owner { child, directory, processes: lines.collect() }
}

fn all_descendants(process: &str) -> Vec<String> {
    let children =
        std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    let mut found = vec![process.to_owned()];
    children.split_whitespace().for_each(|child| found.extend(all_descendants(child)));
    found
}

fn is_alive(process: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

async fn assert_gone(directory: &Path, processes: &[String]) {
    eventually(DEADLINE, async || {
        let alive: Vec<&String> = processes.iter().filter(|process| is_alive(process)).collect();
        if alive.is_empty() && !directory.exists() { Ok(()) } else { Err(format!("alive: {alive:?}")) }
    })
    .await;
}

#[tokio::test]
async fn owner_process() {
    let Some(file) = std::env::var_os(OWNER_FILE) else {
        return;
    };
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    let servers = [stack.postgres.process(), stack.nats.process(), stack.redis.process()];
    let processes = servers.map(|process| process.pid().unwrap().to_string()).join("\n");
    // A frozen server must go too.
    stack.redis.stop().unwrap();
    let keep = std::env::var_os(KEEP).is_some();
    if keep {
        stack.keep().unwrap();
    }
    std::fs::write(file, format!("{}\n{processes}\n\n", stack.directory().path().display())).unwrap();
    if !keep {
        std::future::pending::<()>().await;
    }
}

#[tokio::test]
async fn killing_the_owner_removes_every_process_and_the_directory() {
    let mut owner = start_owner(false).await;
    let processes: Vec<String> =
        owner.processes.iter().flat_map(|process| all_descendants(process)).collect();
    assert!(processes.len() > 5, "{processes:?}");
    owner.child.kill().unwrap();
    owner.child.wait().unwrap();
    assert_gone(&owner.directory, &processes).await;
}

#[tokio::test]
async fn a_kept_stack_outlives_its_owner_until_its_stop_script_runs() {
    let mut owner = start_owner(true).await;
    assert!(owner.child.wait().unwrap().success());
    let processes: Vec<String> =
        owner.processes.iter().flat_map(|process| all_descendants(process)).collect();
    assert!(processes.iter().all(|process| is_alive(process)));
    let status = Command::new("sh").arg(owner.directory.join("stop.sh")).status().unwrap();
    assert!(status.success());
    assert_gone(&owner.directory, &processes).await;
}
