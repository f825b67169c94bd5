//! The rules against a real Postgres: the catalog check, and what the generated triggers capture.

#![expect(clippy::unwrap_used, reason = "a failure in a test is a panic")]

mod bed;
mod capture;
mod catalog;
mod expand;
mod install;
mod many;
mod partitions;
mod traps;
mod values;
