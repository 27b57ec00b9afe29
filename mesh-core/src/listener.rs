//! Listeners: what they are asked to be, how their sockets are bound, and what is counted of them.
//!
//! **Binding.** One worker binds plainly. For more, the kernel spreads connections over one socket per worker
//! (`SO_REUSEPORT`), which would also let a second proxy of the same user join silently; so the address is first
//! bound exclusively as a probe, and an address in use is an error that names it. Sockets are bound and listening
//! before the call returns: from then on the kernel accepts, whatever the workers are doing.
//!
//! **Original destination.** Where iptables redirects connections to a listener, the kernel knows where they were
//! going. An answer that is this very listener means that nothing was redirected; one that is another listener of
//! this process would be a loop, and such a connection is refused (F8).

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use socket2::{Domain, SockRef, Socket, Type};

use crate::conn::Direction;
use crate::drain::Phase;
use crate::server::Protocol;

/// Connections that the kernel holds for us; it caps this at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// How often a free port is looked for again when another process took the one that the probe found.
const FREE_PORT_TRIES: usize = 16;

/// What a listener speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerProtocol {
    /// HTTP, whatever the bytes are.
    Http(Protocol),
    /// Bytes, of which none is looked at.
    Tcp,
    /// TLS that is routed by its server name and not ended here; other bytes are not refused.
    Tls,
    /// TLS that is ended where a server of its name does so, and else routed by its name; nothing else.
    Https,
    /// What the destination speaks, by its first bytes where that is not known.
    Sniff,
}

impl ListenerProtocol {
    /// The word that configuration dumps use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http(http) => http.as_str(),
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Https => "https",
            Self::Sniff => "sniff",
        }
    }
}

impl Default for ListenerProtocol {
    fn default() -> Self {
        Self::Http(Protocol::default())
    }
}

impl From<Protocol> for ListenerProtocol {
    fn from(http: Protocol) -> Self {
        Self::Http(http)
    }
}

/// What a listener is asked to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerSpec {
    name: Arc<str>,
    address: SocketAddr,
    direction: Direction,
    protocol: ListenerProtocol,
    port: Option<u16>,
    original_dst: bool,
}

impl ListenerSpec {
    /// A listener that speaks HTTP/1 and h2c. Port 0 takes a free one.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, address: SocketAddr, direction: Direction) -> Self {
        Self {
            name: name.into(),
            address,
            direction,
            protocol: ListenerProtocol::default(),
            port: None,
            original_dst: false,
        }
    }

    /// What it speaks. Default [`Protocol::Auto`]: HTTP/1 and h2c. What is not HTTP takes a handler of its own
    /// ([`Server::listen_l4`](crate::server::Server::listen_l4)); without one it is read as HTTP.
    #[must_use]
    pub fn protocol(mut self, protocol: impl Into<ListenerProtocol>) -> Self {
        self.protocol = protocol.into();
        self
    }

    /// The port that routing and policy see. Default: that of the original destination, else the listener's own.
    #[must_use]
    pub const fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Whether to ask for the destination before a redirect. Default no.
    #[must_use]
    pub const fn original_dst(mut self, ask: bool) -> Self {
        self.original_dst = ask;
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address that it was asked to bind.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    /// Which side of the workload it serves.
    #[must_use]
    pub const fn direction(&self) -> Direction {
        self.direction
    }

    /// What it speaks.
    #[must_use]
    pub const fn speaks(&self) -> ListenerProtocol {
        self.protocol
    }

    pub(crate) fn seen_port(&self, original_dst: Option<SocketAddr>, bound: SocketAddr) -> u16 {
        self.port.unwrap_or_else(|| original_dst.unwrap_or(bound).port())
    }

    pub(crate) const fn asks_original_dst(&self) -> bool {
        self.original_dst
    }
}

/// A listener's address could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("listener {name:?} cannot bind {address}: {source}")]
pub struct BindError {
    /// The listener's name.
    pub name: String,
    /// The address.
    pub address: SocketAddr,
    /// Why not.
    pub source: io::Error,
}

/// Binds `count` sockets to the address of `spec`, all listening.
pub(crate) fn bind(spec: &ListenerSpec, count: usize) -> Result<Vec<std::net::TcpListener>, BindError> {
    let address = spec.address;
    let bound = if count <= 1 {
        socket(address, false).and_then(listen).map(|socket| vec![socket])
    } else if address.port() == 0 {
        let mut tries = 0;
        loop {
            tries += 1;
            match group(address, count) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries < FREE_PORT_TRIES => {}
                other => break other,
            }
        }
    } else {
        group(address, count)
    };
    bound.map_err(|source| BindError { name: spec.name.to_string(), address, source })
}

