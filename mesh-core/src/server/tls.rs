//! Ending TLS on a listener: who is asked, when, and what becomes of those who do not speak it.
//!
//! The cryptography is a [`Terminate`]'s; here is what must hold whatever it is. The first bytes of a connection decide
//! whether it is TLS: they are read once, and given again to whoever goes on with it, so that plaintext and TLS share
//! one port without a timeout that guesses (PA-01). Where TLS is demanded, plaintext is reset before a byte of it is
//! read as a request.
//!
//! A handshake runs on the connection's own task, never in the accept loop, has a time of its own, and is one of a
//! bounded number; a drain that cuts connections cuts it too. What it tells of the peer is in the connection's
//! [`ConnInfo`] before the first request is read. A handshake that fails is counted and logged with its reason; the
//! peer learns no more than TLS's alert.
//!
//! Where servers that end TLS share a port with some that pass it on, the server name decides, and an [`L4`] takes what
//! is passed on ([`Terminate::passes_on`]). The same one takes what is no HTTP within TLS that was ended ([`Within`]).

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::accept::{Accepted, ConnHandler, TcpConn};
use super::connection::Connection;
use super::edge::HttpStack;
use super::l4::{Expect, L4, L4Conn, SecuredConn, look};
use super::limits::ServerLimits;
use super::serve::Protocol;
use super::trust::{Judge, OpenConnections, judge_one};
use crate::conn::ConnInfo;
use crate::identity::PeerInfo;
use crate::listener::Stats;
use crate::prefixed::Prefixed;
use crate::snapshot::Pinned;
use crate::sniff::Sniffed;

/// What is asked of the transport of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DownstreamTls {
    /// TLS is not terminated here: bytes are served as they come.
    #[default]
    Disable,
    /// TLS is terminated where it is spoken, and plaintext is served too.
    Permissive,
    /// TLS is demanded.
    Strict,
}

/// Ends TLS. The seam between listeners and a TLS library. As a [`Judge`] it judges again whom it let in, and those who
/// speak plaintext where it asked for no TLS.
pub trait Terminate: Judge {
    /// The transport after a handshake.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// What is asked of a connection, before anything of it is read.
    fn expect(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> DownstreamTls;

    /// Whether TLS for this server name (in lower case) is passed on as it is, where the listener has an [`L4`] for it.
    /// Default no.
    fn passes_on(&self, info: &ConnInfo, snapshot: Option<&Pinned>, sni: Option<&str>) -> bool {
        let _ = (info, snapshot, sni);
        false
    }

    /// Shakes hands. What was read of the connection to find out that it is TLS comes first. The time that it may take
    /// is bounded by the caller.
    ///
    /// # Errors
    /// When the peer is not who it has to be, or does not speak as it should; the error is for the log.
    fn terminate(
        &self,
        io: Prefixed<TcpStream>,
        info: &ConnInfo,
        snapshot: Option<&Pinned>,
    ) -> impl Future<Output = io::Result<Terminated<Self::Io>>> + Send;
}

/// What is within TLS that was ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Within {
    /// HTTP.
    #[default]
    Http,
    /// Bytes, for an [`L4`].
    Bytes,
}

/// What a handshake came to.
#[derive(Clone, Debug)]
pub struct Terminated<I> {
    /// The transport, decrypted.
    pub io: I,
    /// What was agreed on by ALPN; `None` where nothing was, and the first bytes decide.
    pub protocol: Option<Protocol>,
    /// The server name that the client asked for, in lower case.
    pub sni: Option<Arc<str>>,
    /// Who the peer is, where it showed a certificate.
    pub identity: Option<Arc<PeerInfo>>,
    /// What is served: HTTP by the listener's stack, or bytes by its [`L4`], without which they are not.
    pub within: Within,
}

/// Serves HTTP by the listener's stack after ending TLS where it is spoken.
#[derive(Debug)]
pub struct WithTls<T, L = Nothing> {
    tls: Arc<T>,
    beside: Option<Arc<L>>,
}

impl<T: Terminate> WithTls<T> {
    /// Ends TLS by `tls`.
    #[must_use]
    pub fn new(tls: T) -> Self {
        Self { tls: Arc::new(tls), beside: None }
    }

    /// Hands to `l4` the TLS that is passed on.
    #[must_use]
    pub fn beside<L: L4>(self, l4: L) -> WithTls<T, L> {
        WithTls { tls: self.tls, beside: Some(Arc::new(l4)) }
    }
}

