#![doc = include_str!("../README.md")]

pub mod backlog;
pub mod capture;
mod claim;
#[cfg(feature = "cache")]
mod commit;
pub mod dead_letters;
pub mod diagnosis;
mod enqueue;
mod migrate;
pub mod outcome;
pub mod republication;
pub mod retention;
mod statement;
pub mod stream;
pub mod testing;

pub use claim::{Claim, ClaimOptions, Claimed, Poison, wait_for_events};
#[cfg(feature = "cache")]
pub use commit::{CommitError, CommitLimits, Committed, Marks, Writer};
pub use enqueue::{
    EnqueueError, Receipt, Xid, enqueue, enqueue_all, enqueue_through_wal, through_wal, transaction_id,
    without_prepared_statements,
};
pub use event::{CacheKey, Event, EventId, History, InvalidEvent, Topic, Traceparent, TransactionId};
pub use migrate::{MigrateError, SchemaState, migrate, schema_state};
