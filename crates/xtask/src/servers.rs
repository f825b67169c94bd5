//! Makes sure the server programs are there.

use devstack::Binary;

/// Installs what is missing, if any of `wanted` is, saying so first.
pub fn provide(wanted: &[Binary]) -> anyhow::Result<()> {
    if devstack::missing(wanted).is_empty() {
        return Ok(());
    }
    devstack::install_missing()
}
