//! The names by which requests go upstream.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum UpstreamTls {
    /// Plaintext.
    #[default]
    Disable,
    /// The configuration demands TLS, and nothing in this stack can originate it: every connection fails (503 `UF`).
    Unavailable,
}

/// Where one connection goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ConnectTarget {
    /// The address.
    pub addr: SocketAddr,
    /// How the transport is secured.
    pub tls: UpstreamTls,
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
