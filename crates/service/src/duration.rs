//! Durations as people write them in options: `500ms`, `10s`, `5m`, `24h`.

use std::time::Duration;

/// A duration option that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("not a duration; write a number and a unit, such as 500ms, 10s, 5m or 24h")]
pub struct DurationError(#[source] humantime::DurationError);

/// Reads `500ms`, `10s`, `5m`, `24h`, or a sum such as `1h 30m`.
///
/// For clap: `#[arg(value_parser = service::parse_duration)]`.
///
/// # Errors
///
/// When a unit is missing or unknown, or the number is not a whole one.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    humantime::parse_duration(text.trim()).map_err(DurationError)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        let read = |text| parse_duration(text).unwrap();
        assert_eq!(read("500ms"), Duration::from_millis(500));
        assert_eq!(read("10s"), Duration::from_secs(10));
        assert_eq!(read("5m"), Duration::from_secs(300));
        assert_eq!(read("24h"), Duration::from_secs(86_400));
        assert_eq!(read(" 1h 30m "), Duration::from_secs(5_400));
        assert_eq!(read("0s"), Duration::ZERO);
    }

    #[test]
    fn a_duration_without_a_unit_is_refused_with_examples() {
        for text in ["10", "", "ten seconds", "-1s", "10 parsecs"] {
            let error = parse_duration(text).expect_err(text);
            assert!(error.to_string().contains("such as 500ms, 10s"), "{error}");
        }
    }
}
