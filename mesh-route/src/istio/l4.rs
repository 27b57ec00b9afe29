//! The routes of connections that are not HTTP: `tcp[]` and `tls[]` of virtual services, and services as they are.
//!
//! **At a sidecar** every port of a service that is not declared as HTTP has routes: at the service's virtual addresses,
//! or at any address when it has none. TCP goes by the first `tcp[]` rule that applies, TLS (`tls`, `https`) by the
//! server names of the `tls[]` rules, and either to the service itself where no rule applies; TLS without an address of
//! its own is then told apart by the service's host. A virtual service takes part wherever one of its hosts covers a
//! service, so one may have the HTTP rules of a host and another its TCP rules.
//!
//! **At a gateway** a TCP server has the first `tcp[]` rule of the virtual services attached to it, and a passthrough
//! server the server names of their `tls[]` rules. A server that ends TLS has `tcp[]` rules as well, which nobody
//! reaches but by its own handshake. With `AUTO_PASSTHROUGH` there are no rules: every service of the mesh that its hosts
//! cover is there, by port and subset, under the server name that Istio's sidecars ask for.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::config::{Compile, CompileContext, Rejected, Role};
use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::effective::host::{is_covered_by, overlap};
use mesh_core::istio::effective::scope::is_subset;
use mesh_core::istio::types::sidecar::OutboundMode;
use mesh_core::istio::types::virtual_service::{
    L4MatchAttributes, RouteDestination, TlsMatchAttributes, VirtualService,
};
use mesh_core::istio::{Resource, ResourceSet};
use mesh_core::registry::{AppProtocol, Service, ServicePort};
use mesh_core::server::ListenerProtocol;

use super::clusters::{Clusters, Found};
use super::gateway::is_selected;
use super::honour;
use super::http::{default_name, names_gateway};
use super::mesh::Mesh;
use crate::table::KeyedBy;
use crate::tcp::{HttpPort, TcpDestination, TcpMatch, TcpRoute, TcpRouteTable};
use crate::weighted::Weighted;

/// The gateway name that stands for every sidecar.
const MESH: &str = "mesh";

/// The port of plain HTTP, at which hosts answer that no service has.
const HTTP: u16 = 80;

/// What the workload connects to, or what comes to the TCP and passthrough servers of a gateway.
impl Compile<ResourceSet> for TcpRouteTable {
    fn compile(set: &ResourceSet, cx: &CompileContext, diags: &mut Diagnostics) -> Result<Self, Rejected> {
        honour::honour_l4(set, cx, diags);
        let mesh = Mesh::new(set, cx);
        let mut clusters = Clusters::new(&mesh);
        let table = Self::empty(KeyedBy::from(cx.role.direction()));
        let mut rules = Rules { mesh: &mesh, clusters: &mut clusters, diags, table };
        match cx.role {
            Role::Sidecar => rules.sidecar(),
            Role::Gateway => rules.gateway(),
        }
        let mut table = rules.table;
        let patience = mesh.config.protocol_detection_timeout.map(|timeout| timeout.to_std());
        table.set_patience(patience.filter(|patience| !patience.is_zero()));
        table.set_clusters(clusters.into_all());
        Ok(table)
    }

    fn closed(cx: &CompileContext) -> Self {
        Self::empty(KeyedBy::from(cx.role.direction()))
    }
}

/// Where the rules of a virtual service are compiled for.
struct Place<'p> {
    gateways: &'p [String],
    port: u16,
    /// The addresses of the service; empty is anywhere.
    blocks: &'p [IpNet],
    /// The server of the port that ended TLS; `None` where none does.
    within: Option<usize>,
}

/// What matches of TLS and of TCP have in common.
struct Match<'r> {
    sni_hosts: &'r [String],
    subnets: &'r [String],
    port: u32,
    gateways: &'r [String],
    source_labels: &'r std::collections::BTreeMap<String, String>,
    source_namespace: &'r str,
}

struct Rules<'a, 'm> {
    mesh: &'m Mesh<'m>,
    clusters: &'a mut Clusters<'m>,
    diags: &'a mut Diagnostics,
    table: TcpRouteTable,
}

