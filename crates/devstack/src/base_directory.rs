//! The one place in the system's temporary directory where everything of this crate is.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::account::effective_user;

/// Returns `devstack-<user id>` in the temporary directory, created if missing: it has stacks, port locks, the Postgres
/// template and fetched servers.
///
/// It is this user's own, so that nobody else can put something there for a server to run on; others may pass through
/// it, as Postgres may run as another user.
///
/// # Errors
/// When it cannot be created or belongs to somebody else.
pub fn base_directory() -> Result<PathBuf> {
    let user = effective_user();
    let path = std::env::temp_dir().join(format!("devstack-{user}"));
    if create(&path, 0o755)? {
        // Without it stacks only start more slowly.
        drop(spread_subdirectories(&path));
    }
    let owner = std::fs::symlink_metadata(&path)?.uid();
    ensure!(owner == user, "{} belongs to user {owner}, not {user}", path.display());
    Ok(path)
}

/// Creates a directory that may exist; whether it did not.
pub(crate) fn create(path: &Path, mode: u32) -> Result<bool> {
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", path.display())),
    }
}

/// Has ext4 place subdirectories far from each other.
///
/// ext4 puts a new file's inode near its directory's, and does not use an inode again within seconds of its deletion.
/// Where stacks of a thousand files come and go, finding one that is free becomes ten times the cost of the file.
#[cfg(target_os = "linux")]
fn spread_subdirectories(path: &Path) -> Result<()> {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let directory = std::fs::File::open(path)?;
    Ok(ioctl_setflags(&directory, ioctl_getflags(&directory)? | IFlags::TOPDIR)?)
}

#[cfg(not(target_os = "linux"))]
fn spread_subdirectories(_path: &Path) -> Result<()> {
    Ok(())
}
