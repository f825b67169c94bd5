#![doc = include_str!("../README.md")]

mod http;
mod program;
mod users;

pub use http::{Config, run};
pub use program::program;
pub use users::{Mode, User, Users};
