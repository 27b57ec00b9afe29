//! `zoneAwareLbSetting` (DR-LB07): the client's region first, and within it the client's zone as far as it has room.
//!
//! **Who the other clients are.** Envoy has to know how many proxies of the client's own service each zone has. As in
//! Istio they are found only where `ISTIO_META_ENABLE_SELF_DISCOVERY` is `"true"` among the `proxyMetadata` of the mesh,
//! as the instances, in the client's region, of the first service that selects the client by its labels. Without them
//! regions count and zones do not.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::diagnostics::{Diagnostics, DocId};
use mesh_core::istio::effective::scope::is_subset;
use mesh_core::istio::types::destination_rule::ZoneAwareLbSetting;
use mesh_core::istio::types::mesh_config::MeshConfig;

use super::load_balancer::{by_labels, home};
use super::mesh::Mesh;
use crate::balance::locality::{ClientLocality, LocalityPreference};
use crate::balance::{ZoneAware, zone_aware};
use crate::cluster::ClusterSpec;

const SELF_DISCOVERY: &str = "ISTIO_META_ENABLE_SELF_DISCOVERY";

/// How many clients each locality has.
pub(super) type Clients = BTreeMap<Arc<str>, u32>;

pub(super) fn apply(
    setting: &ZoneAwareLbSetting,
    client: &ClientLocality,
    clients: &Clients,
    spec: ClusterSpec,
) -> ClusterSpec {
    if client.locality.is_empty() {
        return spec;
    }
    let preference = LocalityPreference {
        failover: setting.failover.iter().map(|one| (one.from.clone(), one.to.clone())).collect(),
        failover_priority: setting.failover_priority.clone(),
        ..LocalityPreference::default()
    };
    // A key that is kept knows no zones.
    let zones = (!clients.is_empty() && !spec.balancer.is_by_hash()).then(|| ZoneAware {
        local: client.locality.as_str().into(),
        clients: clients.clone(),
        min_cluster_size: setting.min_cluster_size.unwrap_or(zone_aware::MIN_CLUSTER_SIZE),
    });
    spec.with_zone_aware_routing(&preference, client, zones)
}

/// The clients of the service that the workload belongs to, in its region.
pub(super) fn clients(mesh: &Mesh<'_>, client: &ClientLocality) -> Clients {
    let mut clients = Clients::new();
    if !discovers_itself(mesh.config) || client.locality.is_empty() {
        return clients;
    }
    let region = |locality: &str| locality.split('/').next().unwrap_or("").to_owned();
    for instance in own_host(mesh).and_then(|host| mesh.service(&host)).into_iter().flat_map(|s| &s.instances)
    {
        let label = |key: &str| instance.labels.get(key).map(String::as_str);
        let said = Some(&*instance.locality).filter(|locality| !locality.is_empty());
        let locality = said.map(str::to_owned).or_else(|| by_labels(label)).unwrap_or_default();
        let locality = home(client, &locality).unwrap_or(locality);
        if region(&locality) == region(&client.locality) {
            *clients.entry(locality.into()).or_default() += 1;
        }
    }
    clients
}

/// The host of the first service that selects the workload.
fn own_host(mesh: &Mesh<'_>) -> Option<String> {
    let workload = &mesh.cx.workload;
    let selects =
        |labels: &BTreeMap<String, String>| !labels.is_empty() && is_subset(labels, &workload.labels);
    let service = mesh
        .set
        .services()
        .iter()
        .find(|service| service.meta.namespace == workload.namespace && selects(&service.spec.selector));
    if let Some(service) = service {
        return Some(mesh.resolve(&service.meta.name, &workload.namespace));
    }
    let entry = mesh.set.service_entries().iter().find(|entry| {
        entry.meta.namespace == workload.namespace
            && entry.spec.workload_selector.as_ref().is_some_and(|selector| selects(&selector.labels))
    });
    entry.and_then(|entry| entry.spec.hosts.first()).map(|host| host.to_ascii_lowercase())
}

fn discovers_itself(config: &MeshConfig) -> bool {
    let metadata =
        config.default_config.as_ref().and_then(|config| config.proxy_metadata.get(SELF_DISCOVERY));
    metadata.is_some_and(|value| value == "true")
}

/// Says where zones will not count although they are asked for.
pub(super) fn check(
    setting: &ZoneAwareLbSetting,
    by_hash: bool,
    config: &MeshConfig,
    doc: DocId,
    path: &str,
    diags: &mut Diagnostics,
) {
    if setting.enabled == Some(false) {
        return;
    }
    let path = format!("{path}.zoneAwareLbSetting");
    if by_hash {
        let message = "with consistentHash only the region of a client counts, and not its zone";
        diags.warning_at(doc, path, message.to_owned());
    } else if !discovers_itself(config) {
        let message = format!(
            "only the region of a client counts, and not its zone, unless {SELF_DISCOVERY} is \"true\" in the mesh's \
             defaultConfig.proxyMetadata"
        );
        diags.warning_at(doc, path, message);
    }
}
