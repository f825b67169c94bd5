//! Column types that the rules need, in a file: for a reader of changes that has no database to ask.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::Rules;
#[cfg(feature = "catalog")]
use crate::catalog::Facts;
use crate::table::TableRules;

/// Type name of every enum.
const ENUM: &str = "enum";

/// Types whose values Debezium sends as Postgres writes them, `numeric` with `decimal.handling.mode=string`.
const TYPES_SENT_AS_TEXT: [&str; 15] = [
    "int2", "int4", "int8", "oid", "numeric", "bool", "uuid", "text", "varchar", "bpchar", "citext", "inet",
    "cidr", "macaddr", ENUM,
];

/// Types of the columns that templates and conditions name, by schema, table and column. A domain has the type below it,
/// and every enum the type `enum`.
///
/// Written by `relay rules check --lock`, which also makes sure that every such column is in the replica identity.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lock {
    types: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>,
}

/// The lock file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// It cannot be read.
    #[error("cannot read the lock file {file}")]
    Unreadable {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not what `relay rules check --lock` writes.
    #[error("cannot use the lock file {file}; write it again with `relay rules check --lock {file}`")]
    Invalid {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: toml::de::Error,
    },
    /// The rules have changed since it was written.
    #[error(
        "cannot use the lock file {file}: it has no type of column {column} of table {table}, which the rules need; \
         write it again with `relay rules check --lock {file}`"
    )]
    Outdated {
        /// The file.
        file: String,
        /// The table.
        table: String,
        /// The column.
        column: String,
    },
}

impl Lock {
    /// Takes the types from what the database said of the tables, which are in the order of the rules.
    #[cfg(feature = "catalog")]
    #[must_use]
    pub fn of(rules: &Rules, facts: &[Facts]) -> Self {
        let mut lock = Self::default();
        for (table, facts) in rules.tables().iter().zip(facts) {
            let of_table = lock.types.entry(table.schema.clone()).or_default().entry(table.name.clone());
            let types = of_table.or_default();
            for column in table.needed_columns().into_iter().filter_map(|name| facts.column(name)) {
                let type_name = if column.is_enum { ENUM } else { &column.base_type };
                types.insert(column.name.clone(), type_name.to_owned());
            }
        }
        lock
    }

    /// Reads a lock file and makes sure that it has every column that the rules need.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn load(file: &Path, rules: &Rules) -> Result<Self, LockError> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file)
            .map_err(|source| LockError::Unreadable { file: name.clone(), source })?;
        Self::parse(&name, &text, rules)
    }

    /// Reads the text of a lock file, as [`Lock::load`] does.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn parse(file: &str, text: &str, rules: &Rules) -> Result<Self, LockError> {
        let types =
            toml::from_str(text).map_err(|source| LockError::Invalid { file: file.to_owned(), source })?;
        let lock = Self { types };
        for table in rules.tables() {
            for column in table.needed_columns() {
                if lock.column_type(table, column).is_none() {
                    let (table, column) = (table.qualified_name(), column.to_owned());
                    return Err(LockError::Outdated { file: file.to_owned(), table, column });
                }
            }
        }
        Ok(lock)
    }

    /// The type of a column.
    #[must_use]
    pub fn column_type(&self, table: &TableRules, column: &str) -> Option<&str> {
        self.types.get(&table.schema)?.get(&table.name)?.get(column).map(String::as_str)
    }

    /// Tells whether Debezium sends values of a type as Postgres writes them.
    #[must_use]
    pub fn is_sent_as_text(type_name: &str) -> bool {
        TYPES_SENT_AS_TEXT.contains(&type_name)
    }

    /// The columns whose values Debezium does not send as Postgres writes them: table, column and type.
    pub fn unreadable(&self) -> impl Iterator<Item = (String, &str, &str)> {
        let columns = self.types.iter().flat_map(|(schema, tables)| {
            tables.iter().flat_map(move |(table, columns)| {
                columns.iter().map(move |(column, kind)| (schema, table, column.as_str(), kind.as_str()))
            })
        });
        columns
            .filter(|(.., kind)| !Self::is_sent_as_text(kind))
            .map(|(schema, table, column, kind)| (format!("{schema}.{table}"), column, kind))
    }
}

/// The text of the file.
impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let types = toml::to_string(&self.types).map_err(|_| fmt::Error)?;
        write!(f, "# Column types that the rules need. Written by `relay rules check --lock`.\n\n{types}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = r#"
[[table]]
name = "users"
keys = ["user:{id}", "user:{Mail.1}"]
when = { column = "kind", equals = "a" }
on_truncate = ["user:"]
"#;

    #[test]
    fn a_file_that_was_written_is_read_again() {
        let rules = Rules::parse("rules.toml", RULES).unwrap();
        let text = "[public.users]\nid = \"int8\"\n\"Mail.1\" = \"date\"\nkind = \"enum\"\n";
        let lock = Lock::parse("rules.lock", text, &rules).unwrap();
        let users = rules.table("public", "users").unwrap();
        assert_eq!(lock.column_type(users, "Mail.1"), Some("date"));
        assert_eq!(lock.unreadable().collect::<Vec<_>>(), [("public.users".to_owned(), "Mail.1", "date")]);
        assert_eq!(Lock::parse("rules.lock", &lock.to_string(), &rules).unwrap(), lock);
    }

    #[test]
    fn a_file_that_does_not_fit_the_rules_is_refused_with_what_to_run() {
        let rules = Rules::parse("rules.toml", RULES).unwrap();
        for (text, word) in
            [("id", "rules.lock"), ("[public.users]\nid = \"int8\"\n", "column Mail.1 of table public.users")]
        {
            let error = Lock::parse("rules.lock", text, &rules).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("rules check --lock rules.lock"), "{error}");
        }
    }
}
