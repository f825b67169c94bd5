use std::collections::BTreeSet;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::facts::{Facts, Relation};
use super::{CatalogError, Judge, invalid};
use crate::Rules;
use crate::table::At;

/// For capture from the write-ahead log: every column of a template or a condition must be in the replica identity of the
/// table and of all its partitions, else the old image of a changed row lacks it. Also refused are columns that the log
/// never carries.
///
/// `facts` is what [`check`](super::check) returned.
///
/// # Errors
/// [`CatalogError::Rules`] with everything that does not fit.
pub async fn check_identity(
    connection: &mut PgConnection,
    rules: &Rules,
    facts: &[Facts],
) -> Result<(), CatalogError> {
    let mut problems = Vec::new();
    for (table, facts) in rules.tables().iter().zip(facts) {
        let mut judge = Judge { rules, table, problems: &mut problems };
        for relation in &facts.relations {
            let Some(known) = identity(connection, relation).await? else { continue };
            judge.identity(facts, relation, &known);
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(invalid(problems)) }
}

impl Judge<'_> {
    fn identity(&mut self, facts: &Facts, relation: &Relation, known: &BTreeSet<String>) {
        let table = self.table;
        let of_keys =
            table.keys.iter().flat_map(|At { value, line }| value.columns().map(move |name| (name, *line)));
        let of_condition = table.when.iter().map(|when| (when.value.column(), when.line));
        let of_expand = table
            .expand
            .iter()
            .flat_map(|expand| facts.primary_key.iter().map(move |name| (name.as_str(), expand.sql.line)));
        let mut seen = BTreeSet::new();
        for (name, line) in of_keys.chain(of_condition).chain(of_expand) {
            if !seen.insert(name) {
                continue;
            }
            if facts.column(name).is_some_and(|column| column.is_generated) {
                self.refuse(
                    line,
                    Some(name),
                    "is a generated column, which the write-ahead log does not carry",
                );
            } else if !known.contains(name) {
                let Relation { schema, name: relation, .. } = relation;
                let message = format!(
                    "is not in the replica identity, so the write-ahead log does not carry its old value; run \
                     `ALTER TABLE {schema}.{relation} REPLICA IDENTITY FULL`, or USING INDEX with an index that has it"
                );
                self.refuse(line, Some(name), message);
            }
        }
    }
}

/// Columns in the replica identity; `None` for a relation that holds no rows itself.
async fn identity(
    connection: &mut PgConnection,
    relation: &Relation,
) -> Result<Option<BTreeSet<String>>, sqlx::Error> {
    let rows = sqlx::query(
        "select a.attname::text, c.relkind = 'r',
            case c.relreplident
                when 'f' then true
                when 'd' then exists (select from pg_index i
                    where i.indrelid = c.oid and i.indisprimary and a.attnum = any(i.indkey))
                when 'i' then exists (select from pg_index i
                    where i.indrelid = c.oid and i.indisreplident and a.attnum = any(i.indkey))
                else false
            end
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
         where n.nspname = $1 and c.relname = $2",
    )
    .persistent(false)
    .bind(&relation.schema)
    .bind(&relation.name)
    .fetch_all(connection)
    .await?;
    let holds_rows = |row: &PgRow| row.try_get::<bool, _>(1);
    if !rows.first().map(holds_rows).transpose()?.unwrap_or(false) {
        return Ok(None);
    }
    let mut known = BTreeSet::new();
    for row in &rows {
        if row.try_get(2)? {
            known.insert(row.try_get(0)?);
        }
    }
    Ok(Some(known))
}
