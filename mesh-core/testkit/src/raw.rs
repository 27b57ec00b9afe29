//! Bytes as a hostile client writes them, and what comes back.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::upstream::Recorder;

/// What came back from one exchange.
#[derive(Debug, Default)]
pub struct Answer {
    /// Every byte.
    pub bytes: Vec<u8>,
    /// Whether the peer closed the connection.
    pub closed: bool,
}

impl Answer {
    /// The statuses of the responses, interim ones left out, as far as the bytes can be read as responses.
    #[must_use]
    pub fn statuses(&self) -> Vec<u16> {
        let mut statuses = Vec::new();
        let mut rest = self.bytes.as_slice();
        while let Some((status, length)) = response(rest) {
            if status >= 200 || status == 101 {
                statuses.push(status);
            }
            if status == 101 {
                break;
            }
            rest = rest.get(length..).unwrap_or_default();
        }
        statuses
    }
}

/// Writes `bytes` and reads until the peer closes or has been silent for `silence`.
///
/// # Panics
/// When no connection can be made.
pub async fn exchange(peer: SocketAddr, bytes: &[u8], silence: Duration) -> Answer {
    let mut stream = TcpStream::connect(peer).await.expect("a connection");
    // A peer that refuses early may close before everything is written.
    let _ = stream.write_all(bytes).await;
    let mut answer = Answer::default();
    let mut buffer = vec![0_u8; 16384];
    loop {
        match timeout(silence, stream.read(&mut buffer)).await {
            Err(_) => return answer,
            Ok(Ok(read @ 1..)) => answer.bytes.extend_from_slice(&buffer[..read]),
            Ok(_) => {
                answer.closed = true;
                return answer;
            }
        }
    }
}

/// One GET on a connection of its own; status and body, without chunks.
///
/// # Panics
/// When no connection can be made.
pub async fn get(peer: SocketAddr, host: &str, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let answer = exchange(peer, request.as_bytes(), Duration::from_secs(5)).await;
    let text = String::from_utf8_lossy(&answer.bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        body.lines().filter(|line| usize::from_str_radix(line, 16).is_err()).collect()
    } else {
        body.to_owned()
    };
    (status, body)
}

/// The JSON that an admin endpoint answers with.
///
/// # Panics
/// When it is none.
pub async fn get_json(peer: SocketAddr, path: &str) -> Value {
    let (status, body) = get(peer, "admin", path).await;
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {status} {error}: {body}"))
}

/// Sends a message; how many requests came upstream and how many answers came back. A machine that is busy may be
/// silent for longer than a moment, so what looks wrong is looked at again with patience.
///
/// # Panics
/// When both framings of a message were forwarded.
pub async fn counted(address: SocketAddr, upstream: &Recorder, message: &[u8]) -> (usize, usize) {
    let mut counts = (0, 0);
    for silence in [Duration::from_millis(25), Duration::from_millis(250), Duration::from_secs(2)] {
        upstream.clear();
        let answer = exchange(address, message, silence).await;
        counts = (upstream.requests(), answer.statuses().len());
        if counts.0 <= counts.1 {
            break;
        }
    }
    counts
}

/// The status and whole length of the response at the beginning of `bytes`, by content length or chunks; a body that
/// ends with the connection takes all.
fn response(bytes: &[u8]) -> Option<(u16, usize)> {
    let head_end = bytes.windows(4).position(|end| end == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..head_end]).ok()?;
    let status: u16 = head.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
    let header = |name: &str| {
        head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    };
    if status < 200 || status == 204 || status == 304 {
        return Some((status, head_end));
    }
    if header("transfer-encoding").is_some() {
        let mut at = head_end;
        loop {
            let line_end = at + bytes.get(at..)?.windows(2).position(|end| end == b"\r\n")?;
            let size =
                usize::from_str_radix(std::str::from_utf8(&bytes[at..line_end]).ok()?.trim(), 16).ok()?;
            at = line_end + 2 + size + 2;
            if size == 0 {
                return Some((status, at));
            }
        }
    }
    match header("content-length") {
        Some(length) => Some((status, head_end + length.parse::<usize>().ok()?)),
        None => Some((status, bytes.len())),
    }
}
