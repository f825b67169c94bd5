//! Without any one of its rules the protocol breaks: for each there is a counter-example, and these tests expect it.
//!
//! The examples are shortest ones; `-- --nocapture` prints them.

use std::collections::BTreeSet;

use stateright::{Checker, HasDiscoveries, Model};

use crate::protocol::{Deletes, Protocol};
use crate::scenario::{ANY, DEFAULT, DEFAULT_UPDATE, STRICT, STRICT_UPDATE, Scenario};
use crate::system::{Action, System};

const SOUND: Protocol = Protocol::SOUND;
const ONE_STRICT: Scenario = Scenario { writers: &[STRICT], ..ANY };
const ONE_DEFAULT: Scenario = Scenario { writers: &[DEFAULT], ..ANY };
const ONE_DEFAULT_THAT_LIVES: Scenario = Scenario { writers_die: false, ..ONE_DEFAULT };
const TWO_UPDATES: Scenario = Scenario { writers: &[DEFAULT_UPDATE, DEFAULT_UPDATE], versioned: true, ..ANY };

/// Expects that `protocol` breaks `promise` where the sound one keeps it.
#[track_caller]
fn breaks(promise: &'static str, protocol: Protocol, scenario: Scenario) {
    let sound = System { protocol: SOUND, scenario, merge_symmetric_states: true };
    assert!(
        sound.checker().spawn_dfs().join().discovery(promise).is_none(),
        "it is not the variant that breaks"
    );

    let system = System { protocol, scenario, merge_symmetric_states: false };
    let mut shortest = counter_example(promise, system, usize::MAX).expect("the variant keeps the promise");
    while let Some(shorter) = counter_example(promise, system, shortest.len()) {
        shortest = shorter;
    }
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    println!("{test}: not {promise} after {} steps", shortest.len());
    for action in shortest {
        println!("    {action:?}");
    }
}

/// A way to break `promise` in fewer than `steps` steps. The checker looks at many states at once, so the first it
/// returns is not always a shortest.
fn counter_example(promise: &'static str, system: System, steps: usize) -> Option<Vec<Action>> {
    let stop = HasDiscoveries::AnyOf(BTreeSet::from([promise]));
    // The checker counts states, of which there is one more than steps, and stops before the last.
    let depth = steps.saturating_add(1);
    let checker = system.checker().finish_when(stop).target_max_depth(depth).spawn_bfs().join();
    Some(checker.discovery(promise)?.into_actions())
}

#[test]
fn marks_that_expire_are_not_enough() {
    breaks("strict", Protocol { marks_last: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn marks_of_two_transactions_must_be_told_apart() {
    let scenario = Scenario { writers: &[STRICT, STRICT], ..ANY };
    breaks("strict", Protocol { marks_are_told_apart: false, ..SOUND }, scenario);
}

#[test]
fn marks_without_leases_are_not_enough() {
    breaks("strict", Protocol { fill_checks_lease: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn deletes_without_leases_leave_old_values_behind() {
    breaks("converges", Protocol { fill_checks_lease: false, ..SOUND }, ONE_DEFAULT_THAT_LIVES);
}

#[test]
fn acting_when_the_commit_is_in_the_log_is_too_early_for_the_delete() {
    breaks("converges", Protocol { events_wait_for_visibility: false, ..SOUND }, ONE_DEFAULT);
}

#[test]
fn acting_when_the_commit_is_in_the_log_is_too_early_for_the_mark() {
    breaks("strict", Protocol { events_wait_for_visibility: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn a_late_joiner_of_a_refused_load_reads_an_old_value() {
    let scenario = Scenario { readers_share_loads: true, ..ONE_STRICT };
    breaks("strict", Protocol { late_joiner_needs_fill: false, ..SOUND }, scenario);
}

#[test]
fn fills_from_a_lagging_replica_stay() {
    breaks("converges", Protocol { loads_read_primary: false, ..SOUND }, ONE_DEFAULT);
}

#[test]
fn fills_from_a_snapshot_older_than_the_lease_stay() {
    breaks("converges", Protocol { snapshot_follows_grant: false, ..SOUND }, ONE_DEFAULT);
}

#[test]
fn unmarking_before_the_outcome_is_known_is_too_early() {
    breaks("strict", Protocol { unmark_waits_for_outcome: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn resolving_a_mark_when_the_commit_is_in_the_log_is_too_early() {
    breaks("strict", Protocol { resolver_waits_for_visibility: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn strict_writers_must_mark() {
    breaks("strict", Protocol { strict_writers_mark: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn a_mark_must_not_leave_the_lease() {
    breaks("strict", Protocol { mark_voids_lease: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn a_mark_must_come_before_its_delete() {
    breaks("strict", Protocol { mark_is_added_before_delete: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn a_delete_must_not_leave_the_lease() {
    breaks("converges", Protocol { delete_voids_lease: false, ..SOUND }, ONE_DEFAULT);
}

#[test]
fn a_delete_in_two_steps_must_not_begin_with_the_value() {
    breaks("converges", Protocol { deletes: Deletes::ValueFirst, ..SOUND }, ONE_DEFAULT);
}

#[test]
fn a_mark_in_a_moving_slot_must_not_begin_with_the_value() {
    breaks("strict", Protocol { deletes: Deletes::ValueFirst, ..SOUND }, ONE_STRICT);
}

#[test]
fn acquire_must_respect_marks() {
    breaks("strict", Protocol { acquire_respects_marks: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn a_delete_must_not_remove_the_marks_of_others() {
    let scenario = Scenario { writers: &[STRICT, DEFAULT], ..ANY };
    breaks("strict", Protocol { delete_spares_marks: false, ..SOUND }, scenario);
}

#[test]
fn an_update_over_an_unknown_version_goes_back_for_good() {
    breaks("converges", Protocol { update_needs_known_version: false, ..SOUND }, TWO_UPDATES);
}

#[test]
fn an_update_over_an_unknown_version_goes_back_behind_a_strict_commit() {
    let scenario = Scenario { writers: &[STRICT_UPDATE, DEFAULT_UPDATE], ..TWO_UPDATES };
    breaks("strict", Protocol { update_needs_known_version: false, ..SOUND }, scenario);
}

#[test]
fn a_version_taken_without_the_lock_of_the_row_goes_back() {
    breaks("converges", Protocol { version_is_taken_under_lock: false, ..SOUND }, TWO_UPDATES);
}

#[test]
fn a_lease_named_by_the_client_is_revived_by_a_request_that_arrives_twice() {
    breaks("converges", Protocol { server_names_leases: false, ..SOUND }, ONE_DEFAULT);
}

#[test]
fn a_lease_named_by_the_client_outlives_mark_and_unmark() {
    breaks("strict", Protocol { server_names_leases: false, ..SOUND }, ONE_STRICT);
}

#[test]
fn plain_cache_aside_leaves_old_values_behind() {
    breaks("converges", Protocol::CACHE_ASIDE, ONE_DEFAULT_THAT_LIVES);
}

#[test]
fn deleting_before_and_after_the_commit_leaves_old_values_behind() {
    let double_delete = Protocol { writer_deletes_before_commit: true, ..Protocol::CACHE_ASIDE };
    breaks("converges", double_delete, ONE_DEFAULT_THAT_LIVES);
}
