//! What a publication does to the writers of its tables: Postgres refuses an UPDATE or DELETE that it could not put into
//! the log as the publication wants it.

use rules::catalog::{Facts, Relation};
use sqlx::{PgConnection, PgPool, Row};

/// A statement of a writer that Postgres refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{table}: {said}")]
pub struct Refusal {
    /// The table.
    pub table: String,
    /// What Postgres says.
    pub said: String,
}

/// Runs each statement and returns what failed. Each in a subtransaction, so that one does not hide the next; and none
/// waits for long, since there may be thousands.
const REHEARSAL: &str = "set local lock_timeout = '100ms';
    create function pg_temp.outbox_rehearse(statements text[])
    returns table (place int, code text, said text) language plpgsql as $rehearse$
    declare detail text;
    begin
        for nth in 1 .. coalesce(cardinality(statements), 0) loop
            begin
                execute statements[nth];
            exception when others then
                get stacked diagnostics code = returned_sqlstate, said = message_text, detail = pg_exception_detail;
                place := nth;
                said := concat_ws(': ', said, nullif(detail, ''));
                return next;
            end;
        end loop;
    end $rehearse$";

/// Has Postgres judge an UPDATE and a DELETE of every table and partition that holds rows, as it would those of a writer:
/// they are explained, not run. In the caller's transaction, in which the publication may just have been made, and which
/// the caller rolls back. What the role may not do, or somebody has locked, is not judged.
///
/// # Errors
/// Whatever the database says.
pub async fn rehearse(tx: &mut PgConnection, facts: &[Facts]) -> Result<Vec<Refusal>, sqlx::Error> {
    let (tables, statements): (Vec<String>, Vec<String>) = facts.iter().flat_map(statements).unzip();
    match sqlx::raw_sql(REHEARSAL).execute(&mut *tx).await {
        // A role that may create nothing temporary cannot rehearse.
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42501") => {
            return Ok(Vec::new());
        }
        created => created?,
    };
    let rows = sqlx::query("select place, code, said from pg_temp.outbox_rehearse($1)")
        .persistent(false)
        .bind(statements)
        .fetch_all(tx)
        .await?;
    let mut refusals: Vec<Refusal> = Vec::new();
    for row in &rows {
        // insufficient_privilege, lock_not_available, undefined_table: dropped meanwhile
        if ["42501", "55P03", "42P01"].contains(&row.try_get::<&str, _>(1)?) {
            continue;
        }
        let place = usize::try_from(row.try_get::<i32, _>(0)?).unwrap_or_default();
        let Some(table) = place.checked_sub(1).and_then(|place| tables.get(place)) else { continue };
        // Of a table the first refusal is enough.
        if refusals.last().is_none_or(|last| last.table != *table) {
            refusals.push(Refusal { table: table.clone(), said: row.try_get(2)? });
        }
    }
    Ok(refusals)
}

/// Statements that change no row, each with the name of its table. A column may always be set to its default, a generated
/// one as well.
fn statements(facts: &Facts) -> Vec<(String, String)> {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let relations = facts.relations.iter().filter(|relation| relation.holds_rows);
    let of_relation = |relation: &Relation| {
        let name = format!("{}.{}", relation.schema, relation.name);
        let table = format!("{}.{}", quoted(&relation.schema), quoted(&relation.name));
        let update = facts.columns.first().map(|column| {
            format!("explain update {table} set {} = default where false", quoted(&column.name))
        });
        let delete = format!("explain delete from {table} where false");
        update.into_iter().chain([delete]).map(move |statement| (name.clone(), statement))
    };
    relations.flat_map(of_relation).collect()
}

/// Tables of the publication, partitions included, whose UPDATE and DELETE Postgres refuses by now: somebody has dropped
/// the primary key, or added a virtual generated column under REPLICA IDENTITY FULL. Read from the catalog, since a
/// rehearsal locks. At most `limit`.
///
/// # Errors
/// Whatever the database says.
pub async fn refused_writers(pool: &PgPool, name: &str, limit: i64) -> Result<Vec<Refusal>, sqlx::Error> {
    let rows = sqlx::query(
        "select c.oid::regclass::text,
            case when c.relreplident = 'f' then 'its replica identity is FULL and it has a virtual generated column'
                else 'it has no replica identity' end
         from pg_publication_tables t
         join pg_namespace n on n.nspname = t.schemaname
         join pg_class c on c.relnamespace = n.oid and c.relname = t.tablename and c.relkind = 'r'
         where t.pubname = $1 and case c.relreplident
            when 'f' then exists (select from pg_attribute a
                where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = 'v')
            else not exists (select from pg_index i
                where i.indrelid = c.oid and i.indisvalid and i.indimmediate
                and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end) end
         order by 1 limit $2",
    )
    .persistent(false)
    .bind(name)
    .bind(limit)
    .fetch_all(pool)
    .await?;
    rows.iter().map(|row| Ok(Refusal { table: row.try_get(0)?, said: row.try_get(1)? })).collect()
}
