//! `loadBalancer`: the algorithm, the key, localities and warm-up (DR-LB01 to DR-LB10).
//!
//! **Consistent hash and locality** (DR-LB05). In Istio outlier detection turns locality load balancing on, and with
//! priorities the same key goes to different endpoints for clients in different zones (istio/istio#41674). Here a cluster
//! that goes by keys takes part in locality load balancing only when its own rule asks for it, which is warned about.

use std::sync::Arc;

use http::HeaderName;
use mesh_core::Compat;
use mesh_core::config::Workload;
use mesh_core::diagnostics::Diagnostics;
use mesh_core::istio::ResourceSet;
use mesh_core::istio::effective::destination_rule::{EffectivePolicy, MergedRule};
use mesh_core::istio::types::destination_rule::{
    ConsistentHashLb, LoadBalancerSettings, LocalityLbSetting, SimpleLb, TrafficPolicy,
};

use super::mesh::Mesh;
use super::{annotations, zone_aware};
use crate::balance::locality::{ClientLocality, Distribution, LocalityPreference, REGION, SUBZONE, ZONE};
use crate::balance::{WarmUp, maglev, ring_hash};
use crate::cluster::{BalancerKind, ClusterSpec, Discovery};
use crate::hash_policy::{HashCookie, HashPolicy};

/// The labels by which a workload names its locality itself, with `.` in place of `/`; the first counts.
const ISTIO_LOCALITY: [&str; 2] = ["topology.istio.io/locality", "istio-locality"];

/// The client of a table.
pub(super) struct Client {
    pub(super) place: ClientLocality,
    /// The others of its service, for zone aware routing.
    pub(super) siblings: zone_aware::Clients,
}

/// Puts the load balancing of a policy into a cluster, as the client sees it.
pub(super) fn apply(
    policy: &EffectivePolicy<'_>,
    rule: Option<&MergedRule<'_>>,
    mesh: &Mesh<'_>,
    client: &Client,
    mut spec: ClusterSpec,
) -> ClusterSpec {
    let Client { place: client, siblings } = client;
    let settings = policy.load_balancer;
    let hash = settings.and_then(|settings| settings.consistent_hash.as_ref());
    spec.balancer = match hash {
        Some(hash) => table(hash),
        None => simple(settings, rule, mesh.cx.compat),
    };
    spec.hash_policy = hash.and_then(|hash| key(hash).ok().flatten()).map(Box::new);
    spec.warm_up = settings
        .and_then(warm_up)
        .filter(|_| matches!(spec.balancer, BalancerKind::RoundRobin | BalancerKind::LeastRequest));
    locate(client, &mut spec);
    let own = settings.and_then(|settings| settings.locality_lb_setting.as_ref());
    // What the rule says of either comes before what the mesh says of both.
    let zones = settings.and_then(|settings| settings.zone_aware_lb_setting.as_ref());
    let of_mesh = mesh.config.zone_aware_lb_setting.as_ref().filter(|_| own.is_none() && hash.is_none());
    if let Some(zones) = zones.or(of_mesh).filter(|zones| zones.enabled != Some(false)) {
        return zone_aware::apply(zones, client, siblings, spec);
    }
    let setting = match (own, hash) {
        (Some(own), _) => Some(own),
        (None, Some(_)) => return spec,
        (None, None) => mesh.config.locality_lb_setting.as_ref(),
    };
    if setting.and_then(|setting| setting.enabled) == Some(false) {
        return spec;
    }
    let preference = setting.map(preference).unwrap_or_default();
    // Without outlier detection nobody would ever be left for the next priority, so none are made.
    if preference.distribute.is_empty() && policy.outlier_detection.is_none() {
        return spec;
    }
    // Of a client without a place only labels can be near.
    if client.locality.is_empty() && preference == LocalityPreference::default() {
        return spec;
    }
    spec.with_locality_preference(&preference, client)
}

impl Client {
    pub(super) fn of(mesh: &Mesh<'_>) -> Self {
        let place = place(&mesh.cx.workload);
        Self { siblings: zone_aware::clients(mesh, &place), place }
    }
}

/// Where a workload is, by its labels.
fn place(workload: &Workload) -> ClientLocality {
    let label = |key: &str| workload.labels.get(key).map(String::as_str);
    ClientLocality { locality: by_labels(label).unwrap_or_default(), labels: workload.labels.clone() }
}

