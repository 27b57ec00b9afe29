//! The accept loop of one listener on one worker.
//!
//! An accepted socket is counted, placed (a worker that would have more than one connection more than the least
//! loaded passes it on, before any read) and handed to the listener's [`ConnHandler`]: plain HTTP at once, or a
//! handler that looks at the first bytes, ends TLS, or takes it as raw TCP.
//!
//! When accepting fails for want of descriptors or memory the loop waits [`BACK_OFF`], as the failing socket would
//! be ready again at once (G6). When it is time to close, it accepts what the kernel has already completed before
//! it lets go of the socket, as closing resets those.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::watch;

use super::connection::{Connection, Loaded, Loads, Permits};
use super::edge::{Edge, HttpStack};
use super::limits::ServerLimits;
use super::serve::{Drive, Protocol};
use super::trust::OpenConnections;
use crate::conn::ConnInfo;
use crate::drain::{Accepting, Drain, Phase};
use crate::listener::{Destination, ListenerProtocol, ListenerSpec, Open, OwnAddresses, Stats, destination};
use crate::snapshot::{Pinned, Snapshots};

/// How long a listener that cannot accept waits.
const BACK_OFF: Duration = Duration::from_millis(50);

/// What becomes of a connection once it is accepted. The seam for TLS, protocol sniffing and raw TCP.
pub trait ConnHandler<S: HttpStack>: Send + Sync + 'static {
    /// Serves the connection to its end, on a task of its own. Its time counts as a connection that is open.
    fn handle(&self, accepted: Accepted<S>) -> impl Future<Output = ()> + Send + 'static;

    /// Looks after the connections that are open, on a task of its own, for as long as the listener lives. Default not at
    /// all.
    fn look_after(&self, open: OpenConnections) -> impl Future<Output = ()> + Send + 'static {
        drop(open);
        std::future::ready(())
    }
}

/// Serves every connection as HTTP, in the clear.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainHttp;

impl<S: HttpStack> ConnHandler<S> for PlainHttp {
    fn handle(&self, accepted: Accepted<S>) -> impl Future<Output = ()> + Send + 'static {
        let (stream, open) = accepted.into_parts();
        open.drive(stream, None)
    }
}

/// A connection of which nothing has been read.
#[derive(Debug)]
pub struct Accepted<S> {
    stream: TcpStream,
    open: OpenConn<S>,
}

impl<S: HttpStack> Accepted<S> {
    /// The socket, for peeking.
    #[must_use]
    pub const fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// What is known of it.
    #[must_use]
    pub const fn info(&self) -> &ConnInfo {
        &self.open.info
    }

    /// The socket, and what keeps the connection counted.
    #[must_use]
    pub fn into_parts(self) -> (TcpStream, OpenConn<S>) {
        (self.stream, self.open)
    }
}

/// Keeps an accepted connection counted, and knows the stack that serves it.
#[derive(Debug)]
pub struct OpenConn<S> {
    info: ConnInfo,
    protocol: ListenerProtocol,
    permits: Permits,
    edge: Arc<Edge<S>>,
}

impl<S: HttpStack> OpenConn<S> {
    /// What is known of the connection.
    #[must_use]
    pub const fn info(&self) -> &ConnInfo {
        &self.info
    }

    /// What is known of the connection, to be completed before it is served.
    pub const fn info_mut(&mut self) -> &mut ConnInfo {
        &mut self.info
    }

    /// Serves HTTP on `io` to the connection's end. `protocol` replaces the listener's when the handler knows better
    /// (ALPN).
    pub fn serve_http<T>(self, io: T, protocol: Option<Protocol>) -> impl Future<Output = ()> + Send + 'static
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.drive(io, protocol)
    }

    /// What its listener speaks.
    #[must_use]
    pub const fn protocol(&self) -> ListenerProtocol {
        self.protocol
    }

    /// The worker's snapshot now; `None` where there are none.
    #[must_use]
    pub fn snapshot(&self) -> Option<Pinned> {
        self.edge.pinned()
    }

    pub(crate) fn limits(&self) -> &ServerLimits {
        &self.edge.limits
    }

    /// The connection among those that are told of a drain, and what may still serve it as HTTP.
    pub(crate) fn into_connection(self) -> (Arc<Connection>, HttpEdge<S>) {
        let connection = Connection::new(self.info, &self.edge.connections, self.permits);
        (connection, HttpEdge { edge: self.edge, protocol: http(self.protocol) })
    }

    /// Takes the connection as raw TCP: it stays counted while the handle lives.
    #[must_use]
    pub fn into_tcp(self) -> TcpConn {
        TcpConn(Connection::new(self.info, &self.edge.connections, self.permits))
    }

    pub(crate) fn drive<T>(self, io: T, protocol: Option<Protocol>) -> Drive<S, T>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let connection = Connection::new(self.info, &self.edge.connections, self.permits);
        Drive::new(self.edge, connection, io, protocol.unwrap_or(http(self.protocol)))
    }
}

