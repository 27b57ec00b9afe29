//! From services, ports and subsets to clusters.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_core::istio::effective::scope::is_subset;
use mesh_core::istio::types::destination_rule::{ClientTlsMode, Subset};
use mesh_core::istio::types::sidecar::OutboundMode;
use mesh_core::registry::{Instance, Resolution, Service, ServicePort};
use mesh_core::{ClusterName, Direction, UpstreamTls};

use super::mesh::Mesh;
use super::{load_balancer, policy, tls};
use crate::cluster::{Cluster, ClusterSpec, Discovery, DnsEndpoint, EndpointSpec, UpstreamProtocol};

/// The clusters of a table, each made once.
pub(super) struct Clusters<'m> {
    mesh: &'m Mesh<'m>,
    client: load_balancer::Client,
    made: HashMap<ClusterName, Arc<Cluster>>,
    labels: Labels,
    order: Vec<Arc<Cluster>>,
}

/// Each set of labels once, as every pod of a deployment has the same, and is in the service's cluster and in a subset's.
#[derive(Default)]
struct Labels(HashSet<Arc<[(String, String)]>>);

/// What a destination comes to.
pub(super) enum Found {
    /// A cluster.
    Cluster(Arc<Cluster>),
    /// No service has this host.
    UnknownHost(ClusterName),
    /// The service has no port of this number, or several and none was named.
    UnknownPort(ClusterName),
    /// No destination rule defines this subset.
    UnknownSubset(ClusterName),
}

impl<'m> Clusters<'m> {
    pub(super) fn new(mesh: &'m Mesh<'m>) -> Self {
        let client = load_balancer::Client::of(mesh);
        Self { mesh, client, made: HashMap::new(), labels: Labels::default(), order: Vec::new() }
    }

    /// Every cluster, in the order in which they were made.
    pub(super) fn into_all(self) -> Vec<Arc<Cluster>> {
        self.order
    }

    /// The cluster of a destination. Without a port it is the service's only one, else that of the listener.
    pub(super) fn find(
        &mut self,
        host: &str,
        port: Option<u16>,
        listener: Option<u16>,
        subset: &str,
    ) -> Found {
        let named = port.or(listener).unwrap_or(0);
        let unknown = |port| ClusterName::new(Direction::Outbound, port, subset, host);
        let mesh = self.mesh;
        let Some(service) = mesh.service(host) else { return Found::UnknownHost(unknown(named)) };
        // A name that stands for another service is that service.
        let service = service.alias_of.as_deref().and_then(|target| mesh.service(target)).unwrap_or(service);
        let wanted = match (port, service.ports.as_slice()) {
            (Some(port), _) => service.port(port),
            (None, [only]) => Some(only),
            (None, _) => listener.and_then(|port| service.port(port)),
        };
        let Some(wanted) = wanted else { return Found::UnknownPort(unknown(named)) };
        self.of(service, wanted, subset)
            .map_or_else(|| Found::UnknownSubset(unknown(wanted.number)), Found::Cluster)
    }

    /// The cluster of a service's port; `None` when the subset is not defined.
    pub(super) fn of(&mut self, service: &Service, port: &ServicePort, subset: &str) -> Option<Arc<Cluster>> {
        let name = ClusterName::new(Direction::Outbound, port.number, subset, &service.host);
        if let Some(cluster) = self.made.get(&name) {
            return Some(Arc::clone(cluster));
        }
        let spec = self.spec(service, port, subset, name)?;
        Some(self.keep(spec))
    }

    /// The cluster to which TLS of the mesh is passed on as it is, under the server name that asks for it
    /// (`AUTO_PASSTHROUGH`): that of [`of`](Self::of), without TLS of our own, and with the workloads alone that speak the
    /// mesh's mutual TLS. Nothing looks at what is passed on, so they have to judge it. `None` when the subset is not
    /// defined, or nobody there speaks it.
    pub(super) fn passed_on(
        &mut self,
        service: &Service,
        port: &ServicePort,
        subset: &str,
    ) -> Option<Arc<Cluster>> {
        let name = format!("outbound_.{}_.{subset}_.{}", port.number, service.host);
        let mut spec = self.spec(service, port, subset, ClusterName::custom(name))?;
        spec.tls = UpstreamTls::Disable;
        let subset = Some(subset).filter(|subset| !subset.is_empty());
        let rule = self.mesh.rule(service);
        match self.mesh.policy(rule.as_ref(), subset, port.number).tls.map(|settings| settings.mode) {
            None => spec.discovery = workloads(spec.discovery, true)?,
            Some(ClientTlsMode::IstioMutual) => spec.discovery = workloads(spec.discovery, false)?,
            Some(ClientTlsMode::Disable | ClientTlsMode::Simple | ClientTlsMode::Mutual) => return None,
        }
        Some(self.keep(spec))
    }

    fn spec(
        &mut self,
        service: &Service,
        port: &ServicePort,
        subset: &str,
        name: ClusterName,
    ) -> Option<ClusterSpec> {
        let rule = self.mesh.rule(service);
        let subset = match subset {
            "" => None,
            name => Some(rule.as_ref()?.subset(name)?),
        };
        let mut spec = ClusterSpec::new(name, discovery(service, port, subset, &mut self.labels));
        let effective =
            self.mesh.policy(rule.as_ref(), subset.map(|subset| subset.name.as_str()), port.number);
        policy::apply(&effective, self.mesh, port, &mut spec);
        spec.tls = tls::upstream(&effective, self.mesh, service, port, subset.map(|subset| &*subset.name));
        Some(load_balancer::apply(&effective, rule.as_ref(), self.mesh, &self.client, spec))
    }

