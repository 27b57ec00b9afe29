//! What loading and compiling a configuration has to say: where, which field, why.
//!
//! A [`Diagnostic`] names the position in the file (`file:line:col`), the resource, the field path and the
//! reason. All of them are collected; nothing stops at the first.
//!
//! **Honouring.** The worst bug of a mesh is silence about a security field that nothing enforces. The loader leaves
//! a [`Documents`] index of every field that was written; each compiler marks the fields that it gave meaning to
//! ([`Diagnostics::honour`]); what is present and marked by nobody is reported ([`Diagnostics::unhonoured`]).

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

pub use crate::documents::{DocId, Documents, ResourceName};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The configuration takes effect, but perhaps not as its author thinks.
    Warning,
    /// The configuration does not take effect.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// A place in a configuration file; lines and columns count from one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    /// The file as it was named, or `<stdin>`, or `<embedded>`.
    pub file: Arc<str>,
    /// Line, from one.
    pub line: u32,
    /// Column in characters, from one.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// One thing that loading or compiling had to say.
///
/// Prints as `error: mesh.yaml:8:15: VirtualService default/reviews: spec.http[0].timeout: reason [IST0106]`, where
/// what is not known is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// Where it was written; `None` for what no file says.
    pub position: Option<Position>,
    /// The resource; `None` for a file that could not be read as resources.
    pub resource: Option<ResourceName>,
    /// The field path (`spec.http[2].route[0].weight`); empty for the document as a whole.
    pub path: String,
    /// The reason.
    pub message: String,
    /// Istio's analysis code (`IST0106`), where Istio has one for it.
    pub code: Option<&'static str>,
}

impl Diagnostic {
    /// A finding without position, resource and code.
    #[must_use]
    pub fn new(severity: Severity, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            severity,
            position: None,
            resource: None,
            path: path.into(),
            message: message.into(),
            code: None,
        }
    }

    /// The same finding at `position`.
    #[must_use]
    pub fn at(mut self, position: Position) -> Self {
        self.position = Some(position);
        self
    }

    /// The same finding about `resource`.
    #[must_use]
    pub fn about(mut self, resource: ResourceName) -> Self {
        self.resource = Some(resource);
        self
    }

    /// The same finding under Istio's analysis code.
    #[must_use]
    pub fn with_code(mut self, code: Option<&'static str>) -> Self {
        self.code = code;
        self
    }

    /// The finding as JSON, for the admin port.
    #[cfg(feature = "istio")]
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::Map::new();
        json.insert("severity".to_owned(), self.severity.to_string().into());
        if let Some(position) = &self.position {
            json.insert("file".to_owned(), position.file.as_ref().into());
            json.insert("line".to_owned(), position.line.into());
            json.insert("column".to_owned(), position.column.into());
        }
        if let Some(resource) = &self.resource {
            json.insert("resource".to_owned(), resource.to_string().into());
        }
        json.insert("path".to_owned(), self.path.as_str().into());
        json.insert("message".to_owned(), self.message.as_str().into());
        if let Some(code) = self.code {
            json.insert("code".to_owned(), code.into());
        }
        json.into()
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.severity)?;
        if let Some(position) = &self.position {
            write!(f, "{position}: ")?;
        }
        if let Some(resource) = &self.resource {
            write!(f, "{resource}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        if let Some(code) = self.code {
            write!(f, " [{code}]")?;
        }
        Ok(())
    }
}

/// Everything that loading and compiling a configuration had to say, and what was honoured of it.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    items: Vec<Diagnostic>,
    documents: Arc<Documents>,
    honoured: Vec<u64>,
    honoured_mesh: BTreeSet<String>,
}

impl Diagnostics {
    /// An empty list about `documents`, whose positions [`Diagnostics::error_at`] looks up.
    #[must_use]
    pub fn about(documents: Arc<Documents>) -> Self {
        Self { items: Vec::new(), documents, honoured: Vec::new(), honoured_mesh: BTreeSet::new() }
    }

