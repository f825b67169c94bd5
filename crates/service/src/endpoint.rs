//! Address of an OpenTelemetry collector.

/// The path of the traces signal below a collector's base URL, by the OTLP specification.
const TRACES_PATH: &str = "/v1/traces";

/// Why an endpoint is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EndpointError {
    #[error("only http:// is spoken: send to a collector beside this process, and let it speak TLS")]
    NotHttp,
}

/// Checks and completes a collector's base URL; empty means none.
pub(crate) fn parse(text: &str) -> Result<String, EndpointError> {
    let base = text.trim().trim_end_matches('/');
    if base.is_empty() || base.ends_with(TRACES_PATH) && base.starts_with("http://") {
        return Ok(base.to_owned());
    }
    if base.starts_with("http://") { Ok(format!("{base}{TRACES_PATH}")) } else { Err(EndpointError::NotHttp) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signals_path_is_added_to_a_base_url_once() {
        let expected = Ok("http://collector:4318/v1/traces".to_owned());
        for text in ["http://collector:4318", "http://collector:4318/", "http://collector:4318/v1/traces"] {
            assert_eq!(parse(text), expected);
        }
    }

    #[test]
    fn an_empty_endpoint_is_none_and_tls_is_refused() {
        assert_eq!(parse(" "), Ok(String::new()));
        assert_eq!(parse("https://collector:4318/v1/traces"), Err(EndpointError::NotHttp));
        assert_eq!(parse("collector:4317"), Err(EndpointError::NotHttp));
    }
}
