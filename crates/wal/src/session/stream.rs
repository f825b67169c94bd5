use std::time::Duration;

use bytes::Bytes;
use pgwire_replication::Lsn;
use pgwire_replication::protocol::framing::MessageReader;
use pgwire_replication::protocol::{ErrorFields, ReplicationCopyData, replication::parse_copy_data};
use tokio::io::{BufReader, ReadHalf};

use super::feedback::Feedback;
use super::transport::Transport;
use super::{Confirmer, SessionError};
use crate::name::check_name;

/// The server answers every second; silence for this long is a dead or frozen server.
/// Generous, since it may be busy with a huge transaction.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// The first Postgres that streams open transactions and delivers logical messages.
const STREAMS_SINCE: i32 = 140_000;

/// What to stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamOptions<'a> {
    /// Slot to read.
    pub slot: &'a str,
    /// Publication that says which tables.
    pub publication: &'a str,
    /// `server_version_num`.
    pub server_version: i32,
    /// Whether large transactions come before their commit.
    pub streaming: bool,
}

impl StreamOptions<'_> {
    pub(super) fn statement(&self) -> Result<String, SessionError> {
        for name in [self.slot, self.publication] {
            check_name(name)?;
        }
        let version = match (self.server_version >= STREAMS_SINCE, self.streaming) {
            (false, _) => "proto_version '1'",
            (true, false) => "proto_version '1', messages 'true'",
            (true, true) => "proto_version '2', messages 'true', streaming 'true'",
        };
        Ok(format!(
            "START_REPLICATION SLOT {} LOGICAL 0/0 ({version}, publication_names '{}')",
            self.slot, self.publication
        ))
    }
}

/// What comes out of a slot.
#[derive(Debug)]
pub enum Frame {
    /// A message of pgoutput.
    Data(Bytes),
    /// Nothing to decode up to this position.
    KeepAlive {
        /// End of the log that the server has looked at.
        wal_end: Lsn,
    },
    /// A notice or warning of the server, with its detail.
    Notice(String),
}

/// The stream of a slot. While it lives nobody else can read the slot; dropped, it closes the connection.
pub struct ChangeStream {
    stream: ReadHalf<BufReader<Transport>>,
    reader: MessageReader,
    feedback: Feedback,
    publication: String,
}

impl std::fmt::Debug for ChangeStream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ChangeStream").finish_non_exhaustive()
    }
}

impl ChangeStream {
    pub(super) fn new(stream: BufReader<Transport>, reader: MessageReader, publication: &str) -> Self {
        let (read, write) = tokio::io::split(stream);
        let publication = publication.to_owned();
        Self { stream: read, reader, feedback: Feedback::spawn(write), publication }
    }

    /// The hand that confirms what was published.
    #[must_use]
    pub fn confirmer(&self) -> Confirmer {
        self.feedback.confirmer()
    }

    /// The next frame. Cancel-safe.
    ///
    /// # Errors
    /// [`SessionError`]; the stream is of no use after one.
    pub async fn next(&mut self) -> Result<Frame, SessionError> {
        loop {
            let read = self.reader.read(&mut self.stream);
            let message = tokio::time::timeout(SILENCE_LIMIT, read)
                .await
                .map_err(|_| SessionError::TimedOut(SILENCE_LIMIT))??;
            match message.tag {
                b'd' => {
                    return Ok(match parse_copy_data(message.payload)? {
                        ReplicationCopyData::XLogData { data, .. } => Frame::Data(data),
                        ReplicationCopyData::KeepAlive { wal_end, .. } => Frame::KeepAlive { wal_end },
                    });
                }
                b'E' => return Err(SessionError::from_server(&message.payload)),
                b'N' => {
                    return notice(&ErrorFields::parse(&message.payload), &self.publication)
                        .map(Frame::Notice);
                }
                // The server ends the stream, for example when it shuts down.
                b'c' => {
                    let closed = std::io::Error::new(
                        std::io::ErrorKind::ConnectionReset,
                        "the server ended the stream",
                    );
                    return Err(SessionError::Io(closed));
                }
                _ => {}
            }
        }
    }

    /// Tells the server the last confirmed position and frees the slot.
    pub async fn finish(self) {
        self.feedback.finish().await;
    }
}

/// The text of a notice. Since Postgres 18 a publication that does not exist at a change is no error: the server passes
/// the change by, and only warns.
fn notice(fields: &ErrorFields, publication: &str) -> Result<String, SessionError> {
    let message = fields.message.clone().unwrap_or_default();
    // object_not_in_prerequisite_state. The words are in the language of the server, the name is not.
    let is_about_state = fields.code.as_deref() == Some("55000");
    if is_about_state && message.contains(&format!("\"{publication}\"")) {
        return Err(SessionError::Missing(message));
    }
    Ok(fields.detail.as_ref().map_or(message.clone(), |detail| format!("{message}: {detail}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publication_that_is_passed_by_is_missing_and_any_other_notice_is_passed_on() {
        let fields = |code: &str, message: &str| ErrorFields {
            code: Some(code.to_owned()),
            message: Some(message.to_owned()),
            detail: Some("why".to_owned()),
            ..ErrorFields::default()
        };
        let skipped = "skipped loading publication \"outbox_relay\"";
        assert!(matches!(notice(&fields("55000", skipped), "outbox_relay"), Err(SessionError::Missing(_))));
        assert_eq!(notice(&fields("55000", skipped), "other").unwrap(), format!("{skipped}: why"));
        assert_eq!(notice(&fields("01000", "hello"), "outbox_relay").unwrap(), "hello: why");
    }
}
