//! What the inbound ports of a workload accept: plaintext, mutual TLS, or both.

use std::collections::BTreeMap;

use mesh_core::server::DownstreamTls;

/// The mode of each port of a workload. The default accepts mutual TLS alone: whoever knows nothing opens nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundTls {
    default: DownstreamTls,
    ports: BTreeMap<u16, DownstreamTls>,
}

impl InboundTls {
    /// One mode for every port.
    #[must_use]
    pub const fn all(mode: DownstreamTls) -> Self {
        Self { default: mode, ports: BTreeMap::new() }
    }

    /// Another mode for one port of the workload.
    #[must_use]
    pub fn port(mut self, port: u16, mode: DownstreamTls) -> Self {
        self.ports.insert(port, mode);
        self
    }

    /// The mode of a port of the workload.
    #[must_use]
    pub fn of_port(&self, port: u16) -> DownstreamTls {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }

    /// The mode of ports that have none of their own.
    #[must_use]
    pub const fn default_mode(&self) -> DownstreamTls {
        self.default
    }

    /// The ports that have a mode of their own.
    pub fn ports(&self) -> impl Iterator<Item = (u16, DownstreamTls)> {
        self.ports.iter().map(|(port, mode)| (*port, *mode))
    }
}

impl Default for InboundTls {
    fn default() -> Self {
        Self::all(DownstreamTls::Strict)
    }
}
