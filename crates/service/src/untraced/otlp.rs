//! Stands in for the exporter of spans in builds without the feature `otlp`: to name a collector is an error.

use std::time::Duration;

use tracing_subscriber::Layer;

/// A collector was named, and this program cannot export to it.
#[derive(Debug, thiserror::Error)]
#[error("this program was built without the feature `otlp`; build it with the feature or name no collector")]
pub struct ExportError;

/// Never made.
#[derive(Debug)]
pub(crate) enum Spans {}

impl Spans {
    pub(crate) fn export(_service: &'static str, _endpoint: &str) -> Result<Self, ExportError> {
        Err(ExportError)
    }

    pub(crate) fn layer<S>(&self, _service: &'static str) -> Box<dyn Layer<S> + Send + Sync> {
        match *self {}
    }

    pub(crate) fn flush(self, _limit: Duration) {
        match self {}
    }
}
