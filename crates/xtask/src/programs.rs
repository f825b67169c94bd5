//! Our own programs, built in release.

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

/// Builds relay and subscriber in release. Cargo's own progress goes to standard error.
pub fn build() -> anyhow::Result<Programs> {
    let executables = build_release(&["relay", "subscriber"])?;
    let find = |name| find(&executables, name);
    Ok(Programs { relay: find("relay")?, subscriber: find("subscriber")? })
}

/// Builds the example service in release and returns where it is.
pub fn build_example() -> anyhow::Result<PathBuf> {
    find(&build_release(&["example"])?, "example")
}

/// Builds this very program in release and runs it with the same arguments: what generates a load must not be a debug
/// build.
pub fn run_this_in_release(what: &str) -> anyhow::Result<ExitCode> {
    println!("Building {what} in release; the first time this takes a few minutes.");
    let program = find(&build_release(&["xtask"])?, "xtask")?;
    let status =
        Command::new(program).args(std::env::args_os().skip(1)).status().context("cannot start it")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn build_release(packages: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    let mut command = Command::new(cargo());
    command.args(["build", "--release", "--message-format", "json-render-diagnostics"]);
    command.args(packages.iter().flat_map(|package| ["--package", package]));
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
