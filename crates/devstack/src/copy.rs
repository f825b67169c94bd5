//! Copies of data directories.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::account::Account;

/// Copies the directory `source` to `target`, which must not exist, with modes; the copy belongs to `owner` if given.
pub(crate) fn copy_directory(source: &Path, target: &Path, owner: Option<Account>) -> Result<()> {
    copy_tree(source, target, owner)
        .with_context(|| format!("cannot copy {} to {}", source.display(), target.display()))
}

/// Removes `target` if it exists, then copies `source` there.
pub(crate) fn replace_directory(source: &Path, target: &Path) -> Result<()> {
    remove_directory(target)?;
    copy_directory(source, target, None)
}

/// Removes a directory that may already be gone.
pub(crate) fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn copy_tree(source: &Path, target: &Path, owner: Option<Account>) -> Result<()> {
    fs::create_dir(target)?;
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        let to = target.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &to, owner)?;
        } else {
            fs::copy(entry.path(), &to)?;
            own(&to, owner)?;
        }
    }
    fs::set_permissions(target, fs::metadata(source)?.permissions())?;
    own(target, owner)
}

fn own(path: &Path, owner: Option<Account>) -> Result<()> {
    owner.map_or(Ok(()), |account| account.own(path))
}
