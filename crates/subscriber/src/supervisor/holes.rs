//! Messages deleted from the middle of the stream: by a purge of one subject, or one by one.
//!
//! nats-server moves the floor of a consumer over them, so they look as if they had been acknowledged.

use super::{LookError, Memory, Supervisor};
use crate::broker;
use crate::position::Seen;

/// Deleted messages that are asked for one by one. Of more only their number is compared.
const MAX_LISTED: u64 = 10_000;

/// What was deleted from the middle of the stream at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deleted {
    messages: u64,
    first_seq: u64,
}

/// What the number of deleted messages says.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing was deleted that may not have been applied.
    Nothing,
    /// So many may not have been applied.
    Missing(u64),
    /// Only the list of them says it.
    Ask,
}

/// `known` is what was found to be harmless, and `had_holes` says that an operator or the policy has dealt with some.
fn decide(known: Option<Deleted>, now: Deleted, had_holes: bool) -> Verdict {
    match known {
        _ if now.messages == 0 => Verdict::Nothing,
        Some(known) if known == now => Verdict::Nothing,
        _ if now.messages <= MAX_LISTED => Verdict::Ask,
        Some(known) if now.messages <= known.messages => Verdict::Nothing,
        Some(known) => Verdict::Missing(now.messages - known.messages),
        None if had_holes => Verdict::Nothing,
        None => Verdict::Missing(now.messages),
    }
}

impl Supervisor {
    /// Counts the deleted messages that this cache may not have applied. What was recorded at the last look counts, as the
    /// floor of the consumer may have moved over them since.
    pub(super) async fn count_holes(
        &self,
        memory: &mut Memory,
        seen: Seen,
        messages: u64,
    ) -> Result<u64, LookError> {
        let Some(position) =
            memory.position.as_ref().filter(|known| known.stream_created_us == seen.stream_created_us)
        else {
            memory.deleted = None;
            return Ok(0);
        };
        let now = Deleted { messages, first_seq: seen.first_seq };
        let missing = match decide(memory.deleted, now, position.holes_until > 0) {
            Verdict::Nothing => 0,
            Verdict::Missing(messages) => messages,
            Verdict::Ask => {
                let applied = position.acked_seq.max(position.holes_until);
                broker::deleted_after(&self.jetstream, applied)
                    .await
                    .map_err(|error| self.stream_error(error))?
            }
        };
        if missing == 0 {
            memory.deleted = Some(now);
        }
        Ok(missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deletions_are_looked_at_when_they_change() {
        let deleted = |messages, first_seq| Deleted { messages, first_seq };
        let many = MAX_LISTED + 1;
        let cases = [
            (None, deleted(0, 1), false, Verdict::Nothing),
            (None, deleted(1, 1), false, Verdict::Ask),
            (Some(deleted(1, 1)), deleted(1, 1), false, Verdict::Nothing),
            (Some(deleted(1, 1)), deleted(2, 1), false, Verdict::Ask),
            // One expired and another was deleted, perhaps.
            (Some(deleted(1, 1)), deleted(1, 2), false, Verdict::Ask),
            (None, deleted(many, 1), false, Verdict::Missing(many)),
            (None, deleted(many, 1), true, Verdict::Nothing),
            (Some(deleted(5, 1)), deleted(many, 1), false, Verdict::Missing(many - 5)),
            (Some(deleted(many + 1, 1)), deleted(many, 2), false, Verdict::Nothing),
        ];
        for (known, now, had_holes, expected) in cases {
            assert_eq!(decide(known, now, had_holes), expected, "{known:?} {now:?} {had_holes}");
        }
    }
}
