//! The names by which requests go upstream.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::conn::Direction;

/// A cluster's name in istiod's format: `direction|port|subset|host`.
///
/// The names of the clusters without a service are `BlackHoleCluster`, `PassthroughCluster` and
/// `InboundPassthroughCluster`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterName(Arc<str>);

impl ClusterName {
    /// The cluster of `host` at `port`; `subset` is empty for the whole service.
    #[must_use]
    pub fn new(direction: Direction, port: u16, subset: &str, host: &str) -> Self {
        let direction = match direction {
            Direction::Inbound => "inbound",
            Direction::Outbound | Direction::Gateway => "outbound",
        };
        Self(format!("{direction}|{port}|{subset}|{host}").into())
    }

    /// Where unknown destinations go when they are allowed.
    #[must_use]
    pub fn passthrough() -> Self {
        Self("PassthroughCluster".into())
    }

    /// Where unknown destinations go when they are not allowed.
    #[must_use]
    pub fn black_hole() -> Self {
        Self("BlackHoleCluster".into())
    }

    /// Where inbound connections to ports without a service go.
    #[must_use]
    pub fn inbound_passthrough() -> Self {
        Self("InboundPassthroughCluster".into())
    }

    /// A cluster of a program that embeds a layer, named as it likes.
    #[must_use]
    pub fn custom(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The whole name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The whole name, shared.
    #[must_use]
    pub fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }

    /// The subset; `None` for the whole service and for names not in istiod's format.
    #[must_use]
    pub fn subset(&self) -> Option<&str> {
        self.part(2).filter(|subset| !subset.is_empty())
    }

    /// The host; `None` for names not in istiod's format.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        self.part(3)
    }

    fn part(&self, index: usize) -> Option<&str> {
        let mut parts = self.0.splitn(4, '|');
        let part = parts.nth(index)?;
        (index == 3 || parts.next().is_some()).then_some(part)
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How the transport to an endpoint is secured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UpstreamTls {
    /// Plaintext.
    #[default]
    Disable,
    /// Mutual TLS of the mesh to the endpoints that have an identity, plaintext to the others (DR-TLS03).
    Auto(Arc<ClientTls>),
    /// TLS to every endpoint. Where nothing in the stack can originate it, every connection fails (503 `UF`).
    Tls(Arc<ClientTls>),
}

/// How a client shakes hands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClientTls {
    /// Who we are, and whom to believe.
    pub credential: Credential,
    /// The server name that is asked for; `None` asks for none.
    pub sni: Option<String>,
    /// The name of the server, which its certificate must have where no other names are expected. The mesh's own
    /// identities have no such names, and are not asked for it.
    pub host: String,
    /// The names of which the server's certificate must have one, as written; empty for [`host`](Self::host), and for
    /// any workload of the mesh's trust domains with [`Credential::Mesh`].
    pub subject_alt_names: Vec<String>,
    /// Takes any certificate, of anybody. Default false.
    pub insecure_skip_verify: bool,
}

/// Whose certificates are used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Credential {
    /// The workload's own identity and the mesh's authorities (ISTIO_MUTUAL).
    #[default]
    Mesh,
    /// Files. Without a certificate we show none; without authorities those of the system are believed.
    Files(CredentialFiles),
    /// A secret by its name.
    Secret(String),
}

/// Files of PEM; an empty name is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct CredentialFiles {
    /// Our certificate with its intermediate ones.
    pub certificate: String,
    /// Its key.
    pub key: String,
    /// The authorities that are believed.
    pub roots: String,
    /// What they revoked.
    pub revoked: String,
}

impl UpstreamTls {
    /// What it is for one endpoint: `has_identity` says whether it shows one of the mesh.
    #[must_use]
    pub fn for_endpoint(&self, has_identity: bool) -> Option<&Arc<ClientTls>> {
        match self {
            Self::Disable => None,
            Self::Auto(tls) => has_identity.then_some(tls),
            Self::Tls(tls) => Some(tls),
        }
    }
}

/// What is spoken over a connection, which a handshake agrees on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Spoken {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2.
    Http2,
    /// Anything else.
    Bytes,
}

/// Where one connection goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConnectTarget {
    /// The address.
    pub addr: SocketAddr,
    /// How the transport is secured; `None` is plaintext.
    pub tls: Option<Arc<ClientTls>>,
    /// What will be spoken.
    pub spoken: Spoken,
}

impl ConnectTarget {
    /// In plaintext to this address.
    #[must_use]
    pub const fn plain(addr: SocketAddr, spoken: Spoken) -> Self {
        Self { addr, tls: None, spoken }
    }
}

/// A stream of bytes both ways.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection being made.
pub type Connecting = Pin<Box<dyn Future<Output = io::Result<Box<dyn Io>>> + Send>>;

/// Makes the transports to endpoints, in the place of plain TCP: in memory, over a proxy, with TLS.
///
/// What it returns is a box, and so is the stream: a connection serves many requests. The time that it may take is
/// bounded by whoever asks.
pub trait Connect: fmt::Debug + Send + Sync {
    /// Connects to `target`.
    fn connect(&self, target: &ConnectTarget) -> Connecting;
}

/// Whether a connection that was secured would be made again by what is trusted now (D9). A pool asks before it gives a
/// request to it.
pub trait Standing: fmt::Debug + Send + Sync {
    /// Whether it would be made now. While nothing has changed two integers are compared; after a change the server's
    /// certificates are judged, once for all connections to it.
    fn holds(&self) -> bool;

    /// Whether nothing has changed since the last judgement, so that [`holds`](Self::holds) is quick.
    fn is_judged(&self) -> bool;
}

/// A connection that was secured.
pub struct Originated {
    /// The stream.
    pub io: Box<dyn Io>,
    /// On what it stands; `None` where nothing that may change was asked of the server.
    pub standing: Option<Arc<dyn Standing>>,
}

/// A connection being secured.
pub type Originating = Pin<Box<dyn Future<Output = io::Result<Originated>> + Send>>;

/// Secures a TCP connection that was made: the seam between pools and a TLS library.
pub trait Originate: fmt::Debug + Send + Sync {
    /// Shakes hands over `stream`, as `tls` says. The time that it may take is bounded by whoever asks.
    fn originate(&self, stream: TcpStream, tls: &ClientTls, spoken: Spoken) -> Originating;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_are_istiods() {
        let name = ClusterName::new(Direction::Outbound, 9080, "v1", "reviews.default.svc.cluster.local");
        assert_eq!(name.as_str(), "outbound|9080|v1|reviews.default.svc.cluster.local");
        assert_eq!(name.subset(), Some("v1"));
        assert_eq!(name.host(), Some("reviews.default.svc.cluster.local"));
        let whole = ClusterName::new(Direction::Inbound, 80, "", "a");
        assert_eq!((whole.as_str(), whole.subset(), whole.host()), ("inbound|80||a", None, Some("a")));
        assert_eq!(ClusterName::passthrough().host(), None);
    }
}
