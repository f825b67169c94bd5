use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

/// What the database knows of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Schema of the table.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Whether it is a table or a partitioned table.
    pub is_table: bool,
    /// The table it is a partition of, if it is one.
    pub partition_of: Option<String>,
    /// Tables that inherit from it, or it from them, and are no partitions.
    pub kin: Vec<String>,
    /// The table itself and, below it, all its partitions of every level.
    pub relations: Vec<Relation>,
    /// Its columns in order.
    pub columns: Vec<Column>,
    /// Columns of the primary key in order.
    pub primary_key: Vec<String>,
}

/// A table in which rows can be changed under that name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Whether it is a foreign table, which can have no statement trigger with transition tables.
    pub is_foreign: bool,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type as SQL spells it.
    pub type_name: String,
    /// The same with length and precision.
    pub full_type: String,
    /// The type of an array of it, which needs no `search_path`.
    pub array_type: String,
    /// Name of its type in `pg_type`; of a domain, that of the type below it.
    pub base_type: String,
    /// Whether the type is an enum.
    pub is_enum: bool,
    /// Whether its value is computed from others.
    pub is_generated: bool,
}

/// Types whose text in a key depends on nothing, or only on [`PINNED_SETTINGS`](crate::PINNED_SETTINGS).
const TYPES_OF_KEYS: [&str; 18] = [
    "int2",
    "int4",
    "int8",
    "oid",
    "numeric",
    "bool",
    "uuid",
    "text",
    "varchar",
    "bpchar",
    "name",
    "citext",
    "date",
    "timestamp",
    "timestamptz",
    "inet",
    "cidr",
    "macaddr",
];

/// Types of which two values are equal exactly if their texts are.
const TYPES_COMPARED_AS_THEY_ARE: [&str; 10] =
    ["int2", "int4", "int8", "oid", "bool", "uuid", "date", "timestamp", "timestamptz", "bytea"];

impl Column {
    /// Whether its value can be part of a key.
    #[must_use]
    pub fn can_be_in_a_key(&self) -> bool {
        self.is_enum || TYPES_OF_KEYS.contains(&self.base_type.as_str())
    }

    /// Whether the text of its values depends on settings of the session.
    #[must_use]
    pub fn depends_on_settings(&self) -> bool {
        matches!(self.base_type.as_str(), "date" | "timestamp" | "timestamptz")
    }

    /// Whether its values may hold any characters.
    pub(crate) fn is_free_text(&self) -> bool {
        self.is_enum
            || matches!(
                self.base_type.as_str(),
                "text" | "varchar" | "bpchar" | "name" | "citext" | "numeric"
            )
    }

    /// Whether its text may be that of floating-point numbers: of arrays, composite and geometric types it is not known.
    pub(crate) fn may_have_floats(&self) -> bool {
        !self.is_compared_as_it_is() && !self.can_be_in_a_key()
    }

    /// Whether `=` tells apart what the text tells apart.
    pub(crate) fn is_compared_as_it_is(&self) -> bool {
        TYPES_COMPARED_AS_THEY_ARE.contains(&self.base_type.as_str())
    }
}

impl Facts {
    /// A column by its name.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// The column of the primary key, if it is just one.
    #[must_use]
    pub fn single_key(&self) -> Option<&Column> {
        match self.primary_key.as_slice() {
            [name] => self.column(name),
            _ => None,
        }
    }
}

/// Looks a table up; `None` if there is none of that name.
pub(super) async fn load(
    connection: &mut PgConnection,
    schema: &str,
    name: &str,
) -> Result<Option<Facts>, sqlx::Error> {
    let row = sqlx::query(
        "select c.oid::int8, c.relkind in ('r', 'p'), i.inhparent::regclass::text
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         left join pg_inherits i on c.relispartition and i.inhrelid = c.oid
         where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p', 'v', 'm', 'f')",
    )
    .persistent(false)
    .bind(schema)
    .bind(name)
    .fetch_optional(&mut *connection)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let oid: i64 = row.try_get(0)?;
    Ok(Some(Facts {
        schema: schema.to_owned(),
        name: name.to_owned(),
        is_table: row.try_get(1)?,
        partition_of: row.try_get(2)?,
        kin: kin(connection, oid).await?,
        relations: relations(connection, oid).await?,
        columns: columns(connection, oid).await?,
        primary_key: primary_key(connection, oid).await?,
    }))
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

async fn relations(connection: &mut PgConnection, oid: i64) -> Result<Vec<Relation>, sqlx::Error> {
    let rows = sqlx::query(
        "with recursive tree (oid, level) as (
            select $1::int8::oid, 0
            union all
            select i.inhrelid, tree.level + 1 from tree join pg_inherits i on i.inhparent = tree.oid
            join pg_class c on c.oid = i.inhrelid and c.relispartition)
         select n.nspname::text, c.relname::text, c.relkind = 'f'
         from tree join pg_class c on c.oid = tree.oid join pg_namespace n on n.oid = c.relnamespace
         order by tree.level, 1, 2",
    )
    .persistent(false)
    .bind(oid)
    .fetch_all(connection)
    .await?;
    let read = |row: &PgRow| {
        Ok(Relation { schema: row.try_get(0)?, name: row.try_get(1)?, is_foreign: row.try_get(2)? })
    };
    rows.iter().map(read).collect()
}

async fn kin(connection: &mut PgConnection, oid: i64) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select case i.inhparent when $1::int8::oid then i.inhrelid else i.inhparent end::regclass::text
         from pg_inherits i join pg_class c on c.oid = i.inhrelid and not c.relispartition
         where $1::int8::oid in (i.inhparent, i.inhrelid) order by 1",
    )
    .persistent(false)
    .bind(oid)
    .fetch_all(connection)
    .await
}

async fn columns(connection: &mut PgConnection, oid: i64) -> Result<Vec<Column>, sqlx::Error> {
    let rows = sqlx::query(
        "with recursive base (attnum, typid) as (
            select attnum, atttypid from pg_attribute where attrelid = $1::int8::oid and attnum > 0 and not attisdropped
            union all
            select base.attnum, t.typbasetype from base join pg_type t on t.oid = base.typid where t.typtype = 'd')
         select a.attname::text, format_type(a.atttypid, null), format_type(a.atttypid, a.atttypmod), t.typname::text,
            t.typtype = 'e', a.attgenerated <> '',
            coalesce((select format('%I.%I', n.nspname, l.typname) from pg_type e join pg_type l on l.oid = e.typarray
                join pg_namespace n on n.oid = l.typnamespace where e.oid = a.atttypid), '')
         from base join pg_type t on t.oid = base.typid and t.typtype <> 'd'
         join pg_attribute a on a.attrelid = $1::int8::oid and a.attnum = base.attnum
         order by a.attnum",
    )
    .persistent(false)
    .bind(oid)
    .fetch_all(connection)
    .await?;
    let read = |row: &PgRow| {
        Ok(Column {
            name: row.try_get(0)?,
            type_name: row.try_get(1)?,
            full_type: row.try_get(2)?,
            base_type: row.try_get(3)?,
            is_enum: row.try_get(4)?,
            is_generated: row.try_get(5)?,
            array_type: row.try_get(6)?,
        })
    };
    rows.iter().map(read).collect()
}

async fn primary_key(connection: &mut PgConnection, oid: i64) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select a.attname::text from pg_index i
         cross join lateral unnest(i.indkey::int2[]) with ordinality k (attnum, ordinal)
         join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
         where i.indrelid = $1::int8::oid and i.indisprimary order by k.ordinal",
    )
    .persistent(false)
    .bind(oid)
    .fetch_all(connection)
    .await
}
