//! Comparison of the options of a durable consumer with those it should have. Pure.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::jetstream::consumer;
use serde_json::{Map, Value};

/// The options of a consumer as NATS writes them.
pub type Options = Map<String, Value>;

/// Options that may be anything. They decide nothing about what is delivered, or only where a new consumer begins.
const FREE: [&str; 13] = [
    "name",
    "durable_name",
    "description",
    "metadata",
    "deliver_policy",
    "opt_start_seq",
    "opt_start_time",
    "num_replicas",
    "mem_storage",
    "sample_freq",
    "max_waiting",
    "inactive_threshold",
    // A pause is the decision of an operator; it is said, not lifted.
    "pause_until",
];

/// Options with which messages are not delivered, delivered without their content, or given up. Every other option, known
/// or not, makes deliveries earlier or later at worst.
const ESSENTIAL: [&str; 16] = [
    "deliver_subject",
    "deliver_group",
    "ack_policy",
    "max_deliver",
    "filter_subject",
    "filter_subjects",
    "replay_policy",
    "rate_limit_bps",
    "headers_only",
    "flow_control",
    "idle_heartbeat",
    "max_batch",
    "max_expires",
    "max_bytes",
    "priority_groups",
    "priority_policy",
];

/// Limits of a request for messages, and the least with which every request of ours is allowed. A server may set them for
/// all consumers.
const LIMITS: [(&str, u64); 2] = [("max_batch", 256), ("max_expires", 30_000_000_000)];

/// Options whose numbers are nanoseconds.
const DURATIONS: [&str; 3] = ["ack_wait", "idle_heartbeat", "max_expires"];

/// Differences between the options of a consumer and those it should have, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Differences {
    /// With these, invalidations could be missed.
    pub essential: Vec<String>,
    /// With these, deliveries come earlier or later.
    pub minor: Vec<String>,
}

impl Differences {
    /// Compares `actual` with `wanted`.
    #[must_use]
    pub fn between(actual: &Options, wanted: &Options) -> Self {
        let mut differences = Self::default();
        let fields: BTreeSet<&String> = actual.keys().chain(wanted.keys()).collect();
        for field in fields.into_iter().filter(|field| !FREE.contains(&field.as_str())) {
            let (is, should) = (value(actual, field), value(wanted, field));
            if is == should {
                continue;
            }
            let text = format!("{field} is {} instead of {}", show(field, &is), show(field, &should));
            match ESSENTIAL.contains(&field.as_str()) && !is_generous(field, &is) {
                true => differences.essential.push(text),
                false => differences.minor.push(text),
            }
        }
        differences
    }

    /// Returns true if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.essential.is_empty() && self.minor.is_empty()
    }
}

impl std::fmt::Display for Differences {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&[&*self.essential, &*self.minor].concat().join(", "))
    }
}

/// The options as NATS would write them.
#[must_use]
pub fn options(config: &consumer::Config) -> Options {
    match serde_json::to_value(config) {
        Ok(Value::Object(options)) => options,
        _ => Options::new(),
    }
}

/// An option that is not there has its zero value. `None` stands for every zero value.
fn value(options: &Options, field: &str) -> Option<Value> {
    let value = options.get(field)?;
    let is_zero = match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || (field == "priority_policy" && text == "none"),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    };
    (!is_zero).then(|| value.clone())
}

fn is_generous(field: &str, value: &Option<Value>) -> bool {
    let limit = LIMITS.iter().find(|(name, _)| *name == field);
    let value = value.as_ref().and_then(Value::as_u64);
    limit.zip(value).is_some_and(|((_, least), value)| value >= *least)
}

fn show(field: &str, value: &Option<Value>) -> String {
    match value {
        None => "not set".to_owned(),
        Some(Value::Number(number)) if DURATIONS.contains(&field) => {
            format!("{:?}", Duration::from_nanos(number.as_u64().unwrap_or_default()))
        }
        Some(value) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wanted() -> Options {
        options(&consumer::Config {
            ack_policy: consumer::AckPolicy::Explicit,
            ack_wait: Duration::from_secs(30),
            max_deliver: -1,
            ..Default::default()
        })
    }

    fn with(field: &str, value: Value) -> Differences {
        let mut actual = wanted();
        actual.insert(field.to_owned(), value);
        Differences::between(&actual, &wanted())
    }

    #[test]
    fn an_option_that_hides_messages_is_essential() {
        let cases = [
            ("filter_subject", json!("invalidation.a")),
            ("filter_subjects", json!(["invalidation.a", "invalidation.b"])),
            ("headers_only", json!(true)),
            ("max_batch", json!(1)),
            ("max_expires", json!(500_000_000)),
            ("max_bytes", json!(1)),
            ("max_deliver", json!(1)),
            ("ack_policy", json!("none")),
            ("replay_policy", json!("original")),
            ("deliver_subject", json!("inbox")),
            ("priority_groups", json!(["a"])),
        ];
        for (field, value) in cases {
            let found = with(field, value);
            assert!(found.essential.iter().any(|text| text.starts_with(field)), "{field}: {found:?}");
            assert_eq!(found.minor, Vec::<String>::new());
        }
    }

    #[test]
    fn other_options_are_minor_and_named_with_both_values() {
        assert_eq!(with("ack_wait", json!(7_000_000_000_u64)).to_string(), "ack_wait is 7s instead of 30s");
        assert_eq!(with("backoff", json!([1])).minor.len(), 1);
        assert_eq!(with("max_batch", json!(256)).minor.len(), 1, "every request of ours is allowed");
        assert_eq!(with("unheard_of", json!("x")).minor, ["unheard_of is \"x\" instead of not set"]);
        assert_eq!(with("unheard_of", json!("x")).essential, Vec::<String>::new());
    }

    #[test]
    fn zero_values_and_free_options_are_no_difference() {
        let cases = [
            ("headers_only", json!(false)),
            ("filter_subjects", json!([])),
            ("max_batch", json!(0)),
            ("priority_policy", json!("none")),
            ("max_waiting", json!(512)),
            ("deliver_policy", json!("by_start_time")),
            ("description", json!("mine")),
            ("metadata", json!({"a": "b"})),
        ];
        for (field, value) in cases {
            assert!(with(field, value).is_empty(), "{field}");
        }
    }
}
