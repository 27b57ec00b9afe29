//! As much of gRPC as a call or two need: frames, statuses, and how they are written in headers.
//!
//! Two calls by hand, [Istio's certificate service](crate::istio_ca) and the [Workload API](crate::spiffe), share it.

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

/// The header of a status' code.
pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// The header of a status' words.
pub(crate) const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// The type of both bodies.
pub(crate) const APPLICATION_GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// One byte that says whether the message is compressed, four with its length.
pub(crate) const FRAME_HEAD: usize = 5;

/// What became of a call that has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Status {
    /// The kind.
    pub code: Code,
    /// The reason in words.
    pub message: String,
}

/// The kinds of statuses, as gRPC numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
#[expect(missing_docs, reason = "gRPC's own names")]
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl Code {
    const ALL: [(Self, &'static str); 17] = [
        (Self::Ok, "OK"),
        (Self::Cancelled, "CANCELLED"),
        (Self::Unknown, "UNKNOWN"),
        (Self::InvalidArgument, "INVALID_ARGUMENT"),
        (Self::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        (Self::NotFound, "NOT_FOUND"),
        (Self::AlreadyExists, "ALREADY_EXISTS"),
        (Self::PermissionDenied, "PERMISSION_DENIED"),
        (Self::ResourceExhausted, "RESOURCE_EXHAUSTED"),
        (Self::FailedPrecondition, "FAILED_PRECONDITION"),
        (Self::Aborted, "ABORTED"),
        (Self::OutOfRange, "OUT_OF_RANGE"),
        (Self::Unimplemented, "UNIMPLEMENTED"),
        (Self::Internal, "INTERNAL"),
        (Self::Unavailable, "UNAVAILABLE"),
        (Self::DataLoss, "DATA_LOSS"),
        (Self::Unauthenticated, "UNAUTHENTICATED"),
    ];

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        Self::ALL[usize::from(self as u8)].1
    }

    /// The kind of a number; one that gRPC does not have is `UNKNOWN`.
    fn of(number: u8) -> Self {
        Self::ALL.get(usize::from(number)).map_or(Self::Unknown, |(code, _)| *code)
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Status {
    /// A status of this kind.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The status that headers or trailers have; `None` where there is none.
    pub(crate) fn read(headers: &HeaderMap) -> Option<Self> {
        let code = headers.get(GRPC_STATUS)?;
        let code = code.to_str().ok().and_then(|code| code.parse().ok()).map_or(Code::Unknown, Code::of);
        let message = headers.get(GRPC_MESSAGE).map(|message| unescape(message.as_bytes()));
        Some(Self { code, message: message.unwrap_or_default() })
    }

    /// Writes it into headers or trailers.
    #[cfg(feature = "istio-ca")]
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        headers.insert(GRPC_STATUS, HeaderValue::from(u16::from(self.code as u8)));
        if !self.message.is_empty()
            && let Ok(message) = HeaderValue::from_str(&escape(&self.message))
        {
            headers.insert(GRPC_MESSAGE, message);
        }
    }
}

/// A message as a frame.
pub(crate) fn frame(message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(FRAME_HEAD + message.len());
    out.put_u8(0);
    // What is framed here is bounded by the messages that are made.
    out.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    out.put_slice(message);
    out.freeze()
}

/// The one message of a body.
#[cfg(feature = "istio-ca")]
pub(crate) fn unframe(body: &[u8]) -> Result<&[u8], Status> {
    let invalid = |words: &str| Status::new(Code::InvalidArgument, words);
    let Some((head, message)) = body.split_at_checked(FRAME_HEAD) else {
        return Err(invalid("there is no message"));
    };
    if head[0] != 0 {
        return Err(Status::new(Code::Unimplemented, "compressed messages are not read"));
    }
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    if usize::try_from(length).is_ok_and(|length| length == message.len()) {
        return Ok(message);
    }
    Err(invalid("the body is not one whole message"))
}

/// Percent-encodes what gRPC does not write as it is.
#[cfg(feature = "istio-ca")]
fn escape(message: &str) -> String {
    use std::fmt::Write as _;
    message.bytes().fold(String::with_capacity(message.len()), |mut out, byte| {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// What the peer says, for a log: what is not text is replaced, and control characters are escaped.
fn unescape(message: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(message.len());
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut rest = message;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if let (b'%', [high, low, after @ ..]) = (*byte, after)
            && let (Some(high), Some(low)) = (digit(*high), digit(*low))
        {
            bytes.push((high << 4 | low) as u8);
            rest = after;
        } else {
            bytes.push(*byte);
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let printable = |c: char| {
        let escaped = c.is_control().then(|| c.escape_debug());
        let plain = (!c.is_control()).then_some(c);
        escaped.into_iter().flatten().chain(plain)
    };
    text.chars().take(1024).flat_map(printable).collect()
}

#[cfg(all(test, feature = "istio-ca"))]
mod tests {
    use super::*;

    #[test]
    fn a_status_survives_its_headers() {
        for message in ["", "no such token", "100 % of ä\n", "%41"] {
            let mut headers = HeaderMap::new();
            Status::new(Code::Unauthenticated, message).write(&mut headers);
            assert_eq!(headers[GRPC_STATUS], "16");
            let read = Status::read(&headers).unwrap();
            assert_eq!((read.code, read.message), (Code::Unauthenticated, message.replace('\n', "\\n")));
        }
        let mut headers = HeaderMap::new();
        assert_eq!(Status::read(&headers), None);
        for strange in ["99", "x", "-1", "256"] {
            headers.insert(GRPC_STATUS, HeaderValue::from_static(strange));
            assert_eq!(Status::read(&headers).unwrap().code, Code::Unknown, "{strange}");
        }
        for (at, (code, _)) in Code::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(code as u8), at);
        }
    }

    #[test]
    fn a_body_is_one_whole_message() {
        assert_eq!(unframe(&frame(b"abc")).unwrap(), b"abc");
        assert_eq!(unframe(&frame(b"")).unwrap(), b"");
        for body in [&b""[..], b"\0\0\0\0", b"\0\0\0\0\x02a", b"\0\0\0\0\x01ab", b"\0\xff\xff\xff\xffa"] {
            assert_eq!(unframe(body).unwrap_err().code, Code::InvalidArgument, "{body:?}");
        }
        assert_eq!(unframe(b"\x01\0\0\0\0").unwrap_err().code, Code::Unimplemented);
    }
}
