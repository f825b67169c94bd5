//! Knowledge of replica identities, learned from the messages.

use std::collections::{BTreeSet, HashMap};

use super::column::is_placeholder;
use super::envelope::JsonRow;

/// Most tables remembered. The rules have no more.
const MAX_TABLES: usize = 1_000;

/// Knowledge of the replica identities of the tables.
///
/// With another identity than FULL the old row of a deleted row, or of one whose key changed, has only the columns of the
/// identity. Debezium fills in the others with NULL or, where that is not allowed, with zero and empty text. These would
/// make wrong keys, while the right ones stay.
#[derive(Debug, Default)]
pub(super) struct Identities {
    tables: HashMap<String, Identity>,
}

/// Knowledge of one replica identity.
#[derive(Debug, Default)]
struct Identity {
    /// Whether the last update came with its old row, which it does with the identity FULL only; `None` before the first.
    is_full: Option<bool>,
    /// Columns that had a value in an old row, so they belong to the identity.
    revealed: BTreeSet<String>,
}

impl Identities {
    /// Learns from the old row of an update, if it has one.
    pub(super) fn saw_update(&mut self, table: &str, before: Option<&JsonRow>) {
        self.identity(table).is_full = Some(before.is_some());
    }

    /// Learns from the old row of a delete.
    pub(super) fn saw_delete(&mut self, table: &str, before: &JsonRow) {
        let identity = self.identity(table);
        for (column, value) in before {
            if !is_placeholder(value) && !identity.revealed.contains(column) {
                identity.revealed.insert(column.clone());
            }
        }
    }

    /// Tells whether a value in the old row of a delete may be one that Debezium has filled in. A lock file vouches that the
    /// identity had all columns when it was written; it is believed until an update speaks against the identity FULL.
    pub(super) fn may_be_filled_in(
        &self,
        table: &str,
        column: &str,
        before: &JsonRow,
        is_vouched_for: bool,
    ) -> bool {
        let known = self.tables.get(table);
        let is_revealed = known.is_some_and(|known| known.revealed.contains(column));
        let is_full = known.and_then(|known| known.is_full).unwrap_or(is_vouched_for);
        !is_full && !is_revealed && before.get(column).is_some_and(is_placeholder)
    }

    fn identity(&mut self, table: &str) -> &mut Identity {
        if self.tables.len() >= MAX_TABLES && !self.tables.contains_key(table) {
            self.tables.clear();
        }
        self.tables.entry(table.to_owned()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_that_may_be_filled_in_is_believed_once_the_identity_is_known() {
        let row = |row: serde_json::Value| row.as_object().unwrap().clone();
        let only_key = row(json!({"id": 1, "mail": "", "tenant": 0, "nick": null, "active": false}));
        let mut identities = Identities::default();
        identities.saw_delete("t", &only_key);
        for column in ["mail", "tenant", "nick", "active"] {
            assert!(identities.may_be_filled_in("t", column, &only_key, false), "{column}");
            assert!(!identities.may_be_filled_in("t", column, &only_key, true), "{column}");
        }
        assert!(!identities.may_be_filled_in("t", "id", &only_key, false));
        let no_key = row(json!({"id": 0, "mail": "a@x"}));
        assert!(!identities.may_be_filled_in("t", "id", &no_key, false), "it had a value before");

        identities.saw_update("t", Some(&only_key));
        assert!(!identities.may_be_filled_in("t", "mail", &only_key, false), "FULL");
        identities.saw_update("t", None);
        assert!(identities.may_be_filled_in("t", "mail", &only_key, true), "no longer FULL");
    }
}
