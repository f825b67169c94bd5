use std::pin::Pin;

use pgwire_replication::protocol::framing::write_ssl_request;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::settings::{Host, SslMode};
use super::{SessionError, Settings, tls};

/// Whatever the connection runs over.
pub(super) type Transport = Pin<Box<dyn Duplex>>;

/// Bytes in both directions.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}

/// Connects, with TLS as the settings ask.
pub(super) async fn connect(settings: &Settings) -> Result<Transport, SessionError> {
    let name = match &settings.host {
        Host::Socket(directory) => {
            let path = directory.join(format!(".s.PGSQL.{}", settings.port));
            return Ok(Box::pin(UnixStream::connect(path).await?));
        }
        Host::Name(name) => name,
    };
    let address = settings.address.as_deref().unwrap_or(name);
    let mut tcp = TcpStream::connect((address, settings.port)).await?;
    tcp.set_nodelay(true)?;
    if settings.ssl_mode == SslMode::Disable {
        return Ok(Box::pin(tcp));
    }
    write_ssl_request(&mut tcp).await?;
    match tcp.read_u8().await? {
        b'S' => Ok(Box::pin(tls::wrap(tcp, settings, name).await?)),
        b'N' if settings.ssl_mode == SslMode::Prefer => Ok(Box::pin(tcp)),
        _ => Err(SessionError::Tls(
            "the server does not offer it, but sslmode in DATABASE_URL requires it".to_owned(),
        )),
    }
}
