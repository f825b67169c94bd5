use std::time::Duration;

use outbox::capture::{self as recorded, Position};
use rules::catalog::{self, CatalogError, ExpandError, Expander};
use rules::{Rules, TableRules};
use service::Component;
use sqlx::PgPool;
use wal::Lsn;
use wal::publication::{self, Drift, PublicationError, Tables};
use wal::session::{ChangeStream, Identity, Session, SessionError, Settings, SettingsError, StreamOptions};
use wal::slot::{self, ServerFacts, SlotError, SlotState};

use super::Capture;
use super::events::of_missing_changes;
use super::gap::{self, Gap};
use crate::config::CaptureConfig;
use crate::database::{PATIENCE, within};

/// How long Postgres waits for a sign of life before it gives the slot to another relay. The relay speaks every second.
const WAL_SENDER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long connecting may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// How long Postgres may take to change the publication, which waits for others that change its tables.
const PUBLICATION_PATIENCE: Duration = Duration::from_secs(30);

/// How often to look whether Postgres is still creating the slot.
const CREATION_INTERVAL: Duration = Duration::from_secs(5);

/// A program that is no relay reads the slot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("slot {slot} is read by '{reader}', process {pid} of the server, which is no relay")]
pub struct ReadElsewhere {
    slot: String,
    reader: String,
    pid: i32,
}

impl ReadElsewhere {
    /// Looks at who reads the slot. A process that has just left is nobody.
    pub fn find(slot: &str, state: &SlotState) -> Option<Self> {
        let (pid, reader) = (state.active_pid?, state.reader.clone()?);
        // The second creates the slot.
        let is_relay =
            [super::APPLICATION_NAME, crate::database::APPLICATION_NAME].contains(&reader.as_str());
        (!is_relay).then(|| Self { slot: slot.to_owned(), reader, pid })
    }
}

