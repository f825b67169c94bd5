//! Spans to an OpenTelemetry collector, as OTLP over plain HTTP.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use opentelemetry_otlp::{ExporterBuildError, Protocol, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use tokio::runtime::Handle;

/// The path of the traces signal below a collector's base URL, by the OTLP specification.
const TRACES_PATH: &str = "/v1/traces";

/// How long one batch may take to reach the collector.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why an endpoint is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EndpointError {
    #[error("only http:// is spoken: send to a collector beside this process, and let it speak TLS")]
    NotHttp,
}

/// Checks and completes a collector's base URL; empty means none.
pub(crate) fn parse_endpoint(text: &str) -> Result<String, EndpointError> {
    let base = text.trim().trim_end_matches('/');
    if base.is_empty() || base.ends_with(TRACES_PATH) && base.starts_with("http://") {
        return Ok(base.to_owned());
    }
    if base.starts_with("http://") { Ok(format!("{base}{TRACES_PATH}")) } else { Err(EndpointError::NotHttp) }
}

/// Exports spans in the background, on the current Tokio runtime, under the given service name.
///
/// Sampling, headers and batch sizes follow OpenTelemetry's own variables (`OTEL_TRACES_SAMPLER`,
/// `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_BSP_*`).
pub(crate) fn provider(
    service: &'static str,
    endpoint: &str,
) -> Result<SdkTracerProvider, ExporterBuildError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signals_path_is_added_to_a_base_url_once() {
        let expected = Ok("http://collector:4318/v1/traces".to_owned());
        for text in ["http://collector:4318", "http://collector:4318/", "http://collector:4318/v1/traces"] {
            assert_eq!(parse_endpoint(text), expected);
        }
    }

    #[test]
    fn an_empty_endpoint_is_none_and_tls_is_refused() {
        assert_eq!(parse_endpoint(" "), Ok(String::new()));
        assert_eq!(parse_endpoint("https://collector:4318/v1/traces"), Err(EndpointError::NotHttp));
        assert_eq!(parse_endpoint("collector:4317"), Err(EndpointError::NotHttp));
    }
}
