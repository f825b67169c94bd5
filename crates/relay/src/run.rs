use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use rules::Rules;
use service::nats::{Nats, NatsError};
use service::{Health, HttpServer, Limits, Metrics, Patience, Report, Shutdown, UsageError, drain};
use tokio::sync::{Notify, watch};
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use wal::session::Settings;

use crate::capture::{self, Capture};
use crate::config::Source;
use crate::database::{Access, DatabaseError, Servers};
use crate::heartbeat::{self, LastClaim};
use crate::keeper::Keeper;
use crate::republisher::Republisher;
use crate::stream::StreamError;
use crate::worker::{self, Shared};
use crate::{Config, answers, database, gauges, stream};

/// Connections besides those of the workers: keeper, republisher, gauges and answers.
const EXTRA_CONNECTIONS: u32 = 3;

/// Connections of the reader of the log: gate, settling, monitor.
const CAPTURE_CONNECTIONS: u32 = 3;

/// Time for one attempt to connect to NATS at the start.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

/// Without a turn of its loop for this long a component is not ready.
const STALL_AFTER: Duration = Duration::from_secs(30);

/// Without a turn of its loop for this long the process should be restarted.
const DEAD_AFTER: Duration = Duration::from_mins(5);

/// Runs the relay until shutdown is requested, then finishes the claims in flight.
///
/// # Errors
/// What is wrong with the configuration or the surroundings at the start, naming what to fix. Later trouble is waited
/// out.
pub async fn run(config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    let metrics = Metrics::install()?;
    crate::metrics::describe();
    crate::metrics::start_at_zero();
    let health = Health::new();
    let startup = health.component("startup", Limits::default());
    let http = HttpServer::start(config.http_addr, health.clone(), metrics).await?;
    let opening = Patience::new(config.startup_timeout).persist(&startup, is_passing, || open(&config));
    let Some(opened) = shutdown.or_done(Box::pin(opening)).await else {
        tracing::info!("stopped while starting");
        return Ok(());
    };
    let Opened { servers, access, pool, nats, jetstream, owner, wal } = opened?;
    let limits = Limits { stall_after: Some(STALL_AFTER), dead_after: Some(DEAD_AFTER) };

    let (stream_sender, stream_receiver) = watch::channel(Err("the stream was not looked at yet".to_owned()));
    let (suspect, lacking) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let keeper = Keeper {
        pool: pool.clone(),
        nats: nats.clone(),
        jetstream: jetstream.clone(),
        stream: stream_sender,
        suspect: Arc::clone(&suspect),
        lacking: Arc::clone(&lacking),
        relay: Uuid::now_v7(),
        owner,
        config: config.clone(),
    };
    let shared = Arc::new(Shared {
        pool: pool.clone(),
        nats: nats.clone(),
        jetstream,
        stream: stream_receiver,
        suspect_stream: suspect,
        last_claim: LastClaim::default(),
        more: Notify::new(),
        config: config.clone(),
    });
    let tasks = TaskTracker::new();
    tasks.spawn(keeper.run(health.component("stream", limits), shutdown.clone()));
    let republisher = Republisher { shared: Arc::clone(&shared), lacking };
    tasks.spawn(republisher.run(health.component("republish", limits), shutdown.clone()));
    if config.capture.has(Source::Outbox) {
        tasks.spawn(worker::poll(Arc::clone(&shared), health.component("poll", limits), shutdown.clone()));
        for helper in 1..config.workers {
            let component = health.component("help", limits);
            component.ready();
            tasks.spawn(worker::help(Arc::clone(&shared), component, helper == 1, shutdown.clone()));
        }
    }
    if let Some(rules) = wal {
        let capture = Arc::new(Capture {
            shared: Arc::clone(&shared),
            config: config.capture.clone(),
            rules,
            servers: servers.clone(),
            reading: capture::Reading::default(),
        });
        tasks.spawn(capture::run(Arc::clone(&capture), health.component("wal", limits), shutdown.clone()));
        tasks.spawn(capture::monitor(capture, health.component("slot", limits), shutdown.clone()));
    }
    if let Some(interval) = config.heartbeat() {
        let claims = config.capture.has(Source::Outbox);
        tasks.spawn(heartbeat::run(Arc::clone(&shared), interval, claims, shutdown.clone()));
    }
    tasks.spawn(servers.pilot(pool.clone(), access, shutdown.clone()));
    tasks.spawn(gauges::run(pool.clone(), shutdown.clone()));
    tasks.spawn(answer(pool.clone(), nats.clone(), shutdown.clone()));
    tasks.close();
    startup.ready();
    tracing::info!(database = %config.database_url()?, nats = %nats.url(), http = %http.local_addr(), workers = config.workers, "relay runs");

    shutdown.requested().await;
    health.draining();
    drain("claims in flight", async { tasks.wait().await }, config.service.drain_timeout).await;
    http.stop().await;
    database::close(&pool).await;
    Ok(())
}

