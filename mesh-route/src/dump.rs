//! The models as the admin endpoints show them.

mod balancing;
pub(crate) mod policies;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::canary::{Canaries, CanarySpec, CanaryStatus, Measured, Totals};
use crate::cluster::{Cluster, Discovery};
use crate::mirror::MirrorOutcome;
use crate::rewrite::PathRewrite;
use crate::route::{ActionKind, Route};
use crate::runtime::ClusterRuntime;
use crate::table::RouteTable;
use crate::tcp::{TcpRoute, TcpRouteTable};

/// Clusters with their endpoints, limits and counters, by name. Of several of one name, which share their state, the
/// last is shown.
#[must_use]
pub fn clusters<'c>(clusters: impl IntoIterator<Item = &'c Arc<Cluster>>) -> Value {
    let by_name: BTreeMap<&str, &Arc<Cluster>> =
        clusters.into_iter().map(|cluster| (cluster.name().as_str(), cluster)).collect();
    json!({ "clusters": by_name.into_values().map(|cluster| self::cluster(cluster)).collect::<Vec<_>>() })
}

/// The virtual hosts of a table with their routes, by port. A host that answers to several names is shown once.
#[must_use]
pub fn routes(table: &RouteTable) -> Value {
    let mut hosts: Vec<Shown<'_>> = Vec::new();
    for (port, pattern, host) in table.iter() {
        match hosts.iter_mut().find(|(at, name, ..)| *at == port && *name == host.name()) {
            Some((_, _, domains, _)) => domains.push(pattern),
            None => {
                let routes = host.routes().iter().map(|route| self::route(route)).collect();
                hosts.push((port, host.name(), vec![pattern], routes));
            }
        }
    }
    json!({
        "virtual_hosts": hosts.into_iter().map(|(port, name, domains, routes)| json!({
            "port": port,
            "name": name,
            "domains": domains,
            "routes": routes,
        })).collect::<Vec<_>>(),
        "unknown": table.unknown().map(|unknown| route(unknown)),
    })
}

/// The routes of connections that are not HTTP, by port.
#[must_use]
pub fn tcp_routes(table: &TcpRouteTable) -> Value {
    let shown = |route: &TcpRoute| {
        let destinations: Vec<_> = route
            .destinations()
            .iter()
            .map(|(weight, to)| json!({"cluster": to.name.as_str(), "weight": weight, "known": to.cluster.is_some()}))
            .collect();
        json!({"name": route.name(), "match": route.matcher().to_string(), "destinations": destinations})
    };
    let ports: Vec<_> = table
        .iter()
        .map(|(port, route)| {
            let mut shown = shown(route);
            shown["port"] = port.into();
            shown
        })
        .collect();
    json!({ "routes": ports, "unknown": table.unknown().map(|unknown| shown(unknown)) })
}

/// Where the rollouts of canaries stand, with their evidence and what was decided.
#[must_use]
pub fn canaries(canaries: &Canaries) -> Value {
    let now = mesh_core::clock::now();
    let ago = |at| now.saturating_duration_since(at).as_secs_f64();
    let measured = |measured: Measured| {
        json!({
            "successes": measured.successes,
            "failures": measured.failures,
            "mean_latency_ms": measured.mean_latency().map(|mean| mean.as_secs_f64() * 1e3),
        })
    };
    let total = |total: Totals| json!({"successes": total.successes, "failures": total.failures});
    let shown = |canary: CanaryStatus| {
        let CanarySpec { name, stable, canary: of_canary, run, interval, policy } = &*canary.spec;
        json!({
            "name": &**name,
            "canary": &**of_canary,
            "stable": &**stable,
            "run": &**run,
            "share": canary.share,
            "phase": canary.phase.to_string(),
            "step": canary.step,
            "steps": policy.steps,
            "interval_seconds": interval.as_secs_f64(),
            "seconds_in_step": ago(canary.since),
            "evidence": {
                "likelihood_ratio": canary.evidence,
                "rolled_back_at": 1.0 / policy.alpha,
                "canary": measured(canary.canary),
                "stable": measured(canary.stable),
            },
            "total": {"canary": total(canary.canary_total), "stable": total(canary.stable_total)},
            "events": canary.events.iter().map(|event| json!({
                "seconds_ago": ago(event.at),
                "share": event.share,
                "phase": event.phase.to_string(),
                "what": event.to_string(),
                "canary": measured(event.canary),
                "stable": measured(event.stable),
            })).collect::<Vec<_>>(),
        })
    };
    json!({ "canaries": canaries.status().into_iter().map(shown).collect::<Vec<_>>() })
}

