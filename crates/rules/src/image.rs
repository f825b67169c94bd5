use std::collections::HashMap;

use serde_json::Value;

/// The value of one column in a row image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell<'a> {
    /// NULL.
    Null,
    /// The value as Postgres writes it.
    Text(&'a str),
    /// A large value that the UPDATE did not change and that was not sent (TOAST).
    Unchanged,
    /// Not part of the image, for example since it is not in the replica identity, or no such column.
    Absent,
}

/// A row as it was or is.
pub trait Image {
    /// The value of a column.
    fn cell(&self, column: &str) -> Cell<'_>;
}

/// A row image written as a JSON object: numbers, strings, booleans and null. What it does not name is absent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JsonImage {
    cells: HashMap<String, Option<String>>,
}

/// Why a JSON text is not a row image.
#[derive(Debug, thiserror::Error)]
pub enum InvalidImage {
    /// It is not a JSON object.
    #[error("a row image is a JSON object such as {{\"id\": 7}}")]
    NotAnObject(#[source] serde_json::Error),
    /// A value that no column of a template can have.
    #[error("column {column} is an array or an object, not a value")]
    NotAValue {
        /// The column.
        column: String,
    },
}

impl JsonImage {
    /// Reads a row image.
    ///
    /// # Errors
    /// [`InvalidImage`].
    pub fn parse(text: &str) -> Result<Self, InvalidImage> {
        let object: serde_json::Map<String, Value> =
            serde_json::from_str(text).map_err(InvalidImage::NotAnObject)?;
        let cells = object.into_iter().map(|(column, value)| match text_of(&value) {
            Some(cell) => Ok((column, cell)),
            None => Err(InvalidImage::NotAValue { column }),
        });
        Ok(Self { cells: cells.collect::<Result<_, _>>()? })
    }
}

/// The value as Postgres would write it; `None` for arrays and objects.
fn text_of(value: &Value) -> Option<Option<String>> {
    match value {
        Value::Null => Some(None),
        Value::Bool(value) => Some(Some(bool_text(*value).to_owned())),
        Value::Number(value) => Some(Some(value.to_string())),
        Value::String(value) => Some(Some(value.clone())),
        Value::Array(_) | Value::Object(_) => None,
    }
}

/// A boolean as Postgres writes it.
pub(crate) fn bool_text(value: bool) -> &'static str {
    if value { "t" } else { "f" }
}

impl Image for JsonImage {
    fn cell(&self, column: &str) -> Cell<'_> {
        match self.cells.get(column) {
            Some(Some(text)) => Cell::Text(text),
            Some(None) => Cell::Null,
            None => Cell::Absent,
        }
    }
}

/// The new image, with values that were not sent because they did not change taken from the old one.
pub(crate) struct Completed<'a> {
    pub(crate) new: &'a dyn Image,
    pub(crate) old: Option<&'a dyn Image>,
}

impl Image for Completed<'_> {
    fn cell(&self, column: &str) -> Cell<'_> {
        match (self.new.cell(column), self.old) {
            (Cell::Unchanged, Some(old)) => match old.cell(column) {
                Cell::Absent => Cell::Unchanged,
                cell => cell,
            },
            (cell, _) => cell,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_values_become_the_text_of_postgres() {
        let image =
            JsonImage::parse(r#"{"id": 12345678901234, "ok": true, "name": "Ä", "gone": null}"#).unwrap();
        assert_eq!(image.cell("id"), Cell::Text("12345678901234"));
        assert_eq!(image.cell("ok"), Cell::Text("t"));
        assert_eq!(image.cell("name"), Cell::Text("Ä"));
        assert_eq!(image.cell("gone"), Cell::Null);
        assert_eq!(image.cell("other"), Cell::Absent);
        assert!(JsonImage::parse("[1]").is_err());
        let error = JsonImage::parse(r#"{"tags": []}"#).unwrap_err();
        assert_eq!(error.to_string(), "column tags is an array or an object, not a value");
    }
}
