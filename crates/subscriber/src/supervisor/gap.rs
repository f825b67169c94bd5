//! Messages that are gone from the stream: who vouches for them, and the gap policy if nobody does.

use std::time::Duration;

use chrono::{DateTime, Utc};
use event::nats::{COVERAGE_SUBJECT, CoverageReply, CoverageRequest, Missing};
use metrics::{counter, gauge};
use service::Component;
use tokio::time::Instant;

use super::{LookError, Memory, Supervisor};
use crate::config::GapPolicy;
use crate::metrics as names;
use crate::position::{Continuity, Position, Seen};
use crate::replay::with_progress;

/// How far the clocks of Postgres and NATS may be apart before a gap could be overlooked.
const CLOCK_MARGIN_US: i64 = 5_000_000;

/// How long a relay may take to answer.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(2);

/// How often the log is reminded of a subscriber that has halted.
const HALT_REMINDER: Duration = Duration::from_mins(10);

/// Invalidations are gone for good and the operator chose to halt.
#[derive(Debug, thiserror::Error)]
#[error(
    "invalidations are missing from the stream for good ({what}) and SUBSCRIBER_GAP_POLICY is halt, so nothing is consumed: \
     keys of this cache may be stale; delete them (or start once with SUBSCRIBER_GAP_POLICY=flush and \
     SUBSCRIBER_FLUSH_PATTERNS), and accept it with `subscriber accept-gap`"
)]
pub(super) struct Halt {
    /// What happened to them.
    what: String,
}

impl Supervisor {
    /// Decides whether the workers may go on with this stream, and returns how it is then.
    pub(super) async fn judge(
        &self,
        memory: &mut Memory,
        position: &Position,
        mut seen: Seen,
        health: &Component,
    ) -> Result<Seen, LookError> {
        let mut position = position.clone();
        if matches!(position.judge(seen), Continuity::Expired { .. })
            && let Some(stored) = self.load_position().await?
            && stored.stream_created_us == position.stream_created_us
            && stored.acked_seq > position.acked_seq
        {
            // Another subscriber of this cache has gone on while this one was held up.
            position = Position { instances: position.instances, ..stored };
            memory.position = Some(position.clone());
        }
        let position = &position;
        let continuity = position.judge(seen);
        if continuity != Continuity::Whole {
            self.consumer.send_replace(None);
            if position.is_gap_accepted(Utc::now().timestamp_micros()) {
                tracing::warn!("an operator has accepted that invalidations are missing from the stream");
            } else {
                self.settle(memory, position, seen, health).await?;
            }
            if continuity == Continuity::Truncated {
                self.restart_consumer(memory, position).await?;
                // The consumer that was ahead is gone, and what it had acknowledged with it.
                seen = self.look_at_stream(memory, position).await?;
            }
            memory.deleted = None;
            let begin = seen.first_seq.saturating_sub(1).min(seen.last_seq);
            let is_deleted = matches!(continuity, Continuity::Deleted { .. });
            memory.position = Some(Position {
                stream_created_us: seen.stream_created_us,
                acked_seq: if is_deleted { begin.max(position.acked_seq) } else { begin },
                holes_until: seen.last_seq,
                ..position.clone()
            });
        }
        memory.doubt = None;
        if let Some(position) = &mut memory.position {
            position.accepted_us = 0;
        }
        if memory.halted.take().is_some() {
            gauge!(names::HALTED).set(0.0);
            tracing::info!("the subscriber goes on");
        }
        Ok(seen)
    }

    /// Returns when what is missing may be forgotten.
    async fn settle(
        &self,
        memory: &mut Memory,
        position: &Position,
        seen: Seen,
        health: &Component,
    ) -> Result<(), LookError> {
        let continuity = position.judge(seen);
        let what = match continuity {
            Continuity::Expired { messages } => {
                format!("{messages} messages expired before this cache read them")
            }
            Continuity::Deleted { messages } => {
                format!("{messages} messages were deleted from the stream before this cache applied them")
            }
            Continuity::Unrecorded => {
                "neither Redis nor the durable consumer says which messages this cache has applied".to_owned()
            }
            Continuity::Recreated => "the stream was created anew".to_owned(),
            Continuity::Truncated | Continuity::Whole => "NATS came back with old data".to_owned(),
        };
        match self.ask_relay(continuity, position, seen).await {
            Answer::Covered { remaining } => {
                tracing::warn!(what, remaining, "relays publish again what this cache has missed");
                Ok(())
            }
            Answer::Lost => self.apply_gap_policy(memory, what, health).await,
            // Only silence ends the patience: who answers is about to look.
            Answer::NotYet => {
                memory.doubt = None;
                Err(LookError::Doubt(format!(
                    "{what}; a relay answers that it has not examined the stream yet"
                )))
            }
            Answer::Silence => {
                let since = *memory.doubt.get_or_insert_with(Instant::now);
                if since.elapsed() < self.config.gap_grace {
                    return Err(LookError::Doubt(what));
                }
                self.apply_gap_policy(memory, format!("{what}, and no relay answers"), health).await
            }
        }
    }

