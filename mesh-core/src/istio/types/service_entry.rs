//! `networking.istio.io` ServiceEntry (SE-01 … SE-04).

use std::collections::BTreeSet;

use serde::Deserialize;

use super::check::{self, ExportToOf};
use super::common::NetworkingWorkloadSelector;
use super::host::whole_wildcard;
use super::protocol::{PortProtocol, known_protocol};
use super::target;
use super::workload_entry::{WorkloadEntry, port_name};
use crate::istio::findings::{Findings, Validate};

/// The label that keeps Istio from giving a ServiceEntry without addresses a virtual one.
const AUTO_ALLOCATION_LABEL: &str = "networking.istio.io/enable-autoallocate-ip";

/// A service that the platform's registry does not know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceEntry {
    /// The names; the first label may be `*`. At least one.
    pub hosts: Vec<String>,
    /// Virtual addresses or CIDR blocks.
    pub addresses: Vec<String>,
    /// The ports, unique by name and by number.
    pub ports: Vec<ServicePort>,
    /// Whether it is part of the mesh, which decides on mTLS and telemetry.
    pub location: Location,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// The endpoints; not together with `workload_selector`.
    pub endpoints: Option<Vec<WorkloadEntry>>,
    /// Selects pods and workload entries as endpoints.
    pub workload_selector: Option<NetworkingWorkloadSelector>,
    /// Who sees it.
    pub export_to: Vec<String>,
    /// Names of which the server's certificate must have one.
    pub subject_alt_names: Vec<String>,
}

/// A port of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// 1..=65535.
    pub number: u32,
    /// One of [`PortProtocol`]; empty is found out by sniffing.
    pub protocol: String,
    /// A DNS label.
    pub name: String,
    /// The endpoint's port; 0 is `number`.
    pub target_port: u32,
}

/// Inside or outside the mesh (SE-02).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Location {
    /// Not part of the mesh; the default.
    #[default]
    MeshExternal,
    /// Part of the mesh.
    MeshInternal,
}

/// How endpoints are found (SE-03).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// The connection's original address; the default.
    #[default]
    None,
    /// The addresses of the endpoints.
    Static,
    /// All addresses that DNS gives for the endpoints or, without endpoints, for the hosts.
    Dns,
    /// The first address that DNS gives when a connection is opened.
    DnsRoundRobin,
    /// The name in the request, for wildcard hosts.
    DynamicDns,
}

impl Resolution {
    /// The name in YAML.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Static => "STATIC",
            Self::Dns => "DNS",
            Self::DnsRoundRobin => "DNS_ROUND_ROBIN",
            Self::DynamicDns => "DYNAMIC_DNS",
        }
    }
}

impl ServiceEntry {
    /// The endpoints, none when there is no list.
    #[must_use]
    pub fn endpoints(&self) -> &[WorkloadEntry] {
        self.endpoints.as_deref().unwrap_or_default()
    }
}

impl Validate for ServiceEntry {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        target::networking_selector(out, self.workload_selector.as_ref());
        if self.workload_selector.is_some() && self.endpoints.is_some() {
            out.error("", "only one of workloadSelector and endpoints can be set");
        }
        for (field, count, most) in [
            ("hosts", self.hosts.len(), 256),
            ("addresses", self.addresses.len(), 256),
            ("ports", self.ports.len(), 256),
            ("endpoints", self.endpoints().len(), 4096),
        ] {
            check::at_most(out, field, field, count, most);
        }
        self.validate_hosts(out);
        self.validate_addresses(out);
        self.validate_ports(out);
        self.validate_resolution(out);
        if self.resolution != Resolution::None && self.hosts.len() > 1 {
            // Nothing in opaque bytes tells the hosts apart.
            let opaque = |port: &ServicePort| {
                PortProtocol::parse(&port.protocol).is_none_or(|p| !p.is_http() && !p.is_tls())
            };
            if let Some(index) = self.ports.iter().position(opaque) {
                out.error(
                    &format!("ports[{index}].protocol"),
                    "multiple hosts provided with a port that is neither HTTP nor TLS",
                );
            }
        }
        let namespace = out.subject().namespace.clone();
        check::export_to(out, "exportTo", &self.export_to, &namespace, ExportToOf::ServiceEntry);
    }
}

impl ServiceEntry {
    fn validate_hosts(&self, out: &mut Findings) {
        if self.hosts.is_empty() {
            out.error("hosts", "a service entry must have at least one host");
        }
        for (index, host) in self.hosts.iter().enumerate() {
            let at = format!("hosts[{index}]");
            if host == "*" {
                out.error(&at, "the hostname cannot be the wildcard alone");
                continue;
            }
            out.check(&at, check::wildcard_domain(host));
            if let Err(reason) = whole_wildcard(host) {
                out.warning(&at, reason);
            }
        }
    }

