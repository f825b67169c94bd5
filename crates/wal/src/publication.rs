//! The publication: which tables the log is decoded for. Exactly those of the rules.
//!
//! A partitioned table is published by its partitions: each has a replica identity of its own, and a TRUNCATE of its own.

use std::collections::HashMap;

use rules::{Rules, TableRules};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row};

use crate::name::{InvalidName, check_name};

/// Why the publication cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PublicationError {
    /// Not a name.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// A table of the rules is not there.
    #[error("{file}:{line}: table {table} does not exist, or is neither a table nor a partitioned table")]
    NoTable {
        /// Rules file.
        file: String,
        /// Line of the table.
        line: usize,
        /// The table.
        table: String,
    },
    /// It publishes more than the rules know.
    #[error(
        "publication {0} is for all tables, or for a whole schema; drop it, and the relay creates one for exactly the \
         tables of the rules"
    )]
    TooWide(String),
    /// The role may not.
    #[error("the role may not change publication {name}; run as the owner of the tables: {statement}")]
    NotPermitted {
        /// Its name.
        name: String,
        /// What has to be run.
        statement: String,
        /// What the database said.
        #[source]
        source: sqlx::Error,
    },
    /// Anything else.
    #[error("cannot look after the publication")]
    Database(#[from] sqlx::Error),
}

/// Which relation of the database has which rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    /// Object ids of the tables, in the order of the rules.
    listed: Vec<u32>,
    /// The tables by object id, and every partition of theirs: index of the rules.
    rules: HashMap<u32, usize>,
    /// Indexes of the partitioned ones.
    partitioned: Vec<usize>,
}

impl Tables {
    /// Index of the rules of a table or a partition.
    pub(crate) fn rules_of(&self, oid: u32) -> Option<usize> {
        self.rules.get(&oid).copied()
    }

    /// Takes note of a partition of the table with these rules.
    pub(crate) fn adopt(&mut self, oid: u32, table: usize) {
        self.rules.insert(oid, table);
    }

    /// Indexes of the rules of partitioned tables.
    pub(crate) fn partitioned(&self) -> &[usize] {
        &self.partitioned
    }
}

/// What a relation that is not known yet turns out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lineage {
    /// A partition of the table with the rules of this index.
    Partition(usize),
    /// A table that somebody has put into the publication.
    Other,
    /// The catalog does not know it, or not as either: it was a partition, or will be when its transaction commits.
    Unknown,
}

/// How the publication differs from the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drift {
    /// There is none.
    Missing,
    /// Tables are missing from it, it holds others, or it leaves something out: a kind of change, rows or columns. The
    /// rules of these indexes are of tables whose changes it does not publish, or not all.
    Differs(Vec<usize>),
    /// It is for all tables or a schema.
    TooWide,
}

impl std::fmt::Display for Drift {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Missing => "does not exist",
            Self::Differs(_) => "is not for exactly the tables and changes of the rules",
            Self::TooWide => "is for all tables, or for a whole schema",
        })
    }
}

/// Makes the publication be for exactly the tables of the rules, in a transaction in which the caller declares stale what
/// may have been missing: returns the indexes of the rules whose tables are affected. Whether the replica identities
/// suffice must have been checked before: a table without one would refuse its writers.
///
/// # Errors
/// [`PublicationError`].
pub async fn correct(
    tx: &mut PgConnection,
    name: &str,
    rules: &Rules,
    drift: &Drift,
) -> Result<Vec<usize>, PublicationError> {
    check_name(name)?;
    let (statement, affected) = match drift {
        Drift::TooWide => return Err(PublicationError::TooWide(name.to_owned())),
        Drift::Missing => (create_statement(name, rules), (0..rules.tables().len()).collect()),
        Drift::Differs(affected) => (alter_statement(name, rules), affected.clone()),
    };
    match sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(tx).await {
        Ok(_) => Ok(affected),
        Err(error) => Err(refused(name, statement, error)),
    }
}

fn refused(name: &str, statement: String, source: sqlx::Error) -> PublicationError {
    let code = source.as_database_error().and_then(|error| error.code()).map(String::from);
    // insufficient_privilege
    if code.as_deref() == Some("42501") {
        return PublicationError::NotPermitted { name: name.to_owned(), statement, source };
    }
    PublicationError::Database(source)
}

/// The tables of the rules and their partitions.
///
/// # Errors
/// [`PublicationError::NoTable`], or whatever the database says.
pub async fn resolve(pool: &PgPool, rules: &Rules) -> Result<Tables, PublicationError> {
    let mut tables = Tables::default();
    for (index, table) in rules.tables().iter().enumerate() {
        let Some((oid, is_partitioned)) = find(pool, table).await? else {
            return Err(PublicationError::NoTable {
                file: rules.file().to_owned(),
                line: table.line,
                table: table.qualified_name(),
            });
        };
        tables.listed.push(oid);
        tables.rules.insert(oid, index);
        if is_partitioned {
            tables.partitioned.push(index);
            let partitions = "select relid::oid::bigint from pg_partition_tree($1::bigint::oid::regclass)";
            for partition in oids(pool, partitions, oid).await? {
                tables.rules.insert(partition, index);
            }
        }
    }
    Ok(tables)
}

/// Object id of a table of the rules, and whether it is partitioned.
async fn find(pool: &PgPool, table: &TableRules) -> Result<Option<(u32, bool)>, sqlx::Error> {
    let row = sqlx::query(
        "select c.oid::bigint, c.relkind = 'p' from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')",
    )
    .persistent(false)
    .bind(&table.schema)
    .bind(&table.name)
    .fetch_optional(pool)
    .await?;
    row.map(|row| Ok((oid(row.try_get(0)?)?, row.try_get(1)?))).transpose()
}

