//! The services of the mesh, wherever they are known from (REG-01).
//!
//! Routing speaks of hosts and ports; platforms know services in their own ways. A [`Registry`] says what it knows
//! as [`Service`]s, plain data, and the compiler takes the services of all registries together. With feature `istio`
//! a set of resources is a registry: ServiceEntry, WorkloadEntry, and Kubernetes' Service, Endpoints and EndpointSlice.

use std::collections::BTreeMap;
use std::sync::Arc;

#[cfg(feature = "istio")]
mod resources;

/// A source of services.
pub trait Registry {
    /// Every service that it knows, oldest first: where two have one host in one namespace, the first counts.
    fn services(&self) -> Vec<Service>;
}

/// A service: a host with ports and the instances behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The fully qualified name, or a wildcard (`*.example.com`), lower case.
    pub host: Arc<str>,
    /// The namespace that it belongs to.
    pub namespace: Arc<str>,
    /// Virtual addresses that requests may be sent to instead of the host.
    pub addresses: Vec<Arc<str>>,
    /// The ports, by number unique.
    pub ports: Vec<ServicePort>,
    /// How instances are found.
    pub resolution: Resolution,
    /// The instances. Empty for a resolution that needs none.
    pub instances: Vec<Arc<Instance>>,
    /// Where it may be seen: namespaces, `.` for its own, `*` for all, `~` for none. Empty is all.
    pub export_to: Vec<String>,
    /// Another name that stands for this one: Kubernetes' ExternalName.
    pub alias_of: Option<Arc<str>>,
    /// Whether it is outside the mesh.
    pub external: bool,
    /// The names that its servers may have in their certificates; empty when nothing is said.
    pub subject_alt_names: Vec<String>,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The number that clients use.
    pub number: u16,
    /// Its name, which instances map to ports of their own.
    pub name: Arc<str>,
    /// What is spoken at it.
    pub protocol: AppProtocol,
    /// The port of instances that do not map the name.
    pub target: u16,
}

/// What is spoken at a port (PT-04).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    /// HTTP/1.1, or HTTP/2 by preface.
    Http,
    /// HTTP/2, gRPC among it.
    Http2,
    /// TLS that is not terminated here.
    Tls,
    /// Bytes.
    Tcp,
    /// Not declared: found out by the first bytes.
    Sniff,
}

impl AppProtocol {
    /// What a declared protocol or a port-name prefix says; `None` for what is not known.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            "http" | "kubernetes.io/ws" => Self::Http,
            "http2" | "grpc" | "grpc-web" | "kubernetes.io/h2c" => Self::Http2,
            "https" | "tls" | "kubernetes.io/wss" => Self::Tls,
            "tcp" | "mongo" | "mysql" | "redis" | "udp" => Self::Tcp,
            _ => return None,
        })
    }

    /// The protocol of a port, by Istio's precedence: `appProtocol`, then the prefix of the name, then the ports at
    /// which servers speak first, which cannot be sniffed.
    #[must_use]
    pub fn of_port(declared: Option<&str>, name: &str, number: u16) -> Self {
        if let Some(protocol) = declared.and_then(Self::parse) {
            return protocol;
        }
        let prefix =
            if name.starts_with("grpc-web") { "grpc-web" } else { name.split('-').next().unwrap_or(name) };
        if let Some(protocol) = Self::parse(prefix) {
            return protocol;
        }
        match number {
            25 | 53 | 3306 | 27017 => Self::Tcp,
            _ => Self::Sniff,
        }
    }

    /// Whether requests at it are routed as HTTP.
    #[must_use]
    pub const fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Sniff)
    }
}

/// How the instances of a service are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// The address that the client connected to.
    None,
    /// The addresses that are listed.
    Static,
    /// Names that are resolved; every record is an instance.
    Dns,
    /// Names that are resolved; new connections go to the first record.
    DnsRoundRobin,
}

/// One workload behind a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// An IP address, or a name where the service is resolved by DNS.
    pub address: Arc<str>,
    /// Its own ports by service port name.
    pub ports: BTreeMap<Arc<str>, u16>,
    /// Its labels, which subsets select by.
    pub labels: BTreeMap<String, String>,
    /// Its share, relative to its siblings.
    pub weight: u32,
    /// `region/zone/subzone`; empty when not known.
    pub locality: Arc<str>,
    /// Its service account; empty when not known.
    pub service_account: Arc<str>,
}

impl Instance {
    /// An instance of weight 1 at an address.
    #[must_use]
    pub fn new(address: impl Into<Arc<str>>) -> Self {
        Self {
            address: address.into(),
            ports: BTreeMap::new(),
            labels: BTreeMap::new(),
            weight: 1,
            locality: Arc::from(""),
            service_account: Arc::from(""),
        }
    }

    /// Its port for a port of the service.
    #[must_use]
    pub fn port(&self, port: &ServicePort) -> u16 {
        self.ports.get(&port.name).copied().unwrap_or(port.target)
    }
}

impl Service {
    /// Whether clients in `namespace` may see it.
    #[must_use]
    pub fn is_visible_to(&self, namespace: &str) -> bool {
        self.export_to.is_empty()
            || self.export_to.iter().any(|to| match to.as_str() {
                "*" => true,
                "." => *self.namespace == *namespace,
                "~" => false,
                other => other == namespace,
            })
    }

    /// The port of this number.
    #[must_use]
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.number == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pt_04_the_declared_protocol_then_the_name_then_sniffing() {
        let of = AppProtocol::of_port;
        assert_eq!(of(Some("HTTP2"), "tcp-x", 80), AppProtocol::Http2);
        assert_eq!(of(Some("kubernetes.io/h2c"), "", 80), AppProtocol::Http2);
        assert_eq!(of(None, "http-web", 80), AppProtocol::Http);
        assert_eq!(of(None, "grpc", 80), AppProtocol::Http2);
        assert_eq!(of(None, "grpc-web-x", 80), AppProtocol::Http2);
        assert_eq!(of(None, "httpbin", 80), AppProtocol::Sniff);
        assert_eq!(of(None, "", 3306), AppProtocol::Tcp);
        assert_eq!(of(None, "https", 443), AppProtocol::Tls);
        assert_eq!(of(Some("nonsense"), "redis-1", 1), AppProtocol::Tcp);
    }
}