    fn validate_addresses(&self, out: &mut Findings) {
        for (index, address) in self.addresses.iter().enumerate() {
            let at = format!("addresses[{index}]");
            out.check(&at, check::ip_or_cidr(address));
            if address.contains('/') && !matches!(self.resolution, Resolution::None | Resolution::Static) {
                out.error(&at, "CIDR addresses are allowed only for NONE/STATIC resolution types");
            }
        }
    }

    fn validate_ports(&self, out: &mut Findings) {
        let allocated = self.resolution != Resolution::None
            && !out
                .subject()
                .labels
                .get(AUTO_ALLOCATION_LABEL)
                .is_some_and(|value| value.eq_ignore_ascii_case("false"));
        let mut names = BTreeSet::new();
        let mut numbers = BTreeSet::new();
        for (index, port) in self.ports.iter().enumerate() {
            out.item("ports", index, |out| {
                if !names.insert(port.name.as_str()) {
                    out.error("name", format!("port name {:?} is already defined", port.name));
                }
                if !numbers.insert(port.number) {
                    out.error("number", format!("port {} is already defined", port.number));
                }
                if port.target_port != 0 {
                    out.check("targetPort", check::port(port.target_port));
                }
                if self.addresses.is_empty() && !allocated && matches!(port.protocol.as_str(), "" | "TCP") {
                    out.warning(
                        "protocol",
                        "addresses are required for ports serving TCP (or unset) protocol when no address is \
                         allocated automatically",
                    );
                }
                out.check("name", port_name(&port.name));
                out.check("protocol", known_protocol(&port.protocol));
                out.check("number", check::port(port.number));
            });
        }
    }

    fn validate_resolution(&self, out: &mut Findings) {
        let ports: BTreeSet<&str> = self.ports.iter().map(|port| port.name.as_str()).collect();
        match self.resolution {
            Resolution::None => {
                if !self.endpoints().is_empty() {
                    out.error("endpoints", "resolution NONE has no endpoints");
                }
                if self.workload_selector.is_some() {
                    out.warning("workloadSelector", "should not be set when the resolution is NONE");
                }
            }
            Resolution::Static => {
                for (index, endpoint) in self.endpoints().iter().enumerate() {
                    out.item("endpoints", index, |out| {
                        endpoint.validate_as_endpoint(out, Some(&ports), false);
                    });
                }
            }
            Resolution::Dns | Resolution::DnsRoundRobin => self.validate_dns(out, &ports),
            Resolution::DynamicDns => self.validate_dynamic_dns(out),
        }
    }

    fn validate_dns(&self, out: &mut Findings, ports: &BTreeSet<&str>) {
        if self.endpoints().is_empty() {
            for (index, host) in self.hosts.iter().enumerate() {
                if check::fqdn(host).is_err() {
                    out.error(
                        &format!("hosts[{index}]"),
                        format!(
                            "must be an FQDN if no endpoints are provided for resolution {}",
                            self.resolution.name()
                        ),
                    );
                }
            }
        }
        if self.resolution == Resolution::DnsRoundRobin && self.endpoints().len() > 1 {
            out.error("endpoints", "there must only be 0 or 1 endpoint for resolution DNS_ROUND_ROBIN");
        }
        for (index, endpoint) in self.endpoints().iter().enumerate() {
            out.item("endpoints", index, |out| endpoint.validate_as_dns_endpoint(out, ports));
        }
        if !self.addresses.is_empty()
            && self.hosts.len() > 1
            && let Some(index) = self
                .ports
                .iter()
                .position(|port| PortProtocol::parse(&port.protocol).is_some_and(PortProtocol::is_tcp))
        {
            out.warning(
                &format!("ports[{index}]"),
                "a service entry cannot have more than one host together with addresses and a TCP port",
            );
        }
    }

    fn validate_dynamic_dns(&self, out: &mut Findings) {
        for (index, host) in self.hosts.iter().enumerate() {
            if !host.starts_with("*.") {
                out.error(&format!("hosts[{index}]"), "resolution DYNAMIC_DNS needs wildcard hosts");
            }
        }
        if !self.endpoints().is_empty() {
            out.error("endpoints", "resolution DYNAMIC_DNS has no endpoints");
        }
        if self.workload_selector.is_some() {
            out.error("workloadSelector", "resolution DYNAMIC_DNS selects no workloads");
        }
        if !self.addresses.is_empty() {
            out.error("addresses", "resolution DYNAMIC_DNS has no addresses");
        }
        if self.location == Location::MeshInternal {
            out.error("location", "resolution DYNAMIC_DNS is only for MESH_EXTERNAL");
        }
        for (index, port) in self.ports.iter().enumerate() {
            let supported = matches!(
                PortProtocol::parse(&port.protocol),
                Some(PortProtocol::Http | PortProtocol::Http2 | PortProtocol::Grpc | PortProtocol::Tls)
            );
            if !supported {
                out.error(
                    &format!("ports[{index}].protocol"),
                    "resolution DYNAMIC_DNS supports HTTP, HTTP2, GRPC and TLS only",
                );
            }
        }
    }
}
