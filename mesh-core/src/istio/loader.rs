//! Files into documents, documents into resources.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::document::{Document, at_key, diagnostic, position};
use super::envelope::{self, Group, UnknownKind};
use super::kinds::{self, Stores};
use super::mesh;
use super::resource_set::{LoadOptions, ResourceSet, SourceFile};
use super::types::mesh_config::MeshConfig;
use super::yaml::{self, Entry, Node, Problem, Value};
use crate::diagnostics::{Diagnostic, Diagnostics, DocId, Position, ResourceName, Severity};
use crate::documents::DocumentsBuilder;

const ENVOY_FILTER: &str = "EnvoyFilter";

pub(super) struct Loader<'o> {
    options: &'o LoadOptions,
    stores: Stores,
    index: DocumentsBuilder,
    diagnostics: Vec<Diagnostic>,
    skipped: BTreeMap<String, usize>,
    mesh: Option<(MeshConfig, Position)>,
    seen: HashMap<ResourceName, Position>,
}

impl<'o> Loader<'o> {
    pub(super) fn new(options: &'o LoadOptions) -> Self {
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

    pub(super) fn finish(mut self) -> (ResourceSet, Diagnostics) {
        self.stores.finish();
        let documents = Arc::new(self.index.build());
        let mut diagnostics = Diagnostics::about(Arc::clone(&documents));
        diagnostics.extend(self.diagnostics);
        let mesh = Arc::new(self.mesh.map(|(mesh, _)| mesh).unwrap_or_default());
        (ResourceSet { stores: self.stores, mesh, documents, skipped: self.skipped }, diagnostics)
    }

    pub(super) fn file(&mut self, file: &SourceFile) {
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
            // A field without a value is one that is not written.
            entries
                .iter()
                .filter(|entry| !matches!(entry.value.value, Value::Null))
                .for_each(|entry| index_field(index, entry));
        }
    }
}
