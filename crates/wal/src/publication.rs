//! The publication: which tables the log is decoded for. Exactly those of the rules.
//!
//! A partitioned table is published by its partitions: each has a replica identity of its own, and a TRUNCATE of its own.

mod drift;
mod fingerprint;
mod rehearsal;

use std::collections::HashMap;

use rules::Rules;
use sqlx::postgres::{PgDatabaseError, PgRow};
use sqlx::{PgPool, Row};

use crate::name::InvalidName;

pub use drift::{Drift, correct, drift, drift_since};
pub use fingerprint::Fingerprint;
pub use rehearsal::{Refusal, refused_writers, rehearse};

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
    /// Somebody holds a lock on one of its tables.
    #[error("cannot change publication {0}: another session holds a lock on one of its tables")]
    Busy(String),
    /// Postgres does not accept it.
    #[error("cannot set up publication {name}: {said}")]
    Refused {
        /// Its name.
        name: String,
        /// What Postgres says, with its detail.
        said: String,
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
    /// Object ids of the tables of the rules, in their order.
    pub(crate) fn listed(&self) -> &[u32] {
        &self.listed
    }

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

/// The tables of the rules and their partitions.
///
/// # Errors
/// [`PublicationError::NoTable`], or whatever the database says.
pub async fn resolve(pool: &PgPool, rules: &Rules) -> Result<Tables, PublicationError> {
    let mut tables = Tables::default();
    for (index, (table, found)) in rules.tables().iter().zip(find(pool, rules).await?).enumerate() {
        let Some((oid, is_partitioned)) = found else {
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
        }
    }
    for (partition, root) in partitions(pool, &tables).await? {
        if let Some(index) = tables.rules_of(root) {
            tables.rules.insert(partition, index);
        }
    }
    Ok(tables)
}

/// Object ids of the tables of the rules, in their order, and whether each is partitioned.
async fn find(pool: &PgPool, rules: &Rules) -> Result<Vec<Option<(u32, bool)>>, sqlx::Error> {
    let schemas: Vec<&str> = rules.tables().iter().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = rules.tables().iter().map(|table| table.name.as_str()).collect();
    let rows = sqlx::query(
        "select c.oid::bigint, c.relkind = 'p' from unnest($1::text[], $2::text[]) with ordinality w (schema, name, nth)
         left join pg_namespace n on n.nspname = w.schema
         left join pg_class c on c.relnamespace = n.oid and c.relname = w.name and c.relkind in ('r', 'p')
         order by w.nth",
    )
    .persistent(false)
    .bind(schemas)
    .bind(names)
    .fetch_all(pool)
    .await?;
    let read = |row: &PgRow| {
        let Some(number) = row.try_get(0)? else { return Ok(None) };
        Ok(Some((oid(number)?, row.try_get(1)?)))
    };
    rows.iter().map(read).collect()
}

/// Partitions of the partitioned tables, each with the table of the rules it belongs to.
async fn partitions(pool: &PgPool, tables: &Tables) -> Result<Vec<(u32, u32)>, sqlx::Error> {
    let roots: Vec<i64> = tables
        .partitioned
        .iter()
        .filter_map(|&index| tables.listed.get(index))
        .map(|&oid| oid.into())
        .collect();
    let rows = sqlx::query(
        "select t.relid::oid::bigint, w.oid from unnest($1::bigint[]) w (oid)
         cross join lateral pg_partition_tree(w.oid::oid::regclass) t",
    )
    .persistent(false)
    .bind(roots)
    .fetch_all(pool)
    .await?;
    rows.iter().map(|row| Ok((oid(row.try_get(0)?)?, oid(row.try_get(1)?)?))).collect()
}

fn oid(number: i64) -> Result<u32, sqlx::Error> {
    u32::try_from(number).map_err(|_| sqlx::Error::Protocol("an object id is out of range".to_owned()))
}

async fn oids(pool: &PgPool, query: &'static str, of: Vec<i64>) -> Result<Vec<u32>, sqlx::Error> {
    let found: Vec<i64> = sqlx::query_scalar(query).persistent(false).bind(of).fetch_all(pool).await?;
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
    let ancestors = "select a.relid::oid::bigint from unnest($1::bigint[]) w (oid)
         cross join lateral pg_partition_ancestors(w.oid::oid::regclass) a";
    let ancestors = oids(pool, ancestors, vec![relation.into()]).await?;
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

/// What Postgres says, with the detail that often holds the cause.
fn said(error: &sqlx::Error) -> String {
    let sqlx::Error::Database(said) = error else { return error.to_string() };
    let detail = said.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::detail);
    detail.map_or_else(|| said.message().to_owned(), |detail| format!("{}: {detail}", said.message()))
}
