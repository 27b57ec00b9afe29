//! Istio's and Kubernetes' resources as a registry.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{AppProtocol, Instance, Registry, Resolution, Service, ServicePort};
use crate::istio::types::kubernetes::{
    EndpointPort, IntOrString, SERVICE_NAME_LABEL, ServiceSpec, ServiceType,
};
use crate::istio::types::service_entry::{Location, Resolution as EntryResolution, ServiceEntry};
use crate::istio::types::workload_entry::WorkloadEntry;
use crate::istio::{Resource, ResourceSet};

/// Where a Kubernetes service says who may see it.
const EXPORT_TO: &str = "networking.istio.io/exportTo";

/// Resources seen as services of a cluster.
#[derive(Debug)]
pub struct Resources<'a> {
    set: &'a ResourceSet,
    cluster_domain: &'a str,
}

impl ResourceSet {
    /// The services that these resources define. `cluster_domain` is the suffix of Kubernetes' services.
    #[must_use]
    pub fn registry<'a>(&'a self, cluster_domain: &'a str) -> Resources<'a> {
        Resources { set: self, cluster_domain }
    }
}

impl Registry for Resources<'_> {
    fn services(&self) -> Vec<Service> {
        let slices = self.slices();
        let kubernetes = self.set.services().iter().map(|service| self.kubernetes(service, &slices));
        let entries = self.set.service_entries().iter().flat_map(|entry| self.entry(entry));
        kubernetes.chain(entries).collect()
    }
}

/// Instances by namespace and service name.
type Slices<'a> = HashMap<(&'a str, &'a str), Vec<Arc<Instance>>>;

