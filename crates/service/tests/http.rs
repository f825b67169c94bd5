//! The operators' endpoints, as a client sees them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::time::Duration;

use service::{Health, HttpServer, Limits, Metrics};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

async fn start(health: &Health) -> HttpServer {
    let addr = "127.0.0.1:0".parse().unwrap();
    HttpServer::start(addr, health.clone(), Metrics::install().unwrap()).await.unwrap()
}

/// Sends one request and returns status, head and body.
async fn get(server: &HttpServer, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(server.local_addr()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_owned())
}

#[tokio::test]
async fn metrics_are_served_in_the_text_format() {
    let server = start(&Health::new()).await;
    metrics::counter!("demo_requests_total").increment(1);
    let (status, head, body) = get(&server, "/metrics").await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    for name in ["demo_requests_total 1", "process_resident_memory_bytes ", "process_start_time_seconds "] {
        assert!(body.lines().any(|line| line.starts_with(name)), "{name} in:\n{body}");
    }
}

#[tokio::test]
async fn readyz_follows_the_components_and_says_why() {
    let health = Health::new();
    let component = health.component("nats", Limits::default());
    let server = start(&health).await;

    component.not_ready("connection refused");
    let (status, head, body) = get(&server, "/readyz").await;
    assert_eq!(status, 503);
    assert!(head.contains("content-type: application/json"), "{head}");
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["ready"], false);
    assert_eq!(body["checks"][0]["name"], "nats");
    assert_eq!(body["checks"][0]["state"], "not_ready");
    assert_eq!(body["checks"][0]["reason"], "connection refused");

    component.ready();
    assert_eq!(get(&server, "/readyz").await.0, 200);

    health.draining();
    let (status, _, body) = get(&server, "/readyz").await;
    assert_eq!(status, 503);
    assert!(body.contains("\"draining\":true"), "{body}");
}

#[tokio::test]
async fn livez_fails_only_after_a_long_silence() {
    let health = Health::new();
    let limits = Limits { dead_after: Some(Duration::from_millis(20)), ..Limits::default() };
    let component = health.component("claim", limits);
    let server = start(&health).await;
    component.not_ready("no database");
    component.idle();
    assert_eq!(get(&server, "/livez").await.0, 200);
    component.beat();
    tokio::time::sleep(Duration::from_millis(40)).await;
    let (status, _, body) = get(&server, "/livez").await;
    assert_eq!(status, 503);
    assert!(body.contains("claim: no progress for"), "{body}");
}

#[tokio::test]
async fn the_index_names_the_endpoints_and_other_paths_are_not_found() {
    let server = start(&Health::new()).await;
    let (status, _, body) = get(&server, "/").await;
    assert_eq!((status, body.as_str()), (200, "/metrics (Prometheus), /livez, /readyz\n"));
    assert_eq!(get(&server, "/nowhere").await.0, 404);
}

#[tokio::test]
async fn an_address_in_use_is_reported_with_the_option_that_sets_it() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = taken.local_addr().unwrap();
    let error = HttpServer::start(addr, Health::new(), Metrics::install().unwrap())
        .await
        .expect_err("the address is taken");
    assert_eq!(error.to_string(), format!("cannot listen on {addr} (set by HTTP_ADDR or --http-addr)"));
}

#[tokio::test]
async fn a_stopped_server_no_longer_listens_even_if_a_client_never_sends_its_request() {
    let server = start(&Health::new()).await;
    let addr = server.local_addr();
    let mut half_sent = TcpStream::connect(addr).await.unwrap();
    half_sent.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), server.stop()).await.expect("stops in bounded time");
    assert!(TcpStream::connect(addr).await.is_err());
}

#[tokio::test]
async fn many_slow_connections_do_not_silence_the_endpoints() {
    let health = Health::new();
    health.component("claim", Limits::default()).ready();
    let server = start(&health).await;
    let mut slow = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(server.local_addr()).await.unwrap();
        stream.write_all(b"G").await.unwrap();
        slow.push(stream);
        if slow.len() % 50 == 0 {
            for path in ["/livez", "/readyz", "/metrics"] {
                let answer = tokio::time::timeout(Duration::from_secs(10), get(&server, path));
                assert_eq!(answer.await.expect("slow connections are in the way").0, 200, "{path}");
            }
        }
    }
}
