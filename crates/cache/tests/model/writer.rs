//! Writers and what becomes of their transactions.

use crate::protocol::Deletes;
use crate::scenario::Promise;
use crate::state::State;
use crate::system::System;
use crate::transactions::Transactions;

/// How far a writer's process has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Client {
    /// It has not begun.
    #[default]
    Ready,
    /// It has taken a version without holding the row's lock.
    Numbered,
    /// Rows are changed and the event is enqueued.
    Working,
    /// Half of MARK is done.
    Marking,
    /// MARK has deleted the first of guard and value.
    MarkDeleting,
    /// MARK is done; `COMMIT` may be sent.
    Prepared,
    /// `COMMIT` is sent.
    Committing,
    /// The outcome is known; part 1 of UNMARK is next.
    Informed,
    /// Part 2 of UNMARK is next.
    Unmarking,
    /// It does nothing any more: finished, killed, or gave up without knowing the outcome.
    Gone,
}

/// A transaction in Postgres.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transaction {
    #[default]
    None,
    Open,
    /// `COMMIT` has arrived, or is on its way.
    Committing,
    /// The commit record is in the log, where readers of the WAL see it, but new snapshots do not show it yet.
    Flushed,
    Visible,
    Aborted,
}

/// A writer, its one transaction and that transaction's event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Writer {
    pub client: Client,
    pub transaction: Transaction,
    /// The event has reached the cache at least once.
    pub delivered: bool,
    /// The event has reached the cache and done the first half of its delete.
    pub half_delivered: bool,
    /// What the key's value is once this transaction is visible. Kept only where events carry values.
    pub value: Transactions,
    /// The version of that value.
    pub version: u8,
}

/// A step of a writer's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientStep {
    TakeVersion,
    ChangeAndEnqueue,
    MarkAdd,
    MarkUnlink,
    MarkUnlinkFirst,
    MarkUnlinkSecond,
    DeleteBeforeCommit,
    SendCommit,
    HearOutcome,
    /// Goes on as if it knew the outcome.
    AssumeOutcome,
    RollBack,
    UnmarkUnlink,
    UnmarkRemove,
    DeleteAfterCommit,
    /// Killed, or its connection is lost. Postgres aborts what it was not yet told to commit.
    Die,
}

/// A step of Postgres on a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerStep {
    Flush,
    FailToCommit,
    BecomeVisible,
}

impl Writer {
    /// Whether the outcome is decided and new snapshots show it.
    pub fn is_settled(&self) -> bool {
        matches!(self.transaction, Transaction::Visible | Transaction::Aborted)
    }
}

impl System {
    /// Whether this writer announces its commit.
    pub fn marks(&self, writer: u8) -> bool {
        self.protocol.strict_writers_mark && self.writer_kind(writer).promise == Promise::Strict
    }

    /// What the mark of this writer is called.
    pub fn mark_of(&self, writer: u8) -> u8 {
        if self.protocol.marks_are_told_apart { writer } else { 0 }
    }

    /// Steps that writer `index` can take.
    pub fn client_steps(&self, state: &State, index: u8, mut offer: impl FnMut(ClientStep)) {
        let protocol = &self.protocol;
        let writer = &state.writers[usize::from(index)];
        match writer.client {
            Client::Ready if self.scenario.versioned && !protocol.version_is_taken_under_lock => {
                offer(ClientStep::TakeVersion);
            }
            Client::Ready | Client::Numbered if self.row_is_free(state) => {
                offer(ClientStep::ChangeAndEnqueue);
            }
            Client::Working if self.marks(index) && protocol.mark_is_added_before_delete => {
                offer(ClientStep::MarkAdd);
            }
            Client::Working if self.marks(index) => offer(ClientStep::MarkUnlink),
            Client::Working if protocol.writer_deletes_before_commit => {
                offer(ClientStep::DeleteBeforeCommit);
            }
            Client::Marking if protocol.mark_is_added_before_delete => {
                offer(ClientStep::MarkUnlink);
                if protocol.deletes != Deletes::AtOnce {
                    offer(ClientStep::MarkUnlinkFirst);
                }
            }
            Client::MarkDeleting => offer(ClientStep::MarkUnlinkSecond),
            Client::Marking => offer(ClientStep::MarkAdd),
            Client::Working | Client::Prepared => offer(ClientStep::SendCommit),
            Client::Committing if writer.is_settled() => offer(ClientStep::HearOutcome),
            Client::Committing if self.marks(index) && !protocol.unmark_waits_for_outcome => {
                offer(ClientStep::AssumeOutcome);
            }
            Client::Informed if self.marks(index) => offer(ClientStep::UnmarkUnlink),
            Client::Informed => offer(ClientStep::DeleteAfterCommit),
            Client::Unmarking => offer(ClientStep::UnmarkRemove),
            Client::Ready | Client::Numbered | Client::Committing | Client::Gone => {}
        }
        if matches!(
            writer.client,
            Client::Working | Client::Marking | Client::MarkDeleting | Client::Prepared
        ) {
            offer(ClientStep::RollBack);
        }
        if self.scenario.writers_die && !matches!(writer.client, Client::Ready | Client::Gone) {
            offer(ClientStep::Die);
        }
    }

