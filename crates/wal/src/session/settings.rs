use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use service::SecretUrl;
use url::Url;

use super::SessionError;
use super::passfile::{self, Login};

const DEFAULT_PORT: u16 = 5432;

/// How much TLS, as in libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// None.
    Disable,
    /// If the server offers it.
    Prefer,
    /// Encrypted, though the server is not checked.
    Require,
    /// From a server with a certificate of a known authority.
    VerifyCa,
    /// That also names the host.
    VerifyFull,
}

/// Where the server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Host {
    Name(String),
    /// Directory of a Unix socket.
    Socket(PathBuf),
}

/// How to connect, read from the same URL as all other connections. Its `Debug` hides the password.
#[derive(Clone)]
pub struct Settings {
    pub(super) host: Host,
    /// Where to connect instead of asking for the address of the host; the host stays what its certificate must name.
    pub(super) address: Option<String>,
    pub(super) port: u16,
    pub(super) user: String,
    password: Option<String>,
    pub(super) database: String,
    pub(super) ssl_mode: SslMode,
    pub(super) ssl_root_cert: Option<PathBuf>,
    pub(super) application_name: String,
}

/// Why a URL does not do for a replication connection. Never holds any part of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// It cannot be read.
    #[error("DATABASE_URL is not a postgres:// URL with one host")]
    Url,
    /// Not one of libpq's modes.
    #[error("sslmode in DATABASE_URL must be disable, allow, prefer, require, verify-ca or verify-full")]
    SslMode,
    /// Client certificates.
    #[error(
        "{0} in DATABASE_URL is not supported on the replication connection; use a password, or --source outbox \
         with triggers"
    )]
    Unsupported(String),
}

impl Settings {
    /// Reads a connection URL; `application_name` is how the session shows in `pg_stat_replication`.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn parse(url: &SecretUrl, application_name: &str) -> Result<Self, SettingsError> {
        let url = Url::parse(url.expose()).map_err(|_| SettingsError::Url)?;
        let decode = |text: &str| {
            percent_decode_str(text)
                .decode_utf8()
                .map(std::borrow::Cow::into_owned)
                .map_err(|_| SettingsError::Url)
        };
        let user = decode(url.username())?;
        let mut settings = Self {
            host: host(&decode(url.host_str().unwrap_or_default())?),
            address: None,
            port: url.port().unwrap_or(DEFAULT_PORT),
            user: if user.is_empty() { environment("PGUSER").unwrap_or("postgres".to_owned()) } else { user },
            password: url.password().map(decode).transpose()?.or_else(|| environment("PGPASSWORD")),
            database: decode(url.path().trim_start_matches('/'))?,
            ssl_mode: SslMode::Prefer,
            ssl_root_cert: None,
            application_name: application_name.to_owned(),
        };
        for (name, value) in url.query_pairs() {
            let value = value.into_owned();
            match name.as_ref() {
                "host" => settings.host = host(&value),
                "hostaddr" => settings.address = Some(value),
                "port" => settings.port = value.parse().map_err(|_| SettingsError::Url)?,
                "user" => settings.user = value,
                "password" => settings.password = Some(value),
                "dbname" => settings.database = value,
                "sslmode" | "ssl-mode" => settings.ssl_mode = ssl_mode(&value)?,
                "sslrootcert" | "ssl-root-cert" | "ssl-ca" => settings.ssl_root_cert = Some(value.into()),
                "sslcert" | "ssl-cert" | "sslkey" | "ssl-key" => {
                    return Err(SettingsError::Unsupported(name.into_owned()));
                }
                // Whatever else sqlx knows (application_name, options, statement-cache-capacity) is of no use here.
                _ => {}
            }
        }
        if settings.database.is_empty() {
            settings.database.clone_from(&settings.user);
        }
        if settings.password.is_none() {
            settings.password = settings.password_from_file();
        }
        Ok(settings)
    }

    fn password_from_file(&self) -> Option<String> {
        let host = match &self.host {
            Host::Name(name) => name,
            Host::Socket(_) => "localhost",
        };
        let (port, database, user) = (self.port, self.database.as_str(), self.user.as_str());
        passfile::password(&Login { host, port, database, user })
    }

    pub(super) fn password(&self) -> Result<&str, SessionError> {
        self.password.as_deref().ok_or_else(|| {
            SessionError::Refused("it asks for a password; neither DATABASE_URL nor PGPASSWORD nor a private PGPASSFILE holds one".to_owned())
        })
    }
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Settings")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("user", &self.user)
            .field("database", &self.database)
            .field("ssl_mode", &self.ssl_mode)
            .finish_non_exhaustive()
    }
}

fn host(text: &str) -> Host {
    match text {
        "" => Host::Name(environment("PGHOST").unwrap_or("localhost".to_owned())),
        path if path.starts_with('/') => Host::Socket(path.into()),
        // The brackets of an IPv6 address belong to the URL.
        name => Host::Name(name.trim_matches(['[', ']']).to_owned()),
    }
}

fn ssl_mode(text: &str) -> Result<SslMode, SettingsError> {
    match text.to_ascii_lowercase().as_str() {
        "disable" => Ok(SslMode::Disable),
        "allow" | "prefer" => Ok(SslMode::Prefer),
        "require" => Ok(SslMode::Require),
        "verify-ca" => Ok(SslMode::VerifyCa),
        "verify-full" => Ok(SslMode::VerifyFull),
        _ => Err(SettingsError::SslMode),
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Settings, SettingsError> {
        Settings::parse(&url.parse().unwrap(), "relay")
    }

    #[test]
    fn everything_in_the_url_is_decoded_and_the_password_is_never_printed() {
        let settings = parse(
            "postgres://us%40er:se%2Fcret@db.example:6543/my%20db?sslmode=verify-full&sslrootcert=/ca.pem",
        )
        .unwrap();
        assert_eq!(settings.user, "us@er");
        assert_eq!(settings.password().unwrap(), "se/cret");
        assert_eq!((settings.port, settings.database.as_str()), (6543, "my db"));
        assert_eq!(settings.host, Host::Name("db.example".to_owned()));
        assert_eq!(settings.ssl_mode, SslMode::VerifyFull);
        assert!(!format!("{settings:?}").contains("cret"));
    }

    #[test]
    fn a_socket_directory_and_an_address_in_brackets_are_hosts() {
        assert_eq!(parse("postgres:///db?host=/run/pg").unwrap().host, Host::Socket("/run/pg".into()));
        assert_eq!(parse("postgres://u@[::1]:5433/db").unwrap().host, Host::Name("::1".to_owned()));
    }

    #[test]
    fn what_cannot_be_kept_is_refused_rather_than_ignored() {
        assert!(matches!(parse("postgres://u@h/db?sslcert=/c.pem"), Err(SettingsError::Unsupported(_))));
        assert!(matches!(parse("postgres://u@h/db?sslmode=maybe"), Err(SettingsError::SslMode)));
    }
}
