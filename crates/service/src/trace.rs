//! Trace context across processes, as the W3C `traceparent` text that events and messages carry.
//!
//! Without an OTLP endpoint there is no trace: parents are ignored and there is no current one.

use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState},
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Characters of a version 00 `traceparent`: version, trace id, span id, flags.
const LENGTH: usize = 55;

/// Whether the text is a valid `traceparent` by the W3C Trace Context recommendation.
#[must_use]
pub fn is_valid(traceparent: &str) -> bool {
    parse(traceparent).is_some()
}

/// Makes `span` a child of the span that `traceparent` names; an invalid text changes nothing.
///
/// To be called right after the span's creation, as a span that has been entered has its parent for good. Returns
/// whether the parent was set, which it never is without an OTLP endpoint.
pub fn parent_from(span: &Span, traceparent: &str) -> bool {
    parse(traceparent)
        .is_some_and(|parent| span.set_parent(Context::new().with_remote_span_context(parent)).is_ok())
}

/// Links `span` to the span that `traceparent` names: for work on many events, each with a trace of its own.
pub fn link_from(span: &Span, traceparent: &str) {
    if let Some(linked) = parse(traceparent) {
        span.add_link(linked);
    }
}

/// The `traceparent` of the current span, to be sent along; `None` without an OTLP endpoint or outside of a span.
#[must_use]
pub fn current_traceparent() -> Option<String> {
    let context = Span::current().context();
    let span = context.span();
    let span = span.span_context();
    let text = || format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8());
    span.is_valid().then(text)
}

fn parse(text: &str) -> Option<SpanContext> {
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let (known, later) = text.split_at_checked(LENGTH)?;
    let mut parts = known.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let lengths_fit = (version.len(), trace.len(), span.len(), flags.len()) == (2, 32, 16, 2);
    // Later versions may append fields; version ff is forbidden.
    let version_fits =
        if version == "00" { later.is_empty() } else { later.is_empty() || later.starts_with('-') };
    if !lengths_fit
        || !version_fits
        || version == "ff"
        || ![version, trace, span, flags].into_iter().all(is_hex)
    {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn only_what_the_recommendation_allows_is_valid() {
        for valid in [
            PARENT,
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
            "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-comes-later",
        ] {
            assert!(is_valid(valid), "{valid}");
        }
        for invalid in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.more",
            "00-0af7651916cd43dd8448eb211c80319-cb7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333é-01",
        ] {
            assert!(!is_valid(invalid), "{invalid}");
        }
    }

    #[test]
    fn without_tracing_there_is_no_traceparent_and_no_parent() {
        assert_eq!(current_traceparent(), None);
        assert!(!parent_from(&tracing::info_span!("work"), PARENT));
    }

    #[test]
    fn a_child_span_carries_its_parents_trace_on() {
        let tracer = SdkTracerProvider::builder().build().tracer("test");
        let subscriber =
            tracing_subscriber::registry().with(tracing_opentelemetry::layer().with_tracer(tracer));
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("work");
            assert!(parent_from(&span, PARENT));
            let sent = span.in_scope(current_traceparent).expect("a span of a trace");
            assert!(is_valid(&sent), "{sent}");
            assert_eq!(sent[..36], PARENT[..36], "same trace");
            assert_ne!(sent[36..52], PARENT[36..52], "own span");
            assert!(!parent_from(&tracing::info_span!("work"), "nonsense"));
        });
    }
}
