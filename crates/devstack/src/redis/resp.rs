//! Just enough of the Redis protocol to run commands.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// No reply this client expects is longer.
const MAX_REPLY_BYTES: usize = 16 << 20;

/// Runs one command over a connection of its own. Arrays come back with one element per line, nil as an empty string.
pub(crate) async fn command(address: SocketAddr, arguments: &[&str]) -> Result<String> {
    let mut request = format!("*{}\r\n", arguments.len());
    for argument in arguments {
        request.push_str(&format!("${}\r\n{argument}\r\n", argument.len()));
    }
    let mut stream = BufReader::new(TcpStream::connect(address).await?);
    stream.write_all(request.as_bytes()).await?;
    let mut lines = Vec::new();
    // Elements still to read; an array adds its own.
    let mut pending = 1_usize;
    while pending > 0 {
        pending -= 1;
        let line = read_line(&mut stream).await?;
        let (kind, rest) = line.split_at_checked(1).context("empty reply")?;
        match kind {
            "+" | ":" => lines.push(rest.to_owned()),
            "-" => bail!("{rest}"),
            "$" => lines.push(read_bulk(&mut stream, rest.parse()?).await?),
            "*" => pending += usize::try_from(rest.parse::<i64>()?).unwrap_or(0),
            _ => bail!("unexpected reply {line:?}"),
        }
    }
    Ok(lines.join("\n"))
}

async fn read_line(stream: &mut BufReader<TcpStream>) -> Result<String> {
    let mut line = String::new();
    ensure!(stream.read_line(&mut line).await? > 0, "the server closed the connection");
    Ok(line.trim_end().to_owned())
}

async fn read_bulk(stream: &mut BufReader<TcpStream>, length: i64) -> Result<String> {
    // A negative length is nil.
    let Ok(length) = usize::try_from(length) else {
        return Ok(String::new());
    };
    ensure!(length <= MAX_REPLY_BYTES, "reply of {length} bytes");
    let mut bytes = vec![0; length + 2];
    stream.read_exact(&mut bytes).await?;
    bytes.truncate(length);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
