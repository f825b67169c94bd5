//! Judges the options of the stream, whoever created or changed it: which of them could lose events or hold them back.
//!
//! Every option is judged by the name it has on the wire, also one that this version does not know: old servers drop
//! options without a word, and newer ones have more of them.

use std::time::Duration;

use event::nats::SUBJECTS;
use serde_json::{Map, Value};

use crate::Config;

/// The smallest limit of a message that every event without a value fits in, however long its keys are.
pub const MIN_MESSAGE_BYTES: usize = 64 * 1024;

/// Below this JetStream could take a repetition for something new.
const MIN_DUPLICATE_WINDOW: Duration = Duration::from_secs(30);

/// Options that change nothing about which events arrive.
const HARMLESS: &[&str] = &[
    "name",
    "description",
    "metadata",
    "placement",
    "compression",
    "first_seq",
    "deny_delete",
    "deny_purge",
    "allow_direct",
    "mirror_direct",
    "republish",
    "template_owner",
    "allow_atomic",
    "allow_batched",
    "allow_msg_schedules",
];

/// What is wrong with the options.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Acknowledged events could disappear unread, or none is accepted: nothing is published.
    pub unusable: Vec<String>,
    /// Events could be lost or held back under some circumstances, or it is not what is configured.
    pub risks: Vec<String>,
}

/// Judges the options that the server returned; `max_payload` is the limit of the server for a message.
#[must_use]
pub fn judge(actual: &Map<String, Value>, config: &Config, max_payload: usize) -> Judgement {
    let mut judgement = Judgement::default();
    let max_bytes = actual.get("max_bytes").and_then(Value::as_i64).unwrap_or(-1);
    if max_bytes.max(-1) != config.stream_max_bytes.unwrap_or(-1) {
        let limit = |bytes: i64| if bytes > 0 { bytes.to_string() } else { "not set".to_owned() };
        judgement.risks.push(format!(
            "max_bytes is {} and RELAY_STREAM_MAX_BYTES {}",
            limit(max_bytes),
            limit(config.stream_max_bytes.unwrap_or(-1))
        ));
    }
    if max_payload < MIN_MESSAGE_BYTES {
        judgement.unusable.push(format!(
            "the NATS server accepts messages of {max_payload} bytes at most; set max_payload to at least {MIN_MESSAGE_BYTES} in \
             its configuration"
        ));
    }
    for (name, value) in actual {
        judge_option(name, value, actual, config, &mut judgement);
    }
    // What the server leaves out has its default.
    for name in ["subjects", "duplicate_window"] {
        if !actual.contains_key(name) {
            judge_option(name, &Value::Null, actual, config, &mut judgement);
        }
    }
    judgement
}

fn judge_option(
    name: &str,
    value: &Value,
    all: &Map<String, Value>,
    config: &Config,
    judgement: &mut Judgement,
) {
    let number = value.as_i64().unwrap_or(0);
    let is_set = !is_default(value);
    let mut unusable = |text: String| judgement.unusable.push(text);
    match name {
        "subjects" if !has_subject(value) => {
            unusable("it does not have the subject invalidation.>".to_owned())
        }
        "storage" if value != "file" => {
            unusable("storage is not file, a restart of NATS would lose everything".to_owned());
        }
        "retention" if value != "limits" => unusable("retention is not limits".to_owned()),
        "no_ack" if is_set => unusable("no_ack is set, publishing could never be confirmed".to_owned()),
        "sealed" if is_set => {
            unusable(
                "it is sealed and accepts no message; delete it, the relay creates another one".to_owned(),
            );
        }
        "mirror" if is_set => unusable("it is a mirror and accepts no message".to_owned()),
        "subject_transform" if is_set => {
            unusable("subject_transform stores events under other subjects, remove it".to_owned());
        }
        "allow_msg_counter" if is_set => unusable("it accepts counters only".to_owned()),
        // It drops the oldest message of the subject whatever discard says.
        "max_msgs_per_subject" if number > 0 => {
            unusable("it has max_msgs_per_subject, set it to -1".to_owned());
        }
        "max_bytes" | "max_msgs" if number > 0 && all.get("discard") != Some(&Value::from("new")) => {
            unusable(
                "it has a size limit with discard=old, a full stream would drop invalidations nobody has read; set discard=new"
                    .to_owned(),
            );
        }
        "max_msg_size" if number > 0 && number.unsigned_abs() < MIN_MESSAGE_BYTES as u64 => unusable(
            format!("max_msg_size is {number} bytes, set it to -1 or to at least {MIN_MESSAGE_BYTES}"),
        ),
        _ => judgement.risks.extend(risk(name, value, config)),
    }
}

