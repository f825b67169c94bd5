use serde::{Deserialize, Serialize};

/// Longest topic accepted, in bytes.
pub const MAX_TOPIC_BYTES: usize = 64;

/// A group of events that can be consumed on its own: the last token of the NATS subject.
///
/// Invariant: 1 to [`MAX_TOPIC_BYTES`] ASCII letters, digits, `_` or `-`, so that it is exactly one subject token.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Topic(String);

/// The text is not a topic.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("topic must be 1 to {MAX_TOPIC_BYTES} ASCII letters, digits, '_' or '-'")]
pub struct InvalidTopic;

impl Topic {
    /// The topic of events that name none.
    pub const DEFAULT: &'static str = "default";

    /// Checks `text` and takes it as a topic.
    ///
    /// # Errors
    /// [`InvalidTopic`] if the text could not be one token of a NATS subject.
    pub fn new(text: impl Into<String>) -> Result<Self, InvalidTopic> {
        let text = text.into();
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if text.is_empty() || text.len() > MAX_TOPIC_BYTES || !text.bytes().all(allowed) {
            return Err(InvalidTopic);
        }
        Ok(Self(text))
    }

    /// The topic as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Topic {
    fn default() -> Self {
        Self(Self::DEFAULT.to_owned())
    }
}

impl std::fmt::Display for Topic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Topic {
    type Error = InvalidTopic;

    fn try_from(text: String) -> Result<Self, InvalidTopic> {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_is_one_plain_subject_token() {
        assert_eq!(Topic::new("order-pages_2").unwrap().as_str(), "order-pages_2");
        for text in ["", "a.b", "*", ">", "a b", "ü", &"t".repeat(65)] {
            assert_eq!(Topic::new(text), Err(InvalidTopic), "{text}");
        }
    }
}
