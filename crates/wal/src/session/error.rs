use std::time::Duration;

use crate::InvalidName;
use pgwire_replication::PgWireError;
use pgwire_replication::protocol::ErrorFields;

/// Why a replication connection does not open or ends.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection cannot be made, or broke.
    #[error("replication connection to Postgres failed")]
    Io(#[source] std::io::Error),
    /// No answer in time.
    #[error("Postgres did not answer on the replication connection within {0:?}")]
    TimedOut(Duration),
    /// TLS was asked for and cannot be had.
    #[error("no TLS on the replication connection: {0}")]
    Tls(String),
    /// Authentication failed, or uses a method that is not supported.
    #[error("Postgres refuses the replication connection: {0}")]
    Refused(String),
    /// The role may not replicate.
    #[error(
        "the role may not read the write-ahead log; `alter role … replication` (or grant it rds_replication): {0}"
    )]
    NotPermitted(String),
    /// Another session reads the slot.
    #[error("another session reads the slot: {0}")]
    SlotActive(String),
    /// The slot, or a publication, does not exist.
    #[error("slot or publication is missing: {0}")]
    Missing(String),
    /// The slot cannot be read any more: the log it needs is gone.
    #[error("slot is lost: {0}")]
    SlotLost(String),
    /// Anything else the server says.
    #[error("Postgres ended the replication connection: {message} (SQLSTATE {code})")]
    Server {
        /// SQLSTATE.
        code: String,
        /// What it said.
        message: String,
    },
    /// A name could not be used as it is in a replication command.
    #[error(transparent)]
    InvalidName(#[from] InvalidName),
    /// The server sent something that is not part of the protocol.
    #[error("unexpected message on the replication connection")]
    Unexpected,
    /// The client library gave up.
    #[error("replication protocol failed")]
    Protocol(#[source] PgWireError),
}

impl SessionError {
    /// From the payload of an `ErrorResponse`.
    pub(super) fn from_server(payload: &[u8]) -> Self {
        let fields = ErrorFields::parse(payload);
        let code = fields.code.unwrap_or_default();
        let message = fields.message.unwrap_or_default();
        match code.as_str() {
            // invalid_authorization_specification, invalid_password, invalid_catalog_name
            "28000" | "28P01" | "3D000" => Self::Refused(message),
            "42501" => Self::NotPermitted(message),
            "55006" => Self::SlotActive(message),
            "42704" => Self::Missing(message),
            // object_not_in_prerequisite_state
            "55000" => Self::SlotLost(message),
            _ => Self::Server { code, message },
        }
    }
}

impl From<PgWireError> for SessionError {
    fn from(error: PgWireError) -> Self {
        match error {
            PgWireError::Io(error) => Self::Io(std::io::Error::new(error.kind(), error.to_string())),
            PgWireError::Auth(message) => Self::Refused(message),
            other => Self::Protocol(other),
        }
    }
}

impl From<std::io::Error> for SessionError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}
