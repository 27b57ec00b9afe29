//! The routes of a gateway: what its servers expose, by the virtual services that are attached to them.
//!
//! A table is keyed by the port, and plain servers of one port share its hosts, as in Istio. Servers that end TLS do not:
//! a virtual service is there at a host only through the server that the host belongs to ([`Servers::of`]), or one that
//! shakes hands alike. What is exposed behind a demand for client certificates is not to be had over a connection
//! without one.
//!
//! [`Servers::of`]: mesh_core::Servers::of

use std::collections::BTreeMap;
use std::sync::Arc;

use http::HeaderName;
use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::Resource;
use mesh_core::istio::effective::host::is_covered_by;
use mesh_core::istio::effective::scope::is_subset;
use mesh_core::istio::types::gateway::{Gateway, Server};
use mesh_core::istio::types::virtual_service::HttpRoute;
use mesh_core::matcher::{HeaderMatcher, StringMatcher};
use mesh_core::server::ListenerProtocol;
use mesh_core::{ListenerSet, ServerTls, Servers};

use super::clusters::Clusters;
use super::delegate;
use super::http::{Place, Rules, names_gateway};
use super::mesh::Mesh;
use crate::redirect::Redirect;
use crate::route::{ActionKind, Route, RouteAction, RouteMatch};
use crate::table::{KeyedBy, RouteTable, VirtualHost};

pub(super) fn table<'m>(
    mesh: &'m Mesh<'m>,
    clusters: &mut Clusters<'m>,
    diags: &mut Diagnostics,
) -> RouteTable {
    let mut table = RouteTable::empty(KeyedBy::Listener);
    for service in mesh.visible() {
        clusters.all_of(service);
    }
    let mut rules: Vec<Option<Vec<(String, HttpRoute)>>> = vec![None; mesh.set.virtual_services().len()];
    // Registered as a model of its own, which says what is wrong with it.
    let listeners = ListenerSet::of(mesh.set, mesh.cx, &mut Diagnostics::default());
    for (port, mut exposed) in exposed(mesh) {
        let listener = listeners.port(port);
        let ends_tls = listener.is_some_and(|listener| listener.protocol == ListenerProtocol::Https);
        // A port speaks one of the two.
        exposed.retain(|server| server.tls.is_some() == ends_tls);
        let servers = listener.map(|listener| &listener.servers);
        let mut hosts: BTreeMap<String, Host> = BTreeMap::new();
        for (at, resource) in mesh.set.virtual_services().iter().enumerate() {
            let namespace = &resource.meta.namespace;
            let attached: Vec<_> = exposed.iter().filter(|server| is_attached(resource, server)).collect();
            let default = &mesh.config.default_virtual_service_export_to;
            if attached.is_empty()
                || !is_exported(&resource.spec.export_to, default, namespace, &attached, mesh)
            {
                continue;
            }
            // Under each name the rules are those for the gateways that expose it.
            let mut domains: Vec<(String, Vec<String>)> = Vec::new();
            for host in resource.spec.hosts.iter().map(|host| mesh.resolve(host, namespace)) {
                for server in &attached {
                    for (scope, served) in &server.hosts {
                        if !(scope == "*" || scope == namespace) {
                            continue;
                        }
                        // The narrower of the two: a server exposes no more than its hosts.
                        let domain = if is_covered_by(&host, served) {
                            &host
                        } else if is_covered_by(served, &host) {
                            served
                        } else {
                            continue;
                        };
                        if !server.has(domain, servers) {
                            continue;
                        }
                        hosts.entry(domain.clone()).or_default().redirects |= server.redirects;
                        match domains.iter_mut().find(|(known, _)| known == domain) {
                            Some((_, gateways)) if gateways.contains(&server.gateway) => {}
                            Some((_, gateways)) => gateways.push(server.gateway.clone()),
                            None => domains.push((domain.clone(), vec![server.gateway.clone()])),
                        }
                    }
                }
            }
            if domains.is_empty() {
                continue;
            }
            let rules = rules[at].get_or_insert_with(|| delegate::rules(mesh, resource, diags));
            let mut compiled: BTreeMap<Vec<String>, Vec<Arc<Route>>> = BTreeMap::new();
            for (domain, gateways) in domains {
                let routes = compiled.entry(gateways).or_insert_with_key(|gateways| {
                    let place = Place { gateways, port: Some(port) };
                    Rules { mesh, clusters, diags }.routes(resource, rules, &place)
                });
                hosts.entry(domain).or_default().routes.extend(routes.iter().cloned());
            }
        }
        for server in exposed.iter().filter(|server| server.redirects) {
            for (_, host) in &server.hosts {
                hosts.entry(host.clone()).or_default().redirects = true;
            }
        }
        // The hosts of a server that ends TLS are its own, also where it has no routes for them.
        for server in exposed.iter().filter(|server| server.tls.is_some()) {
            for (_, host) in &server.hosts {
                hosts.entry(host.clone()).or_default();
            }
        }
        for (host, Host { mut routes, redirects }) in hosts {
            // Catch-alls of one virtual service must not hide the rules of the next (VS-07); the order is stable.
            routes.sort_by_key(|route| route.matcher().is_catch_all());
            if redirects {
                routes.insert(0, to_https());
            }
            let virtual_host = Arc::new(VirtualHost::new(format!("{host}:{port}"), routes));
            // The hosts of one port are the keys of a map, so none stands twice.
            let _ = table.insert(Some(port), &host, virtual_host);
        }
    }
    table
}

