//! The cache on real Redis servers, one per test.
#![expect(clippy::unwrap_used, reason = "the helpers of tests fail as tests do")]

mod apply;
mod cluster;
mod connection;
mod counters;
mod flush;
mod lease;
mod many;
mod marks;
mod moving;
mod reader;
mod scripts;
mod spawn;
mod stale;
mod stampede;
mod support;
mod trouble;
mod update;
