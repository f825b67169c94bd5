//! The rules against the database, and the publication made to fit them.

use outbox::capture::{self as recorded, Record};
use rules::catalog::{self, Facts};
use rules::{Rules, TableRules};
use sqlx::PgPool;
use wal::publication::{self, Drift, Fingerprint, PublicationError, Tables};

use super::events::of_missing_changes;
use super::opening::OpenError;
use crate::config::CaptureConfig;

/// How long a rehearsal waits for the lock of a table. Writers are not kept waiting by it.
const REHEARSAL_LOCK_TIMEOUT: &str = "set local lock_timeout = '2s'";

/// A publication as it should be.
#[derive(Debug)]
pub(super) struct Published {
    /// Which relation has which rules.
    pub(super) tables: Tables,
    /// Fingerprint of the publication.
    pub(super) fingerprint: String,
}

/// Checks that the rules fit the database, that the log holds what they need, and that no writer fails once the tables
/// are published.
///
/// # Errors
/// [`OpenError`].
pub async fn check_rules(pool: &PgPool, config: &CaptureConfig, rules: &Rules) -> Result<(), OpenError> {
    for table in rules.tables() {
        let place = |line| (rules.file().to_owned(), line, table.qualified_name());
        if let Some(template) = table.keys.iter().find(|template| !template.value.begins_literally()) {
            let (file, line, table) = place(template.line);
            return Err(OpenError::NoBeginning { file, line, table });
        }
        if let Some(expand) = table.expand.iter().find(|expand| expand.namespaces.is_empty()) {
            let (file, line, table) = place(expand.sql.line);
            return Err(OpenError::NoNamespaces { file, line, table });
        }
    }
    let facts = {
        let mut connection = pool.acquire().await?;
        let facts = catalog::check(&mut connection, rules).await?;
        catalog::check_identity(&mut connection, rules, &facts).await?;
        facts
    };
    rehearse(pool, &config.publication, rules, &facts).await?;
    for expander in catalog::expanders(pool, rules).await?.iter().flatten() {
        expander.rehearse(pool).await?;
    }
    Ok(())
}

/// Tries in a transaction that is rolled back what the publication does to writers. Nothing is tried if the role may not
/// make the publication, or if somebody holds a lock for longer.
async fn rehearse(pool: &PgPool, name: &str, rules: &Rules, facts: &[Facts]) -> Result<(), OpenError> {
    let tables = publication::resolve(pool, rules).await?;
    let drift = publication::drift(pool, name, &tables).await?;
    let mut tx = pool.begin().await?;
    sqlx::raw_sql(REHEARSAL_LOCK_TIMEOUT).execute(&mut *tx).await?;
    if let Some(drift) = drift {
        match publication::correct(&mut tx, name, rules, &drift).await {
            Ok(_) => {}
            Err(
                PublicationError::NotPermitted { .. }
                | PublicationError::TooWide(_)
                | PublicationError::Busy(_),
            ) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    let refusals = publication::rehearse(&mut tx, facts).await?;
    tx.rollback().await?;
    if refusals.is_empty() { Ok(()) } else { Err(OpenError::Writers(refusals)) }
}

/// Makes the publication be as it should. If it was not, or was not in between, changes are missing from the log: the
/// namespaces of their tables are declared stale together with the correction.
pub(super) async fn ready_publication(
    pool: &PgPool,
    config: &CaptureConfig,
    rules: &Rules,
    record: Option<&Record>,
) -> Result<Published, OpenError> {
    let name = &config.publication;
    wal::check_name(name).map_err(PublicationError::Name)?;
    let tables = publication::resolve(pool, rules).await?;
    let drift = publication::drift(pool, name, &tables).await?;
    let now = Fingerprint::take(&mut *pool.acquire().await?, name).await?;
    let known = record.and_then(|record| record.publication.as_deref());
    let hidden = now.as_ref().map_or(Vec::new(), |now| hidden_since(known, now, &tables));
    if let (None, [], Some(now)) = (&drift, hidden.as_slice(), now.map(|now| now.to_string()))
        && (record.is_none() || known == Some(&now))
    {
        return Ok(Published { tables, fingerprint: now });
    }
    // A table without a replica identity would refuse its writers as soon as it is published.
    check_rules(pool, config, rules).await?;
    let mut tx = pool.begin().await?;
    let mut affected = match &drift {
        Some(drift) => publication::correct(&mut tx, name, rules, drift).await?,
        None => Vec::new(),
    };
    affected.extend(hidden);
    affected.sort_unstable();
    affected.dedup();
    let affected: Vec<&TableRules> = affected.iter().filter_map(|&index| rules.tables().get(index)).collect();
    let stale: Vec<_> = affected.iter().flat_map(|table| of_missing_changes(table)).collect();
    outbox::enqueue_through_wal(&mut tx, &stale).await?;
    let fingerprint = Fingerprint::take(&mut tx, name).await?.map(|now| now.to_string()).unwrap_or_default();
    recorded::record_publication(&mut tx, &config.slot, &fingerprint).await?;
    tx.commit().await?;
    tell(name, drift.as_ref(), &affected);
    Ok(Published { tables, fingerprint })
}

/// Indexes of the rules whose tables the publication may have left out since its fingerprint was recorded. Nothing is
/// known of the time before a release that recorded it.
pub(super) fn hidden_since(known: Option<&str>, now: &Fingerprint, tables: &Tables) -> Vec<usize> {
    let known = known.and_then(|known| known.parse::<Fingerprint>().ok());
    known.map_or(Vec::new(), |known| now.changed_since(&known, tables))
}

fn tell(name: &str, drift: Option<&Drift>, affected: &[&TableRules]) {
    let tables: Vec<String> = affected.iter().map(|table| table.qualified_name()).collect();
    let state = drift.map_or("is as it should be".to_owned(), ToString::to_string);
    match drift {
        Some(Drift::Missing) => {
            tracing::info!(publication = name, tables = tables.len(), "set up the publication");
        }
        _ if tables.is_empty() => tracing::info!(publication = name, "recorded the state of the publication"),
        _ => tracing::warn!(
            affected = tables.join(", "),
            "somebody changed publication {name}, which {state}; corrected, and declared every key stale that the rules of \
             affected tables can name"
        ),
    }
}
