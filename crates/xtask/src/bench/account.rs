//! Where the time goes, by the programs' own account.

use super::numbers::milliseconds;
use crate::daemon::Daemon;

/// The steps of the relay and of the subscriber: what people call them, and the histogram.
const RELAY: [(&str, &str); 3] = [
    ("claim", "relay_claim_seconds"),
    ("publish", "relay_publish_seconds"),
    ("settle", "relay_settle_seconds"),
];
const SUBSCRIBER: [(&str, &str); 1] = [("apply in Redis", "subscriber_apply_seconds")];

/// Time and number of each step so far.
#[derive(Debug)]
pub struct Account {
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    name: &'static str,
    seconds: f64,
    times: f64,
}

impl Account {
    /// As it stands.
    pub async fn of(relay: &Daemon, subscriber: &Daemon) -> anyhow::Result<Self> {
        let mut steps = read(relay, &RELAY).await?;
        steps.extend(read(subscriber, &SUBSCRIBER).await?);
        Ok(Self { steps })
    }

    /// As it stands before the relay starts.
    pub async fn before_relay(subscriber: &Daemon) -> anyhow::Result<Self> {
        let mut steps: Vec<Step> =
            RELAY.iter().map(|&(name, _)| Step { name, seconds: 0.0, times: 0.0 }).collect();
        steps.extend(read(subscriber, &SUBSCRIBER).await?);
        Ok(Self { steps })
    }

    /// What each step took on average since another account.
    pub fn since(&self, before: &Self) -> String {
        let steps = self.steps.iter().zip(&before.steps).map(|(now, before)| {
            let times = now.times - before.times;
            let mean = if times > 0.0 { (now.seconds - before.seconds) / times * 1e3 } else { 0.0 };
            format!("{} {} ({times:.0} ×)", now.name, milliseconds(mean))
        });
        steps.collect::<Vec<_>>().join(", ")
    }
}

async fn read(daemon: &Daemon, histograms: &[(&'static str, &str)]) -> anyhow::Result<Vec<Step>> {
    let mut steps = Vec::new();
    for (name, histogram) in histograms {
        let seconds = daemon.metric(&format!("{histogram}_sum")).await?;
        steps.push(Step { name, seconds, times: daemon.metric(&format!("{histogram}_count")).await? });
    }
    Ok(steps)
}
