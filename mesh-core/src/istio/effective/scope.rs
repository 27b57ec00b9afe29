//! Which policies are for a workload.

use std::collections::BTreeMap;

use crate::config::Workload;
use crate::istio::types::common::{PolicyTargetReference, WorkloadSelector};

/// From how far away a policy holds for a workload, the farthest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// In the root namespace, without a selector.
    Mesh,
    /// In the workload's namespace, without a selector.
    Namespace,
    /// By labels: in the workload's namespace, or in the root namespace, whose selectors look at all namespaces.
    Workload,
}

/// At which level a policy of `namespace` with these labels in its selector holds for `workload`; `None` if it is not
/// for it. A selector without labels selects like none.
#[must_use]
pub fn level(
    labels: Option<&BTreeMap<String, String>>,
    namespace: &str,
    workload: &Workload,
    root_namespace: &str,
) -> Option<Level> {
    let labels = labels.filter(|labels| !labels.is_empty());
    let root = namespace == root_namespace;
    if !root && namespace != workload.namespace {
        return None;
    }
    match labels {
        None if root => Some(Level::Mesh),
        None => Some(Level::Namespace),
        Some(labels) => is_subset(labels, &workload.labels).then_some(Level::Workload),
    }
}

/// [`level`] for the kinds of security, telemetry and extensions.
#[must_use]
pub fn selector_level(
    selector: Option<&WorkloadSelector>,
    namespace: &str,
    workload: &Workload,
    root_namespace: &str,
) -> Option<Level> {
    level(selector.map(|selector| &selector.match_labels), namespace, workload, root_namespace)
}

/// Whether every label of `labels` is among `among`, with its value.
#[must_use]
pub fn is_subset(labels: &BTreeMap<String, String>, among: &BTreeMap<String, String>) -> bool {
    labels.iter().all(|(key, value)| among.get(key) == Some(value))
}

/// A resource that a policy can target: a Gateway, a GatewayClass, a Service or a ServiceEntry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target<'a> {
    /// The API group; empty or `core` is Kubernetes' core group.
    pub group: &'a str,
    /// The kind.
    pub kind: &'a str,
    /// The namespace; empty for a GatewayClass, which has none.
    pub namespace: &'a str,
    /// The name.
    pub name: &'a str,
}

/// Whether one of `references` of a policy of `namespace` is about `target`. A policy reaches targets of its own
/// namespace only; that of a GatewayClass must be in the root namespace.
#[must_use]
pub fn targets(
    references: &[PolicyTargetReference],
    namespace: &str,
    target: &Target<'_>,
    root_namespace: &str,
) -> bool {
    let home = if target.kind == "GatewayClass" { root_namespace } else { target.namespace };
    namespace == home
        && references.iter().any(|reference| {
            reference.kind == target.kind
                && reference.name == target.name
                && core(&reference.group) == core(target.group)
                && (reference.namespace.is_empty() || reference.namespace == namespace)
        })
}

fn core(group: &str) -> &str {
    if group == "core" { "" } else { group }
}

#[cfg(test)]
pub(super) fn workload(namespace: &str, labels: &[(&str, &str)]) -> Workload {
    Workload {
        namespace: namespace.to_owned(),
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..Workload::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x_05_levels() {
        let workload = workload("a", &[("app", "web"), ("version", "v1")]);
        let selector = |labels: &[(&str, &str)]| WorkloadSelector {
            match_labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        };
        let root = "istio-system";
        let of = |selector: Option<&WorkloadSelector>, namespace| {
            selector_level(selector, namespace, &workload, root)
        };
        assert_eq!(of(None, root), Some(Level::Mesh));
        assert_eq!(of(Some(&selector(&[])), root), Some(Level::Mesh));
        assert_eq!(of(None, "a"), Some(Level::Namespace));
        assert_eq!(of(None, "b"), None);
        let web = selector(&[("app", "web")]);
        assert_eq!(of(Some(&web), "a"), Some(Level::Workload));
        assert_eq!(of(Some(&web), root), Some(Level::Workload));
        assert_eq!(of(Some(&web), "b"), None);
        assert_eq!(of(Some(&selector(&[("app", "web"), ("version", "v2")])), "a"), None);
        assert!(Level::Mesh < Level::Namespace && Level::Namespace < Level::Workload);
    }

    #[test]
    fn x_05_the_root_namespace_is_also_a_namespace() {
        let workload = workload("istio-system", &[]);
        assert_eq!(level(None, "istio-system", &workload, "istio-system"), Some(Level::Mesh));
    }

    #[test]
    fn x_05_targets() {
        let reference = |group: &str, kind: &str, name: &str| PolicyTargetReference {
            group: group.to_owned(),
            kind: kind.to_owned(),
            name: name.to_owned(),
            namespace: String::new(),
        };
        let service = Target { group: "", kind: "Service", namespace: "a", name: "web" };
        let references = [reference("core", "Service", "web"), reference("", "Service", "api")];
        assert!(targets(&references, "a", &service, "root"));
        assert!(!targets(&references, "b", &service, "root"));
        assert!(!targets(&references, "a", &Target { name: "other", ..service }, "root"));
        assert!(!targets(&references, "a", &Target { group: "networking.istio.io", ..service }, "root"));
        let class =
            Target { group: "gateway.networking.k8s.io", kind: "GatewayClass", namespace: "", name: "c" };
        let references = [reference("gateway.networking.k8s.io", "GatewayClass", "c")];
        assert!(targets(&references, "root", &class, "root") && !targets(&references, "a", &class, "root"));
    }
}
