//! The servers that `DATABASE_URL` names, and which of them is the primary.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use service::{Report, SecretUrl, Shutdown, UsageError};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgPool};
use tokio::time::timeout;

use super::session::{self, Access};
use super::trust::FAILED;
use super::{APPLICATION_NAME, DatabaseError};

/// Time for connecting to one of the servers.
const DIAL_PATIENCE: Duration = Duration::from_secs(4);

/// Pause between two looks for the primary.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

/// Most servers in one URL.
const MAX_SERVERS: usize = 16;

/// Why there is no connection, for messages of the pool, which says only that it waited too long. One pool a process.
static TROUBLE: Mutex<Option<String>> = Mutex::new(None);

/// The servers of a URL such as `postgres://app@a:5432,b:5432/shop`; clones share which of them is in use.
#[derive(Debug, Clone)]
pub struct Servers {
    /// As it was configured.
    url: SecretUrl,
    /// File from which the URL is read again, if it comes from one.
    file: Option<PathBuf>,
    each: Arc<Mutex<Arc<[Server]>>>,
    current: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Server {
    url: SecretUrl,
    options: PgConnectOptions,
}

/// Servers that were tried, and why each of them is of no use.
#[derive(Debug)]
pub struct NoServer(Vec<(SecretUrl, sqlx::Error)>);

impl NoServer {
    /// What the servers said.
    pub(super) fn causes(&self) -> impl Iterator<Item = &sqlx::Error> {
        self.0.iter().map(|(_, cause)| cause)
    }

    /// Takes the first cause.
    pub(super) fn into_cause(self) -> Option<sqlx::Error> {
        self.0.into_iter().next().map(|(_, cause)| cause)
    }
}

impl fmt::Display for NoServer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each: Vec<String> = self.0.iter().map(|(url, cause)| format!("{url}: {}", text(cause))).collect();
        formatter.write_str(&each.join("; "))
    }
}

impl std::error::Error for NoServer {}

/// An unfit server is described by what it is, without the library's words for a wrong configuration.
pub(super) fn text(cause: &sqlx::Error) -> String {
    match cause {
        sqlx::Error::Configuration(unfit) => unfit.to_string(),
        other => Report::of(other).to_string(),
    }
}

impl Servers {
    /// Reads a URL with one or several hosts, as libpq does. Of `target_session_attrs` only what leads to a server that can
    /// write makes sense, and is what the relay looks for anyway.
    ///
    /// # Errors
    /// [`DatabaseError::Url`].
    pub fn parse(url: &SecretUrl) -> Result<Self, DatabaseError> {
        let each = parse_each(url).map_err(|source| DatabaseError::Url { url: url.clone(), source })?;
        Ok(Self { url: url.clone(), file: None, each: Arc::new(Mutex::new(each)), current: Arc::default() })
    }

    /// Names the file that the URL comes from.
    #[must_use]
    pub fn from_file(self, file: Option<PathBuf>) -> Self {
        Self { file, ..self }
    }

    /// Reads again the files that credentials come from: the one with the URL, and libpq's with passwords. What cannot be read
    /// leaves everything as it is.
    pub fn reload(&self) {
        let url = match &self.file {
            Some(file) => SecretUrl::read("DATABASE_URL_FILE", file),
            None => Ok(self.url.clone()),
        };
        match url.and_then(|url| parse_each(&url)) {
            Ok(each) => *self.each.lock().unwrap_or_else(PoisonError::into_inner) = each,
            Err(error) => tracing::warn!("{error}; the credentials from before are used"),
        }
    }