fn risk(name: &str, value: &Value, config: &Config) -> Option<String> {
    let number = value.as_i64().unwrap_or(0);
    let time = Duration::from_nanos(number.unsigned_abs());
    let is_set = !is_default(value);
    match name {
        "subjects" => (value.as_array()?.len() > 1)
            .then(|| format!("it has other subjects than {SUBJECTS}, their messages become dead letters of the subscribers")),
        "max_age" => (!time.is_zero() && time < config.stream_max_age).then(|| {
            format!(
                "it keeps messages for {time:?} and RELAY_STREAM_MAX_AGE is {:?}; a cache that is away for longer misses \
                 invalidations",
                config.stream_max_age
            )
        }),
        "num_replicas" => (number < i64::from(config.stream_replicas))
            .then(|| format!("replicas is {number} and RELAY_STREAM_REPLICAS {}", config.stream_replicas)),
        "max_msgs" => (number > 0)
            .then(|| format!("max_msgs is {number}; when so many are stored, events wait in the outbox")),
        "max_consumers" => (number > 0)
            .then(|| format!("max_consumers is {number}, so that another cache may not get its consumer")),
        "duplicate_window" => (time < MIN_DUPLICATE_WINDOW.min(config.stream_max_age))
            .then(|| format!("duplicate_window is {time:?}; below 30 s a repetition could be stored twice, set it to 2m")),
        "persist_mode" => (is_set && value != "default").then(|| {
            "persist_mode acknowledges messages before they are written; a crash of NATS loses them".to_owned()
        }),
        "consumer_limits" => (is_set && value.as_object().is_none_or(|limits| !limits.values().all(is_default)))
            .then(|| "consumer_limits may make NATS delete the consumer of a cache that is away".to_owned()),
        "allow_rollup_hdrs" => is_set
            .then(|| "allow_rollup_hdrs lets every publisher remove all messages by a header, unset it".to_owned()),
        "allow_msg_ttl" => is_set
            .then(|| "allow_msg_ttl lets every publisher have messages removed before they are read, unset it".to_owned()),
        "subject_delete_marker_ttl" => is_set
            .then(|| "subject_delete_marker_ttl adds messages that are no events, unset it".to_owned()),
        "sources" => is_set.then(|| "it copies messages of other streams".to_owned()),
        "max_msg_size" | "max_bytes" | "max_msgs_per_subject" | "storage" | "retention" | "no_ack" | "sealed" => None,
        "discard" | "discard_new_per_subject" | "mirror" | "subject_transform" | "allow_msg_counter" => None,
        name if HARMLESS.contains(&name) || !is_set => None,
        name => Some(format!("{name} is {value}, which this version of the relay does not know")),
    }
}

fn has_subject(subjects: &Value) -> bool {
    subjects.as_array().is_some_and(|subjects| subjects.iter().any(|subject| subject == SUBJECTS))
}

