//! Named places where tests make a real process die, hang or slow down.
//!
//! Armed by the environment variable `FAILPOINTS`, a list of `name=action` or `name=action@N` separated by `;`:
//!
//! | Action | Effect at the failpoint |
//! |---|---|
//! | `kill` | the process kills itself with SIGKILL: no destructor runs, nothing is flushed |
//! | `sleep(500ms)` | waits that long |
//! | `pause` | waits for ever |
//!
//! With `@N` the action happens at the N-th hit only, counted from 1; without, at every hit.

mod plan;

use std::{
    collections::HashMap,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

pub use plan::FailpointError;
use plan::{Action, Plan};

/// The environment variable that arms failpoints.
pub const VARIABLE: &str = "FAILPOINTS";

static ANY_ARMED: AtomicBool = AtomicBool::new(false);
static ARMED: OnceLock<HashMap<String, Failpoint>> = OnceLock::new();

struct Failpoint {
    plan: Plan,
    hits: AtomicU64,
}

/// Arms the failpoints named by [`VARIABLE`], all of which must be `known`; warns in the log if there are any.
///
/// To be called once, at the start of a process.
///
/// # Errors
///
/// When the variable cannot be read as failpoints or names an unknown one.
pub fn init(known: &[&str]) -> Result<(), FailpointError> {
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(()) };
    let plans = plan::parse(&text.to_string_lossy(), known)?;
    if plans.is_empty() {
        return Ok(());
    }
    for (name, plan) in &plans {
        tracing::warn!(failpoint = name, action = ?plan.action, at_hit = plan.at_hit, "failpoint {name} is armed");
    }
    let armed =
        plans.into_iter().map(|(name, plan)| (name, Failpoint { plan, hits: AtomicU64::new(0) })).collect();
    if ARMED.set(armed).is_ok() {
        ANY_ARMED.store(true, Ordering::Release);
    }
    Ok(())
}

/// Marks a place where a fault may be injected; costs one relaxed atomic load when nothing is armed.
///
/// Cancel-safe: a cancelled hit has been counted.
#[inline]
pub async fn hit(name: &str) {
    if ANY_ARMED.load(Ordering::Relaxed) {
        hit_armed(name).await;
    }
}

async fn hit_armed(name: &str) {
    let Some(failpoint) = ARMED.get().and_then(|armed| armed.get(name)) else { return };
    let hit = failpoint.hits.fetch_add(1, Ordering::Relaxed) + 1;
    if failpoint.plan.at_hit.is_some_and(|at_hit| at_hit != hit) {
        return;
    }
    tracing::warn!(failpoint = name, action = ?failpoint.plan.action, hit, "failpoint {name} fires");
    match failpoint.plan.action {
        Action::Kill => kill_self(),
        Action::Sleep(duration) => tokio::time::sleep(duration).await,
        Action::Pause => std::future::pending().await,
    }
}

fn kill_self() -> ! {
    // SIGKILL to oneself is delivered before the call returns; if it was refused, abort is the nearest thing.
    let _refused = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::abort()
}