    /// Where events carry versions all writers change the same row, so one waits for the other. Otherwise the key
    /// depends on a row per writer.
    fn row_is_free(&self, state: &State) -> bool {
        let locks = |transaction| {
            matches!(transaction, Transaction::Open | Transaction::Committing | Transaction::Flushed)
        };
        !self.scenario.versioned || !state.writers.iter().any(|writer| locks(writer.transaction))
    }

    pub fn take_client_step(&self, state: &mut State, index: u8, step: ClientStep) {
        let protocol = &self.protocol;
        let (marks, visible) = (self.marks(index), state.visible);
        let next_version = 1 + state.writers.iter().map(|writer| writer.version).max().unwrap_or(0);
        let version_of_row = state.version_of_row();
        let State { key, writers, .. } = state;
        let writer = &mut writers[usize::from(index)];
        writer.client = match step {
            ClientStep::TakeVersion => {
                writer.version = next_version;
                Client::Numbered
            }
            ClientStep::ChangeAndEnqueue => {
                writer.transaction = Transaction::Open;
                if self.scenario.versioned {
                    writer.value = visible.with(index);
                    if protocol.version_is_taken_under_lock {
                        writer.version = version_of_row + 1;
                    }
                }
                Client::Working
            }
            ClientStep::MarkAdd => {
                key.mark_add(self.mark_of(index));
                if protocol.mark_is_added_before_delete { Client::Marking } else { Client::Prepared }
            }
            ClientStep::MarkUnlink => {
                key.mark_unlink(protocol);
                if protocol.mark_is_added_before_delete { Client::Prepared } else { Client::Marking }
            }
            ClientStep::MarkUnlinkFirst => {
                key.delete_first(protocol.deletes);
                Client::MarkDeleting
            }
            ClientStep::MarkUnlinkSecond => {
                key.delete_second(protocol.deletes);
                Client::Prepared
            }
            ClientStep::DeleteBeforeCommit => {
                key.invalidate(protocol);
                Client::Prepared
            }
            ClientStep::SendCommit => {
                writer.transaction = Transaction::Committing;
                Client::Committing
            }
            ClientStep::HearOutcome if !marks && !protocol.writer_deletes_after_commit => Client::Gone,
            ClientStep::HearOutcome | ClientStep::AssumeOutcome => Client::Informed,
            ClientStep::RollBack => {
                writer.transaction = Transaction::Aborted;
                let marked = marks && writer.client != Client::Working;
                if marked { Client::Informed } else { Client::Gone }
            }
            ClientStep::UnmarkUnlink => {
                key.unmark_unlink(protocol);
                Client::Unmarking
            }
            ClientStep::UnmarkRemove => {
                key.unmark_remove(self.mark_of(index));
                Client::Gone
            }
            ClientStep::DeleteAfterCommit => {
                key.invalidate(protocol);
                Client::Gone
            }
            ClientStep::Die => {
                // When Postgres notices does not matter: until then nobody can tell this from a slow writer.
                if writer.transaction == Transaction::Open {
                    writer.transaction = Transaction::Aborted;
                }
                Client::Gone
            }
        };
    }

    /// Steps that Postgres can take on the transaction of writer `index`.
    pub fn server_steps(&self, state: &State, index: u8, mut offer: impl FnMut(ServerStep)) {
        match state.writers[usize::from(index)].transaction {
            Transaction::Committing => {
                offer(ServerStep::Flush);
                offer(ServerStep::FailToCommit);
            }
            Transaction::Flushed => offer(ServerStep::BecomeVisible),
            Transaction::None | Transaction::Open | Transaction::Visible | Transaction::Aborted => {}
        }
    }

    pub fn take_server_step(&self, state: &mut State, index: u8, step: ServerStep) {
        let transaction = &mut state.writers[usize::from(index)].transaction;
        match step {
            ServerStep::Flush => *transaction = Transaction::Flushed,
            ServerStep::FailToCommit => *transaction = Transaction::Aborted,
            ServerStep::BecomeVisible => {
                *transaction = Transaction::Visible;
                state.visible = state.visible.with(index);
            }
        }
    }
}