fn is_default(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => matches!(number.as_i64(), Some(0 | -1)),
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        Value::Bool(true) => false,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        config: Config,
    }

    fn config() -> Config {
        Options::parse_from(["relay"]).config
    }

    /// What nats-server 2.12 returns for the stream as a relay creates it, but for `changes`.
    fn stream(changes: Value) -> Map<String, Value> {
        let created = json!({
            "name": "INVALIDATIONS", "description": "x", "subjects": ["invalidation.>"], "retention": "limits",
            "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_age": 86_400_000_000_000_i64,
            "max_msgs_per_subject": -1, "max_msg_size": -1, "discard": "new", "storage": "file", "num_replicas": 1,
            "duplicate_window": 120_000_000_000_i64, "compression": "none", "allow_direct": false,
            "mirror_direct": false, "sealed": false, "deny_delete": false, "deny_purge": false,
            "allow_rollup_hdrs": false, "consumer_limits": {}, "allow_msg_ttl": false,
            "metadata": { "_nats.req.level": "0" }
        });
        let mut all = created.as_object().unwrap().clone();
        all.extend(changes.as_object().unwrap().clone());
        all
    }

    fn judged(changes: Value) -> Judgement {
        judge(&stream(changes), &config(), 1024 * 1024)
    }

    #[test]
    fn a_stream_as_the_relay_creates_it_is_fine() {
        assert_eq!(judged(json!({})), Judgement::default());
        let small = judge(&stream(json!({})), &config(), 1024);
        assert!(small.unusable[0].contains("max_payload"), "{small:?}");
    }

    #[test]
    fn options_that_lose_or_refuse_every_event_make_the_stream_unusable() {
        let cases = [
            json!({ "subjects": ["other.>"] }),
            json!({ "subjects": null }),
            json!({ "storage": "memory" }),
            json!({ "retention": "interest" }),
            json!({ "retention": "workqueue" }),
            json!({ "no_ack": true }),
            json!({ "sealed": true }),
            json!({ "mirror": { "name": "OTHER" } }),
            json!({ "subject_transform": { "src": ">", "dest": "x.>" } }),
            json!({ "allow_msg_counter": true }),
            json!({ "max_msgs_per_subject": 1 }),
            json!({ "max_msgs": 10, "discard": "old" }),
            json!({ "max_bytes": 10, "discard": "old" }),
            json!({ "max_msg_size": 1024 }),
            json!({ "max_msg_size": 65_535 }),
        ];
        for changes in cases {
            assert_eq!(judged(changes.clone()).unusable.len(), 1, "{changes}");
        }
    }

    #[test]
    fn other_options_that_can_lose_or_hold_back_events_are_risks() {
        let cases = [
            json!({ "subjects": ["invalidation.>", "other"] }),
            json!({ "max_age": 1_000_000_000 }),
            json!({ "max_bytes": 10 }),
            json!({ "max_msgs": 10 }),
            json!({ "max_consumers": 1 }),
            json!({ "duplicate_window": 1_000_000_000 }),
            json!({ "persist_mode": "async" }),
            json!({ "consumer_limits": { "inactive_threshold": 1 } }),
            json!({ "allow_rollup_hdrs": true }),
            json!({ "allow_msg_ttl": true }),
            json!({ "subject_delete_marker_ttl": 1 }),
            json!({ "sources": [{ "name": "OTHER" }] }),
            json!({ "an_option_of_tomorrow": "on" }),
        ];
        for changes in cases {
            let Judgement { unusable, risks } = judged(changes.clone());
            assert_eq!((unusable.len(), risks.len()), (0, 1), "{changes}: {unusable:?} {risks:?}");
        }
    }

    #[test]
    fn options_that_change_nothing_about_what_arrives_are_left_to_the_operator() {
        let cases = [
            json!({ "description": "y", "metadata": { "team": "a" }, "compression": "s2" }),
            json!({ "deny_delete": true, "deny_purge": true, "allow_direct": true }),
            json!({ "placement": { "tags": ["ssd"] }, "republish": { "src": ">", "dest": "copy.>" } }),
            json!({ "discard": "old" }),
            json!({ "max_age": 0 }),
            json!({ "num_replicas": 3 }),
            json!({ "max_msg_size": 65_536 }),
            json!({ "an_option_of_tomorrow": false }),
        ];
        for changes in cases {
            assert_eq!(judged(changes.clone()), Judgement::default(), "{changes}");
        }
    }
}
