//! One document whose kind is known: reading its body, judging it, saying what is wrong.

use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::envelope::{ENVELOPE, Metadata};
use super::findings::{Finding, Findings, Validate};
use super::resource_set::Resource;
use super::types::mixer::{MixerResource, MixerSpec};
use super::yaml::{self, Node, Problem, Value};
use crate::diagnostics::{Diagnostic, DocId, Position, ResourceName, Severity};
use crate::documents::DocumentsBuilder;

/// Where in a document a kind keeps its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// In `spec`.
    Spec,
    /// Beside the envelope.
    Root,
}

/// A document whose kind is known, on its way into the stores.
pub(super) struct Document<'n, 'l> {
    pub(super) node: &'n Node,
    pub(super) file: Arc<str>,
    pub(super) doc: DocId,
    pub(super) meta: Metadata,
    pub(super) resource: ResourceName,
    /// How bad a field is that the kind does not have; `None` where only a part of the kind is read.
    pub(super) unknown_field: Option<Severity>,
    pub(super) index: &'l DocumentsBuilder,
    pub(super) diagnostics: &'l mut Vec<Diagnostic>,
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

/// A problem with a top-level field, at its value if it is a scalar, else at its key, else at the document.
pub(super) fn at_key(node: &Node, key: &str, message: impl Into<String>) -> Problem {
    let (line, column) = match node.entry(key) {
        Some(entry) if matches!(entry.value.value, Value::Scalar(_)) => {
            (entry.value.line, entry.value.column)
        }
        Some(entry) => (entry.line, entry.column),
        None => (node.line, node.column),
    };
    Problem { path: key.to_owned(), line, column, message: message.into() }
}

pub(super) fn diagnostic(
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
