//! The protocol as it is keeps its promises in every interleaving.

use std::time::Instant;

use stateright::{Checker, Model};

use crate::protocol::Protocol;
use crate::scenarios::{self, DEFAULT, DEFAULT_UPDATE, STRICT, STRICT_UPDATE};
use crate::system::{Scenario, System};

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
    check("strict + strict", Scenario { writers: &[STRICT, STRICT], ..scenarios::ALL });
}

#[test]
fn default_writers_beside_strict_ones_break_nothing() {
    check("strict + default", Scenario { writers: &[STRICT, DEFAULT], ..scenarios::ALL });
}

#[test]
fn default_writers_leave_nothing_stale_behind() {
    check("default + default", Scenario { writers: &[DEFAULT, DEFAULT], ..scenarios::ALL });
}

#[test]
fn updates_with_versions_never_go_back() {
    let writers = &[STRICT_UPDATE, DEFAULT_UPDATE];
    check("strict update + default update", Scenario { writers, versioned: true, ..scenarios::ALL });
}

#[test]
fn updates_and_deletes_of_one_row_mix() {
    let writers = &[STRICT, DEFAULT_UPDATE];
    check("strict delete + default update", Scenario { writers, versioned: true, ..scenarios::ALL });
}

#[test]
fn three_updates_converge_in_any_order() {
    let writers = &[DEFAULT_UPDATE, DEFAULT_UPDATE, DEFAULT_UPDATE];
    let scenario =
        Scenario { writers, versioned: true, reads_per_reader: 1, ..scenarios::ALL };
    check("three default updates, one read each", scenario);
}

#[test]
fn readers_of_one_process_may_share_loads() {
    let scenario =
        Scenario { writers: &[STRICT, STRICT], readers_share_loads: true, ..scenarios::ALL };
    check("strict + strict, shared loads", scenario);
}

#[test]
fn three_strict_writers_are_never_read_late() {
    let scenario = Scenario { writers: &[STRICT, STRICT, STRICT], reads_per_reader: 1, ..scenarios::ALL };
    check("three strict writers, one read each", scenario);
}

#[test]
fn removing_a_mark_needs_no_delete_as_long_as_redis_forgets_nothing() {
    let protocol = Protocol { unmark_deletes: false, ..Protocol::SOUND };
    let scenario = Scenario { writers: &[STRICT, STRICT], ..scenarios::ALL };
    check_protocol("strict + strict, unmark without delete", protocol, scenario);
}

#[test]
fn tmp_values_that_cannot_be_decoded_are_replaced() {
    let scenario = Scenario {
        writers: &[STRICT, DEFAULT_UPDATE],
        versioned: true,
        values_may_be_unusable: true,
        readers_share_loads: true,
        ..scenarios::ALL
    };
    check("strict delete + default update, shared loads, unusable values", scenario);
}
#[test]
fn tmp_big() {
    let scenario = Scenario { writers: &[STRICT, STRICT, DEFAULT], reads_per_reader: 1, ..scenarios::ALL };
    check("2 strict + default, one read each", scenario);
}
#[test]
fn tmp_3reads() {
    let scenario = Scenario { writers: &[STRICT, STRICT], reads_per_reader: 3, ..scenarios::ALL };
    check("2 strict, 3 reads each", scenario);
}
