//! Files with NATS credentials: a JWT, and the seed of the key that signs the server's nonce.

/// Why credentials cannot be used. Holds nothing of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CredsError {
    /// A part is missing.
    #[error("it has no part `{0}`")]
    Missing(&'static str),
    /// The seed is not one of a key.
    #[error("its seed is not the seed of a user's key")]
    Seed,
}

const JWT: &str = "BEGIN NATS USER JWT";
const SEED: &str = "BEGIN USER NKEY SEED";

/// Returns the JWT and the signature of the nonce.
pub(super) fn sign(text: &str, nonce: &[u8]) -> Result<(String, Vec<u8>), CredsError> {
    let jwt = after(text, JWT)?;
    let key = nkeys::KeyPair::from_seed(after(text, SEED)?).map_err(|_| CredsError::Seed)?;
    let signature = key.sign(nonce).map_err(|_| CredsError::Seed)?;
    Ok((jwt.to_owned(), signature))
}

/// The line after the one with the heading.
fn after<'a>(text: &'a str, heading: &'static str) -> Result<&'a str, CredsError> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.find(|line| line.starts_with("---") && line.contains(heading));
    lines.next().ok_or(CredsError::Missing(heading))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_are_found_and_a_missing_one_is_named() {
        let key = nkeys::KeyPair::new_user();
        let seed = key.seed().unwrap();
        let text = format!(
            "-----BEGIN NATS USER JWT-----\r\nthe.jwt\r\n------END NATS USER JWT------\r\n\r\n\
             -----BEGIN USER NKEY SEED-----\r\n{seed}\r\n------END USER NKEY SEED------\r\n"
        );
        let (jwt, signature) = sign(&text, b"nonce").unwrap();
        assert_eq!(jwt, "the.jwt");
        key.verify(b"nonce", &signature).unwrap();
        assert_eq!(sign("", b"").unwrap_err(), CredsError::Missing(JWT));
        assert_eq!(sign(&text.replace(&seed, "x"), b"").unwrap_err(), CredsError::Seed);
    }
}
