use serde::{Deserialize, Serialize};

/// A W3C trace context header (`00-<trace id>-<parent id>-<flags>`), carried from enqueue to invalidation.
///
/// Source of the syntax: <https://www.w3.org/TR/trace-context/#traceparent-header>.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Traceparent(String);

/// The text is not a version 00 `traceparent`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("traceparent must be '00-<32 hex>-<16 hex>-<2 hex>' with non-zero ids")]
pub struct InvalidTraceparent;

impl Traceparent {
    /// Checks `text` against the syntax of version 00.
    ///
    /// # Errors
    /// [`InvalidTraceparent`] if it does not follow it.
    pub fn new(text: impl Into<String>) -> Result<Self, InvalidTraceparent> {
        let text = text.into();
        let mut parts = text.split('-');
        let well_formed = parts.next() == Some("00")
            && parts.next().is_some_and(|trace| is_id(trace, 32))
            && parts.next().is_some_and(|parent| is_id(parent, 16))
            && parts.next().is_some_and(|flags| is_hex(flags, 2))
            && parts.next().is_none();
        if well_formed { Ok(Self(text)) } else { Err(InvalidTraceparent) }
    }

    /// The header's value.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_id(text: &str, length: usize) -> bool {
    is_hex(text, length) && text.bytes().any(|byte| byte != b'0')
}

impl TryFrom<String> for Traceparent {
    type Error = InvalidTraceparent;

    fn try_from(text: String) -> Result<Self, InvalidTraceparent> {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_version_00_headers_with_real_ids_are_accepted() {
        assert!(Traceparent::new("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").is_ok());
        for text in [
            "",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        ] {
            assert_eq!(Traceparent::new(text), Err(InvalidTraceparent), "{text}");
        }
    }
}
