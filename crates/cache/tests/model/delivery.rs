//! What becomes of an event and a mark without their writer: relay, subscriber and resolver.

use crate::protocol::Deletes;
use crate::scenario::Change;
use crate::state::State;
use crate::system::System;
use crate::writer::{Client, Transaction};

/// A step about one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryStep {
    /// The relay has published the event and a subscriber acts on it, for the first time or again.
    Apply,
    /// The same in two steps: it deletes one of guard and value, for the first time or again.
    ApplyFirst,
    /// It deletes the other.
    ApplySecond,
    /// The subscriber removes the mark of a transaction whose event it has acted on.
    RemoveMark,
    /// A forgotten mark is removed after Postgres has said how its transaction ended.
    Resolve,
    /// A copy of part 1 of MARK, delayed on the way, arrives. Copies of every other request of a writer change no more
    /// than an eviction, a redelivery or the resolver can.
    MarkArrivesAgain,
    /// The mark expires.
    LoseMark,
}

impl System {
    /// Steps about the transaction of `writer`.
    pub fn delivery_steps(&self, state: &State, writer: u8, mut offer: impl FnMut(DeliveryStep)) {
        let protocol = &self.protocol;
        let it = &state.writers[usize::from(writer)];
        let visible = it.transaction == Transaction::Visible;
        let flushed = it.transaction == Transaction::Flushed;
        if protocol.events_are_delivered && (visible || flushed && !protocol.events_wait_for_visibility) {
            offer(DeliveryStep::Apply);
            match protocol.deletes {
                Deletes::AtOnce => {}
                _ if it.half_delivered => offer(DeliveryStep::ApplySecond),
                _ => offer(DeliveryStep::ApplyFirst),
            }
        }
        if !state.key.marks.contains(self.mark_of(writer)) {
            if self.marks(writer) && it.client > Client::Working {
                offer(DeliveryStep::MarkArrivesAgain);
            }
            return;
        }
        if it.delivered {
            offer(DeliveryStep::RemoveMark);
        }
        if it.is_settled() || flushed && !protocol.resolver_waits_for_visibility {
            offer(DeliveryStep::Resolve);
        }
        if !protocol.marks_last {
            offer(DeliveryStep::LoseMark);
        }
    }

    pub fn take_delivery_step(&self, state: &mut State, writer: u8, step: DeliveryStep) {
        let State { key, writers, .. } = state;
        let it = &mut writers[usize::from(writer)];
        match step {
            DeliveryStep::Apply => {
                it.delivered = true;
                match self.writer_kind(writer).change {
                    Change::Delete => key.invalidate(&self.protocol),
                    Change::Update => drop(key.apply_update(&self.protocol, it.value, it.version)),
                }
            }
            DeliveryStep::ApplyFirst => {
                it.half_delivered = true;
                key.delete_first(self.protocol.deletes);
            }
            DeliveryStep::ApplySecond => {
                (it.half_delivered, it.delivered) = (false, true);
                key.delete_second(self.protocol.deletes);
            }
            DeliveryStep::RemoveMark | DeliveryStep::Resolve | DeliveryStep::LoseMark => {
                key.unmark_remove(self.mark_of(writer));
            }
            DeliveryStep::MarkArrivesAgain => key.mark_add(self.mark_of(writer)),
        }
    }
}