fn oid(number: i64) -> Result<u32, sqlx::Error> {
    u32::try_from(number).map_err(|_| sqlx::Error::Protocol("an object id is out of range".to_owned()))
}

async fn oids(pool: &PgPool, query: &'static str, of: u32) -> Result<Vec<u32>, sqlx::Error> {
    let found: Vec<i64> =
        sqlx::query_scalar(query).persistent(false).bind(i64::from(of)).fetch_all(pool).await?;
    found.into_iter().map(oid).collect()
}

/// Looks up a relation that came out of the log and is not known.
///
/// # Errors
/// Whatever the database says.
pub async fn lineage(
    pool: &PgPool,
    name: &str,
    tables: &Tables,
    relation: u32,
) -> Result<Lineage, sqlx::Error> {
    let ancestors = "select relid::oid::bigint from pg_partition_ancestors($1::bigint::oid::regclass)";
    let ancestors = oids(pool, ancestors, relation).await?;
    if let Some(table) = ancestors.iter().find_map(|ancestor| tables.rules_of(*ancestor)) {
        return Ok(Lineage::Partition(table));
    }
    let is_listed = sqlx::query_scalar(
        "select exists (select from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
             where p.pubname = $1 and r.prrelid = $2::bigint::oid)",
    )
    .persistent(false)
    .bind(name)
    .bind(i64::from(relation))
    .fetch_one(pool)
    .await?;
    Ok(if is_listed { Lineage::Other } else { Lineage::Unknown })
}

/// Whether the publication is as it should be; `None` if so.
///
/// # Errors
/// Whatever the database says.
pub async fn drift(pool: &PgPool, name: &str, tables: &Tables) -> Result<Option<Drift>, sqlx::Error> {
    let expected = tables.listed.iter().copied().enumerate().collect();
    compare(pool, name, expected).await
}

/// [`drift`] while the log is read: a table of the rules that has another name by now keeps its rules, and one that was
/// dropped has no changes. Only one that was put in its place needs to be published.
///
/// # Errors
/// Whatever the database says.
pub async fn drift_since(
    pool: &PgPool,
    name: &str,
    rules: &Rules,
    tables: &Tables,
) -> Result<Option<Drift>, sqlx::Error> {
    let mut expected = Vec::new();
    for (index, table) in rules.tables().iter().enumerate() {
        let by_name = find(pool, table).await?.map(|(oid, _)| oid);
        let known = tables.listed.get(index).copied();
        let exists = "select oid::bigint from pg_class where oid = $1::bigint::oid";
        match (by_name, known) {
            (Some(oid), _) => expected.push((index, oid)),
            (None, Some(known)) if !oids(pool, exists, known).await?.is_empty() => {
                expected.push((index, known))
            }
            (None, _) => {}
        }
    }
    compare(pool, name, expected).await
}

async fn compare(
    pool: &PgPool,
    name: &str,
    expected: Vec<(usize, u32)>,
) -> Result<Option<Drift>, sqlx::Error> {
    // Columns of later versions are looked at as JSON: row filters and column lists came with Postgres 15.
    let row = sqlx::query(
        "select p.puballtables or exists (
                    select from pg_publication_tables t
                    join pg_namespace n on n.nspname = t.schemaname
                    join pg_class c on c.relnamespace = n.oid and c.relname = t.tablename
                    where t.pubname = p.pubname and not exists (
                        select from pg_publication_rel r where r.prpubid = p.oid and (r.prrelid = c.oid
                            or r.prrelid in (select relid from pg_partition_ancestors(c.oid))))),
                p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate and not (p.pubviaroot and exists (
                    select from pg_publication_rel r join pg_class c on c.oid = r.prrelid
                    where r.prpubid = p.oid and c.relkind = 'p')),
                array(select prrelid::bigint from pg_publication_rel where prpubid = p.oid),
                array(select prrelid::bigint from pg_publication_rel r where prpubid = p.oid
                    and num_nonnulls(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') > 0)
         from pg_publication p where p.pubname = $1",
    )
    .persistent(false)
    .bind(name)
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(Some(Drift::Missing)) };
    if row.try_get::<bool, _>(0)? {
        return Ok(Some(Drift::TooWide));
    }
    let publishes_all: bool = row.try_get(1)?;
    let (published, cut): (Vec<i64>, Vec<i64>) = (row.try_get(2)?, row.try_get(3)?);
    let is_whole =
        |oid: u32| publishes_all && published.contains(&i64::from(oid)) && !cut.contains(&i64::from(oid));
    let affected: Vec<usize> =
        expected.iter().filter(|(_, oid)| !is_whole(*oid)).map(|(index, _)| *index).collect();
    let others =
        published.iter().any(|published| expected.iter().all(|(_, oid)| i64::from(*oid) != *published));
    Ok((!affected.is_empty() || others || !publishes_all).then_some(Drift::Differs(affected)))
}

fn create_statement(name: &str, rules: &Rules) -> String {
    format!(
        "create publication {name} for table {} with (publish_via_partition_root = false)",
        table_list(rules)
    )
}

fn alter_statement(name: &str, rules: &Rules) -> String {
    format!(
        "alter publication {name} set table {}; alter publication {name} set \
         (publish = 'insert, update, delete, truncate', publish_via_partition_root = false)",
        table_list(rules)
    )
}

fn table_list(rules: &Rules) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let tables =
        rules.tables().iter().map(|table| format!("{}.{}", quoted(&table.schema), quoted(&table.name)));
    tables.collect::<Vec<_>>().join(", ")
}
