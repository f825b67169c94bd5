//! The process's metrics, in Prometheus' text format.

mod process;

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Buckets of histograms whose names end in `_seconds`: from 250 µs, below a local round trip, to 60 s, beyond every
/// timeout.
const SECONDS: &[f64] = &[
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];

/// Buckets of all other histograms (events, keys, bytes): powers of four up to a mebibyte, the usual largest message.
const SIZES: &[f64] =
    &[1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0];

/// How often histograms' pending samples are folded in, which bounds their memory between scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

static INSTALLED: Mutex<Option<Metrics>> = Mutex::new(None);

/// The installed metrics of the process, ready to be rendered; clones share them.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

/// Metrics cannot be recorded.
#[derive(Debug, thiserror::Error)]
#[error("cannot install the metrics recorder")]
pub struct MetricsError(#[source] BuildError);

impl Metrics {
    /// Makes the macros of the `metrics` crate record here; later calls return the same metrics.
    ///
    /// # Errors
    ///
    /// When another recorder is installed already.
    pub fn install() -> Result<Self, MetricsError> {
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(metrics) = &*installed {
            return Ok(metrics.clone());
        }
        let handle = PrometheusBuilder::new()
            .set_buckets(SIZES)
            .and_then(|builder| {
                builder.set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS)
            })
            .and_then(PrometheusBuilder::install_recorder)
            .map_err(MetricsError)?;
        Ok(installed.insert(Self { handle }).clone())
    }

    /// All metrics, with those of the process itself (`process_*`) read at this moment.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = self.handle.render();
        process::render(&mut text);
        text
    }

    /// Does the periodic upkeep, for ever. Cancel-safe.
    pub async fn keep_up(&self) {
        let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
        loop {
            interval.tick().await;
            self.handle.run_upkeep();
        }
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Metrics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_and_sizes_are_rendered_in_their_own_buckets() {
        let installed = Metrics::install().unwrap();
        let again = Metrics::install().expect("installing twice gives the same metrics");
        ::metrics::histogram!("demo_wait_seconds").record(0.000_3);
        ::metrics::histogram!("demo_batch_events").record(100.0);
        ::metrics::counter!("demo_events_total").increment(7);
        installed.handle.run_upkeep();
        let text = again.render();
        for line in [
            "demo_wait_seconds_bucket{le=\"0.00025\"} 0",
            "demo_wait_seconds_bucket{le=\"0.0005\"} 1",
            "demo_wait_seconds_bucket{le=\"60\"} 1",
            "demo_batch_events_bucket{le=\"64\"} 0",
            "demo_batch_events_bucket{le=\"256\"} 1",
            "demo_events_total 7",
        ] {
            assert!(text.lines().any(|rendered| rendered == line), "{line} in:\n{text}");
        }
    }
}