fn group(address: SocketAddr, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let probe = socket(address, false)?;
    let bound = local_address(&probe)?;
    // Another socket may be bound to the address and share it with whoever does not listen; only this finds it.
    let probe = listen(probe)?;
    drop(probe);
    // Bind all before one listens: the kernel spreads over those that listen.
    let sockets: Vec<_> = (0..count).map(|_| socket(bound, true)).collect::<io::Result<_>>()?;
    sockets.into_iter().map(listen).collect()
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // Connections of a predecessor in TIME_WAIT do not keep the address.
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn listen(socket: Socket) -> io::Result<std::net::TcpListener> {
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    let unnamed = || io::Error::other("the socket has no internet address");
    socket.local_addr()?.as_socket().ok_or_else(unnamed)
}

/// The addresses that this process listens on, so that it never connects to itself. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct OwnAddresses(Arc<RwLock<Vec<SocketAddr>>>);

impl OwnAddresses {
    /// Adds an address until [`remove`](Self::remove) takes it away.
    pub fn add(&self, address: SocketAddr) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).push(address);
    }

    /// Takes one away.
    pub fn remove(&self, address: SocketAddr) {
        let mut addresses = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = addresses.iter().position(|own| *own == address) {
            addresses.swap_remove(at);
        }
    }

    /// Whether a connection to `target` would come back to this process. Cheap unless the port is one of ours.
    #[must_use]
    pub fn contains(&self, target: SocketAddr) -> bool {
        let addresses = self.0.read().unwrap_or_else(PoisonError::into_inner);
        addresses.iter().any(|own| {
            own.port() == target.port()
                && (own.ip() == target.ip() || own.ip().is_unspecified() && is_local(target.ip()))
        })
    }
}

/// Whether an address belongs to this host: only then can it be bound.
fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified() || UdpSocket::bind((ip, 0)).is_ok()
}

/// Where an accepted connection was going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    /// To the listener.
    Here,
    /// Elsewhere, before a redirect.
    Elsewhere(SocketAddr),
    /// To another listener of this process: serving it would go round in a circle.
    Loop(SocketAddr),
}

pub(crate) fn destination(
    stream: &tokio::net::TcpStream,
    local: SocketAddr,
    own: &OwnAddresses,
) -> Destination {
    let socket = SockRef::from(stream);
    let asked = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    // Without connection tracking there is nothing to know, and nothing was redirected.
    let original = asked.ok().and_then(|address| address.as_socket());
    judge(original, local, own)
}

fn judge(original: Option<SocketAddr>, local: SocketAddr, own: &OwnAddresses) -> Destination {
    match original {
        None => Destination::Here,
        Some(original) if original == local => Destination::Here,
        Some(original) if own.contains(original) => Destination::Loop(original),
        Some(original) => Destination::Elsewhere(original),
    }
}

/// What is counted of a listener.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) open: AtomicUsize,
    pub(crate) accepted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) loops: AtomicU64,
    pub(crate) passed_on: AtomicU64,
    pub(crate) accept_errors: AtomicU64,
    pub(crate) handshakes: AtomicUsize,
    pub(crate) handshake_failures: AtomicU64,
    pub(crate) plaintext_refused: AtomicU64,
    pub(crate) distrusted: AtomicU64,
}

