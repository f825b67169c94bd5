//! The connection to NATS: options, errors that say what to fix, and whether it is up at this moment.

mod account;
mod creds;
mod options;
pub(crate) mod trouble;

use std::{future::Future, sync::Arc, time::Duration};

use async_nats::{
    ConnectErrorKind, ConnectOptions, Event,
    jetstream::{self, context::ContextBuilder},
};
use tokio::{sync::watch, time::Instant};

use crate::{Backoff, SecretUrl, secret::SecretFileError, secret_url::SecretUrlError};

pub use account::Account;
pub use creds::CredsError;
pub use options::NatsOptions;
pub use trouble::JetStreamError;
use trouble::Trouble;

/// A dead broker is noticed after two missed pings; the library's own default of a minute is far too long here.
const PING_INTERVAL: Duration = Duration::from_secs(2);

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest pause between attempts to reconnect.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(1);

/// How long a request such as stream information may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no connection to NATS.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// The address cannot be used.
    #[error("NATS_URL (--nats-url) {url} is not a list of NATS servers")]
    Url {
        /// The address, without credentials.
        url: SecretUrl,
    },
    /// The file does not hold an address.
    #[error("cannot use the content of {file} (NATS_URL_FILE)")]
    UrlFile {
        /// The file.
        file: String,
        /// What is wrong with its content.
        source: SecretUrlError,
    },
    /// The address names no server.
    #[error("NATS_URL (--nats-url) names no server")]
    NoServer,
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] SecretFileError),
    /// The credentials file cannot be used.
    #[error("cannot use the credentials in {file} (NATS_CREDS)")]
    Credentials {
        /// The file.
        file: String,
        /// What is wrong with its content.
        source: CredsError,
    },
    /// The server wants other credentials.
    #[error(
        "NATS at {url} refuses the credentials; check NATS_CREDS, or NATS_USER and NATS_PASSWORD, or user and password \
         in NATS_URL"
    )]
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
        !matches!(self, Self::Refused { .. } | Self::Unreachable { .. })
    }
}

/// A connection that reconnects by itself; clones share it.
#[derive(Debug, Clone)]
pub struct Nats {
    /// The client.
    pub client: async_nats::Client,
    link: watch::Receiver<Link>,
    trouble: Arc<Trouble>,
    url: SecretUrl,
    api_prefix: String,
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
    /// Files with credentials and certificates are read again for each attempt, later ones included.
    ///
    /// # Errors
    /// [`NatsError`].
    pub async fn connect(options: &NatsOptions, name: &str, patience: Duration) -> Result<Self, NatsError> {
        let url = options.url()?;
        let servers = options.servers()?;
        options.check_files()?;
        let started = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(50), MAX_RECONNECT_DELAY);
        loop {
            let trouble = Arc::new(Trouble::default());
            let (connect, link) = connect_options(options, name, &trouble);
            let error = match connect.connect(servers.as_slice()).await {
                Ok(client) => {
                    let api_prefix = options.api_prefix();
                    return Ok(Self { client, link, trouble, url, api_prefix });
                }
                Err(error) => error,
            };
            if is_refusal(&error) {
                return Err(NatsError::Refused { url });
            }
            let delay = backoff.next_delay();
            if started.elapsed() + delay >= patience {
                return Err(NatsError::Unreachable { url, waited: patience, source: error });
            }
            tokio::time::sleep(delay).await;
        }
    }

    /// The address, without credentials.
    #[must_use]
    pub fn url(&self) -> &SecretUrl {
        &self.url
    }

    /// JetStream in the domain that the options name. Requests and acknowledgements of publishes time out.
    #[must_use]
    pub fn jetstream(&self, timeout: Duration) -> jetstream::Context {
        ContextBuilder::new()
            .api_prefix(&self.api_prefix)
            .timeout(timeout)
            .ack_timeout(timeout)
            .build(self.client.clone())
    }

    /// Asks how much JetStream storage the account uses and may use.
    ///
    /// # Errors
    /// [`JetStreamError`].
    pub async fn account(&self) -> Result<Account, JetStreamError> {
        let request = self.client.request(format!("{}.INFO", self.api_prefix), "".into());
        let answer = request.await.map_err(|error| self.judge(error))?;
        Account::parse(&answer.payload).map_err(JetStreamError::Refused)
    }

    /// Says what an error of a request to JetStream means, as far as the server has told.
    pub fn judge(&self, error: impl Into<async_nats::Error>) -> JetStreamError {
        if self.link().connected {
            self.trouble.judge(error.into(), self.api_prefix.clone())
        } else {
            JetStreamError::NotConnected(self.trouble.why_not_connected())
        }
    }

    /// Why there is no connection at this moment, for people.
    #[must_use]
    pub fn why_not_connected(&self) -> String {
        self.trouble.why_not_connected()
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

fn connect_options(
    options: &NatsOptions,
    name: &str,
    trouble: &Arc<Trouble>,
) -> (ConnectOptions, watch::Receiver<Link>) {
    let (sender, link) = watch::channel(Link { connected: false, epoch: 0 });
    let (of_auth, of_events, of_attempts) = (options.clone(), Arc::clone(trouble), Arc::clone(trouble));
    let mut connect =
        ConnectOptions::with_auth_callback(move |nonce| std::future::ready(of_auth.auth_again(&nonce)))
            .name(name)
            .ping_interval(PING_INTERVAL)
            .connection_timeout(CONNECT_TIMEOUT)
            .request_timeout(Some(REQUEST_TIMEOUT))
            .reconnect_delay_callback(|attempt| {
                let shift = u32::try_from(attempt.min(10)).expect("at most 10");
                Duration::from_millis(10 << shift).min(MAX_RECONNECT_DELAY)
            })
            // Called before each attempt, it is the only place that learns why the ones before have failed.
            .reconnect_to_server_callback(move |servers, _| {
                if let Some(failures) = of_attempts.attempted(&servers) {
                    tracing::warn!("cannot connect to NATS; trying again: {failures}");
                }
                std::future::ready(None)
            })
            .event_callback(move |event| {
                note(&sender, &of_events, &event);
                std::future::ready(())
            });
    if let Some(file) = &options.nats_ca {
        connect = connect.add_root_certificates(file.clone()).require_tls(true);
    }
    if let Some((certificate, key)) = options.client_certificate() {
        connect = connect.add_client_certificate(certificate.into(), key.into()).require_tls(true);
    }
    (connect, link)
}

fn note(sender: &watch::Sender<Link>, trouble: &Trouble, event: &Event) {
    match event {
        Event::Connected => {
            tracing::info!("connected to NATS");
            trouble.connected();
            sender.send_modify(|link| link.connected = true);
        }
        Event::Disconnected => {
            tracing::warn!("connection to NATS lost");
            lose(sender);
        }
        // By us: attempts to connect again have no limit.
        Event::Closed => lose(sender),
        Event::ServerError(error) => {
            if let Some(error) = trouble.refused(error) {
                tracing::warn!("NATS reports an error: {error}");
            }
        }
        Event::ClientError(_) | Event::SlowConsumer(_) | Event::LameDuckMode | Event::Draining => {
            tracing::debug!(%event, "NATS");
        }
    }
}

fn lose(sender: &watch::Sender<Link>) {
    sender.send_modify(|link| *link = Link { connected: false, epoch: link.epoch + 1 });
}

fn is_refusal(error: &async_nats::ConnectError) -> bool {
    matches!(error.kind(), ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation)
}
