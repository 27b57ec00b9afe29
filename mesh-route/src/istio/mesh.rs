//! The mesh as one workload sees it: services by host, names, scopes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mesh_core::config::CompileContext;
use mesh_core::istio::types::mesh_config::MeshConfig;
use mesh_core::istio::types::sidecar::{OutboundMode, Sidecar};
use mesh_core::istio::{Resource, ResourceSet};
use mesh_core::registry::{Registry as _, Service};

/// Everything that compiling routes looks up.
pub(super) struct Mesh<'a> {
    pub(super) set: &'a ResourceSet,
    pub(super) cx: &'a CompileContext,
    pub(super) config: &'a MeshConfig,
    pub(super) root_namespace: &'a str,
    services: Vec<Service>,
    by_host: HashMap<Arc<str>, Vec<usize>>,
    sidecar: Option<&'a Resource<Sidecar>>,
}

impl<'a> Mesh<'a> {
    pub(super) fn new(set: &'a ResourceSet, cx: &'a CompileContext) -> Self {
        let config: &MeshConfig = set.mesh_config();
        let root_namespace =
            if config.root_namespace.is_empty() { &cx.root_namespace } else { &config.root_namespace };
        let services = set.registry(&cx.cluster_domain).services();
        let mut by_host: HashMap<Arc<str>, Vec<usize>> = HashMap::new();
        for (at, service) in services.iter().enumerate() {
            by_host.entry(Arc::clone(&service.host)).or_default().push(at);
        }
        let sidecar = match cx.role {
            mesh_core::config::Role::Sidecar => sidecar(set, cx, root_namespace),
            mesh_core::config::Role::Gateway => None,
        };
        Self { set, cx, config, root_namespace, services, by_host, sidecar }
    }

    /// The namespace of the workload.
    pub(super) fn namespace(&self) -> &'a str {
        &self.cx.workload.namespace
    }

    /// The services that the workload may see and that its Sidecar imports, one for each host: where several
    /// namespaces have one, the workload's own counts before the others.
    pub(super) fn visible(&self) -> Vec<&Service> {
        let mut seen: HashMap<&str, usize> = HashMap::new();
        let mut visible: Vec<&Service> = Vec::new();
        for service in &self.services {
            if !service.is_visible_to(self.namespace()) || !self.imports(&service.namespace, &service.host) {
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

    /// The fully qualified form of a host that a rule in `namespace` names.
    pub(super) fn resolve(&self, host: &str, namespace: &str) -> String {
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        if host.contains('.') || host.starts_with('*') || host.contains(':') {
            return host;
        }
        format!("{host}.{namespace}.svc.{}", self.cx.cluster_domain)
    }

    /// Whether a resource of `namespace` is exported to the workload's.
    pub(super) fn is_exported(&self, export_to: &[String], default: &[String], namespace: &str) -> bool {
        let export_to = if export_to.is_empty() { default } else { export_to };
        export_to.is_empty()
            || export_to.iter().any(|to| match to.as_str() {
                "*" => true,
                "." => namespace == self.namespace(),
                other => other == self.namespace(),
            })
    }

    /// Whether the workload's Sidecar imports a host of `namespace` (SC-01). Without one, everything.
    pub(super) fn imports(&self, namespace: &str, host: &str) -> bool {
        let Some(sidecar) = self.sidecar else { return true };
        if sidecar.spec.egress.is_empty() {
            return true;
        }
        let scopes =
            || sidecar.spec.egress.iter().flat_map(|egress| &egress.hosts).filter_map(|h| h.split_once('/'));
        let covers = |pattern: &str| host_covers(pattern, host);
        let excluded = scopes().any(|(scope, pattern)| {
            scope.strip_prefix('~').is_some_and(|scope| {
                !scope.is_empty() && in_scope(scope, namespace, self.namespace()) && covers(pattern)
            })
        });
        !excluded
            && scopes()
                .any(|(scope, pattern)| in_scope(scope, namespace, self.namespace()) && covers(pattern))
    }

    /// What happens to destinations that nobody knows (SC-02).
    pub(super) fn outbound_mode(&self) -> OutboundMode {
        let sidecar = self.sidecar.and_then(|sidecar| sidecar.spec.outbound_traffic_policy.as_ref());
        sidecar
            .map(|policy| policy.mode)
            .or_else(|| self.config.outbound_traffic_policy.map(|policy| policy.mode))
            .unwrap_or(OutboundMode::AllowAny)
    }
}

/// Whether `labels` has everything that `selector` asks for.
pub(super) fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a host pattern covers a host or narrower pattern: `*.foo.com` covers `a.foo.com` and `*.a.foo.com`, not
/// `foo.com`.
pub(super) fn host_covers(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        None => pattern == host,
        Some("") => true,
        // The star stands for at least one character, which a pattern's own star is.
        Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
    }
}

fn in_scope(scope: &str, namespace: &str, own: &str) -> bool {
    match scope {
        "*" => true,
        "." => namespace == own,
        "~" => false,
        other => other == namespace,
    }
}

/// The Sidecar of the workload: one that selects it, else that of its namespace, else that of the root namespace.
fn sidecar<'a>(set: &'a ResourceSet, cx: &CompileContext, root: &str) -> Option<&'a Resource<Sidecar>> {
    let in_namespace = |namespace: &str| {
        let namespace = namespace.to_owned();
        set.sidecars().iter().filter(move |sidecar| sidecar.meta.namespace == namespace)
    };
    let selector = |sidecar: &'a Resource<Sidecar>| {
        sidecar.spec.workload_selector.as_ref().map(|s| &s.labels).filter(|labels| !labels.is_empty())
    };
    in_namespace(&cx.workload.namespace)
        .find(|sidecar| selector(sidecar).is_some_and(|labels| selects(labels, &cx.workload.labels)))
        .or_else(|| in_namespace(&cx.workload.namespace).find(|sidecar| selector(sidecar).is_none()))
        .or_else(|| in_namespace(root).find(|sidecar| selector(sidecar).is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_cover_narrower_ones() {
        for (pattern, host, covers) in [
            ("a.foo.com", "a.foo.com", true),
            ("*.foo.com", "a.foo.com", true),
            ("*.foo.com", "*.foo.com", true),
            ("*.foo.com", "*.a.foo.com", true),
            ("*.a.foo.com", "*.foo.com", false),
            ("*.foo.com", "foo.com", false),
            ("*", "foo.com", true),
            ("*", "*", true),
            ("*.foo.com", "*", false),
            ("a.foo.com", "*.foo.com", false),
        ] {
            assert_eq!(host_covers(pattern, host), covers, "{pattern} {host}");
        }
    }
}
