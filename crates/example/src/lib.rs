#![doc = include_str!("../README.md")]

mod http;
mod users;

pub use http::{Config, run};
pub use users::{Mode, User, Users};
