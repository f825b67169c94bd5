//! `expand`: queries of the user that map changed primary keys to further keys.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, Row};

use super::facts::{Column, Facts};
use super::{CatalogError, Judge, invalid};
use crate::Rules;
use crate::table::{At, Expand, TableRules};
use crate::triggers::{identifier, literal};

/// Most primary keys in one run of a query.
const RUN_KEYS: usize = 10_000;

/// How long a run for no key may take.
const TRY_PATIENCE: Duration = Duration::from_secs(10);

/// Each run has a name of its own, so that one that failed cannot be in the way of the next.
static RUNS: AtomicU64 = AtomicU64::new(0);

/// Where names without a schema are looked for, the same wherever the query runs.
pub(crate) fn search_path(schema: &str) -> String {
    format!("pg_catalog, {}, pg_temp", identifier(schema))
}

/// Must hold when a [`definition`] is parsed, which is before the statements in front of it in the same text are run.
pub(crate) const BOUND_AS_WRITTEN: &str = "set local standard_conforming_strings = on";

/// What must be run before a [`definition`], so that its names are looked for where they should be.
pub(crate) fn binding(schema: &str) -> String {
    format!("set local search_path = {}", search_path(schema))
}

/// A function of the SQL from its result on. Its names are bound when it is created: what somebody puts into the schema
/// later, such as an operator that fits better, is not run with the rights of who applied the rules. What row-level
/// security would hide is an error instead of nothing.
pub(crate) fn definition(schema: &str, sql: &str) -> String {
    format!(
        "returns setof text language sql stable set search_path = {} set standard_conforming_strings = on \
         set row_security = off\nbegin atomic\n{sql}\n;\nend",
        search_path(schema)
    )
}

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
        "create function pg_temp.outbox_try_expand({}) {}",
        key.array_type,
        definition(&facts.schema, sql)
    );
    let mut tx = connection.begin().await?;
    sqlx::raw_sql(AssertSqlSafe(format!("{BOUND_AS_WRITTEN}; {}", binding(&facts.schema))))
        .execute(&mut *tx)
        .await?;
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

/// Runs the queries of one table where no trigger does.
#[derive(Debug, Clone)]
pub struct Expander {
    /// File and table, for errors.
    file: String,
    table: String,
    column: String,
    array_type: String,
    search_path: String,
    queries: Vec<Expand>,
}

/// What runs the queries of every table of the rules, in their order; `None` for a table without `expand`.
///
/// # Errors
/// [`CatalogError::Rules`] with every table that has no primary key of one column.
pub async fn expanders(pool: &PgPool, rules: &Rules) -> Result<Vec<Option<Expander>>, CatalogError> {
    let mut problems = Vec::new();
    let mut all = Vec::new();
    for table in rules.tables() {
        let Some(Expand { sql, .. }) = table.expand.first() else {
            all.push(None);
            continue;
        };
        let expander = Expander::load(pool, rules.file(), table).await?;
        if expander.is_none() {
            let mut judge = Judge { rules, table, problems: &mut problems };
            judge.refuse(sql.line, None, "expand needs a table with a primary key of one column");
        }
        all.push(expander);
    }
    if problems.is_empty() { Ok(all) } else { Err(invalid(problems)) }
}

/// A query of `expand` failed.
#[derive(Debug, thiserror::Error)]
#[error("{place}: expand cannot be run")]
pub struct ExpandError {
    /// File, line and table of the query.
    pub place: String,
    /// Why.
    pub source: sqlx::Error,
}

impl ExpandError {
    /// Whether the query itself is wrong, slow or not allowed, so that trying again will not help.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        const CANCELED: &str = "57014";
        // Connection, conflicts, resources, locks, shutdown.
        const PASSING: [&str; 5] = ["08", "40", "53", "55", "57"];
        let sqlx::Error::Database(error) = &self.source else { return false };
        let code = error.code().unwrap_or_default();
        code == CANCELED || !PASSING.iter().any(|class| code.starts_with(class))
    }
}

/// What the queries of a table found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// These keys, each once for each query; not yet looked at.
    Keys(Vec<String>),
    /// More keys than the limit, or it takes longer than allowed.
    TooMany,
}

impl Expander {
    async fn load(pool: &PgPool, file: &str, table: &TableRules) -> Result<Option<Self>, sqlx::Error> {
        let columns = sqlx::query(
            "select a.attname::text, format('%I.%I[]', n.nspname, t.typname)
             from pg_index i
             join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any(i.indkey::int2[])
             join pg_type t on t.oid = a.atttypid join pg_namespace n on n.oid = t.typnamespace
             where i.indrelid = to_regclass(format('%I.%I', $1::text, $2::text)) and i.indisprimary",
        )
        .persistent(false)
        .bind(&table.schema)
        .bind(&table.name)
        .fetch_all(pool)
        .await?;
        let [column] = columns.as_slice() else { return Ok(None) };
        Ok(Some(Self {
            file: file.to_owned(),
            table: table.qualified_name(),
            column: column.try_get(0)?,
            array_type: column.try_get(1)?,
            search_path: search_path(&table.schema),
            queries: table.expand.clone(),
        }))
    }

