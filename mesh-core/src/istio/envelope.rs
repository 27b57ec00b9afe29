//! What Kubernetes puts around every resource: API version, kind, metadata.

use std::collections::BTreeMap;

use super::yaml::{Node, Problem, Value};

/// The fields of every resource that are not its meaning.
pub(super) const ENVELOPE: &[&str] = &["apiVersion", "kind", "metadata", "status"];

/// A group with the versions that are read.
pub(super) struct Group {
    name: &'static str,
    versions: &'static [&'static str],
    /// Of a kind that is not loaded: whether it is a mistake, a warning, or of no concern.
    pub(super) unknown_kind: UnknownKind,
    /// The group exists for security.
    pub(super) security: bool,
}

/// What a kind of a group means that no loader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnknownKind {
    /// A misspelling.
    Error,
    /// A kind that Istio has or had, and that this build has no use for.
    Warning,
    /// No concern of a mesh.
    Skip,
}

/// The group of our own kinds.
const OURS: &str = "mesh.rs";

/// The groups of X-01, those of Kubernetes that a mesh reads, and ours.
pub(super) const GROUPS: &[Group] = &[
    Group::new("networking.istio.io", &["v1", "v1beta1", "v1alpha3"], UnknownKind::Error, false),
    Group::new("security.istio.io", &["v1", "v1beta1"], UnknownKind::Error, true),
    Group::new("telemetry.istio.io", &["v1", "v1alpha1"], UnknownKind::Error, false),
    Group::new("extensions.istio.io", &["v1alpha1"], UnknownKind::Error, false),
    Group::new("rbac.istio.io", &["v1alpha1"], UnknownKind::Warning, true),
    Group::new("authentication.istio.io", &["v1alpha1"], UnknownKind::Warning, true),
    Group::new("config.istio.io", &["v1alpha2"], UnknownKind::Warning, false),
    Group::new("install.istio.io", &["v1alpha1"], UnknownKind::Skip, false),
    Group::new("gateway.networking.k8s.io", &[], UnknownKind::Warning, false),
    Group::new("inference.networking.k8s.io", &[], UnknownKind::Warning, false),
    Group::new("", &["v1"], UnknownKind::Skip, false),
    Group::new("discovery.k8s.io", &["v1", "v1beta1"], UnknownKind::Skip, false),
    Group::new(OURS, &["v1alpha1"], UnknownKind::Error, false),
];

impl Group {
    const fn new(
        name: &'static str,
        versions: &'static [&'static str],
        unknown_kind: UnknownKind,
        security: bool,
    ) -> Self {
        Self { name, versions, unknown_kind, security }
    }

    /// The group of that name, if a mesh cares about it.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        GROUPS.iter().find(|group| group.name == name)
    }

    /// Whether the group is Kubernetes' own, whose resources say far more than a mesh reads.
    pub(super) fn is_kubernetes(&self) -> bool {
        !self.name.ends_with("istio.io") && self.name != OURS
    }

    /// Whether `version` is one that is read.
    pub(super) fn has_version(&self, version: &str) -> bool {
        self.versions.is_empty() || self.versions.contains(&version)
    }

    /// The versions that are read, for a message.
    pub(super) fn versions(&self) -> String {
        self.versions.join(", ")
    }
}

/// What a resource says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metadata {
    /// The name; unique within kind and namespace.
    pub name: String,
    /// The namespace; that of the load options where none is written.
    pub namespace: String,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The annotations, but for kubectl's copy of the whole resource.
    pub annotations: BTreeMap<String, String>,
    /// When the resource was made, in RFC 3339 and UTC as Kubernetes prints it; `None` where it is not written.
    pub creation_timestamp: Option<String>,
}

impl Metadata {
    /// What X-07 orders by: no timestamp is the oldest, as Go's zero time is; then file order.
    pub(super) fn age_key(&self) -> &str {
        self.creation_timestamp.as_deref().unwrap_or_default()
    }
}

/// kubectl's own copy of the resource, which would only take memory.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Reads `metadata`. What is wrong with it is appended to `problems`; fields that a mesh does not read are Kubernetes'
/// business.
pub(super) fn metadata(document: &Node, default_namespace: &str, problems: &mut Vec<Problem>) -> Metadata {
    let mut meta = Metadata { namespace: default_namespace.to_owned(), ..Metadata::default() };
    let Some(node) = document.get("metadata") else {
        problems.push(problem(document, "metadata.name", "a resource needs a name"));
        return meta;
    };
    if !matches!(node.value, Value::Map(_)) {
        problems.push(problem(node, "metadata", "expected a mapping"));
        return meta;
    }
    match text(node, "name", problems).or_else(|| text(node, "generateName", problems)) {
        Some(name) => meta.name = name,
        None if node.get("name").is_none() => {
            problems.push(problem(node, "metadata.name", "a resource needs a name"));
        }
        None => {}
    }
    if let Some(namespace) = text(node, "namespace", problems).filter(|namespace| !namespace.is_empty()) {
        meta.namespace = namespace;
    }
    meta.creation_timestamp = text(node, "creationTimestamp", problems);
    meta.labels = strings(node, "labels", problems);
    meta.annotations = strings(node, "annotations", problems);
    meta.annotations.remove(LAST_APPLIED);
    meta
}

fn text(node: &Node, key: &str, problems: &mut Vec<Problem>) -> Option<String> {
    let value = node.get(key)?;
    let text = value.as_str();
    if text.is_none() {
        problems.push(problem(value, &format!("metadata.{key}"), "expected a string"));
    }
    text.map(ToOwned::to_owned)
}

fn strings(node: &Node, key: &str, problems: &mut Vec<Problem>) -> BTreeMap<String, String> {
    let Some(value) = node.get(key) else { return BTreeMap::new() };
    let read = super::yaml::read::<BTreeMap<String, String>>(value, &format!("metadata.{key}"), &[]);
    problems.extend(read.errors);
    read.value.unwrap_or_default()
}

pub(super) fn problem(node: &Node, path: &str, message: impl Into<String>) -> Problem {
    Problem { path: path.to_owned(), line: node.line, column: node.column, message: message.into() }
}
