//! Random states and steps.

use rand::Rng;
use rand::rngs::StdRng;

use super::Step;
use super::real::{LEASES_PER_TOKEN, TOKENS, TRANSACTIONS, VERSIONS, content};
use crate::key::{Guard, KeyState, Lease};
use crate::scenario::Change;
use crate::transactions::Transactions;

/// Any state, also one that no sequence of steps leads to.
pub fn state(random: &mut StdRng) -> KeyState {
    let guard = match random.random_range(0..3) {
        0 => Guard::Absent,
        1 => Guard::Lease(lease(random)),
        _ => Guard::Version(below(random, VERSIONS.len())),
    };
    // Marks stop most steps, so most states have none.
    let marks = if random.random_bool(0.3) { random.random_range(0..1 << TRANSACTIONS.len()) } else { 0 };
    KeyState {
        value: random.random_bool(0.5).then(|| content(random.random_range(0..8))),
        guard,
        marks: Transactions::from_bits(marks),
    }
}

pub fn step(random: &mut StdRng) -> Step {
    let lease = lease(random);
    let of = below(random, TRANSACTIONS.len());
    let version = below(random, VERSIONS.len());
    let value = random.random_range(0..8);
    match random.random_range(0..16) {
        0..3 => Step::Acquire { lease, unusable: random.random_bool(0.3) },
        3..6 => Step::Fill { lease, value, version: random.random_bool(0.5).then_some(version) },
        6 => Step::Release { token: lease.token },
        7 => Step::Invalidate,
        8 => Step::Deliver { change: Change::Delete, value, version, of },
        9..11 => Step::Deliver { change: Change::Update, value, version, of },
        11 => Step::Mark { of },
        12 => Step::Unmark { of },
        13 => {
            if random.random_bool(0.5) {
                Step::MarkAdd { of }
            } else {
                Step::MarkUnlink
            }
        }
        14 => {
            if random.random_bool(0.5) {
                Step::UnmarkUnlink
            } else {
                Step::UnmarkRemove { of }
            }
        }
        _ => {
            if random.random_bool(0.5) {
                Step::LoseValue
            } else {
                Step::LoseGuard
            }
        }
    }
}

fn lease(random: &mut StdRng) -> Lease {
    Lease { token: below(random, TOKENS), nth: below(random, LEASES_PER_TOKEN) }
}

fn below(random: &mut StdRng, limit: usize) -> u8 {
    let limit = u8::try_from(limit).expect("there are only a few of each");
    random.random_range(0..limit)
}
