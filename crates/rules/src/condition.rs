use std::collections::BTreeSet;

use crate::image::{Cell, Image};

/// Which row images count: a test of one column. A NULL equals nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The value of the column is one of these, as text.
    OneOf {
        /// The column.
        column: String,
        /// The values.
        values: BTreeSet<String>,
    },
    /// The column is NULL.
    IsNull {
        /// The column.
        column: String,
    },
    /// The other condition does not hold.
    Not(Box<Condition>),
}

impl Condition {
    /// The column it tests.
    #[must_use]
    pub fn column(&self) -> &str {
        match self {
            Self::OneOf { column, .. } | Self::IsNull { column } => column,
            Self::Not(inner) => inner.column(),
        }
    }

    /// The texts that it compares the column with.
    pub fn values(&self) -> impl Iterator<Item = &String> {
        let mut condition = self;
        while let Self::Not(inner) = condition {
            condition = inner;
        }
        let values = if let Self::OneOf { values, .. } = condition { Some(values) } else { None };
        values.into_iter().flatten()
    }

    /// Whether an image satisfies it. The error is a cell whose value is not known.
    pub(crate) fn holds(&self, image: &dyn Image) -> Result<bool, Cell<'static>> {
        match (self, image.cell(self.column())) {
            (_, Cell::Unchanged) => Err(Cell::Unchanged),
            (_, Cell::Absent) => Err(Cell::Absent),
            (Self::Not(inner), _) => Ok(!inner.holds(image)?),
            (Self::IsNull { .. }, cell) => Ok(cell == Cell::Null),
            (Self::OneOf { values, .. }, Cell::Text(text)) => Ok(values.contains(text)),
            (Self::OneOf { .. }, Cell::Null) => Ok(false),
        }
    }
}