/// What serves a connection as HTTP once it is known to be that.
pub(crate) struct HttpEdge<S> {
    edge: Arc<Edge<S>>,
    protocol: Protocol,
}

impl<S: HttpStack> HttpEdge<S> {
    /// The worker's snapshot now.
    pub(crate) fn snapshot(&self) -> Option<Pinned> {
        self.edge.pinned()
    }

    pub(crate) fn drive<T>(self, connection: Arc<Connection>, io: T) -> Drive<S, T>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Drive::new(self.edge, connection, io, self.protocol)
    }

    /// Serves what was agreed on during a handshake.
    pub(crate) fn speaking(mut self, protocol: Option<Protocol>) -> Self {
        self.protocol = protocol.unwrap_or(self.protocol);
        self
    }
}

const fn http(protocol: ListenerProtocol) -> Protocol {
    match protocol {
        ListenerProtocol::Http(http) => http,
        ListenerProtocol::Tcp | ListenerProtocol::Tls | ListenerProtocol::Https | ListenerProtocol::Sniff => {
            Protocol::Auto
        }
    }
}

/// A connection that a handler serves as raw TCP.
#[derive(Debug)]
pub struct TcpConn(Arc<Connection>);

impl TcpConn {
    pub(crate) const fn new(connection: Arc<Connection>) -> Self {
        Self(connection)
    }

    /// What is known of it.
    #[must_use]
    pub fn info(&self) -> &Arc<ConnInfo> {
        self.0.info()
    }

    /// How far its drain is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.0.phase()
    }

    /// Waits until it is to be cut.
    pub async fn cut(&self) {
        self.0.cut().await;
    }
}

/// What all workers of a listener share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) spec: ListenerSpec,
    pub(crate) address: SocketAddr,
    pub(crate) stats: Arc<Stats>,
    pub(crate) max_connections: usize,
    pub(crate) own: OwnAddresses,
    /// The drain of this listener alone: configuration removed it.
    pub(crate) drain: Drain,
    /// The drain of the process; an admin listener outlives it and has none.
    pub(crate) process: Option<Drain>,
}

/// A socket on its way to another worker.
pub(crate) type Passed = (std::net::TcpStream, SocketAddr, Open, Loaded);

/// One listener on one worker.
pub(crate) struct Acceptor<S, H> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) edge: Arc<Edge<S>>,
    pub(crate) handler: Arc<H>,
    pub(crate) worker: usize,
    /// `None` when there is only one worker.
    pub(crate) loads: Option<Arc<Loads>>,
    pub(crate) snapshots: Option<Snapshots>,
    /// The same listener on every worker, by index.
    pub(crate) peers: Arc<[UnboundedSender<Passed>]>,
}

impl<S: HttpStack, H: ConnHandler<S>> Acceptor<S, H> {
    /// Accepts until a drain closes the listener, and then passes phases on to its connections until they are cut.
    pub(crate) async fn run(
        self,
        listener: TcpListener,
        mut passed: UnboundedReceiver<Passed>,
        accepting: Vec<Accepting>,
    ) {
        tokio::spawn(self.handler.look_after(OpenConnections::of(&self.edge, self.snapshots.clone())));
        let mut own = self.shared.drain.subscribe();
        // Without a process to drain, a channel that never changes stands in.
        let serving = watch::Sender::new(Phase::Serving);
        let mut process = self.shared.process.as_ref().map_or_else(|| serving.subscribe(), Drain::subscribe);
        loop {
            let phases = (*own.borrow_and_update(), *process.borrow_and_update());
            self.edge.connections.tell(phases.0.max(phases.1));
            // A removed listener stops accepting at once; one of a draining process not before it closes.
            if phases.0 > Phase::Serving || phases.1 >= Phase::Closing {
                break;
            }
            tokio::select! {
                changed = own.changed() => if changed.is_err() { break },
                changed = process.changed() => if changed.is_err() { break },
                Some(passed) = passed.recv() => self.take(passed),
                never = self.accept(&listener) => match never {},
            }
        }
        close(listener, |stream, peer| self.place(stream, peer));
        passed.close();
        while let Some(passed) = passed.recv().await {
            self.take(passed);
        }
        drop(accepting);
        loop {
            let phase = (*own.borrow_and_update()).max(*process.borrow_and_update());
            self.edge.connections.tell(phase);
            if phase == Phase::Cut {
                return;
            }
            tokio::select! {
                changed = own.changed() => if changed.is_err() { return },
                changed = process.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn accept(&self, listener: &TcpListener) -> Infallible {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => self.place(stream, peer),
                Err(error) if is_of_the_peer(&error) => {}
                Err(error) => {
                    self.shared.stats.accept_errors.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%error, listener = self.shared.spec.name(), "cannot accept, waiting");
                    tokio::time::sleep(BACK_OFF).await;
                }
            }
        }
    }

