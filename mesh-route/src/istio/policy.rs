//! DestinationRule: which rule holds for a service, and what its policies come to for one port and subset.

use std::time::Duration;

use mesh_core::UpstreamTls;
use mesh_core::istio::Resource;
use mesh_core::istio::types::destination_rule::{
    ClientTlsMode, ClientTlsSettings, ConnectionPoolSettings, DestinationRule, H2UpgradePolicy,
    LoadBalancerSettings, SimpleLb, Subset, TrafficPolicy,
};
use mesh_core::registry::{AppProtocol, Service, ServicePort};

use super::mesh::{Mesh, host_covers, selects};
use crate::cluster::{BalancerKind, ClusterSpec, PoolSettings, TcpKeepalive, UpstreamProtocol};

/// The destination rules that hold for a service: those of one host in one namespace, oldest first.
pub(super) struct Rules<'a>(Vec<&'a Resource<DestinationRule>>);

/// The blocks of a policy for one port. A block is taken whole, never merged with another's (DR-03).
#[derive(Clone, Copy, Default)]
pub(super) struct Blocks<'a> {
    load_balancer: Option<&'a LoadBalancerSettings>,
    connection_pool: Option<&'a ConnectionPoolSettings>,
    tls: Option<&'a ClientTlsSettings>,
}

impl<'a> Rules<'a> {
    /// Looks in the client's namespace, then the service's, then the root namespace; in each the most specific host
    /// counts (DR-01).
    pub(super) fn of(mesh: &Mesh<'a>, service: &Service) -> Self {
        let mut namespaces = vec![mesh.namespace(), &service.namespace, mesh.root_namespace];
        namespaces.dedup();
        for namespace in namespaces {
            let matching: Vec<_> = mesh
                .set
                .destination_rules()
                .iter()
                .filter(|rule| rule.meta.namespace == namespace && Self::applies(mesh, rule))
                .map(|rule| (mesh.resolve(&rule.spec.host, &rule.meta.namespace), rule))
                .filter(|(host, _)| host_covers(host, &service.host))
                .collect();
            // An exact host is longer than any pattern that covers it, and so is the longer of two patterns.
            let best =
                matching.iter().map(|(host, _)| host).max_by_key(|host| (!host.starts_with('*'), host.len()));
            if let Some(best) = best {
                return Self(
                    matching.iter().filter(|(host, _)| host == best).map(|(_, rule)| *rule).collect(),
                );
            }
        }
        Self(Vec::new())
    }

    /// Whether a rule is for this workload at all (DR-05).
    fn applies(mesh: &Mesh<'_>, rule: &Resource<DestinationRule>) -> bool {
        let default = &mesh.config.default_destination_rule_export_to;
        let selected = rule.spec.workload_selector.as_ref().is_none_or(|selector| {
            rule.meta.namespace == mesh.namespace()
                && selects(&selector.match_labels, &mesh.cx.workload.labels)
        });
        selected && mesh.is_exported(&rule.spec.export_to, default, &rule.meta.namespace)
    }

    /// The subsets of all rules; of two with one name the first counts (DR-02).
    pub(super) fn subsets(&self) -> Vec<&'a Subset> {
        let mut subsets: Vec<&Subset> = Vec::new();
        for subset in self.0.iter().flat_map(|rule| &rule.spec.subsets) {
            if subsets.iter().all(|known| known.name != subset.name) {
                subsets.push(subset);
            }
        }
        subsets
    }

    /// What holds for a port, of the whole service or of a subset.
    pub(super) fn blocks(&self, port: u16, subset: Option<&'a Subset>) -> Blocks<'a> {
        // The policy of the first rule counts (DR-02).
        let top = self.0.iter().find_map(|rule| rule.spec.traffic_policy.as_deref());
        let mut blocks = top.map(|policy| Blocks::of(policy, port).0).unwrap_or_default();
        if let Some(policy) = subset.and_then(|subset| subset.traffic_policy.as_deref()) {
            let (own, at_port) = Blocks::of(policy, port);
            if at_port {
                return own;
            }
            blocks.load_balancer = own.load_balancer.or(blocks.load_balancer);
            blocks.connection_pool = own.connection_pool.or(blocks.connection_pool);
            blocks.tls = own.tls.or(blocks.tls);
        }
        blocks
    }
}

impl<'a> Blocks<'a> {
    /// The blocks of a policy at a port. Those of a port replace all, so that what they leave out is the default, not
    /// the policy's (DR-04).
    fn of(policy: &'a TrafficPolicy, port: u16) -> (Self, bool) {
        let at_port = policy.port_level_settings.iter().find(|settings| {
            settings.port.as_ref().is_some_and(|selector| selector.number == u32::from(port))
        });
        match at_port {
            Some(settings) => {
                let blocks = Self {
                    load_balancer: settings.load_balancer.as_ref(),
                    connection_pool: settings.connection_pool.as_ref(),
                    tls: settings.tls.as_ref(),
                };
                (blocks, true)
            }
            None => {
                let blocks = Self {
                    load_balancer: policy.load_balancer.as_ref(),
                    connection_pool: policy.connection_pool.as_ref(),
                    tls: policy.tls.as_ref(),
                };
                (blocks, false)
            }
        }
    }

