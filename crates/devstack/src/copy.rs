//! Copies of data directories.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::account::Account;

/// Copies the directory `source` to `target`, which must not exist, with modes; the copy belongs to `owner` if given.
pub(crate) fn copy_directory(source: &Path, target: &Path, owner: Option<Account>) -> Result<()> {
    copy_tree(source, target, &[], owner)
        .with_context(|| format!("cannot copy {} to {}", source.display(), target.display()))
}

/// Copies a directory that is in use: a file that vanishes meanwhile is left out. So are the files named in `left_out`;
/// directories of these names stay empty.
pub(crate) fn copy_live_directory(
    source: &Path,
    target: &Path,
    left_out: &[&str],
    owner: Option<Account>,
) -> Result<()> {
    copy_tree(source, target, left_out, owner)
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

fn copy_tree(source: &Path, target: &Path, left_out: &[&str], owner: Option<Account>) -> Result<()> {
    fs::create_dir(target)?;
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        let (from, to) = (entry.path(), target.join(entry.file_name()));
        let is_left_out = left_out.iter().any(|name| entry.file_name() == *name);
        match (entry.file_type()?.is_dir(), is_left_out) {
            (true, false) => copy_tree(&from, &to, left_out, owner)?,
            (true, true) => copy_empty(&from, &to, owner)?,
            (false, false) => copy_file(&from, &to, owner)?,
            (false, true) => {}
        }
    }
    fs::set_permissions(target, fs::metadata(source)?.permissions())?;
    own(target, owner)
}

fn copy_empty(source: &Path, target: &Path, owner: Option<Account>) -> Result<()> {
    fs::create_dir(target)?;
    fs::set_permissions(target, fs::metadata(source)?.permissions())?;
    own(target, owner)
}

/// Copies a file unless it has vanished.
fn copy_file(source: &Path, target: &Path, owner: Option<Account>) -> Result<()> {
    match fs::copy(source, target) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => own(target, owner),
    }
}

fn own(path: &Path, owner: Option<Account>) -> Result<()> {
    owner.map_or(Ok(()), |account| account.own(path))
}
