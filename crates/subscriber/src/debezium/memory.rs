use std::collections::HashSet;

use service::printable;

use super::decoder::Remark;

/// Most subjects remembered. Beyond that nothing more is said; the metrics go on counting.
const MAX_SUBJECTS: usize = 2_000;

/// Logs each remark once for its subject.
#[derive(Debug, Default)]
pub(super) struct Memory {
    said: HashSet<String>,
}

impl Memory {
    /// Logs a remark unless one of the same subject was logged before.
    pub(super) fn say(&mut self, remark: Remark) {
        if self.said.len() < MAX_SUBJECTS && self.said.insert(remark.subject) {
            tracing::warn!("{}", printable(&remark.text));
        }
    }
}