    /// Runs every query once for no key at all, so that a missing right shows.
    ///
    /// # Errors
    /// [`ExpandError`].
    pub async fn rehearse(&self, pool: &PgPool) -> Result<(), ExpandError> {
        for Expand { sql: At { value, line }, .. } in &self.queries {
            let run = self.run(pool, value, &[], 0, TRY_PATIENCE).await;
            run.map_err(|source| self.failed(*line, source))?;
        }
        Ok(())
    }

    /// The column whose values the queries are given.
    #[must_use]
    pub fn column(&self) -> &str {
        &self.column
    }

    /// Every namespace its keys may lie in.
    pub fn namespaces(&self) -> impl Iterator<Item = &event::CacheKey> {
        self.queries.iter().flat_map(|query| &query.namespaces)
    }

    /// The further keys of the rows with these primary keys, as far as a new snapshot tells: at most `limit`, within
    /// `patience`.
    ///
    /// # Errors
    /// [`ExpandError`].
    pub async fn find(
        &self,
        pool: &PgPool,
        primary_keys: &[String],
        limit: usize,
        patience: Duration,
    ) -> Result<Found, ExpandError> {
        let deadline = Instant::now() + patience;
        let mut found = Vec::new();
        for Expand { sql: At { value, line }, .. } in &self.queries {
            for part in primary_keys.chunks(RUN_KEYS) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(Found::TooMany);
                }
                let run = self.run(pool, value, part, limit + 1, left).await;
                found.extend(run.map_err(|source| self.failed(*line, source))?);
                if found.len() > limit {
                    return Ok(Found::TooMany);
                }
            }
        }
        Ok(Found::Keys(found))
    }

    fn failed(&self, line: usize, source: sqlx::Error) -> ExpandError {
        ExpandError { place: format!("{}:{line}: table {}", self.file, self.table), source }
    }

    /// The parameter has no type that a driver knows, and its values are text: SQL's own PREPARE takes both. What row-level
    /// security would hide is an error instead of nothing.
    async fn run(
        &self,
        pool: &PgPool,
        sql: &str,
        primary_keys: &[String],
        limit: usize,
        patience: Duration,
    ) -> Result<Vec<String>, sqlx::Error> {
        let settings = format!(
            "set local search_path = {}; set local standard_conforming_strings = on; set local jit = off; \
             set local row_security = off; set local statement_timeout = {}",
            self.search_path,
            patience.as_millis().max(1)
        );
        let name = format!("outbox_expand_{}", RUNS.fetch_add(1, Ordering::Relaxed));
        let query = format!(
            "prepare {name}({}) as select distinct e.key::text from ({sql}\n) e (key) where e.key is not null limit {limit}; \
             execute {name}({}); deallocate {name}",
            self.array_type,
            array(primary_keys)
        );
        let mut connection = pool.acquire().await?;
        let found: Result<Vec<String>, sqlx::Error> = async {
            let mut tx = connection.begin_with("begin read only").await?;
            sqlx::raw_sql(AssertSqlSafe(settings)).execute(&mut *tx).await?;
            let rows = sqlx::raw_sql(AssertSqlSafe(query)).fetch_all(&mut *tx).await?;
            tx.rollback().await?;
            rows.iter().map(|row| row.try_get(0)).collect()
        }
        .await;
        if found.is_err() {
            // What was prepared would stay with the connection.
            connection.close_on_drop();
        }
        found
    }
}

/// An array as SQL spells it, of values as Postgres writes them.
fn array(values: &[String]) -> String {
    let quoted: Vec<String> = values
        .iter()
        .map(|value| format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"")))
        .collect();
    literal(&format!("{{{}}}", quoted.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_primary_key_cannot_leave_its_quotes() {
        let array =
            |values: &[&str]| array(&values.iter().map(|&value| value.to_owned()).collect::<Vec<_>>());
        assert_eq!(array(&[]), "'{}'");
        assert_eq!(array(&["1", "2"]), "'{\"1\",\"2\"}'");
        assert_eq!(array(&["it's"]), "'{\"it''s\"}'");
        assert_eq!(array(&["a\"b\\"]), r#"E'{"a\\"b\\\\"}'"#);
    }
}
