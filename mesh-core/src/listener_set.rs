//! Which listeners configuration asks for: the servers of a gateway.
//!
//! A model of its own, because two crates join here: routing keys its tables by the port, and whoever terminates TLS
//! needs the same port's settings. A server whose TLS nothing in the build can terminate is *never* served in
//! plaintext: it has no listener, and its `tls` is reported as not enforced.

use std::net::IpAddr;

use crate::server::Protocol;

/// The listeners of a gateway, one for each port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenerSet {
    /// In order of port.
    pub listeners: Vec<GatewayListener>,
}

/// One listener of a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayListener {
    /// The port that servers name.
    pub port: u16,
    /// The name of the first server's port.
    pub name: String,
    /// The HTTP it speaks.
    pub protocol: Protocol,
    /// The address that a server asks for; `None` leaves it to the proxy.
    pub bind: Option<IpAddr>,
}

#[cfg(feature = "istio")]
mod istio {
    use std::collections::BTreeMap;

    use super::{GatewayListener, ListenerSet};
    use crate::config::{Compile, CompileContext, Rejected, Role};
    use crate::diagnostics::Diagnostics;
    use crate::istio::ResourceSet;
    use crate::istio::effective::scope::is_subset;
    use crate::istio::types::gateway::Server;
    use crate::server::Protocol;

    impl Server {
        /// Whether a server is plain HTTP, which needs no TLS: also one that only redirects to it.
        #[must_use]
        pub fn is_plain_http(&self) -> bool {
            let protocol = self.port.as_ref().map_or("", |port| port.protocol.as_str()).to_ascii_uppercase();
            matches!(protocol.as_str(), "HTTP" | "HTTP2" | "GRPC" | "GRPC-WEB")
                && self.tls.as_ref().is_none_or(|tls| tls.https_redirect)
        }
    }

    /// The plain servers of the gateways that select the workload; a sidecar has none.
    impl Compile<ResourceSet> for ListenerSet {
        fn compile(set: &ResourceSet, cx: &CompileContext, _: &mut Diagnostics) -> Result<Self, Rejected> {
            if cx.role != Role::Gateway {
                return Ok(Self::default());
            }
            let mut listeners: BTreeMap<u16, GatewayListener> = BTreeMap::new();
            let selected = set
                .gateways()
                .iter()
                .filter(|gateway| is_subset(&gateway.spec.selector, &cx.workload.labels));
            for server in
                selected.flat_map(|gateway| &gateway.spec.servers).filter(|server| server.is_plain_http())
            {
                let Some(asked) = &server.port else { continue };
                let Some(port) = u16::try_from(asked.number).ok().filter(|port| *port != 0) else { continue };
                listeners.entry(port).or_insert_with(|| GatewayListener {
                    port,
                    name: asked.name.clone(),
                    // A client of any HTTP port may speak h2c; no port refuses HTTP/1.
                    protocol: Protocol::Auto,
                    bind: server.bind.parse().ok(),
                });
            }
            Ok(Self { listeners: listeners.into_values().collect() })
        }

        fn closed(_: &CompileContext) -> Self {
            Self::default()
        }
    }
}
