#![doc = include_str!("../README.md")]

pub mod admin;
mod answers;
mod config;
pub mod database;
mod gauges;
mod keeper;
pub mod metrics;
pub mod pace;
pub mod packing;
pub mod publisher;
mod run;
pub mod stream;
mod worker;

pub use config::Config;
pub use run::run;

/// Places where fault tests stop the relay: with rows claimed, with messages published but rows not settled, and with
/// everything done.
pub const FAILPOINTS: &[&str] = &["relay.after_claim", "relay.after_publish", "relay.after_settle"];
