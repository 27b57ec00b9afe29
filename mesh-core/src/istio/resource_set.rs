//! Loading files into one set of resources.
//!
//! Loading is pure: files come as bytes, diagnostics go out, and a resource with an error is left out of the set (its
//! error keeps the whole set from being published). What is not an error of the author is not one here: Kubernetes'
//! envelope, kinds that are no concern of a mesh, kinds of Istio that this build does not enforce.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::envelope::{self, Group, Metadata, UnknownKind};
use super::findings::{Finding, Findings, Validate};
use super::kinds::{self, Kind, Stores};
use super::mesh;
use super::types::mesh_config::MeshConfig;
use super::types::mixer::{MixerResource, MixerSpec};
use super::yaml::{self, Entry, Node, Problem, Value};
use crate::diagnostics::{Diagnostic, Diagnostics, DocId, Documents, Position, ResourceName, Severity};
use crate::documents::DocumentsBuilder;

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
    mesh: Arc<MeshConfig>,
    documents: Arc<Documents>,
    skipped: BTreeMap<String, usize>,
}

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
        diags.unhonoured(security)
    }

    /// The index of what was written.
    #[must_use]
    pub fn documents(&self) -> &Arc<Documents> {
        &self.documents
    }
}

/// Where in a document a kind keeps its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// In `spec`.
    Spec,
    /// Beside the envelope.
    Root,
}

const ENVELOPE: &[&str] = &["apiVersion", "kind", "metadata", "status"];

const ENVOY_FILTER: &str = "EnvoyFilter";

struct Loader<'o> {
    options: &'o LoadOptions,
    stores: Stores,
    index: DocumentsBuilder,
    diagnostics: Vec<Diagnostic>,
    skipped: BTreeMap<String, usize>,
    mesh: Option<(MeshConfig, Position)>,
    seen: HashMap<ResourceName, Position>,
}

/// A document whose kind is known, on its way into the stores.
pub(super) struct Document<'n, 'l> {
    node: &'n Node,
    file: Arc<str>,
    doc: DocId,
    meta: Metadata,
    resource: ResourceName,
    /// How bad a field is that the kind does not have; `None` where only a part of the kind is read.
    unknown_field: Option<Severity>,
    index: &'l DocumentsBuilder,
    diagnostics: &'l mut Vec<Diagnostic>,
}

impl<'o> Loader<'o> {
    fn new(options: &'o LoadOptions) -> Self {
        Self {
            options,
            stores: Stores::default(),
            index: DocumentsBuilder::default(),
            diagnostics: Vec::new(),
            skipped: BTreeMap::new(),
            mesh: None,
            seen: HashMap::new(),
        }
    }

    fn finish(mut self) -> (ResourceSet, Diagnostics) {
        self.stores.finish();
        let documents = Arc::new(self.index.build());
        let mut diagnostics = Diagnostics::about(Arc::clone(&documents));
        diagnostics.extend(self.diagnostics);
        let mesh = Arc::new(self.mesh.map(|(mesh, _)| mesh).unwrap_or_default());
        (ResourceSet { stores: self.stores, mesh, documents, skipped: self.skipped }, diagnostics)
    }

    fn file(&mut self, file: &SourceFile) {
        let text = match readable(file, self.options.max_file_bytes) {
            Ok(text) => text,
            Err(problem) => return self.error(&file.name, None, problem),
        };
        let mut reader = yaml::Reader::new(text);
        loop {
            let document = reader.document();
            for problem in reader.problems() {
                self.error(&file.name, None, problem);
            }
            match document {
                Some(document) => self.document(&file.name, &document),
                None => break,
            }
        }
    }

