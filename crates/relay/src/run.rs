use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use service::nats::Nats;
use service::{Health, HttpServer, Limits, Metrics, Shutdown, drain};
use tokio::sync::{Notify, watch};
use tokio_util::task::TaskTracker;

use crate::keeper::Keeper;
use crate::worker::{self, Shared};
use crate::{Config, answers, database, gauges, stream};

/// Connections besides those of the workers: keeper, gauges, answers.
const EXTRA_CONNECTIONS: u32 = 2;

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
    let url = config.database_url()?;
    let pool = database::connect(url, config.workers + EXTRA_CONNECTIONS, config.startup_timeout).await?;
    database::check_schema(&pool, url).await?;
    let nats = Nats::connect(&config.nats, "relay", config.startup_timeout).await?;
    let jetstream = jetstream_context(&nats, &config);
    stream::ensure(&jetstream, &config, nats.client.server_info().max_payload).await?;

    let metrics = Metrics::install()?;
    crate::metrics::describe();
    let health = Health::new();
    let limits = Limits { stall_after: Some(STALL_AFTER), dead_after: Some(DEAD_AFTER) };
    let http = HttpServer::start(config.http_addr, health.clone(), metrics).await?;

    let (stream_sender, stream_receiver) = watch::channel(None);
    let suspect = Arc::new(Notify::new());
    let keeper = Keeper {
        pool: pool.clone(),
        nats: nats.clone(),
        jetstream: jetstream.clone(),
        stream: stream_sender,
        suspect: Arc::clone(&suspect),
        config: config.clone(),
    };
    let shared = Arc::new(Shared {
        pool: pool.clone(),
        nats: nats.clone(),
        jetstream,
        stream: stream_receiver,
        suspect_stream: suspect,
        more: Notify::new(),
        config: config.clone(),
    });
    let tasks = TaskTracker::new();
    tasks.spawn(keeper.run(health.component("stream", limits), shutdown.clone()));
    tasks.spawn(worker::poll(Arc::clone(&shared), health.component("poll", limits), shutdown.clone()));
    for helper in 1..config.workers {
        let component = health.component("help", limits);
        component.ready();
        tasks.spawn(worker::help(Arc::clone(&shared), component, helper == 1, shutdown.clone()));
    }
    tasks.spawn(gauges::run(pool.clone(), shutdown.clone()));
    tasks.spawn(answer(pool.clone(), nats.clone(), shutdown.clone()));
    tasks.close();
    tracing::info!(database = %url, nats = %config.nats.nats_url, http = %http.local_addr(), workers = config.workers, "relay runs");

    shutdown.requested().await;
    health.draining();
    drain("claims in flight", async { tasks.wait().await }, config.service.drain_timeout).await;
    http.stop().await;
    pool.close().await;
    Ok(())
}

async fn answer(pool: sqlx::PgPool, nats: Nats, shutdown: Shutdown) {
    if let Err(error) = answers::run(pool, nats, shutdown).await {
        tracing::error!(%error, "cannot answer subscribers; they will apply their gap policy when in doubt");
    }
}

/// JetStream whose acknowledgements time out with the claim.
#[must_use]
pub fn jetstream_context(nats: &Nats, config: &Config) -> jetstream::Context {
    jetstream::context::ContextBuilder::new()
        .timeout(config.publish_timeout)
        .ack_timeout(config.publish_timeout)
        .build(nats.client.clone())
}
