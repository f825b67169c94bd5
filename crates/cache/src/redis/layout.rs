//! Where the slots of a cluster are, and which are on their way: what a search of all nodes must know.
//!
//! A search looks at one node after the other. A key that moves to a node already searched before its own is would be
//! missed. It moves once, so a second search finds it.

use std::collections::BTreeSet;

use deadpool_redis::redis::Cmd;
use futures::future::join_all;

use super::Redis;
use super::batch::read;
use super::masters::Master;
use super::nodes::Address;
use crate::RedisError;

/// Fields of a node's line before its slots.
const FIELDS_BEFORE_SLOTS: usize = 8;

/// The nodes to search, and what they said about their slots.
pub(super) struct Layout {
    pub(super) nodes: Vec<Master>,
    slots: Vec<String>,
    may_move: bool,
}

impl Layout {
    /// Whether no key can have changed its node from then till now.
    pub(super) fn has_lasted(&self, now: &Self) -> bool {
        !self.may_move && !now.may_move && self.slots == now.slots
    }
}

impl Redis {
    /// The masters, and nodes that have no slot yet but are receiving their first.
    pub(super) async fn layout(&self) -> Result<Layout, RedisError> {
        let mut layout = Layout { nodes: self.masters().await?, slots: Vec::new(), may_move: false };
        if !self.is_cluster() {
            return Ok(layout);
        }
        let mut ask = Cmd::new();
        ask.arg("CLUSTER").arg("NODES");
        let mut targets = BTreeSet::new();
        // Only a node itself tells which of its slots are on their way.
        let asked: Vec<_> = layout.nodes.iter().map(|master| Box::pin(self.query_to(master, &ask))).collect();
        for table in join_all(asked).await {
            // A node that does not answer may be moving slots; the search finds out why it does not.
            let Ok(table) = table else {
                layout.may_move = true;
                continue;
            };
            let table: String = read(table)?;
            let own = table.lines().find(|line| line.contains("myself")).unwrap_or_default();
            let slots: Vec<&str> = own.split_whitespace().skip(FIELDS_BEFORE_SLOTS).collect();
            layout.may_move |= slots.iter().any(|slot| slot.starts_with('['));
            layout.slots.push(slots.join(" "));
            for id in slots.iter().filter_map(|slot| moving_to(slot)) {
                targets.extend(table.lines().filter(|line| line.starts_with(id)).find_map(address));
            }
        }
        for address in targets {
            if !layout.nodes.iter().any(|master| master.is_at(&address)) {
                layout.nodes.push(Master::without_slots(address));
            }
        }
        Ok(layout)
    }
}

/// The node to which a slot is moving: `[93->-<id>]`.
fn moving_to(slot: &str) -> Option<&str> {
    slot.strip_prefix('[')?.split_once("->-")?.1.strip_suffix(']')
}

/// Of a node: `<id> <host>:<port>@<bus port>[,<name>] …`.
fn address(line: &str) -> Option<Address> {
    let (host, port) = line.split_whitespace().nth(1)?.split(['@', ',']).next()?.rsplit_once(':')?;
    Some((host.to_owned(), port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_leaves_names_its_target_and_one_that_comes_does_not() {
        assert_eq!(moving_to("[93->-292f8b365bb7]"), Some("292f8b365bb7"));
        assert_eq!(moving_to("[77-<-e7d1eecce10f]"), None);
        assert_eq!(moving_to("0-5460"), None);
    }

    #[test]
    fn addresses_of_all_versions_are_read() {
        let read = |address_field: &str| address(&format!("07c37d {address_field} master - 0 0 1 connected"));
        assert_eq!(read("127.0.0.1:30004@31004"), Some(("127.0.0.1".to_owned(), 30_004)));
        assert_eq!(read("10.0.0.1:1@2,host.name"), Some(("10.0.0.1".to_owned(), 1)));
        assert_eq!(read("fd00::1:7000@17000"), Some(("fd00::1".to_owned(), 7_000)));
    }
}
