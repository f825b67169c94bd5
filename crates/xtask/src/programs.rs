//! Our own programs, built in release.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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

/// Builds this very program in release and returns where it is.
pub fn build_self() -> anyhow::Result<PathBuf> {
    find(&build_release(&["xtask"])?, "xtask")
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
