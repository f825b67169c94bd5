//! Sees keys disappear from Redis, as it happens.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::task::JoinHandle;

use crate::resp::{Connection, Reply};
use crate::wait;

/// Lines of the Redis configuration that make deletions observable: key-event messages for generic commands.
pub const CONFIGURATION: &str = "notify-keyspace-events Eg";

/// The channel of deletions in database 0.
const CHANNEL: &str = "__keyevent@0__:del";

/// Watches on a connection of its own until it is dropped.
#[derive(Debug)]
pub struct Observer {
    task: JoinHandle<()>,
}

impl Observer {
    /// Calls `on_deleted` with each key that is deleted from now on, and the moment the news arrived.
    pub async fn start(
        redis: SocketAddr,
        mut on_deleted: impl FnMut(&str, Instant) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let mut connection = Connection::open(redis).await?;
        connection.command(&["SUBSCRIBE", CHANNEL]).await.context("cannot watch deletions")?;
        let task = tokio::spawn(async move {
            // Ends with the server.
            while let Ok(message) = connection.read().await {
                if let Some(key) = deleted_key(&message) {
                    on_deleted(key, Instant::now());
                }
            }
        });
        Ok(Self { task })
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `message <channel> <key>`
fn deleted_key(message: &Reply) -> Option<&str> {
    match message {
        Reply::Array(elements) => match elements.as_slice() {
            [_, _, Reply::Text(key)] => Some(key),
            _ => None,
        },
        _ => None,
    }
}

/// An observer that remembers what it saw.
#[derive(Debug)]
pub struct Memory {
    seen: Arc<Mutex<HashMap<String, Vec<Instant>>>>,
    _observer: Observer,
}

impl Memory {
    /// Remembers every deletion from now on.
    pub async fn start(redis: SocketAddr) -> anyhow::Result<Self> {
        let seen = Arc::new(Mutex::new(HashMap::<String, Vec<Instant>>::new()));
        let of_task = Arc::clone(&seen);
        let observer = Observer::start(redis, move |key, at| {
            let mut seen = of_task.lock().unwrap_or_else(PoisonError::into_inner);
            seen.entry(key.to_owned()).or_default().push(at);
        })
        .await?;
        Ok(Self { seen, _observer: observer })
    }

    /// When a key was deleted, every time.
    pub fn deletions(&self, key: &str) -> Vec<Instant> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(key).cloned().unwrap_or_default()
    }

    /// Waits for the next deletion of a key that was deleted `before` times, and says when it happened.
    pub async fn next_deletion(
        &self,
        key: &str,
        before: usize,
        deadline: Duration,
    ) -> anyhow::Result<Instant> {
        let what = format!("{key} is deleted from Redis");
        wait::until(&what, deadline, async || Ok(self.deletions(key).get(before).copied())).await
    }
}
