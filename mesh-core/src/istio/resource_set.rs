//! Loading files into one set of resources.
//!
//! Loading is pure: files come as bytes, diagnostics go out, and a resource with an error is left out of the set (its
//! error keeps the whole set from being published). What is not an error of the author is not one here: Kubernetes'
//! envelope, kinds that are no concern of a mesh, kinds of Istio that this build does not enforce.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::envelope::Metadata;
use super::kinds::{Kind, Stores};
use super::loader::Loader;
use super::types::mesh_config::MeshConfig;
use crate::diagnostics::{Diagnostic, Diagnostics, DocId, Documents, Position, Severity};
use crate::documents::not_enforced;

/// One configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// What diagnostics call it: a path, `<stdin>` or `<embedded>`.
    pub name: Arc<str>,
    /// What is in it. It need not be UTF-8; that is judged when it is loaded.
    pub text: Vec<u8>,
}

impl SourceFile {
    /// A file by name and content.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, text: impl Into<Vec<u8>>) -> Self {
        Self { name: name.into(), text: text.into() }
    }
}

/// What a field means that its kind does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UnknownFields {
    /// An error, as for the API server. The default.
    #[default]
    Strict,
    /// A warning.
    Lenient,
}

impl UnknownFields {
    /// How bad an unknown field is.
    #[must_use]
    pub const fn severity(self) -> Severity {
        match self {
            Self::Strict => Severity::Error,
            Self::Lenient => Severity::Warning,
        }
    }
}

/// How files are loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadOptions {
    /// The namespace of a resource that names none. Default `default`.
    pub default_namespace: String,
    /// Default [`UnknownFields::Strict`].
    pub unknown_fields: UnknownFields,
    /// The largest file that is read, in bytes. Default 32 MiB.
    pub max_file_bytes: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            default_namespace: "default".to_owned(),
            unknown_fields: UnknownFields::Strict,
            max_file_bytes: 32 << 20,
        }
    }
}

impl LoadOptions {
    /// The same options with another default namespace.
    #[must_use]
    pub fn with_default_namespace(mut self, namespace: impl Into<String>) -> Self {
        self.default_namespace = namespace.into();
        self
    }

    /// The same options with another meaning of unknown fields.
    #[must_use]
    pub fn with_unknown_fields(mut self, unknown_fields: UnknownFields) -> Self {
        self.unknown_fields = unknown_fields;
        self
    }
}

/// A resource with its place.
#[derive(Clone, Debug)]
pub struct Resource<T> {
    /// The document, for [`Diagnostics::error_at`] and [`Diagnostics::honour`].
    pub doc: DocId,
    /// Name, namespace, labels, annotations, age.
    pub meta: Metadata,
    /// Where the document begins.
    pub position: Position,
    /// The resource itself.
    pub spec: T,
}

/// The resources of a configuration, by kind, oldest first.
#[derive(Debug, Default)]
pub struct ResourceSet {
    pub(super) stores: Stores,
    pub(super) mesh: Arc<MeshConfig>,
    pub(super) documents: Arc<Documents>,
    pub(super) skipped: BTreeMap<String, usize>,
}

/// The settings of the mesh that only security has a use for.
const SECURITY_OF_MESH: [&str; 3] = ["meshMTLS", "tlsDefaults", "trustDomainAliases"];

impl ResourceSet {
    /// Loads all files. The diagnostics hold every error and warning of all of them, and are about the documents of
    /// the set, so that compilers can go on with them.
    #[must_use]
    pub fn load(files: &[SourceFile], options: &LoadOptions) -> (Self, Diagnostics) {
        let mut loader = Loader::new(options);
        for file in files {
            loader.file(file);
        }
        loader.finish()
    }

    /// The settings of the mesh: those of [`with_mesh_config`](Self::with_mesh_config), else of a ConfigMap `istio` among
    /// the files, else istiod's defaults.
    #[must_use]
    pub fn mesh_config(&self) -> &Arc<MeshConfig> {
        &self.mesh
    }

    /// The same set under the settings of a file of their own ([`MeshConfig::load`]), which win over a ConfigMap.
    #[must_use]
    pub fn with_mesh_config(mut self, mesh: MeshConfig) -> Self {
        self.mesh = Arc::new(mesh);
        self
    }

    /// Every resource of kind `T`, oldest first.
    #[must_use]
    pub fn all<T: Kind>(&self) -> &[Resource<T>] {
        T::all(self)
    }

