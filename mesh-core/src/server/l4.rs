//! Connections that are not HTTP: found out by their first bytes, and handed to an [`L4`] beside the HTTP stack.
//!
//! What a listener speaks says where to look. A [`Tcp`](ListenerProtocol::Tcp) listener looks at nothing. A
//! [`Tls`](ListenerProtocol::Tls) one reads the ClientHello, for its server name. A
//! [`Sniff`](ListenerProtocol::Sniff) one asks the [`L4`] first what to [`Expect`] of the connection's destination:
//! where only HTTP or only bytes are spoken nothing is sniffed, so that HTTP costs nothing more, and a client that waits
//! for its server to speak first is not waited for (PT-04). Bytes that were read to find out are given again.
//!
//! **Time.** Who sends nothing is waited for as long as the L4's patience says (Istio's `protocolDetectionTimeout`), and
//! is then taken for a client of a protocol in which the server speaks first. Without patience, the default as in Istio,
//! the wait has no end but the listener's idle timeout, which closes the connection. Who has begun to speak has the
//! listener's head timeout to become clear, and is then taken for what the bytes so far look like.
//!
//! **Drain.** A connection that said nothing closes when the listener does. One that an L4 serves is in flight until its
//! end: it is told by [`TcpConn::cut`] when there is no more time.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::accept::{Accepted, ConnHandler, TcpConn};
use super::connection::Connection;
use super::edge::HttpStack;
use super::limits::ServerLimits;
use super::serve::{FIRST_REQUEST, LAST_LOOK};
use crate::clock;
use crate::conn::ConnInfo;
use crate::drain::Phase;
use crate::listener::ListenerProtocol;
use crate::prefixed::Prefixed;
use crate::snapshot::Pinned;
use crate::sniff::{Sniffed, Sniffer};
use crate::upstream::Io;

/// Read at once while a connection is sniffed: most request heads and ClientHellos.
const CHUNK: usize = 2048;

/// What serves connections that are not HTTP.
pub trait L4: Send + Sync + 'static {
    /// What to expect of a connection to a listener that sniffs, before anything of it is read.
    fn expect(&self, info: &ConnInfo, snapshot: Option<&Pinned>) -> Expect;

    /// Serves the connection to its end. Its time counts as a connection that is open.
    fn serve(&self, conn: L4Conn) -> impl Future<Output = ()> + Send + 'static;

    /// Serves a connection whose TLS was ended, to its end. Default: closes it.
    fn serve_secured(&self, conn: SecuredConn) -> impl Future<Output = ()> + Send + 'static {
        drop(conn);
        std::future::ready(())
    }
}

/// A connection that is not HTTP within TLS that was ended.
#[non_exhaustive]
pub struct SecuredConn {
    /// The stream, decrypted. Dropped, it ends without the notice that TLS has for an orderly end.
    pub io: Box<dyn Io>,
    /// What is known of the connection and of its peer, its drain, and its place among those that are open.
    pub conn: TcpConn,
    /// The server name that the client asked for: lower case.
    pub sni: Option<Box<str>>,
    /// The snapshot by which hands were shaken: what the client had to show is what its server asked for there, and so it
    /// is to be routed by no other. Long-lived connections should not keep it.
    pub snapshot: Option<Pinned>,
}

impl std::fmt::Debug for SecuredConn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecuredConn")
            .field("conn", &self.conn)
            .field("sni", &self.sni)
            .finish_non_exhaustive()
    }
}

/// What to expect of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// HTTP; nothing is sniffed.
    Http,
    /// Bytes; nothing is sniffed.
    Tcp,
    /// TLS or bytes, not HTTP: only a server name is looked for.
    Tls {
        /// How long to wait for the client to speak; `None` is without end.
        patience: Option<Duration>,
    },
    /// HTTP unless it begins as TLS does.
    HttpOrTls,
    /// Anything.
    Sniff {
        /// How long to wait for the client to speak; `None` is without end.
        patience: Option<Duration>,
    },
}

