//! Probes by gRPC: `grpc.health.v1.Health/Check`, over HTTP/2 without TLS.
//!
//! Two messages of one field each are read and written by hand; a gRPC library and its code generator would be most of the
//! program for that.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE, USER_AGENT};
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::http::in_words;

/// More than this no answer of the health protocol takes, unknown fields and all.
const MOST_MESSAGE: usize = 10 * 1024;
/// `SERVING` of `HealthCheckResponse.ServingStatus`.
const SERVING: u64 = 1;
const UNIMPLEMENTED: &[u8] = b"12";

/// Whether `service` is served; the empty name stands for the whole server.
///
/// # Errors
/// Whatever is not `SERVING`, in words. The caller holds it to `timeout`, which the server is told.
pub(super) async fn check(
    stream: TcpStream,
    to: SocketAddr,
    service: &str,
    user_agent: Option<&HeaderValue>,
    timeout: Duration,
) -> Result<(), String> {
    let mut request = Request::post(format!("http://{to}/grpc.health.v1.Health/Check"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .header("grpc-timeout", grpc_timeout(timeout))
        .body(Full::new(request_of(service)))
        .map_err(|error| error.to_string())?;
    if let Some(user_agent) = user_agent {
        request.headers_mut().insert(USER_AGENT, user_agent.clone());
    }
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(in_words)?;
    // Aborted when it is dropped, and with it the connection is closed.
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        // The response, or the lack of one, says how it went.
        let _ = connection.await;
    });
    let (head, body) = sender.send_request(request).await.map_err(in_words)?.into_parts();
    if head.status != StatusCode::OK {
        return Err(format!("no gRPC: the status is {}", head.status));
    }
    let content_type = head.headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    if !content_type.starts_with(b"application/grpc") {
        return Err(format!("no gRPC: the content type is {:?}", String::from_utf8_lossy(content_type)));
    }
    if head.headers.contains_key("grpc-status") {
        succeeded(&head.headers)?;
        return Err("the answer has no message".to_owned());
    }
    let (message, trailers) = read(body).await?;
    succeeded(&trailers)?;
    match status_of(message_of(&message)?)? {
        SERVING => Ok(()),
        0 => Err("the health is UNKNOWN".to_owned()),
        2 => Err("the health is NOT_SERVING".to_owned()),
        3 => Err("the health is SERVICE_UNKNOWN".to_owned()),
        other => Err(format!("the health is {other}, which the protocol does not have")),
    }
}

async fn read(mut body: Incoming) -> Result<(Bytes, HeaderMap), String> {
    let mut message = BytesMut::new();
    while let Some(frame) = body.frame().await {
        match frame.map_err(in_words)?.into_data() {
            Ok(data) if message.len() + data.len() > MOST_MESSAGE => {
                return Err(format!("the answer has more than {MOST_MESSAGE} bytes"));
            }
            Ok(data) => message.extend_from_slice(&data),
            Err(frame) => return Ok((message.freeze(), frame.into_trailers().unwrap_or_default())),
        }
    }
    Err("the answer has no trailers".to_owned())
}

fn succeeded(headers: &HeaderMap) -> Result<(), String> {
    let text = |name: &str| headers.get(name).map_or(&b""[..], HeaderValue::as_bytes);
    match text("grpc-status") {
        b"0" => Ok(()),
        b"" => Err("the answer has no gRPC status".to_owned()),
        UNIMPLEMENTED => Err("the server does not implement grpc.health.v1.Health".to_owned()),
        status => {
            let (status, message) =
                (String::from_utf8_lossy(status), String::from_utf8_lossy(text("grpc-message")));
            Err(format!("gRPC status {status} {message:?}"))
        }
    }
}

/// The time as `grpc-timeout` has it: at most eight digits.
fn grpc_timeout(timeout: Duration) -> String {
    match timeout.as_millis() {
        millis @ ..=99_999_999 => format!("{millis}m"),
        _ => format!("{}S", timeout.as_secs().min(99_999_999)),
    }
}

