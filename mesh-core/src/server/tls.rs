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
//! is passed on ([`Terminate::passes_on`]).

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
use super::l4::{Expect, L4, L4Conn, look};
use super::limits::ServerLimits;
use super::serve::Protocol;
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

/// Ends TLS. The seam between listeners and a TLS library.
pub trait Terminate: Send + Sync + 'static {
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
            let snapshot = open.snapshot();
            let mode = tls.expect(open.info(), snapshot.as_ref());
            if mode == DownstreamTls::Disable {
                drop(snapshot);
                return open.drive(Prefixed::new(Bytes::new(), stream), None).await;
            }
            let limits = open.limits().clone();
            let (connection, edge) = open.into_connection();
            // Boxed, like the handshake, so that a connection does not carry it along for its life.
            let found = Box::pin(look(&mut stream, &connection, None, &limits)).await;
            let Some((sniffed, prefix)) = found else { return };
            let io = Prefixed::new(prefix, stream);
            let Sniffed::Tls(name) = sniffed else {
                drop(snapshot);
                if mode == DownstreamTls::Permissive {
                    return edge.drive(connection, io).await;
                }
                return refuse_plaintext(&connection, &io);
            };
            if let Some(l4) = beside
                && tls.passes_on(connection.info(), snapshot.as_ref(), name.as_deref())
            {
                let conn = L4Conn { io, conn: TcpConn::new(connection), tls: true, sni: name, snapshot };
                return Box::pin(l4.serve(conn)).await;
            }
            let done = Box::pin(shake_hands(&*tls, io, &connection, snapshot, &limits)).await;
            let Some(Terminated { io, protocol, sni, identity }) = done else { return };
            connection.secure(ConnInfo { tls: true, sni, identity, ..ConnInfo::clone(connection.info()) });
            edge.speaking(protocol).drive(connection, io).await;
        }
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

async fn shake_hands<T: Terminate>(
    tls: &T,
    io: Prefixed<TcpStream>,
    connection: &Connection,
    snapshot: Option<Pinned>,
    limits: &ServerLimits,
) -> Option<Terminated<T::Io>> {
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
            Ok(Ok(terminated)) => return Some(terminated),
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
