//! Installs the servers that this machine lacks.

fn main() -> anyhow::Result<()> {
    devstack::install_missing()
}
