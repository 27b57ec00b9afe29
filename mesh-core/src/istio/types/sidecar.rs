//! `networking.istio.io` Sidecar (SC-01 … SC-04).

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::check;
use super::common::NetworkingWorkloadSelector;
use super::destination_rule::ConnectionPoolSettings;
use super::gateway::{ServerTlsMode, ServerTlsSettings, UNIX_PREFIX};
use super::host::{HostOf, namespaced_host};
use super::protocol::{PortProtocol, known_protocol};
use super::target;
use super::virtual_service::{Destination, validate::destination};
use super::workload_entry::port_name;
use crate::istio::findings::{Findings, Validate};

/// What a workload's proxy listens for, and what it knows of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sidecar {
    /// The workloads; none is the namespace, or the mesh when it is the root namespace's.
    pub workload_selector: Option<NetworkingWorkloadSelector>,
    /// The workload's own listeners; none is one for each of its services' ports.
    pub ingress: Vec<IngressListener>,
    /// What the workload calls; none inherits.
    pub egress: Vec<EgressListener>,
    /// What happens to calls of unknown destinations (SC-02); none inherits.
    pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
    /// Limits of inbound connections (SC-04).
    pub inbound_connection_pool: Option<ConnectionPoolSettings>,
}

/// A listener of the workload (SC-03).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressListener {
    /// The port; required.
    pub port: Option<SidecarPort>,
    /// The address; empty is the workload's.
    pub bind: String,
    /// How traffic comes to the listener.
    pub capture_mode: CaptureMode,
    /// Where requests go: `127.0.0.1:PORT`, `0.0.0.0:PORT` (the workload's address), the same for IPv6, or
    /// `unix:///path`.
    pub default_endpoint: String,
    /// TLS of callers from outside the mesh.
    pub tls: Option<ServerTlsSettings>,
    /// Limits of this listener's connections.
    pub connection_pool: Option<ConnectionPoolSettings>,
}

/// A listener for what the workload calls (SC-01).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressListener {
    /// The port; none is every port that no other listener has.
    pub port: Option<SidecarPort>,
    /// The address, or `unix:///path`.
    pub bind: String,
    /// How traffic comes to the listener.
    pub capture_mode: CaptureMode,
    /// `namespace/dnsName` of the services; `*`, `.` and `~` may stand for the namespace, and `~namespace/*` takes one
    /// out.
    pub hosts: Vec<String>,
}

/// A port of a listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SidecarPort {
    /// 1..=65535, or 0 for a unix socket.
    pub number: u32,
    /// One of [`PortProtocol`]; empty is found out by sniffing.
    pub protocol: String,
    /// The name.
    pub name: String,
    /// Means nothing here and is refused.
    pub target_port: u32,
}

/// How traffic comes to a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum CaptureMode {
    /// As the environment has it.
    #[default]
    Default,
    /// Redirected.
    Iptables,
    /// Not redirected: the workload connects to the listener.
    None,
}

/// What happens to calls of unknown destinations (SC-02).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutboundTrafficPolicy {
    /// The mode.
    pub mode: OutboundMode,
    /// The destination to which they are sent instead.
    pub egress_proxy: Option<Destination>,
}

/// What happens to calls of unknown destinations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundMode {
    /// They fail. The first in number, and so what `outboundTrafficPolicy: {}` says.
    #[default]
    RegistryOnly,
    /// They go where they were going.
    AllowAny,
}

impl Validate for Sidecar {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        target::networking_selector(out, self.workload_selector.as_ref());
        if self.egress.is_empty()
            && self.ingress.is_empty()
            && self.outbound_traffic_policy.is_none()
            && self.inbound_connection_pool.is_none()
        {
            out.error("", "sidecar: empty configuration provided");
        }
        self.validate_ingress(out);
        if let Some(pool) = &self.inbound_connection_pool {
            out.within("inboundConnectionPool", |out| pool.validate(out));
        }
        self.validate_egress(out);
        if let Some(policy) = &self.outbound_traffic_policy {
            out.within("outboundTrafficPolicy", |out| policy.validate(out));
        }
    }
}