    /// Records a finding.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        self.items.push(diagnostic);
    }

    /// Records an error at a field path of no document in particular.
    pub fn error(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.push(Diagnostic::new(Severity::Error, path, message));
    }

    /// Records a warning at a field path of no document in particular.
    pub fn warning(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.push(Diagnostic::new(Severity::Warning, path, message));
    }

    /// Records an error at a field path of a document; position and resource are looked up. A path that was not
    /// written has the position of its nearest ancestor.
    pub fn error_at(&mut self, doc: DocId, path: impl Into<String>, message: impl Into<String>) {
        self.report(doc, Severity::Error, path, message, None);
    }

    /// Records a warning at a field path of a document, as [`Diagnostics::error_at`].
    pub fn warning_at(&mut self, doc: DocId, path: impl Into<String>, message: impl Into<String>) {
        self.report(doc, Severity::Warning, path, message, None);
    }

    /// Records a finding at a field path of a document under one of Istio's analysis codes.
    pub fn report(
        &mut self,
        doc: DocId,
        severity: Severity,
        path: impl Into<String>,
        message: impl Into<String>,
        code: Option<&'static str>,
    ) {
        let mut diagnostic = Diagnostic::new(severity, path, message).with_code(code);
        diagnostic.position = self.documents.position(doc, &diagnostic.path);
        diagnostic.resource = self.documents.resource(doc).cloned();
        self.push(diagnostic);
    }

    /// Marks the field at `path` of `doc`, and everything below it, as given meaning by somebody. A path may contain
    /// `[*]` for every item of a list and `*` for every key of a map: `spec.http[*].route[*].weight`. A path that was
    /// not written is no error.
    pub fn honour(&mut self, doc: DocId, path: &str) {
        let documents = Arc::clone(&self.documents);
        documents.each_match(doc, path, &mut |node| self.mark(node));
    }

    /// Marks several paths of one document ([`Diagnostics::honour`]).
    pub fn honour_all(&mut self, doc: DocId, paths: &[&str]) {
        for path in paths {
            self.honour(doc, path);
        }
    }

    /// Marks a field of the mesh's settings ([`honour`](Self::honour)), by its path: `connectTimeout`,
    /// `defaultConfig.drainDuration`.
    pub fn honour_mesh(&mut self, path: &str) {
        self.honoured_mesh.insert(path.to_owned());
    }

    /// Whether a field of the mesh's settings was marked.
    #[must_use]
    pub fn is_mesh_honoured(&self, path: &str) -> bool {
        self.honoured_mesh.contains(path)
    }

    /// The fields that were written in any document and that nobody honoured, each at the highest ancestor below
    /// which nothing is honoured. A security field is reported with `security` severity (error for a check, warning
    /// when running), any other as a warning.
    #[must_use]
    pub fn unhonoured(&self, security: Severity) -> Vec<Diagnostic> {
        let mut found = self.documents.unmarked(&|node| self.is_marked(node), security);
        // A resource with an error was not compiled: what it asks for is refused, not ignored.
        let is_refused = |diagnostic: &Diagnostic| {
            diagnostic.resource.is_some()
                && self
                    .iter()
                    .any(|known| known.severity == Severity::Error && known.resource == diagnostic.resource)
        };
        found.retain(|diagnostic| !is_refused(diagnostic));
        found
    }

    /// Whether there is an error among them.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.items.iter().any(|item| item.severity == Severity::Error)
    }

    /// How many errors there are.
    #[must_use]
    pub fn error_count(&self) -> usize {
        self.items.iter().filter(|item| item.severity == Severity::Error).count()
    }

    /// Every finding, in the order in which they were made.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.items.iter()
    }

    /// How many findings there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nothing was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The index of what was written.
    #[must_use]
    pub fn documents(&self) -> &Arc<Documents> {
        &self.documents
    }

    /// The findings as a JSON array, for the admin port.
    #[cfg(feature = "istio")]
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        self.items.iter().map(Diagnostic::to_json).collect()
    }

    fn mark(&mut self, node: usize) {
        let word = node / 64;
        if self.honoured.len() <= word {
            self.honoured.resize(word + 1, 0);
        }
        self.honoured[word] |= 1 << (node % 64);
    }

    fn is_marked(&self, node: usize) -> bool {
        self.honoured.get(node / 64).is_some_and(|word| word & (1 << (node % 64)) != 0)
    }
}

impl Extend<Diagnostic> for Diagnostics {
    fn extend<I: IntoIterator<Item = Diagnostic>>(&mut self, items: I) {
        self.items.extend(items);
    }
}

impl<'a> IntoIterator for &'a Diagnostics {
    type Item = &'a Diagnostic;
    type IntoIter = std::slice::Iter<'a, Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// One line for each finding.
impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.items.iter().try_for_each(|item| writeln!(f, "{item}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_what_is_known() {
        let bare = Diagnostic::new(Severity::Error, "spec.hosts", "missing");
        assert_eq!(bare.to_string(), "error: spec.hosts: missing");
        let full = bare
            .at(Position { file: "a.yaml".into(), line: 3, column: 7 })
            .about(ResourceName::new("VirtualService", "default", "reviews"))
            .with_code(Some("IST0106"));
        assert_eq!(
            full.to_string(),
            "error: a.yaml:3:7: VirtualService default/reviews: spec.hosts: missing [IST0106]"
        );
    }
}
