//! Spans reach a collector over HTTP, also those of the process's last moment.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    io::{Read, Write},
    net::TcpListener,
    sync::mpsc,
    time::Duration,
};

use service::{logs, trace};
use tracing::level_filters::LevelFilter;

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    log: logs::LogOptions,
}

/// Takes one request and returns its head and body.
fn collect(listener: &TcpListener) -> (String, Vec<u8>) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).unwrap();
        assert!(read > 0, "the client went away");
        request.extend_from_slice(&buffer[..read]);
        let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&request[..end]).to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let body = &request[end + 4..];
        if body.len() == length.parse::<usize>().unwrap() {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
            return (head, body.to_vec());
        }
    }
}

#[test]
fn the_last_spans_are_flushed_to_the_collector() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(collect(&listener)));

    let cli: Cli = service::parse_from(["demo", "--log=info", "--otlp-endpoint", &endpoint]).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let guard = runtime.block_on(async { logs::init("demo", &cli.log, LevelFilter::INFO) }).unwrap();
    let traceparent =
        tracing::info_span!("publishing").in_scope(trace::current_traceparent).expect("a trace");
    guard.flush();

    let (head, body) = receiver.recv_timeout(Duration::from_secs(10)).expect("the collector gets a request");
    assert!(head.starts_with("post /v1/traces http/1.1"), "{head}");
    let contains = |text: &[u8]| body.windows(text.len()).any(|window| window == text);
    assert!(contains(b"publishing") && contains(b"demo"));
    assert!(trace::is_valid(&traceparent), "{traceparent}");
}
