//! Connection URLs that can be logged without giving away their credentials.

use std::{fmt, path::Path, str::FromStr};

use crate::{UsageError, secret::read_secret_file};

/// What stands in the place of everything that is not to be read.
const HIDDEN: &str = "***";

/// A connection URL whose `Debug` and `Display` show scheme, user, host, port and path, but never the password, a
/// token, or the query.
///
/// Only [`SecretUrl::expose`] gives the text as it was written. Lists (`nats://a:4222,nats://b:4222`) and several hosts
/// in one URL (`postgres://user:password@a:5432,b:5432/db`) are accepted. A text whose parts cannot be told apart is
/// refused, so that a part of a password is never taken for a host.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl {
    raw: String,
    shown: String,
}

/// Why a text is not accepted as a connection URL. Never holds any part of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretUrlError {
    /// There is nothing in it.
    #[error("the URL is empty")]
    Empty,
    /// It does not begin with `scheme://`.
    #[error("the URL does not begin with a scheme such as postgres://, nats:// or redis://")]
    NoScheme,
    /// Host or port cannot be read, or user and password hold characters that end a host.
    #[error(
        "the URL's host and port cannot be read; characters such as / ? # @ in a user or password must be \
         percent-encoded (/ as %2F)"
    )]
    Unclear,
}

impl SecretUrl {
    /// The URL as it was written, with its credentials: for the client library only.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.raw
    }
}

impl SecretUrl {
    /// Reads the file that an option names.
    ///
    /// # Errors
    /// [`UsageError`], which names option and file and nothing of the content.
    pub fn read(option: &'static str, file: &Path) -> Result<Self, UsageError> {
        let text = read_secret_file(option, file).map_err(|error| UsageError::of(&error))?;
        text.parse().map_err(|error| {
            UsageError(format!("cannot use the content of {} ({option}): {error}", file.display()))
        })
    }
}

impl FromStr for SecretUrl {
    type Err = SecretUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let raw = text.trim();
        if raw.is_empty() {
            return Err(SecretUrlError::Empty);
        }
        let shown: Result<Vec<String>, _> = split_list(raw).into_iter().map(redact).collect();
        Ok(Self { raw: raw.to_owned(), shown: shown?.join(",") })
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.shown)
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.shown)
    }
}

/// Splits a list of URLs at the commas that a new `scheme://` follows; other commas separate hosts within one URL.
fn split_list(text: &str) -> Vec<&str> {
    let mut urls = Vec::new();
    let mut begin = 0;
    for (comma, _) in text.match_indices(',') {
        let rest = text[comma + 1..].trim_start();
        if rest.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme)) {
            urls.push(text[begin..comma].trim());
            begin = comma + 1;
        }
    }
    urls.push(text[begin..].trim());
    urls
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+.-".contains(c))
}

fn redact(url: &str) -> Result<String, SecretUrlError> {
    let (scheme, rest) = url.split_once("://").ok_or(SecretUrlError::NoScheme)?;
    if !is_scheme(scheme) {
        return Err(SecretUrlError::NoScheme);
    }
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (path, query) = tail.split_at(tail.find(['?', '#']).unwrap_or(tail.len()));
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (Some(user), hosts),
        None => (None, authority),
    };
    // An `@` further on means that the real user information was cut by a raw `/`, `?` or `#` in the password.
    if path.contains('@') || (user.is_none() && query.contains('@')) || !hosts.split(',').all(is_host) {
        return Err(SecretUrlError::Unclear);
    }
    let user = user.map(|user| redact_user(scheme, user)).unwrap_or_default();
    let query = if query.is_empty() { String::new() } else { format!("{}{HIDDEN}", &query[..1]) };
    Ok(format!("{scheme}://{user}{hosts}{path}{query}"))
}

