//! What holds for the requests of a route, and for those of a cluster. What is off is null, so that nobody has to know what
//! could be on.

use std::time::Duration;

use mesh_core::{ClientTls, Credential, UpstreamTls};
use serde_json::{Value, json};

use crate::cluster::{ClusterSpec, PoolSettings};
use crate::fault::{Fault, FaultScope};
use crate::mirror::{Mirror, MirrorAuthority};
use crate::outlier::OutlierDetection;
use crate::retry::RetryPolicy;
use crate::route::{ActionKind, Route};

/// Timeouts, retries, fault, mirrors.
pub(crate) fn of_route(route: &Route) -> Value {
    let action = route.action();
    let forward = match &action.kind {
        ActionKind::Forward(forward) => Some(forward),
        ActionKind::Redirect(_) | ActionKind::DirectResponse(_) => None,
    };
    json!({
        "timeout_ms": forward.and_then(|forward| forward.timeout).map(millis),
        "idle_timeout_ms": forward.and_then(|forward| forward.idle_timeout).map(millis),
        "retry": forward.and_then(|forward| retry(&forward.retry)),
        "client_overrides": forward.is_some_and(|forward| forward.client_overrides),
        "fault": action.fault.as_ref().map(fault),
        "mirrors": forward.map(|forward| forward.mirrors.iter().map(mirror).collect::<Vec<_>>()).unwrap_or_default(),
    })
}

/// Outlier detection, circuit breaker, retry budget, TLS.
pub(crate) fn of_cluster(spec: &ClusterSpec) -> Value {
    json!({
        "outlier_detection": spec.outlier_detection.as_deref().map(outlier_detection),
        "circuit_breaker": limits(&spec.pool),
        "retry_budget": spec.retry_budget.map(|budget| json!({
            "percent": budget.percent,
            "min_retry_concurrency": budget.min_retry_concurrency,
        })),
        "tls": tls(&spec.tls),
    })
}

pub(super) fn retry(policy: &RetryPolicy) -> Option<Value> {
    (policy.attempts > 0).then(|| {
        json!({
            "attempts": policy.attempts,
            "on": policy.on.to_string(),
            "per_try_timeout_ms": policy.per_try_timeout.map(millis),
        })
    })
}

pub(super) fn fault(fault: &Fault) -> Value {
    json!({
        "delay_ms": fault.delay.map(|delay| millis(delay.duration)),
        "delay_percentage": fault.delay.map(|delay| delay.percentage.to_string()),
        "abort": fault.abort.map(|abort| abort.kind.to_string()),
        "abort_percentage": fault.abort.map(|abort| abort.percentage.to_string()),
        "per_try": fault.scope == FaultScope::PerTry,
    })
}

pub(super) fn mirror(mirror: &Mirror) -> Value {
    json!({
        "cluster": mirror.name.as_str(),
        "known": mirror.cluster.is_some(),
        "percentage": mirror.percentage.to_string(),
        "sample_by": mirror.sample_by.as_ref().map(ToString::to_string),
        "compared": mirror.diff.as_ref().map(|policy| policy.percentage.to_string()),
        "authority": match &mirror.authority {
            MirrorAuthority::Keep => Value::Null,
            MirrorAuthority::Shadow => "-shadow".into(),
            MirrorAuthority::Replace(value) => String::from_utf8_lossy(value.as_bytes()).into(),
        },
    })
}

/// The limits of a cluster; null is none.
pub(super) fn limits(pool: &PoolSettings) -> Value {
    let limit = |limit: u32| (limit != u32::MAX).then_some(limit);
    json!({
        "connections": limit(pool.max_connections),
        "pending_requests": limit(pool.max_pending_requests),
        "requests": limit(pool.max_requests),
        "retries": limit(pool.max_retries),
        "requests_per_connection": pool.max_requests_per_connection,
        "connect_timeout_ms": millis(pool.connect_timeout),
    })
}

fn outlier_detection(config: &OutlierDetection) -> Value {
    let on = |threshold: u32| (threshold > 0).then_some(threshold);
    json!({
        "consecutive_5xx": on(config.consecutive_5xx),
        "consecutive_gateway": on(config.consecutive_gateway),
        "consecutive_local_origin": on(config.consecutive_local_origin).filter(|_| config.split_local_origin),
        "interval_ms": millis(config.interval),
        "base_ejection_time_ms": millis(config.base_ejection_time),
        "max_ejection_percent": config.max_ejection_percent,
        "min_health_percent": config.min_health_percent,
    })
}

/// The mode as DestinationRule names it. `AUTO` is ISTIO_MUTUAL to the endpoints that have an identity.
fn tls(tls: &UpstreamTls) -> Value {
    let shown = |mode: &str, tls: &ClientTls| {
        json!({
            "mode": mode,
            "sni": tls.sni,
            "subject_alt_names": tls.subject_alt_names,
            "insecure_skip_verify": tls.insecure_skip_verify,
        })
    };
    match tls {
        UpstreamTls::Disable => json!({"mode": "DISABLE"}),
        UpstreamTls::Auto(tls) => shown("AUTO", tls),
        UpstreamTls::Tls(tls) => match &tls.credential {
            Credential::Mesh => shown("ISTIO_MUTUAL", tls),
            Credential::Files(files) if files.certificate.is_empty() => shown("SIMPLE", tls),
            Credential::Files(_) => shown("MUTUAL", tls),
            // Whether it has a certificate of ours is known when it is read.
            _ => shown("SIMPLE or MUTUAL", tls),
        },
        other => format!("{other:?}").into(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
