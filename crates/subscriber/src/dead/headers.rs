//! Headers of messages that cannot be decoded, and of their dead letters. Pure.

use async_nats::HeaderMap;
use async_nats::jetstream::Message;

/// Headers that NATS obeys begin so, in any case.
const CONTROL_PREFIX: &str = "nats-";

/// Header of a message that NATS writes when others on its subject expired.
const MARKER_REASON: &str = "Nats-Marker-Reason";

/// Header of a message that NATS delivers without its content: the size of the content.
const SIZE: &str = "Nats-Msg-Size";

/// Headers that the dead letter must have begin so.
const OURS: &str = "Invalidation-Dead-";

/// True for what NATS writes by itself into a stream with `subject_delete_marker_ttl`.
pub(super) fn is_delete_marker(message: &Message) -> bool {
    message.payload.is_empty() && has(message, MARKER_REASON)
}

/// True for what a consumer with `headers_only` delivers.
pub(super) fn is_without_content(message: &Message) -> bool {
    message.payload.is_empty() && has(message, SIZE)
}

fn has(message: &Message, name: &str) -> bool {
    message.headers.as_ref().is_some_and(|headers| headers.get(name).is_some())
}

/// The headers of a message as those of its dead letter. NATS would obey the control headers and refuse the dead letter or
/// delete it, so their names are changed.
pub(super) fn of_dead_letter(original: Option<&HeaderMap>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in original.into_iter().flat_map(HeaderMap::iter) {
        let name: &str = name.as_ref();
        let is_control = name.to_ascii_lowercase().starts_with(CONTROL_PREFIX);
        let name = if is_control { format!("Dead-{name}") } else { name.to_owned() };
        for value in values {
            headers.append(name.as_str(), value.clone());
        }
    }
    headers
}

/// Those without which a dead letter says nothing.
pub(super) fn only_ours(headers: &HeaderMap) -> HeaderMap {
    let id: &str = async_nats::header::NATS_MESSAGE_ID.as_ref();
    let mut ours = HeaderMap::new();
    for (name, values) in headers.iter() {
        let text: &str = name.as_ref();
        let is_ours = text.starts_with(OURS) || text == event::nats::DEAD_SEQUENCE_HEADER || text == id;
        if let (true, Some(value)) = (is_ours, values.first()) {
            ours.insert(text, value.clone());
        }
    }
    ours
}

/// Bytes that the headers take in a message: a first line, a line for each, and an empty one.
pub(super) fn size(headers: &HeaderMap) -> usize {
    let line = |name: &str, value: &str| name.len() + value.len() + 4;
    let lines = headers
        .iter()
        .flat_map(|(name, values)| values.iter().map(move |value| line(name.as_ref(), value.as_str())));
    "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_headers_are_kept_as_text_and_others_as_they_are() {
        let mut original = HeaderMap::new();
        for name in ["Nats-Expected-Stream", "Nats-TTL", "nats-rollup", "Nats-Msg-Id"] {
            original.insert(name, "x");
        }
        original.append("Trace", "1");
        original.append("Trace", "2");
        let copied = of_dead_letter(Some(&original));
        for name in ["Nats-Expected-Stream", "Nats-TTL", "nats-rollup", "Nats-Msg-Id"] {
            assert!(copied.get(name).is_none(), "{name}");
            assert_eq!(copied.get(format!("Dead-{name}").as_str()).unwrap().as_str(), "x");
        }
        assert_eq!(copied.get_all("Trace").count(), 2);
        assert!(of_dead_letter(None).is_empty());
    }
}