/// The scheme that the client spoke. What it holds is the edge's word: that of clients who are not trusted is replaced.
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// What answers to a name at a port.
#[derive(Default)]
struct Host {
    routes: Vec<Arc<Route>>,
    /// One of the servers that expose it sends everything to `https`.
    redirects: bool,
}

/// One server of HTTP of a gateway that selects the workload.
struct Exposed {
    gateway: String,
    namespace: String,
    /// Which namespaces' virtual services may bind which host.
    hosts: Vec<(String, String)>,
    redirects: bool,
    /// How it ends TLS; `None` for plain HTTP.
    tls: Option<ServerTls>,
}

impl Exposed {
    /// Whether what is attached to this server is there at `domain`: not where a server that shakes hands otherwise has
    /// the name.
    fn has(&self, domain: &str, servers: Option<&Servers>) -> bool {
        self.tls.is_none()
            || servers
                .and_then(|servers| servers.of(Some(domain)))
                .is_some_and(|owner| owner.tls.as_deref() == self.tls.as_ref())
    }
}

fn exposed(mesh: &Mesh<'_>) -> BTreeMap<u16, Vec<Exposed>> {
    let mut ports: BTreeMap<u16, Vec<Exposed>> = BTreeMap::new();
    for gateway in mesh.set.gateways().iter().filter(|gateway| is_selected(gateway, mesh)) {
        let is_http = |server: &&Server| server.is_plain_http() || server.is_terminated(mesh.cx.transport);
        for server in gateway.spec.servers.iter().filter(is_http) {
            let Some(port) = server.port.as_ref().and_then(|port| u16::try_from(port.number).ok()) else {
                continue;
            };
            let namespace = &gateway.meta.namespace;
            let hosts = server.hosts.iter().map(|host| {
                let (scope, host) = host.split_once('/').unwrap_or(("*", host));
                let scope = if scope == "." { namespace } else { scope };
                (scope.to_owned(), mesh.resolve(host, namespace))
            });
            ports.entry(port).or_default().push(Exposed {
                gateway: format!("{namespace}/{}", gateway.meta.name),
                namespace: namespace.clone(),
                hosts: hosts.collect(),
                redirects: server.is_plain_http()
                    && server.tls.as_ref().is_some_and(|tls| tls.https_redirect),
                tls: server.server_tls(mesh.cx.transport),
            });
        }
    }
    ports
}

/// Whether a gateway is for this workload: its selector may name any namespace's, and none names every gateway (GW-03).
pub(super) fn is_selected(gateway: &Resource<Gateway>, mesh: &Mesh<'_>) -> bool {
    is_subset(&gateway.spec.selector, &mesh.cx.workload.labels)
}

fn is_attached(
    resource: &Resource<mesh_core::istio::types::virtual_service::VirtualService>,
    server: &Exposed,
) -> bool {
    names_gateway(&resource.spec.gateways, &resource.meta.namespace, std::slice::from_ref(&server.gateway))
}

/// Whether a virtual service is exported to the workload's namespace or to that of a gateway it is attached to.
fn is_exported(
    export_to: &[String],
    default: &[String],
    namespace: &str,
    attached: &[&Exposed],
    mesh: &Mesh<'_>,
) -> bool {
    mesh.is_exported(export_to, default, namespace)
        || attached.iter().any(|server| {
            export_to.iter().any(|to| *to == server.namespace || (to == "." && namespace == server.namespace))
        })
}

/// Redirects what did not come over TLS, be it here or, as a trusted proxy in front says, there.
fn to_https() -> Arc<Route> {
    let action = RouteAction::new(ActionKind::Redirect(Redirect::to_https()));
    let proto = HeaderMatcher::value(FORWARDED_PROTO, StringMatcher::exact("https"));
    let matcher = RouteMatch { headers: vec![proto.inverted()], ..RouteMatch::default() };
    Arc::new(Route::new("https_redirect", matcher, Arc::new(action)))
}
