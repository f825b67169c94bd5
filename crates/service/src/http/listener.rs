//! Accepted connections with limits: how many there are, and how long one request may take.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{Instant, Sleep, sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Connections served at a time. A few probes and scrapers need one each; one more closes the oldest, so that connections
/// that are held open never keep a probe out.
const MAX_CONNECTIONS: usize = 64;

/// Time from the start of a connection, or from the last response, until the next response is being written. A request that
/// comes byte by byte does not extend it.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// A TCP listener whose connections are bounded in number and time.
pub(super) struct BoundedListener {
    listener: TcpListener,
    /// The connections, oldest first. A weak reference is dead when its connection has ended.
    places: VecDeque<Weak<CancellationToken>>,
    limit: usize,
}

impl BoundedListener {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self { listener, places: VecDeque::new(), limit: MAX_CONNECTIONS }
    }

    /// Takes a place for a connection, the one of the oldest if there is no other.
    fn place(&mut self) -> Arc<CancellationToken> {
        self.places.retain(|place| place.strong_count() > 0);
        if self.places.len() >= self.limit
            && let Some(oldest) = self.places.pop_front().and_then(|place| place.upgrade())
        {
            oldest.cancel();
        }
        let place = Arc::new(CancellationToken::new());
        self.places.push_back(Arc::downgrade(&place));
        place
    }
}

impl Listener for BoundedListener {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BoundedStream, SocketAddr) {
        // axum's own implementation waits out errors such as too many open files.
        let (stream, addr) = Listener::accept(&mut self.listener).await;
        let place = self.place();
        let evicted = Box::pin((*place).clone().cancelled_owned());
        (BoundedStream { stream, limit: Box::pin(sleep(REQUEST_LIMIT)), evicted, _place: place }, addr)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

pub(super) struct BoundedStream {
    stream: TcpStream,
    limit: Pin<Box<Sleep>>,
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
    _place: Arc<CancellationToken>,
}

impl BoundedStream {
    /// Ends the wait for a stream whose time is up, or whose place is needed.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        let is_over = self.limit.as_mut().poll(context).is_ready();
        if is_over || self.evicted.as_mut().poll(context).is_ready() {
            return Poll::Ready(io::ErrorKind::TimedOut.into());
        }
        Poll::Pending
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Pending => self.wait(context).map(Err),
            ready => ready,
        }
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(context, bytes) {
            Poll::Pending => self.wait(context).map(Err),
            ready => {
                self.limit.as_mut().reset(Instant::now() + REQUEST_LIMIT);
                ready
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn listener() -> (BoundedListener, SocketAddr) {
        let listener = BoundedListener::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let addr = Listener::local_addr(&listener).unwrap();
        (listener, addr)
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_comes_byte_by_byte_does_not_extend_its_time() {
        let (mut listener, addr) = listener().await;
        let (client, (mut stream, _)) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let started = Instant::now();
        let mut client = client.unwrap();
        let trickle = async {
            while client.write_all(b"x").await.is_ok() {
                sleep(REQUEST_LIMIT / 4).await;
            }
        };
        let read = async { while stream.read_u8().await.is_ok() {} };
        tokio::select! {
            () = trickle => panic!("the connection was closed by somebody else"),
            () = read => {}
        }
        assert_eq!(started.elapsed().as_secs(), REQUEST_LIMIT.as_secs());
    }

    #[tokio::test]
    async fn one_connection_too_many_closes_the_oldest() {
        let (mut listener, addr) = listener().await;
        listener.limit = 2;
        let mut clients = Vec::new();
        let mut streams = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(addr).await.unwrap());
            streams.push(listener.accept().await.0);
        }
        let error = streams[0].read_u8().await.expect_err("its place is needed");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        clients[2].write_all(b"x").await.unwrap();
        assert_eq!(streams[2].read_u8().await.unwrap(), b'x');
        drop(streams);
        listener.place();
        assert_eq!(listener.places.len(), 1, "places of ended connections are free");
    }
}
