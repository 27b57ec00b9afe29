//! What is known of a downstream connection, once per connection.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use crate::identity::PeerInfo;

/// Which side of the workload a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Requests that come to the workload.
    Inbound,
    /// Requests that the workload makes.
    Outbound,
    /// Requests that come into the mesh through a gateway.
    Gateway,
}

impl Direction {
    /// The word that configuration dumps use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
            Self::Gateway => "gateway",
        }
    }
}

/// One downstream connection. Shared by the requests on it.
#[derive(Clone, Debug)]
pub struct ConnInfo {
    /// The address of the direct peer.
    pub peer: SocketAddr,
    /// The address that the connection was accepted on.
    pub local: SocketAddr,
    /// The destination before a redirect (`SO_ORIGINAL_DST`), when there was one.
    pub original_dst: Option<SocketAddr>,
    /// Which side of the workload the listener serves.
    pub direction: Direction,
    /// The port that routing and policy see: that of the listener, of the original destination, or of the app.
    pub port: u16,
    /// The name of the listener, as logs and dumps show it.
    pub listener: Arc<str>,
    /// Whether the transport is TLS that we terminated.
    pub tls: bool,
    /// The server name that the client asked for, in lower case, where TLS was terminated.
    pub sni: Option<Arc<str>>,
    /// The peer, where it showed a certificate and its chain was verified.
    pub identity: Option<Arc<PeerInfo>>,
}

impl ConnInfo {
    /// A connection of which nothing is known: what an embedded layer sees when its server tells it nothing.
    #[must_use]
    pub fn unknown(direction: Direction) -> Self {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        Self {
            peer: nowhere,
            local: nowhere,
            original_dst: None,
            direction,
            port: 0,
            listener: Arc::from(direction.as_str()),
            tls: false,
            sni: None,
            identity: None,
        }
    }
}
