//! Spans to an OpenTelemetry collector, as OTLP over plain HTTP.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{Protocol, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use tokio::runtime::Handle;
use tracing::Metadata;
use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};

/// How long one batch may take to reach the collector.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// The client of the collector cannot be built.
pub type ExportError = opentelemetry_otlp::ExporterBuildError;

/// Exports spans in the background.
#[derive(Debug)]
pub(crate) struct Spans(SdkTracerProvider);

impl Spans {
    /// Exports on the current Tokio runtime, under the given service name.
    ///
    /// Sampling, headers and batch sizes follow OpenTelemetry's own variables (`OTEL_TRACES_SAMPLER`,
    /// `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_BSP_*`).
    pub(crate) fn export(service: &'static str, endpoint: &str) -> Result<Self, ExportError> {
        provider(service, endpoint).map(Self)
    }

    /// Returns what takes the spans of the process.
    pub(crate) fn layer<S>(&self, service: &'static str) -> Box<dyn Layer<S> + Send + Sync>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let tracer = self.0.tracer(service);
        tracing_opentelemetry::layer().with_tracer(tracer).with_filter(filter_fn(is_ours)).boxed()
    }

    /// Exports what is left, for no longer than `limit`.
    pub(crate) fn flush(self, limit: Duration) {
        if let Err(error) = self.0.shutdown_with_timeout(limit) {
            tracing::warn!(error = %error, "the last spans could not be exported");
        }
    }
}

/// The client that exports spans must not make spans of its own, which would be exported in turn.
fn is_ours(metadata: &Metadata<'_>) -> bool {
    const EXPORT: [&str; 4] = ["hyper", "reqwest", "opentelemetry", "tower"];
    !EXPORT.iter().any(|target| metadata.target().starts_with(target))
}

fn provider(service: &'static str, endpoint: &str) -> Result<SdkTracerProvider, ExportError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .build()?;
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(service);
    }
    let exporter = RuntimeExporter {
        exporter: Arc::new(exporter),
        runtime: Handle::current(),
        failing: Arc::new(AtomicBool::new(false)),
    };
    Ok(SdkTracerProvider::builder().with_resource(resource.build()).with_batch_exporter(exporter).build())
}

/// Runs the exporter on the Tokio runtime: the SDK calls it from a thread of its own, where the HTTP client would find
/// no reactor. Also says when the collector cannot be reached, once per outage, as the SDK is silent about it.
#[derive(Debug)]
struct RuntimeExporter {
    exporter: Arc<opentelemetry_otlp::SpanExporter>,
    runtime: Handle,
    failing: Arc<AtomicBool>,
}

impl SpanExporter for RuntimeExporter {
    fn export(&self, batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        let exporter = Arc::clone(&self.exporter);
        let failing = Arc::clone(&self.failing);
        let task = self.runtime.spawn(async move {
            let result = exporter.export(batch).await;
            report(&failing, &result);
            result
        });
        async move { task.await.unwrap_or_else(|error| Err(OTelSdkError::InternalFailure(error.to_string()))) }
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(exporter) = Arc::get_mut(&mut self.exporter) {
            exporter.set_resource(resource);
        }
    }
}

fn report(failing: &AtomicBool, result: &OTelSdkResult) {
    let failed_before = failing.swap(result.is_err(), Ordering::Relaxed);
    match result {
        Err(error) if !failed_before => {
            tracing::warn!(error = %error, "spans cannot be exported and are dropped until they can");
        }
        Ok(()) if failed_before => tracing::info!("spans are exported again"),
        _ => {}
    }
}