impl Sidecar {
    fn validate_ingress(&self, out: &mut Findings) {
        let mut ports = BTreeSet::new();
        for (index, listener) in self.ingress.iter().enumerate() {
            out.item("ingress", index, |out| {
                listener.validate(out);
                if listener.port.as_ref().is_some_and(|port| !ports.insert(port.number)) {
                    out.error("port.number", "ports on IP bound listeners must be unique");
                }
            });
        }
    }

    fn validate_egress(&self, out: &mut Findings) {
        let mut ports = BTreeSet::new();
        let mut sockets = BTreeSet::new();
        for (index, listener) in self.egress.iter().enumerate() {
            out.item("egress", index, |out| {
                let number = listener.port.as_ref().map(|port| port.number);
                // Of several without a port only one can be the last.
                if number.is_none() && index + 1 != self.egress.len() {
                    out.error(
                        "port",
                        "only one listener may have no port, and it must be the last in the list",
                    );
                }
                if number == Some(0) && !sockets.insert(listener.bind.as_str()) {
                    out.error("bind", "unix domain sockets of listeners must be unique");
                }
                if number.is_some_and(|number| number != 0 && !ports.insert(number)) {
                    out.error("port.number", "ports on IP bound listeners must be unique");
                }
                listener.validate(out);
            });
        }
    }
}

impl SidecarPort {
    fn validate(&self, out: &mut Findings) {
        if !self.name.is_empty() {
            out.check("port.name", port_name(&self.name));
        }
        out.check("port.protocol", known_protocol(&self.protocol));
        if self.target_port > 0 {
            out.error("port.targetPort", "has no effect on a sidecar");
        }
    }

    fn is_http(&self) -> bool {
        PortProtocol::parse(&self.protocol).is_some_and(PortProtocol::is_http)
    }

    fn is_tls(&self) -> bool {
        PortProtocol::parse(&self.protocol).is_some_and(PortProtocol::is_tls)
    }
}

impl Validate for IngressListener {
    fn validate(&self, out: &mut Findings) {
        let Some(port) = &self.port else {
            out.error("port", "a port is required for ingress listeners");
            return;
        };
        port.validate(out);
        out.check("port.number", check::port(port.number));
        if !self.bind.is_empty() {
            out.check("bind", check::ip(&self.bind));
        }
        if !self.default_endpoint.is_empty() {
            out.check("defaultEndpoint", default_endpoint(&self.default_endpoint));
        }
        if let Some(tls) = &self.tls {
            if !port.is_tls() {
                out.error(
                    "tls",
                    "a listener cannot have TLS settings on a port that is neither HTTPS nor TLS",
                );
            }
            out.within("tls", |out| ingress_tls(out, tls));
        }
        if let Some(pool) = &self.connection_pool {
            out.within("connectionPool", |out| pool.validate(out));
            if pool.http.is_some() && !port.is_http() {
                out.warning(
                    "connectionPool.http",
                    format!(
                        "HTTP connection pool settings are configured for port {} but its protocol is not HTTP ({:?}); \
                         only TCP settings will apply",
                        port.number, port.protocol
                    ),
                );
            }
        }
    }
}

fn ingress_tls(out: &mut Findings, tls: &ServerTlsSettings) {
    for (field, set) in [
        ("subjectAltNames", !tls.subject_alt_names.is_empty()),
        ("httpsRedirect", tls.https_redirect),
        ("credentialName", !tls.credential_name.is_empty()),
        ("credentialNames", !tls.credential_names.is_empty()),
        ("tlsCertificates", !tls.tls_certificates.is_empty()),
    ] {
        if set {
            out.error(field, format!("{field} is not supported in the TLS settings of a sidecar"));
        }
    }
    if matches!(tls.mode, ServerTlsMode::IstioMutual | ServerTlsMode::AutoPassthrough) {
        out.error("mode", format!("cannot set mode to {} in a sidecar", tls.mode.name()));
    }
    tls.validate(out);
}

/// `host:port` of this host, or a unix socket.
fn default_endpoint(endpoint: &str) -> check::Checked {
    if let Some(path) = endpoint.strip_prefix(UNIX_PREFIX) {
        return check::unix_address(path);
    }
    let form = || {
        format!(
            "{endpoint:?} must be of the form 127.0.0.1:<port>, 0.0.0.0:<port>, [::1]:<port>, [::]:<port> or \
             unix://<path>"
        )
    };
    let (host, port) = endpoint.rsplit_once(':').ok_or_else(form)?;
    if !matches!(host, "" | "127.0.0.1" | "0.0.0.0" | "[::1]" | "[::]") {
        return Err(form());
    }
    let port = port.parse().map_err(|_| form())?;
    check::port(port)
}