/// Port, name, domains and routes of a virtual host.
type Shown<'t> = (Option<u16>, &'t str, Vec<String>, Vec<Value>);

fn cluster(cluster: &Cluster) -> Value {
    let spec = cluster.spec();
    let set = cluster.endpoints();
    let endpoints: Vec<_> = set.members().map(|member| balancing::endpoint(cluster, member)).collect();
    let discovery = match &spec.discovery {
        Discovery::Static(_) => "static",
        Discovery::StrictDns(_) => "strict_dns",
        Discovery::LogicalDns(_) => "logical_dns",
        Discovery::OriginalDst | Discovery::OriginalDstPort(_) => "original_dst",
        Discovery::BlackHole => "black_hole",
    };
    json!({
        "name": spec.name.as_str(),
        "discovery": discovery,
        "balancer": format!("{:?}", spec.balancer),
        "balancing": balancing::settings(spec),
        "priorities": cluster.balancer().map(|balancer| balancing::priorities(&balancer)),
        "protocol": format!("{:?}", spec.protocol),
        "tls": format!("{:?}", spec.tls),
        "endpoints": endpoints,
        "limits": policies::limits(&spec.pool),
        "now": cluster.runtime().map(|runtime| json!({
            "connections": runtime.connections(),
            "pending_requests": runtime.pending(),
            "requests": runtime.requests(),
            "overflows": runtime.overflows(),
            "retries": runtime.retries(),
            "retried": runtime.retried(),
            "retry_overflows": runtime.retry_overflows(),
        })),
        "mirrored": cluster.runtime().filter(|runtime| !runtime.mirrors().is_empty()).map(|runtime| mirrored(runtime)),
        "outlier_detection": cluster.runtime().filter(|_| spec.outlier_detection.is_some()).map(|runtime| outliers(runtime)),
    })
}

/// What became of the copies that a cluster was to get.
fn mirrored(runtime: &ClusterRuntime) -> Value {
    let counted = MirrorOutcome::ALL
        .map(|outcome| (outcome.as_str().to_owned(), runtime.mirrors().get(outcome).into()));
    Value::Object(counted.into_iter().collect())
}

/// Who is ejected, and the last decisions with their evidence.
fn outliers(runtime: &ClusterRuntime) -> Value {
    let now = mesh_core::clock::now();
    runtime.with_outliers(|detector| {
        json!({
            "ejected": detector.ejected(),
            "ejections": detector.ejections(),
            "prevented": detector.prevented(),
            "events": detector.events().map(|event| json!({
                "endpoint": event.endpoint.to_string(),
                "seconds_ago": now.saturating_duration_since(event.at).as_secs_f64(),
                "what": event.kind.to_string(),
            })).collect::<Vec<_>>(),
        })
    })
}

fn route(route: &Route) -> Value {
    let action = match &route.action().kind {
        ActionKind::Forward(forward) => {
            let destinations: Vec<_> = forward
                .destinations
                .iter()
                .map(|(weight, to)| json!({"cluster": to.name.as_str(), "weight": weight, "known": to.cluster.is_some()}))
                .collect();
            json!({
                "destinations": destinations,
                "canary": forward.canary.as_ref().map(|canary| canary.spec().name.to_string()),
                "sticky": forward.sticky.as_ref().map(ToString::to_string),
                "retry": policies::retry(&forward.retry),
                "timeout_ms": forward.timeout.map(|timeout| timeout.as_millis() as u64),
                "rewrites_path": !matches!(forward.rewrite.path, PathRewrite::Keep),
                "authority": forward.rewrite.authority.as_ref().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()),
            })
        }
        ActionKind::Redirect(redirect) => json!({"redirect": redirect.code.as_u16()}),
        ActionKind::DirectResponse(direct) => json!({"direct_response": direct.status.as_u16()}),
    };
    let mut shown = json!({"name": route.name(), "match": route.matcher().to_string(), "action": action});
    if let ActionKind::Forward(forward) = &route.action().kind
        && !forward.mirrors.is_empty()
    {
        shown["mirrors"] = forward.mirrors.iter().map(policies::mirror).collect();
    }
    if let Some(fault) = &route.action().fault {
        shown["fault"] = policies::fault(fault);
    }
    if route.action().cors.is_some() {
        shown["cors"] = true.into();
    }
    shown
}
