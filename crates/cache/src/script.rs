//! The steps of the protocol that must be atomic: Lua scripts of one key and its siblings.

use std::sync::LazyLock;

use deadpool_redis::redis::{self, Cmd, Pipeline};

/// A script and the name a server that has seen it knows it by.
pub(crate) struct Script {
    text: &'static str,
    sha1: String,
}

/// The right to fill, a value, or neither.
pub(crate) static ACQUIRE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/acquire.lua")));
/// Writes a loaded value under a lease.
pub(crate) static FILL: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/fill.lua")));
/// Gives a lease back unused.
pub(crate) static RELEASE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/release.lua")));
/// A committed change with the new value.
pub(crate) static APPLY: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/apply.lua")));
/// Cuts the remaining time of a stale copy.
pub(crate) static LIMIT_STALE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/limit_stale.lua")));
/// Registers marks, makes them, and deletes what they are about.
pub(crate) static MARK: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("scripts/mark.lua")));
/// Registers marks with the server's own time.
pub(crate) static REGISTER: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/register.lua")));

impl Script {
    fn new(text: &'static str) -> Self {
        Self { text, sha1: redis::Script::new(text).get_hash().to_owned() }
    }

    /// The script that a call with its text or name means.
    pub(crate) fn named(name: &[u8]) -> Option<&'static Self> {
        let all: [&'static LazyLock<Self>; 7] =
            [&ACQUIRE, &FILL, &RELEASE, &APPLY, &LIMIT_STALE, &MARK, &REGISTER];
        all.into_iter().map(|script| &**script).find(|script| script.is_named(name))
    }

    /// Whether this is the text or name of this script.
    pub(crate) fn is_named(&self, name: &[u8]) -> bool {
        [self.sha1.as_bytes(), self.text.as_bytes()].contains(&name)
    }

    /// A call by name: short, but a server that has restarted answers `NOSCRIPT`.
    pub(crate) fn call(&self) -> Cmd {
        let mut command = Cmd::new();
        command.arg("EVALSHA").arg(&self.sha1);
        command
    }

    /// A call that brings the text along and never meets `NOSCRIPT`.
    pub(crate) fn call_with_text(&self) -> Cmd {
        let mut command = Cmd::new();
        command.arg("EVAL").arg(self.text);
        command
    }

    /// Starts a call in a pipeline. The first brings the text, which loads it for the others, so that a restart of the
    /// server cannot leave half a pipeline undone.
    pub(crate) fn call_in<'a>(&self, pipeline: &'a mut Pipeline, first: bool) -> &'a mut Pipeline {
        if first { pipeline.cmd("EVAL").arg(self.text) } else { pipeline.cmd("EVALSHA").arg(&self.sha1) }
    }
}
