//! The rules against a database: do the tables and columns exist, and can their values be parts of keys?

pub(crate) mod expand;
mod facts;
mod identity;
mod literals;
mod load;
mod risks;

use sqlx::PgConnection;

pub use expand::{ExpandError, Expander, Found, expanders};
pub use facts::{Column, Facts, Generated, Relation};
pub use identity::check_identity;
pub use risks::risks;

use crate::problem::{Problem, RulesError};
use crate::table::{At, Expand, TableRules};
use crate::{PINNED_SETTINGS, Rules};

/// The rules do not fit the database, or it cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The rules do not fit; all problems at once.
    #[error(transparent)]
    Rules(RulesError),
    /// The database failed.
    #[error("cannot compare the rules with the database")]
    Database(#[from] sqlx::Error),
}

/// Compares every rule with the database: tables and columns exist, their types can be parts of keys, what a
/// condition compares with is written as values of its column are, `expand` prepares. Returns what is known of each table, in the order of the rules.
///
/// # Errors
/// [`CatalogError::Rules`] with everything that does not fit.
pub async fn check(connection: &mut PgConnection, rules: &Rules) -> Result<Vec<Facts>, CatalogError> {
    let mut problems = Vec::new();
    let mut all = Vec::new();
    let found = load::load(connection, rules).await?;
    for (table, facts) in rules.tables().iter().zip(found) {
        let mut judge = Judge { rules, table, problems: &mut problems };
        match facts {
            None => {
                let elsewhere = load::schemas_with(connection, &table.name).await?;
                judge.refuse(table.line, None, missing(&elsewhere));
            }
            Some(facts) => {
                judge.table(&facts);
                judge.literals(connection, &facts).await?;
                judge.expand(connection, &facts).await?;
                all.push(facts);
            }
        }
    }
    if problems.is_empty() { Ok(all) } else { Err(invalid(problems)) }
}

fn invalid(problems: Vec<Problem>) -> CatalogError {
    CatalogError::Rules(RulesError::Invalid(problems))
}

fn missing(elsewhere: &[String]) -> String {
    match elsewhere {
        [] => "there is no such table in the database".to_owned(),
        schemas => format!("there is no such table, but one of this name in schema {}", schemas.join(", ")),
    }
}

/// Collects what does not fit about one table.
struct Judge<'a> {
    rules: &'a Rules,
    table: &'a TableRules,
    problems: &'a mut Vec<Problem>,
}

impl Judge<'_> {
    fn refuse(&mut self, line: usize, column: Option<&str>, message: impl Into<String>) {
        self.problems.push(Problem {
            file: self.rules.file().to_owned(),
            line,
            table: Some(self.table.qualified_name()),
            column: column.map(str::to_owned),
            message: message.into(),
        });
    }

    fn table(&mut self, facts: &Facts) {
        let table = self.table;
        if let Some(root) = &facts.partition_of {
            self.refuse(table.line, None, format!("is a partition of {root}; name that table instead"));
        } else if !facts.is_table {
            self.refuse(table.line, None, "is neither a table nor a partitioned table");
        }
        if !facts.kin.is_empty() {
            let message = format!(
                "is bound by table inheritance to {}: a statement that names one changes rows of another, past the \
                 triggers of that one and under its name in the write-ahead log; make them partitions, or end it with \
                 ALTER TABLE … NO INHERIT",
                facts.kin.join(", ")
            );
            self.refuse(table.line, None, message);
        }
        for At { value, line } in table.columns.iter().flatten() {
            let column = self.column(facts, value, *line);
            self.refuse_virtual(column, *line);
        }
        for At { value, line } in &table.keys {
            for column in value.columns() {
                self.part_of_a_key(facts, column, *line);
            }
        }
        if let Some(At { value, line }) = &table.when {
            self.part_of_a_key(facts, value.column(), *line);
        }
        let wanted = facts.primary_key.len() == 1;
        if let (Some(expand), false) = (table.expand.first(), wanted) {
            let message = match facts.primary_key.as_slice() {
                [] => "expand needs a primary key, which the table does not have".to_owned(),
                columns => format!("expand needs a primary key of one column, not ({})", columns.join(", ")),
            };
            self.refuse(expand.sql.line, None, message);
        }
    }

    fn column<'f>(&mut self, facts: &'f Facts, name: &str, line: usize) -> Option<&'f Column> {
        let column = facts.column(name);
        if column.is_none() {
            let names: Vec<&str> = facts.columns.iter().map(|column| column.name.as_str()).collect();
            self.refuse(line, Some(name), format!("there is no such column; there are {}", names.join(", ")));
        }
        column
    }

    fn part_of_a_key(&mut self, facts: &Facts, name: &str, line: usize) {
        let Some(column) = self.column(facts, name, line) else { return };
        self.refuse_virtual(Some(column), line);
        if !column.can_be_in_a_key() {
            let message = format!(
                "values of type {} cannot be part of a key or a condition; use numbers, text, boolean, uuid, an enum, a \
                 date or a timestamp, or a generated column that is STORED",
                column.type_name
            );
            self.refuse(line, Some(name), message);
        }
    }

    /// A trigger finds NULL in a virtual column, or makes the writer fail that it compares it for.
    fn refuse_virtual(&mut self, column: Option<&Column>, line: usize) {
        let Some(column) = column.filter(|column| column.generated == Generated::Virtual) else { return };
        let message = "is a virtual generated column, which neither triggers nor the write-ahead log see; make it STORED, \
                       or name the columns it is computed from";
        self.refuse(line, Some(&column.name), message);
    }

    async fn expand(&mut self, connection: &mut PgConnection, facts: &Facts) -> Result<(), sqlx::Error> {
        let Some(key) = facts.single_key() else { return Ok(()) };
        for Expand { sql: At { value, line }, .. } in &self.table.expand {
            if let Err(message) = expand::try_out(connection, facts, key, value).await? {
                self.refuse(*line, Some(&key.name), message);
            }
        }
        Ok(())
    }
}