    fn document(&mut self, file: &Arc<str>, node: &Node) {
        if !matches!(node.value, Value::Map(_)) {
            return self.error(
                file,
                None,
                envelope::problem(node, "", "expected a resource, which is a mapping"),
            );
        }
        let (Some(api_version), Some(kind)) =
            (self.header(file, node, "apiVersion"), self.header(file, node, "kind"))
        else {
            return;
        };
        if kind.ends_with("List")
            && let Some(items) = node.get("items")
        {
            match &items.value {
                Value::List(items) => items.iter().for_each(|item| self.document(file, item)),
                _ => self.error(file, None, envelope::problem(items, "items", "expected a list")),
            }
            return;
        }
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let Some(known) = Group::find(group) else {
            return self.skip(kind);
        };
        if mesh::is_config_map(api_version, kind, node) {
            return self.mesh_config_map(file, node);
        }
        match kinds::loader(group, kind) {
            Some(load) if known.has_version(version) => self.resource(file, node, known, kind, load),
            Some(_) => {
                let message =
                    format!("version {version:?} of {group} is not known; known are {}", known.versions());
                self.error(file, None, at_key(node, "apiVersion", message));
            }
            None => match known.unknown_kind {
                UnknownKind::Skip => self.skip(kind),
                UnknownKind::Warning => {
                    let message = format!("{kind} of {group} is not enforced by this build");
                    self.push(Severity::Warning, file, None, at_key(node, "kind", message));
                }
                UnknownKind::Error => {
                    self.error(file, None, at_key(node, "kind", format!("{group} has no kind {kind:?}")));
                }
            },
        }
    }

    /// The ConfigMap from which istiod takes its settings. Of several the first counts.
    fn mesh_config_map(&mut self, file: &Arc<str>, node: &Node) {
        if let Some((_, first)) = &self.mesh {
            let message = format!("the mesh was configured before, at {first}; this ConfigMap is ignored");
            return self.push(Severity::Warning, file, None, at_key(node, "metadata", message));
        }
        let (mesh, diagnostics) = mesh::from_config_map(file, node);
        self.diagnostics.extend(diagnostics);
        self.mesh = mesh.map(|mesh| (mesh, position(file, node.line, node.column)));
    }

    fn header<'n>(&mut self, file: &Arc<str>, node: &'n Node, key: &str) -> Option<&'n str> {
        let text = node.get(key).and_then(Node::as_str).filter(|text| !text.is_empty());
        if text.is_none() {
            let message = "a resource needs apiVersion and kind".to_owned();
            self.error(file, None, at_key(node, key, message));
        }
        text
    }

    fn resource(
        &mut self,
        file: &Arc<str>,
        node: &Node,
        group: &Group,
        kind: &str,
        load: fn(Document<'_, '_>, &mut Stores),
    ) {
        let mut problems = Vec::new();
        let meta = envelope::metadata(node, &self.options.default_namespace, &mut problems);
        let resource = ResourceName::new(kind, meta.namespace.as_str(), meta.name.as_str());
        let position = position(file, node.line, node.column);
        if !meta.name.is_empty()
            && let Some(first) = self.seen.get(&resource)
        {
            let message = format!("the resource was defined before, at {first}");
            problems.push(at_key(node, "metadata", message));
        } else {
            self.seen.insert(resource.clone(), position);
        }
        let report_unhonoured = !group.is_kubernetes() && kind != ENVOY_FILTER;
        let doc = self.index(file, node, resource.clone(), group.security, report_unhonoured);
        let broken = !problems.is_empty();
        for problem in problems {
            self.push(Severity::Error, file, Some(resource.clone()), problem);
        }
        let mut ignored = Stores::default();
        let document = Document {
            node,
            file: Arc::clone(file),
            doc,
            meta,
            resource,
            unknown_field: (!group.is_kubernetes()).then_some(self.options.unknown_fields.severity()),
            index: &self.index,
            diagnostics: &mut self.diagnostics,
        };
        load(document, if broken { &mut ignored } else { &mut self.stores });
    }

    /// Adds the document's fields to the index.
    fn index(
        &mut self,
        file: &Arc<str>,
        node: &Node,
        resource: ResourceName,
        security: bool,
        report: bool,
    ) -> DocId {
        let doc = self.index.begin(file, resource, security, report, node.line, node.column);
        if let Value::Map(entries) = &node.value {
            for entry in entries {
                let field = self.index.open_field(&entry.key, entry.line, entry.column);
                match entry.key.as_str() {
                    "metadata" => index_metadata(&mut self.index, &entry.value),
                    "apiVersion" | "kind" | "status" => {}
                    _ => index_below(&mut self.index, &entry.value),
                }
                self.index.close(field);
            }
        }
        self.index.finish();
        doc
    }

    fn skip(&mut self, kind: &str) {
        *self.skipped.entry(kind.to_owned()).or_default() += 1;
    }

    fn error(&mut self, file: &Arc<str>, resource: Option<ResourceName>, problem: Problem) {
        self.push(Severity::Error, file, resource, problem);
    }

    fn push(
        &mut self,
        severity: Severity,
        file: &Arc<str>,
        resource: Option<ResourceName>,
        problem: Problem,
    ) {
        self.diagnostics.push(diagnostic(severity, file, resource, problem));
    }
}

