//! The outbound routes of a sidecar: what its workload may ask for.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::Resource;
use mesh_core::istio::effective::host::is_covered_by;
use mesh_core::istio::types::sidecar::OutboundMode;
use mesh_core::istio::types::virtual_service::{HttpRoute, VirtualService};
use mesh_core::registry::{Service, ServicePort};

use super::clusters::Clusters;
use super::delegate;
use super::http::{Place, Rules, names_gateway};
use super::mesh::Mesh;
use super::retry;
use crate::route::{ActionKind, Destination, Forward, Route, RouteAction, RouteMatch};
use crate::table::{KeyedBy, RouteTable, VirtualHost};
use crate::weighted::Weighted;

/// The gateway name that stands for every sidecar.
const MESH: &str = "mesh";

/// The port of a plain HTTP URL.
const HTTP: u16 = 80;

pub(super) fn table<'m>(
    mesh: &'m Mesh<'m>,
    clusters: &mut Clusters<'m>,
    diags: &mut Diagnostics,
) -> RouteTable {
    let mut table = RouteTable::empty(KeyedBy::Destination);
    let services = mesh.visible();
    let headless = mesh.headless();
    let owners = owners(mesh, diags);
    let mut claimed: BTreeSet<&str> = BTreeSet::new();
    let mut ports: Vec<BTreeSet<u16>> = vec![BTreeSet::new(); owners.all.len()];
    let mut entries = Vec::with_capacity(services.len());
    let gateways = [MESH.to_owned()];
    for service in &services {
        clusters.all_of(service);
        let owner = owners.for_host(&service.host);
        if let Some((_, owner)) = owner {
            claimed.extend(
                owner.hosts.iter().filter(|host| is_covered_by(&service.host, host)).map(String::as_str),
            );
        }
        let mut hosts = Vec::new();
        let imported = |port: &&ServicePort| {
            port.protocol.is_http() && mesh.imports(&service.namespace, &service.host, port.number)
        };
        for port in service.ports.iter().filter(imported) {
            let mut routes = owner.map_or_else(Vec::new, |(at, owner)| {
                ports[at].insert(port.number);
                let place = Place { gateways: &gateways, port: Some(port.number) };
                Rules { mesh, clusters, diags }.routes(owner.resource, &owner.rules, &place)
            });
            // Without a rule for this port and workload it is as if there were no virtual service.
            if routes.is_empty() {
                routes.extend(default_route(mesh, clusters, service, port.number));
            }
            let name = format!("{}:{}", service.host, port.number);
            hosts.push((port.number, Arc::new(VirtualHost::new(name, routes))));
        }
        let instances = headless.contains(&*service.host);
        entries.push((names(mesh, service, instances), hosts));
    }
    // Hosts of virtual services that no service has answer at the ports of the services that the same virtual service
    // is for, else at the port of plain HTTP.
    for (owner, mut ports) in owners.all.iter().zip(ports) {
        if ports.is_empty() {
            ports.insert(HTTP);
        }
        for host in owner.hosts.iter().filter(|host| !claimed.contains(host.as_str())) {
            let mut hosts = Vec::with_capacity(ports.len());
            for &port in &ports {
                let place = Place { gateways: &gateways, port: Some(port) };
                let routes = Rules { mesh, clusters, diags }.routes(owner.resource, &owner.rules, &place);
                if !routes.is_empty() {
                    hosts.push((port, Arc::new(VirtualHost::new(format!("{host}:{port}"), routes))));
                }
            }
            entries.push((domains(mesh, host), hosts));
        }
    }
    // A host in full is its own before it is another's short name, and of equals it is the first's.
    for (names, hosts) in &entries {
        insert(&mut table, names.split_at(1).0, hosts);
    }
    for (names, hosts) in &entries {
        insert(&mut table, names.split_at(1).1, hosts);
    }
    let mode = mesh.outbound_mode();
    let unknown = clusters.unknown(mode);
    let name = match mode {
        OutboundMode::AllowAny => "allow_any",
        OutboundMode::RegistryOnly => "block_all",
    };
    table.set_unknown(Arc::new(Route::new(
        name,
        RouteMatch::default(),
        Arc::new(RouteAction::forward(unknown)),
    )));
    table
}

/// A virtual service as the owner of its hosts.
struct Owner<'a> {
    resource: &'a Resource<VirtualService>,
    hosts: Vec<String>,
    rules: Vec<(String, HttpRoute)>,
}

struct Owners<'a> {
    all: Vec<Owner<'a>>,
    exact: HashMap<String, usize>,
}

impl<'a> Owners<'a> {
    /// The owner of a host: of its exact name, else of the longest wildcard that covers it.
    fn for_host(&self, host: &str) -> Option<(usize, &Owner<'a>)> {
        let wildcard = || {
            let all = self.all.iter().enumerate();
            let wildcards = all.flat_map(|(at, owner)| owner.hosts.iter().map(move |pattern| (at, pattern)));
            wildcards
                .filter(|(_, pattern)| pattern.starts_with('*') && is_covered_by(host, pattern))
                // Of equals the first, which is the oldest.
                .fold(None, |best: Option<(usize, &String)>, next| match best {
                    Some(best) if best.1.len() >= next.1.len() => Some(best),
                    _ => Some(next),
                })
                .map(|(at, _)| at)
        };
        let at = self.exact.get(host).copied().or_else(wildcard)?;
        Some((at, self.all.get(at)?))
    }
}