    /// How many resources there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stores.len()
    }

    /// Whether there is no resource at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many documents were skipped because their kind is no concern of a mesh, by kind.
    #[must_use]
    pub fn skipped(&self) -> &BTreeMap<String, usize> {
        &self.skipped
    }

    /// The fields that were written and that no compiler honoured ([`Diagnostics::unhonoured`]). `security` is the
    /// severity for a security field: error for a check, warning when running.
    #[must_use]
    pub fn unhonoured(&self, diags: &Diagnostics, security: Severity) -> Vec<Diagnostic> {
        let mut found = diags.unhonoured(security);
        for (path, position) in &self.mesh.written {
            if !diags.is_mesh_honoured(path) {
                let grave = SECURITY_OF_MESH.contains(&path.as_str());
                found.push(not_enforced(path, grave, security).at(position.clone()));
            }
        }
        found
    }

    /// The index of what was written.
    #[must_use]
    pub fn documents(&self) -> &Arc<Documents> {
        &self.documents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> (ResourceSet, Vec<String>) {
        let (set, diags) = ResourceSet::load(&[SourceFile::new("a.yaml", text)], &LoadOptions::default());
        (set, diags.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn x_01_documents_lists_and_json() {
        let json = r#"{"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "networking.istio.io/v1beta1", "kind": "DestinationRule", "metadata": {"name": "c"}, "spec": {"host": "c"}}
        ]}"#;
        let yaml = "# nothing but a comment\n---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\n\
                    metadata: {name: a, namespace: n}\nspec:\n  host: a\n---\n---\n\
                    apiVersion: networking.istio.io/v1alpha3\nkind: DestinationRuleList\nitems:\n\
                    - apiVersion: networking.istio.io/v1alpha3\n  kind: DestinationRule\n  metadata: {name: b}\n\
                    \x20 spec: {host: b}\n";
        let files = [SourceFile::new("a.yaml", yaml), SourceFile::new("b.json", json)];
        let (set, diags) = ResourceSet::load(&files, &LoadOptions::default().with_default_namespace("here"));
        assert_eq!(diags.to_string(), "");
        let seen: Vec<_> = set
            .destination_rules()
            .iter()
            .map(|r| format!("{} {}/{}", r.position, r.meta.namespace, r.spec.host))
            .collect();
        assert_eq!(seen, ["a.yaml:3:1 n/a", "a.yaml:13:3 here/b", "b.json:2:13 here/c"]);
    }

    #[test]
    fn kubernetes_envelope_loads_without_a_word() {
        let (set, found) = load(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata:\n  name: a\n  uid: 1-2\n\
             \x20 resourceVersion: \"5\"\n  generation: 2\n  creationTimestamp: \"2024-01-01T00:00:00Z\"\n\
             \x20 managedFields: [{manager: kubectl, fieldsV1: {\"f:spec\": {}}}]\n\
             \x20 annotations: {kubectl.kubernetes.io/last-applied-configuration: x, other: y}\n\
             spec: {host: a}\nstatus: {anything: [1]}\n",
        );
        assert_eq!(found, [""; 0]);
        let meta = &set.destination_rules()[0].meta;
        assert_eq!(meta.annotations.keys().collect::<Vec<_>>(), ["other"]);
        assert_eq!(meta.creation_timestamp.as_deref(), Some("2024-01-01T00:00:00Z"));
    }

    #[test]
    fn x_07_the_oldest_is_first() {
        let rule = |name: &str, made: &str| {
            format!(
                "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\n\
                 metadata: {{name: {name}{made}}}\nspec: {{host: a}}\n"
            )
        };
        let at = |year: u32| format!(", creationTimestamp: \"{year}-01-01T00:00:00Z\"");
        let text = [rule("c", &at(2024)), rule("a", ""), rule("d", &at(2020)), rule("b", "")].concat();
        let (set, _) = load(&text);
        assert_eq!(
            set.destination_rules().iter().map(|r| r.meta.name.as_str()).collect::<Vec<_>>(),
            ["a", "b", "d", "c"]
        );
    }

    #[test]
    fn foreign_kinds_are_counted_and_wrong_ones_named() {
        let (set, found) = load(
            "{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}}\n---\n\
             {apiVersion: apps/v1, kind: Deployment, metadata: {name: b}}\n---\n\
             {apiVersion: v1, kind: ServiceAccount, metadata: {name: b}}\n---\n\
             {apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: b}}\n---\n\
             {apiVersion: networking.istio.io/v1, kind: VirtualServce, metadata: {name: b}}\n---\n\
             {apiVersion: networking.istio.io/v2, kind: VirtualService, metadata: {name: b}}\n---\n\
             {kind: VirtualService}\n",
        );
        assert_eq!(
            set.skipped().iter().map(|(k, n)| (k.as_str(), *n)).collect::<Vec<_>>(),
            [("Deployment", 2), ("ServiceAccount", 1)]
        );
        assert_eq!(
            found,
            [
                "warning: a.yaml:7:50: kind: HTTPRoute of gateway.networking.k8s.io is not enforced by this build",
                "error: a.yaml:9:44: kind: networking.istio.io has no kind \"VirtualServce\"",
                "error: a.yaml:11:14: apiVersion: version \"v2\" of networking.istio.io is not known; known are v1, v1beta1, v1alpha3",
                "error: a.yaml:13:1: apiVersion: a resource needs apiVersion and kind",
            ]
        );
    }

    #[test]
    fn duplicates_unknown_fields_and_findings_all_at_once() {
        let text = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a}\nspec:\n  host: a\n---\n\
                    apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a}\nspecs: {}\nspec:\n\
                    \x20 host: \"a b\"\n  traffic_policy:\n    loadBalancr: {}\n    connectionPool: {}\n";
        let (set, found) = load(text);
        assert_eq!(set.len(), 1);
        insta::assert_snapshot!(found.join("\n"), @r#"
        error: a.yaml:9:1: DestinationRule default/a: metadata: the resource was defined before, at a.yaml:1:1
        error: a.yaml:10:1: DestinationRule default/a: specs: unknown field
        error: a.yaml:14:5: DestinationRule default/a: spec.trafficPolicy.loadBalancr: unknown field; did you mean "loadBalancer"?
        error: a.yaml:12:9: DestinationRule default/a: spec.host: domain name "a b" invalid (label "a b" invalid)
        error: a.yaml:15:5: DestinationRule default/a: spec.trafficPolicy.connectionPool: a connection pool needs tcp or http
        "#);
        let lenient = LoadOptions::default().with_unknown_fields(UnknownFields::Lenient);
        let (_, diags) = ResourceSet::load(&[SourceFile::new("a.yaml", text)], &lenient);
        assert_eq!(diags.error_count(), 3);
    }

    #[test]
    fn a_wrong_type_does_not_hide_what_is_wrong_elsewhere() {
        let (_, found) = load(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a}\nspec:\n  host: a\n\
             \x20 trafficPolicy:\n    connectionPool: {tcp: {maxConnections: many}}\n    outlierDetection: {interval: 0s}\n\
             \x20 subsets: [{name: a b}]\n",
        );
        assert_eq!(
            found,
            [
                "error: a.yaml:7:44: DestinationRule default/a: spec.trafficPolicy.connectionPool.tcp.maxConnections: expected a whole number, found the string \"many\"",
                "error: a.yaml:8:34: DestinationRule default/a: spec.trafficPolicy.outlierDetection.interval: duration 0s must be at least 1ms",
                "error: a.yaml:9:20: DestinationRule default/a: spec.subsets[0].name: \"a b\" is not a valid DNS label (RFC 1123)",
            ]
        );
    }

    #[test]
    fn what_is_not_text_is_refused_with_its_place() {
        let judge = |text: &[u8]| {
            let options = LoadOptions { max_file_bytes: 100, ..LoadOptions::default() };
            ResourceSet::load(&[SourceFile::new("a.yaml", text)], &options).1.to_string()
        };
        assert_eq!(judge(b"a: 1\nb: \xff\n"), "error: a.yaml:2:4: not valid UTF-8\n");
        assert_eq!(judge("\u{feff}a: 1".as_bytes()).matches("byte order mark").count(), 1);
        assert_eq!(
            judge(&[b'\n'; 101]),
            "error: a.yaml:101:1: the file of 101 bytes is too large (at most 100)\n"
        );
    }

    #[test]
    fn what_no_compiler_honours_is_known_by_document() {
        let (set, mut diags) = ResourceSet::load(
            &[SourceFile::new(
                "a.yaml",
                "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: a}\nspec:\n  host: a\n\
                 \x20 trafficPolicy:\n    tls: {mode: SIMPLE}\n    loadBalancer: {simple: RANDOM}\n\
                 \x20   connectionPool:\n    outlierDetection: null\n",
            )],
            &LoadOptions::default(),
        );
        let rule = &set.destination_rules()[0];
        diags.honour_all(rule.doc, &["spec.host", "spec.trafficPolicy.loadBalancer"]);
        let found: Vec<_> = set.unhonoured(&diags, Severity::Error).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "error: a.yaml:7:5: DestinationRule default/a: spec.trafficPolicy.tls: security setting is not enforced by this build"
            ]
        );
    }
}