/// A connection that is not HTTP.
#[derive(Debug)]
#[non_exhaustive]
pub struct L4Conn {
    /// The socket. What was read to find out what is spoken comes first.
    pub io: Prefixed<TcpStream>,
    /// What is known of the connection, its drain, and its place among those that are open.
    pub conn: TcpConn,
    /// Whether it begins as TLS does. Not looked at where only bytes are expected.
    pub tls: bool,
    /// The server name that the client asks for: lower case, without a trailing dot.
    pub sni: Option<Box<str>>,
    /// The worker's snapshot when the connection was accepted. Long-lived connections should not keep it.
    pub snapshot: Option<Pinned>,
}

impl L4Conn {
    /// Ends the connection by a reset, so that the client does not take it for an orderly end.
    pub fn reset(self) {
        if let Err(error) = self.io.get_ref().set_zero_linger() {
            tracing::debug!(%error, "cannot reset a connection, closing it");
        }
    }
}

/// Serves HTTP by the listener's stack and the rest by an [`L4`].
#[derive(Debug)]
pub struct WithL4<L>(Arc<L>);

impl<L: L4> WithL4<L> {
    /// Hands to `l4` what is not HTTP.
    #[must_use]
    pub fn new(l4: L) -> Self {
        Self(Arc::new(l4))
    }
}

impl<S: HttpStack, L: L4> ConnHandler<S> for WithL4<L> {
    fn handle(&self, accepted: Accepted<S>) -> impl Future<Output = ()> + Send + 'static {
        let l4 = Arc::clone(&self.0);
        async move {
            let (mut stream, open) = accepted.into_parts();
            let snapshot = open.snapshot();
            let expect = match open.protocol() {
                ListenerProtocol::Http(_) => Expect::Http,
                ListenerProtocol::Tcp => Expect::Tcp,
                ListenerProtocol::Tls | ListenerProtocol::Https => Expect::Tls { patience: None },
                ListenerProtocol::Sniff => l4.expect(open.info(), snapshot.as_ref()),
            };
            if expect == Expect::Http {
                return open.drive(Prefixed::new(Bytes::new(), stream), None).await;
            }
            let limits = open.limits().clone();
            let (connection, edge) = open.into_connection();
            let found = match expect {
                Expect::Http | Expect::Tcp => Some((Sniffed::Other, Bytes::new())),
                Expect::Tls { patience } | Expect::Sniff { patience } => {
                    // Boxed, so that the connections that are served as HTTP do not carry it along.
                    Box::pin(look(&mut stream, &connection, patience, &limits)).await
                }
                Expect::HttpOrTls => Box::pin(look(&mut stream, &connection, None, &limits)).await,
            };
            let Some((sniffed, prefix)) = found else { return };
            let io = Prefixed::new(prefix, stream);
            let is_http = match (expect, &sniffed) {
                (Expect::Sniff { .. }, Sniffed::Http1 | Sniffed::Http2) => true,
                (Expect::HttpOrTls, Sniffed::Tls(_)) => false,
                (Expect::HttpOrTls, _) => true,
                _ => false,
            };
            if is_http {
                return edge.drive(connection, io).await;
            }
            let (tls, sni) = match sniffed {
                Sniffed::Tls(sni) => (true, sni),
                _ => (false, None),
            };
            Box::pin(l4.serve(L4Conn { io, conn: TcpConn::new(connection), tls, sni, snapshot })).await;
        }
    }
}

/// Reads until it is known what is spoken: that, and what was read. `None` when the connection is over.
pub(super) async fn look<T: AsyncRead + Unpin>(
    io: &mut T,
    connection: &Connection,
    patience: Option<Duration>,
    limits: &ServerLimits,
) -> Option<(Sniffed, Bytes)> {
    let begun = clock::now();
    let mut looking = Looking {
        read: BytesMut::new(),
        sniffer: Sniffer::new(),
        timer: None,
        spoken: None,
        closing: None,
        begun,
        patience,
        limits,
    };
    let sniffed = poll_fn(|cx| {
        connection.driven_by(cx.waker().clone());
        looking.poll(cx, Pin::new(&mut *io), connection)
    })
    .await?;
    Some((sniffed, looking.read.freeze()))
}

