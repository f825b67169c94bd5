use rules::{Cell, Image};

use crate::pgoutput::{Relation, Value};

/// A row of the log as the rules look at it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) relation: &'a Relation,
    pub(crate) values: &'a [Value<'a>],
    /// Only the columns of the replica identity have a meaning.
    pub(crate) key_only: bool,
}

impl Image for Row<'_> {
    fn cell(&self, column: &str) -> Cell<'_> {
        // Tables have a handful of columns: a search beats a map.
        let Some(index) = self.relation.columns.iter().position(|known| &*known.name == column) else {
            return Cell::Absent;
        };
        if self.key_only && !self.relation.columns[index].is_key {
            return Cell::Absent;
        }
        match self.values.get(index) {
            None => Cell::Absent,
            Some(Value::Null) => Cell::Null,
            Some(Value::Unchanged) => Cell::Unchanged,
            Some(Value::Text(text)) => Cell::Text(text),
        }
    }
}
