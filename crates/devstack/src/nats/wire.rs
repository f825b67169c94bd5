//! Just enough of the NATS client protocol to know that a server is ready and to ask its JetStream API.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// Replies come here; a connection makes one request at a time.
const INBOX: &str = "_INBOX.devstack";

/// No reply this client expects is longer.
const MAX_PAYLOAD_BYTES: usize = 8 << 20;

/// One connection to a server that has answered a ping.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects and waits for the answer to a ping.
    pub(crate) async fn open(address: SocketAddr) -> Result<Self> {
        let mut connection = Self { stream: BufReader::new(TcpStream::connect(address).await?) };
        let info = connection.read_line().await?;
        ensure!(info.starts_with("INFO "), "greeted with {info:?}");
        let options =
            r#"{"verbose":false,"pedantic":false,"headers":true,"no_responders":true,"name":"devstack"}"#;
        let inbox = format!("{INBOX}.{}", std::process::id());
        connection.send(&format!("CONNECT {options}\r\nSUB {inbox} 1\r\nPING\r\n")).await?;
        while connection.read_line().await? != "PONG" {}
        Ok(connection)
    }

    /// Sends a request and returns the reply.
    pub(crate) async fn request(&mut self, subject: &str, payload: &str) -> Result<String> {
        let inbox = format!("{INBOX}.{}", std::process::id());
        self.send(&format!("PUB {subject} {inbox} {}\r\n{payload}\r\n", payload.len())).await?;
        loop {
            let line = self.read_line().await?;
            let length = line.rsplit(' ').next().unwrap_or_default();
            match line.split(' ').next() {
                Some("MSG") => return self.read_payload(length.parse()?).await,
                // Headers without a body: nobody answers this subject.
                Some("HMSG") => bail!("nobody answers {subject}"),
                Some("PING") => self.send("PONG\r\n").await?,
                Some("-ERR") => bail!("{line}"),
                _ => {}
            }
        }
    }

    async fn read_payload(&mut self, length: usize) -> Result<String> {
        ensure!(length <= MAX_PAYLOAD_BYTES, "reply of {length} bytes");
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await?;
        String::from_utf8(payload).context("the reply is not text")
    }

    async fn read_line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line).await? > 0, "the server closed the connection");
        ensure!(!line.starts_with("-ERR"), "{}", line.trim_end());
        Ok(line.trim_end().to_owned())
    }

    async fn send(&mut self, text: &str) -> Result<()> {
        Ok(self.stream.write_all(text.as_bytes()).await?)
    }
}
