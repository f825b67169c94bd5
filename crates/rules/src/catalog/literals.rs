use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::facts::{Column, Facts};
use super::{Judge, PINNED_SETTINGS};
use crate::table::At;
use crate::triggers::literal;

impl Judge<'_> {
    /// Refuses what a condition compares with and no value of the column is written as: it would hold on no row, or on
    /// every one, and nobody would notice.
    pub(super) async fn literals(
        &mut self,
        connection: &mut PgConnection,
        facts: &Facts,
    ) -> Result<(), sqlx::Error> {
        let Some(At { value: condition, line }) = &self.table.when else { return Ok(()) };
        let column = facts.column(condition.column()).filter(|column| column.can_be_in_a_key());
        // What is wrong with the column itself has been said.
        let Some(column) = column else { return Ok(()) };
        for text in condition.values() {
            let written = written(connection, column, text).await?;
            let problem = match written {
                Ok(written) if written == *text => continue,
                Ok(written) => format!(
                    "the condition compares with '{text}', which never matches: as {} it is written '{written}'",
                    column.full_type
                ),
                Err(reason) => format!(
                    "the condition compares with '{text}', which never matches: it is no value of {}: {reason}",
                    column.full_type
                ),
            };
            self.refuse(*line, Some(&column.name), problem);
        }
        Ok(())
    }
}

/// A text read as a value of the column and written again, as the triggers and the write-ahead log write it; or why it is
/// no such value.
async fn written(
    connection: &mut PgConnection,
    column: &Column,
    text: &str,
) -> Result<Result<String, String>, sqlx::Error> {
    let mut tx = connection.begin().await?;
    for (setting, value) in PINNED_SETTINGS {
        let set = format!("set local {setting} to {value}");
        sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut *tx).await?;
    }
    // Not a cast to text, which writes some types in another way.
    let query = format!("select pg_catalog.concat(cast({} as {}))", literal(text), column.full_type);
    let written = sqlx::query_scalar(AssertSqlSafe(query)).persistent(false).fetch_one(&mut *tx).await;
    tx.rollback().await?;
    match written {
        Ok(written) => Ok(Ok(written)),
        Err(sqlx::Error::Database(error)) if !is_passing(error.code().as_deref()) => {
            Ok(Err(error.message().to_owned()))
        }
        Err(error) => Err(error),
    }
}

/// Whether an error is none of the value: what is canceled, out of resources, or shut down.
fn is_passing(code: Option<&str>) -> bool {
    let class = code.and_then(|code| code.get(..2)).unwrap_or_default();
    ["08", "40", "53", "55", "57", "58", "XX"].contains(&class)
}
