//! Which listeners configuration asks for: the servers of a gateway.
//!
//! A model of its own, because two crates join here: routing keys its tables by the port, and whoever terminates TLS
//! needs the same port's settings. A server whose TLS nothing in the build can terminate is *never* served in
//! plaintext: it has no listener, and its `tls` is reported as not enforced.

use std::net::IpAddr;

use crate::server::ListenerProtocol;

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
    /// What it speaks.
    pub protocol: ListenerProtocol,
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
    use crate::istio::types::gateway::{Server, ServerTlsMode};
    use crate::istio::types::protocol::PortProtocol;
    use crate::server::{ListenerProtocol, Protocol};

    impl Server {
        /// Whether a server is plain HTTP, which needs no TLS: also one that only redirects to it.
        #[must_use]
        pub fn is_plain_http(&self) -> bool {
            use PortProtocol::{Grpc, GrpcWeb, Http, Http2};
            matches!(self.protocol(), Some(Http | Http2 | Grpc | GrpcWeb))
                && self.tls.as_ref().is_none_or(|tls| tls.https_redirect)
        }

        /// Whether a server takes bytes as they come: opaque TCP without TLS of its own.
        #[must_use]
        pub fn is_plain_tcp(&self) -> bool {
            use PortProtocol::{Mongo, Mysql, Redis, Tcp};
            matches!(self.protocol(), Some(Tcp | Mongo | Mysql | Redis)) && self.tls.is_none()
        }

        /// Whether a server routes TLS by its server name and leaves it as it is (GW-04).
        #[must_use]
        pub fn is_passthrough(&self) -> bool {
            matches!(self.protocol(), Some(PortProtocol::Tls | PortProtocol::Https))
                && self
                    .tls
                    .as_ref()
                    .is_some_and(|tls| tls.mode == ServerTlsMode::Passthrough && !tls.https_redirect)
        }

        /// What a listener for the server speaks; `None` for one that nothing in this build can serve.
        #[must_use]
        pub fn listener_protocol(&self) -> Option<ListenerProtocol> {
            if self.is_plain_http() {
                // A client of any HTTP port may speak h2c; no port refuses HTTP/1.
                Some(Protocol::Auto.into())
            } else if self.is_plain_tcp() {
                Some(ListenerProtocol::Tcp)
            } else {
                self.is_passthrough().then_some(ListenerProtocol::Tls)
            }
        }

        fn protocol(&self) -> Option<PortProtocol> {
            PortProtocol::parse(&self.port.as_ref()?.protocol)
        }
    }

    /// The servers of the gateways that select the workload, as far as this build can serve them; a sidecar has none.
    impl Compile<ResourceSet> for ListenerSet {
        fn compile(
            set: &ResourceSet,
            cx: &CompileContext,
            diags: &mut Diagnostics,
        ) -> Result<Self, Rejected> {
            if cx.role != Role::Gateway {
                return Ok(Self::default());
            }
            let mut listeners: BTreeMap<u16, GatewayListener> = BTreeMap::new();
            let selected = set
                .gateways()
                .iter()
                .filter(|gateway| is_subset(&gateway.spec.selector, &cx.workload.labels));
            for gateway in selected {
                for (at, server) in gateway.spec.servers.iter().enumerate() {
                    let (Some(asked), Some(protocol)) = (&server.port, server.listener_protocol()) else {
                        continue;
                    };
                    let Some(port) = u16::try_from(asked.number).ok().filter(|port| *port != 0) else {
                        continue;
                    };
                    let listener = listeners.entry(port).or_insert_with(|| GatewayListener {
                        port,
                        name: asked.name.clone(),
                        protocol,
                        bind: server.bind.parse().ok(),
                    });
                    if listener.protocol != protocol {
                        let message = format!(
                            "the port speaks {} for an older server: this one is not served",
                            listener.protocol.as_str()
                        );
                        diags.warning_at(gateway.doc, format!("spec.servers[{at}].port"), message);
                    }
                }
            }
            Ok(Self { listeners: listeners.into_values().collect() })
        }

        fn closed(_: &CompileContext) -> Self {
            Self::default()
        }
    }
}
