use std::collections::HashSet;

use event::{CacheKey, InvalidKey};

use crate::image::{Cell, Completed, Image};
use crate::table::TableRules;

/// What a changed row invalidates.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Expansion {
    /// Distinct keys, those of the old image first.
    pub keys: Vec<CacheKey>,
    /// Keys that no cache key can be, and so were skipped.
    pub refused: Vec<RefusedKey>,
}

/// A key that was skipped. The key itself is not repeated: it may be huge or unprintable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("table {table}: key '{template}' of a row was skipped: {reason}")]
pub struct RefusedKey {
    /// The table.
    pub table: String,
    /// The template it came from.
    pub template: String,
    /// What is wrong with it.
    pub reason: InvalidKey,
}

/// The row image lacks a value that a rule needs, so that it cannot be told which keys are stale.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "table {table}: the row image has no value of column {column}, which the rules need{because}; \
     run `ALTER TABLE {table} REPLICA IDENTITY FULL`"
)]
pub struct MissingValue {
    /// The table.
    pub table: String,
    /// The column.
    pub column: String,
    /// Why, as far as it is known.
    pub because: &'static str,
}

impl TableRules {
    /// The keys that a changed row invalidates. `old` is `None` for an INSERT, `new` for a DELETE; for an UPDATE whose old
    /// image the write-ahead log does not carry, `old` is `None` too: its identity, and with it every key, is that of the
    /// new image then.
    ///
    /// `expand` is not part of it: that needs the database, and [`values`](Self::values) of the primary key.
    ///
    /// # Errors
    /// [`MissingValue`] if an image lacks a column that a template or the condition needs.
    pub fn keys(&self, old: Option<&dyn Image>, new: Option<&dyn Image>) -> Result<Expansion, MissingValue> {
        let mut expansion = Expansion::default();
        let mut seen = HashSet::new();
        self.each_counting(old, new, |image| {
            for template in self.keys.iter().map(|template| &template.value) {
                let key = template.expand(image).map_err(|(column, cell)| self.missing(column, cell))?;
                let Some(key) = key else { continue };
                if !seen.insert(key.clone()) {
                    continue;
                }
                match CacheKey::new(key) {
                    Ok(key) => expansion.keys.push(key),
                    Err(reason) => expansion.refused.push(RefusedKey {
                        table: self.qualified_name(),
                        template: template.as_str().to_owned(),
                        reason,
                    }),
                }
            }
            Ok(())
        })?;
        Ok(expansion)
    }

    /// The distinct values of a column in the images that count, those that are NULL aside.
    ///
    /// # Errors
    /// [`MissingValue`] if an image lacks the column or that of the condition.
    pub fn values(
        &self,
        column: &str,
        old: Option<&dyn Image>,
        new: Option<&dyn Image>,
    ) -> Result<Vec<String>, MissingValue> {
        let mut values = Vec::new();
        self.each_counting(old, new, |image| {
            match image.cell(column) {
                Cell::Null => {}
                Cell::Text(value) if values.iter().any(|known| known == value) => {}
                Cell::Text(value) => values.push(value.to_owned()),
                cell => return Err(self.missing(column, cell)),
            }
            Ok(())
        })?;
        Ok(values)
    }

    fn each_counting(
        &self,
        old: Option<&dyn Image>,
        new: Option<&dyn Image>,
        mut visit: impl FnMut(&dyn Image) -> Result<(), MissingValue>,
    ) -> Result<(), MissingValue> {
        if !self.is_changed(old, new) {
            return Ok(());
        }
        let completed = new.map(|new| Completed { new, old });
        let images = [old, completed.as_ref().map(|image| image as &dyn Image)];
        for image in images.into_iter().flatten() {
            if self.counts(image)? {
                visit(image)?;
            }
        }
        Ok(())
    }

    /// Whether anything changed that the rules watch. In doubt it did.
    #[must_use]
    pub fn is_changed(&self, old: Option<&dyn Image>, new: Option<&dyn Image>) -> bool {
        let (Some(old), Some(new)) = (old, new) else { return true };
        if self.columns.is_none() {
            return true;
        }
        let same = |column: &str| match (old.cell(column), new.cell(column)) {
            (_, Cell::Unchanged) => true,
            (Cell::Null, Cell::Null) => true,
            (Cell::Text(old), Cell::Text(new)) => old == new,
            _ => false,
        };
        !self.compared_columns().into_iter().all(same)
    }

    /// Whether an image satisfies the condition.
    ///
    /// # Errors
    /// [`MissingValue`] if it lacks the column.
    pub fn counts(&self, image: &dyn Image) -> Result<bool, MissingValue> {
        let Some(condition) = &self.when else { return Ok(true) };
        condition.value.holds(image).map_err(|cell| self.missing(condition.value.column(), cell))
    }

    fn missing(&self, column: &str, cell: Cell<'_>) -> MissingValue {
        let because = match cell {
            Cell::Unchanged => " (a large value that did not change and was not sent)",
            _ => " (not part of the replica identity, or there is no such column any more)",
        };
        MissingValue { table: self.qualified_name(), column: column.to_owned(), because }
    }
}
