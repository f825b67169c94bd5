//! Each mode of the fault proxy, against an echo server that records what it received.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test, also in its helper functions")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devstack::eventually;
use devstack::proxy::{FaultProxy, Mode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(10);

/// Long enough for bytes that would arrive to have arrived.
const SILENCE: Duration = Duration::from_millis(150);

type Received = Arc<Mutex<Vec<u8>>>;

async fn echo_server() -> (SocketAddr, Received) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let received = Received::default();
    let record = Arc::clone(&received);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let record = Arc::clone(&record);
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    record.lock().unwrap().extend_from_slice(&buffer[..length]);
                    stream.write_all(&buffer[..length]).await.unwrap();
                }
            });
        }
    });
    (address, received)
}

async fn start() -> (FaultProxy, Received) {
    let (address, received) = echo_server().await;
    (FaultProxy::start(address).await.unwrap(), received)
}

async fn exchange(client: &mut TcpStream, text: &str) -> std::io::Result<String> {
    client.write_all(text.as_bytes()).await?;
    let mut reply = vec![0; text.len()];
    client.read_exact(&mut reply).await?;
    Ok(String::from_utf8(reply).unwrap())
}

async fn is_silent(client: &mut TcpStream) -> bool {
    timeout(SILENCE, client.read(&mut [0; 16])).await.is_err()
}

#[tokio::test]
async fn pass_forwards_both_ways_and_the_end() {
    let (proxy, _) = start().await;
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    assert_eq!(exchange(&mut client, "hello").await.unwrap(), "hello");
    client.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 16]).await.unwrap(), 0);
}

#[tokio::test]
async fn stall_holds_everything_until_it_ends() {
    let (proxy, received) = start().await;
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    proxy.set_mode(Mode::Stall);
    client.write_all(b"held").await.unwrap();
    assert!(is_silent(&mut client).await);
    assert!(received.lock().unwrap().is_empty());
    proxy.set_mode(Mode::Pass);
    let mut reply = [0; 4];
    client.read_exact(&mut reply).await.unwrap();
    assert_eq!(&reply, b"held");
}

#[tokio::test]
async fn dropping_to_the_server_delivers_nothing() {
    let (proxy, received) = start().await;
    proxy.set_mode(Mode::DropToServer);
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    client.write_all(b"lost").await.unwrap();
    assert!(is_silent(&mut client).await);
    assert!(received.lock().unwrap().is_empty());
}

#[tokio::test]
async fn dropping_to_the_client_delivers_the_request_and_loses_the_reply() {
    let (proxy, received) = start().await;
    proxy.set_mode(Mode::DropToClient);
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    client.write_all(b"heard").await.unwrap();
    assert!(is_silent(&mut client).await);
    assert_eq!(received.lock().unwrap().as_slice(), b"heard");
}

#[tokio::test]
async fn connection_that_lost_bytes_is_reset_when_it_would_forward_again() {
    for mode in [Mode::DropToServer, Mode::DropToClient] {
        let (proxy, received) = start().await;
        let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
        proxy.set_mode(mode);
        client.write_all(b"lost").await.unwrap();
        assert!(is_silent(&mut client).await);
        proxy.set_mode(Mode::Pass);
        let heard = received.lock().unwrap().len();
        assert!(exchange(&mut client, "later").await.is_err(), "{mode:?}");
        assert!(mode == Mode::DropToClient || received.lock().unwrap().len() == heard);
    }
}

#[tokio::test]
async fn dropping_one_reply_resets_that_connection_and_then_passes() {
    let (proxy, received) = start().await;
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    proxy.set_mode(Mode::DropReplyOnce);
    assert!(exchange(&mut client, "heard").await.is_err());
    assert_eq!(received.lock().unwrap().as_slice(), b"heard");
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    assert_eq!(exchange(&mut client, "again").await.unwrap(), "again");
}

#[tokio::test]
async fn refuse_closes_new_connections_and_leaves_existing_ones() {
    let (proxy, _) = start().await;
    let mut existing = TcpStream::connect(proxy.addr()).await.unwrap();
    exchange(&mut existing, "hello").await.unwrap();
    proxy.set_mode(Mode::Refuse);
    if let Ok(mut client) = TcpStream::connect(proxy.addr()).await {
        assert!(exchange(&mut client, "hello").await.is_err());
    }
    assert_eq!(exchange(&mut existing, "hello").await.unwrap(), "hello");
}

#[tokio::test]
async fn resetting_ends_current_connections_even_stalled_ones() {
    let (proxy, _) = start().await;
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    exchange(&mut client, "hello").await.unwrap();
    proxy.set_mode(Mode::Stall);
    client.write_all(b"held").await.unwrap();
    proxy.reset_connections();
    let error = timeout(DEADLINE, client.read(&mut [0; 16])).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    proxy.set_mode(Mode::Pass);
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    assert_eq!(exchange(&mut client, "hello").await.unwrap(), "hello");
}

#[tokio::test]
async fn delay_slows_both_directions() {
    let (proxy, _) = start().await;
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    proxy.set_mode(Mode::Delay(Duration::from_millis(50)));
    let start = Instant::now();
    exchange(&mut client, "slow").await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(100));
}

#[tokio::test]
async fn new_connections_go_to_the_new_upstream() {
    let (proxy, old) = start().await;
    let (address, new) = echo_server().await;
    proxy.set_upstream(address);
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    exchange(&mut client, "moved").await.unwrap();
    assert!(old.lock().unwrap().is_empty());
    assert_eq!(new.lock().unwrap().as_slice(), b"moved");
}

#[tokio::test]
async fn dropping_the_proxy_closes_its_connections() {
    let (proxy, _) = start().await;
    let mut client = TcpStream::connect(proxy.addr()).await.unwrap();
    exchange(&mut client, "hello").await.unwrap();
    let address = proxy.addr();
    drop(proxy);
    assert!(matches!(timeout(DEADLINE, client.read(&mut [0; 16])).await.unwrap(), Ok(0) | Err(_)));
    eventually(DEADLINE, async || TcpStream::connect(address).await.is_err()).await;
}
