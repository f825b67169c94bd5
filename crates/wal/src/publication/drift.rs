use std::collections::BTreeSet;

use rules::Rules;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row};

use super::{PublicationError, Tables, find, oids, said};
use crate::name::check_name;

/// The first Postgres that publishes generated columns, if it is told to.
const PUBLISHES_STORED_COLUMNS: i32 = 180_000;

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
    let version: i32 = sqlx::query_scalar("select current_setting('server_version_num')::integer")
        .persistent(false)
        .fetch_one(&mut *tx)
        .await?;
    let options = options(version);
    let (statement, affected) = match drift {
        Drift::TooWide => return Err(PublicationError::TooWide(name.to_owned())),
        Drift::Missing => (create_statement(name, rules, options), (0..rules.tables().len()).collect()),
        Drift::Differs(affected) => (alter_statement(name, rules, options), affected.clone()),
    };
    match sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(tx).await {
        Ok(_) => Ok(affected),
        Err(error) => Err(refused(name, statement, error)),
    }
}

fn refused(name: &str, statement: String, source: sqlx::Error) -> PublicationError {
    let code = source.as_database_error().and_then(|error| error.code()).map(String::from);
    let name = name.to_owned();
    match (code.as_deref(), &source) {
        // insufficient_privilege, lock_not_available
        (Some("42501"), _) => PublicationError::NotPermitted { name, statement, source },
        (Some("55P03"), _) => PublicationError::Busy(name),
        (_, sqlx::Error::Database(_)) => PublicationError::Refused { name, said: said(&source) },
        _ => PublicationError::Database(source),
    }
}

/// Whether the publication is as it should be; `None` if so.
///
/// # Errors
/// Whatever the database says.
pub async fn drift(pool: &PgPool, name: &str, tables: &Tables) -> Result<Option<Drift>, sqlx::Error> {
    let expected = tables.listed().iter().copied().enumerate().collect();
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
    let by_name = find(pool, rules).await?;
    let known: Vec<i64> = tables.listed().iter().map(|&oid| oid.into()).collect();
    let exist = "select oid::bigint from pg_class where oid = any(array(select unnest($1::bigint[])::oid))";
    let exist: BTreeSet<u32> = oids(pool, exist, known).await?.into_iter().collect();
    let expected = by_name.iter().zip(tables.listed()).enumerate().filter_map(|(index, (by_name, known))| {
        let oid = by_name.map(|(oid, _)| oid).or_else(|| exist.contains(known).then_some(*known))?;
        Some((index, oid))
    });
    compare(pool, name, expected.collect()).await
}

async fn compare(
    pool: &PgPool,
    name: &str,
    expected: Vec<(usize, u32)>,
) -> Result<Option<Drift>, sqlx::Error> {
    // Columns of later versions are looked at as JSON: row filters and column lists came with Postgres 15, generated
    // columns with 18. There a table whose replica identity has one refuses its writers unless it is published.
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
                    and num_nonnulls(to_jsonb(r) ->> 'prqual', to_jsonb(r) ->> 'prattrs') > 0),
                array(select w.oid from unnest($2::bigint[]) w (oid)
                    where to_jsonb(p) ->> 'pubgencols' <> 's' and exists (
                        select from pg_attribute a where a.attgenerated = 's' and (a.attrelid = w.oid::oid
                            or a.attrelid in (select relid from pg_partition_tree(w.oid::oid::regclass)))))
         from pg_publication p where p.pubname = $1",
    )
    .persistent(false)
    .bind(name)
    .bind(expected.iter().map(|(_, oid)| i64::from(*oid)).collect::<Vec<_>>())
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(Some(Drift::Missing)) };
    if row.try_get::<bool, _>(0)? {
        return Ok(Some(Drift::TooWide));
    }
    let publishes_all: bool = row.try_get(1)?;
    let (published, cut): (Vec<i64>, Vec<i64>) = (row.try_get(2)?, row.try_get(3)?);
    let cut: BTreeSet<i64> = cut.into_iter().chain(row.try_get::<Vec<i64>, _>(4)?).collect();
    let published: BTreeSet<i64> = published.into_iter().collect();
    let wanted: BTreeSet<i64> = expected.iter().map(|(_, oid)| i64::from(*oid)).collect();
    let is_whole = |oid: i64| publishes_all && published.contains(&oid) && !cut.contains(&oid);
    let affected = expected.iter().filter(|(_, oid)| !is_whole(i64::from(*oid))).map(|(index, _)| *index);
    let affected: Vec<usize> = affected.collect();
    let others = published.difference(&wanted).next().is_some();
    Ok((!affected.is_empty() || others || !publishes_all).then_some(Drift::Differs(affected)))
}

/// Everything that decides what is published of a table.
fn options(version: i32) -> &'static str {
    if version >= PUBLISHES_STORED_COLUMNS {
        "publish = 'insert, update, delete, truncate', publish_via_partition_root = false, \
         publish_generated_columns = stored"
    } else {
        "publish = 'insert, update, delete, truncate', publish_via_partition_root = false"
    }
}

fn create_statement(name: &str, rules: &Rules, options: &str) -> String {
    format!("create publication {name} for table {} with ({options})", table_list(rules))
}

/// The options first: what they publish in addition makes no writer fail.
fn alter_statement(name: &str, rules: &Rules, options: &str) -> String {
    format!(
        "alter publication {name} set ({options}); alter publication {name} set table {}",
        table_list(rules)
    )
}

fn table_list(rules: &Rules) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let tables =
        rules.tables().iter().map(|table| format!("{}.{}", quoted(&table.schema), quoted(&table.name)));
    tables.collect::<Vec<_>>().join(", ")
}
