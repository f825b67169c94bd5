//! The model as the checker sees it: who takes part, what can happen, what must hold.

use stateright::{Model, Property};

use crate::key::Guard;
use crate::protocol::Protocol;
use crate::reader::{Reader, ReaderStep, Stage};
use crate::state::State;
use crate::transactions::Transactions;
use crate::writer::{Client, ClientStep, ServerStep, Transaction};

pub const MAX_WRITERS: usize = 3;
pub const MAX_READERS: usize = 2;

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
    /// Each writes once. At most [`MAX_WRITERS`].
    pub writers: &'static [WriterKind],
    /// At most [`MAX_READERS`].
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
    /// The relay has published the event and a subscriber acts on it, for the first time or again.
    Deliver(u8),
    /// The subscriber removes the mark of a transaction whose event it has acted on.
    RemoveMark(u8),
    /// A forgotten mark is removed after Postgres has said how its transaction ended.
    Resolve(u8),
    /// A copy of part 1 of MARK, delayed on the way, arrives. Copies of every other request of a writer change no more
    /// than an eviction, a redelivery or the resolver can.
    MarkArrivesAgain(u8),
    Reader(u8, ReaderStep),
    /// The replica replays a transaction.
    Replicate(u8),
    LoseValue,
    LoseGuard,
    LoseMark(u8),
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

    /// What becomes of the event and the mark of `writer` without it.
    fn delivery_steps(&self, state: &State, writer: u8, actions: &mut Vec<Action>) {
        let protocol = &self.protocol;
        let it = &state.writers[usize::from(writer)];
        let visible = it.transaction == Transaction::Visible;
        let flushed = it.transaction == Transaction::Flushed;
        if protocol.events_are_delivered && (visible || flushed && !protocol.events_wait_for_visibility) {
            actions.push(Action::Deliver(writer));
        }
        if !state.key.marks.contains(writer) {
            if self.marks(writer) && it.client > Client::Working {
                actions.push(Action::MarkArrivesAgain(writer));
            }
            return;
        }
        if it.delivered {
            actions.push(Action::RemoveMark(writer));
        }
        if it.is_settled() || flushed && !protocol.resolver_waits_for_visibility {
            actions.push(Action::Resolve(writer));
        }
        if !protocol.marks_last {
            actions.push(Action::LoseMark(writer));
        }
    }

    fn deliver(&self, state: &mut State, writer: u8) {
        let State { key, writers, .. } = state;
        let it = &mut writers[usize::from(writer)];
        it.delivered = true;
        match self.writer_kind(writer).change {
            Change::Delete => key.invalidate(&self.protocol),
            Change::Update => {
                key.apply_update(&self.protocol, it.value, it.version);
            }
        }
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
            self.delivery_steps(state, writer, actions);
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
            Action::Deliver(writer) => self.deliver(&mut next, writer),
            Action::RemoveMark(writer) | Action::Resolve(writer) | Action::LoseMark(writer) => {
                next.key.unmark_remove(writer);
            }
            Action::MarkArrivesAgain(writer) => next.key.mark_add(writer),
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
                let died = |client, transaction| client == Client::Gone && transaction == Transaction::Flushed;
                !state.key.marks.is_empty()
                    && state.writers.iter().any(|writer| died(writer.client, writer.transaction))
            }));
        }
        properties
    }
}
