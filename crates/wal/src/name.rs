/// Longest name of a slot, publication or other object, in bytes.
const MAX_NAME_BYTES: usize = 63;

/// Why a text is not a name for a slot or publication.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name for a slot or publication: use 1 to 63 of a-z, 0-9 and _")]
pub struct InvalidName(String);

/// Accepts what Postgres accepts as the name of a slot: such names need no quotes anywhere.
///
/// # Errors
/// [`InvalidName`].
pub fn check_name(text: &str) -> Result<(), InvalidName> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if text.is_empty() || text.len() > MAX_NAME_BYTES || !text.bytes().all(plain) {
        return Err(InvalidName(text.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_need_quotes_are_refused() {
        assert!(check_name("outbox_relay_1").is_ok());
        for name in ["", "Relay", "a-b", "a b", "a;b", "a'b", "ä", &"a".repeat(64)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