impl Validate for EgressListener {
    fn validate(&self, out: &mut Findings) {
        if let Some(port) = &self.port {
            port.validate(out);
            if port.number == 0 {
                match self.bind.strip_prefix(UNIX_PREFIX) {
                    Some(path) => {
                        out.check("bind", check::unix_address(path));
                    }
                    None => {
                        out.error(
                            "bind",
                            "a port of the number 0 needs a unix domain socket as bind address",
                        );
                    }
                }
                if self.capture_mode == CaptureMode::Iptables {
                    out.error("captureMode", "must be DEFAULT or NONE for a unix domain socket");
                }
            } else {
                out.check("port.number", check::port(port.number));
                if !self.bind.is_empty() {
                    out.check("bind", check::ip(&self.bind));
                }
            }
        }
        if self.hosts.is_empty() {
            out.error("hosts", "an egress listener must contain at least one host");
        }
        for (index, host) in self.hosts.iter().enumerate() {
            namespaced_host(out, &format!("hosts[{index}]"), host, HostOf::Sidecar);
        }
        self.warn_of_duplicates(out);
    }
}

impl EgressListener {
    fn warn_of_duplicates(&self, out: &mut Findings) {
        let own = out.subject().namespace.clone();
        let mut seen: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (index, host) in self.hosts.iter().enumerate() {
            let Some((namespace, name)) = host.split_once('/') else { continue };
            if namespace.len() > 1 && namespace.starts_with('~') {
                // What is taken out adds nothing that could be there twice.
                continue;
            }
            let names = seen.entry(if namespace == "." { &own } else { namespace }).or_default();
            let covered =
                if name == "*" { !names.is_empty() } else { names.contains(name) || names.contains("*") };
            if covered {
                out.warning(&format!("hosts[{index}]"), format!("duplicated egress host {host:?}"));
            }
            names.insert(name);
        }
        if seen.len() > 1 && seen.get("*").is_some_and(|names| names.contains("*")) {
            out.warning("hosts", "`*/*` selects all resources, no other hosts need be listed");
        }
    }
}

impl Validate for OutboundTrafficPolicy {
    fn validate(&self, out: &mut Findings) {
        let Some(proxy) = &self.egress_proxy else { return };
        if self.mode != OutboundMode::AllowAny {
            out.error("egressProxy", "must be set only with the mode ALLOW_ANY");
            return;
        }
        out.within("egressProxy", |out| {
            out.check("host", check::fqdn(&proxy.host));
            if proxy.port.is_none() {
                out.error("port", "the port of an egress proxy must be set");
            }
            if check::fqdn(&proxy.host).is_ok() {
                destination(out, proxy);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sc_03_default_endpoints() {
        for endpoint in ["127.0.0.1:80", "0.0.0.0:80", "[::1]:80", "[::]:80", ":80", "unix:///a", "unix://@a"]
        {
            assert_eq!(default_endpoint(endpoint), Ok(()), "{endpoint}");
        }
        for endpoint in
            ["10.0.0.1:80", "127.0.0.1", "127.0.0.1:a", "127.0.0.1:0", "::1:80", "unix://a", "[::1]"]
        {
            assert!(default_endpoint(endpoint).is_err(), "{endpoint}");
        }
    }

    #[test]
    fn sc_01_duplicates_are_warnings() {
        let warnings = |hosts: &[&str]| {
            let listener = EgressListener {
                hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
                ..EgressListener::default()
            };
            let mut out = Findings::default();
            listener.warn_of_duplicates(&mut out);
            out.iter().count()
        };
        assert_eq!(warnings(&["a/x.y", "a/z.y", "b/x.y"]), 0);
        assert_eq!(warnings(&["*/*", "~a/*"]), 0);
        assert_eq!(warnings(&["a/x.y", "a/x.y"]), 1);
        assert_eq!(warnings(&["a/*", "a/x.y"]), 1);
        assert_eq!(warnings(&["a/x.y", "a/*"]), 1);
        assert_eq!(warnings(&["*/*", "a/x.y"]), 1);
    }
}