/// The [`L4`] of listeners that pass nothing on.
#[derive(Clone, Copy, Debug)]
pub enum Nothing {}

impl L4 for Nothing {
    fn expect(&self, _: &ConnInfo, _: Option<&Pinned>) -> Expect {
        match *self {}
    }

    fn serve(&self, _: L4Conn) -> impl Future<Output = ()> + Send + 'static {
        let nothing = *self;
        async move { match nothing {} }
    }
}

impl<S: HttpStack, T: Terminate, L: L4> ConnHandler<S> for WithTls<T, L> {
    fn handle(&self, accepted: Accepted<S>) -> impl Future<Output = ()> + Send + 'static {
        let (tls, beside) = (Arc::clone(&self.tls), self.beside.clone());
        async move {
            let (mut stream, open) = accepted.into_parts();
            let limits = open.limits().clone();
            let (connection, edge) = open.into_connection();
            let snapshot = edge.snapshot();
            let mode = tls.expect(connection.info(), snapshot.as_ref());
            if mode == DownstreamTls::Disable {
                drop(snapshot);
                let_in(&*tls, &connection, Within::Http, || edge.snapshot());
                return edge.drive(connection, Prefixed::new(Bytes::new(), stream)).await;
            }
            // Boxed, like the handshake, so that a connection does not carry it along for its life.
            let found = Box::pin(look(&mut stream, &connection, None, &limits)).await;
            let Some((sniffed, prefix)) = found else { return };
            let io = Prefixed::new(prefix, stream);
            let name = match Beginning::of(mode, sniffed) {
                Beginning::Tls(name) => name,
                Beginning::Plaintext => {
                    drop(snapshot);
                    let_in(&*tls, &connection, Within::Http, || edge.snapshot());
                    return edge.drive(connection, io).await;
                }
                Beginning::Refused => return refuse_plaintext(&connection, &io),
            };
            if let Some(l4) = &beside
                && tls.passes_on(connection.info(), snapshot.as_ref(), name.as_deref())
            {
                let conn = L4Conn { io, conn: TcpConn::new(connection), tls: true, sni: name, snapshot };
                return Box::pin(l4.serve(conn)).await;
            }
            let done = Box::pin(shake_hands(&*tls, io, &connection, snapshot, &limits)).await;
            let Some((Terminated { io, protocol, sni, identity, within }, snapshot)) = done else { return };
            connection.secure(ConnInfo { tls: true, sni, identity, ..ConnInfo::clone(connection.info()) });
            let_in(&*tls, &connection, within, || edge.snapshot());
            match (within, beside) {
                (Within::Http, _) => edge.speaking(protocol).drive(connection, io).await,
                (Within::Bytes, Some(l4)) if !connection.is_distrusted() => {
                    drop(edge);
                    let sni = connection.info().sni.as_deref().map(Into::into);
                    let conn =
                        SecuredConn { io: Box::new(io), conn: TcpConn::new(connection), sni, snapshot };
                    Box::pin(l4.serve_secured(conn)).await;
                }
                // Nobody is there to serve it, or its peer is not let in any more: not a byte goes on.
                (Within::Bytes, _) => {}
            }
        }
    }

    fn look_after(&self, open: OpenConnections) -> impl Future<Output = ()> + Send + 'static {
        open.judge_by(Arc::clone(&self.tls))
    }
}

/// What becomes of a connection by its first bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Beginning {
    /// TLS is ended, or passed on by this name.
    Tls(Option<Box<str>>),
    /// It is served as it is.
    Plaintext,
    /// It is plaintext where TLS is demanded.
    Refused,
}

impl Beginning {
    fn of(mode: DownstreamTls, sniffed: Sniffed) -> Self {
        match (sniffed, mode) {
            (_, DownstreamTls::Disable) => Self::Plaintext,
            (Sniffed::Tls(name), _) => Self::Tls(name),
            (_, DownstreamTls::Permissive) => Self::Plaintext,
            (_, DownstreamTls::Strict) => Self::Refused,
        }
    }
}

/// Lets the peer in. What was trusted when it came is not always what is trusted now: who would not be let in by that is
/// distrusted at once.
fn let_in(
    judge: &impl Judge,
    connection: &Arc<Connection>,
    within: Within,
    snapshot: impl FnOnce() -> Option<Pinned>,
) {
    if connection.let_in(within == Within::Bytes) {
        judge_one(judge, connection, snapshot().as_ref());
    }
}

