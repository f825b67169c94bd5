#![doc = include_str!("../README.md")]

mod account;
mod base_directory;
mod binaries;
mod copy;
mod directory;
mod eventually;
mod install;
mod nats;
mod pgbouncer;
mod ports;
mod postgres;
mod process;
mod process_tree;
pub mod proxy;
mod readiness;
mod redis;
mod stack;
mod watchdog;

pub use base_directory::base_directory;
pub use binaries::{Binary, MissingBinaries, missing};
pub use directory::StackDirectory;
pub use eventually::{Outcome, eventually};
pub use install::install_missing;
pub use nats::cluster::NatsCluster;
pub use nats::{Nats, NatsOptions};
pub use pgbouncer::{PgBouncer, PoolMode};
pub use ports::Port;
pub use postgres::{Postgres, PostgresOptions};
pub use process::Process;
pub use redis::cluster::RedisCluster;
pub use redis::replica_pair::RedisReplicaPair;
pub use redis::{Redis, RedisOptions};
pub use stack::{Stack, StackOptions};