    /// Counts a socket and gives it to the worker that is to have it.
    fn place(&self, stream: TcpStream, peer: SocketAddr) {
        let stats = &self.shared.stats;
        let Some(open) = stats.open(self.shared.max_connections) else { return };
        let Some(loads) = &self.loads else { return self.start(stream, peer, open, None) };
        let chosen = loads.choose(self.worker);
        let loaded = loads.load(chosen);
        if chosen == self.worker {
            return self.start(stream, peer, open, Some(loaded));
        }
        let (Some(to), Ok(stream)) = (self.peers.get(chosen), stream.into_std()) else { return };
        match to.send((stream, peer, open, loaded)) {
            Ok(()) => {
                stats.passed_on.fetch_add(1, Ordering::Relaxed);
            }
            // That worker has closed its listener already; ours is about to.
            Err(back) => {
                let (stream, peer, open, _) = back.0;
                self.take((stream, peer, open, loads.load(self.worker)));
            }
        }
    }

    fn take(&self, (stream, peer, open, loaded): Passed) {
        match TcpStream::from_std(stream) {
            Ok(stream) => self.start(stream, peer, open, Some(loaded)),
            Err(error) => tracing::warn!(%error, "cannot take over a connection"),
        }
    }

    fn start(&self, stream: TcpStream, peer: SocketAddr, open: Open, loaded: Option<Loaded>) {
        let shared = &self.shared;
        // Responses are written whole; waiting for more to send only delays them.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, %peer, "connection failed before its first request");
            return;
        }
        let local = if shared.address.ip().is_unspecified() || shared.spec.asks_original_dst() {
            stream.local_addr().unwrap_or(shared.address)
        } else {
            shared.address
        };
        let original_dst = match shared
            .spec
            .asks_original_dst()
            .then(|| destination(&stream, local, &shared.own))
        {
            None | Some(Destination::Here) => None,
            Some(Destination::Elsewhere(original)) => Some(original),
            Some(Destination::Loop(original)) => {
                shared.stats.loops.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%peer, %original, "refused a connection that was going to a listener of this process");
                return;
            }
        };
        let info = ConnInfo {
            peer,
            local,
            original_dst,
            direction: shared.spec.direction(),
            port: shared.spec.seen_port(original_dst, shared.address),
            listener: shared.spec.shared_name(),
            tls: false,
            sni: None,
            identity: None,
        };
        let permits = Permits {
            open,
            _load: loaded,
            _tokens: (shared.process.as_ref().map(Drain::token), shared.drain.token()),
        };
        let open = OpenConn { info, protocol: shared.spec.speaks(), permits, edge: Arc::clone(&self.edge) };
        tokio::spawn(self.handler.handle(Accepted { stream, open }));
    }
}

/// Closes a listener, and takes what waits in its backlog first.
///
/// The kernel is asked itself. The runtime knows of nothing that came since it last looked for events, and a worker
/// that is busy has not looked for a while: what it does not know of would be reset.
fn close(listener: TcpListener, mut take: impl FnMut(TcpStream, SocketAddr)) {
    let Ok(listener) = listener.into_std() else { return };
    loop {
        let accepted = listener.accept().and_then(|(stream, peer)| {
            stream.set_nonblocking(true)?;
            Ok((TcpStream::from_std(stream)?, peer))
        });
        match accepted {
            Ok((stream, peer)) => take(stream, peer),
            Err(error) if is_of_the_peer(&error) => {}
            // Nothing waits there any more, or what does cannot be had.
            Err(_) => return,
        }
    }
}

/// Gives an edge each new snapshot, until its last connection is gone. Idle workers do too, so that no old
/// generation is kept alive by a worker without requests.
pub(crate) async fn follow<S>(edge: std::sync::Weak<Edge<S>>, snapshots: Snapshots) {
    let mut generations = snapshots.subscribe();
    loop {
        generations.mark_unchanged();
        match edge.upgrade() {
            Some(edge) => edge.pin(Arc::new(snapshots.load())),
            None => return,
        }
        if generations.changed().await.is_err() {
            return;
        }
    }
}

/// A connection that was already over when we looked at it is no failure of ours.
fn is_of_the_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn h1_what_the_runtime_has_not_heard_of_is_taken_from_the_backlog() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // Connected while this thread is busy: the runtime has not looked for events since.
        let waiting: Vec<_> = (0..8).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        let mut taken = Vec::new();
        close(listener, |stream, _| taken.push(stream));
        assert_eq!(taken.len(), waiting.len());
        assert!(std::net::TcpStream::connect(address).is_err(), "and then it is closed");
    }
}
