//! The example service, as its clients see it.

use std::path::Path;

use anyhow::{Context, ensure};

use super::stage::PATIENCE;
use crate::daemon::Daemon;
use crate::pair::Ground;
use crate::wait;

/// How a write tells the cache.
#[derive(Debug, Clone, Copy)]
pub enum Mode {
    /// After the commit.
    Default,
    /// Before it.
    Strict,
}

/// The service as a process.
#[derive(Debug)]
pub struct Service(Daemon);

impl Service {
    /// Starts it and waits until it serves.
    pub async fn start(ground: &Ground, program: &Path) -> anyhow::Result<Self> {
        let service = Self(ground.spawn_service(program)?);
        let serves = wait::until("the example service serves", PATIENCE, async || {
            // Nobody has this number.
            Ok((service.0.request("GET", "/users/0", "").await?.0 == 404).then_some(()))
        });
        serves.await.with_context(|| service.0.process().log())?;
        Ok(service)
    }

    /// Where a user is.
    pub fn url(&self, user: i32) -> String {
        format!("{}/users/{user}", self.0.http_url())
    }

    /// The name of a user.
    pub async fn name(&self, user: i32) -> anyhow::Result<String> {
        let (status, body) = self.0.request("GET", &format!("/users/{user}"), "").await?;
        ensure!(status == 200, "GET answers {status}: {}", self.0.process().log());
        let user: serde_json::Value = serde_json::from_str(&body)?;
        Ok(user["name"].as_str().context("a user without a name")?.to_owned())
    }

    /// Renames a user.
    pub async fn rename(&self, user: i32, name: &str, mode: Mode) -> anyhow::Result<()> {
        let body = serde_json::json!({ "name": name }).to_string();
        let mode = match mode {
            Mode::Default => "default",
            Mode::Strict => "strict",
        };
        let (status, _) = self.0.request("PUT", &format!("/users/{user}?mode={mode}"), &body).await?;
        ensure!(status == 204, "PUT answers {status}: {}", self.0.process().log());
        Ok(())
    }
}
