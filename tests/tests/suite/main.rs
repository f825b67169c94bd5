//! The pair, end to end: real servers, real processes, real faults.
#![expect(clippy::unwrap_used, reason = "a failure in a test is a panic")]

mod acl;
mod bad_input;
mod bad_surroundings;
mod basics;
mod causes;
mod crashes;
mod dead_letters;
mod debezium;
mod debezium_recordings;
mod defaults;
mod durable;
mod history;
mod marks;
mod nats_faults;
mod nats_rights;
mod postgres_faults;
mod primary;
mod readme;
mod redis_faults;
mod redis_history;
mod replays;
mod republication;
mod resolver;
mod roles;
mod schema;
mod secrets;
mod starting;
mod stopping;
mod stream_losses;
mod stream_options;
mod strict;
mod subscriber;
mod tidy;
mod triggers;
mod wal;
