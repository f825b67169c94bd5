//! Installing missing servers with the system's package manager.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::account::effective_user;
use crate::binaries::{Binary, missing};

/// A package manager this crate can drive.
#[derive(Clone, Copy, Debug)]
enum Manager {
    AptGet,
    Dnf,
    Apk,
    Brew,
}

/// Installs every server the project's tests need and this machine lacks. Says on standard error what it runs, first.
///
/// On Debian and Ubuntu installing may also start the distribution's own servers; they sit on the default ports, which
/// a stack never uses.
///
/// # Errors
/// When the environment names a place where the program is not, or there is no known package manager, no right to use it,
/// or it fails; the message says what to correct or to run.
pub fn install_missing() -> Result<()> {
    let missing = missing(Binary::ALL);
    if missing.is_empty() {
        return Ok(());
    }
    // Installing it would not help: what the environment names is used.
    if let Some((binary, place)) = missing.iter().find_map(|&binary| Some((binary, binary.named_place()?))) {
        let (variable, program) = (binary.environment_variable(), binary.program());
        bail!("{variable} is {}, but there is no {program} there; correct it or unset it", place.display());
    }
    let manager = Manager::detect().with_context(|| by_hand(&missing))?;
    let commands = manager.commands(&missing);
    if !manager.permitted() {
        bail!("server programs are missing and need the administrator; run: {}", commands.join(" && "));
    }
    for command in &commands {
        run(command)?;
    }
    let still = crate::binaries::missing(&missing);
    ensure!(still.is_empty(), by_hand(&still));
    Ok(())
}

impl Manager {
    fn detect() -> Option<Self> {
        [Self::AptGet, Self::Dnf, Self::Apk, Self::Brew]
            .into_iter()
            .find(|manager| succeeds(manager.program(), &["--version"]))
    }

    fn program(self) -> &'static str {
        match self {
            Self::AptGet => "apt-get",
            Self::Dnf => "dnf",
            Self::Apk => "apk",
            Self::Brew => "brew",
        }
    }

    fn package(self, binary: Binary) -> &'static str {
        match (self, binary) {
            (Self::AptGet | Self::Apk, Binary::Postgres) => "postgresql",
            (Self::Dnf, Binary::Postgres) => "postgresql-server",
            (Self::Brew, Binary::Postgres) => "postgresql@17",
            (Self::AptGet, Binary::RedisServer) => "redis-server",
            (_, Binary::RedisServer) => "redis",
            (_, Binary::NatsServer) => "nats-server",
            (_, Binary::PgBouncer) => "pgbouncer",
        }
    }

    /// The shell commands that install `binaries`.
    fn commands(self, binaries: &[Binary]) -> Vec<String> {
        let packages: Vec<&str> = binaries.iter().map(|&binary| self.package(binary)).collect();
        let packages = packages.join(" ");
        let sudo = if effective_user() == 0 { "" } else { "sudo " };
        match self {
            Self::AptGet => vec![
                format!("{sudo}apt-get update"),
                format!(
                    "{sudo}env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {packages}"
                ),
            ],
            Self::Dnf => vec![format!("{sudo}dnf install -y {packages}")],
            Self::Apk => vec![format!("{sudo}apk add {packages}")],
            Self::Brew => vec![format!("brew install {packages}")],
        }
    }

    fn permitted(self) -> bool {
        matches!(self, Self::Brew) || effective_user() == 0 || succeeds("sudo", &["-n", "true"])
    }
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[expect(clippy::print_stderr, reason = "the user must see what changes the system before it does")]
fn run(command: &str) -> Result<()> {
    eprintln!("devstack: some servers are missing, running: {command}");
    let status = Command::new("sh").args(["-c", command]).stdin(Stdio::null()).status()?;
    ensure!(status.success(), "{command} failed ({status}); run it by hand to see why");
    Ok(())
}

fn by_hand(missing: &[Binary]) -> String {
    let programs: Vec<String> = missing
        .iter()
        .map(|binary| format!("{} (then set {})", binary.program(), binary.environment_variable()))
        .collect();
    format!("no package manager here provides these; install by hand: {}", programs.join(", "))
}
