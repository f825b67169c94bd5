//! What health looked like at one moment, and how it is shown.

use std::time::Duration;

use serde_json::{Value, json};

/// The health of all components at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthSnapshot {
    /// The process finishes what it has and takes no new work.
    pub draining: bool,
    /// In the order in which they were added.
    pub components: Vec<ComponentSnapshot>,
}

/// The health of one component at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComponentSnapshot {
    /// The name it was added under.
    pub name: &'static str,
    /// What it declared, or that it has stalled.
    pub state: State,
    /// Why it is not ready, or what it is busy with, for people.
    pub reason: Option<String>,
    /// Time since its last sign of progress; zero while it is idle.
    pub silent: Duration,
    /// Whether its silence is still within its `dead_after`.
    pub live: bool,
}

/// The state of a component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has not declared anything yet.
    Starting,
    /// It does its job.
    Ready,
    /// It declared that it cannot do its job.
    NotReady,
    /// It declared itself ready and has made no progress within its `stall_after`.
    Stalled,
}

impl State {
    /// The name of the state in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::NotReady => "not_ready",
            Self::Stalled => "stalled",
        }
    }
}

impl HealthSnapshot {
    /// Whether the process can do its job and wants to.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let all_ready = self.components.iter().all(|component| component.state == State::Ready);
        !self.draining && !self.components.is_empty() && all_ready
    }

    /// Whether all loops still turn; if not, only a restart helps.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.components.iter().all(|component| component.live)
    }

    /// The body of `/readyz`: `{"ready":…,"draining":…,"checks":[{"name":…,"state":…,"reason":…}]}`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let check = |component: &ComponentSnapshot| {
            json!({
                "name": component.name,
                "state": component.state.as_str(),
                "reason": component.reason,
                "live": component.live,
            })
        };
        let checks: Vec<Value> = self.components.iter().map(check).collect();
        json!({ "ready": self.is_ready(), "draining": self.draining, "checks": checks })
    }
}
