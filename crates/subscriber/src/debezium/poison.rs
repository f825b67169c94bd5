use async_nats::jetstream::{self, Message};
use metrics::counter;
use service::Report;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio_util::task::TaskTracker;

use super::DebeziumError;
use crate::Config;
use crate::dead::DeadLetters;
use crate::metrics as names;

/// Most messages that wait to be set aside. Further ones are left to NATS, which delivers them again.
const MAX_WAITING: usize = 256;

/// Sets messages aside that cannot be decoded, beside the loop that takes messages: dead letters that cannot be stored hold
/// up nothing else.
pub(super) struct Poison {
    queue: Sender<(Message, DebeziumError)>,
}

impl Poison {
    /// Starts the task that stores dead letters.
    pub(super) fn spawn(tasks: &TaskTracker, jetstream: jetstream::Context, config: &Config) -> Self {
        let (queue, waiting) = channel(MAX_WAITING);
        tasks.spawn(store(waiting, DeadLetters::new(jetstream, config)));
        Self { queue }
    }

    /// Hands a message over, unless too many wait already.
    pub(super) fn set_aside(&self, message: Message, error: DebeziumError) {
        let _ = self.queue.try_send((message, error));
    }
}

async fn store(mut waiting: Receiver<(Message, DebeziumError)>, dead: DeadLetters) {
    while let Some((message, error)) = waiting.recv().await {
        match dead.set_aside(&message, &error).await {
            Ok(()) => counter!(names::DEAD_LETTERS).increment(1),
            Err(failure) => {
                tracing::warn!(error = %Report::of(failure.as_ref()), "cannot set aside a change event that cannot be decoded");
            }
        }
    }
}
