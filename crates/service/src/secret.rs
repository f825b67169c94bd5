//! Secrets from the environment or from files, which are never shown.

use std::{convert::Infallible, fmt, io, path::Path, str::FromStr};

/// Most bytes of a file with a secret: a URL with many hosts, or credentials with a token, are far below.
const MAX_BYTES: u64 = 64 * 1024;

/// A password or the like. Neither `Debug` nor `Display` shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The secret itself: for the client library only.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl FromStr for Secret {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("***")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("***")
    }
}

/// A file with a secret, or one that protects it, cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {file} ({option})")]
pub struct SecretFileError {
    option: &'static str,
    file: String,
    #[source]
    source: io::Error,
}

/// Reads a file that an option names, without the line end that editors add.
///
/// # Errors
/// [`SecretFileError`], which names option and file and nothing of the content.
pub fn read_secret_file(option: &'static str, file: &Path) -> Result<String, SecretFileError> {
    let failed = |source| SecretFileError { option, file: file.display().to_string(), source };
    let size = std::fs::metadata(file).map_err(failed)?.len();
    if size > MAX_BYTES {
        return Err(failed(io::Error::other(format!("it has {size} bytes, at most {MAX_BYTES} are read"))));
    }
    let mut text = std::fs::read_to_string(file).map_err(failed)?;
    text.truncate(text.trim_end_matches(['\n', '\r']).len());
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_shown() {
        let secret: Secret = "hunter2".parse().unwrap();
        assert_eq!(format!("{secret} {secret:?}"), "*** ***");
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_with_its_option() {
        let error = read_secret_file("NATS_PASSWORD_FILE", Path::new("/nowhere/x")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read /nowhere/x (NATS_PASSWORD_FILE)");
    }
}
