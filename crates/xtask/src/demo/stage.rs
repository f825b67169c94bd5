//! The servers and programs the scenes play with, and what a service does with them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use outbox::Event;

use super::service::Service;
use super::timeline::Zero;
use crate::daemon::Daemon;
use crate::observer::Memory;
use crate::pair::Ground;

/// How long anything may take before the demo fails; a hundred times what it takes.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How many users there are.
const USERS: i32 = 1000;

/// Everything on the stage.
#[derive(Debug)]
pub struct Stage {
    /// The servers.
    pub ground: Ground,
    /// The relay that works at the moment.
    pub relay: Daemon,
    /// The subscriber.
    pub subscriber: Daemon,
    /// The example service.
    pub service: Service,
    /// Sees deletions in Redis.
    pub deletions: Memory,
}

/// A committed change of a user.
#[derive(Debug, Clone, Copy)]
pub struct Committed {
    /// When the transaction began.
    pub began: Instant,
    /// When the event was in the outbox, not yet committed.
    pub enqueued: Instant,
    /// When COMMIT had returned.
    pub at: Zero,
}

impl Stage {
    /// Starts relay, subscriber and the example service beside the servers, and fills its table.
    pub async fn set(ground: Ground, example: &Path) -> anyhow::Result<Self> {
        let (relay, subscriber) = ground.spawn_pair().await?;
        let service = Service::start(&ground, example).await?;
        sqlx::query("insert into users select n, 'user ' || n from generate_series(1, $1) n")
            .bind(USERS)
            .execute(&ground.pool)
            .await?;
        let deletions = Memory::start(ground.stack.redis.address()).await?;
        let stage = Self { ground, relay, subscriber, service, deletions };
        // The first of everything opens connections and warms caches; nobody wants to see that.
        for _ in 0..20 {
            stage.commit_and_wait(USERS).await?;
        }
        Ok(stage)
    }

    /// Caches what a reader would have loaded.
    pub async fn fill(&self, user: i32, name: &str) -> anyhow::Result<()> {
        let value = format!("{{\"name\":\"{name}\"}}");
        self.ground.stack.redis.command(&["SET", &key(user), &value]).await.map(drop)
    }

    /// The cached profile of a user.
    pub async fn cached(&self, user: i32) -> anyhow::Result<Option<String>> {
        let value = self.ground.stack.redis.command(&["GET", &key(user)]).await?;
        Ok((!value.is_empty()).then_some(value))
    }

    /// Renames a user and enqueues the key, in one transaction.
    pub async fn commit(&self, user: i32, name: &str) -> anyhow::Result<Committed> {
        let began = Instant::now();
        let mut tx = self.ground.pool.begin().await?;
        sqlx::query("update users set name = $1 where id = $2")
            .bind(name)
            .bind(user)
            .execute(&mut *tx)
            .await?;
        outbox::enqueue(&mut tx, &Event::delete([key(user)])?).await?;
        let enqueued = Instant::now();
        tx.commit().await?;
        Ok(Committed { began, enqueued, at: Zero::now() })
    }

    /// The same, but thinks better of it.
    pub async fn roll_back(&self, user: i32, name: &str) -> anyhow::Result<Zero> {
        let mut tx = self.ground.pool.begin().await?;
        sqlx::query("update users set name = $1 where id = $2")
            .bind(name)
            .bind(user)
            .execute(&mut *tx)
            .await?;
        outbox::enqueue(&mut tx, &Event::delete([key(user)])?).await?;
        tx.rollback().await?;
        Ok(Zero::now())
    }

    /// Fills, commits, waits for the deletion, and says how many milliseconds it came after the commit.
    pub async fn commit_and_wait(&self, user: i32) -> anyhow::Result<f64> {
        self.fill(user, "before").await?;
        let before = self.deletions.deletions(&key(user)).len();
        let committed = self.commit(user, "after").await?;
        let deleted = self.deletions.next_deletion(&key(user), before, PATIENCE).await?;
        Ok(committed.at.until(deleted))
    }

    /// How many events wait in the outbox.
    pub async fn waiting(&self) -> anyhow::Result<i64> {
        let backlog =
            outbox::backlog::measure(&self.ground.pool, 1000).await.context("cannot count the backlog")?;
        Ok(backlog.events)
    }
}

/// The key of a user's profile.
pub fn key(user: i32) -> String {
    format!("user:{user}:profile")
}

/// Which servers these are.
pub async fn versions(ground: &Ground) -> anyhow::Result<String> {
    let postgres: String = sqlx::query_scalar("show server_version").fetch_one(&ground.pool).await?;
    let postgres = postgres.split_whitespace().next().unwrap_or_default();
    let nats = async_nats::connect(ground.stack.nats_url()).await?.server_info().version;
    let redis = ground.stack.redis.command(&["INFO", "server"]).await?;
    let redis = redis.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or_default().trim();
    Ok(format!("Postgres {postgres} → NATS {nats} → Redis {redis}"))
}
