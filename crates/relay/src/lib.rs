#![doc = include_str!("../README.md")]

pub mod admin;
mod answers;
mod capture;
mod config;
pub mod database;
mod gauges;
mod heartbeat;
mod keeper;
pub mod merging;
pub mod metrics;
pub mod pace;
pub mod packing;
mod program;
pub mod publisher;
mod republisher;
mod run;
pub mod stream;
mod worker;

pub use config::{CaptureConfig, Config, GapPolicy, Source};
pub use program::program;
pub use run::run;

/// Places where fault tests stop the relay: with rows claimed, with messages published but rows not settled, and with
/// everything done; of the write-ahead log, with messages published, and with their position recorded but not confirmed.
pub const FAILPOINTS: &[&str] = &[
    "relay.after_claim",
    "relay.after_publish",
    "relay.after_settle",
    "relay.wal_after_publish",
    "relay.wal_after_settle",
];
