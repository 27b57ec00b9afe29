//! Telling what a connection speaks by its first bytes.
//!
//! A listener that does not know its protocol peeks, asks [`sniff`] and peeks again while the answer is
//! [`Sniffed::Undecided`]. The decision is a pure function of the bytes; how long to wait for them is the
//! listener's business. A client that waits for the server to speak first sends nothing, so the caller needs a
//! time-out and has to treat its expiry as [`Sniffed::Other`].

/// What the first bytes of a connection look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sniffed {
    /// More bytes are needed.
    Undecided,
    /// A TLS handshake record that carries a ClientHello.
    Tls,
    /// HTTP/2 with prior knowledge: the connection preface.
    Http2,
    /// Looks like a request line of HTTP/1.
    Http1,
    /// Something else.
    Other,
}

/// The connection preface of HTTP/2 (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes after which [`sniff`] always decides.
pub const MAX_BYTES: usize = 64;

/// Says what `first` looks like. Decides after at most [`MAX_BYTES`]; more bytes never change a decision.
#[must_use]
pub fn sniff(first: &[u8]) -> Sniffed {
    let first = &first[..first.len().min(MAX_BYTES)];
    match first {
        [] => Sniffed::Undecided,
        [0x16, rest @ ..] => tls(rest),
        _ if first.starts_with(PREFACE) => Sniffed::Http2,
        _ if PREFACE.starts_with(first) => Sniffed::Undecided,
        _ => http1(first),
    }
}

/// Record header after its content type (22, handshake): version, length; then the handshake type (1, ClientHello).
fn tls(rest: &[u8]) -> Sniffed {
    match rest {
        [] | [3] => Sniffed::Undecided,
        [3, 0..=4, tail @ ..] => match tail {
            [] | [_] | [_, _] => Sniffed::Undecided,
            [_, _, 1, ..] => Sniffed::Tls,
            _ => Sniffed::Other,
        },
        _ => Sniffed::Other,
    }
}

/// A method is a token, a space follows it (RFC 9112 §3).
fn http1(first: &[u8]) -> Sniffed {
    // A server ignores empty lines before the request line (RFC 9112 §2.2).
    let line = match first.iter().position(|byte| !matches!(byte, b'\r' | b'\n')) {
        Some(start) => &first[start..],
        None => return if first.len() < MAX_BYTES { Sniffed::Undecided } else { Sniffed::Other },
    };
    match line.iter().position(|byte| !is_token(*byte)) {
        Some(0) => Sniffed::Other,
        Some(end) if line[end] == b' ' => Sniffed::Http1,
        Some(_) => Sniffed::Other,
        None if first.len() < MAX_BYTES => Sniffed::Undecided,
        None => Sniffed::Other,
    }
}

const fn is_token(byte: u8) -> bool {
    matches!(byte,
        b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tells_the_protocols_apart() {
        for (bytes, expected) in [
            (&b""[..], Sniffed::Undecided),
            (b"\x16", Sniffed::Undecided),
            (b"\x16\x03\x01\x02\x00", Sniffed::Undecided),
            (b"\x16\x03\x01\x02\x00\x01\x00", Sniffed::Tls),
            (b"\x16\x03\x01\x02\x00\x02", Sniffed::Other),
            (b"\x16\x02", Sniffed::Other),
            (b"PRI * HT", Sniffed::Undecided),
            (PREFACE, Sniffed::Http2),
            (b"PRI * HTTP/1.1\r\n", Sniffed::Http1),
            (b"GET / HTTP/1.1\r\n", Sniffed::Http1),
            (b"\r\nGET / HTTP/1.1\r\n", Sniffed::Http1),
            (b"PROPFIND", Sniffed::Undecided),
            (b"\x00\x00\x00\x01", Sniffed::Other),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Sniffed::Other),
            (b" GET / HTTP/1.1\r\n", Sniffed::Other),
        ] {
            assert_eq!(sniff(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_a_decision(bytes in proptest::collection::vec(any::<u8>(), 0..100), cut in 0_usize..100) {
            let early = sniff(&bytes[..cut.min(bytes.len())]);
            if early != Sniffed::Undecided {
                prop_assert_eq!(sniff(&bytes), early);
            }
        }

        #[test]
        fn decides_in_bounded_bytes(bytes in proptest::collection::vec(any::<u8>(), MAX_BYTES..200)) {
            prop_assert_ne!(sniff(&bytes), Sniffed::Undecided);
        }
    }
}
