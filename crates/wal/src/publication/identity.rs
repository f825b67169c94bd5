use std::collections::{BTreeSet, HashMap};

use rules::Rules;
use sqlx::postgres::PgRow;
use sqlx::{PgPool, Row};

/// A table of which the log does not hold what its templates are made of, or whose writers a publication would break.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityProblem {
    /// Once it is published, every UPDATE and DELETE of it fails.
    #[error(
        "{file}:{line}: table {table} has no replica identity, so Postgres would refuse every UPDATE and DELETE of it \
         once it is published; give it a primary key, or run `alter table {table} replica identity full`"
    )]
    None {
        /// Rules file.
        file: String,
        /// Line of the table.
        line: usize,
        /// The table, or the partition.
        table: String,
    },
    /// Columns are not in the old row image.
    #[error(
        "{file}:{line}: table {table}: the keys depend on {columns}, which the log does not hold of old rows; \
         run `alter table {table} replica identity full`, or capture it by trigger"
    )]
    Columns {
        /// Rules file.
        file: String,
        /// Line of the table.
        line: usize,
        /// The table, or the partition.
        table: String,
        /// The columns.
        columns: String,
    },
}

/// One table or partition, and what the log holds of its old rows.
struct Identity {
    root: u32,
    name: String,
    identity: String,
    /// Columns of the primary key or the chosen index.
    columns: Vec<String>,
}

/// What keeps the log from being enough for the rules. Partitions count each for itself: their rows are logged by their
/// own identity.
///
/// # Errors
/// Whatever the database says.
pub async fn identity_problems(
    pool: &PgPool,
    rules: &Rules,
    tables: &HashMap<u32, usize>,
) -> Result<Vec<IdentityProblem>, sqlx::Error> {
    let oids: Vec<i64> = tables.keys().map(|oid| i64::from(*oid)).collect();
    let rows = sqlx::query(
        "select t.root, format('%I.%I', n.nspname, c.relname), c.relreplident::text,
                array(select a.attname::text from pg_index i
                      join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any(i.indkey)
                      where i.indrelid = c.oid and i.indisvalid
                        and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end)
         from (select r.root, p.relid from unnest($1::bigint[]) r (root),
                      lateral (select relid from pg_partition_tree(r.root::oid::regclass)
                               union select r.root::oid::regclass) p) t
         join pg_class c on c.oid = t.relid join pg_namespace n on n.oid = c.relnamespace
         order by 1, 2",
    )
    .persistent(false)
    .bind(oids)
    .fetch_all(pool)
    .await?;
    let mut problems = Vec::new();
    for row in &rows {
        let identity = read(row)?;
        let Some(table) = tables.get(&identity.root).map(|&index| &rules.tables()[index]) else { continue };
        let (file, line) = (rules.file().to_owned(), table.line);
        problems.extend(identity.problem(&table.needed_columns(), file, line));
    }
    Ok(problems)
}

fn read(row: &PgRow) -> Result<Identity, sqlx::Error> {
    Ok(Identity {
        root: u32::try_from(row.try_get::<i64, _>(0)?).map_err(|_| sqlx::Error::RowNotFound)?,
        name: row.try_get(1)?,
        identity: row.try_get(2)?,
        columns: row.try_get(3)?,
    })
}

impl Identity {
    fn problem(self, needed: &BTreeSet<&str>, file: String, line: usize) -> Option<IdentityProblem> {
        if self.identity == "f" {
            return None;
        }
        if self.columns.is_empty() {
            return Some(IdentityProblem::None { file, line, table: self.name });
        }
        let missing: Vec<&str> = needed
            .iter()
            .filter(|column| !self.columns.iter().any(|known| known == *column))
            .copied()
            .collect();
        (!missing.is_empty()).then(|| IdentityProblem::Columns {
            file,
            line,
            table: self.name,
            columns: missing.join(", "),
        })
    }
}
