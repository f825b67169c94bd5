//! Slots of a cluster that are on their way to another node, one key at a time.
//!
//! A key that is no longer at the source has to be asked for at the target, with `ASKING` before each command; a command
//! or script on several keys is refused (`TRYAGAIN`) unless they are all at the same node. A resharding that was broken
//! off leaves a slot like this for as long as nobody mends it. What an invalidation needs is then done with commands on
//! one key each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use deadpool_redis::redis::{Arg, Cmd, Pipeline, Value};

use super::Redis;
use super::marks::NAMES_PER_KEY;
use crate::RedisError;
use crate::names::Shard;
use crate::script::{APPLY, MARK, REGISTER, Script};

/// For so long after a refusal requests on several keys of a slot are not tried again: each would cost a round trip only to
/// be refused once more.
const MOVES_FOR: Duration = Duration::from_secs(1);

/// How often to say that a slot is still moving.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// The slots that are known to be moving.
#[derive(Default)]
pub(super) struct Moving {
    /// When each was last seen moving, and last spoken of.
    seen: Mutex<HashMap<u16, Seen>>,
    /// Their number, so that a cluster without any costs no lock.
    count: AtomicUsize,
}

struct Seen {
    at: Instant,
    said: Instant,
}

/// A request that was not sent because its slot is moving.
#[derive(Debug, thiserror::Error)]
#[error("the slot is moving to another node")]
pub(crate) struct SlotIsMoving;

impl Moving {
    pub(super) fn contains(&self, shard: Shard) -> bool {
        let Shard::Slot(slot) = shard else { return false };
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(&slot).is_some_and(|seen| seen.at.elapsed() < MOVES_FOR)
    }

    pub(super) fn notice(&self, shard: Shard) {
        let Shard::Slot(slot) = shard else { return };
        let now = Instant::now();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let said = seen.get(&slot).map(|seen| seen.said).filter(|said| said.elapsed() < SAY_AGAIN);
        if said.is_none() {
            tracing::warn!(
                slot,
                "a slot of the redis cluster is moving; its keys are invalidated one by one and not cached"
            );
        }
        seen.insert(slot, Seen { at: now, said: said.unwrap_or(now) });
        seen.retain(|_, seen| seen.said.elapsed() < SAY_AGAIN || seen.at.elapsed() < MOVES_FOR);
        self.count.store(seen.len(), Ordering::Relaxed);
    }
}

impl Redis {
    /// Carries out a pipeline by commands on one key each, in the same order. Answers as the pipeline would.
    ///
    /// Where a command deletes several keys it does not do so at once any more. It names every guard before its value,
    /// and in this order no fill can put a value back: the lease goes first.
    pub(super) async fn run_singly(&self, pipeline: &Pipeline) -> Result<Vec<Value>, RedisError> {
        let mut answers = Vec::with_capacity(pipeline.len());
        for command in pipeline.cmd_iter() {
            answers.push(self.query_in_parts(command).await?);
        }
        Ok(answers)
    }

    async fn query_in_parts(&self, command: &Cmd) -> Result<Value, RedisError> {
        match Parts::of(command)? {
            Parts::Whole(command) => self.query(&command).await,
            Parts::Several { commands, answer } => {
                let mut sum = 0;
                for command in &commands {
                    sum += self.query::<i64>(command).await?;
                }
                Ok(Value::Int(answer.unwrap_or(sum)))
            }
        }
    }
}

/// A command in commands on one key.
enum Parts {
    /// It has only one.
    Whole(Cmd),
    /// It has several. Their answers are added up unless another is given.
    Several { commands: Vec<Cmd>, answer: Option<i64> },
}

