//! How the balancer of a cluster shares requests now: priorities, localities, panic, warm-up, ejections.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::balance::{Balancer, WarmUp, ZoneAware};
use crate::cluster::{Cluster, ClusterSpec};
use crate::endpoint::{Endpoint, Member};

/// What `spec` says of it.
pub(super) fn settings(spec: &ClusterSpec) -> Value {
    let warm_up = |warm_up: &WarmUp| {
        json!({
            "duration_ms": u64::try_from(warm_up.duration.as_millis()).unwrap_or(u64::MAX),
            "minimum_percent": warm_up.minimum_percent,
            "aggression": warm_up.aggression,
        })
    };
    let zone_aware = |zones: &ZoneAware| {
        let clients: BTreeMap<&str, u32> = zones.clients.iter().map(|(at, count)| (&**at, *count)).collect();
        json!({"local": &*zones.local, "clients": clients, "min_cluster_size": zones.min_cluster_size})
    };
    json!({
        "hash_key": spec.hash_policy.as_ref().map(ToString::to_string),
        "panic_threshold_percent": spec.outlier_detection.as_ref().map(|config| config.min_health_percent),
        "warm_up": spec.warm_up.as_ref().map(warm_up),
        "zone_aware": spec.zone_aware.as_deref().map(zone_aware),
    })
}

/// What each priority takes now, and within it each locality, where localities count.
pub(super) fn priorities(balancer: &Balancer) -> Value {
    let both = balancer.priorities().zip(balancer.localities());
    let shown = both.map(|((number, load, endpoints), localities)| {
        let localities: Vec<_> = localities
            .into_iter()
            .map(|(locality, percent)| json!({"locality": locality, "percent": percent}))
            .collect();
        json!({
            "priority": number,
            "percent": load.percent,
            "panic": load.panic,
            "endpoints": endpoints.len(),
            "available": endpoints.iter().filter(|endpoint| !endpoint.is_ejected()).count(),
            "localities": localities,
        })
    });
    shown.collect()
}

/// An endpoint of a cluster.
pub(super) fn endpoint(cluster: &Cluster, member: &Member) -> Value {
    let endpoint = &member.endpoint;
    json!({
        "address": endpoint.addr().to_string(),
        "weight": member.weight,
        "priority": member.priority,
        "locality": &*member.locality,
        "in_flight": endpoint.in_flight(),
        "connections": endpoint.connections(),
        "requests": endpoint.requests(),
        "ejected": endpoint.is_ejected(),
        "ejection": ejection(cluster, endpoint),
        "warm_up_percent": cluster.spec().warm_up.map(|warm_up| {
            let age = mesh_core::clock::now().saturating_duration_since(endpoint.since());
            (warm_up.factor(age) * 100.0).round()
        }),
    })
}

/// Why an endpoint is left out, and for how long still.
fn ejection(cluster: &Cluster, endpoint: &Endpoint) -> Option<Value> {
    let runtime = cluster.runtime().filter(|_| endpoint.is_ejected())?;
    let ejection = runtime.with_outliers(|detector| detector.ejection(&endpoint.addr()))?;
    let left = ejection.until.saturating_duration_since(mesh_core::clock::now());
    Some(json!({
        "why": ejection.evidence.to_string(),
        "times_in_a_row": ejection.times,
        "seconds_left": left.as_secs_f64(),
    }))
}