/// The virtual services of the mesh gateway. Of several for one host only the oldest counts (VS-07).
fn owners<'m>(mesh: &'m Mesh<'m>, diags: &mut Diagnostics) -> Owners<'m> {
    let mut owners = Owners { all: Vec::new(), exact: HashMap::new() };
    let mut taken: HashMap<String, String> = HashMap::new();
    let gateways = [MESH.to_owned()];
    for resource in mesh.set.virtual_services() {
        let namespace = &resource.meta.namespace;
        let spec = &resource.spec;
        // The gateways of a match choose among these and attach nowhere.
        let attached = names_gateway(&spec.gateways, namespace, &gateways);
        let default = &mesh.config.default_virtual_service_export_to;
        // Who has no HTTP rules takes no host from those who have.
        let routes_http = !spec.http.is_empty();
        if spec.hosts.is_empty()
            || !routes_http
            || !attached
            || !mesh.is_exported(&spec.export_to, default, namespace)
        {
            continue;
        }
        let mut hosts = Vec::with_capacity(spec.hosts.len());
        for (at, host) in spec.hosts.iter().enumerate() {
            let host = mesh.resolve(host, namespace);
            if !mesh.imports_rule(namespace, &host) {
                continue;
            }
            match taken.get(&host) {
                Some(first) => diags.report(
                    resource.doc,
                    Severity::Warning,
                    format!("spec.hosts[{at}]"),
                    format!("{host:?} belongs to the older virtual service {first}: these rules have no effect for it"),
                    Some("IST0109"),
                ),
                None => {
                    taken.insert(host.clone(), format!("{namespace}/{}", resource.meta.name));
                    owners.exact.insert(host.clone(), owners.all.len());
                    hosts.push(host);
                }
            }
        }
        if !hosts.is_empty() {
            let rules = delegate::rules(mesh, resource, diags);
            owners.all.push(Owner { resource, hosts, rules });
        }
    }
    owners
}

fn default_route(
    mesh: &Mesh<'_>,
    clusters: &mut Clusters<'_>,
    service: &Service,
    port: u16,
) -> Option<Arc<Route>> {
    let found = clusters.find(&service.host, Some(port), None, "");
    let super::clusters::Found::Cluster(cluster) = found else { return None };
    let mut forward = Forward::new(Weighted::single(Destination::new(cluster)));
    forward.retry = retry::default(mesh);
    let action = RouteAction::new(ActionKind::Forward(forward));
    Some(Arc::new(Route::new("default", RouteMatch::default(), Arc::new(action))))
}

/// The names and addresses of a service, its host first, and those of its instances where they have some: those of a
/// headless service are called `instance.service`.
fn names(mesh: &Mesh<'_>, service: &Service, instances: bool) -> Vec<String> {
    let mut names = domains(mesh, &service.host);
    if instances {
        names.extend(names.clone().iter().map(|name| format!("*.{name}")));
    }
    names.extend(
        service
            .addresses
            .iter()
            .filter(|address| !address.contains('/'))
            .map(|address| if address.contains(':') { format!("[{address}]") } else { address.to_string() }),
    );
    names
}

/// Adds virtual hosts, each at its port, and for requests that name no port the one at 80, else the only one. Of
/// several with none at 80 such requests get 404 `NR`. A name that is there already stays as it is.
fn insert(table: &mut RouteTable, names: &[String], hosts: &[(u16, Arc<VirtualHost>)]) {
    let without_port = match hosts {
        [] => return,
        [(_, only)] => Arc::clone(only),
        several => match several.iter().find(|(port, _)| *port == HTTP) {
            Some((_, host)) => Arc::clone(host),
            None => Arc::new(VirtualHost::new(names.first().map_or("", String::as_str), [])),
        },
    };
    for name in names {
        let _ = table.insert(None, name, Arc::clone(&without_port));
        for (port, host) in hosts {
            let _ = table.insert(Some(*port), name, Arc::clone(host));
        }
    }
}

/// The names that a host answers to, itself first: for `n.ns.svc.DOMAIN` also `n.ns.svc` and `n.ns`, and for clients in `ns` `n`.
fn domains(mesh: &Mesh<'_>, host: &str) -> Vec<String> {
    let mut names = vec![host.to_owned()];
    let suffix = format!(".svc.{}", mesh.cx.cluster_domain);
    if let Some((name, namespace)) = host.strip_suffix(&suffix).and_then(|short| short.rsplit_once('.')) {
        names.push(format!("{name}.{namespace}.svc"));
        names.push(format!("{name}.{namespace}"));
        if namespace == mesh.namespace() && !name.starts_with('*') {
            names.push(name.to_owned());
        }
    }
    names
}
