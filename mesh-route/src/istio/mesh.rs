//! The mesh as one workload sees it: services by host, names, scopes.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use mesh_core::config::{CompileContext, Role};
use mesh_core::istio::effective::destination_rule::{DestinationRules, EffectivePolicy, MergedRule};
use mesh_core::istio::effective::host::resolve;
use mesh_core::istio::effective::sidecar::{allows, allows_rule, sidecar_of};
use mesh_core::istio::effective::visibility::is_visible;
use mesh_core::istio::types::mesh_config::MeshConfig;
use mesh_core::istio::types::sidecar::{OutboundMode, Sidecar};
use mesh_core::istio::{Resource, ResourceSet};
use mesh_core::registry::{Registry as _, Service};

/// Everything that compiling routes looks up.
pub(super) struct Mesh<'a> {
    pub(super) set: &'a ResourceSet,
    pub(super) cx: &'a CompileContext,
    pub(super) config: &'a MeshConfig,
    services: Vec<Service>,
    by_host: HashMap<Arc<str>, Vec<usize>>,
    rules: DestinationRules<'a>,
    sidecar: Option<&'a Resource<Sidecar>>,
}

impl<'a> Mesh<'a> {
    pub(super) fn new(set: &'a ResourceSet, cx: &'a CompileContext) -> Self {
        let config: &MeshConfig = set.mesh_config();
        let root_namespace =
            if config.root_namespace.is_empty() { &cx.root_namespace } else { &config.root_namespace };
        let mut services = set.registry(&cx.cluster_domain).services();
        let mut by_host: HashMap<Arc<str>, Vec<usize>> = HashMap::new();
        for (at, service) in services.iter().enumerate() {
            by_host.entry(Arc::clone(&service.host)).or_default().push(at);
        }
        follow_aliases(&mut services, &by_host);
        let rules = DestinationRules::new(
            set.destination_rules(),
            &cx.cluster_domain,
            root_namespace,
            &config.default_destination_rule_export_to,
        );
        let sidecar = match cx.role {
            Role::Sidecar => sidecar_of(set.sidecars(), &cx.workload, root_namespace),
            Role::Gateway => None,
        };
        Self { set, cx, config, services, by_host, rules, sidecar }
    }

    /// The namespace of the workload.
    pub(super) fn namespace(&self) -> &'a str {
        &self.cx.workload.namespace
    }

    /// The services that the workload may see and of which its Sidecar imports a port, one for each host: where
    /// several namespaces have one, the workload's own counts before the others.
    pub(super) fn visible(&self) -> Vec<&Service> {
        let mut seen: HashMap<&str, usize> = HashMap::new();
        let mut visible: Vec<&Service> = Vec::new();
        for service in &self.services {
            let imported = || {
                service.ports.iter().any(|port| self.imports(&service.namespace, &service.host, port.number))
            };
            if !service.is_visible_to(self.namespace()) || !imported() {
                continue;
            }
            match seen.get(&*service.host) {
                Some(at)
                    if *service.namespace == *self.namespace()
                        && *visible[*at].namespace != *self.namespace() =>
                {
                    visible[*at] = service;
                }
                Some(_) => {}
                None => {
                    seen.insert(&service.host, visible.len());
                    visible.push(service);
                }
            }
        }
        visible
    }

    /// The service that a destination names, among those that the workload may see.
    pub(super) fn service(&self, host: &str) -> Option<&Service> {
        let candidates = self.by_host.get(host)?;
        let visible =
            || candidates.iter().map(|at| &self.services[*at]).filter(|s| s.is_visible_to(self.namespace()));
        visible().find(|service| *service.namespace == *self.namespace()).or_else(|| visible().next())
    }

    /// The destination rules that the workload uses for a service, as one.
    pub(super) fn rule(&self, service: &Service) -> Option<MergedRule<'a>> {
        self.rules.find(&self.cx.workload, &service.host, &service.namespace)
    }

    /// What `rule` and the defaults of the mesh come to for a port, of the whole service or of a subset.
    pub(super) fn policy(
        &self,
        rule: Option<&MergedRule<'a>>,
        subset: Option<&str>,
        port: u16,
    ) -> EffectivePolicy<'a> {
        let base = self.config.default_traffic_policy.as_ref();
        match rule {
            Some(rule) => rule.policy(base, subset, port),
            None => base.map(|base| EffectivePolicy::default().overridden_by(base, port)).unwrap_or_default(),
        }
    }

    /// The fully qualified form, in lower case and without a trailing dot, of a host that a rule in `namespace` names
    ///
    pub(super) fn resolve(&self, host: &str, namespace: &str) -> String {
        let host = host.strip_suffix('.').unwrap_or(host);
        match resolve(host, namespace, &self.cx.cluster_domain) {
            Cow::Borrowed(host) => host.to_ascii_lowercase(),
            Cow::Owned(mut host) => {
                host.make_ascii_lowercase();
                host
            }
        }
    }

    /// The hosts of Kubernetes' headless services, whose clients choose among the instances by themselves.
    pub(super) fn headless(&self) -> BTreeSet<String> {
        let services = self.set.services().iter().filter(|service| service.spec.is_headless());
        services
            .map(|service| {
                let (name, namespace) = (&service.meta.name, &service.meta.namespace);
                format!("{name}.{namespace}.svc.{}", self.cx.cluster_domain).to_ascii_lowercase()
            })
            .collect()
    }

    /// Whether a resource of `namespace` is exported to the workload's.
    pub(super) fn is_exported(&self, export_to: &[String], default: &[String], namespace: &str) -> bool {
        is_visible(export_to, default, namespace, self.namespace())
    }

    /// Whether the workload's Sidecar imports a host of `namespace` at `port` (SC-01). Without one, everything.
    pub(super) fn imports(&self, namespace: &str, host: &str, port: u16) -> bool {
        self.sidecar.is_none_or(|sidecar| allows(sidecar, &self.cx.workload, host, namespace, port))
    }

    /// Whether the workload's Sidecar imports a rule for a host of `namespace`.
    pub(super) fn imports_rule(&self, namespace: &str, host: &str) -> bool {
        self.sidecar.is_none_or(|sidecar| allows_rule(sidecar, &self.cx.workload, host, namespace))
    }

    /// What happens to destinations that nobody knows (SC-02).
    pub(super) fn outbound_mode(&self) -> OutboundMode {
        let sidecar = self.sidecar.and_then(|sidecar| sidecar.spec.outbound_traffic_policy.as_ref());
        sidecar.map_or_else(|| self.config.outbound_mode(), |policy| policy.mode)
    }
}

/// How many names may stand for each other in a row.
const MAX_ALIASES: usize = 10;

/// A name that stands for another service answers at the ports of that, whatever it says of its own, as in Istio.
fn follow_aliases(services: &mut [Service], by_host: &HashMap<Arc<str>, Vec<usize>>) {
    let target = |of: &Service| {
        let mut alias = Arc::clone(of.alias_of.as_ref()?);
        for _ in 0..MAX_ALIASES {
            let service = &services[*by_host.get(&alias)?.first()?];
            match &service.alias_of {
                None => return Some((alias, service.ports.clone())),
                Some(next) => alias = Arc::clone(next),
            }
        }
        None
    };
    let targets: Vec<_> = services.iter().map(target).collect();
    for (service, target) in services.iter_mut().zip(targets) {
        if let Some((target, ports)) = target {
            service.alias_of = Some(target);
            service.ports = ports;
        }
    }
}