    /// Puts the blocks, or the defaults of the mesh, into a cluster.
    pub(super) fn apply(&self, mesh: &Mesh<'_>, port: &ServicePort, spec: &mut ClusterSpec) {
        spec.balancer = match self.load_balancer.and_then(|settings| settings.simple) {
            Some(SimpleLb::RoundRobin) => BalancerKind::RoundRobin,
            Some(SimpleLb::Random) => BalancerKind::Random,
            Some(SimpleLb::Passthrough) => BalancerKind::Passthrough,
            Some(SimpleLb::LeastRequest | SimpleLb::LeastConn) => BalancerKind::LeastRequest,
            Some(SimpleLb::Unspecified) | None => match mesh.cx.compat {
                mesh_core::Compat::V1_1 => BalancerKind::RoundRobin,
                _ => BalancerKind::LeastRequest,
            },
        };
        spec.pool = self.pool(mesh);
        spec.protocol = self.protocol(mesh, port.protocol);
        spec.tls = match self.tls.map(|tls| tls.mode) {
            None | Some(ClientTlsMode::Disable) => UpstreamTls::Disable,
            Some(_) => UpstreamTls::Unavailable,
        };
    }

    fn protocol(&self, mesh: &Mesh<'_>, declared: AppProtocol) -> UpstreamProtocol {
        let http = self.connection_pool.and_then(|pool| pool.http.as_ref());
        if http.is_some_and(|http| http.use_client_protocol) {
            return UpstreamProtocol::Downstream;
        }
        let upgrade = match http.map(|http| http.h2_upgrade_policy) {
            Some(H2UpgradePolicy::Upgrade) => true,
            Some(H2UpgradePolicy::DoNotUpgrade) => false,
            Some(H2UpgradePolicy::Default) | None => {
                mesh.config.h2_upgrade_policy == H2UpgradePolicy::Upgrade
            }
        };
        match declared {
            AppProtocol::Http2 => UpstreamProtocol::Http2,
            AppProtocol::Http if upgrade => UpstreamProtocol::Http2,
            // A gateway does not carry its clients' protocol into the mesh unless it is told to.
            AppProtocol::Sniff if mesh.cx.role == mesh_core::config::Role::Sidecar => {
                UpstreamProtocol::Downstream
            }
            AppProtocol::Http | AppProtocol::Tls | AppProtocol::Tcp | AppProtocol::Sniff => {
                UpstreamProtocol::Http1
            }
        }
    }

    fn pool(&self, mesh: &Mesh<'_>) -> PoolSettings {
        let tcp = self.connection_pool.and_then(|pool| pool.tcp.as_ref());
        let http = self.connection_pool.and_then(|pool| pool.http.as_ref());
        let defaults = match mesh.cx.compat {
            mesh_core::Compat::V1_1 => {
                PoolSettings { max_pending_requests: 1024, max_requests: 1024, ..PoolSettings::default() }
            }
            _ => PoolSettings::default(),
        };
        // 0 cannot be told from not written, and means the default.
        let or = |value: Option<i32>, default: u32| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
        };
        let idle = http.and_then(|http| http.idle_timeout).or_else(|| tcp.and_then(|tcp| tcp.idle_timeout));
        let keepalive = tcp.and_then(|tcp| tcp.tcp_keepalive).or(mesh.config.tcp_keepalive);
        PoolSettings {
            max_connections: or(tcp.map(|tcp| tcp.max_connections), defaults.max_connections),
            connect_timeout: tcp
                .and_then(|tcp| tcp.connect_timeout)
                .or(mesh.config.connect_timeout)
                .map_or(defaults.connect_timeout, |timeout| timeout.to_std()),
            max_pending_requests: or(
                http.map(|http| http.http1_max_pending_requests),
                defaults.max_pending_requests,
            ),
            max_requests: or(http.map(|http| http.http2_max_requests), defaults.max_requests),
            max_requests_per_connection: http
                .and_then(|http| u32::try_from(http.max_requests_per_connection).ok())
                .filter(|most| *most > 0),
            max_concurrent_streams: or(
                http.map(|http| http.max_concurrent_streams),
                defaults.max_concurrent_streams,
            ),
            idle_timeout: match idle.map(|idle| idle.to_std()) {
                None => defaults.idle_timeout,
                Some(Duration::ZERO) => None,
                some => some,
            },
            max_connection_duration: tcp
                .and_then(|tcp| tcp.max_connection_duration)
                .map(|duration| duration.to_std())
                .filter(|duration| !duration.is_zero()),
            tcp_keepalive: keepalive.map(|keepalive| TcpKeepalive {
                probes: Some(keepalive.probes).filter(|probes| *probes > 0),
                time: keepalive.time.map(|time| time.to_std()),
                interval: keepalive.interval.map(|interval| interval.to_std()),
            }),
        }
    }
}
