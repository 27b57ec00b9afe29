//! Telling what a connection speaks by its first bytes, without IO.
//!
//! A [`Sniffer`] is shown everything that was read so far, again and again, until it answers. It tells HTTP/1, HTTP/2
//! with prior knowledge, TLS and everything else apart; of TLS it reads the ClientHello as far as the server name
//! (SNI, RFC 6066 §3), which is what TLS that is not terminated can be routed by. How long to wait for bytes is the
//! caller's business: a client that waits for the server to speak first sends nothing at all.
//!
//! **Bounds.** HTTP is decided within [`MAX_BYTES`]. A ClientHello may come in any number of records, of one byte each
//! if the client likes; more than [`MAX_HELLO_BYTES`] of them are not looked at, and the connection counts as TLS
//! without a server name, as one does whose hello is malformed. The work is linear in the bytes, however they are cut.
//!
//! **HTTP/1 is judged narrowly**, by the method *and* the form of the target: many protocols begin with a word and a
//! space (`EHLO host`, `SET key`), and none of them is to be answered 400.

/// What the first bytes of a connection look like.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sniffed {
    /// More bytes are needed.
    Undecided,
    /// The beginning of a TLS connection, and the name that its client asks for: lower case, without a trailing dot.
    Tls(Option<Box<str>>),
    /// HTTP/2 with prior knowledge: the connection preface.
    Http2,
    /// A request line of HTTP/1.
    Http1,
    /// Something else.
    Other,
}

/// The connection preface of HTTP/2 (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes after which everything but a ClientHello is decided.
pub const MAX_BYTES: usize = 64;

/// Bytes of a ClientHello, record headers included, that are looked at.
pub const MAX_HELLO_BYTES: usize = 16 << 10;

/// The content type of handshake records.
const HANDSHAKE: u8 = 22;

/// The handshake type of a ClientHello.
const CLIENT_HELLO: u8 = 1;

/// The longest name that DNS has.
const MAX_NAME: usize = 255;

/// What is known so far of one connection.
#[derive(Debug, Default)]
pub struct Sniffer {
    /// How far records were taken apart.
    taken: usize,
    /// Bytes of the current record that are still to come.
    in_record: usize,
    /// The handshake message without record headers.
    hello: Vec<u8>,
}

impl Sniffer {
    /// Nothing is known.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says what `first` looks like: all bytes of the connection so far, of which those of the call before are the
    /// beginning. What was decided does not change with more bytes.
    #[must_use]
    pub fn look(&mut self, first: &[u8]) -> Sniffed {
        match kind(first) {
            Kind::Tls => self.hello(first),
            Kind::Undecided => Sniffed::Undecided,
            Kind::Http1 => Sniffed::Http1,
            Kind::Http2 => Sniffed::Http2,
            Kind::Other => Sniffed::Other,
        }
    }

    /// What a connection counts as whose client says no more: TLS without a name, or something else. What may still become
    /// TLS is that: a client which is slow must not be served as plaintext.
    #[must_use]
    pub fn give_up(&self, first: &[u8]) -> Sniffed {
        let is_tls = first.first() == Some(&HANDSHAKE) && kind(first) != Kind::Other;
        if is_tls { Sniffed::Tls(None) } else { Sniffed::Other }
    }

    /// Puts the records together until the ClientHello is whole.
    fn hello(&mut self, first: &[u8]) -> Sniffed {
        let bounded = &first[..first.len().min(MAX_HELLO_BYTES)];
        loop {
            // What follows a message that is whole is not looked at.
            if let Some(decided) = self.decided() {
                return decided;
            }
            let rest = bounded.get(self.taken..).unwrap_or_default();
            if self.in_record == 0 {
                let [content, 3, _, high, low, ..] = *rest else {
                    return match *rest {
                        [content, ..] if content != HANDSHAKE => Sniffed::Tls(None),
                        [_, major, ..] if major != 3 => Sniffed::Tls(None),
                        _ => self.more(first),
                    };
                };
                let length = usize::from(u16::from_be_bytes([high, low]));
                // A handshake record is never empty (RFC 8446 §5.1).
                if content != HANDSHAKE || length == 0 {
                    return Sniffed::Tls(None);
                }
                self.taken += 5;
                self.in_record = length;
                continue;
            }
            if rest.is_empty() {
                return self.more(first);
            }
            let fragment = &rest[..rest.len().min(self.in_record)];
            self.hello.extend_from_slice(fragment);
            self.taken += fragment.len();
            self.in_record -= fragment.len();
        }
    }

