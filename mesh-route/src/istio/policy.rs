//! What the policy of a destination comes to for one cluster, with the defaults of the mesh below it.

use std::time::Duration;

use mesh_core::UpstreamTls;
use mesh_core::config::Role;
use mesh_core::istio::effective::destination_rule::EffectivePolicy;
use mesh_core::istio::types::destination_rule::{ClientTlsMode, H2UpgradePolicy, SimpleLb};
use mesh_core::registry::{AppProtocol, ServicePort};

use super::mesh::Mesh;
use crate::cluster::{BalancerKind, ClusterSpec, PoolSettings, TcpKeepalive, UpstreamProtocol};

/// Puts a policy into a cluster.
pub(super) fn apply(
    policy: &EffectivePolicy<'_>,
    mesh: &Mesh<'_>,
    port: &ServicePort,
    spec: &mut ClusterSpec,
) {
    spec.balancer = match policy.load_balancer.and_then(|settings| settings.simple) {
        Some(SimpleLb::RoundRobin) => BalancerKind::RoundRobin,
        Some(SimpleLb::Random) => BalancerKind::Random,
        Some(SimpleLb::Passthrough) => BalancerKind::Passthrough,
        Some(SimpleLb::LeastRequest | SimpleLb::LeastConn) => BalancerKind::LeastRequest,
        Some(SimpleLb::Unspecified) | None => match mesh.cx.compat {
            mesh_core::Compat::V1_1 => BalancerKind::RoundRobin,
            _ => BalancerKind::LeastRequest,
        },
    };
    spec.pool = pool(policy, mesh);
    if let Some(rate) = mesh.config.dns_refresh_rate {
        spec.dns_refresh_rate = rate.to_std();
    }
    spec.protocol = protocol(policy, mesh, port.protocol);
    spec.tls = match policy.tls.map(|tls| tls.mode) {
        None | Some(ClientTlsMode::Disable) => UpstreamTls::Disable,
        Some(_) => UpstreamTls::Unavailable,
    };
}

fn protocol(policy: &EffectivePolicy<'_>, mesh: &Mesh<'_>, declared: AppProtocol) -> UpstreamProtocol {
    let http = policy.connection_pool.and_then(|pool| pool.http.as_ref());
    if http.is_some_and(|http| http.use_client_protocol) {
        return UpstreamProtocol::Downstream;
    }
    let upgrade = match http.map(|http| http.h2_upgrade_policy) {
        Some(H2UpgradePolicy::Upgrade) => true,
        Some(H2UpgradePolicy::DoNotUpgrade) => false,
        Some(H2UpgradePolicy::Default) | None => mesh.config.h2_upgrade_policy == H2UpgradePolicy::Upgrade,
    };
    match declared {
        AppProtocol::Http2 => UpstreamProtocol::Http2,
        AppProtocol::Http if upgrade => UpstreamProtocol::Http2,
        // A gateway does not carry its clients' protocol into the mesh unless it is told to.
        AppProtocol::Sniff if mesh.cx.role == Role::Sidecar => UpstreamProtocol::Downstream,
        AppProtocol::Http | AppProtocol::Tls | AppProtocol::Tcp | AppProtocol::Sniff => {
            UpstreamProtocol::Http1
        }
    }
}

fn pool(policy: &EffectivePolicy<'_>, mesh: &Mesh<'_>) -> PoolSettings {
    let tcp = policy.connection_pool.and_then(|pool| pool.tcp.as_ref());
    let http = policy.connection_pool.and_then(|pool| pool.http.as_ref());
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
            .unwrap_or_else(|| mesh.config.connect_timeout())
            .to_std(),
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
        tcp_idle_timeout: match tcp.and_then(|tcp| tcp.idle_timeout).map(|idle| idle.to_std()) {
            None => defaults.tcp_idle_timeout,
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