impl Document<'_, '_> {
    /// Reads a resource of Mixer, which is the same for all of its kinds.
    pub(super) fn read_mixer(self) -> Option<Resource<MixerResource>> {
        let kind = self.resource.kind.to_string();
        let Resource { doc, meta, position, spec } = self.read::<MixerSpec>(Body::Spec)?;
        Some(Resource { doc, meta, position, spec: MixerResource { kind, spec: spec.spec } })
    }

    /// Reads and validates the document's body; `None` if there is an error.
    pub(super) fn read<T: DeserializeOwned + Validate>(mut self, body: Body) -> Option<Resource<T>> {
        let before = self.diagnostics.len();
        let empty = Node::empty_map(self.node.line, self.node.column);
        let (node, path, skip) = match body {
            Body::Root => (self.node, "", ENVELOPE),
            Body::Spec => {
                self.unknown_top_level();
                (self.node.get("spec").unwrap_or(&empty), "spec", &[][..])
            }
        };
        let read = yaml::read::<T>(node, path, skip);
        if let Some(severity) = self.unknown_field {
            for problem in read.unknown {
                self.report(severity, problem);
            }
        }
        let cuts: Vec<String> = read.errors.iter().map(|problem| problem.path.clone()).collect();
        for problem in read.errors {
            self.report(Severity::Error, problem);
        }
        let spec = read.value.or(read.partial.filter(|_| cuts.iter().all(|cut| !is_item(cut))))?;
        let mut findings = Findings::about(self.meta.clone(), path);
        spec.validate(&mut findings);
        for finding in findings.into_vec().into_iter().filter(|finding| is_told_apart(finding, &cuts)) {
            let mut item = Diagnostic::new(finding.severity, finding.path, finding.message)
                .about(self.resource.clone())
                .with_code(finding.code);
            item.position = self.index.position(self.doc, &item.path);
            self.diagnostics.push(item);
        }
        let failed = self.diagnostics[before..].iter().any(|item| item.severity == Severity::Error);
        (!failed).then(|| Resource {
            doc: self.doc,
            meta: self.meta,
            position: position(&self.file, self.node.line, self.node.column),
            spec,
        })
    }

    /// A kind with a `spec` has nothing else beside the envelope.
    fn unknown_top_level(&mut self) {
        let (Some(severity), Value::Map(entries)) = (self.unknown_field, &self.node.value) else { return };
        for entry in entries {
            if entry.key != "spec" && !ENVELOPE.contains(&entry.key.as_str()) {
                self.report(severity, at_key(self.node, &entry.key, "unknown field"));
            }
        }
    }

    fn report(&mut self, severity: Severity, problem: Problem) {
        self.diagnostics.push(diagnostic(severity, &self.file, Some(self.resource.clone()), problem));
    }
}

