//! The connection to NATS: options, errors that say what to fix, and whether it is up at this moment.

use std::{future::Future, path::PathBuf, time::Duration};

use async_nats::{ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use percent_encoding::percent_decode_str;
use tokio::{sync::watch, time::Instant};

use crate::{Backoff, SecretUrl};

/// A dead broker is noticed after two missed pings; the library's own default of a minute is far too long here.
const PING_INTERVAL: Duration = Duration::from_secs(2);

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest pause between attempts to reconnect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(1);

/// How long a request such as stream information may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Options of the connection: flatten them into the binary's own.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct NatsOptions {
    /// NATS server or servers, separated by commas
    #[arg(
        long,
        env = "NATS_URL",
        hide_env_values = true,
        default_value = "nats://127.0.0.1:4222",
        global = true
    )]
    pub nats_url: SecretUrl,

    /// File with NATS credentials (a .creds file)
    #[arg(long, env = "NATS_CREDS", value_name = "FILE", global = true)]
    pub nats_creds: Option<PathBuf>,

    /// File with the certificate authority of the NATS servers; implies TLS
    #[arg(long, env = "NATS_CA", value_name = "FILE", global = true)]
    pub nats_ca: Option<PathBuf>,
}

/// Why there is no connection to NATS.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// The address cannot be used.
    #[error("NATS_URL (--nats-url) {url} is not a list of NATS servers")]
    Url {
        /// The address, without credentials.
        url: SecretUrl,
    },
    /// The credentials file cannot be used.
    #[error("the file of NATS_CREDS (--nats-creds) cannot be read")]
    Credentials(#[source] std::io::Error),
    /// The server wants other credentials.
    #[error("NATS at {url} refuses the credentials; check the user and password in NATS_URL, or NATS_CREDS")]
    Refused {
        /// The address, without credentials.
        url: SecretUrl,
    },
    /// Nobody answers there.
    #[error("cannot connect to NATS at {url} within {waited:?}; check NATS_URL and that the server runs")]
    Unreachable {
        /// The address, without credentials.
        url: SecretUrl,
        /// How long it was tried.
        waited: Duration,
        /// The last failure.
        #[source]
        source: async_nats::ConnectError,
    },
}

impl NatsError {
    /// Whether the options are at fault, whatever the world is like.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Url { .. } | Self::Credentials(_))
    }
}

/// A connection that reconnects by itself; clones share it.
#[derive(Debug, Clone)]
pub struct Nats {
    /// The client.
    pub client: async_nats::Client,
    link: watch::Receiver<Link>,
}

/// Whether the connection is up. `epoch` grows with every loss, so that a loss between two looks is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Up at this moment.
    pub connected: bool,
    /// How often it was lost.
    pub epoch: u64,
}

impl Nats {
    /// Connects, trying again for up to `patience` while nobody answers; wrong credentials fail at once.
    ///
    /// # Errors
    /// [`NatsError`].
    pub async fn connect(options: &NatsOptions, name: &str, patience: Duration) -> Result<Self, NatsError> {
        let url = &options.nats_url;
        let servers = url
            .expose()
            .split(',')
            .map(|server| server.trim().parse::<ServerAddr>())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| NatsError::Url { url: url.clone() })?;
        let started = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(50), MAX_RECONNECT_DELAY);
        loop {
            let (connect, link) = connect_options(options, name).await?;
            let connect = with_credentials_of(connect, &servers);
            let error = match connect.connect(servers.as_slice()).await {
                Ok(client) => return Ok(Self { client, link }),
                Err(error) => error,
            };
            if is_refusal(&error) {
                return Err(NatsError::Refused { url: url.clone() });
            }
            let delay = backoff.next_delay();
            if started.elapsed() + delay >= patience {
                return Err(NatsError::Unreachable { url: url.clone(), waited: patience, source: error });
            }
            tokio::time::sleep(delay).await;
        }
    }

    /// Whether the connection is up, and how often it was lost.
    #[must_use]
    pub fn link(&self) -> Link {
        *self.link.borrow()
    }

    /// Waits until the connection is up. Cancel-safe.
    pub async fn connected(&self) {
        let mut link = self.link.clone();
        // The sender lives in the client, which lives in self.
        let _ = link.wait_for(|link| link.connected).await;
    }

    /// Waits until the connection seen as `seen` is lost, at once if it is by now. Cancel-safe.
    pub fn lost_since(&self, seen: Link) -> impl Future<Output = ()> + Send + 'static {
        let mut link = self.link.clone();
        async move {
            let _ = link.wait_for(|now| !now.connected || now.epoch != seen.epoch).await;
        }
    }
}

async fn connect_options(
    options: &NatsOptions,
    name: &str,
) -> Result<(ConnectOptions, watch::Receiver<Link>), NatsError> {
    let (sender, link) = watch::channel(Link { connected: false, epoch: 0 });
    let mut connect = ConnectOptions::new()
        .name(name)
        .ping_interval(PING_INTERVAL)
        .connection_timeout(CONNECT_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .reconnect_delay_callback(|attempt| {
            let shift = u32::try_from(attempt.min(10)).expect("at most 10");
            Duration::from_millis(10 << shift).min(MAX_RECONNECT_DELAY)
        })
        .event_callback(move |event| {
            note(&sender, &event);
            std::future::ready(())
        });
    if let Some(file) = &options.nats_creds {
        connect = connect.credentials_file(file).await.map_err(NatsError::Credentials)?;
    }
    if let Some(file) = &options.nats_ca {
        connect = connect.add_root_certificates(file.clone()).require_tls(true);
    }
    Ok((connect, link))
}

/// The library leaves user and password in the URL alone; a lone user is a token, as NATS has it.
fn with_credentials_of(connect: ConnectOptions, servers: &[ServerAddr]) -> ConnectOptions {
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let Some((user, password)) =
        servers.iter().find_map(|server| Some((server.username()?, server.password())))
    else {
        return connect;
    };
    match password {
        Some(password) => connect.user_and_password(decode(user), decode(password)),
        None => connect.token(decode(user)),
    }
}

fn note(sender: &watch::Sender<Link>, event: &Event) {
    match event {
        Event::Connected => {
            tracing::info!("connected to NATS");
            sender.send_modify(|link| link.connected = true);
        }
        Event::Disconnected => {
            tracing::warn!("connection to NATS lost");
            lose(sender);
        }
        // By us: attempts to connect again have no limit.
        Event::Closed => lose(sender),
        Event::ServerError(error) => tracing::warn!(%error, "NATS reports an error"),
        Event::ClientError(error) => tracing::debug!(%error, "NATS client reports an error"),
        Event::SlowConsumer(_) | Event::LameDuckMode | Event::Draining => tracing::debug!(%event, "NATS"),
    }
}

fn lose(sender: &watch::Sender<Link>) {
    sender.send_modify(|link| *link = Link { connected: false, epoch: link.epoch + 1 });
}

fn is_refusal(error: &async_nats::ConnectError) -> bool {
    matches!(error.kind(), ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation)
}