fn refuse_plaintext(connection: &Connection, io: &Prefixed<TcpStream>) {
    connection.stats().plaintext_refused.fetch_add(1, Ordering::Relaxed);
    let info = connection.info();
    tracing::info!(peer = %info.peer, listener = &*info.listener, "refused plaintext: TLS is demanded");
    if let Err(error) = io.get_ref().set_zero_linger() {
        tracing::debug!(%error, "cannot reset a connection, closing it");
    }
}

/// Shakes hands. With what it came to, the snapshot by which it did.
async fn shake_hands<T: Terminate>(
    tls: &T,
    io: Prefixed<TcpStream>,
    connection: &Connection,
    snapshot: Option<Pinned>,
    limits: &ServerLimits,
) -> Option<(Terminated<T::Io>, Option<Pinned>)> {
    let info = connection.info();
    let fail = |error: &dyn std::fmt::Display| {
        connection.stats().handshake_failures.fetch_add(1, Ordering::Relaxed);
        tracing::info!(peer = %info.peer, listener = &*info.listener, "TLS handshake failed: {error}");
    };
    let Some(_place) = Handshake::begin(connection.stats(), limits.max_tls_handshakes) else {
        fail(&"too many handshakes at once");
        return None;
    };
    let handshake =
        tokio::time::timeout(limits.tls_handshake_timeout, tls.terminate(io, info, snapshot.as_ref()));
    tokio::select! {
        biased;
        done = handshake => match done {
            Ok(Ok(terminated)) => return Some((terminated, snapshot)),
            Ok(Err(error)) => fail(&error),
            Err(_) => fail(&"it took too long"),
        },
        () = connection.cut() => {}
    }
    None
}

/// A place among the handshakes of a listener.
struct Handshake(Arc<Stats>);

