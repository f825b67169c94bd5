//! The publication: which tables the log is decoded for. Exactly those of the rules.

use std::collections::HashMap;

use rules::Rules;
use sqlx::{AssertSqlSafe, PgPool, Row};

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

/// How the publication differs from the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drift {
    /// There is none.
    Missing,
    /// Tables are missing from it, it holds others, or it leaves some kind of change out.
    Differs,
    /// It is for all tables or a schema.
    TooWide,
}

impl std::fmt::Display for Drift {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Missing => "does not exist",
            Self::Differs => "is not for exactly the tables and kinds of change of the rules",
            Self::TooWide => "is for all tables, or for a whole schema",
        })
    }
}

/// Makes the publication be for exactly the tables of the rules, and returns which object id has which rules. Whether
/// their replica identity suffices must have been checked before: a table without one would refuse its writers.
///
/// # Errors
/// [`PublicationError`].
pub async fn ensure(
    pool: &PgPool,
    name: &str,
    rules: &Rules,
) -> Result<HashMap<u32, usize>, PublicationError> {
    check_name(name)?;
    let tables = resolve(pool, rules).await?;
    let statement = match drift(pool, name, &tables).await? {
        None => return Ok(tables),
        Some(Drift::TooWide) => return Err(PublicationError::TooWide(name.to_owned())),
        Some(Drift::Missing) => create_statement(name, rules),
        Some(Drift::Differs) => alter_statement(name, rules),
    };
    match sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(pool).await {
        Ok(_) => {
            tracing::info!(publication = name, tables = rules.tables().len(), "set up the publication");
            Ok(tables)
        }
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

/// Object ids of the tables of the rules.
///
/// # Errors
/// [`PublicationError::NoTable`], or whatever the database says.
pub async fn resolve(pool: &PgPool, rules: &Rules) -> Result<HashMap<u32, usize>, PublicationError> {
    let mut tables = HashMap::new();
    for (index, table) in rules.tables().iter().enumerate() {
        let row = sqlx::query(
            "select c.oid::bigint from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')",
        )
        .persistent(false)
        .bind(&table.schema)
        .bind(&table.name)
        .fetch_optional(pool)
        .await?;
        let Some(row) = row else {
            return Err(PublicationError::NoTable {
                file: rules.file().to_owned(),
                line: table.line,
                table: table.qualified_name(),
            });
        };
        let oid = u32::try_from(row.try_get::<i64, _>(0)?).map_err(|_| sqlx::Error::RowNotFound)?;
        tables.insert(oid, index);
    }
    Ok(tables)
}

/// Whether the publication is as it should be; `None` if so.
///
/// # Errors
/// Whatever the database says.
pub async fn drift(
    pool: &PgPool,
    name: &str,
    tables: &HashMap<u32, usize>,
) -> Result<Option<Drift>, sqlx::Error> {
    let row = sqlx::query(
        "select p.puballtables, p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate and p.pubviaroot,
                array(select prrelid::bigint from pg_publication_rel where prpubid = p.oid),
                (select count(*) from pg_publication_tables t where t.pubname = p.pubname)
         from pg_publication p where p.pubname = $1",
    )
    .persistent(false)
    .bind(name)
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(Some(Drift::Missing)) };
    let published: Vec<i64> = row.try_get(2)?;
    let effective: i64 = row.try_get(3)?;
    // More tables than are listed: some come by their schema.
    if row.try_get::<bool, _>(0)? || effective > i64::try_from(published.len()).unwrap_or(i64::MAX) {
        return Ok(Some(Drift::TooWide));
    }
    let same = published.len() == tables.len()
        && published.iter().all(|oid| u32::try_from(*oid).is_ok_and(|oid| tables.contains_key(&oid)));
    Ok((!same || !row.try_get::<bool, _>(1)?).then_some(Drift::Differs))
}

fn create_statement(name: &str, rules: &Rules) -> String {
    format!(
        "create publication {name} for table {} with (publish_via_partition_root = true)",
        table_list(rules)
    )
}

fn alter_statement(name: &str, rules: &Rules) -> String {
    format!(
        "alter publication {name} set table {}; alter publication {name} set \
         (publish = 'insert, update, delete, truncate', publish_via_partition_root = true)",
        table_list(rules)
    )
}

fn table_list(rules: &Rules) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let tables =
        rules.tables().iter().map(|table| format!("{}.{}", quoted(&table.schema), quoted(&table.name)));
    tables.collect::<Vec<_>>().join(", ")
}
