//! Our own programs: this executable under other names for the demo, built in release for figures.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, ensure};

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The relay.
    pub relay: PathBuf,
    /// The subscriber.
    pub subscriber: PathBuf,
}

/// The cargo that runs this program.
pub fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// The top folder of the project.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("this crate is two folders below the top")
}

/// Packages whose programs figures are taken from. Always built together: another selection would compile the
/// dependencies again, with other features.
const RELEASED: &[&str] = &["relay", "subscriber", "xtask"];

/// Name of the example service.
pub const EXAMPLE: &str = "example";

/// Acts as the program whose name this executable was called by, if it is one of ours.
pub fn act_as_called() -> Option<ExitCode> {
    let called = std::env::args_os().next()?;
    match Path::new(&called).file_name()?.to_str()? {
        "relay" => Some(relay::program()),
        "subscriber" => Some(subscriber::program()),
        EXAMPLE => Some(example::program()),
        _ => None,
    }
}

/// Returns this executable under the names of relay and subscriber, and of the example service: one build has them all.
pub fn under_other_names() -> anyhow::Result<(Programs, PathBuf)> {
    let executable = std::env::current_exe().context("cannot find this executable")?;
    let folder = executable.with_file_name("programs");
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let link = |name: &str| {
        let path = folder.join(name);
        if !std::fs::read_link(&path).is_ok_and(|target| target == executable) {
            drop(std::fs::remove_file(&path));
            std::os::unix::fs::symlink(&executable, &path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        anyhow::Ok(path)
    };
    Ok((Programs { relay: link("relay")?, subscriber: link("subscriber")? }, link(EXAMPLE)?))
}

/// Builds relay and subscriber in release. Cargo's own progress goes to standard error.
pub fn build() -> anyhow::Result<Programs> {
    let executables = build_release()?;
    let find = |name| find(&executables, name);
    Ok(Programs { relay: find("relay")?, subscriber: find("subscriber")? })
}

/// Builds this very program in release and runs it with the same arguments: what generates a load must not be a debug
/// build.
pub fn run_this_in_release(what: &str) -> anyhow::Result<ExitCode> {
    println!("Building {what} in release; the first time this takes a few minutes.");
    let program = find(&build_release()?, "xtask")?;
    let status =
        Command::new(program).args(std::env::args_os().skip(1)).status().context("cannot start it")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Variable that says how many tests run at the same time, and its value: tests of real servers mostly wait, so there are
/// two for each processor.
pub fn test_threads() -> (&'static str, String) {
    const VARIABLE: &str = "RUST_TEST_THREADS";
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (VARIABLE, std::env::var(VARIABLE).unwrap_or_else(|_| (processors * 2).to_string()))
}

fn build_release() -> anyhow::Result<Vec<PathBuf>> {
    let mut command = Command::new(cargo());
    command.args(["build", "--release", "--message-format", "json-render-diagnostics"]);
    command.args(RELEASED.iter().flat_map(|package| ["--package", package]));
    command.current_dir(workspace()).stderr(Stdio::inherit());
    let output = command.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "cargo build failed");
    Ok(executables(&String::from_utf8_lossy(&output.stdout)))
}

/// The programs in cargo's account of what it built, one JSON object a line.
fn executables(messages: &str) -> Vec<PathBuf> {
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        message.get("executable")?.as_str().map(PathBuf::from)
    };
    messages.lines().filter_map(executable).collect()
}

fn find(executables: &[PathBuf], name: &str) -> anyhow::Result<PathBuf> {
    let found = executables.iter().find(|file| file.file_stem().is_some_and(|stem| stem == name));
    found.cloned().with_context(|| format!("cargo built no program {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_what_cargo_says() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\nnot json\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"target/release/relay\"}";
        let executables = executables(messages);
        assert_eq!(find(&executables, "relay").unwrap(), Path::new("target/release/relay"));
        assert!(find(&executables, "subscriber").is_err());
    }
}
