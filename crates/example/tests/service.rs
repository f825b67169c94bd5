//! The service on real servers, as its clients see it.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use devstack::{Port, Stack, StackOptions, eventually};
use sqlx::PgPool;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn request(address: SocketAddr, line: &str, name: Option<&str>) -> std::io::Result<(u16, String)> {
    let body = name.map(|name| serde_json::json!({ "name": name }).to_string()).unwrap_or_default();
    let length = body.len();
    let mut connection = TcpStream::connect(address).await?;
    let request = format!(
        "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok((status, answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned()))
}

#[tokio::test]
async fn both_modes_write_and_only_strict_needs_redis() {
    let stack = Stack::start(StackOptions::default()).await.unwrap();
    outbox::migrate(&PgPool::connect(&stack.postgres_url()).await.unwrap()).await.unwrap();
    let port = Port::reserve().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_example"));
    command.env("DATABASE_URL", stack.postgres_url()).env("REDIS_URL", stack.redis_url());
    command.env("HTTP_ADDR", port.address().to_string());
    let service = stack.spawn("example", command).unwrap();
    let send = async |line: &str, name: Option<&str>| request(port.address(), line, name).await.unwrap();

    let up =
        async || request(port.address(), "GET /users/1", None).await.is_ok_and(|(status, _)| status == 404);
    eventually(Duration::from_secs(60), up).await;
    for (mode, name) in [("", "Ada"), ("?mode=default", "Grace"), ("?mode=strict", "Barbara")] {
        let (status, _) = send(&format!("PUT /users/1{mode}"), Some(name)).await;
        assert_eq!(status, 204, "{}", service.log());
        // Loaded, then cached.
        for _ in 0..2 {
            assert_eq!(send("GET /users/1", None).await, (200, format!(r#"{{"name":"{name}"}}"#)));
        }
        let cached = stack.redis.command(&["GET", "user:1:profile"]).await.unwrap();
        assert_eq!(cached, format!(r#"{{"name":"{name}"}}"#));
    }

    stack.redis.kill().unwrap();
    assert_eq!(send("PUT /users/1?mode=strict", Some("Nobody")).await.0, 503);
    assert_eq!(send("GET /users/1", None).await, (200, r#"{"name":"Barbara"}"#.to_owned()));
    assert_eq!(send("PUT /users/1", Some("Joan")).await.0, 204);
    assert_eq!(send("GET /users/1", None).await, (200, r#"{"name":"Joan"}"#.to_owned()));
}