struct Looking<'l> {
    read: BytesMut,
    sniffer: Sniffer,
    timer: Option<(Instant, Pin<Box<Sleep>>)>,
    /// When its first byte came.
    spoken: Option<Instant>,
    /// When it was told that it is time to close.
    closing: Option<Instant>,
    begun: Instant,
    patience: Option<Duration>,
    limits: &'l ServerLimits,
}

impl Looking<'_> {
    fn poll<T: AsyncRead + Unpin>(
        &mut self,
        cx: &mut std::task::Context<'_>,
        mut io: Pin<&mut T>,
        connection: &Connection,
    ) -> Poll<Option<Sniffed>> {
        if connection.phase() == Phase::Cut {
            return Poll::Ready(None);
        }
        loop {
            match self.read_some(cx, io.as_mut()) {
                Poll::Ready(Err(error)) => {
                    tracing::debug!(%error, "connection failed before it was known what it speaks");
                    return Poll::Ready(None);
                }
                // Who says nothing has nothing to be served; who said something may only have closed its half.
                Poll::Ready(Ok(0)) if self.read.is_empty() => return Poll::Ready(None),
                Poll::Ready(Ok(0)) => return Poll::Ready(Some(self.sniffer.give_up(&self.read))),
                Poll::Ready(Ok(_)) => {
                    self.spoken.get_or_insert_with(clock::now);
                    match self.sniffer.look(&self.read) {
                        Sniffed::Undecided => {}
                        decided => return Poll::Ready(Some(decided)),
                    }
                }
                Poll::Pending => {
                    let Some((due, closes)) = self.due(connection) else { return Poll::Pending };
                    if self.timer.as_ref().is_none_or(|(at, _)| *at != due) {
                        self.timer = Some((due, Box::pin(tokio::time::sleep_until(due.into()))));
                    }
                    if let Some((_, timer)) = &mut self.timer {
                        ready!(timer.as_mut().poll(cx));
                    }
                    return Poll::Ready((!closes).then(|| self.sniffer.give_up(&self.read)));
                }
            }
        }
    }

    fn read_some<T: AsyncRead>(
        &mut self,
        cx: &mut std::task::Context<'_>,
        io: Pin<&mut T>,
    ) -> Poll<std::io::Result<usize>> {
        let filled = self.read.len();
        // Zeroed by hand, as there is no safe way to read into memory that is not; it is given back when nothing came.
        self.read.resize(filled + CHUNK, 0);
        let mut buf = ReadBuf::new(&mut self.read[filled..]);
        let polled = io.poll_read(cx, &mut buf);
        let read = buf.filled().len();
        self.read.truncate(filled + read);
        if filled + read == 0 {
            // A client that is waited for costs no memory.
            self.read = BytesMut::new();
        }
        ready!(polled)?;
        Poll::Ready(Ok(read))
    }

    /// When something is due, and whether the connection then closes; else it is taken for what it looks like.
    fn due(&mut self, connection: &Connection) -> Option<(Instant, bool)> {
        if let Some(spoken) = self.spoken {
            let patience =
                self.patience.map_or(self.limits.head_timeout, |p| p.min(self.limits.head_timeout));
            return Some((spoken + patience, false));
        }
        let closing = (connection.phase() >= Phase::Closing).then(|| {
            let patience = if connection.was_born_draining() { FIRST_REQUEST } else { LAST_LOOK };
            (*self.closing.get_or_insert_with(clock::now) + patience, true)
        });
        let idle = self.limits.idle_timeout.map(|idle| (self.begun + idle, true));
        let speaks_first = self.patience.map(|patience| (self.begun + patience, false));
        [closing, idle, speaks_first].into_iter().flatten().min_by_key(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt as _, DuplexStream};
    use tokio::time::Instant;

    use super::super::connection::{Connections, Permits};
    use super::*;
    use crate::conn::Direction;
    use crate::drain::Drain;
    use crate::listener::Stats;

    fn connection() -> Arc<Connection> {
        let permits = Permits {
            open: Arc::new(Stats::default()).open(1).unwrap(),
            _load: None,
            _tokens: (None, Drain::new().token()),
        };
        Connection::new(ConnInfo::unknown(Direction::Outbound), &Arc::new(Connections::default()), permits)
    }

    type Looked = tokio::task::JoinHandle<(Option<(Sniffed, Bytes)>, Duration)>;

    fn looked_at(patience: Option<Duration>) -> (DuplexStream, Arc<Connection>, Looked) {
        let (ours, mut theirs) = tokio::io::duplex(1 << 10);
        let connection = connection();
        let told = Arc::clone(&connection);
        let looked = tokio::spawn(async move {
            let start = Instant::now();
            let found = look(&mut theirs, &connection, patience, &ServerLimits::default()).await;
            (found, start.elapsed())
        });
        (ours, told, looked)
    }

    #[tokio::test(start_paused = true)]
    async fn pt_04_bytes_decide_and_are_given_again() {
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], Sniffed::Http1),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrest", Sniffed::Http2),
            (b"\0\0\0\x01", Sniffed::Other),
        ] {
            let (mut client, _, looked) = looked_at(None);
            for byte in bytes {
                // The client may be decided upon before its last byte.
                let _ = client.write_all(&[*byte]).await;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let (sniffed, read) = looked.await.unwrap().0.unwrap();
            assert_eq!(sniffed, expected);
            assert!(!read.is_empty() && bytes.starts_with(&read));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pt_04_a_client_that_waits_for_its_server_is_bytes_when_patience_ends() {
        let (_client, _, looked) = looked_at(Some(Duration::from_secs(5)));
        let (found, elapsed) = looked.await.unwrap();
        assert_eq!((found, elapsed.as_secs()), (Some((Sniffed::Other, Bytes::new())), 5));
    }

    #[tokio::test(start_paused = true)]
    async fn pt_04_without_patience_it_is_waited_for_until_it_is_idle() {
        let (_client, _, looked) = looked_at(None);
        let (found, elapsed) = looked.await.unwrap();
        assert_eq!((found, elapsed.as_secs()), (None, 3600));
    }

    #[tokio::test(start_paused = true)]
    async fn who_begins_and_does_not_become_clear_is_what_it_looks_like() {
        for (bytes, expected) in
            [(&b"HELLO"[..], Sniffed::Other), (b"\x16\x03\x01\x02\x00\x01", Sniffed::Tls(None))]
        {
            let (mut client, _, looked) = looked_at(None);
            tokio::time::sleep(Duration::from_secs(60)).await;
            client.write_all(bytes).await.unwrap();
            let (found, elapsed) = looked.await.unwrap();
            assert_eq!((found, elapsed.as_secs()), (Some((expected.clone(), Bytes::from_static(bytes))), 70));
            // A half that is closed is a clear word too.
            let (mut client, _, looked) = looked_at(None);
            client.write_all(bytes).await.unwrap();
            client.shutdown().await.unwrap();
            let (found, elapsed) = looked.await.unwrap();
            assert_eq!((found.unwrap().0, elapsed.as_secs()), (expected, 0));
        }
        let (mut client, _, looked) = looked_at(None);
        client.shutdown().await.unwrap();
        assert_eq!(looked.await.unwrap().0, None);
    }

    #[tokio::test(start_paused = true)]
    async fn h1_a_silent_connection_closes_with_the_listener() {
        let (_client, connection, looked) = looked_at(Some(Duration::from_secs(3600)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        connection.tell(Phase::Draining);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!looked.is_finished());
        connection.tell(Phase::Closing);
        let (found, elapsed) = looked.await.unwrap();
        assert_eq!((found, elapsed.as_secs()), (None, 2));
        let (mut client, connection, looked) = looked_at(None);
        client.write_all(b"GE").await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        connection.tell(Phase::Cut);
        assert_eq!(looked.await.unwrap(), (None, Duration::from_secs(1)));
    }
}