impl<'m> Rules<'_, 'm> {
    fn sidecar(&mut self) {
        let mesh = self.mesh;
        let headless = mesh.headless();
        let attached = self.attached_to_sidecars();
        let mut used: BTreeSet<(usize, &str)> = BTreeSet::new();
        // Hosts that no service has are answered there, whatever the address.
        if attached_http(mesh) {
            self.table.insert_http(HTTP, None, HttpPort::Declared);
        }
        for service in mesh.visible() {
            // A name that stands for another service has no address of its own.
            if service.alias_of.is_some() {
                continue;
            }
            let own_instances = headless.contains(&*service.host);
            let blocks = if own_instances { instances(service) } else { addresses(service) };
            let owners: Vec<_> = attached
                .iter()
                .filter(|(_, _, hosts)| hosts.iter().any(|host| is_covered_by(&service.host, host)))
                .collect();
            let imported = |port: &&ServicePort| mesh.imports(&service.namespace, &service.host, port.number);
            for port in service.ports.iter().filter(imported) {
                let gateways = [MESH.to_owned()];
                let place = Place { gateways: &gateways, port: port.number, blocks: &blocks, within: None };
                let kind = match port.protocol {
                    AppProtocol::Http | AppProtocol::Http2 => {
                        self.table.insert_http(port.number, None, HttpPort::Declared);
                        continue;
                    }
                    AppProtocol::Sniff => {
                        self.insert_sniffed(port.number, &blocks);
                        "tcp"
                    }
                    AppProtocol::Tcp => "tcp",
                    AppProtocol::Tls => "tls",
                };
                let mut routed = false;
                for (at, resource, _) in &owners {
                    used.insert((*at, kind));
                    if kind == "tls" {
                        routed |= self.tls(resource, &place);
                    } else if self.tcp(resource, &place) {
                        routed = true;
                        break;
                    }
                }
                if !routed {
                    self.service_itself(service, port, &blocks, own_instances);
                }
            }
        }
        for (at, resource, _) in &attached {
            for (kind, rules) in [("tls", resource.spec.tls.len()), ("tcp", resource.spec.tcp.len())] {
                if rules > 0 && !used.contains(&(*at, kind)) {
                    let spoken = if kind == "tls" { "for TLS" } else { "that is neither HTTP nor TLS" };
                    let message =
                        format!("no service of these hosts has a port {spoken}: the rules have no effect");
                    self.diags.warning_at(resource.doc, format!("spec.{kind}"), message);
                }
            }
        }
        let mode = mesh.outbound_mode();
        let name = match mode {
            OutboundMode::AllowAny => "allow_any",
            OutboundMode::RegistryOnly => "block_all",
        };
        let cluster = self.clusters.unknown(mode);
        self.table.set_unknown(Arc::new(TcpRoute::forward(name, TcpMatch::default(), cluster)));
    }

    fn insert_sniffed(&mut self, port: u16, blocks: &[IpNet]) {
        if blocks.is_empty() {
            self.table.insert_http(port, None, HttpPort::Sniffed);
        }
        for block in blocks {
            self.table.insert_http(port, Some(*block), HttpPort::Sniffed);
        }
    }

    /// The virtual services with TCP or TLS rules for sidecars, oldest first, with the hosts that the workload imports.
    fn attached_to_sidecars(&self) -> Vec<(usize, &'m Resource<VirtualService>, Vec<String>)> {
        let mesh = self.mesh;
        let gateways = [MESH.to_owned()];
        let default = &mesh.config.default_virtual_service_export_to;
        mesh.set
            .virtual_services()
            .iter()
            .enumerate()
            .filter(|(_, resource)| {
                is_attached(resource, &gateways)
                    && mesh.is_exported(&resource.spec.export_to, default, &resource.meta.namespace)
            })
            .map(|(at, resource)| {
                let namespace = &resource.meta.namespace;
                let hosts = resource.spec.hosts.iter().map(|host| mesh.resolve(host, namespace));
                (at, resource, hosts.filter(|host| mesh.imports_rule(namespace, host)).collect::<Vec<_>>())
            })
            .filter(|(_, _, hosts)| !hosts.is_empty())
            .collect()
    }

    /// Routes a port of a service to the service.
    fn service_itself(
        &mut self,
        service: &Service,
        port: &ServicePort,
        blocks: &[IpNet],
        keeps_address: bool,
    ) {
        let Some(cluster) = self.clusters.of(service, port, "") else { return };
        let has_own_address = blocks.iter().any(|block| block.prefix_len() == block.max_prefix_len());
        let by_name = port.protocol == AppProtocol::Tls && !has_own_address;
        let matcher = TcpMatch {
            sni_hosts: if by_name { vec![service.host.to_string()] } else { Vec::new() },
            destinations: blocks.to_vec(),
        };
        let destination = TcpDestination { keeps_address, ..TcpDestination::new(cluster) };
        let route = Arc::new(TcpRoute::new("default", matcher, Weighted::single(destination)));
        // Services without an address of their own share a port, and the oldest has it; that is how it is in Istio.
        self.table.insert(port.number, &route);
    }

    fn gateway(&mut self) {
        let mesh = self.mesh;
        for gateway in mesh.set.gateways().iter().filter(|gateway| is_selected(gateway, mesh)) {
            let namespace = &gateway.meta.namespace;
            let gateways = [format!("{namespace}/{}", gateway.meta.name)];
            for server in &gateway.spec.servers {
                let tls = server.is_passthrough();
                let ended = server.is_terminated_bytes(mesh.cx.transport);
                let port = server.port.as_ref().and_then(|port| u16::try_from(port.number).ok());
                let Some(port) = port.filter(|port| *port != 0) else { continue };
                let protocol = server.listener_protocol(mesh.cx.transport);
                // Every name belongs to one server, also where that has no route for it.
                let at = matches!(protocol, Some(ListenerProtocol::Tls | ListenerProtocol::Https))
                    .then(|| self.table.insert_server(port, server.server_names()));
                if !(tls || ended || server.is_plain_tcp()) {
                    continue;
                }
                let served: Vec<(&str, String)> = server
                    .hosts
                    .iter()
                    .map(|host| {
                        let (scope, host) = host.split_once('/').unwrap_or(("*", host));
                        (if scope == "." { namespace } else { scope }, mesh.resolve(host, namespace))
                    })
                    .collect();
                if server.is_auto_passthrough() {
                    self.services_by_name(port, &served);
                    continue;
                }
                let within = at.filter(|_| ended);
                let place = Place { gateways: &gateways, port, blocks: &[], within };
                for resource in mesh.set.virtual_services() {
                    if !is_attached(resource, &gateways) || !self.is_exposed(resource, namespace, &served) {
                        continue;
                    }
                    if tls {
                        self.tls(resource, &place);
                    } else {
                        self.tcp(resource, &place);
                    }
                }
            }
        }
    }

    /// Every port and subset of the mesh's services that a server's hosts cover, by `outbound_.PORT_.SUBSET_.HOST`.
    fn services_by_name(&mut self, port: u16, served: &[(&str, String)]) {
        let mesh = self.mesh;
        let inside = |service: &&&Service| service.alias_of.is_none() && !service.external;
        for service in mesh.visible().iter().filter(inside) {
            let is_served = |(scope, host): &(&str, String)| {
                (*scope == "*" || *scope == &*service.namespace) && is_covered_by(&service.host, host)
            };
            if !served.iter().any(is_served) {
                continue;
            }
            let subsets = mesh.rule(service).map(|rule| rule.subsets).unwrap_or_default();
            let names: Vec<_> = subsets.iter().map(|subset| &*subset.name).collect();
            for of in &service.ports {
                for subset in std::iter::once("").chain(names.iter().copied()) {
                    let Some(cluster) = self.clusters.passed_on(service, of, subset) else { continue };
                    let matcher =
                        TcpMatch { sni_hosts: vec![cluster.name().to_string()], ..TcpMatch::default() };
                    // Two servers of one port may both cover it: it is the same route.
                    self.table
                        .insert(port, &Arc::new(TcpRoute::forward("auto_passthrough", matcher, cluster)));
                }
            }
        }
    }

    /// Whether a virtual service is exported to the gateway or to the workload, and has a host that the server exposes.
    fn is_exposed(
        &self,
        resource: &Resource<VirtualService>,
        gateway_namespace: &str,
        served: &[(&str, String)],
    ) -> bool {
        let namespace = &resource.meta.namespace;
        let (export_to, default) =
            (&resource.spec.export_to, &self.mesh.config.default_virtual_service_export_to);
        let exported = self.mesh.is_exported(export_to, default, namespace)
            || export_to
                .iter()
                .any(|to| to == gateway_namespace || (to == "." && namespace == gateway_namespace));
        exported
            && resource.spec.hosts.iter().map(|host| self.mesh.resolve(host, namespace)).any(|host| {
                served
                    .iter()
                    .any(|(scope, served)| (*scope == "*" || scope == namespace) && overlap(&host, served))
            })
    }

    /// Adds the TCP rules that apply. True when one of them takes every connection there: nothing follows it.
    fn tcp(&mut self, resource: &Resource<VirtualService>, place: &Place<'_>) -> bool {
        for (at, rule) in resource.spec.tcp.iter().enumerate() {
            let path = format!("spec.tcp[{at}]");
            if rule.matches.is_empty() {
                if names_gateway(&resource.spec.gateways, &resource.meta.namespace, place.gateways) {
                    self.add(resource, &path, &rule.route, &[], place.blocks.to_vec(), place);
                    return true;
                }
                continue;
            }
            for (match_at, matched) in rule.matches.iter().enumerate() {
                let matched = Match::from(matched);
                if !self.applies(resource, &matched, place) {
                    continue;
                }
                let path_of_match = format!("{path}.match[{match_at}]");
                let Some(blocks) = self.blocks(resource, &path_of_match, &matched, place) else { continue };
                self.add(resource, &path, &rule.route, &[], blocks, place);
                if matched.subnets.is_empty() {
                    return true;
                }
            }
        }
        false
    }

    /// Adds the TLS rules that apply. Whether there is one.
    fn tls(&mut self, resource: &Resource<VirtualService>, place: &Place<'_>) -> bool {
        let mut routed = false;
        for (at, rule) in resource.spec.tls.iter().enumerate() {
            let path = format!("spec.tls[{at}]");
            for (match_at, matched) in rule.matches.iter().enumerate() {
                let matched = Match::from(matched);
                if !self.applies(resource, &matched, place) {
                    continue;
                }
                let path_of_match = format!("{path}.match[{match_at}]");
                let Some(blocks) = self.blocks(resource, &path_of_match, &matched, place) else { continue };
                self.add(resource, &path, &rule.route, matched.sni_hosts, blocks, place);
                routed = true;
            }
        }
        routed
    }

    /// Whether a match is for this place and workload. Its own gateways override those of the virtual service; whose
    /// connections they are is known at a sidecar only.
    fn applies(&self, resource: &Resource<VirtualService>, matched: &Match<'_>, place: &Place<'_>) -> bool {
        let named = if matched.gateways.is_empty() { &resource.spec.gateways } else { matched.gateways };
        if (matched.port != 0 && matched.port != u32::from(place.port))
            || !names_gateway(named, &resource.meta.namespace, place.gateways)
        {
            return false;
        }
        let workload = &self.mesh.cx.workload;
        self.mesh.cx.role == Role::Gateway
            || (is_subset(matched.source_labels, &workload.labels)
                && (matched.source_namespace.is_empty() || matched.source_namespace == workload.namespace))
    }

    /// Where a match applies: in its own subnets, as far as they are the service's addresses. `None` is nowhere.
    fn blocks(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        matched: &Match<'_>,
        place: &Place<'_>,
    ) -> Option<Vec<IpNet>> {
        if matched.subnets.is_empty() {
            return Some(place.blocks.to_vec());
        }
        let subnets = matched.subnets.iter().filter_map(|subnet| parse(subnet));
        if place.blocks.is_empty() {
            return Some(subnets.collect());
        }
        let both: Vec<_> = subnets
            .flat_map(|subnet| place.blocks.iter().filter_map(move |block| narrower(subnet, *block)))
            .collect();
        if both.is_empty() {
            let message = format!(
                "the service has no address in these subnets at port {}: the match has no effect there",
                place.port
            );
            self.diags.warning_at(resource.doc, format!("{path}.destinationSubnets"), message);
            return None;
        }
        Some(both)
    }

    fn add(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        to: &[RouteDestination],
        sni_hosts: &[String],
        destinations: Vec<IpNet>,
        place: &Place<'_>,
    ) {
        let mut weighted = Vec::with_capacity(to.len());
        for (at, destination) in to.iter().enumerate() {
            let weight = u32::try_from(destination.weight).unwrap_or(0);
            let Some(compiled) =
                self.destination(resource, &format!("{path}.route[{at}]"), destination, place)
            else {
                return;
            };
            weighted.push((weight, compiled));
        }
        let weighted = match Weighted::new(weighted) {
            Ok(weighted) => weighted,
            Err(error) => {
                self.diags.error_at(resource.doc, format!("{path}.route"), error.to_string());
                return;
            }
        };
        let matcher = TcpMatch { sni_hosts: sni_hosts.to_vec(), destinations };
        let route = Arc::new(TcpRoute::new(default_name(resource, path), matcher, weighted));
        let conflicts = match place.within {
            Some(server) => self.table.insert_within(place.port, server, &route),
            None => self.table.insert(place.port, &route),
        };
        for conflict in conflicts {
            let message = format!("{conflict} at port {}: this rule has no effect for them", place.port);
            self.diags.warning_at(resource.doc, format!("{path}.match"), message);
        }
    }

    fn destination(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        destination: &RouteDestination,
        place: &Place<'_>,
    ) -> Option<TcpDestination> {
        let to = destination.destination.as_ref()?;
        let host = self.mesh.resolve(&to.host, &resource.meta.namespace);
        let port =
            to.port.as_ref().and_then(|port| u16::try_from(port.number).ok()).filter(|port| *port != 0);
        let (field, message, name) = match self.clusters.find(&host, port, Some(place.port), &to.subset) {
            Found::Cluster(cluster) => return Some(TcpDestination::new(cluster)),
            Found::UnknownHost(name) => ("host", format!("no service has the host {host:?}"), name),
            Found::UnknownPort(name) => {
                let message = match port {
                    Some(port) => format!("{host:?} has no port {port}"),
                    None => format!("{host:?} has several ports, and none is named"),
                };
                ("port", message, name)
            }
            Found::UnknownSubset(name) => {
                let message = format!("no destination rule defines the subset {:?} of {host:?}", to.subset);
                ("subset", message, name)
            }
        };
        self.diags.report(
            resource.doc,
            Severity::Warning,
            format!("{path}.destination.{field}"),
            format!("{message}: connections are reset, NC"),
            Some("IST0101"),
        );
        Some(TcpDestination::unknown(name))
    }
}

