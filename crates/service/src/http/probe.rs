use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// A healthcheck that hangs is as good as a no.
const LIMIT: Duration = Duration::from_secs(3);

/// An answer is a few hundred bytes.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// The process at the address is not ready, or there is none.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// Nobody answers there.
    #[error("no answer from http://{addr}/readyz (HTTP_ADDR or --http-addr)")]
    Silent {
        /// The address asked.
        addr: SocketAddr,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It says so itself.
    #[error("not ready: {0}")]
    Said(String),
}

/// Asks the process that serves on `addr` whether it is ready, for health checks of images that have no HTTP client.
/// An address of all interfaces is asked on loopback.
///
/// # Errors
/// [`NotReady`] with the reasons.
pub async fn ask_ready(addr: SocketAddr) -> Result<String, NotReady> {
    let mut asked = addr;
    if addr.ip().is_unspecified() {
        asked.set_ip(if addr.is_ipv4() {
            [127, 0, 0, 1].into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    let answer = timeout(LIMIT, get(asked)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let answer = answer.map_err(|source| NotReady::Silent { addr, source })?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer.as_str(), ""));
    if head.split_whitespace().nth(1) == Some("200") {
        return Ok(body.trim().to_owned());
    }
    Err(NotReady::Said(body.trim().to_owned()))
}

async fn get(addr: SocketAddr) -> io::Result<String> {
    let mut connection = TcpStream::connect(addr).await?;
    connection
        .write_all(format!("GET /readyz HTTP/1.0\r\nHost: {addr}\r\nConnection: close\r\n\r\n").as_bytes())
        .await?;
    let mut answer = String::new();
    connection.take(MAX_ANSWER_BYTES).read_to_string(&mut answer).await?;
    Ok(answer)
}
