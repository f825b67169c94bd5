use std::time::Duration;

use cache::{Cache, CacheConfig, Redis};
use outbox::{CommitError, Committed, Event, Writer};
use serde::{Deserialize, Serialize};
use sqlx::{PgPool, Postgres, Transaction};

/// How long a profile is served from Redis if nobody changes it.
const TTL: Duration = Duration::from_secs(300);

/// A profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// What the user is called.
    pub name: String,
}

/// How a write tells the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Invalidate after the commit: always possible, stale for a moment.
    #[default]
    Default,
    /// Mark before the commit: never stale, impossible without Redis.
    Strict,
}

/// The users, cached. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Users {
    pool: PgPool,
    cache: Cache,
    writer: Writer,
}

impl Users {
    /// Users in this database, cached in this Redis.
    #[must_use]
    pub fn new(pool: PgPool, redis: Redis) -> Self {
        let writer = Writer::new(redis.clone());
        Self { pool, cache: Cache::new(redis, CacheConfig::default()), writer }
    }

    /// Creates the table, if it is not there.
    ///
    /// # Errors
    /// Whatever the database says.
    pub async fn migrate(&self) -> Result<(), sqlx::Error> {
        // Two instances that start at once must not both create it.
        let sql = "begin; select pg_advisory_xact_lock(7526871);
                   create table if not exists users (id bigint primary key, name text not null); commit";
        sqlx::raw_sql(sql).execute(&self.pool).await.map(drop)
    }

    /// The user, if there is one. Also that there is none is cached.
    ///
    /// # Errors
    /// Whatever the database says; trouble with Redis is none.
    pub async fn get(&self, id: i64) -> Result<Option<User>, sqlx::Error> {
        self.cache.get_or_load(key(id), TTL, || self.load(id)).await
    }

    async fn load(&self, id: i64) -> Result<Option<User>, sqlx::Error> {
        let name = sqlx::query_scalar("select name from users where id = $1")
            .bind(id)
            .fetch_optional(&self.pool)
            .await?;
        Ok(name.map(|name| User { name }))
    }

    /// Creates or replaces the user.
    ///
    /// # Errors
    /// [`CommitError`], or whatever else the database says, in which case nothing has changed.
    pub async fn put(&self, id: i64, user: &User, mode: Mode) -> Result<Committed, PutError> {
        let tx = self.write(id, user).await?;
        let events = [Event::delete([key(id)]).expect("a number makes a valid key")];
        let committed = match mode {
            Mode::Default => self.writer.commit_and_invalidate(tx, &events).await,
            Mode::Strict => self.writer.commit_strict(tx, &events).await,
        };
        Ok(committed?)
    }

    async fn write(&self, id: i64, user: &User) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        sqlx::query("insert into users values ($1, $2) on conflict (id) do update set name = excluded.name")
            .bind(id)
            .bind(&user.name)
            .execute(&mut *tx)
            .await?;
        Ok(tx)
    }
}

fn key(id: i64) -> String {
    format!("user:{id}:profile")
}

/// Why a user was not written, or perhaps was.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// Before the commit: nothing has changed.
    #[error("could not write the user")]
    Write(#[from] sqlx::Error),
    /// At the commit.
    #[error(transparent)]
    Commit(#[from] CommitError),
}