impl Resources<'_> {
    fn slices(&self) -> Slices<'_> {
        let mut slices = Slices::new();
        for slice in self.set.endpoint_slices() {
            let Some(service) = slice.meta.labels.get(SERVICE_NAME_LABEL) else { continue };
            let ports = own_ports(&slice.spec.ports);
            let instances = slices.entry((&slice.meta.namespace, service)).or_default();
            for endpoint in slice.spec.endpoints.iter().filter(|endpoint| endpoint.conditions.is_ready()) {
                for address in &endpoint.addresses {
                    instances.push(Arc::new(Instance {
                        ports: ports.clone(),
                        locality: endpoint
                            .zone
                            .as_deref()
                            .map_or(Arc::from(""), |zone| format!("/{zone}").into()),
                        labels: slice.meta.labels.clone(),
                        ..Instance::new(address.as_str())
                    }));
                }
            }
        }
        for endpoints in self.set.endpoints() {
            // A service that has slices too is described by them: the older kind mirrors them.
            let instances = slices.entry((&endpoints.meta.namespace, &endpoints.meta.name)).or_default();
            if !instances.is_empty() {
                continue;
            }
            for subset in &endpoints.spec.subsets {
                let ports = own_ports(&subset.ports);
                instances.extend(subset.addresses.iter().map(|address| {
                    Arc::new(Instance {
                        ports: ports.clone(),
                        labels: endpoints.meta.labels.clone(),
                        ..Instance::new(address.ip.as_str())
                    })
                }));
            }
        }
        slices
    }

    fn kubernetes(&self, service: &Resource<ServiceSpec>, slices: &Slices<'_>) -> Service {
        let meta = &service.meta;
        let spec = &service.spec;
        let host = format!("{}.{}.svc.{}", meta.name, meta.namespace, self.cluster_domain);
        let ports = spec
            .ports
            .iter()
            .filter(|port| port.protocol != "UDP")
            .filter_map(|port| {
                let number = u16::try_from(port.port).ok()?;
                let target = match &port.target_port {
                    Some(IntOrString::Int(target)) if *target != 0 => u16::try_from(*target).ok()?,
                    _ => number,
                };
                Some(ServicePort {
                    number,
                    name: port.name.as_str().into(),
                    protocol: AppProtocol::of_port(port.app_protocol.as_deref(), &port.name, number),
                    target,
                })
            })
            .collect();
        let export_to = meta.annotations.get(EXPORT_TO).map_or_else(Vec::new, |text| {
            text.split(',').map(|namespace| namespace.trim().to_owned()).collect()
        });
        let export_to = self.export_to(&export_to);
        let mut instances =
            slices.get(&(meta.namespace.as_str(), meta.name.as_str())).cloned().unwrap_or_default();
        instances.extend(self.selected(&meta.namespace, &spec.selector));
        let external = spec.service_type == ServiceType::ExternalName;
        Service {
            host: host.to_ascii_lowercase().into(),
            namespace: meta.namespace.as_str().into(),
            addresses: spec.virtual_addresses().map(Arc::from).collect(),
            ports,
            resolution: if spec.is_headless() && instances.is_empty() {
                Resolution::None
            } else {
                Resolution::Static
            },
            instances,
            export_to,
            alias_of: external.then(|| spec.external_name.to_ascii_lowercase().into()),
            external,
            subject_alt_names: Vec::new(),
        }
    }

    fn entry(&self, entry: &Resource<ServiceEntry>) -> Vec<Service> {
        let spec = &entry.spec;
        let ports: Vec<_> = spec
            .ports
            .iter()
            .filter_map(|port| {
                let number = u16::try_from(port.number).ok()?;
                let target = u16::try_from(port.target_port).ok().filter(|target| *target != 0);
                Some(ServicePort {
                    number,
                    name: port.name.as_str().into(),
                    protocol: AppProtocol::of_port(Some(&port.protocol), &port.name, number),
                    target: target.unwrap_or(number),
                })
            })
            .collect();
        let mut listed: Vec<_> =
            spec.endpoints().iter().map(|endpoint| Arc::new(instance(endpoint))).collect();
        if let Some(selector) = &spec.workload_selector {
            listed.extend(self.selected(&entry.meta.namespace, &selector.labels));
        }
        let resolution = match spec.resolution {
            EntryResolution::None => Resolution::None,
            EntryResolution::Static => Resolution::Static,
            EntryResolution::Dns | EntryResolution::DynamicDns => Resolution::Dns,
            EntryResolution::DnsRoundRobin => Resolution::DnsRoundRobin,
        };
        let by_name = matches!(resolution, Resolution::Dns | Resolution::DnsRoundRobin);
        let services = spec.hosts.iter().map(|host| {
            let host = host.to_ascii_lowercase();
            let mut instances = listed.clone();
            if by_name && instances.is_empty() && !host.starts_with('*') {
                instances.push(Arc::new(Instance::new(host.as_str())));
            }
            Service {
                host: host.into(),
                namespace: entry.meta.namespace.as_str().into(),
                addresses: spec.addresses.iter().map(|address| address.as_str().into()).collect(),
                ports: ports.clone(),
                resolution,
                instances,
                export_to: self.export_to(&spec.export_to),
                alias_of: None,
                external: spec.location == Location::MeshExternal,
                subject_alt_names: spec.subject_alt_names.clone(),
            }
        });
        services.collect()
    }

    /// Who may see a service that says this, by the mesh's own list where it says nothing.
    fn export_to(&self, said: &[String]) -> Vec<String> {
        if said.is_empty() { self.set.mesh_config().default_service_export_to.clone() } else { said.to_vec() }
    }

    /// The workload entries of a namespace that a selector with labels selects.
    fn selected<'s>(
        &'s self,
        namespace: &'s str,
        selector: &'s BTreeMap<String, String>,
    ) -> impl Iterator<Item = Arc<Instance>> + 's {
        self.set
            .workload_entries()
            .iter()
            .filter(move |entry| {
                entry.meta.namespace == namespace
                    && !selector.is_empty()
                    && selector.iter().all(|(key, value)| {
                        entry.spec.labels.get(key).or_else(|| entry.meta.labels.get(key)) == Some(value)
                    })
            })
            .map(|entry| {
                let mut selected = instance(&entry.spec);
                for (key, value) in &entry.meta.labels {
                    selected.labels.entry(key.clone()).or_insert_with(|| value.clone());
                }
                Arc::new(selected)
            })
    }
}

fn instance(entry: &WorkloadEntry) -> Instance {
    Instance {
        address: entry.address.as_str().into(),
        ports: entry
            .ports
            .iter()
            .filter_map(|(name, port)| Some((Arc::from(name.as_str()), u16::try_from(*port).ok()?)))
            .collect(),
        labels: entry.labels.clone(),
        // Not written is 0, which means 1 (WE-01).
        weight: entry.weight.max(1),
        locality: entry.locality.as_str().into(),
        service_account: entry.service_account.as_str().into(),
    }
}

fn own_ports(ports: &[EndpointPort]) -> BTreeMap<Arc<str>, u16> {
    ports
        .iter()
        .filter_map(|port| Some((Arc::from(port.name.as_str()), u16::try_from(port.port?).ok()?)))
        .collect()
}
