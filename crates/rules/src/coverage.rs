//! What no rule watches.

use std::collections::BTreeSet;

use sqlx::{PgConnection, Row};

use crate::Rules;
use crate::catalog::Facts;

/// What no rule watches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Coverage {
    /// Tables without rules, as `schema.table`.
    pub tables: Vec<String>,
    /// Tables with rules, and their columns whose change invalidates nothing.
    pub columns: Vec<(String, Vec<String>)>,
}

/// Looks for tables and columns without a rule. Partitions count as their root, and schemas of the system and of the
/// outbox do not count.
///
/// # Errors
/// Whatever the database says.
pub async fn coverage(
    connection: &mut PgConnection,
    rules: &Rules,
    facts: &[Facts],
) -> Result<Coverage, sqlx::Error> {
    let rows = sqlx::query(
        "select n.nspname::text, c.relname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence <> 't'
            and n.nspname not in ('pg_catalog', 'information_schema', 'outbox') and n.nspname not like 'pg\\_toast%'
         order by 1, 2",
    )
    .persistent(false)
    .fetch_all(connection)
    .await?;
    let mut coverage = Coverage::default();
    for row in &rows {
        let (schema, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        if rules.table(&schema, &name).is_none() {
            coverage.tables.push(format!("{schema}.{name}"));
        }
    }
    for (table, facts) in rules.tables().iter().zip(facts) {
        if table.columns.is_none() {
            continue;
        }
        let compared: BTreeSet<&str> = table.compared_columns();
        let left: Vec<String> = facts
            .columns
            .iter()
            .filter(|column| !compared.contains(column.name.as_str()))
            .map(|column| column.name.clone())
            .collect();
        if !left.is_empty() {
            coverage.columns.push((table.qualified_name(), left));
        }
    }
    Ok(coverage)
}
