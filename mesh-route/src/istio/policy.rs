//! What the policy of a destination comes to for one cluster, with the defaults of the mesh below it.

use std::time::Duration;

use mesh_core::config::Role;
use mesh_core::istio::effective::destination_rule::EffectivePolicy;
use mesh_core::istio::types::destination_rule::{self as istio, H2UpgradePolicy};
use mesh_core::registry::{AppProtocol, ServicePort};

use super::mesh::Mesh;
use crate::cluster::{ClusterSpec, Http2Keepalive, PoolSettings, TcpKeepalive, UpstreamProtocol};
use crate::outlier::OutlierDetection;
use crate::retry::RetryBudget;

/// Puts a policy into a cluster.
pub(super) fn apply(
    policy: &EffectivePolicy<'_>,
    mesh: &Mesh<'_>,
    port: &ServicePort,
    spec: &mut ClusterSpec,
) {
    spec.pool = pool(policy, mesh);
    if let Some(rate) = mesh.config.dns_refresh_rate.filter(|rate| !rate.is_zero()) {
        spec.dns_refresh_rate = rate.to_std();
    }
    spec.outlier_detection =
        policy.outlier_detection.map(|settings| Box::new(outlier_detection(settings, mesh)));
    spec.retry_budget = policy.retry_budget.map(retry_budget);
    spec.protocol = protocol(policy, mesh, port.protocol);
}

fn protocol(policy: &EffectivePolicy<'_>, mesh: &Mesh<'_>, declared: AppProtocol) -> UpstreamProtocol {
    let http = policy.connection_pool.and_then(|pool| pool.http.as_ref());
    if http.is_some_and(|http| http.use_client_protocol) {
        return UpstreamProtocol::Downstream;
    }
    let asked = http.map_or(H2UpgradePolicy::Default, |http| http.h2_upgrade_policy);
    let of_mesh =
        asked == H2UpgradePolicy::Default && mesh.config.h2_upgrade_policy == H2UpgradePolicy::Upgrade;
    match declared {
        AppProtocol::Http2 => UpstreamProtocol::Http2,
        AppProtocol::Http if of_mesh => UpstreamProtocol::Http2,
        // Whose own rule asks for it knows that the port is HTTP; the mesh does not.
        AppProtocol::Http | AppProtocol::Sniff if asked == H2UpgradePolicy::Upgrade => {
            UpstreamProtocol::Http2
        }
        // A gateway does not carry its clients' protocol into the mesh unless it is told to.
        AppProtocol::Sniff if mesh.cx.role == Role::Sidecar => UpstreamProtocol::Downstream,
        AppProtocol::Http | AppProtocol::Tls | AppProtocol::Tcp | AppProtocol::Sniff => {
            UpstreamProtocol::Http1
        }
    }
}

fn outlier_detection(settings: &istio::OutlierDetection, mesh: &Mesh<'_>) -> OutlierDetection {
    let defaults = OutlierDetection::default();
    // In 1.1 the one threshold was that of gateway errors, and it still is where it is the only one that is given.
    let legacy = u32::try_from(settings.consecutive_errors).ok().filter(|errors| *errors > 0);
    let (default_5xx, default_gateway) = match (legacy, mesh.cx.compat) {
        (Some(errors), _) if settings.consecutive_gateway_errors.is_none() => (0, errors),
        (None, mesh_core::Compat::V1_1) => (0, defaults.consecutive_5xx),
        _ => (defaults.consecutive_5xx, 0),
    };
    let or = |value: Option<Duration>, default| value.filter(|value| !value.is_zero()).unwrap_or(default);
    OutlierDetection {
        consecutive_5xx: settings.consecutive_5xx_errors.unwrap_or(default_5xx),
        consecutive_gateway: settings.consecutive_gateway_errors.unwrap_or(default_gateway),
        consecutive_local_origin: settings
            .consecutive_local_origin_failures
            .unwrap_or(defaults.consecutive_local_origin),
        split_local_origin: settings.split_external_local_origin_errors,
        interval: or(settings.interval.map(|interval| interval.to_std()), defaults.interval),
        base_ejection_time: or(
            settings.base_ejection_time.map(|time| time.to_std()),
            defaults.base_ejection_time,
        ),
        max_ejection_time: defaults.max_ejection_time,
        max_ejection_percent: u32::try_from(settings.max_ejection_percent)
            .ok()
            .filter(|percent| *percent > 0)
            .unwrap_or(defaults.max_ejection_percent),
        min_health_percent: match (u32::try_from(settings.min_health_percent), mesh.cx.compat) {
            (Ok(0) | Err(_), mesh_core::Compat::V1_1) => 50,
            (Ok(percent), _) => percent,
            (Err(_), _) => 0,
        },
        error_codes: settings
            .outlier_detection_http_error_codes
            .iter()
            .filter_map(|code| u16::try_from(*code).ok())
            .collect(),
    }
}

fn retry_budget(settings: &istio::RetryBudget) -> RetryBudget {
    let defaults = RetryBudget::default();
    RetryBudget {
        percent: settings.percent.map_or(defaults.percent, |percent| percent.value),
        min_retry_concurrency: match settings.min_retry_concurrency {
            0 => defaults.min_retry_concurrency,
            concurrency => concurrency,
        },
        interval: settings.budget_interval.map(|interval| interval.to_std()).unwrap_or_default(),
    }
}

fn pool(policy: &EffectivePolicy<'_>, mesh: &Mesh<'_>) -> PoolSettings {
    let tcp = policy.connection_pool.and_then(|pool| pool.tcp.as_ref());
    let http = policy.connection_pool.and_then(|pool| pool.http.as_ref());
    let defaults = match mesh.cx.compat {
        mesh_core::Compat::V1_1 => PoolSettings {
            max_pending_requests: 1024,
            max_requests: 1024,
            max_retries: 1024,
            ..PoolSettings::default()
        },
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
        max_retries: or(http.map(|http| http.max_retries), defaults.max_retries),
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
        http2_keepalive: http.and_then(|http| http.http2_keepalive).and_then(|keepalive| {
            Some(Http2Keepalive {
                interval: keepalive.interval?.to_std(),
                timeout: keepalive.timeout?.to_std(),
            })
        }),
    }
}