impl<'r> From<&'r L4MatchAttributes> for Match<'r> {
    fn from(matched: &'r L4MatchAttributes) -> Self {
        Self {
            sni_hosts: &[],
            subnets: &matched.destination_subnets,
            port: matched.port,
            gateways: &matched.gateways,
            source_labels: &matched.source_labels,
            source_namespace: &matched.source_namespace,
        }
    }
}

impl<'r> From<&'r TlsMatchAttributes> for Match<'r> {
    fn from(matched: &'r TlsMatchAttributes) -> Self {
        Self {
            sni_hosts: &matched.sni_hosts,
            subnets: &matched.destination_subnets,
            port: matched.port,
            gateways: &matched.gateways,
            source_labels: &matched.source_labels,
            source_namespace: &matched.source_namespace,
        }
    }
}

/// Whether rules of a virtual service may be for one of these gateways: by its own list, or by that of a match.
fn is_attached(resource: &Resource<VirtualService>, gateways: &[String]) -> bool {
    let (spec, namespace) = (&resource.spec, &resource.meta.namespace);
    !(spec.tls.is_empty() && spec.tcp.is_empty()) && names_gateway(&spec.gateways, namespace, gateways)
}

/// Whether HTTP rules of some virtual service may answer to hosts that no service has.
fn attached_http(mesh: &Mesh<'_>) -> bool {
    let gateways = [MESH.to_owned()];
    mesh.set.virtual_services().iter().any(|resource| {
        !resource.spec.http.is_empty()
            && names_gateway(&resource.spec.gateways, &resource.meta.namespace, &gateways)
    })
}

fn addresses(service: &Service) -> Vec<IpNet> {
    service.addresses.iter().filter_map(|address| parse(address)).collect()
}

fn instances(service: &Service) -> Vec<IpNet> {
    service.instances.iter().filter_map(|instance| parse(&instance.address)).collect()
}

fn parse(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// What both blocks contain.
fn narrower(one: IpNet, other: IpNet) -> Option<IpNet> {
    if one.contains(&other) { Some(other) } else { other.contains(&one).then_some(one) }
}