    /// What the handshake message says, as soon as it is whole or cannot be one.
    fn decided(&self) -> Option<Sniffed> {
        let [kind, a, b, c, body @ ..] = self.hello.as_slice() else { return None };
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        if *kind != CLIENT_HELLO || length > MAX_HELLO_BYTES {
            return Some(Sniffed::Tls(None));
        }
        body.get(..length).map(|body| Sniffed::Tls(server_name(body)))
    }

    fn more(&self, first: &[u8]) -> Sniffed {
        if first.len() < MAX_HELLO_BYTES { Sniffed::Undecided } else { Sniffed::Tls(None) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Undecided,
    Tls,
    Http1,
    Http2,
    Other,
}

fn kind(first: &[u8]) -> Kind {
    let first = &first[..first.len().min(MAX_BYTES)];
    match first {
        [] => Kind::Undecided,
        [HANDSHAKE, rest @ ..] => tls(rest),
        _ if first.starts_with(PREFACE) => Kind::Http2,
        _ if PREFACE.starts_with(first) => Kind::Undecided,
        _ => http1(first),
    }
}

/// Record header after its content type: version, length; then the handshake type.
const fn tls(rest: &[u8]) -> Kind {
    match rest {
        [] | [3] | [3, 0..=4] | [3, 0..=4, _] => Kind::Undecided,
        [3, 0..=4, 0, 0, ..] => Kind::Other,
        [3, 0..=4, _, _] => Kind::Undecided,
        [3, 0..=4, _, _, CLIENT_HELLO, ..] => Kind::Tls,
        _ => Kind::Other,
    }
}

/// A method is a token, a space follows it (RFC 9112 §3), and then a target in one of its four forms.
fn http1(first: &[u8]) -> Kind {
    let undecided = if first.len() < MAX_BYTES { Kind::Undecided } else { Kind::Other };
    // A server ignores empty lines before the request line (RFC 9112 §2.2).
    let Some(start) = first.iter().position(|byte| !matches!(byte, b'\r' | b'\n')) else { return undecided };
    let line = &first[start..];
    let Some(end) = line.iter().position(|byte| !is_token(*byte)) else { return undecided };
    if end == 0 || line[end] != b' ' {
        return Kind::Other;
    }
    let (method, target) = (&line[..end], &line[end + 1..]);
    let is_form = match (method, target) {
        (_, []) => return undecided,
        (_, [b'/', ..]) => true,
        (b"OPTIONS", [b'*', ..]) => true,
        (b"CONNECT", [byte, ..]) => byte.is_ascii_alphanumeric() || *byte == b'[',
        _ => return absolute(target, undecided),
    };
    if is_form { Kind::Http1 } else { Kind::Other }
}

/// A target with a scheme.
fn absolute(target: &[u8], undecided: Kind) -> Kind {
    let begins = |scheme: &[u8]| {
        target
            .iter()
            .zip(scheme)
            .all(|(byte, expected)| byte.eq_ignore_ascii_case(expected))
            .then_some(target.len() >= scheme.len())
    };
    match (begins(b"http://"), begins(b"https://")) {
        (Some(true), _) | (_, Some(true)) => Kind::Http1,
        (Some(false), _) | (_, Some(false)) => undecided,
        (None, None) => Kind::Other,
    }
}

const fn is_token(byte: u8) -> bool {
    matches!(byte,
        b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z')
}

/// The first host name of the extension `server_name` in the body of a ClientHello (RFC 8446 §4.1.2).
fn server_name(hello: &[u8]) -> Option<Box<str>> {
    const SERVER_NAME: u16 = 0;
    const HOST_NAME: u8 = 0;
    let mut hello = Reader(hello);
    // Version and random.
    hello.take(2 + 32)?;
    let session_id = usize::from(hello.u8()?);
    hello.take(session_id)?;
    let cipher_suites = usize::from(hello.u16()?);
    hello.take(cipher_suites)?;
    let compression_methods = usize::from(hello.u8()?);
    hello.take(compression_methods)?;
    let mut extensions = hello.vector()?;
    loop {
        let (kind, mut extension) = (extensions.u16()?, extensions.vector()?);
        if kind != SERVER_NAME {
            continue;
        }
        let mut names = extension.vector()?;
        loop {
            let (kind, name) = (names.u8()?, names.vector()?);
            if kind == HOST_NAME {
                return dns_name(name.0);
            }
        }
    }
}

/// A name as it is compared; `None` for what no DNS name looks like.
fn dns_name(name: &[u8]) -> Option<Box<str>> {
    let name = name.strip_suffix(b".").unwrap_or(name);
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > MAX_NAME || !name.iter().all(is_part) {
        return None;
    }
    let name = std::str::from_utf8(name).ok()?;
    Some(name.to_ascii_lowercase().into_boxed_str())
}

/// Reads big-endian fields; `None` past the end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// What follows a length of two bytes.
    fn vector(&mut self) -> Option<Self> {
        let length = usize::from(self.u16()?);
        self.take(length).map(Self)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The handshake message of a client that asks for `names`, with another extension before them.
    fn hello(names: Option<&[(u8, &str)]>) -> Vec<u8> {
        let vector = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
        let mut extensions = [&[0, 43][..], &vector(&[2, 3, 4])].concat();
        if let Some(names) = names {
            let list: Vec<u8> = names
                .iter()
                .flat_map(|(kind, name)| [&[*kind][..], &vector(name.as_bytes())].concat())
                .collect();
            extensions.extend([&[0, 0][..], &vector(&vector(&list))].concat());
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([4, 1, 2, 3, 4]);
        body.extend(vector(&[0x13, 1, 0x13, 2]));
        body.extend([1, 0]);
        body.extend(vector(&extensions));
        [&[CLIENT_HELLO], &(body.len() as u32).to_be_bytes()[1..], &body].concat()
    }

    /// A ClientHello for `name`, in records of `size` bytes.
    pub(crate) fn client_hello(name: &str, size: usize) -> Vec<u8> {
        records(&hello(Some(&[(0, name)])), size)
    }

    /// In records of `size` bytes.
    fn records(message: &[u8], size: usize) -> Vec<u8> {
        message
            .chunks(size)
            .flat_map(|chunk| [&[HANDSHAKE, 3, 1][..], &(chunk.len() as u16).to_be_bytes(), chunk].concat())
            .collect()
    }

    #[test]
    fn bug_what_was_decided_was_undecided_again_with_the_beginning_of_another_record() {
        let whole = records(&hello(Some(&[(0, "a.example")])), 64);
        let mut sniffer = Sniffer::new();
        assert_eq!(sniffer.look(&whole), named("a.example"));
        for more in [&[HANDSHAKE][..], &[HANDSHAKE, 3, 3, 0], &[HANDSHAKE, 3, 3, 0, 1, 0], b"\x15\x03\x03"] {
            assert_eq!(sniffer.look(&[&whole, more].concat()), named("a.example"), "{more:?}");
        }
    }

    fn once(bytes: &[u8]) -> Sniffed {
        Sniffer::new().look(bytes)
    }

    /// As one sniffer sees it that is shown one byte more at a time, until it decides.
    fn byte_by_byte(bytes: &[u8]) -> Sniffed {
        let mut sniffer = Sniffer::new();
        let looked = (0..=bytes.len()).map(|end| sniffer.look(&bytes[..end]));
        looked.into_iter().find(|sniffed| *sniffed != Sniffed::Undecided).unwrap_or(Sniffed::Undecided)
    }

    fn named(name: &str) -> Sniffed {
        Sniffed::Tls(Some(name.into()))
    }

    #[test]
    fn tells_the_protocols_apart() {
        for (bytes, expected) in [
            (&b""[..], Sniffed::Undecided),
            (b"\x16", Sniffed::Undecided),
            (b"\x16\x03\x01\x02\x00", Sniffed::Undecided),
            (b"\x16\x03\x01\x02\x00\x01\x00", Sniffed::Undecided),
            (b"\x16\x03\x01\x02\x00\x02", Sniffed::Other),
            (b"\x16\x03\x01\x00\x00\x01", Sniffed::Other),
            (b"\x16\x02", Sniffed::Other),
            (b"PRI * HT", Sniffed::Undecided),
            (PREFACE, Sniffed::Http2),
            (b"PRI * HTTP/1.1\r\n", Sniffed::Other),
            (b"GET", Sniffed::Undecided),
            (b"GET ", Sniffed::Undecided),
            (b"GET / HTTP/1.1\r\n", Sniffed::Http1),
            (b"\r\nGET / HTTP/1.1\r\n", Sniffed::Http1),
            (b"OPTIONS * HTTP/1.1\r\n", Sniffed::Http1),
            (b"CONNECT a:443 HTTP/1.1\r\n", Sniffed::Http1),
            (b"CONNECT [::1]:443 HTTP/1.1\r\n", Sniffed::Http1),
            (b"GET htt", Sniffed::Undecided),
            (b"GET http://a/ HTTP/1.1\r\n", Sniffed::Http1),
            (b"GET HTTPS://a/ HTTP/1.1\r\n", Sniffed::Http1),
            (b"PROPFIND", Sniffed::Undecided),
            (b"\x00\x00\x00\x01", Sniffed::Other),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Sniffed::Other),
            (b" GET / HTTP/1.1\r\n", Sniffed::Other),
            // Words that other protocols begin with.
            (b"EHLO host.example.com\r\n", Sniffed::Other),
            (b"set key 0 0 5\r\n", Sniffed::Other),
            (b"KEYS *\r\n", Sniffed::Other),
            (b"CONNECT {\"verbose\":false}\r\n", Sniffed::Other),
            (b"*1\r\n$4\r\nPING\r\n", Sniffed::Other),
        ] {
            assert_eq!(once(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
            assert_eq!(byte_by_byte(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn the_server_name_is_read_from_records_of_any_size() {
        let message = hello(Some(&[(0, "Foo.Example.com")]));
        for size in [1, 2, 3, 7, 100, message.len()] {
            let bytes = records(&message, size);
            assert_eq!(byte_by_byte(&bytes), named("foo.example.com"), "records of {size}");
            assert_eq!(once(&bytes), named("foo.example.com"));
            assert_eq!(once(&bytes[..bytes.len() - 1]), Sniffed::Undecided);
        }
    }

    #[test]
    fn tls_without_a_name_that_can_be_read() {
        for names in [
            None,
            Some(&[][..]),
            Some(&[(0, "")]),
            Some(&[(0, "a b")]),
            Some(&[(0, "a\0b")]),
            Some(&[(0, "é.com")]),
            Some(&[(7, "a.com")]),
        ] {
            assert_eq!(once(&records(&hello(names), 50)), Sniffed::Tls(None), "{names:?}");
        }
        assert_eq!(once(&records(&hello(Some(&[(7, "x"), (0, "a.com.")])), 50)), named("a.com"));
        let long = "a".repeat(256);
        assert_eq!(once(&records(&hello(Some(&[(0, &long)])), 500)), Sniffed::Tls(None));
        // Another record in the middle of the hello.
        let message = hello(Some(&[(0, "a.com")]));
        let mut broken = records(&message[..20], 20);
        broken.extend([23, 3, 3, 0, 1, 0]);
        assert_eq!(byte_by_byte(&broken), Sniffed::Tls(None));
    }

    #[test]
    fn a_hello_is_bounded() {
        let mut message = hello(Some(&[(0, "a.com")]));
        message[1..4].copy_from_slice(&[0, 0x40, 1]);
        assert_eq!(once(&records(&message, 100)), Sniffed::Tls(None), "it says that it is too long");
        // In records of one byte the headers count too.
        message[1..4].copy_from_slice(&[0, 0x20, 0]);
        message.resize(0x2004, 0);
        let bytes = records(&message, 1);
        assert_eq!(once(&bytes[..MAX_HELLO_BYTES - 1]), Sniffed::Undecided);
        assert_eq!(byte_by_byte(&bytes[..MAX_HELLO_BYTES]), Sniffed::Tls(None));
    }

    #[test]
    fn who_says_no_more_is_judged_by_what_there_is() {
        let bytes = records(&hello(Some(&[(0, "a.com")])), 5);
        assert_eq!(Sniffer::new().give_up(&bytes[..20]), Sniffed::Tls(None));
        assert_eq!(Sniffer::new().give_up(b"GE"), Sniffed::Other);
        assert_eq!(Sniffer::new().give_up(b""), Sniffed::Other);
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_a_decision(
            bytes in proptest::collection::vec(any::<u8>(), 0..100),
            cut in 0_usize..100,
        ) {
            let early = once(&bytes[..cut.min(bytes.len())]);
            if early != Sniffed::Undecided {
                prop_assert_eq!(once(&bytes), early);
            }
        }

        #[test]
        fn decides_in_bounded_bytes(mut bytes in proptest::collection::vec(any::<u8>(), MAX_BYTES..200)) {
            bytes[0] = bytes[0].max(HANDSHAKE + 1);
            prop_assert_ne!(once(&bytes), Sniffed::Undecided);
        }

        /// A hello with some bytes changed and cut anywhere: no panic, and the pieces do not matter.
        #[test]
        fn a_hello_that_is_garbled_is_judged_the_same_in_pieces(
            size in 1_usize..80,
            changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..6),
            end in any::<usize>(),
        ) {
            let mut bytes = records(&hello(Some(&[(0, "foo.example.com")])), size);
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            bytes.truncate(end % (bytes.len() + 1));
            prop_assert_eq!(byte_by_byte(&bytes), once(&bytes));
        }

        #[test]
        fn the_body_of_a_hello_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = server_name(&bytes);
        }
    }
}
