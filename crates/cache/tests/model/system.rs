//! The model as the checker sees it: who takes part, what can happen, what must hold.

use stateright::{Model, Property};

use crate::delivery::DeliveryStep;
use crate::key::Guard;
use crate::protocol::Protocol;
use crate::reader::{Reader, ReaderStep, Stage};
use crate::scenario::{Promise, Scenario, WriterKind};
use crate::state::State;
use crate::transactions::Transactions;
use crate::writer::{Client, ClientStep, ServerStep, Transaction};

pub const MAX_WRITERS: usize = 3;
pub const MAX_READERS: usize = 2;

/// A protocol in a scenario.
#[derive(Clone, Copy, Debug)]
pub struct System {
    pub protocol: Protocol,
    pub scenario: Scenario,
    /// Treat writers or readers of a kind as exchangeable. Saves most of the states, but in a trace their names change.
    pub merge_symmetric_states: bool,
}

/// Anything that can happen. Writers and readers are named by their index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Writer(u8, ClientStep),
    Postgres(u8, ServerStep),
    /// Relay, subscriber and resolver about the transaction of a writer.
    Delivery(u8, DeliveryStep),
    Reader(u8, ReaderStep),
    /// The replica replays a transaction.
    Replicate(u8),
    /// The value expires or is evicted.
    LoseValue,
    /// The lease or the version expires or is evicted.
    LoseGuard,
}

impl System {
    pub fn writer_kind(&self, writer: u8) -> WriterKind {
        self.scenario.writers[usize::from(writer)]
    }

    pub fn strict_writers(&self) -> Transactions {
        let mut strict = Transactions::NONE;
        for writer in self.writers() {
            if self.writer_kind(writer).promise == Promise::Strict {
                strict = strict.with(writer);
            }
        }
        strict
    }

    fn writers(&self) -> impl Iterator<Item = u8> + use<> {
        (0..).take(self.scenario.writers.len())
    }

    fn readers(&self) -> impl Iterator<Item = u8> + use<> {
        (0..).take(self.scenario.readers)
    }

    /// No write, invalidation or fill is in flight and every mark is resolved.
    fn is_quiescent(&self, state: &State) -> bool {
        state.key.marks.is_empty()
            && state.readers.iter().all(Reader::is_idle)
            && (self.protocol.loads_read_primary || state.replica == state.visible)
            && state.writers.iter().all(|writer| match writer.transaction {
                Transaction::None => true,
                Transaction::Aborted => writer.client == Client::Gone,
                Transaction::Visible => {
                    let delivered = writer.delivered || !self.protocol.events_are_delivered;
                    writer.client == Client::Gone && delivered
                }
                _ => false,
            })
    }

    fn converges(&self, state: &State) -> bool {
        !self.is_quiescent(state) || state.key.value.is_none_or(|value| value == state.visible)
    }

    fn has_settled_on_the_last_value(&self, state: &State) -> bool {
        self.is_quiescent(state)
            && state.key.value == Some(state.visible)
            && self.writers().all(|writer| state.visible.contains(writer))
    }
}

impl Model for System {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State::default();
        for reader in &mut state.readers[..self.scenario.readers] {
            reader.reads_left = self.scenario.reads_per_reader;
        }
        vec![if self.merge_symmetric_states { state.canonical(self) } else { state }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.stale_read {
            return;
        }
        for writer in self.writers() {
            self.client_steps(state, writer, |step| actions.push(Action::Writer(writer, step)));
            self.server_steps(state, writer, |step| actions.push(Action::Postgres(writer, step)));
            self.delivery_steps(state, writer, |step| actions.push(Action::Delivery(writer, step)));
            let behind = state.visible.contains(writer) && !state.replica.contains(writer);
            if !self.protocol.loads_read_primary && behind {
                actions.push(Action::Replicate(writer));
            }
        }
        for reader in self.readers() {
            self.reader_steps(state, reader, |step| actions.push(Action::Reader(reader, step)));
        }
        if state.key.value.is_some() {
            actions.push(Action::LoseValue);
        }
        if state.key.guard != Guard::Absent {
            actions.push(Action::LoseGuard);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = state.clone();
        match action {
            Action::Writer(writer, step) => self.take_client_step(&mut next, writer, step),
            Action::Postgres(writer, step) => self.take_server_step(&mut next, writer, step),
            Action::Delivery(writer, step) => self.take_delivery_step(&mut next, writer, step),
            Action::Reader(reader, step) => self.take_reader_step(&mut next, reader, step),
            Action::Replicate(writer) => next.replica = next.replica.with(writer),
            Action::LoseValue => next.key.lose_value(),
            Action::LoseGuard => next.key.lose_guard(),
        }
        Some(if self.merge_symmetric_states { next.canonical(self) } else { next })
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("strict", |_, state: &State| !state.stale_read),
            Property::always("converges", System::converges),
            // The rest shows that the model gets where it is interesting.
            Property::sometimes("the last value stays cached", System::has_settled_on_the_last_value),
            Property::sometimes("a lease is lost while its holder loads", |_, state: &State| {
                state.key.guard == Guard::Absent
                    && state.readers.iter().any(|reader| reader.stage == Stage::Loaded)
            }),
        ];
        if self.scenario.writers_die && !self.strict_writers().is_empty() {
            properties.push(Property::sometimes("a commit outlives its client", |_, state: &State| {
                let died =
                    |client, transaction| client == Client::Gone && transaction == Transaction::Flushed;
                !state.key.marks.is_empty()
                    && state.writers.iter().any(|writer| died(writer.client, writer.transaction))
            }));
        }
        properties
    }
}
