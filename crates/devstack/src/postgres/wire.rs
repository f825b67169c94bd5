//! Just enough of the Postgres protocol (version 3, trust authentication) to know that a server is ready and to run
//! statements without a driver.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Protocol version 3.0.
const PROTOCOL: u32 = 3 << 16;

/// No message this client expects is longer.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Rows of text columns.
pub(crate) type Rows = Vec<Vec<Option<String>>>;

/// One authenticated connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
}

impl Connection {
    /// Connects and waits until the server is ready for a query.
    pub(crate) async fn open(address: SocketAddr, user: &str, database: &str) -> Result<Self> {
        let mut body = PROTOCOL.to_be_bytes().to_vec();
        for text in ["user", user, "database", database, "application_name", "devstack"] {
            body.extend(text.as_bytes());
            body.push(0);
        }
        body.push(0);
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&frame(None, &body)?).await?;
        let mut connection = Self { stream };
        connection.read_until_ready().await?;
        Ok(connection)
    }

    /// Runs one or more statements and returns all their rows.
    pub(crate) async fn query(&mut self, sql: &str) -> Result<Rows> {
        let mut body = sql.as_bytes().to_vec();
        body.push(0);
        self.stream.write_all(&frame(Some(b'Q'), &body)?).await?;
        self.read_until_ready().await
    }

    async fn read_until_ready(&mut self) -> Result<Rows> {
        let mut rows = Rows::new();
        let mut error = None;
        loop {
            let (kind, body) = self.read_message().await?;
            match kind {
                b'R' => ensure!(body == 0_u32.to_be_bytes(), "the server asks for a password"),
                b'D' => rows.push(columns(&body).context("malformed row")?),
                b'E' => error = Some(error_text(&body)),
                b'Z' => break,
                _ => {}
            }
            // A refused startup ends the connection without a ready message.
            if let (b'E', Some(message)) = (kind, error.as_deref().filter(|text| text.contains("FATAL"))) {
                bail!("{message}");
            }
        }
        error.map_or(Ok(rows), |message| bail!("{message}"))
    }

    async fn read_message(&mut self) -> Result<(u8, Vec<u8>)> {
        let kind = self.stream.read_u8().await?;
        let length = usize::try_from(self.stream.read_u32().await?)?;
        ensure!((4..MAX_MESSAGE_BYTES).contains(&length), "message of {length} bytes");
        let mut body = vec![0; length - 4];
        self.stream.read_exact(&mut body).await?;
        Ok((kind, body))
    }
}

fn frame(kind: Option<u8>, body: &[u8]) -> Result<Vec<u8>> {
    let mut bytes: Vec<u8> = kind.into_iter().collect();
    bytes.extend(u32::try_from(body.len() + 4)?.to_be_bytes());
    bytes.extend(body);
    Ok(bytes)
}

fn columns(body: &[u8]) -> Option<Vec<Option<String>>> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut columns = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk::<4>()?;
        rest = after;
        // A negative length is NULL.
        let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
            columns.push(None);
            continue;
        };
        let (value, after) = rest.split_at_checked(length)?;
        rest = after;
        columns.push(Some(String::from_utf8_lossy(value).into_owned()));
    }
    Some(columns)
}

/// Severity and message of an error response.
fn error_text(body: &[u8]) -> String {
    let field = |field: &&[u8]| match field.split_first() {
        Some((b'S' | b'M', text)) => Some(String::from_utf8_lossy(text).into_owned()),
        _ => None,
    };
    body.split(|&byte| byte == 0).filter_map(|bytes| field(&bytes)).collect::<Vec<_>>().join(": ")
}
