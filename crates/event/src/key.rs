use serde::{Deserialize, Serialize};

/// Longest key accepted, in bytes. Redis would take 512 MB; a key of a kilobyte is already a mistake in a template.
pub const MAX_KEY_BYTES: usize = 1024;

/// The name of a cached value, exactly as the reader of the cache spells it.
///
/// Invariant: 1 to [`MAX_KEY_BYTES`] bytes of UTF-8 without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct CacheKey(String);

/// Why a text is not a cache key. The key itself is not repeated: it may be huge or unprintable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// The key has no characters.
    #[error("cache key is empty")]
    Empty,
    /// The key is longer than [`MAX_KEY_BYTES`].
    #[error("cache key has {bytes} bytes, the limit is {MAX_KEY_BYTES}")]
    TooLong {
        /// Length of the refused key in bytes.
        bytes: usize,
    },
    /// The key contains a control character such as NUL or a newline.
    #[error("cache key has the control character U+{code:04X} at byte {at}", code = *.character as u32)]
    ControlCharacter {
        /// The refused character.
        character: char,
        /// Its position in bytes.
        at: usize,
    },
}

impl CacheKey {
    /// Checks `text` and takes it as a key.
    ///
    /// # Errors
    /// [`InvalidKey`] says which rule the text breaks.
    pub fn new(text: impl Into<String>) -> Result<Self, InvalidKey> {
        let text = text.into();
        if text.is_empty() {
            return Err(InvalidKey::Empty);
        }
        if text.len() > MAX_KEY_BYTES {
            return Err(InvalidKey::TooLong { bytes: text.len() });
        }
        match text.char_indices().find(|(_, character)| character.is_control()) {
            Some((at, character)) => Err(InvalidKey::ControlCharacter { character, at }),
            None => Ok(Self(text)),
        }
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Gives the text back.
    #[must_use]
    pub fn into_string(self) -> String {
        self.0
    }
}

impl AsRef<str> for CacheKey {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for CacheKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for CacheKey {
    type Error = InvalidKey;

    fn try_from(text: String) -> Result<Self, InvalidKey> {
        Self::new(text)
    }
}

impl TryFrom<&str> for CacheKey {
    type Error = InvalidKey;

    fn try_from(text: &str) -> Result<Self, InvalidKey> {
        Self::new(text)
    }
}

impl From<&CacheKey> for CacheKey {
    fn from(key: &CacheKey) -> Self {
        key.clone()
    }
}

impl From<std::convert::Infallible> for InvalidKey {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_every_printable_script_and_any_punctuation_are_accepted() {
        for text in ["user:123:profile", "{tenant}:42", "профиль:7", "a b", "\u{1F980}", "k"] {
            assert_eq!(CacheKey::new(text).unwrap().as_str(), text);
        }
        assert!(CacheKey::new("k".repeat(MAX_KEY_BYTES)).is_ok());
    }

    #[test]
    fn empty_long_and_unprintable_keys_are_refused_with_the_reason() {
        assert_eq!(CacheKey::new(""), Err(InvalidKey::Empty));
        assert_eq!(CacheKey::new("k".repeat(1025)), Err(InvalidKey::TooLong { bytes: 1025 }));
        let newline = CacheKey::new("user:1\nuser:2").unwrap_err();
        assert_eq!(newline.to_string(), "cache key has the control character U+000A at byte 6");
        assert!(CacheKey::new("nul\0").is_err());
        assert!(CacheKey::new("c1\u{85}").is_err());
    }
}
