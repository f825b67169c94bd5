//! Which masters of a Redis Cluster answer.

use std::collections::BTreeSet;

use cache::Masters;
use metrics::gauge;

use crate::metrics as names;

/// Masters that were seen. Nothing for a single server.
#[derive(Default)]
pub(super) struct Nodes(BTreeSet<String>);

impl Nodes {
    /// Shows in the metrics who answers. Returns who does not, with the causes.
    pub(super) fn note(&mut self, masters: &Masters) -> Option<String> {
        for gone in self.0.difference(&masters.nodes) {
            gauge!(names::REDIS_NODE_UP, "node" => gone.clone()).set(f64::NAN);
        }
        for node in &masters.nodes {
            let is_up = masters.unreachable.iter().all(|unreachable| unreachable.node != *node);
            gauge!(names::REDIS_NODE_UP, "node" => node.clone()).set(if is_up { 1.0 } else { 0.0 });
        }
        self.0.clone_from(&masters.nodes);
        let missing =
            masters.unreachable.iter().map(|missing| format!("{}: {}", missing.node, missing.cause));
        Some(missing.collect::<Vec<_>>().join("; ")).filter(|missing| !missing.is_empty())
    }
}
