//! The protocol as it is keeps its promises in every interleaving.

use std::time::Instant;

use stateright::{Checker, Model};

use crate::protocol::{Deletes, Protocol};
use crate::scenario::{ANY, DEFAULT, DEFAULT_UPDATE, STRICT, STRICT_UPDATE, Scenario};
use crate::system::System;

fn check(name: &str, scenario: Scenario) {
    check_protocol(name, Protocol::SOUND, scenario);
}

fn check_protocol(name: &str, protocol: Protocol, scenario: Scenario) {
    let began = Instant::now();
    let system = System { protocol, scenario, merge_symmetric_states: true };
    let checker = system.checker().spawn_bfs().join();
    println!(
        "{name}: {} states, {} transitions, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        began.elapsed().as_secs_f64()
    );
    checker.assert_properties();
}

#[test]
fn strict_writers_are_never_read_late() {
    check("strict + strict", Scenario { writers: &[STRICT, STRICT], ..ANY });
}

#[test]
fn default_writers_beside_strict_ones_break_nothing() {
    check("strict + default", Scenario { writers: &[STRICT, DEFAULT], ..ANY });
}

#[test]
fn default_writers_leave_nothing_stale_behind() {
    check("default + default", Scenario { writers: &[DEFAULT, DEFAULT], ..ANY });
}

#[test]
fn three_strict_writers_are_never_read_late() {
    let scenario = Scenario { writers: &[STRICT, STRICT, STRICT], reads_per_reader: 1, ..ANY };
    check("strict + strict + strict, one read each", scenario);
}

#[test]
fn updates_with_versions_never_go_back() {
    let scenario = Scenario { writers: &[STRICT_UPDATE, DEFAULT_UPDATE], versioned: true, ..ANY };
    check("strict update + default update", scenario);
}

#[test]
fn three_updates_converge_in_any_order() {
    let writers = &[DEFAULT_UPDATE, DEFAULT_UPDATE, DEFAULT_UPDATE];
    check("three default updates", Scenario { writers, versioned: true, ..ANY });
}

#[test]
fn readers_of_one_process_may_share_loads() {
    let scenario = Scenario { writers: &[STRICT, STRICT], readers_share_loads: true, ..ANY };
    check("strict + strict, shared loads", scenario);
}

#[test]
fn values_that_cannot_be_decoded_may_be_replaced() {
    let scenario = Scenario {
        writers: &[STRICT, DEFAULT_UPDATE],
        versioned: true,
        readers_share_loads: true,
        values_may_be_unusable: true,
        ..ANY
    };
    check("strict delete + default update, shared loads, unusable values", scenario);
}

#[test]
fn deletes_in_two_steps_keep_both_promises_if_the_guard_goes_first() {
    let protocol = Protocol { deletes: Deletes::GuardFirst, ..Protocol::SOUND };
    let strict = Scenario { writers: &[STRICT, DEFAULT], ..ANY };
    check_protocol("strict + default, deletes in two steps", protocol, strict);
    let updates = Scenario { writers: &[STRICT_UPDATE, DEFAULT_UPDATE], versioned: true, ..ANY };
    check_protocol("strict update + default update, deletes in two steps", protocol, updates);
}

/// UNMARK deletes before it removes the mark, in case a value has come from elsewhere: a client that does not keep to
/// the protocol, a Redis that has come back with old data. The protocol itself lets none appear while there is a mark.
#[test]
fn a_mark_may_be_removed_without_a_delete() {
    let protocol = Protocol { unmark_deletes: false, ..Protocol::SOUND };
    let scenario = Scenario { writers: &[STRICT, STRICT], ..ANY };
    check_protocol("strict + strict, unmark without delete", protocol, scenario);
}
