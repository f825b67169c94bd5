#![doc = include_str!("../README.md")]

pub mod backoff;
pub mod boot;
pub mod cli;
pub mod duration;
mod endpoint;
pub mod failpoint;
pub mod health;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod nats;
#[cfg(feature = "otlp")]
mod otlp;
#[cfg(not(feature = "otlp"))]
#[path = "untraced/otlp.rs"]
mod otlp;
pub mod report;
pub mod said;
pub mod secret;
pub mod secret_url;
pub mod shutdown;
pub mod startup;
#[cfg(feature = "otlp")]
pub mod trace;
#[cfg(not(feature = "otlp"))]
#[path = "untraced/trace.rs"]
pub mod trace;

pub use backoff::Backoff;
pub use boot::{Boot, ServiceOptions, UsageError};
pub use cli::{parse, parse_from};
pub use duration::parse_duration;
pub use health::{Component, Health, Limits};
pub use http::HttpServer;
pub use metrics::Metrics;
pub use report::{Report, printable};
pub use said::SaidLately;
pub use secret::{Secret, read_secret_file};
pub use secret_url::SecretUrl;
pub use shutdown::{Shutdown, drain};
pub use startup::Patience;
