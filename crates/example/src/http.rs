use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use cache::{Redis, RedisConfig};
use outbox::CommitError;
use serde::Deserialize;
use service::{SecretUrl, ServiceOptions, Shutdown};
use sqlx::postgres::PgPoolOptions;
use tokio::net::TcpListener;

use crate::users::PutError;
use crate::{Mode, User, Users};

/// How long a write may wait for Redis to answer.
const REDIS_TIMEOUT: Duration = Duration::from_secs(1);

/// Options of the service.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// The database of users, which has the outbox
    #[arg(
        long,
        env = "DATABASE_URL",
        hide_env_values = true,
        default_value = "postgres://postgres@127.0.0.1/postgres"
    )]
    pub database_url: SecretUrl,

    /// The Redis that the subscriber invalidates
    #[arg(long, env = "REDIS_URL", hide_env_values = true, default_value = "redis://127.0.0.1:6379")]
    pub redis_url: SecretUrl,

    /// Where to serve
    #[arg(long, env = "HTTP_ADDR", default_value = "127.0.0.1:8080")]
    pub http_addr: SocketAddr,

    /// Logs, traces and draining.
    #[command(flatten)]
    pub service: ServiceOptions,
}

/// Serves until shutdown is requested.
///
/// # Errors
/// If database, Redis or address cannot be used.
pub async fn run(config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    let pool = PgPoolOptions::new().max_connections(20).connect(config.database_url.expose()).await?;
    let redis = RedisConfig {
        url: config.redis_url.expose().to_owned(),
        response_timeout: REDIS_TIMEOUT,
        ..Default::default()
    };
    let users = Users::new(pool, Redis::new(redis)?);
    users.migrate().await?;
    let listener = TcpListener::bind(config.http_addr).await?;
    tracing::info!(http = %listener.local_addr()?, "serving users");
    axum::serve(listener, router(users))
        .with_graceful_shutdown(async move { shutdown.requested().await })
        .await?;
    Ok(())
}

fn router(users: Users) -> Router {
    Router::new().route("/users/{id}", get(get_user).put(put_user)).with_state(users)
}

async fn get_user(State(users): State<Users>, Path(id): Path<i64>) -> Result<Json<User>, StatusCode> {
    match users.get(id).await {
        Ok(Some(user)) => Ok(Json(user)),
        Ok(None) => Err(StatusCode::NOT_FOUND),
        Err(error) => {
            tracing::warn!(%error, id, "could not read a user");
            Err(StatusCode::SERVICE_UNAVAILABLE)
        }
    }
}

#[derive(Deserialize)]
struct Parameters {
    #[serde(default)]
    mode: Mode,
}

async fn put_user(
    State(users): State<Users>,
    Path(id): Path<i64>,
    Query(Parameters { mode }): Query<Parameters>,
    Json(user): Json<User>,
) -> StatusCode {
    // In a task of its own: a client that hangs up would cut the write off halfway.
    let write = tokio::spawn(async move { users.put(id, &user, mode).await });
    match write.await {
        Ok(Ok(_)) => StatusCode::NO_CONTENT,
        Ok(Err(error)) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::warn!(%error, cause, id, "a user was not written, or perhaps was");
            match error {
                PutError::Commit(CommitError::Unknown(_)) => StatusCode::ACCEPTED,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            }
        }
        Err(_panicked) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