/// A `HealthCheckRequest` with the prefix of its length.
fn request_of(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(1 << 3 | 2);
        let mut length = service.len();
        while length >= 0x80 {
            message.put_u8(length as u8 | 0x80);
            length >>= 7;
        }
        message.put_u8(length as u8);
        message.put_slice(service.as_bytes());
    }
    let mut prefixed = BytesMut::with_capacity(5 + message.len());
    prefixed.put_u8(0);
    prefixed.put_u32(message.len() as u32);
    prefixed.put_slice(&message);
    prefixed.freeze()
}

/// The one message of an answer.
fn message_of(prefixed: &[u8]) -> Result<&[u8], &'static str> {
    let Some(([compressed, length @ ..], message)) = prefixed.split_first_chunk::<5>() else {
        return Err("the answer has no message");
    };
    if *compressed != 0 {
        return Err("the message is compressed, which was not offered");
    }
    let length = u32::from_be_bytes(*length) as usize;
    if message.len() == length { Ok(message) } else { Err("the answer is not one message") }
}

/// The `status` of a `HealthCheckResponse`; fields that are not known are skipped.
fn status_of(mut message: &[u8]) -> Result<u64, &'static str> {
    let mut status = 0;
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let skipped = match (key >> 3, key & 7) {
            (1, 0) => {
                status = varint(&mut message)?;
                0
            }
            (_, 0) => {
                varint(&mut message)?;
                0
            }
            (_, 1) => 8,
            (_, 2) => varint(&mut message)?,
            (_, 5) => 4,
            _ => return Err(UNREADABLE),
        };
        let skipped = usize::try_from(skipped).map_err(|_| UNREADABLE)?;
        message = message.get(skipped..).ok_or(UNREADABLE)?;
    }
    Ok(status)
}

const UNREADABLE: &str = "the message cannot be read";

fn varint(message: &mut &[u8]) -> Result<u64, &'static str> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first().ok_or(UNREADABLE)?;
        *message = rest;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return Err(UNREADABLE);
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(UNREADABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_protobuf_writes_it() {
        assert_eq!(&request_of("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&request_of("app")[..], b"\0\0\0\0\x05\x0a\x03app");
        let long = request_of(&"a".repeat(300));
        assert_eq!(&long[..8], [0, 0, 0, 1, 47, 0x0a, 0xac, 0x02]);
        assert_eq!(long.len(), 5 + 303);
    }

    #[test]
    fn the_status_of_an_answer_is_found_among_fields_that_are_not_known() {
        assert_eq!(status_of(b""), Ok(0));
        assert_eq!(status_of(b"\x08\x01"), Ok(1));
        assert_eq!(status_of(b"\x08\x01\x08\x02"), Ok(2), "the last one counts");
        let unknown =
            b"\x10\x96\x01\x1a\x02\x08\x02\x21\x01\x02\x03\x04\x05\x06\x07\x08\x2d\x01\x02\x03\x04\x08\x01";
        assert_eq!(status_of(unknown), Ok(1));
        for message in [
            &b"\x08"[..],
            b"\x1a\x05\x01",
            b"\x0b",
            b"\x21\x01",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            // More than 64 bits, of which the first 64 are SERVING.
            b"\x08\x81\x80\x80\x80\x80\x80\x80\x80\x80\x02",
        ] {
            assert_eq!(status_of(message), Err(UNREADABLE), "{message:x?}");
        }
    }

    #[test]
    fn an_answer_is_one_message() {
        assert_eq!(message_of(b"\0\0\0\0\x02\x08\x01"), Ok(&b"\x08\x01"[..]));
        assert_eq!(message_of(b"\0\0\0\0\0"), Ok(&b""[..]));
        for answer in [&b""[..], b"\0\0\0\0", b"\0\0\0\0\x02\x08", b"\0\0\0\0\0\0\0\0\0\0", b"\x01\0\0\0\0"] {
            assert!(message_of(answer).is_err(), "{answer:x?}");
        }
    }

    #[test]
    fn the_timeout_has_eight_digits_at_most() {
        assert_eq!(grpc_timeout(Duration::from_secs(1)), "1000m");
        assert_eq!(grpc_timeout(Duration::from_secs(99_999)), "99999000m");
        assert_eq!(grpc_timeout(Duration::from_secs(100_000)), "100000S");
        assert_eq!(grpc_timeout(Duration::MAX), "99999999S");
    }
}