impl Parts {
    fn of(command: &Cmd) -> Result<Self, RedisError> {
        let arguments: Vec<&[u8]> = command.args_iter().map(simple).collect();
        let delete = |name: &[u8]| {
            let mut delete = Cmd::new();
            delete.arg("UNLINK").arg(name);
            delete
        };
        match arguments.as_slice() {
            [b"UNLINK", names @ ..] => {
                Ok(Self::Several { commands: names.iter().map(|name| delete(name)).collect(), answer: None })
            }
            [b"EVAL" | b"EVALSHA", script, b"1", arguments @ ..] => {
                let script = Script::named(script)
                    .ok_or_else(|| RedisError::unexpected("a script that is none of the cache's"))?;
                // With the text: the target may not have seen it.
                let mut whole = script.call_with_text();
                whole.arg(1).arg(arguments);
                Ok(Self::Whole(whole))
            }
            // As if the version were not known, which is always safe.
            [b"EVAL" | b"EVALSHA", script, b"3", value, guard, ..] if APPLY.is_named(script) => {
                Ok(Self::Several { commands: vec![delete(guard), delete(value)], answer: Some(-1) })
            }
            [b"EVAL" | b"EVALSHA", script, count, registry, rest @ ..] if MARK.is_named(script) => {
                let names = count.utf8_chunks().next().and_then(|text| text.valid().parse::<usize>().ok());
                let (names, arguments) = names
                    .and_then(|names| rest.split_at_checked(names.saturating_sub(1)))
                    .ok_or_else(|| RedisError::unexpected("a mark without its names"))?;
                Ok(Self::Several { commands: marks_in_order(registry, names, arguments), answer: Some(1) })
            }
            [b"EVAL" | b"EVALSHA", ..] => Err(RedisError::Unavailable(SlotIsMoving.into())),
            _ => Ok(Self::Whole(command.clone())),
        }
    }
}

/// Registry, then marks, then deletes: a mark is never without its entry in the registry, and a key is deleted when nothing
/// can fill it any more. Its stale copy goes too.
fn marks_in_order(registry: &[u8], names: &[&[u8]], arguments: &[&[u8]]) -> Vec<Cmd> {
    let [mark, _, members @ ..] = arguments else { return Vec::new() };
    let mut register = REGISTER.call_with_text();
    register.arg(1).arg(registry).arg(members);
    let mut commands = vec![register];
    let of_keys = || names.chunks_exact(NAMES_PER_KEY);
    commands.extend(of_keys().map(|names| {
        let mut add = Cmd::new();
        add.arg("SADD").arg(names[0]).arg(*mark);
        add
    }));
    commands.extend(of_keys().flat_map(|names| &names[1..]).map(|name| {
        let mut delete = Cmd::new();
        delete.arg("UNLINK").arg(*name);
        delete
    }));
    commands
}

fn simple(argument: Arg<&[u8]>) -> &[u8] {
    match argument {
        Arg::Simple(bytes) => bytes,
        _ => b"0",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{guard, marks, stale};

    fn words(command: &Cmd) -> Vec<String> {
        command.args_iter().map(|word| String::from_utf8_lossy(simple(word)).into_owned()).collect()
    }

    /// A value that appears between the deletes and the mark would stay: nobody who finds it looks for marks.
    #[test]
    fn a_mark_in_a_moving_slot_is_registered_then_set_and_then_the_keys_are_deleted() {
        let mut call = MARK.call();
        call.arg(2 * NAMES_PER_KEY + 1).arg(Shard::Slot(7).registry());
        for key in ["{t}a", "{t}b"] {
            call.arg(marks(key)).arg(guard(key)).arg(key).arg(stale(key));
        }
        call.arg("mark").arg(60_000).arg("mark:{t}a").arg("mark:{t}b");
        let Ok(Parts::Several { commands, answer }) = Parts::of(&call) else {
            panic!("MARK is on several keys")
        };
        assert_eq!(answer, Some(1));
        let all: Vec<Vec<String>> = commands.iter().map(words).collect();
        assert_eq!(all[0][0], "EVAL");
        assert!(all[0].ends_with(&[Shard::Slot(7).registry(), "mark:{t}a".into(), "mark:{t}b".into()]));
        let rest: Vec<String> = all[1..].iter().map(|words| words.join(" ")).collect();
        let us = '\u{1f}';
        let marked = ["a", "b"].map(|key| format!("SADD {us}m:{{t}}{key} mark"));
        let deleted = ["a", "b"].map(|key| {
            [
                format!("UNLINK {us}g:{{t}}{key}"),
                format!("UNLINK {{t}}{key}"),
                format!("UNLINK {us}s:{{t}}{key}"),
            ]
        });
        assert_eq!(rest, [marked.as_slice(), deleted.concat().as_slice()].concat());
    }
}
