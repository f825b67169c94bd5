//! Kinds of writers, and who takes part unless a test says otherwise.

use crate::system::{Change, Promise, Scenario, WriterKind};

pub const STRICT: WriterKind = WriterKind { promise: Promise::Strict, change: Change::Delete };
pub const DEFAULT: WriterKind = WriterKind { promise: Promise::Default, change: Change::Delete };
pub const STRICT_UPDATE: WriterKind = WriterKind { promise: Promise::Strict, change: Change::Update };
pub const DEFAULT_UPDATE: WriterKind = WriterKind { promise: Promise::Default, change: Change::Update };

/// Two readers of two processes with two reads each, beside writers that may die.
pub const ALL: Scenario = Scenario {
    writers: &[],
    readers: 2,
    reads_per_reader: 2,
    versioned: false,
    readers_share_loads: false,
    values_may_be_unusable: false,
    writers_die: true,
};
