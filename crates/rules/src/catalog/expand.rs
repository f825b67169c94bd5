use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::facts::{Column, Facts};
use crate::triggers::{dollar_quoted, identifier};

/// Creates a function of the SQL, as the triggers do, in a transaction that is rolled back: Postgres then checks names,
/// the type of the parameter and that the result is one column of text. Returns what is wrong with it.
pub(super) async fn try_out(
    connection: &mut PgConnection,
    facts: &Facts,
    key: &Column,
    sql: &str,
) -> Result<Result<(), String>, sqlx::Error> {
    let first_word = sql.split_whitespace().next().unwrap_or_default().to_lowercase();
    if !["select", "with", "values"].contains(&first_word.as_str()) {
        return Ok(Err("expand is not a query".to_owned()));
    }
    let function = format!(
        "set local search_path = {}, pg_temp; \
         create function pg_temp.outbox_try_expand({}[]) returns setof text language sql stable as {}",
        identifier(&facts.schema),
        key.type_name,
        dollar_quoted(sql)
    );
    let mut tx = connection.begin().await?;
    let created = sqlx::raw_sql(AssertSqlSafe(function)).execute(&mut *tx).await;
    tx.rollback().await?;
    match created {
        Ok(_) => Ok(Ok(())),
        Err(sqlx::Error::Database(error)) => Ok(Err(format!(
            "expand must be a query of one column of text, with $1 an array of {}: {}",
            key.type_name,
            error.message()
        ))),
        Err(error) => Err(error),
    }
}
