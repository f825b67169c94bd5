//! The functions of [`crate::key`] against the real scripts and commands, on random states of a real server.
//!
//! What the model proves holds for the product only if both do the same. So every step is taken on both, and after each
//! the answers and everything the key and its siblings hold are compared.

mod random;
mod real;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::key::{Acquired, KeyState, Lease, Updated};
use crate::protocol::Protocol;
use crate::scenario::Change;
use real::Real;

const STEPS: usize = 4_000;

/// Steps until the next state that no sequence of steps has led to.
const STEPS_PER_STATE: usize = 4;

/// One request, or two in one pipeline as the product sends them. Values, tokens, versions and transactions are small
/// numbers as in the model.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// If it is granted, the lease is this one from now on.
    Acquire {
        lease: Lease,
        unusable: bool,
    },
    Fill {
        lease: Lease,
        value: u8,
        version: Option<u8>,
    },
    Release {
        token: u8,
    },
    Invalidate,
    /// What the subscriber does with an event of transaction `of`. The version counts for an update only.
    Deliver {
        change: Change,
        value: u8,
        version: u8,
        of: u8,
    },
    Mark {
        of: u8,
    },
    MarkAdd {
        of: u8,
    },
    MarkUnlink,
    Unmark {
        of: u8,
    },
    UnmarkUnlink,
    UnmarkRemove {
        of: u8,
    },
    LoseValue,
    LoseGuard,
}

/// What the caller learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    None,
    Acquired(Acquired),
    Stored(bool),
    Updated(Updated),
}

/// Takes a step on the model.
fn take(key: &mut KeyState, rules: &Protocol, step: Step) -> Answer {
    match step {
        Step::Acquire { lease, unusable } => {
            return Answer::Acquired(key.acquire(rules, lease.token, lease.nth, unusable));
        }
        Step::Fill { lease, value, version } => {
            return Answer::Stored(key.fill(rules, lease, real::content(value), version));
        }
        Step::Release { token } => key.release(token),
        Step::Invalidate => key.invalidate(rules),
        Step::Deliver { change, value, version, of } => {
            return deliver(key, rules, change, value, version, of);
        }
        Step::Mark { of } => {
            key.mark_add(of);
            key.mark_unlink(rules);
        }
        Step::MarkAdd { of } => key.mark_add(of),
        Step::MarkUnlink => key.mark_unlink(rules),
        Step::Unmark { of } => unmark(key, rules, of),
        Step::UnmarkUnlink => key.unmark_unlink(rules),
        Step::UnmarkRemove { of } => key.unmark_remove(of),
        Step::LoseValue => key.lose_value(),
        Step::LoseGuard => key.lose_guard(),
    }
    Answer::None
}

fn deliver(key: &mut KeyState, rules: &Protocol, change: Change, value: u8, version: u8, of: u8) -> Answer {
    let updated = match change {
        Change::Update => key.apply_update(rules, real::content(value), version),
        Change::Delete => {
            key.invalidate(rules);
            Updated::Deleted
        }
    };
    if key.marks.contains(of) {
        unmark(key, rules, of);
    }
    Answer::Updated(updated)
}

fn unmark(key: &mut KeyState, rules: &Protocol, of: u8) {
    key.unmark_unlink(rules);
    key.unmark_remove(of);
}

/// Takes the same random steps on a model with these rules and on the server, and tells where they first differ.
async fn first_difference(real: &mut Real, rules: Protocol, seed: u64) -> Option<String> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut model = KeyState::default();
    for nth in 0..STEPS {
        if nth % STEPS_PER_STATE == 0 {
            model = random::state(&mut random);
            real.put(&model).await;
        }
        let (before, step) = (model, random::step(&mut random));
        let expected = take(&mut model, &rules, step);
        let answer = real.take(step).await;
        let after = real.read().await;
        if (answer, after) != (expected, model) {
            return Some(format!(
                "step {nth}, {step:?} on {before:?}: expected {expected:?} and {model:?}, got {answer:?} and {after:?}"
            ));
        }
    }
    None
}

#[tokio::test]
async fn model_and_redis_do_the_same_on_random_states() {
    let seed: u64 = rand::random();
    println!("seed {seed}, {STEPS} steps");
    let difference = first_difference(&mut Real::start().await, Protocol::SOUND, seed).await;
    assert_eq!(difference, None, "seed {seed}");
}

#[tokio::test]
async fn a_model_with_other_rules_is_told_from_redis() {
    let sound = Protocol::SOUND;
    let others = [
        Protocol { mark_voids_lease: false, ..sound },
        Protocol { unmark_deletes: false, ..sound },
        Protocol { delete_voids_lease: false, ..sound },
        Protocol { delete_spares_marks: false, ..sound },
        Protocol { update_needs_known_version: false, ..sound },
        Protocol { acquire_respects_marks: false, ..sound },
        Protocol { server_names_leases: false, ..sound },
        Protocol { fill_checks_lease: false, ..sound },
    ];
    let seed: u64 = rand::random();
    let mut real = Real::start().await;
    for rules in others {
        assert!(first_difference(&mut real, rules, seed).await.is_some(), "seed {seed}: {rules:?}");
    }
}
