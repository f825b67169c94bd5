//! The HTTP server for operators: `/metrics`, `/livez`, `/readyz`.

mod listener;
mod probe;

use std::{io, net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::listener::BoundedListener;
pub use self::probe::{NotReady, ask_ready};
use crate::{Health, Metrics};

/// How long requests in progress may keep [`HttpServer::stop`] waiting.
const STOP_LIMIT: Duration = Duration::from_secs(1);

const INDEX: &str = "/metrics (Prometheus), /livez, /readyz\n";

/// The running server; it stops when this is dropped or [`HttpServer::stop`]ped.
///
/// It serves on while the process drains, so that a probe still gets an answer: stop it last.
#[derive(Debug)]
pub struct HttpServer {
    local_addr: SocketAddr,
    stop: DropGuard,
    task: JoinHandle<()>,
}

/// The server cannot start.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {addr} (set by HTTP_ADDR or --http-addr)")]
pub struct HttpError {
    addr: SocketAddr,
    #[source]
    source: io::Error,
}

#[derive(Clone)]
struct Served {
    health: Health,
    metrics: Metrics,
}

impl HttpServer {
    /// Starts to listen and serve in the background; also does the metrics' upkeep. Port 0 takes any free port.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened on.
    pub async fn start(addr: SocketAddr, health: Health, metrics: Metrics) -> Result<Self, HttpError> {
        let failed = |source| HttpError { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, Served { health, metrics }, stop.clone()));
        tracing::info!(%local_addr, "serving /metrics, /livez and /readyz on http://{local_addr}");
        Ok(Self { local_addr, stop: stop.drop_guard(), task })
    }

    /// The address it listens on, with the port that was chosen.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Stops listening and gives requests in progress a moment to finish.
    pub async fn stop(self) {
        let Self { stop, mut task, .. } = self;
        drop(stop);
        if timeout(STOP_LIMIT, &mut task).await.is_err() {
            task.abort();
        }
    }
}

async fn serve(listener: TcpListener, served: Served, stop: CancellationToken) {
    let metrics = served.metrics.clone();
    let server = axum::serve(BoundedListener::new(listener), router(served))
        .with_graceful_shutdown(stop.cancelled_owned());
    tokio::select! {
        result = server => {
            if let Err(error) = result {
                tracing::error!(error = %error, "the HTTP server stopped");
            }
        }
        () = metrics.keep_up() => {}
    }
}

fn router(served: Served) -> Router {
    Router::new()
        .route("/", get(|| async { INDEX }))
        .route("/metrics", get(render_metrics))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .with_state(served)
}

async fn render_metrics(State(served): State<Served>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], served.metrics.render())
}

async fn live(State(served): State<Served>) -> impl IntoResponse {
    let snapshot = served.health.snapshot();
    let dead = snapshot.components.iter().filter(|component| !component.live);
    let body: String = dead
        .map(|component| format!("{}: no progress for {} s\n", component.name, component.silent.as_secs()))
        .collect();
    if snapshot.is_live() {
        (StatusCode::OK, "live\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, body)
    }
}

async fn ready(State(served): State<Served>) -> impl IntoResponse {
    let snapshot = served.health.snapshot();
    let status = if snapshot.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{}\n", snapshot.to_json()))
}
