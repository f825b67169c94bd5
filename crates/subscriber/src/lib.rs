#![doc = include_str!("../README.md")]

pub mod admin;
pub mod broker;
mod config;
mod credentials;
mod dead;
pub mod debezium;
pub mod durable;
pub mod heartbeat;
mod held;
mod leftover;
pub mod metrics;
mod namespaces;
pub mod position;
mod program;
pub mod replay;
mod resolver;
mod run;
mod supervisor;
mod worker;

pub use config::{Config, GapPolicy};
pub use program::program;
pub use run::run;

/// Places where fault tests stop the subscriber: with keys deleted but messages not acknowledged, and with both done.
pub const FAILPOINTS: &[&str] = &["subscriber.after_delete", "subscriber.after_ack"];
