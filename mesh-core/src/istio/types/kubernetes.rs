//! Kubernetes' `Service`, `Endpoints` and `EndpointSlice`: the fields that a mesh reads.
//!
//! The API server has judged these resources already, so the validators look only at what would make them useless
//! here. Fields that are not listed are Kubernetes' business and are not reported.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::check;
use crate::istio::findings::{Findings, Validate};

/// `v1` Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// The ports.
    pub ports: Vec<ServiceSpecPort>,
    /// Labels of the pods.
    pub selector: BTreeMap<String, String>,
    /// The first virtual address, or `None` for a headless service; empty when it is not known.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// All virtual addresses, one per address family.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// Further addresses at which it is reached.
    #[serde(rename = "externalIPs")]
    pub external_ips: Vec<String>,
    /// `ClusterIP` (default), `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub service_type: ServiceType,
    /// The name that an `ExternalName` service stands for.
    pub external_name: String,
    /// Whether endpoints that are not ready are listed too.
    pub publish_not_ready_addresses: bool,
}

/// How a Service is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum ServiceType {
    /// At a virtual address within the cluster.
    #[default]
    ClusterIP,
    /// At a port of every node as well.
    NodePort,
    /// At a load balancer as well.
    LoadBalancer,
    /// It is an alias of another name.
    ExternalName,
}

/// A port of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpecPort {
    /// The name, whose prefix may say the protocol (PT-04); empty for an only port.
    pub name: String,
    /// `TCP` (also when empty), `UDP` or `SCTP`.
    pub protocol: String,
    /// The protocol within, which beats the name (PT-04).
    pub app_protocol: Option<String>,
    /// 1..=65535.
    pub port: u32,
    /// The pods' port, by number or by name; none is `port`.
    pub target_port: Option<IntOrString>,
}

/// A number or a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IntOrString {
    /// A number.
    Int(u32),
    /// A name.
    String(String),
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = IntOrString;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a port number or a port name")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<IntOrString, E> {
                u32::try_from(number).map(IntOrString::Int).map_err(|_| E::custom("the port is out of range"))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<IntOrString, E> {
                u32::try_from(number).map(IntOrString::Int).map_err(|_| E::custom("the port is out of range"))
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<IntOrString, E> {
                Ok(name.parse().map_or_else(|_| IntOrString::String(name.to_owned()), IntOrString::Int))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl ServiceSpec {
    /// Whether there is no virtual address, so that clients see the endpoints themselves.
    #[must_use]
    pub fn is_headless(&self) -> bool {
        self.cluster_ip == "None"
    }

    /// The virtual addresses; none for a headless service.
    pub fn virtual_addresses(&self) -> impl Iterator<Item = &str> {
        let only = std::iter::once(self.cluster_ip.as_str()).filter(|_| self.cluster_ips.is_empty());
        only.chain(self.cluster_ips.iter().map(String::as_str))
            .filter(|address| !matches!(*address, "" | "None"))
    }
}

impl Validate for ServiceSpec {
    fn validate(&self, out: &mut Findings) {
        let mut names = BTreeSet::new();
        for (index, port) in self.ports.iter().enumerate() {
            out.item("ports", index, |out| {
                out.check("port", check::port(port.port));
                if let Some(IntOrString::Int(number)) = port.target_port
                    && number != 0
                {
                    out.check("targetPort", check::port(number));
                }
                if !names.insert(port.name.as_str()) {
                    out.error("name", format!("port name {:?} is not unique", port.name));
                }
            });
        }
        if self.service_type == ServiceType::ExternalName
            && let Err(reason) = check::fqdn(&self.external_name)
        {
            // The API server also takes what looks like an address, which names nothing here.
            out.warning("externalName", reason);
        }
        for (index, address) in self.cluster_ips.iter().enumerate().filter(|(_, address)| *address != "None")
        {
            out.check(&format!("clusterIPs[{index}]"), check::ip(address));
        }
        if !matches!(self.cluster_ip.as_str(), "" | "None") {
            out.check("clusterIP", check::ip(&self.cluster_ip));
        }
    }
}

/// `v1` Endpoints, which has the name of its Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoints {
    /// Groups of addresses that have the same ports.
    pub subsets: Vec<EndpointSubset>,
}

/// Addresses that have the same ports: the endpoints are the product of both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSubset {
    /// The addresses that are ready.
    pub addresses: Vec<EndpointAddress>,
    /// Those that are not.
    pub not_ready_addresses: Vec<EndpointAddress>,
    /// The ports.
    pub ports: Vec<EndpointPort>,
}

/// An address of Endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointAddress {
    /// The IP address.
    pub ip: String,
    /// The host name of the pod.
    pub hostname: String,
    /// The node.
    pub node_name: Option<String>,
    /// The pod.
    pub target_ref: Option<ObjectReference>,
}

