//! Readers.

use crate::key::{Acquired, Lease};
use crate::state::State;
use crate::system::System;
use crate::transactions::Transactions;

/// How far a reader has come in its current read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Between two reads, or done with all of them.
    #[default]
    Idle,
    /// GET found nothing, or ACQUIRE said WAIT.
    Missed,
    /// It holds a lease; the load is next.
    Granted,
    /// It has loaded; FILL is next.
    Loaded,
    /// It loads without a lease, for itself and for those who join.
    Bypassing,
    /// It has loaded what it may not store, and tells those who joined.
    Bypassed,
    /// It waits for another reader of its process.
    Joined {
        /// Since before that reader began to load.
        early: bool,
    },
}

/// A reader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reader {
    pub reads_left: u8,
    pub stage: Stage,
    /// The strict commits that had finished when the read began. Kept while it may still return what somebody else has
    /// loaded; its own load begins later than the read.
    pub required: Transactions,
    /// What tells the lease it was granted, alive or not, from others of its token. Zero also where it has none.
    pub lease: u8,
    /// What it has loaded. Where snapshots may be older than the lease: what its snapshot shows.
    pub value: Transactions,
    /// Version of the row it has loaded.
    pub version: u8,
}

/// A step of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReaderStep {
    /// Begins a read.
    Get,
    /// Looks again whether the value has appeared.
    GetAgain,
    Acquire,
    /// As if the value present could not be decoded.
    AcquireToReplace,
    /// A copy of the request for the lease, delayed on the way, arrives.
    AcquireArrivesAgain,
    /// Waited long enough, or Redis does not answer.
    LoadWithoutFilling,
    Join,
    Load,
    Fill,
    TellJoined,
}

impl Reader {
    /// Whether others of its process join it instead of loading too.
    fn leads(&self) -> bool {
        matches!(self.stage, Stage::Granted | Stage::Loaded | Stage::Bypassing | Stage::Bypassed)
    }

    fn is_loading(&self) -> bool {
        matches!(self.stage, Stage::Loaded | Stage::Bypassed)
    }

    /// Whether nothing it has begun is unfinished.
    pub fn is_idle(&self) -> bool {
        self.stage == Stage::Idle
    }

    /// Ends the current read and tells whether the value returned lacks a commit it must not lack.
    fn returns(&mut self, value: Transactions) -> bool {
        let stale = !value.contains_all(self.required);
        *self = Self { reads_left: self.reads_left, ..Self::default() };
        stale
    }
}

impl System {
    /// Steps that reader `index` can take.
    pub fn reader_steps(&self, state: &State, index: u8, mut offer: impl FnMut(ReaderStep)) {
        let reader = &state.readers[usize::from(index)];
        match reader.stage {
            Stage::Idle if reader.reads_left > 0 => offer(ReaderStep::Get),
            Stage::Idle | Stage::Joined { .. } => {}
            Stage::Missed => {
                if state.key.value.is_some() {
                    offer(ReaderStep::GetAgain);
                }
                offer(ReaderStep::LoadWithoutFilling);
                if self.scenario.readers_share_loads && state.readers.iter().any(Reader::leads) {
                    offer(ReaderStep::Join);
                } else {
                    offer(ReaderStep::Acquire);
                    if self.scenario.values_may_be_unusable && state.key.value.is_some() {
                        offer(ReaderStep::AcquireToReplace);
                    }
                }
            }
            Stage::Granted | Stage::Bypassing => offer(ReaderStep::Load),
            Stage::Loaded => offer(ReaderStep::Fill),
            Stage::Bypassed => offer(ReaderStep::TellJoined),
        }
        // It may have asked by then, in this read or in an earlier one. That a later read can take over what the copy is
        // granted is more than can happen, since it has a token of its own.
        if reader.reads_left < self.scenario.reads_per_reader {
            offer(ReaderStep::AcquireArrivesAgain);
        }
    }

    pub fn take_reader_step(&self, state: &mut State, index: u8, step: ReaderStep) {
        let protocol = &self.protocol;
        let finished = state.visible.and(self.strict_writers());
        let snapshot = if protocol.loads_read_primary { state.visible } else { state.replica };
        let version = if self.scenario.versioned { state.version_of_row() } else { 0 };
        let has_leader = |state: &State| state.readers.iter().position(Reader::leads);
        let joined_early = has_leader(state).is_some_and(|leader| !state.readers[leader].is_loading());
        let State { key, readers, .. } = state;
        let reader = &mut readers[usize::from(index)];
        // Any lease but the one it was granted. That is the only one it can fill under, so all others may be one.
        let nth = u8::from(reader.lease == 0);
        match step {
            ReaderStep::Get => {
                reader.reads_left -= 1;
                reader.required = finished;
                match key.value {
                    Some(value) => state.stale_read |= reader.returns(value),
                    None => {
                        reader.stage = Stage::Missed;
                        if !protocol.snapshot_follows_grant {
                            (reader.value, reader.version) = (snapshot, version);
                        }
                    }
                }
            }
            ReaderStep::GetAgain => {
                let value = key.value.expect("offered only if there is a value");
                state.stale_read |= reader.returns(value);
            }
            ReaderStep::Acquire | ReaderStep::AcquireToReplace => {
                match key.acquire(protocol, index, nth, step == ReaderStep::AcquireToReplace) {
                    Acquired::Grant(lease) => {
                        (reader.stage, reader.required) = (Stage::Granted, Transactions::NONE);
                        reader.lease = lease.nth;
                    }
                    Acquired::Wait => {}
                    Acquired::Value(value) => state.stale_read |= reader.returns(value),
                    Acquired::Bypass if self.scenario.readers_share_loads => {
                        (reader.stage, reader.required) = (Stage::Bypassing, Transactions::NONE);
                    }
                    Acquired::Bypass => state.stale_read |= reader.returns(snapshot),
                }
            }
            ReaderStep::AcquireArrivesAgain => {
                key.acquire(protocol, index, nth, false);
            }
            ReaderStep::LoadWithoutFilling => state.stale_read |= reader.returns(snapshot),
            ReaderStep::Join => reader.stage = Stage::Joined { early: joined_early },
            ReaderStep::Load => {
                let leased = reader.stage == Stage::Granted;
                reader.stage = if leased { Stage::Loaded } else { Stage::Bypassed };
                if protocol.snapshot_follows_grant {
                    (reader.value, reader.version) = (snapshot, version);
                }
            }
            ReaderStep::Fill => {
                let version = self.scenario.versioned.then_some(reader.version);
                let lease = Lease { token: index, nth: reader.lease };
                let (value, stored) = (reader.value, key.fill(protocol, lease, reader.value, version));
                reader.returns(value);
                self.tell_joined(state, value, stored);
            }
            ReaderStep::TellJoined => {
                let value = reader.value;
                reader.returns(value);
                self.tell_joined(state, value, false);
            }
        }
    }

    /// Readers that wait for a load take its value, or look again.
    fn tell_joined(&self, state: &mut State, value: Transactions, stored: bool) {
        for reader in &mut state.readers {
            match reader.stage {
                Stage::Joined { early } if stored || early || !self.protocol.late_joiner_needs_fill => {
                    state.stale_read |= reader.returns(value);
                }
                Stage::Joined { .. } => reader.stage = Stage::Missed,
                _ => {}
            }
        }
    }
}
