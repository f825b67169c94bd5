//! The pair, end to end: real servers, real processes, real faults.
#![expect(clippy::unwrap_used, reason = "a failure in a test is a panic")]

mod basics;