impl Stats {
    /// Counts a connection; `None` when there are `max` already.
    pub(crate) fn open(self: &Arc<Self>, max: usize) -> Option<Open> {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        if self.open.fetch_add(1, Ordering::Relaxed) >= max {
            self.open.fetch_sub(1, Ordering::Relaxed);
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(Open(Arc::clone(self)))
    }
}

/// A connection that counts as open.
#[derive(Debug)]
pub(crate) struct Open(Arc<Stats>);

impl Open {
    pub(crate) const fn stats(&self) -> &Arc<Stats> {
        &self.0
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A listener as `/listeners` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerStatus {
    /// Its name.
    pub name: Arc<str>,
    /// The address that it is bound to.
    pub address: SocketAddr,
    /// Which side of the workload it serves.
    pub direction: Direction,
    /// What it speaks.
    pub protocol: ListenerProtocol,
    /// How far its drain is.
    pub phase: Phase,
    /// Open connections, tunnels included.
    pub open: usize,
    /// Connections accepted so far, those refused afterwards included.
    pub accepted: u64,
    /// Connections closed at once because there were too many.
    pub refused: u64,
    /// Connections closed at once because they were going to a listener of this process.
    pub loops: u64,
    /// Connections that the worker which accepted them passed on to another.
    pub passed_on: u64,
    /// Failures to accept, such as running out of file descriptors.
    pub accept_errors: u64,
    /// TLS handshakes under way.
    pub handshakes: usize,
    /// TLS handshakes that failed, were late, or were too many at once.
    pub handshake_failures: u64,
    /// Connections closed because they began in plaintext where TLS is demanded.
    pub plaintext_refused: u64,
    /// Connections closed because their peer, once let in, would not be let in any more.
    pub distrusted: u64,
}

impl ListenerStatus {
    pub(crate) fn new(spec: &ListenerSpec, address: SocketAddr, phase: Phase, stats: &Stats) -> Self {
        Self {
            name: spec.shared_name(),
            address,
            direction: spec.direction,
            protocol: spec.protocol,
            phase,
            open: stats.open.load(Ordering::Relaxed),
            accepted: stats.accepted.load(Ordering::Relaxed),
            refused: stats.refused.load(Ordering::Relaxed),
            loops: stats.loops.load(Ordering::Relaxed),
            passed_on: stats.passed_on.load(Ordering::Relaxed),
            accept_errors: stats.accept_errors.load(Ordering::Relaxed),
            handshakes: stats.handshakes.load(Ordering::Relaxed),
            handshake_failures: stats.handshake_failures.load(Ordering::Relaxed),
            plaintext_refused: stats.plaintext_refused.load(Ordering::Relaxed),
            distrusted: stats.distrusted.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn spec(port: u16) -> ListenerSpec {
        ListenerSpec::new("outbound", (Ipv4Addr::LOCALHOST, port).into(), Direction::Outbound)
    }

    #[test]
    fn an_address_in_use_is_an_error_that_names_it() {
        for count in [1, 3] {
            let taken = bind(&spec(0), count).unwrap();
            let address = taken[0].local_addr().unwrap();
            for again in [1, 3] {
                let error = bind(&spec(address.port()), again).unwrap_err();
                assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse, "{count} then {again}");
                assert!(error.to_string().contains(&address.to_string()), "{error}");
                assert!(error.to_string().contains("outbound"), "{error}");
            }
        }
    }

    #[test]
    fn a_group_shares_one_free_port() {
        let sockets = bind(&spec(0), 4).unwrap();
        let ports: std::collections::HashSet<_> =
            sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect();
        assert_eq!((sockets.len(), ports.len()), (4, 1));
        let address = sockets[0].local_addr().unwrap();
        drop(sockets);
        assert_eq!(bind(&spec(address.port()), 2).unwrap().len(), 2);
    }

    #[test]
    fn f8_a_destination_that_is_a_listener_of_ours_is_a_loop() {
        let own = OwnAddresses::default();
        let [outbound, inbound, other]: [SocketAddr; 3] =
            ["127.0.0.1:15001", "0.0.0.0:15006", "10.9.8.7:15001"].map(|address| address.parse().unwrap());
        own.add(outbound);
        own.add(inbound);
        assert_eq!(judge(None, outbound, &own), Destination::Here);
        assert_eq!(judge(Some(outbound), outbound, &own), Destination::Here);
        // Another host's port 15001 is not ours.
        assert_eq!(judge(Some(other), outbound, &own), Destination::Elsewhere(other));
        let loopback = "127.0.0.1:15006".parse().unwrap();
        assert_eq!(judge(Some(loopback), outbound, &own), Destination::Loop(loopback));
        let elsewhere = "192.0.2.1:15006".parse().unwrap();
        assert_eq!(judge(Some(elsewhere), outbound, &own), Destination::Elsewhere(elsewhere));
        own.remove(inbound);
        assert_eq!(judge(Some(loopback), outbound, &own), Destination::Elsewhere(loopback));
    }

    #[test]
    fn max_connections_is_exact() {
        let stats = Arc::new(Stats::default());
        let held: Vec<_> = (0..5).filter_map(|_| stats.open(3)).collect();
        assert_eq!(held.len(), 3);
        assert_eq!(stats.refused.load(Ordering::Relaxed), 2);
        drop(held);
        assert!(stats.open(3).is_some());
    }
}
