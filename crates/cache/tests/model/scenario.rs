//! Who takes part.

/// What a writer promises its readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// It marks the key before it commits.
    Strict,
    /// It only enqueues its event.
    Default,
}

/// What a writer's event asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Delete,
    Update,
}

/// A kind of writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterKind {
    pub promise: Promise,
    pub change: Change,
}

/// Who takes part.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Each writes once. At most `MAX_WRITERS`.
    pub writers: &'static [WriterKind],
    /// At most `MAX_READERS`.
    pub readers: usize,
    pub reads_per_reader: u8,
    /// All writers change the same row, whose version they increment, and readers fill with that version.
    pub versioned: bool,
    /// The readers are of one process and join each other's loads.
    pub readers_share_loads: bool,
    /// A reader may find that the value present cannot be decoded.
    pub values_may_be_unusable: bool,
    pub writers_die: bool,
}

pub const STRICT: WriterKind = WriterKind { promise: Promise::Strict, change: Change::Delete };
pub const DEFAULT: WriterKind = WriterKind { promise: Promise::Default, change: Change::Delete };
pub const STRICT_UPDATE: WriterKind = WriterKind { promise: Promise::Strict, change: Change::Update };
pub const DEFAULT_UPDATE: WriterKind = WriterKind { promise: Promise::Default, change: Change::Update };

/// Two readers of two processes with two reads each, beside writers that may die.
pub const ANY: Scenario = Scenario {
    writers: &[],
    readers: 2,
    reads_per_reader: 2,
    versioned: false,
    readers_share_loads: false,
    values_may_be_unusable: false,
    writers_die: true,
};