/// Why the log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    ReadElsewhere(#[from] ReadElsewhere),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Publication(#[from] PublicationError),
    #[error("Postgres failed")]
    Database(#[from] sqlx::Error),
    #[error(
        "{file}:{line}: table {table}: expand names no namespaces, so that there is nothing to invalidate when the log does not \
         say what changed; add the beginnings of its keys, such as namespaces = [\"order:\"], or capture this table by \
         triggers"
    )]
    NoNamespaces { file: String, line: usize, table: String },
    #[error(
        "{file}:{line}: table {table}: the key begins with a column, so that there is no namespace to invalidate when the log \
         does not say what changed; begin it with a literal, such as \"user:\", or capture this table by triggers"
    )]
    NoBeginning { file: String, line: usize, table: String },
    #[error(transparent)]
    Rules(#[from] CatalogError),
    #[error(transparent)]
    Expand(#[from] ExpandError),
    #[error("this server is a standby; WAL capture reads from the primary")]
    Standby,
    #[error("cannot declare stale what the publication hid")]
    Stale(#[from] outbox::EnqueueError),
    #[error(transparent)]
    Gap(#[from] Gap),
}

/// A stream that goes on where the last one ended.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) stream: ChangeStream,
    /// Which relation has which rules.
    pub(super) tables: Tables,
    /// What runs `expand`, in the order of the rules.
    pub(super) expanders: Vec<Option<Expander>>,
    /// Timeline of the server whose log it is.
    pub(super) timeline: i64,
}

/// Tells if a failure before anything runs may pass by itself: the server went away.
pub fn is_passing(error: &OpenError) -> bool {
    match error {
        OpenError::Database(error) => crate::database::is_interruption(error),
        OpenError::Standby => true,
        _ => false,
    }
}

/// What can be known to be wrong before anything runs: better an error now than a relay that is never ready.
///
/// # Errors
/// [`OpenError`].
pub async fn preflight(pool: &PgPool, config: &CaptureConfig, rules: &Rules) -> Result<(), OpenError> {
    let facts = slot::server_facts(pool).await?;
    if facts.is_standby {
        return Err(OpenError::Standby);
    }
    if facts.wal_level != "logical" {
        return Err(SlotError::WalLevel(facts.wal_level).into());
    }
    check_rules(pool, rules).await?;
    // Of a slot that exists somebody may be reading: whoever opens it looks at the publication.
    if slot::find(pool, &config.slot).await?.is_none() {
        ready_publication(pool, config, rules).await?;
    }
    Ok(())
}

/// Whether the rules fit the database, and the log holds what they need.
///
/// # Errors
/// [`OpenError`].
pub async fn check_rules(pool: &PgPool, rules: &Rules) -> Result<(), OpenError> {
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
    {
        let mut connection = pool.acquire().await?;
        let facts = catalog::check(&mut connection, rules).await?;
        catalog::check_identity(&mut connection, rules, &facts).await?;
    }
    for expander in catalog::expanders(pool, rules).await?.iter().flatten() {
        expander.rehearse(pool).await?;
    }
    Ok(())
}

/// Makes the publication be as it should. If it was not, changes are missing from the log, and the namespaces of their
/// tables are declared stale together with the correction.
async fn ready_publication(
    pool: &PgPool,
    config: &CaptureConfig,
    rules: &Rules,
) -> Result<Tables, OpenError> {
    let name = &config.publication;
    wal::check_name(name).map_err(PublicationError::Name)?;
    let tables = publication::resolve(pool, rules).await?;
    let Some(drift) = publication::drift(pool, name, &tables).await? else { return Ok(tables) };
    // A table without a replica identity would refuse its writers as soon as it is published.
    check_rules(pool, rules).await?;
    if let Drift::Differs(affected) = &drift {
        let tables = affected.iter().filter_map(|&index| rules.tables().get(index));
        let tables: Vec<String> = tables.map(TableRules::qualified_name).collect();
        tracing::warn!(
            affected = tables.join(", "),
            "publication {name} {drift}; correcting it, and declaring every key stale that the rules of affected tables can name"
        );
    }
    let mut tx = pool.begin().await?;
    let affected = publication::correct(&mut tx, name, rules, &drift).await?;
    let affected = affected.iter().filter_map(|&index| rules.tables().get(index));
    let stale: Vec<_> = affected.flat_map(of_missing_changes).collect();
    outbox::enqueue_through_wal(&mut tx, &stale).await?;
    tx.commit().await?;
    tracing::info!(publication = name, tables = rules.tables().len(), "set up the publication");
    Ok(tables)
}

/// Makes publication and slot ready, makes sure that nothing is missing since the log was last read, and begins.
pub(super) async fn open(
    capture: &Capture,
    streaming: bool,
    unreadable: Option<Lsn>,
    health: &Component,
) -> Result<Opened, OpenError> {
    let pool = &capture.shared.pool;
    let config = &capture.config;
    let facts = within(PATIENCE, slot::server_facts(pool)).await?;
    if facts.is_standby {
        return Err(OpenError::Standby);
    }
    // Read before the slot and again after it: meanwhile another relay may create the slot, or read on and die.
    let known = within(PATIENCE, recorded::position(pool, &config.slot)).await?;
    let existing = within(PATIENCE, slot::find(pool, &config.slot)).await?;
    if let Some(state) = &existing {
        slot::check(&config.slot, state, &facts)?;
        if let Some(foreign) = ReadElsewhere::find(&config.slot, state) {
            return Err(foreign.into());
        }
        if let Some(pid) = state.active_pid {
            return Err(SessionError::SlotActive(format!("process {pid}")).into());
        }
    }
    // Before the slot: what is decoded is looked up in the catalog as it was at that point of the log.
    let tables = within(PUBLICATION_PATIENCE, ready_publication(pool, config, &capture.rules)).await?;
    let expanders = within(PUBLICATION_PATIENCE, catalog::expanders(pool, &capture.rules)).await?;
    let settings = Settings::parse(capture.servers.current_url(), super::APPLICATION_NAME)?;
    let mut session = Session::open(&settings, WAL_SENDER_TIMEOUT, CONNECT_PATIENCE).await?;
    let identity = in_time(session.identify()).await?;
    let before = match known {
        Some(_) => within(PATIENCE, recorded::position(pool, &config.slot)).await?,
        None => None,
    };
    let found = gap::find(before.as_ref(), existing.as_ref(), &identity, unreadable);
    match found {
        Some(gap) => gap::close(capture, gap, existing, &identity, health).await?,
        None => {
            // The position was forgotten: what is missing is accepted, and the slot still cannot be read.
            let dead = existing.as_ref().is_some_and(|state| unreadable == Some(state.confirmed));
            if dead {
                slot::discard(pool, &config.slot).await?;
            }
            let existing = existing.filter(|_| !dead);
            ready_slot(capture, &facts, before, existing, &identity, health).await?;
        }
    }
    let options = StreamOptions {
        slot: &config.slot,
        publication: &config.publication,
        server_version: facts.version,
        streaming,
    };
    let stream = in_time(session.start(&options)).await?;
    Ok(Opened { stream, tables, expanders, timeline: identity.timeline })
}

/// The replication connection may go silent at any moment, and nothing else would notice.
async fn in_time<T>(answer: impl Future<Output = Result<T, SessionError>>) -> Result<T, SessionError> {
    let answered = tokio::time::timeout(CONNECT_PATIENCE, answer).await;
    answered.unwrap_or(Err(SessionError::TimedOut(CONNECT_PATIENCE)))
}

/// After this the slot exists and its position is recorded. There must be no gap.
async fn ready_slot(
    capture: &Capture,
    facts: &ServerFacts,
    before: Option<Position>,
    existing: Option<SlotState>,
    identity: &Identity,
    health: &Component,
) -> Result<(), OpenError> {
    let pool = &capture.shared.pool;
    let name = &capture.config.slot;
    let begins_at = match existing {
        Some(state) => state.confirmed,
        None => {
            warn_of_limits(facts);
            create_slot(capture, health).await?
        }
    };
    let unchanged =
        before.is_some_and(|before| before.timeline == identity.timeline && before.confirmed >= begins_at.0);
    if !unchanged {
        let position = position(identity, begins_at);
        within(PATIENCE, recorded::begin(pool, name, &position)).await?;
    }
    Ok(())
}

/// Creates the slot. Not ready meanwhile, and alive for as long as Postgres is at it: a restart would begin to wait anew.
pub(super) async fn create_slot(capture: &Capture, health: &Component) -> Result<Lsn, SlotError> {
    let (pool, name) = (&capture.shared.pool, &capture.config.slot);
    let waits = format!("creating slot {name}; Postgres waits for all transactions that are open");
    tracing::info!("{waits}");
    health.not_ready(waits);
    let creating = slot::create(pool, name);
    tokio::pin!(creating);
    let created = loop {
        tokio::select! {
            created = &mut creating => break created?,
            () = tokio::time::sleep(CREATION_INTERVAL) => {
                let found = within(PATIENCE, slot::find(pool, name)).await;
                if found.is_ok_and(|state| state.is_some_and(|state| state.active_pid.is_some())) {
                    health.beat();
                }
            }
        }
    };
    tracing::info!(slot = name, position = %created, "created the slot; changes are captured from here on");
    Ok(created)
}

pub(super) fn position(identity: &Identity, confirmed: Lsn) -> Position {
    Position { system_id: identity.system_id.clone(), timeline: identity.timeline, confirmed: confirmed.0 }
}

fn warn_of_limits(facts: &ServerFacts) {
    if facts.keep_limit_mb.is_none() {
        tracing::warn!(
            "max_slot_wal_keep_size is not set: while no relay reads the slot, Postgres keeps log until the disk is full"
        );
    }
}
