//! What the catalog says of all tables of the rules: each question is asked once, not once for each table.

use std::collections::HashMap;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::facts::{Column, Facts, Generated, Relation};
use crate::Rules;

/// Looks all tables up, in the order of the rules; `None` where there is none of that name.
pub(super) async fn load(
    connection: &mut PgConnection,
    rules: &Rules,
) -> Result<Vec<Option<Facts>>, sqlx::Error> {
    let found = tables(connection, rules).await?;
    let oids: Vec<i64> = found.iter().flatten().map(|table| table.oid).collect();
    let mut kin = by_table(connection, KIN, &oids, |row| row.try_get(1)).await?;
    let mut relations = by_table(connection, RELATIONS, &oids, read_relation).await?;
    let mut columns = by_table(connection, COLUMNS, &oids, read_column).await?;
    let mut primary_keys = by_table(connection, PRIMARY_KEYS, &oids, |row| row.try_get(1)).await?;
    let facts = rules.tables().iter().zip(found).map(|(table, found)| {
        let Found { oid, is_table, partition_of } = found?;
        Some(Facts {
            schema: table.schema.clone(),
            name: table.name.clone(),
            is_table,
            partition_of,
            kin: kin.remove(&oid).unwrap_or_default(),
            relations: relations.remove(&oid).unwrap_or_default(),
            columns: columns.remove(&oid).unwrap_or_default(),
            primary_key: primary_keys.remove(&oid).unwrap_or_default(),
        })
    });
    Ok(facts.collect())
}

/// Schemas other than the system's that have a table of this name.
pub(super) async fn schemas_with(
    connection: &mut PgConnection,
    name: &str,
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select n.nspname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where c.relname = $1 and c.relkind in ('r', 'p') order by 1",
    )
    .persistent(false)
    .bind(name)
    .fetch_all(connection)
    .await
}

struct Found {
    oid: i64,
    is_table: bool,
    partition_of: Option<String>,
}

async fn tables(connection: &mut PgConnection, rules: &Rules) -> Result<Vec<Option<Found>>, sqlx::Error> {
    let schemas: Vec<&str> = rules.tables().iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = rules.tables().iter().map(|table| table.name.as_str()).collect();
    let rows = sqlx::query(
        "select c.oid::int8, c.relkind in ('r', 'p'), i.inhparent::regclass::text
         from unnest($1::text[], $2::text[]) with ordinality w (schema, name, nth)
         left join pg_namespace n on n.nspname = w.schema
         left join pg_class c on c.relnamespace = n.oid and c.relname = w.name and c.relkind in ('r', 'p', 'v', 'm', 'f')
         left join pg_inherits i on c.relispartition and i.inhrelid = c.oid
         order by w.nth",
    )
    .persistent(false)
    .bind(schemas)
    .bind(names)
    .fetch_all(connection)
    .await?;
    let read = |row: &PgRow| {
        let Some(oid) = row.try_get(0)? else { return Ok(None) };
        Ok(Some(Found { oid, is_table: row.try_get(1)?, partition_of: row.try_get(2)? }))
    };
    rows.iter().map(read).collect()
}

/// The rows that a query has for these tables, by the object id in the first column.
async fn by_table<T>(
    connection: &mut PgConnection,
    query: &'static str,
    oids: &[i64],
    read: impl Fn(&PgRow) -> Result<T, sqlx::Error>,
) -> Result<HashMap<i64, Vec<T>>, sqlx::Error> {
    let rows = sqlx::query(query).persistent(false).bind(oids).fetch_all(connection).await?;
    let mut found: HashMap<i64, Vec<T>> = HashMap::new();
    for row in &rows {
        found.entry(row.try_get(0)?).or_default().push(read(row)?);
    }
    Ok(found)
}

const KIN: &str =
    "select w.oid, case i.inhparent::int8 when w.oid then i.inhrelid else i.inhparent end::regclass::text
     from unnest($1::int8[]) w (oid)
     join pg_inherits i on i.inhparent = w.oid::oid or i.inhrelid = w.oid::oid
     join pg_class c on c.oid = i.inhrelid and not c.relispartition
     order by 1, 2";

const RELATIONS: &str = "with recursive tree (root, oid, level) as (
        select w.oid, w.oid::oid, 0 from unnest($1::int8[]) w (oid)
        union all
        select tree.root, i.inhrelid, tree.level + 1 from tree join pg_inherits i on i.inhparent = tree.oid
        join pg_class c on c.oid = i.inhrelid and c.relispartition)
     select tree.root, n.nspname::text, c.relname::text, c.relkind = 'f', c.relkind = 'r'
     from tree join pg_class c on c.oid = tree.oid join pg_namespace n on n.oid = c.relnamespace
     order by tree.root, tree.level, 2, 3";

fn read_relation(row: &PgRow) -> Result<Relation, sqlx::Error> {
    Ok(Relation {
        schema: row.try_get(1)?,
        name: row.try_get(2)?,
        is_foreign: row.try_get(3)?,
        holds_rows: row.try_get(4)?,
    })
}

const COLUMNS: &str = "with recursive base (relid, attnum, typid) as (
        select attrelid, attnum, atttypid from pg_attribute
        where attrelid = any(array(select unnest($1::int8[])::oid)) and attnum > 0 and not attisdropped
        union all
        select base.relid, base.attnum, t.typbasetype from base join pg_type t on t.oid = base.typid where t.typtype = 'd')
     select a.attrelid::int8, a.attname::text, format_type(a.atttypid, null), format_type(a.atttypid, a.atttypmod),
        t.typname::text, t.typtype = 'e', a.attgenerated::text,
        coalesce((select format('%I.%I', n.nspname, l.typname) from pg_type e join pg_type l on l.oid = e.typarray
            join pg_namespace n on n.oid = l.typnamespace where e.oid = a.atttypid), '')
     from base join pg_type t on t.oid = base.typid and t.typtype <> 'd'
     join pg_attribute a on a.attrelid = base.relid and a.attnum = base.attnum
     order by a.attrelid, a.attnum";

fn read_column(row: &PgRow) -> Result<Column, sqlx::Error> {
    Ok(Column {
        name: row.try_get(1)?,
        type_name: row.try_get(2)?,
        full_type: row.try_get(3)?,
        base_type: row.try_get(4)?,
        is_enum: row.try_get(5)?,
        generated: Generated::from_catalog(row.try_get(6)?),
        array_type: row.try_get(7)?,
    })
}

const PRIMARY_KEYS: &str = "select i.indrelid::int8, a.attname::text from pg_index i
     cross join lateral unnest(i.indkey::int2[]) with ordinality k (attnum, ordinal)
     join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
     where i.indrelid = any(array(select unnest($1::int8[])::oid)) and i.indisprimary
     order by i.indrelid, k.ordinal";