/// Whether a path ends in a list index. Without such an item the items after it have other indexes.
fn is_item(path: &str) -> bool {
    path.ends_with(']') && !path.ends_with("\"]")
}

/// Whether a finding has nothing to do with the values that were cut out because of their type: it is an error, and
/// not about their structs or what is around those.
fn is_told_apart(finding: &Finding, cuts: &[String]) -> bool {
    let apart = |cut: &String| {
        let around = cut.rfind(['.', '[']).map_or("", |end| &cut[..end]);
        !finding.path.starts_with(around) && !around.starts_with(&finding.path)
    };
    cuts.is_empty() || (finding.severity == Severity::Error && cuts.iter().all(apart))
}

/// The text of a file that is small enough, UTF-8, and without a byte order mark.
pub(super) fn readable(file: &SourceFile, max_bytes: usize) -> Result<&str, Problem> {
    let bytes = file.text.as_slice();
    if bytes.len() > max_bytes {
        let (line, column) = end_of(&bytes[..max_bytes]);
        let message = format!("the file of {} bytes is too large (at most {max_bytes})", bytes.len());
        return Err(Problem::new(message, line, column));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let (line, column) = end_of(&bytes[..error.valid_up_to()]);
        Problem::new("not valid UTF-8", line, column)
    })?;
    match text.find('\u{feff}') {
        Some(0) => Err(Problem::new("begins with a byte order mark; save it as UTF-8 without one", 1, 1)),
        _ => Ok(text),
    }
}

/// The line and column just after `bytes`.
fn end_of(bytes: &[u8]) -> (u32, u32) {
    let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
    let last = bytes.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    let columns = String::from_utf8_lossy(last).chars().count();
    (u32::try_from(lines + 1).unwrap_or(u32::MAX), u32::try_from(columns + 1).unwrap_or(u32::MAX))
}

/// Of the metadata only what validators judge.
fn index_metadata(index: &mut DocumentsBuilder, metadata: &Node) {
    for key in ["name", "namespace", "labels", "annotations"] {
        if let Some(entry) = metadata.entry(key) {
            index_field(index, entry);
        }
    }
}

fn index_field(index: &mut DocumentsBuilder, entry: &Entry) {
    let (line, column) = entry.place();
    let opened = index.open_field(&entry.key, line, column);
    index_below(index, &entry.value);
    index.close(opened);
}

fn index_below(index: &mut DocumentsBuilder, node: &Node) {
    match &node.value {
        Value::Null | Value::Scalar(_) => {}
        Value::List(items) => {
            for (at, item) in items.iter().enumerate() {
                let opened = index.open_item(at, item.line, item.column);
                index_below(index, item);
                index.close(opened);
            }
        }
        Value::Map(entries) => {
            entries.iter().for_each(|entry| index_field(index, entry));
        }
    }
}

/// A problem with a top-level field, at its value if it is a scalar, else at its key, else at the document.
fn at_key(node: &Node, key: &str, message: impl Into<String>) -> Problem {
    let (line, column) = match node.entry(key) {
        Some(entry) if matches!(entry.value.value, Value::Scalar(_)) => {
            (entry.value.line, entry.value.column)
        }
        Some(entry) => (entry.line, entry.column),
        None => (node.line, node.column),
    };
    Problem { path: key.to_owned(), line, column, message: message.into() }
}

fn diagnostic(
    severity: Severity,
    file: &Arc<str>,
    resource: Option<ResourceName>,
    problem: Problem,
) -> Diagnostic {
    let mut diagnostic = Diagnostic::new(severity, problem.path, problem.message).at(position(
        file,
        problem.line,
        problem.column,
    ));
    diagnostic.resource = resource;
    diagnostic
}

pub(super) fn position(file: &Arc<str>, line: u32, column: u32) -> Position {
    Position { file: Arc::clone(file), line, column }
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
                 \x20 trafficPolicy:\n    tls: {mode: SIMPLE}\n    loadBalancer: {simple: RANDOM}\n",
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
