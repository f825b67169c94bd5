//! A replication connection: it opens, authenticates, asks who the server is, and streams what a slot decodes.
//!
//! Framing, SCRAM and the codec of the copy stream are `pgwire-replication`'s. Its client is not used: it speaks
//! protocol version 1 only, so that no transaction is streamed before its commit, and its TLS compiles a second
//! cryptography provider, with which rustls refuses to work.

mod authentication;
mod error;
mod feedback;
mod passfile;
mod settings;
mod stream;
mod tls;
mod transport;

use std::time::Duration;

use pgwire_replication::Lsn;
use pgwire_replication::protocol::framing::{MessageReader, write_query, write_startup_message};
use rules::PINNED_SETTINGS;
use tokio::io::BufReader;

use crate::name::check_name;

use transport::Transport;

pub use error::SessionError;
pub use feedback::Confirmer;
pub use settings::{Settings, SettingsError, SslMode};
pub use stream::{ChangeStream, Frame, StreamOptions};

/// Version 3.0 of the frontend/backend protocol.
const PROTOCOL_VERSION: i32 = 196_608;

/// What is read from the connection at once.
const READ_BUFFER_BYTES: usize = 64 * 1024;

/// Largest message accepted. A row of Postgres can have a gigabyte; one that large has no place in a cache.
const MAX_MESSAGE_BYTES: usize = 256 * 1024 * 1024;

/// Floats that differ must differ as text: watched columns are compared by it.
const EXACT_FLOATS: (&str, &str) = ("extra_float_digits", "3");

/// Who the server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Identity of the cluster, the same on all its replicas.
    pub system_id: String,
    /// Grows with every failover.
    pub timeline: i64,
    /// End of the flushed log.
    pub flushed: Lsn,
}

/// An authenticated replication connection that does not stream yet.
pub struct Session {
    stream: BufReader<Transport>,
    reader: MessageReader,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    /// Connects and authenticates within `patience`. `wal_sender_timeout` is how long the server waits for a sign of
    /// life before it gives the slot to somebody else.
    ///
    /// # Errors
    /// [`SessionError`]. Cancel-safe: a dropped call closes the connection.
    pub async fn open(
        settings: &Settings,
        wal_sender_timeout: Duration,
        patience: Duration,
    ) -> Result<Self, SessionError> {
        let opening = Self::open_unhurried(settings, wal_sender_timeout);
        tokio::time::timeout(patience, opening).await.unwrap_or(Err(SessionError::TimedOut(patience)))
    }

    async fn open_unhurried(settings: &Settings, wal_sender_timeout: Duration) -> Result<Self, SessionError> {
        let transport = transport::connect(settings).await?;
        let mut stream = BufReader::with_capacity(READ_BUFFER_BYTES, transport);
        let timeout = format!("-c wal_sender_timeout={}", wal_sender_timeout.as_millis());
        let mut parameters = vec![
            ("user", settings.user.as_str()),
            ("database", settings.database.as_str()),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
            ("application_name", settings.application_name.as_str()),
            ("options", timeout.as_str()),
            EXACT_FLOATS,
        ];
        // What a client asks for goes before what server, database and role have as defaults.
        parameters.extend(PINNED_SETTINGS);
        write_startup_message(&mut stream, PROTOCOL_VERSION, &parameters).await?;
        let mut reader = MessageReader::new().with_max_message_size(MAX_MESSAGE_BYTES);
        authentication::authenticate(&mut stream, &mut reader, settings).await?;
        Ok(Self { stream, reader })
    }

    /// Asks the server who it is.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn identify(&mut self) -> Result<Identity, SessionError> {
        let row = self.single_row("IDENTIFY_SYSTEM").await?;
        let field = |index: usize| row.get(index).cloned().flatten().ok_or(SessionError::Unexpected);
        Ok(Identity {
            system_id: field(0)?,
            timeline: field(1)?.parse().map_err(|_| SessionError::Unexpected)?,
            flushed: field(2)?.parse().map_err(|_| SessionError::Unexpected)?,
        })
    }

    /// Lets standbys keep a copy of the slot, which nobody may be reading. Postgres has this since version 17.
    ///
    /// # Errors
    /// [`SessionError`]; after what the server says the session goes on.
    pub async fn keep_on_standbys(&mut self, slot: &str) -> Result<(), SessionError> {
        check_name(slot)?;
        self.run(&format!("ALTER_REPLICATION_SLOT {slot} (FAILOVER true)")).await.map(drop)
    }

    async fn single_row(&mut self, query: &str) -> Result<Vec<Option<String>>, SessionError> {
        self.run(query).await?.ok_or(SessionError::Unexpected)
    }

    /// Runs a command; returns its last row.
    async fn run(&mut self, query: &str) -> Result<Option<Vec<Option<String>>>, SessionError> {
        write_query(&mut self.stream, query).await?;
        let mut row = None;
        let mut error = None;
        loop {
            let message = self.reader.read(&mut self.stream).await?;
            match message.tag {
                b'D' => row = Some(data_row(&message.payload)?),
                b'E' => error = Some(SessionError::from_server(&message.payload)),
                b'Z' => return error.map_or(Ok(row), Err),
                _ => {}
            }
        }
    }

    /// Begins to stream what `slot` decodes, from the position it has confirmed.
    ///
    /// # Errors
    /// [`SessionError`]; [`SessionError::SlotActive`] while another session reads the slot.
    pub async fn start(mut self, options: &StreamOptions<'_>) -> Result<ChangeStream, SessionError> {
        write_query(&mut self.stream, &options.statement()?).await?;
        loop {
            let message = self.reader.read(&mut self.stream).await?;
            match message.tag {
                b'W' => return Ok(ChangeStream::new(self.stream, self.reader, options.publication)),
                b'E' => return Err(SessionError::from_server(&message.payload)),
                _ => {}
            }
        }
    }
}

fn data_row(payload: &[u8]) -> Result<Vec<Option<String>>, SessionError> {
    fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8], SessionError> {
        let (taken, left) = rest.split_at_checked(length).ok_or(SessionError::Unexpected)?;
        *rest = left;
        Ok(taken)
    }
    let mut rest = payload;
    let count = take(&mut rest, 2)?;
    let count = u16::from_be_bytes([count[0], count[1]]);
    (0..count)
        .map(|_| {
            let length = take(&mut rest, 4)?;
            let length = i32::from_be_bytes([length[0], length[1], length[2], length[3]]);
            // -1 stands for NULL.
            let Ok(length) = usize::try_from(length) else { return Ok(None) };
            Ok(Some(String::from_utf8_lossy(take(&mut rest, length)?).into_owned()))
        })
        .collect()
}