/// Keeps the user's name and hides the password. A lone name is a token in NATS, so it is shown for Postgres only.
fn redact_user(scheme: &str, user: &str) -> String {
    match user.split_once(':') {
        Some((name, _)) => format!("{name}:{HIDDEN}@"),
        None if scheme.starts_with("postgres") => format!("{user}@"),
        None => format!("{HIDDEN}@"),
    }
}

/// Whether this is a host with an optional numeric port: a name, an address, `[::1]`, or nothing (a Unix socket).
fn is_host(text: &str) -> bool {
    let (host, port) = match text.rfind(':') {
        Some(colon) if !text.ends_with(']') => (&text[..colon], &text[colon + 1..]),
        _ => (text, ""),
    };
    let bare = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
    let host_is_clear = match bare {
        Some(address) => address.chars().all(|c| c.is_ascii_hexdigit() || ":.%".contains(c)),
        None => host.chars().all(|c| c.is_alphanumeric() || "-._%~".contains(c)),
    };
    host_is_clear && port.chars().all(|c| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        let url: SecretUrl = text.parse().unwrap();
        assert_eq!(url.expose(), text);
        assert_eq!(format!("{url:?}"), url.to_string());
        url.to_string()
    }

    #[test]
    fn a_password_and_a_query_are_never_shown() {
        assert_eq!(shown("postgres://app:s3cret@db:5432/shop"), "postgres://app:***@db:5432/shop");
        assert_eq!(shown("postgres://db/shop?user=a&password=s3cret"), "postgres://db/shop?***");
        assert_eq!(shown("postgres://a:b@db/shop?application_name=a@b"), "postgres://a:***@db/shop?***");
        assert_eq!(shown("rediss://:s3cret@[::1]:6379/0"), "rediss://:***@[::1]:6379/0");
        assert_eq!(shown("redis://a:p@ss:w@rd@cache"), "redis://a:***@cache");
        assert_eq!(shown("redis://cache:6379/#s3cret"), "redis://cache:6379/#***");
    }

    #[test]
    fn a_lone_user_is_a_token_except_in_postgres() {
        assert_eq!(shown("nats://t0ken@broker:4222"), "nats://***@broker:4222");
        assert_eq!(shown("postgres://app@db/shop"), "postgres://app@db/shop");
    }

    #[test]
    fn lists_of_servers_are_shown_without_their_credentials() {
        assert_eq!(shown("nats://a:4222,nats://u:s3cret@b:4222"), "nats://a:4222,nats://u:***@b:4222");
        assert_eq!(shown("nats://a:4222, tls://t0ken@b"), "nats://a:4222,tls://***@b");
        assert_eq!(shown("postgres://u:p@a:5432,b:5432/db"), "postgres://u:***@a:5432,b:5432/db");
        assert!(!shown("nats://u:one@a:4222,u:two@b:4222").contains("one"));
    }

    #[test]
    fn urls_of_unix_sockets_are_accepted() {
        assert_eq!(shown("postgres:///shop?host=/var/run/postgresql"), "postgres:///shop?***");
        assert_eq!(shown("redis+unix:///run/redis.sock"), "redis+unix:///run/redis.sock");
    }

    #[test]
    fn an_unclear_url_is_refused_without_quoting_it() {
        for text in [
            "postgres://u:s3cret/x@db/shop",
            "postgres://u:12345/x@db/shop",
            "postgres://u:12345?x@db/shop",
            "postgres://u:s3cret#x@db/shop",
            "postgres://db:port/shop",
        ] {
            let error = text.parse::<SecretUrl>().expect_err(text);
            assert_eq!(error, SecretUrlError::Unclear, "{text}");
            assert!(!error.to_string().contains("s3cret"));
        }
        assert_eq!("db:5432/shop".parse::<SecretUrl>(), Err(SecretUrlError::NoScheme));
        assert_eq!("1://db".parse::<SecretUrl>(), Err(SecretUrlError::NoScheme));
        assert_eq!("  ".parse::<SecretUrl>(), Err(SecretUrlError::Empty));
    }
}