    async fn apply_gap_policy(
        &self,
        memory: &mut Memory,
        what: String,
        health: &Component,
    ) -> Result<(), LookError> {
        let policy = self.config.gap_policy;
        if memory.halted.is_none() {
            counter!(names::GAPS, "policy" => policy.as_str()).increment(1);
        }
        if policy == GapPolicy::Halt {
            return Err(halt(memory, what).into());
        }
        tracing::error!(what, "invalidations are missing from the stream for good");
        let flush = async {
            match self.config.flush_everything {
                true => self.redis.flush_all_keys().await,
                false => self.redis.delete_matching(&self.config.flush_patterns).await,
            }
        };
        // A large cache takes longer than a component may be silent.
        let deleted = with_progress(|| health.beat(), flush).await?;
        tracing::error!(deleted, "flushed the keys that the gap policy names");
        Ok(())
    }

    /// A durable that is ahead of its stream would wait until the stream catches up, and skip what comes before.
    async fn restart_consumer(&self, memory: &mut Memory, position: &Position) -> Result<(), LookError> {
        if let Some((stream, _)) = memory.handles.take() {
            self.consumer.send_replace(None);
            stream
                .delete_consumer(&self.config.durable)
                .await
                .map_err(|error| LookError::Stream(self.nats.judge(error)))?;
            let since =
                DateTime::from_timestamp_micros(position.acked_until_us.saturating_sub(CLOCK_MARGIN_US));
            self.create_at(memory, &stream, since, position).await?;
        }
        Ok(())
    }

    /// Asks a relay about what this cache has not applied. Of a stream that lost messages it publishes again what it retains.
    async fn ask_relay(&self, continuity: Continuity, position: &Position, seen: Seen) -> Answer {
        let since_us = position.acked_until_us.saturating_sub(CLOCK_MARGIN_US);
        let before_seq = match continuity {
            // Nobody knows what to ask for.
            Continuity::Unrecorded => return Answer::Lost,
            Continuity::Expired { .. } => Some(seen.first_seq),
            Continuity::Deleted { .. } => Some(seen.last_seq + 1),
            _ => None,
        };
        let missing = before_seq.map(|before_seq| Missing { since_us, before_seq });
        let question = CoverageRequest { stream_created_us: seen.stream_created_us, missing };
        let body = serde_json::to_vec(&question).expect("plain data always serializes");
        let asked = self.nats.client.request(COVERAGE_SUBJECT, body.into());
        match tokio::time::timeout(QUESTION_TIMEOUT, asked).await {
            Ok(Ok(answer)) => serde_json::from_slice(&answer.payload)
                .map_or(Answer::Silence, |reply| Answer::read(continuity, &reply, since_us)),
            _ => Answer::Silence,
        }
    }
}

/// What a relay says of messages that this cache has not applied and the stream does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// They were published to the stream again, or will be.
    Covered {
        /// About how many messages are still to come.
        remaining: u64,
    },
    /// They are gone.
    Lost,
    /// It cannot say yet.
    NotYet,
    /// No relay answers.
    Silence,
}

impl Answer {
    /// Reads a reply about messages published since `since_us`.
    fn read(continuity: Continuity, reply: &CoverageReply, since_us: i64) -> Self {
        let is_covered = match continuity {
            // A relay that does not know the question answers nothing to it.
            Continuity::Expired { .. } | Continuity::Deleted { .. } => {
                reply.missing_is_retained.unwrap_or(false)
            }
            Continuity::Unrecorded => false,
            Continuity::Recreated => match reply.complete_since_us {
                Some(complete_since_us) => complete_since_us <= since_us,
                None => return Self::NotYet,
            },
            Continuity::Truncated | Continuity::Whole => reply.retained_since_us <= since_us,
        };
        let remaining = reply.republish_remaining.unwrap_or(0);
        if is_covered { Self::Covered { remaining } } else { Self::Lost }
    }
}

/// Whoever decides does so by `accept-gap`, which leaves its word in Redis: the position is loaded anew for the next look.
fn halt(memory: &mut Memory, what: String) -> Halt {
    let halt = Halt { what };
    if memory.halted.is_none_or(|said| said.elapsed() >= HALT_REMINDER) {
        tracing::error!("{halt}");
        memory.halted = Some(Instant::now());
    }
    gauge!(names::HALTED).set(1.0);
    memory.position = None;
    halt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_by_what_happened() {
        let reply = CoverageReply {
            complete_since_us: Some(50),
            retained_since_us: 70,
            republish_remaining: Some(9),
            missing_is_retained: None,
        };
        let expired = Continuity::Expired { messages: 1 };
        let covered = Answer::Covered { remaining: 9 };
        let unknown = CoverageReply { complete_since_us: None, ..reply };
        let refilled = CoverageReply { missing_is_retained: Some(true), ..reply };
        let cases = [
            (Continuity::Recreated, &reply, 50, covered),
            (Continuity::Recreated, &reply, 49, Answer::Lost),
            (Continuity::Recreated, &unknown, 90, Answer::NotYet),
            (Continuity::Truncated, &reply, 70, covered),
            (Continuity::Truncated, &reply, 69, Answer::Lost),
            (Continuity::Truncated, &unknown, 70, covered),
            (expired, &reply, 90, Answer::Lost),
            (expired, &refilled, 10, covered),
        ];
        for (continuity, reply, since_us, expected) in cases {
            assert_eq!(
                Answer::read(continuity, reply, since_us),
                expected,
                "{continuity:?} {reply:?} {since_us}"
            );
        }
    }
}