    fn each(&self) -> Arc<[Server]> {
        Arc::clone(&self.each.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The URL as it was configured.
    #[must_use]
    pub fn url(&self) -> &SecretUrl {
        &self.url
    }

    /// URL of the server in use, with its host alone.
    #[must_use]
    pub fn current_url(&self) -> SecretUrl {
        let each = self.each();
        each[self.current.load(Ordering::Relaxed) % each.len()].url.clone()
    }

    /// Looks for a server that can be used, the one in use first, and says how to connect to it.
    pub(super) async fn locate(&self, access: Access) -> Result<PgConnectOptions, NoServer> {
        let first = self.current.load(Ordering::Relaxed);
        let mut tried = Vec::new();
        let each = self.each();
        for index in (first..first + each.len()).map(|index| index % each.len()) {
            let server = &each[index];
            match dial(&server.options, access).await {
                Ok(()) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok(server.options.clone());
                }
                Err(cause) => tried.push((server.url.clone(), cause)),
            }
        }
        Err(NoServer(tried))
    }

    /// Leads a pool to the primary: after each failure, until shutdown is requested.
    pub async fn pilot(self, pool: PgPool, access: Access, shutdown: Shutdown) {
        while shutdown.or_done(FAILED.notified()).await.is_some() {
            self.reload();
            let before = self.current_url();
            match self.locate(access).await {
                Ok(options) => {
                    note(None);
                    let now = self.current_url();
                    if before != now {
                        tracing::warn!(from = %before, to = %now, "using another server of DATABASE_URL");
                    }
                    // Its credentials may have changed, even if the server has not.
                    pool.set_connect_options(options);
                }
                Err(none) => note(Some(none.to_string())),
            }
            if shutdown.or_done(tokio::time::sleep(LOOK_PAUSE)).await.is_none() {
                return;
            }
        }
    }
}

/// Opens a connection and closes it again.
async fn dial(options: &PgConnectOptions, access: Access) -> Result<(), sqlx::Error> {
    let dialing = async {
        let mut connection = options.connect().await?;
        session::prepare(&mut connection, access).await?;
        connection.close().await
    };
    let silence = format!("no answer within {DIAL_PATIENCE:?}");
    let silence = std::io::Error::new(std::io::ErrorKind::TimedOut, silence);
    timeout(DIAL_PATIENCE, dialing).await.unwrap_or_else(|_| Err(silence.into()))
}

pub(super) fn note(trouble: Option<String>) {
    *TROUBLE.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
}

/// Puts the reason why there is no connection in the place of an error of the pool, which says only that it has waited.
pub(super) fn explain<E: From<sqlx::Error> + std::error::Error + 'static>(error: E) -> E {
    let Some(trouble) = TROUBLE.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return error };
    if Report::of(&error).to_string().contains(&sqlx::Error::PoolTimedOut.to_string()) {
        sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::NotConnected, trouble)).into()
    } else {
        error
    }
}

fn parse_each(url: &SecretUrl) -> Result<Arc<[Server]>, UsageError> {
    split(url.expose())?.iter().map(|single| Server::parse(single)).collect()
}

impl Server {
    fn parse(url: &str) -> Result<Self, UsageError> {
        let options = PgConnectOptions::from_str(url).map_err(|error| UsageError::of(&error))?;
        let url = url.parse().map_err(|error| UsageError::of(&error))?;
        Ok(Self { url, options: options.application_name(APPLICATION_NAME) })
    }
}

/// Makes one URL for each host of a URL, without `target_session_attrs`.
fn split(url: &str) -> Result<Vec<String>, UsageError> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("postgres", url));
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
    let (user, hosts) =
        authority.rsplit_once('@').map_or((None, authority), |(user, hosts)| (Some(user), hosts));
    let mut kept = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("target_session_attrs", "any" | "read-write" | "primary")) => {}
            Some(("target_session_attrs", _)) => {
                let wrong = "target_session_attrs must be read-write or primary: the relay writes";
                return Err(UsageError(wrong.to_owned()));
            }
            Some(("host" | "hostaddr", list)) if list.contains(',') => {
                let wrong =
                    "several hosts belong before the path, as in postgres://user@a:5432,b:5432/database";
                return Err(UsageError(wrong.to_owned()));
            }
            _ => kept.push(pair),
        }
    }
    let user = user.map(|user| format!("{user}@")).unwrap_or_default();
    let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
    let hosts: Vec<&str> = hosts.split(',').collect();
    if hosts.len() > MAX_SERVERS {
        return Err(UsageError(format!("it names more than {MAX_SERVERS} hosts")));
    }
    Ok(hosts.into_iter().map(|host| format!("{scheme}://{user}{host}{path}{query}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_with_several_hosts_becomes_one_for_each() {
        let both =
            split("postgres://u:p%2C@a:5432,[::1]:5433/shop?target_session_attrs=read-write&sslmode=require");
        let expected = [
            "postgres://u:p%2C@a:5432/shop?sslmode=require",
            "postgres://u:p%2C@[::1]:5433/shop?sslmode=require",
        ];
        assert_eq!(both.unwrap(), expected);
    }

    #[test]
    fn a_url_with_one_host_stays_as_it_is() {
        for url in [
            "postgres://u@h/shop",
            "postgres:///shop?host=/run/pg",
            "postgresql://h",
            "postgres://h?user=a&x=b",
        ] {
            assert_eq!(split(url).unwrap(), [url]);
        }
        assert_eq!(split("postgres://h?target_session_attrs=primary").unwrap(), ["postgres://h"]);
    }

    #[test]
    fn what_the_relay_cannot_do_is_refused() {
        for url in ["postgres://h/x?target_session_attrs=standby", "postgres:///x?host=a,b"] {
            split(url).unwrap_err();
        }
        split(&format!("postgres://{}/x", ["h"; MAX_SERVERS + 1].join(","))).unwrap_err();
    }
}
