//! Makes sure the server programs are there.

use devstack::Binary;

/// Installs what is missing of `wanted`, saying so first.
pub fn provide(wanted: &[Binary]) -> anyhow::Result<()> {
    let missing = devstack::missing(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|binary| binary.program()).collect();
    eprintln!(
        "Not found on this machine: {}. Installing with the system's package manager.",
        names.join(", ")
    );
    devstack::install_missing()
}