/// What the relay works with.
struct Opened {
    servers: Servers,
    access: Access,
    pool: sqlx::PgPool,
    nats: Nats,
    jetstream: jetstream::Context,
    owner: Option<String>,
    wal: Option<Arc<Rules>>,
}

/// Connects to both servers and looks whether they are what the relay needs. Nothing to be undone when it is dropped.
async fn open(config: &Config) -> anyhow::Result<Opened> {
    let url = config.database_url()?;
    let servers = Servers::parse(&url)?.from_file(config.database_url_file.clone());
    let wal = config.capture.has(Source::Wal).then(|| prepare_capture(config, &servers)).transpose()?;
    let connections =
        config.workers + EXTRA_CONNECTIONS + if wal.is_some() { CAPTURE_CONNECTIONS } else { 0 };
    let access = if config.transaction_pooler { Access::WritePooled } else { Access::Write };
    let pool = database::connect(&servers, connections, access).await?;
    database::check_schema(&pool, &url).await?;
    if let Some(rules) = &wal {
        capture::preflight(&pool, &config.capture, rules).await?;
    }
    let nats = Nats::connect(&config.nats, "relay", CONNECT_PATIENCE).await?;
    let jetstream = jetstream_context(&nats, config);
    let owner = owner(&pool).await;
    stream::ensure(&nats, &jetstream, config, owner.as_deref(), nats.link()).await?;
    Ok(Opened { servers, access, pool, nats, jetstream, owner, wal })
}

/// The name of the database that the stream is to carry.
async fn owner(pool: &sqlx::PgPool) -> Option<String> {
    match database::within(database::PATIENCE, outbox::stream::database(pool)).await {
        Ok(name) => Some(name),
        Err(error) => {
            tracing::warn!(
                error = %Report::of(&error),
                "cannot tell this database from others: a stream of another database is not noticed; grant execute on function \
                 pg_control_system to the relay"
            );
            None
        }
    }
}

/// Tells if a failure to start may pass without anybody doing something: a server is away.
fn is_passing(error: &anyhow::Error) -> bool {
    let database = error.downcast_ref().is_some_and(DatabaseError::is_passing);
    let nats = matches!(error.downcast_ref(), Some(NatsError::Unreachable { .. }));
    let stream = match error.downcast_ref() {
        Some(StreamError::Look(cause) | StreamError::Create(cause)) => cause.may_pass(),
        _ => false,
    };
    let capture = error.downcast_ref().is_some_and(capture::is_passing);
    database || nats || stream || capture
}

/// Everything about the reader of the log that can be wrong without asking anybody.
fn prepare_capture(config: &Config, servers: &Servers) -> anyhow::Result<Arc<Rules>> {
    let Some(file) = &config.capture.rules else {
        let missing = "RELAY_RULES (--rules) is not set; --source wal needs the rules file";
        return Err(UsageError(missing.to_owned()).into());
    };
    let rules = Arc::new(Rules::load(file).map_err(|error| UsageError::of(&error))?);
    let check_name = |option: &str, name: &str| {
        wal::check_name(name).map_err(|error| UsageError(format!("{option}: {error}")))
    };
    check_name("RELAY_SLOT (--slot)", &config.capture.slot)?;
    check_name("RELAY_PUBLICATION (--publication)", &config.capture.publication)?;
    Settings::parse(&servers.current_url(), capture::APPLICATION_NAME)?;
    Ok(rules)
}

async fn answer(pool: sqlx::PgPool, nats: Nats, shutdown: Shutdown) {
    if let Err(error) = answers::run(pool, nats, shutdown).await {
        tracing::error!(error = %Report::of(&error), "cannot answer subscribers; they will apply their gap policy when in doubt");
    }
}

/// JetStream whose acknowledgements time out with the claim.
#[must_use]
pub fn jetstream_context(nats: &Nats, config: &Config) -> jetstream::Context {
    nats.jetstream(config.publish_timeout)
}