/// Says what of the load balancing of destination rules cannot be as it is written.
pub(super) fn check(set: &ResourceSet, diags: &mut Diagnostics) {
    for resource in set.destination_rules() {
        let subsets = resource.spec.subsets.iter().enumerate().map(|(at, subset)| {
            (format!("spec.subsets[{at}].trafficPolicy"), subset.traffic_policy.as_deref())
        });
        let whole = ("spec.trafficPolicy".to_owned(), resource.spec.traffic_policy.as_deref());
        for (path, policy) in std::iter::once(whole).chain(subsets) {
            for (path, settings) in policy.into_iter().flat_map(|policy| all(&path, policy)) {
                let path = format!("{path}.loadBalancer");
                check_one(settings, &path, |path, severity| match severity {
                    Finding::Error(message) => diags.error_at(resource.doc, path, message),
                    Finding::Warning(message) => diags.warning_at(resource.doc, path, message),
                });
                if let Some(setting) = &settings.zone_aware_lb_setting {
                    let by_hash = settings.consistent_hash.is_some();
                    zone_aware::check(setting, by_hash, set.mesh_config(), resource.doc, &path, diags);
                }
            }
        }
    }
}

enum Finding {
    Error(String),
    Warning(String),
}

/// The load balancing of a policy and of its ports.
fn all<'p>(
    path: &str,
    policy: &'p TrafficPolicy,
) -> impl Iterator<Item = (String, &'p LoadBalancerSettings)> {
    let ports = policy.port_level_settings.iter().enumerate().map({
        let path = path.to_owned();
        move |(at, port)| (format!("{path}.portLevelSettings[{at}]"), port.load_balancer.as_ref())
    });
    std::iter::once((path.to_owned(), policy.load_balancer.as_ref()))
        .chain(ports)
        .filter_map(|(path, settings)| Some((path, settings?)))
}

fn check_one(settings: &LoadBalancerSettings, path: &str, mut say: impl FnMut(String, Finding)) {
    let Some(hash) = &settings.consistent_hash else { return };
    let path = format!("{path}.consistentHash");
    if let Err((field, reason)) = key(hash) {
        say(format!("{path}.{field}"), Finding::Error(reason));
    }
    let locality = settings.locality_lb_setting.as_ref();
    if locality.is_some_and(|setting| setting.enabled != Some(false)) {
        let message = "with localityLbSetting a key is kept only within the endpoints that are near a client, and \
                       moves with their health";
        say(path, Finding::Warning(message.to_owned()));
    }
}

fn simple(
    settings: Option<&LoadBalancerSettings>,
    rule: Option<&MergedRule<'_>>,
    compat: Compat,
) -> BalancerKind {
    let annotated = || {
        let rules = rule.into_iter().flat_map(|rule| &rule.rules);
        let mut values = rules.filter_map(|rule| rule.meta.annotations.get(annotations::LOAD_BALANCER));
        values.next().is_some_and(|value| value == annotations::PEAK_EWMA)
    };
    match settings.and_then(|settings| settings.simple) {
        Some(SimpleLb::RoundRobin) => BalancerKind::RoundRobin,
        Some(SimpleLb::Random) => BalancerKind::Random,
        Some(SimpleLb::Passthrough) => BalancerKind::Passthrough,
        Some(SimpleLb::LeastRequest | SimpleLb::LeastConn) => BalancerKind::LeastRequest,
        Some(SimpleLb::Unspecified) | None if annotated() => BalancerKind::PeakEwma,
        Some(SimpleLb::Unspecified) | None => match compat {
            Compat::V1_1 => BalancerKind::RoundRobin,
            _ => BalancerKind::LeastRequest,
        },
    }
}

fn table(hash: &ConsistentHashLb) -> BalancerKind {
    if let Some(maglev) = &hash.maglev {
        let size = maglev.table_size.and_then(|size| u32::try_from(size).ok()).filter(|size| *size > 0);
        return BalancerKind::Maglev { table_size: size.unwrap_or(maglev::TABLE_SIZE) };
    }
    let size = hash.ring_hash.map_or(hash.minimum_ring_size, |ring| ring.minimum_ring_size);
    // Not written is 0, which means the default.
    BalancerKind::RingHash { minimum_size: if size == 0 { ring_hash::MINIMUM_SIZE } else { size } }
}

