//! Errors and foreign text on their way to an operator: whole, on one line, without secrets and control characters.

use std::{error::Error, fmt};

use crate::nats::trouble;

/// An error with all its causes on one line: `message: cause: cause of the cause`.
///
/// The one way in which log, `/readyz`, `status` and `doctor` show an error. A cause that a message before it repeats is
/// left out. Passwords in URLs are hidden, control characters are escaped. Of an error of Postgres the DETAIL and HINT
/// are kept, and the line of the server's own source code is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report(String);

impl Report {
    /// The report of an error.
    #[must_use]
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        let mut line = String::new();
        for cause in causes(error) {
            append(&mut line, ": ", &without_source_line(cause, cause.to_string()));
            append(&mut line, "; ", &advice(cause));
        }
        if let Some(advice) = general_advice(&line) {
            append(&mut line, "; ", advice);
        }
        Self(printable(&without_credentials(&line)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// The error and everything below it.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// Adds what the line does not say yet.
fn append(line: &mut String, separator: &str, text: &str) {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = text.trim_end_matches(':');
    if text.is_empty() || line.contains(text) {
        return;
    }
    if !line.is_empty() {
        line.push_str(separator);
    }
    line.push_str(text);
}

/// The text as it may go to a terminal: control characters and those that turn the direction of writing are escaped.
///
/// For everything that comes from a database, a broker or a cache, such as keys.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() || is_direction(character) {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// Line separators and bidirectional controls: invisible, and what follows is shown in another place.
fn is_direction(character: char) -> bool {
    matches!(character, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Hides what stands before the `@` of every URL, except for the user's name.
fn without_credentials(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(begin) = rest.find("://").map(|at| at + 3) {
        let (scheme, authority) = rest.split_at(begin);
        shown.push_str(scheme);
        rest = authority;
        let end = rest.find([' ', '"', '\'', '`', ')', '/']).unwrap_or(rest.len());
        if let Some(at) = rest[..end].rfind('@') {
            shown.push_str(&match rest[..at].split_once(':') {
                Some((user, _)) => format!("{user}:***"),
                // In NATS a lone name is a token.
                None if scheme.ends_with("postgres://") || scheme.ends_with("postgresql://") => {
                    rest[..at].to_owned()
                }
                None => "***".to_owned(),
            });
            rest = &rest[at..];
        }
    }
    shown + rest
}

/// What to do about causes whose own text does not say it, whichever server they come from.
fn general_advice(line: &str) -> Option<&'static str> {
    if line.contains("corrupt message of type InvalidContentType") {
        Some("the server does not speak TLS at this port")
    } else if line.contains("alert: CertificateRequired") {
        Some("the server asks for a client certificate")
    } else {
        trouble::advice(line)
    }
}

/// Postgres names the line of its own C source, which reads like a line of the operator's file.
#[cfg(feature = "postgres")]
fn without_source_line(cause: &(dyn Error + 'static), text: String) -> String {
    match causes(cause).find_map(answer_of_postgres) {
        Some((answer, Some(line))) => {
            text.replace(&format!("{} at line {line}", answer.message()), answer.message())
        }
        _ => text,
    }
}

#[cfg(not(feature = "postgres"))]
fn without_source_line(_cause: &(dyn Error + 'static), text: String) -> String {
    text
}

/// DETAIL and HINT of an error of Postgres.
#[cfg(feature = "postgres")]
fn advice(cause: &(dyn Error + 'static)) -> String {
    let Some((answer, _)) = answer_of_postgres(cause) else { return String::new() };
    let Some(answer) = answer.try_downcast_ref::<sqlx::postgres::PgDatabaseError>() else {
        return String::new();
    };
    let detail = answer.detail().map(|detail| format!("detail: {detail}"));
    let hint = answer.hint().map(|hint| format!("hint: {hint}"));
    detail.into_iter().chain(hint).collect::<Vec<_>>().join("; ")
}

#[cfg(not(feature = "postgres"))]
fn advice(_cause: &(dyn Error + 'static)) -> String {
    String::new()
}

#[cfg(feature = "postgres")]
fn answer_of_postgres<'a>(
    cause: &'a (dyn Error + 'static),
) -> Option<(&'a dyn sqlx::error::DatabaseError, Option<usize>)> {
    let answer = match cause.downcast_ref::<sqlx::Error>() {
        Some(error) => error.as_database_error()?,
        None => &**cause.downcast_ref::<Box<dyn sqlx::error::DatabaseError>>()?,
    };
    let line = answer
        .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
        .and_then(sqlx::postgres::PgDatabaseError::line);
    Some((answer, line))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot reach the broker")]
    struct Unreachable(#[source] Box<dyn Error + Send + Sync>);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot fetch: {0}")]
    struct Repeating(#[source] Box<dyn Error + Send + Sync>);

    fn report(text: &str) -> String {
        Report::of(&io::Error::other(text.to_owned())).to_string()
    }

    #[test]
    fn every_cause_is_on_the_line_and_none_twice() {
        let refused = io::Error::other("connection\n  refused");
        let error = Unreachable(Unreachable(Repeating(refused.into()).into()).into());
        assert_eq!(
            Report::of(&error).to_string(),
            "cannot reach the broker: cannot fetch: connection refused"
        );
    }

    #[test]
    fn passwords_in_urls_are_hidden_and_hosts_are_not() {
        let cases = [
            ("at redis://app:p@ss@cache:6379/0 (x@y)", "at redis://app:***@cache:6379/0 (x@y)"),
            ("'nats://token@a:4222', nats://b", "'nats://***@a:4222', nats://b"),
            ("see https://example.org/a@b", "see https://example.org/a@b"),
            ("redis://:secret@cache", "redis://:***@cache"),
            ("no postgres://ann@db/x here", "no postgres://ann@db/x here"),
        ];
        for (text, expected) in cases {
            assert_eq!(report(text), expected);
        }
    }

    #[test]
    fn what_would_command_a_terminal_is_escaped() {
        assert_eq!(report("key \u{1b}[2Jx\u{7}"), "key \\u{1b}[2Jx\\u{7}");
        assert_eq!(printable("a\nb\tc\u{202e}d\u{9b}e é 鍵"), "a\\nb\\tc\\u{202e}d\\u{9b}e é 鍵");
    }
}
