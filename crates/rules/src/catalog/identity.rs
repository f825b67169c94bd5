use std::collections::{BTreeMap, BTreeSet};

use sqlx::{PgConnection, Row};

use super::facts::{Facts, Generated, Relation};
use super::{CatalogError, Judge, invalid};
use crate::Rules;
use crate::table::At;

/// The first Postgres whose log carries generated columns that are stored.
const LOGS_STORED_COLUMNS: i32 = 180_000;

/// For capture from the write-ahead log: every column of a template or a condition must be in the replica identity of the
/// table and of all its partitions, else the old image of a changed row lacks it. Also refused are columns that the log
/// never carries, tables that it does not carry at all, and tables whose writers would fail once they are published.
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
    let version: i32 = sqlx::query_scalar("select current_setting('server_version_num')::integer")
        .persistent(false)
        .fetch_one(&mut *connection)
        .await?;
    let identities = identities(connection, facts).await?;
    for (table, facts) in rules.tables().iter().zip(facts) {
        let mut judge = Judge { rules, table, problems: &mut problems };
        for relation in &facts.relations {
            let place = (relation.schema.clone(), relation.name.clone());
            let Some(identity) = identities.get(&place) else { continue };
            judge.publishable(relation, identity);
            judge.identity(facts, relation, identity, version);
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(invalid(problems)) }
}

/// Replica identity of a relation that holds rows.
#[derive(Debug, Default)]
struct Identity {
    columns: BTreeSet<String>,
    /// Columns in it that no row holds.
    virtual_columns: Vec<String>,
    is_full: bool,
    is_unlogged: bool,
}

impl Judge<'_> {
    /// Refuses a relation whose changes the log lacks, or whose writers would fail as soon as it is published.
    fn publishable(&mut self, relation: &Relation, identity: &Identity) {
        let Relation { schema, name, .. } = relation;
        let line = self.table.line;
        if identity.is_unlogged {
            let message = format!(
                "{schema}.{name} is unlogged, so the write-ahead log does not have its changes; run \
                 `ALTER TABLE {schema}.{name} SET LOGGED`, or capture it by triggers"
            );
            self.refuse(line, None, message);
        }
        if let Some(column) = identity.virtual_columns.first() {
            let message = format!(
                "the replica identity of {schema}.{name} is FULL and so has the virtual generated column {column}: Postgres \
                 would refuse every UPDATE and DELETE of the published table; run `ALTER TABLE {schema}.{name} REPLICA \
                 IDENTITY DEFAULT`, or USING INDEX with an index that has the columns of the rules, or make the column STORED"
            );
            self.refuse(line, None, message);
        }
        if identity.columns.is_empty() && !identity.is_full {
            let message = format!(
                "{schema}.{name} has no replica identity: Postgres would refuse every UPDATE and DELETE of the published \
                 table; give it a primary key that is not deferrable, or run `ALTER TABLE {schema}.{name} REPLICA IDENTITY \
                 FULL`"
            );
            self.refuse(line, None, message);
        }
    }

    fn identity(&mut self, facts: &Facts, relation: &Relation, identity: &Identity, version: i32) {
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
            let is_generated = facts.column(name).is_some_and(|column| column.generated != Generated::No);
            if is_generated && version < LOGS_STORED_COLUMNS {
                self.refuse(
                    line,
                    Some(name),
                    "is a generated column, which the write-ahead log does not carry before Postgres 18",
                );
            } else if !identity.columns.contains(name) {
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

/// Replica identities of all relations that hold rows, by schema and name.
async fn identities(
    connection: &mut PgConnection,
    facts: &[Facts],
) -> Result<BTreeMap<(String, String), Identity>, sqlx::Error> {
    let relations = || facts.iter().flat_map(|facts| &facts.relations);
    let schemas: Vec<&str> = relations().map(|relation| relation.schema.as_str()).collect();
    let names: Vec<&str> = relations().map(|relation| relation.name.as_str()).collect();
    // A deferrable primary key is none that Postgres takes for an identity.
    let rows = sqlx::query(
        "select n.nspname::text, c.relname::text, a.attname::text, a.attgenerated::text, c.relreplident = 'f',
            c.relpersistence = 'u',
            c.relreplident = 'f' or exists (select from pg_index i
                where i.indrelid = c.oid and a.attnum = any(i.indkey) and i.indisvalid and i.indimmediate
                and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end)
         from unnest($1::text[], $2::text[]) w (schema, name)
         join pg_namespace n on n.nspname = w.schema
         join pg_class c on c.relnamespace = n.oid and c.relname = w.name and c.relkind = 'r'
         left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped",
    )
    .persistent(false)
    .bind(schemas)
    .bind(names)
    .fetch_all(connection)
    .await?;
    let mut identities: BTreeMap<_, Identity> = BTreeMap::new();
    for row in &rows {
        let identity = identities.entry((row.try_get(0)?, row.try_get(1)?)).or_default();
        (identity.is_full, identity.is_unlogged) = (row.try_get(4)?, row.try_get(5)?);
        let Some(column) = row.try_get::<Option<String>, _>(2)? else { continue };
        if row.try_get(6)? {
            if Generated::from_catalog(row.try_get(3)?) == Generated::Virtual {
                identity.virtual_columns.push(column.clone());
            }
            identity.columns.insert(column);
        }
    }
    Ok(identities)
}
