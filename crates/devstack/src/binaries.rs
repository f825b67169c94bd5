//! Where the servers' programs are.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Set to `path`, only `PATH` is searched.
const SEARCH_VARIABLE: &str = "DEVSTACK_SEARCH";

/// Directories searched after `PATH`.
const USUAL_DIRECTORIES: &[&str] = &[
    "/usr/sbin",
    "/usr/bin",
    "/usr/local/sbin",
    "/usr/local/bin",
    "/opt/homebrew/bin",
    "/opt/homebrew/sbin",
    "/usr/pgsql/bin",
];

/// Directories with one subdirectory per installed Postgres version, and what follows the version.
const POSTGRES_PARENTS: &[(&str, &str)] =
    &[("/usr/lib/postgresql", "bin"), ("/usr/libexec", "bin"), ("/usr", "bin"), ("/opt/homebrew/opt", "bin")];

/// A server program the stack may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// `postgres`, with `initdb` beside it.
    Postgres,
    /// `nats-server`.
    NatsServer,
    /// `redis-server`, which is also the sentinel.
    RedisServer,
    /// `pgbouncer`.
    PgBouncer,
}

/// Programs that are neither named by the environment nor installed in a usual place.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("missing server programs: {}", describe(.0))]
pub struct MissingBinaries(pub Vec<Binary>);

impl Binary {
    /// What [`Stack::start`](crate::Stack::start) needs.
    pub const SERVERS: &[Self] = &[Self::Postgres, Self::NatsServer, Self::RedisServer];

    /// Everything the project's tests need.
    pub const ALL: &[Self] = &[Self::Postgres, Self::NatsServer, Self::RedisServer, Self::PgBouncer];

    /// The file name of the program.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::NatsServer => "nats-server",
            Self::RedisServer => "redis-server",
            Self::PgBouncer => "pgbouncer",
        }
    }

    /// The environment variable that says where the program is: the file, or the directory that has it.
    #[must_use]
    pub fn environment_variable(self) -> &'static str {
        match self {
            Self::Postgres => "DEVSTACK_POSTGRES_BIN",
            Self::NatsServer => "DEVSTACK_NATS_SERVER",
            Self::RedisServer => "DEVSTACK_REDIS_SERVER",
            Self::PgBouncer => "DEVSTACK_PGBOUNCER",
        }
    }

    /// The program's file: from the environment, else `PATH`, else the usual places.
    ///
    /// # Errors
    /// [`MissingBinaries`] when it is nowhere.
    pub fn find(self) -> Result<PathBuf, MissingBinaries> {
        let found = match self.named_place() {
            Some(place) => self.at(&place),
            None => self.search(),
        };
        found.ok_or_else(|| MissingBinaries(vec![self]))
    }

    /// Where the environment says the program is.
    pub(crate) fn named_place(self) -> Option<PathBuf> {
        std::env::var_os(self.environment_variable()).map(PathBuf::from)
    }

    fn search(self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
        if std::env::var_os(SEARCH_VARIABLE).is_some_and(|value| value == "path") {
            return directories.iter().find_map(|directory| self.at(directory));
        }
        directories.extend(USUAL_DIRECTORIES.iter().map(PathBuf::from));
        if self == Self::Postgres {
            directories.extend(postgres_directories());
        }
        directories.iter().find_map(|directory| self.at(directory))
    }

    /// The program at `place`, which is its file or its directory.
    fn at(self, place: &Path) -> Option<PathBuf> {
        let file = if place.is_dir() { place.join(self.program()) } else { place.to_owned() };
        if !file.is_file() {
            return None;
        }
        if self != Self::Postgres {
            // Not resolved further: Redis is many programs in one file, and goes by the name it is called.
            return std::path::absolute(file).ok();
        }
        // Postgres finds its other files relative to where it really is.
        let file = file.canonicalize().ok()?;
        file.with_file_name("initdb").is_file().then_some(file)
    }
}

/// Those of `wanted` that cannot be found.
#[must_use]
pub fn missing(wanted: &[Binary]) -> Vec<Binary> {
    wanted.iter().copied().filter(|binary| binary.find().is_err()).collect()
}

/// Fails with all of `wanted` that are missing, so that the user installs once.
pub(crate) fn require(wanted: &[Binary]) -> Result<(), MissingBinaries> {
    let missing = missing(wanted);
    if missing.is_empty() { Ok(()) } else { Err(MissingBinaries(missing)) }
}

/// Version directories of Postgres, newest first.
fn postgres_directories() -> Vec<PathBuf> {
    let mut versions = Vec::new();
    for (parent, bin) in POSTGRES_PARENTS {
        let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            let digits = name.trim_start_matches(|letter: char| !letter.is_ascii_digit());
            let is_postgres = name == digits || name.starts_with("postgresql") || name.starts_with("pgsql-");
            if let (true, Ok(version)) = (is_postgres, digits.parse::<u32>()) {
                versions.push((version, entry.path().join(bin)));
            }
        }
    }
    versions.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    versions.into_iter().map(|(_, directory)| directory).collect()
}

fn describe(missing: &[Binary]) -> String {
    let one = |binary: &Binary| format!("{} (or set {})", binary.program(), binary.environment_variable());
    missing.iter().map(one).collect::<Vec<_>>().join(", ")
}