    /// Makes the clusters of every port and subset of a service, whether or not a route names them, as `/clusters`
    /// shows them.
    pub(super) fn all_of(&mut self, service: &Service) {
        if service.alias_of.as_deref().is_some_and(|target| self.mesh.service(target).is_some()) {
            return;
        }
        let subsets = self.mesh.rule(service).map(|rule| rule.subsets).unwrap_or_default();
        for port in service.ports.iter().filter(|port| port.protocol.is_http()) {
            self.of(service, port, "");
            for subset in &subsets {
                self.of(service, port, &subset.name);
            }
        }
    }

    /// The cluster for destinations that nobody knows.
    pub(super) fn unknown(&mut self, mode: OutboundMode) -> Arc<Cluster> {
        let (name, discovery) = match mode {
            OutboundMode::AllowAny => (ClusterName::passthrough(), Discovery::OriginalDst),
            OutboundMode::RegistryOnly => (ClusterName::black_hole(), Discovery::BlackHole),
        };
        if let Some(cluster) = self.made.get(&name) {
            return Arc::clone(cluster);
        }
        let mut spec = ClusterSpec::new(name, discovery);
        spec.protocol = UpstreamProtocol::Downstream;
        self.keep(spec)
    }

    fn keep(&mut self, spec: ClusterSpec) -> Arc<Cluster> {
        let cluster = Arc::new(Cluster::new(spec));
        self.made.insert(cluster.name().clone(), Arc::clone(&cluster));
        self.order.push(Arc::clone(&cluster));
        cluster
    }
}

impl Labels {
    fn of(&mut self, instance: &Instance) -> Arc<[(String, String)]> {
        let labels: Arc<[_]> =
            instance.labels.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        if let Some(known) = self.0.get(&labels) {
            return Arc::clone(known);
        }
        self.0.insert(Arc::clone(&labels));
        labels
    }
}

fn discovery(
    service: &Service,
    port: &ServicePort,
    subset: Option<&Subset>,
    labels: &mut Labels,
) -> Discovery {
    let in_subset = |instance: &&Arc<Instance>| subset.is_none_or(|s| is_subset(&s.labels, &instance.labels));
    let instances = || service.instances.iter().filter(in_subset);
    let mut dns = |instance: &Arc<Instance>| DnsEndpoint {
        weight: instance.weight,
        locality: Arc::clone(&instance.locality),
        labels: labels.of(instance),
        has_identity: has_identity(instance),
        ..DnsEndpoint::new(Arc::clone(&instance.address), instance.port(port))
    };
    if let Some(alias) = &service.alias_of {
        return Discovery::StrictDns(vec![DnsEndpoint::new(Arc::clone(alias), port.target)]);
    }
    match service.resolution {
        Resolution::None => Discovery::OriginalDst,
        Resolution::Static => Discovery::Static(
            instances()
                .filter_map(|instance| {
                    // Unix sockets and networks without an address have no endpoint here.
                    let address: IpAddr = instance.address.parse().ok()?;
                    Some(EndpointSpec {
                        weight: instance.weight,
                        locality: Arc::clone(&instance.locality),
                        labels: labels.of(instance),
                        has_identity: has_identity(instance),
                        ..EndpointSpec::new(SocketAddr::new(address, instance.port(port)))
                    })
                })
                .collect(),
        ),
        Resolution::Dns => Discovery::StrictDns(instances().map(dns).collect()),
        Resolution::DnsRoundRobin => match instances().next() {
            Some(first) => Discovery::LogicalDns(dns(first)),
            None => Discovery::Static(Vec::new()),
        },
    }
}

/// The endpoints that are known, with an identity of the mesh where one is `demanded`; `None` for none. Where connections
/// were going before a redirect says nothing at a gateway.
fn workloads(discovery: Discovery, demanded: bool) -> Option<Discovery> {
    match discovery {
        Discovery::Static(mut endpoints) => {
            endpoints.retain(|endpoint| endpoint.has_identity || !demanded);
            (!endpoints.is_empty()).then_some(Discovery::Static(endpoints))
        }
        Discovery::StrictDns(mut endpoints) => {
            endpoints.retain(|endpoint| endpoint.has_identity || !demanded);
            (!endpoints.is_empty()).then_some(Discovery::StrictDns(endpoints))
        }
        Discovery::LogicalDns(endpoint) => {
            (endpoint.has_identity || !demanded).then_some(Discovery::LogicalDns(endpoint))
        }
        Discovery::OriginalDst | Discovery::OriginalDstPort(_) | Discovery::BlackHole => None,
    }
}

/// What an endpoint says of the transport to it.
const TLS_MODE_LABEL: &str = "security.istio.io/tlsMode";

/// Whether an endpoint shows an identity of the mesh: its label says so, or there is no such label and it has a service
/// account (DR-TLS03).
fn has_identity(instance: &Instance) -> bool {
    match instance.labels.get(TLS_MODE_LABEL) {
        Some(mode) => mode == "istio",
        None => !instance.service_account.is_empty(),
    }
}