/// A reference to a resource, here a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObjectReference {
    /// The kind.
    pub kind: String,
    /// The name.
    pub name: String,
    /// The namespace.
    pub namespace: String,
}

/// A port of Endpoints or an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointPort {
    /// The name of the Service's port; empty for an only port.
    pub name: String,
    /// 1..=65535; none in an EndpointSlice means all ports.
    pub port: Option<u32>,
    /// `TCP` (also when empty), `UDP` or `SCTP`.
    pub protocol: String,
    /// The protocol within.
    pub app_protocol: Option<String>,
}

impl Validate for Endpoints {
    fn validate(&self, out: &mut Findings) {
        for (index, subset) in self.subsets.iter().enumerate() {
            out.item("subsets", index, |out| {
                for (field, list) in
                    [("addresses", &subset.addresses), ("notReadyAddresses", &subset.not_ready_addresses)]
                {
                    for (index, address) in list.iter().enumerate() {
                        out.check(&format!("{field}[{index}].ip"), check::ip(&address.ip));
                    }
                }
                ports(out, &subset.ports);
            });
        }
    }
}

/// The label with the name of the Service that an EndpointSlice belongs to.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// `discovery.k8s.io/v1` EndpointSlice, which names its Service by the label [`SERVICE_NAME_LABEL`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// What the addresses are.
    pub address_type: AddressType,
    /// The endpoints.
    pub endpoints: Vec<SliceEndpoint>,
    /// The ports, of every endpoint.
    pub ports: Vec<EndpointPort>,
}

/// What the addresses of an EndpointSlice are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum AddressType {
    /// IPv4.
    #[default]
    IPv4,
    /// IPv6.
    IPv6,
    /// Fully qualified names.
    #[serde(rename = "FQDN")]
    Fqdn,
}

/// An endpoint of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceEndpoint {
    /// Its addresses, which are interchangeable; the first is used.
    pub addresses: Vec<String>,
    /// Whether it takes traffic.
    pub conditions: EndpointConditions,
    /// The host name of the pod.
    pub hostname: Option<String>,
    /// The node.
    pub node_name: Option<String>,
    /// The zone.
    pub zone: Option<String>,
    /// The pod.
    pub target_ref: Option<ObjectReference>,
}

/// Whether an endpoint takes traffic; none is "yes" for the first two and "no" for the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointConditions {
    /// Ready, and not terminating.
    pub ready: Option<bool>,
    /// Able to serve, even while terminating.
    pub serving: Option<bool>,
    /// Shutting down.
    pub terminating: Option<bool>,
}

impl EndpointConditions {
    /// Whether new requests may go there.
    #[must_use]
    pub fn is_ready(self) -> bool {
        self.ready.unwrap_or(true)
    }
}

impl Validate for EndpointSlice {
    fn validate(&self, out: &mut Findings) {
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            for (at, address) in endpoint.addresses.iter().enumerate() {
                let checked = match self.address_type {
                    AddressType::Fqdn => check::fqdn(address),
                    AddressType::IPv4 | AddressType::IPv6 => check::ip(address),
                };
                out.check(&format!("endpoints[{index}].addresses[{at}]"), checked);
            }
        }
        ports(out, &self.ports);
        if !out.subject().labels.contains_key(SERVICE_NAME_LABEL) {
            out.at_root("metadata.labels", |out| {
                out.warning(
                    &check::key_path(SERVICE_NAME_LABEL),
                    "without this label the slice belongs to no service",
                );
            });
        }
    }
}

fn ports(out: &mut Findings, ports: &[EndpointPort]) {
    for (index, port) in ports.iter().enumerate() {
        if let Some(number) = port.port {
            out.check(&format!("ports[{index}].port"), check::port(number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_reads_what_the_api_server_prints() {
        let service: ServiceSpec = serde_json::from_str(
            r#"{"clusterIP":"10.0.0.7","clusterIPs":["10.0.0.7","fd00::7"],"sessionAffinity":"None","type":"ClusterIP",
                "ports":[{"name":"http","port":9080,"protocol":"TCP","targetPort":"web"},
                         {"name":"grpc","port":9090,"targetPort":9091}]}"#,
        )
        .unwrap();
        assert_eq!(service.virtual_addresses().collect::<Vec<_>>(), ["10.0.0.7", "fd00::7"]);
        assert_eq!(service.ports[0].target_port, Some(IntOrString::String("web".to_owned())));
        assert_eq!(service.ports[1].target_port, Some(IntOrString::Int(9091)));
        let mut out = Findings::new("spec");
        service.validate(&mut out);
        assert_eq!(out.iter().count(), 0);
        let headless = ServiceSpec { cluster_ip: "None".to_owned(), ..ServiceSpec::default() };
        assert!(headless.is_headless() && headless.virtual_addresses().next().is_none());
    }
}
