//! The listeners of a proxy: of the mesh, of its applications, of its operators.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mesh_core::config::Role;
use mesh_core::server::{
    BindError, ListenerProtocol, ListenerSpec, Server, ServerLimits, WithTls, serve_here,
};
use mesh_core::{ClusterName, Direction, GatewayListener, Slot};
use mesh_route::{
    Cluster, ClusterSpec, Discovery, EndpointSpec, RouteBuilder, RouteTable, Shard, TcpRouteTable,
    UpstreamProtocol,
};
use mesh_telemetry::access_log::AccessLogSink;
use serde_json::json;

use crate::admin::{Admin, Port};
use crate::compose::{self, Parts};
use crate::demo;
use crate::security::Security;
use crate::status::{Metrics, Probers};

use super::Failure;
use super::proxy::Proxy;

/// Whose turn it is to change the listeners.
#[derive(Default)]
pub(super) struct Turns {
    lock: tokio::sync::Mutex<()>,
    last: AtomicU64,
}

/// The routes of requests, and of what is not HTTP.
type Tables = (Slot<RouteTable>, Slot<TcpRouteTable>);

impl Proxy {
    pub(super) fn listen(&mut self, spec: ListenerSpec, flag: &str) -> Result<(), Failure> {
        let name = spec.name().to_owned();
        let address = listen(self.server()?, &self.parts, &self.security, &self.tables(), spec)
            .map_err(|error| bind_failure(&error, flag))?;
        self.addresses.push((name, address));
        Ok(())
    }

    /// The outbound side of each of the demo's workloads, as which it calls others: where each listens.
    pub(super) fn listen_demo(
        &self,
        bookinfo: &demo::Bookinfo,
        identities: Option<&demo::Identities>,
        outbound: SocketAddr,
    ) -> Result<BTreeMap<String, SocketAddr>, Failure> {
        let mut listening = BTreeMap::new();
        for workload in bookinfo.ports().keys() {
            let own = identities.and_then(|identities| identities.of(workload));
            let address = match own {
                None => outbound,
                Some(own) => {
                    let name = format!("demo-{workload}");
                    let security = self.security.with_identity(&name, own.clone()).map_err(Failure::Other)?;
                    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                    let spec = ListenerSpec::new(name, any, Direction::Outbound);
                    listen(self.server()?, &self.parts, &security, &self.tables(), spec)
                        .map_err(Failure::other)?
                }
            };
            listening.insert(workload.clone(), address);
        }
        Ok(listening)
    }

    fn tables(&self) -> Tables {
        (self.control.routes.clone(), self.control.tcp_routes.clone())
    }

    pub(super) fn listen_inbound(
        &mut self,
        at: usize,
        inbound: SocketAddr,
        app: SocketAddr,
    ) -> Result<(), Failure> {
        let name = if at == 0 { "inbound".to_owned() } else { format!("inbound-{}", at + 1) };
        let mut cluster = ClusterName::new(Direction::Inbound, app.port(), "", "");
        // Runtime state goes by the name, and applications may share a port.
        if self.apps.iter().any(|known| *known.name() == cluster) {
            cluster = ClusterName::new(Direction::Inbound, app.port(), "", &name);
        }
        let mut spec = ClusterSpec::new(cluster, Discovery::Static(vec![EndpointSpec::new(app)]));
        spec.protocol = UpstreamProtocol::Downstream;
        let cluster = Arc::new(Cluster::new(spec));
        self.control.clusters().reconcile(std::slice::from_ref(&cluster));
        let route = RouteBuilder::new("default").forward(Arc::clone(&cluster)).map_err(Failure::other)?;
        let table = RouteTable::builder().host("*", [route]).build().map_err(Failure::other)?;
        let slot = Slot::fixed(table);
        let parts = self.parts.clone();
        let routes = slot.clone();
        let tls = self.security.inbound(self.control.inbound_tls.clone());
        let spec = ListenerSpec::new(name.as_str(), inbound, Direction::Inbound).port(app.port());
        let address = self
            .server()?
            .listen_with(
                spec,
                move |_| WithTls::new(tls.clone()),
                move |_| compose::inbound(&parts, routes.clone(), Shard::new()),
            )
            .map_err(|error| bind_failure(&error, "--inbound"))?;
        self.apps.push(cluster);
        self.inbound.push((app.port(), slot));
        self.addresses.push(("inbound".to_owned(), address));
        Ok(())
    }