/// Where the key is; what is wrong with it, by field.
fn key(hash: &ConsistentHashLb) -> Result<Option<HashPolicy>, (&'static str, String)> {
    if let Some(name) = &hash.http_header_name {
        let name = HeaderName::try_from(name.as_str())
            .map_err(|error| ("httpHeaderName", format!("{name:?}: {error}")))?;
        return Ok(Some(HashPolicy::Header(name)));
    }
    if let Some(cookie) = &hash.http_cookie {
        let attributes = cookie.attributes.iter().map(|one| (one.name.clone(), one.value.clone())).collect();
        let cookie = HashCookie {
            name: cookie.name.as_str().into(),
            ttl: cookie.ttl.map(|ttl| ttl.to_std()),
            path: cookie.path.as_str().into(),
            attributes,
        };
        if cookie.set_cookie(0).is_none() {
            return Err(("httpCookie", "cannot stand in a header".to_owned()));
        }
        return Ok(Some(HashPolicy::Cookie(cookie)));
    }
    if let Some(name) = &hash.http_query_parameter_name {
        return Ok(Some(HashPolicy::QueryParameter(name.as_str().into())));
    }
    Ok(hash.use_source_ip.filter(|used| *used).map(|_| HashPolicy::SourceIp))
}

fn warm_up(settings: &LoadBalancerSettings) -> Option<WarmUp> {
    let of = |duration: mesh_core::istio::types::common::Duration| WarmUp::new(duration.to_std());
    match (&settings.warmup, settings.warmup_duration_secs) {
        (Some(warmup), _) => {
            let defaults = of(warmup.duration?);
            Some(WarmUp {
                minimum_percent: warmup.minimum_percent.unwrap_or(defaults.minimum_percent),
                aggression: warmup.aggression.unwrap_or(defaults.aggression),
                ..defaults
            })
        }
        (None, duration) => duration.map(of),
    }
    .filter(|warm_up| !warm_up.duration.is_zero())
}

fn preference(setting: &LocalityLbSetting) -> LocalityPreference {
    LocalityPreference {
        distribute: setting
            .distribute
            .iter()
            .map(|one| Distribution { from: one.from.clone(), to: one.to.clone() })
            .collect(),
        failover: setting.failover.iter().map(|one| (one.from.clone(), one.to.clone())).collect(),
        failover_priority: setting.failover_priority.clone(),
    }
}

/// `region/zone/subzone` by the labels of a workload; `None` when they say nothing.
pub(super) fn by_labels<'l>(label: impl Fn(&str) -> Option<&'l str>) -> Option<String> {
    if let Some(locality) = ISTIO_LOCALITY.into_iter().find_map(&label).filter(|own| !own.is_empty()) {
        let own = if locality.contains('/') { locality.to_owned() } else { locality.replace('.', "/") };
        return Some(own);
    }
    let [region, zone, subzone] = [REGION, ZONE, SUBZONE].map(|key| label(key).unwrap_or_default());
    let locality = format!("{region}/{zone}/{subzone}");
    Some(locality.trim_end_matches('/').to_owned()).filter(|locality| !locality.is_empty())
}

/// Where endpoints are that do not say it themselves: by their labels; and the region of a zone without one,
/// because Kubernetes' endpoints know only their zone.
fn locate(client: &ClientLocality, spec: &mut ClusterSpec) {
    let place = |locality: &mut Arc<str>, labels: &[(String, String)]| {
        let label = |key: &str| labels.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        if locality.is_empty() {
            if let Some(labelled) = by_labels(label) {
                *locality = labelled.into();
            }
        } else if let Some(home) = home(client, locality) {
            *locality = home.into();
        }
    };
    match &mut spec.discovery {
        Discovery::Static(endpoints) => {
            for endpoint in endpoints {
                place(&mut endpoint.locality, &endpoint.labels);
            }
        }
        Discovery::StrictDns(names) => {
            for name in names {
                place(&mut name.locality, &name.labels);
            }
        }
        _ => {}
    }
}

/// The locality of which only the zone is known: in the client's region, because Kubernetes says zones of its own nodes,
/// and one cluster is hardly ever in two regions. `None` when the region is known, or the client's is not.
pub(super) fn home(client: &ClientLocality, locality: &str) -> Option<String> {
    let zone = locality.strip_prefix('/')?;
    let region = client.locality.split('/').next().filter(|region| !region.is_empty())?;
    Some(format!("{region}/{zone}"))
}
