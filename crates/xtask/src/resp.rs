//! A small Redis client: pipelines and pushed messages, nothing else.

use std::net::SocketAddr;

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// No reply this client expects is longer.
const MAX_REPLY_BYTES: usize = 1 << 20;

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    request: Vec<u8>,
    /// Replies that have not been read yet.
    unread: usize,
}

/// What Redis answers or pushes. Errors are errors of the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A missing value.
    Nil,
    /// A number.
    Integer(i64),
    /// A status or a value.
    Text(String),
    /// Several; only of the other kinds.
    Array(Vec<Self>),
}

impl Connection {
    /// Connects.
    pub async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.context("cannot connect to Redis")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream), request: Vec::new(), unread: 0 })
    }

    /// Runs one command.
    pub async fn command(&mut self, words: &[&str]) -> anyhow::Result<Reply> {
        self.queue(words);
        self.send().await?;
        self.unread -= 1;
        self.read().await
    }

    /// Adds a command to the pipeline.
    pub fn queue(&mut self, words: &[&str]) {
        self.request.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            self.request.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
        }
        self.unread += 1;
    }

    /// Sends the pipeline and reads all its replies.
    pub async fn drain(&mut self) -> anyhow::Result<()> {
        self.send().await?;
        while self.unread > 0 {
            self.unread -= 1;
            self.read().await?;
        }
        Ok(())
    }

    async fn send(&mut self) -> anyhow::Result<()> {
        let request = std::mem::take(&mut self.request);
        Ok(self.stream.write_all(&request).await?)
    }

    /// Reads the next reply or pushed message.
    pub async fn read(&mut self) -> anyhow::Result<Reply> {
        let line = self.line().await?;
        let Some(count) = line.strip_prefix('*') else { return self.scalar(&line).await };
        let mut elements = Vec::new();
        for _ in 0..count.parse::<usize>().unwrap_or(0) {
            let line = self.line().await?;
            elements.push(self.scalar(&line).await?);
        }
        Ok(Reply::Array(elements))
    }

    async fn scalar(&mut self, line: &str) -> anyhow::Result<Reply> {
        let (kind, rest) = line.split_at_checked(1).context("empty reply")?;
        Ok(match kind {
            "+" => Reply::Text(rest.to_owned()),
            ":" => Reply::Integer(rest.parse()?),
            "$" => self.bulk(rest.parse()?).await?,
            "-" => bail!("Redis: {rest}"),
            _ => bail!("unexpected reply {line:?}"),
        })
    }

    async fn bulk(&mut self, length: i64) -> anyhow::Result<Reply> {
        // A negative length is nil.
        let Ok(length) = usize::try_from(length) else { return Ok(Reply::Nil) };
        ensure!(length <= MAX_REPLY_BYTES, "reply of {length} bytes");
        let mut bytes = vec![0; length + 2];
        self.stream.read_exact(&mut bytes).await?;
        bytes.truncate(length);
        Ok(Reply::Text(String::from_utf8_lossy(&bytes).into_owned()))
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line).await? > 0, "Redis closed the connection");
        line.truncate(line.trim_end().len());
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn replies_of_every_kind_are_read() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"+OK\r\n:7\r\n$-1\r\n*2\r\n$3\r\na\nb\r\n:1\r\n-ERR no\r\n").await.unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).await.unwrap();
            request
        });
        let mut connection = Connection::open(address).await.unwrap();
        assert_eq!(connection.command(&["PING"]).await.unwrap(), Reply::Text("OK".to_owned()));
        assert_eq!(connection.read().await.unwrap(), Reply::Integer(7));
        assert_eq!(connection.read().await.unwrap(), Reply::Nil);
        let array = vec![Reply::Text("a\nb".to_owned()), Reply::Integer(1)];
        assert_eq!(connection.read().await.unwrap(), Reply::Array(array));
        assert_eq!(connection.read().await.unwrap_err().to_string(), "Redis: ERR no");
        drop(connection);
        assert_eq!(server.await.unwrap(), b"*1\r\n$4\r\nPING\r\n");
    }
}
