use std::time::Duration;

use outbox::capture::{self as recorded, Position, Record};
use rules::Rules;
use rules::catalog::{self, CatalogError, ExpandError, Expander};
use service::Component;
use sqlx::PgPool;
use wal::Lsn;
use wal::publication::{PublicationError, Refusal, Tables};
use wal::session::{ChangeStream, Identity, Session, SessionError, Settings, SettingsError, StreamOptions};
use wal::slot::{self, ServerFacts, SlotError, SlotState};

use super::Capture;
use super::gap::{self, Beginning, Gap};
use super::publishing::{check_rules, ready_publication};
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
    #[error(
        "cannot publish the tables of the rules: their writers would fail: {}; alter these tables, or capture them by triggers",
        listed(.0)
    )]
    Writers(Vec<Refusal>),
    #[error("cannot declare stale what the publication hid")]
    Stale(#[from] outbox::EnqueueError),
    #[error(transparent)]
    Gap(#[from] Gap),
}

fn listed(refusals: &[Refusal]) -> String {
    refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
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
    check_rules(pool, config, rules).await?;
    // Of a slot that exists somebody may be reading: whoever opens it looks at the publication.
    if slot::find(pool, &config.slot).await?.is_none() {
        let record = recorded::find(pool, &config.slot).await?;
        ready_publication(pool, config, rules, record.as_ref()).await?;
    }
    Ok(())
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
    let known = within(PATIENCE, recorded::find(pool, &config.slot)).await?;
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
    let published =
        within(PUBLICATION_PATIENCE, ready_publication(pool, config, &capture.rules, known.as_ref())).await?;
    let expanders = within(PUBLICATION_PATIENCE, catalog::expanders(pool, &capture.rules)).await?;
    capture.servers.reload();
    let settings = Settings::parse(&capture.servers.current_url(), super::APPLICATION_NAME)?;
    let mut session = Session::open(&settings, WAL_SENDER_TIMEOUT, CONNECT_PATIENCE).await?;
    let identity = in_time(session.identify()).await?;
    let record = within(PATIENCE, recorded::find(pool, &config.slot)).await?;
    if known.is_none() && record.is_some() {
        return Err(SessionError::SlotActive("another relay has just begun".to_owned()).into());
    }
    let beginning = gap::decide(record.as_ref(), existing.as_ref(), &identity, unreadable, config.gap_policy);
    let begun = Begun { identity: &identity, publication: &published.fingerprint };
    match beginning {
        Beginning::Halted(gap) => return Err(gap.into()),
        Beginning::First => begin_first(capture, &facts, &begun, health).await?,
        Beginning::Resumed => resume(capture, record, existing, &begun, &mut session).await?,
        Beginning::Anew { cause, keeps_slot } => {
            let kept = existing.as_ref().filter(|_| keeps_slot);
            gap::begin_anew(capture, &cause, kept, &begun, health).await?;
        }
    }
    let options = StreamOptions {
        slot: &config.slot,
        publication: &config.publication,
        server_version: facts.version,
        streaming,
    };
    let stream = in_time(session.start(&options)).await?;
    Ok(Opened { stream, tables: published.tables, expanders, timeline: identity.timeline })
}

/// What is recorded when reading begins.
pub(super) struct Begun<'a> {
    identity: &'a Identity,
    /// Fingerprint of the publication.
    publication: &'a str,
}

impl Begun<'_> {
    /// Records that everything before `at` is published, or was declared stale.
    pub(super) async fn record(&self, capture: &Capture, at: Lsn) -> Result<(), sqlx::Error> {
        let Identity { system_id, timeline, .. } = self.identity;
        let position = Position { system_id: system_id.clone(), timeline: *timeline, confirmed: at.0 };
        let (pool, slot) = (&capture.shared.pool, &capture.config.slot);
        within(PATIENCE, recorded::begin(pool, slot, &position, self.publication)).await
    }
}

/// Creates the slot of a database that nobody has read yet.
async fn begin_first(
    capture: &Capture,
    facts: &ServerFacts,
    begun: &Begun<'_>,
    health: &Component,
) -> Result<(), OpenError> {
    warn_of_limits(facts);
    let begins_at = create_slot(capture, health).await?;
    Ok(begun.record(capture, begins_at).await?)
}

/// Goes on with the slot that was read, on whatever server it is by now.
async fn resume(
    capture: &Capture,
    record: Option<Record>,
    existing: Option<SlotState>,
    begun: &Begun<'_>,
    session: &mut Session,
) -> Result<(), OpenError> {
    let (Some(Record { position: before, .. }), Some(state)) = (record, existing) else { return Ok(()) };
    if state.failover == Some(false) {
        // Without it capture works as well, until there is a failover.
        if let Err(error) = in_time(session.keep_on_standbys(&capture.config.slot)).await {
            tracing::warn!(error = %service::Report::of(&error), "cannot let standbys keep a copy of the slot; a failover will be a gap");
        }
    }
    let unchanged = before.timeline == begun.identity.timeline && before.confirmed >= state.confirmed.0;
    if unchanged { Ok(()) } else { Ok(begun.record(capture, state.confirmed).await?) }
}

/// The replication connection may go silent at any moment, and nothing else would notice.
async fn in_time<T>(answer: impl Future<Output = Result<T, SessionError>>) -> Result<T, SessionError> {
    let answered = tokio::time::timeout(CONNECT_PATIENCE, answer).await;
    answered.unwrap_or(Err(SessionError::TimedOut(CONNECT_PATIENCE)))
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

fn warn_of_limits(facts: &ServerFacts) {
    if facts.keep_limit_mb.is_none() {
        tracing::warn!(
            "max_slot_wal_keep_size is not set: while no relay reads the slot, Postgres keeps log until the disk is full"
        );
    }
}