    pub(super) fn listen_admin(&mut self) -> Result<SocketAddr, Failure> {
        let role = if self.binary == "gateway" { Role::Gateway } else { Role::Sidecar };
        let workload = self.common.compile_context(role).workload;
        let admin = Arc::new(Admin {
            binary: self.binary,
            status: self.control.status().clone(),
            snapshots: self.control.snapshots().clone(),
            routes: self.control.routes.clone(),
            tcp_routes: self.control.tcp_routes.clone(),
            clusters: self.control.clusters().clone(),
            inbound: self.inbound.clone(),
            edge: self.control.edge.clone(),
            server: Arc::downgrade(self.server()?),
            direction: role.direction(),
            node: json!({
                "workload": workload.name,
                "namespace": workload.namespace,
                "service_account": workload.service_account,
                "labels": workload.labels,
                "compat": self.common.compat.as_str(),
                "header_prefix": self.common.header_prefix.to_string(),
                "workers": self.common.worker_count(),
            }),
            canaries: self.control.canaries().clone(),
            security: self.security.clone(),
            workload,
            access_log: self.sink.as_ref().map(AccessLogSink::dropped_lines),
            started: self.started,
            controls: self.controls.clone(),
            identity: self.security.asked().cloned(),
            materials: self.security.mesh().clone(),
            own_ports: Mutex::default(),
            probers: Probers::from_env(Arc::clone(self.security.provider())).map_err(Failure::Other)?,
            // As in Istio: behind a gateway there is no application, and its service has this port.
            metrics: if role == Role::Sidecar { Metrics::from_env() } else { Ok(Metrics::none()) }
                .map_err(Failure::Other)?,
        });
        let ports = [
            ("admin", Some(self.common.admin), Port::Admin, "--admin"),
            ("prometheus", self.common.prometheus, Port::Prometheus, "--prometheus"),
            ("status", self.common.status, Port::Status, "--status"),
            ("health", self.common.health, Port::Health, "--health"),
        ];
        let mut first = self.common.admin;
        for (name, address, port, flag) in ports {
            let Some(address) = address else { continue };
            let has_metrics = matches!(port, Port::Status | Port::Prometheus);
            let refuse = |own: SocketAddr| match admin.metrics.refuse(own.port()) {
                Err(error) if has_metrics => Err(Failure::Other(error)),
                _ => Ok(()),
            };
            refuse(address)?;
            let spec = ListenerSpec::new(name, address, Direction::Inbound);
            let (bound, serving) = serve_here(spec, admin.stack(port), ServerLimits::default(), None)
                .map_err(|error| bind_failure(&error, flag))?;
            refuse(bound)?;
            admin.own_ports.lock().unwrap_or_else(PoisonError::into_inner).push(bound.port());
            tokio::spawn(serving);
            if port == Port::Admin {
                first = bound;
            }
            self.addresses.push((name.to_owned(), bound));
        }
        Ok(first)
    }

    /// Makes the listeners of a gateway be those of the generation in force.
    pub(super) fn reconcile(&mut self, wanted: Vec<ListenerSpec>) {
        let Some(server) = self.server.clone() else { return };
        let (parts, security, tables) = (self.parts.clone(), self.security.clone(), self.tables());
        let turns = Arc::clone(&self.reconciling);
        let turn = turns.last.fetch_add(1, Ordering::AcqRel) + 1;
        tokio::spawn(async move {
            // One after the other, and only the newest: a listener of an old generation must not come back.
            let _turn = turns.lock.lock().await;
            if turns.last.load(Ordering::Acquire) != turn {
                return;
            }
            let done = server
                .reconcile(wanted, |server, spec| listen(server, &parts, &security, &tables, spec))
                .await;
            for (name, address) in &done.added {
                tracing::info!(listener = &**name, %address, "listening");
            }
            for error in &done.failed {
                tracing::error!(%error, "a listener of the new generation is missing");
            }
        });
    }
}

pub(super) fn gateway_listeners(proxy: &Proxy, bind: IpAddr, map_port: &[(u16, u16)]) -> Vec<ListenerSpec> {
    let snapshot = proxy.control.snapshots().load();
    let listeners =
        snapshot.get(&proxy.control.listeners).map(|set| set.listeners.as_slice()).unwrap_or_default();
    let spec = |listener: &GatewayListener| {
        let mapped = map_port.iter().rev().find(|(from, _)| *from == listener.port);
        let port = mapped.map_or(listener.port, |(_, to)| *to);
        ListenerSpec::new(
            &*listener.name,
            SocketAddr::new(listener.bind.unwrap_or(bind), port),
            Direction::Gateway,
        )
        .protocol(listener.protocol)
        .port(listener.port)
    };
    listeners.iter().map(spec).collect()
}

fn listen(
    server: &Server,
    parts: &Parts,
    security: &Security,
    (routes, tcp_routes): &Tables,
    spec: ListenerSpec,
) -> Result<SocketAddr, BindError> {
    let (direction, protocol) = (spec.direction(), spec.speaks());
    let stack = {
        let (parts, security, routes) = (parts.clone(), security.clone(), routes.clone());
        move |_| compose::outbound(&parts, direction, routes.clone(), security.shard())
    };
    if let ListenerProtocol::Http(_) = protocol {
        return server.listen(spec, stack);
    }
    let l4 = {
        let (parts, security, tcp_routes) = (parts.clone(), security.clone(), tcp_routes.clone());
        move || compose::l4(&parts, tcp_routes.clone(), security.shard())
    };
    match &parts.servers {
        Some(servers) if protocol == ListenerProtocol::Https => {
            let tls = security.gateway(servers);
            server.listen_with(spec, move |_| WithTls::new(tls.clone()).beside(l4()), stack)
        }
        _ => server.listen_l4(spec, move |_| l4(), stack),
    }
}

fn bind_failure(error: &BindError, flag: &str) -> Failure {
    Failure::Other(format!(
        "error: {error}\nAnother process may have the port; choose another address with {flag}."
    ))
}