impl Handshake {
    fn begin(stats: &Arc<Stats>, most: usize) -> Option<Self> {
        let place = Self(Arc::clone(stats));
        // The place is given back when it is dropped, here too.
        (stats.handshakes.fetch_add(1, Ordering::Relaxed) < most).then_some(place)
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.0.handshakes.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::conn::Direction;
    use crate::drain::Drain;
    use crate::server::connection::{Connections, Permits};
    use crate::sniff;

    const SEED: u64 = 0xd5;

    /// How long who waits for its server is waited for.
    const PATIENCE: Duration = Duration::from_secs(5);

    /// What a client does.
    struct Case {
        what: &'static str,
        says: Vec<u8>,
        /// Whether it says no more and closes its half.
        closes: bool,
        /// What it is taken for; `None` when the connection is over.
        taken_for: Option<Beginning>,
        /// Whether only time decides.
        waits: bool,
        /// Whether it says a byte a second.
        is_slow: bool,
    }

    fn noise(rng: &mut SmallRng, most: usize) -> Vec<u8> {
        (0..rng.random_range(1..most)).map(|_| rng.random_range(b'a'..=b'z')).collect()
    }

    fn case(kind: usize, mode: DownstreamTls, rng: &mut SmallRng) -> Case {
        let plaintext = Some(Beginning::of(mode, Sniffed::Other));
        let of = |what, says: Vec<u8>, taken_for| Case {
            what,
            says,
            closes: false,
            taken_for,
            waits: false,
            is_slow: false,
        };
        match kind {
            0 => {
                let path = String::from_utf8(noise(rng, 600)).unwrap();
                let method = ["GET", "POST", "OPTIONS", "DELETE", "PATCH", "HEAD"][rng.random_range(0..6)];
                of(
                    "HTTP/1.1",
                    format!("{method} /{path} HTTP/1.1\r\nhost: a\r\n\r\n").into_bytes(),
                    plaintext,
                )
            }
            1 => {
                let mut says = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
                says.extend(noise(rng, 200));
                of("HTTP/2", says, plaintext)
            }
            2 => {
                let name = format!("{}.example.com", String::from_utf8(noise(rng, 40)).unwrap());
                let size = rng.random_range(1..400);
                let says = sniff::tests::client_hello(&name, size);
                of("TLS for a foreign name", says, Some(Beginning::Tls(Some(name.into()))))
            }
            3 => Case { waits: true, ..of("a client whose server speaks first", Vec::new(), plaintext) },
            4 => Case { closes: true, ..of("nothing at all", Vec::new(), None) },
            // Five of its bytes do not say yet that they begin a ClientHello, nor whom it asks for.
            5 => Case {
                waits: true,
                is_slow: true,
                ..of("TLS, a byte a second", sniff::tests::client_hello("a", 40), Some(Beginning::Tls(None)))
            },
            // What is neither, with a first byte that begins no method and no record.
            _ => {
                let mut says = vec![*[0, 1, 0x05, 0x80, 0xff].get(rng.random_range(0..5)).unwrap()];
                says.extend(noise(rng, 100));
                of("a protocol that nobody knows", says, plaintext)
            }
        }
    }

    /// PERMISSIVE and STRICT over one port: ten thousand beginnings, whole, in pieces and byte by byte.
    #[tokio::test(start_paused = true)]
    async fn d5_ten_thousand_beginnings_are_told_apart() {
        const CASES: usize = 10_000;
        let mut rng = SmallRng::seed_from_u64(SEED);
        let mut wrong = Vec::new();
        for number in 0..CASES {
            let mode = [DownstreamTls::Permissive, DownstreamTls::Strict][usize::from(number % 10 == 9)];
            let Case { what, says, closes, taken_for, waits, is_slow } = case(number % 7, mode, &mut rng);
            let piece = match rng.random_range(0..3) {
                _ if is_slow => 1,
                0 => 1,
                1 => rng.random_range(1..=says.len().max(1)),
                _ => says.len().max(1),
            };
            let (client, mut io) = tokio::io::duplex(1 << 16);
            let permits = Permits {
                open: Arc::new(Stats::default()).open(1).unwrap(),
                _load: None,
                _tokens: (None, Drain::new().token()),
            };
            let connection = Connection::new(
                ConnInfo::unknown(Direction::Inbound),
                &Arc::new(Connections::default()),
                permits,
            );
            let sent = says.clone();
            let speaking = tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(client);
                // In time, however small its pieces.
                let pieces = u32::try_from(sent.len() / piece + 1).unwrap();
                let pause = if is_slow { Duration::from_secs(1) } else { Duration::from_secs(4) / pieces };
                for piece in sent.chunks(piece) {
                    write.write_all(piece).await.unwrap();
                    tokio::time::sleep(pause).await;
                }
                if closes {
                    write.shutdown().await.unwrap();
                }
                // Until the other side is done.
                read.read_to_end(&mut Vec::new()).await.unwrap();
            });
            let begun = tokio::time::Instant::now();
            let found = look(&mut io, &connection, Some(PATIENCE), &ServerLimits::default()).await;
            let took = begun.elapsed();
            let (taken, mut read) = match found {
                None => (None, Vec::new()),
                Some((sniffed, read)) => (Some(Beginning::of(mode, sniffed)), read.to_vec()),
            };
            // Whoever goes on with the connection gets every byte of it.
            let mut rest = vec![0; says.len() - read.len()];
            io.read_exact(&mut rest).await.unwrap();
            read.extend(rest);
            let in_time = if waits { took.as_secs() == PATIENCE.as_secs() } else { took < PATIENCE };
            if taken != taken_for || read != says || !in_time {
                wrong.push((number, what, mode, piece, taken, took));
            }
            drop(io);
            speaking.await.unwrap();
        }
        assert!(wrong.is_empty(), "seed {SEED:#x}: {} of {CASES}: {:?}", wrong.len(), wrong.first());
    }

    #[test]
    fn pa_01_what_is_asked_of_a_connection_and_what_it_says_decide_what_it_is() {
        let tls = || Sniffed::Tls(Some("a".into()));
        for (mode, of_tls, of_rest) in [
            (DownstreamTls::Disable, Beginning::Plaintext, Beginning::Plaintext),
            (DownstreamTls::Permissive, Beginning::Tls(Some("a".into())), Beginning::Plaintext),
            (DownstreamTls::Strict, Beginning::Tls(Some("a".into())), Beginning::Refused),
        ] {
            assert_eq!(Beginning::of(mode, tls()), of_tls);
            for rest in [Sniffed::Http1, Sniffed::Http2, Sniffed::Other] {
                assert_eq!(Beginning::of(mode, rest), of_rest);
            }
        }
    }
}
