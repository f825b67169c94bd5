//! A TCP proxy that fails on purpose.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

/// Bytes moved at a time.
const BUFFER_BYTES: usize = 16 * 1024;

/// What the proxy does with connections, existing and new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Forwards everything.
    #[default]
    Pass,
    /// Accepts and forwards nothing; what arrives is forwarded after the mode has changed.
    Stall,
    /// Throws away what the client sends; the server's bytes pass. A connection that has lost bytes is reset when it would
    /// forward again: TCP loses connections, but never something in the middle of one.
    DropToServer,
    /// Throws away what the server sends, in the same manner; the client's bytes pass.
    DropToClient,
    /// Forwards every chunk of bytes this much later, in both directions.
    Delay(Duration),
    /// Closes new connections at once; existing ones go on.
    Refuse,
    /// Delivers requests; the first bytes any server sends are lost and their connection reset, then everything passes.
    /// NATS and Postgres greet new connections, so switch this on when the client is connected.
    DropReplyOnce,
}

/// The state that connections watch.
#[derive(Clone, Copy, Debug)]
struct Control {
    mode: Mode,
    upstream: SocketAddr,
    /// Connections accepted under an older epoch are to be reset.
    epoch: u64,
}

/// Listens on a port of its own and forwards to an upstream server, as well as its [`Mode`] lets it.
///
/// Must be started, and used, inside a Tokio runtime. Dropping it closes all its connections.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    control: Arc<watch::Sender<Control>>,
    acceptor: JoinHandle<()>,
}

impl FaultProxy {
    /// Starts a proxy to `upstream` in mode [`Mode::Pass`].
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start(upstream: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot bind the proxy")?;
        let address = listener.local_addr()?;
        let control = Arc::new(watch::Sender::new(Control { mode: Mode::Pass, upstream, epoch: 0 }));
        let acceptor = tokio::spawn(accept(listener, Arc::clone(&control)));
        Ok(Self { address, control, acceptor })
    }

    /// Where clients connect.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// The mode it is in.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.control.borrow().mode
    }

    /// Switches the mode for existing and new connections.
    pub fn set_mode(&self, mode: Mode) {
        self.control.send_modify(|control| control.mode = mode);
    }

    /// Sends new connections elsewhere, like a name that points to another server after a failover.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        self.control.send_modify(|control| control.upstream = upstream);
    }

    /// Resets all current connections, on both sides.
    pub fn reset_connections(&self) {
        self.control.send_modify(|control| control.epoch += 1);
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        // The connections are tasks in a set of this task, and end with it.
        self.acceptor.abort();
    }
}

async fn accept(listener: TcpListener, control: Arc<watch::Sender<Control>>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else {
            sleep(Duration::from_millis(10)).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        if control.borrow().mode == Mode::Refuse {
            reset(&client);
        } else {
            connections.spawn(serve(client, Arc::clone(&control)));
        }
    }
}

/// Forwards one connection until both sides have closed it, or it is to be reset.
async fn serve(mut client: TcpStream, control: Arc<watch::Sender<Control>>) {
    let Control { upstream, epoch, .. } = *control.borrow();
    let Ok(mut server) = TcpStream::connect(upstream).await else {
        reset(&client);
        return;
    };
    // A failure of this option only costs latency.
    drop((client.set_nodelay(true), server.set_nodelay(true)));
    let mut changes = control.subscribe();
    let finished = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let both = async {
            tokio::try_join!(
                pump(from_client, to_server, &control, Direction::ToServer),
                pump(from_server, to_client, &control, Direction::ToClient),
            )
        };
        tokio::select! {
            result = both => result.is_ok(),
            _ = changes.wait_for(|control| control.epoch != epoch) => false,
        }
    };
    if !finished {
        reset(&client);
        reset(&server);
    }
}

/// Makes the coming close of `stream` a reset instead of an orderly end.
fn reset(stream: &TcpStream) {
    drop(stream.set_zero_linger());
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

/// Moves bytes one way until the source ends; an error means that the connection is to be reset.
async fn pump(
    mut source: ReadHalf<'_>,
    mut target: WriteHalf<'_>,
    control: &watch::Sender<Control>,
    direction: Direction,
) -> Result<()> {
    let mut modes = control.subscribe();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut has_gap = false;
    loop {
        let length = source.read(&mut buffer).await?;
        let mode = modes.wait_for(|control| control.mode != Mode::Stall).await?.mode;
        let lost = match mode {
            Mode::DropToServer => direction == Direction::ToServer,
            Mode::DropToClient => direction == Direction::ToClient,
            Mode::DropReplyOnce if direction == Direction::ToClient && length > 0 => {
                // Only the connection that switches the mode back has lost its reply.
                ensure!(!control.send_if_modified(end_drop_reply_once), "the reply is lost");
                false
            }
            Mode::Delay(delay) => {
                sleep(delay).await;
                false
            }
            _ => false,
        };
        if lost && length > 0 {
            has_gap = true;
            continue;
        }
        ensure!(!has_gap, "bytes were lost before these");
        if length == 0 {
            // The other direction may still have something to say.
            return Ok(target.shutdown().await?);
        }
        target.write_all(&buffer[..length]).await?;
    }
}

fn end_drop_reply_once(control: &mut Control) -> bool {
    let armed = control.mode == Mode::DropReplyOnce;
    if armed {
        control.mode = Mode::Pass;
    }
    armed
}
