//! The index of what was written: every field of every document, with its position, in 16 bytes each.
//!
//! The loader drops the parsed trees. What stays is one flat array in pre-order, in which a node knows its name, its
//! position and the end of its subtree, so that children and descendants are ranges and a set of nodes is a bitmap.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::diagnostics::{Diagnostic, Position, Severity};

/// A document of a loaded configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DocId(u32);

/// Which resource a document holds. Prints as `VirtualService default/reviews`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceName {
    /// The kind.
    pub kind: Arc<str>,
    /// The namespace; empty for what has none.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ResourceName {
    /// The name of a resource by its parts.
    #[must_use]
    pub fn new(kind: impl Into<Arc<str>>, namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { kind: kind.into(), namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// The fields of all documents of a configuration, with their positions.
#[derive(Debug, Default)]
pub struct Documents {
    documents: Vec<Document>,
    nodes: Vec<IndexNode>,
    names: Vec<Arc<str>>,
}

#[derive(Debug)]
struct Document {
    file: Arc<str>,
    resource: ResourceName,
    /// The kind exists for security, so that an unhonoured field of it is grave.
    security: bool,
    /// Whether an unhonoured field of it is worth a word.
    report: bool,
    nodes: Range<u32>,
}

/// A field or a list item.
#[derive(Clone, Copy, Debug)]
struct IndexNode {
    /// An index into `names`, or a list index with [`ITEM`] set.
    name: u32,
    line: u32,
    column: u32,
    /// One past the last node of the subtree.
    end: u32,
}

const ITEM: u32 = 1 << 31;

/// Says that a field means nothing to this build; `grave` when it is there for security.
pub(crate) fn not_enforced(path: &str, grave: bool, security: Severity) -> Diagnostic {
    if grave {
        Diagnostic::new(security, path, "security setting is not enforced by this build")
    } else {
        Diagnostic::new(Severity::Warning, path, "not enforced by this build")
    }
}

impl Documents {
    /// Every document, in the order in which they were loaded.
    pub fn ids(&self) -> impl Iterator<Item = DocId> + '_ {
        (0..self.documents.len()).filter_map(|index| u32::try_from(index).ok()).map(DocId)
    }

    /// The resource that a document holds.
    #[must_use]
    pub fn resource(&self, doc: DocId) -> Option<&ResourceName> {
        self.document(doc).map(|document| &document.resource)
    }

    /// Where the field at `path` was written; if it was not, where its nearest ancestor was.
    #[must_use]
    pub fn position(&self, doc: DocId, path: &str) -> Option<Position> {
        let document = self.document(doc)?;
        let mut at = document.nodes.start;
        for step in Steps(path) {
            match self.children(at).find(|child| self.is_step(*child, &step)) {
                Some(child) => at = child,
                None => break,
            }
        }
        let node = self.node(at)?;
        Some(Position { file: Arc::clone(&document.file), line: node.line, column: node.column })
    }

    /// Whether the field at `path` was written.
    #[must_use]
    pub fn is_present(&self, doc: DocId, path: &str) -> bool {
        let mut found = false;
        self.each_match(doc, path, &mut |_| found = true);
        found
    }

    pub(crate) fn each_match(&self, doc: DocId, path: &str, found: &mut dyn FnMut(usize)) {
        if let Some(document) = self.document(doc) {
            self.descend(document.nodes.start, Steps(path), found);
        }
    }

    /// What is not marked, at the highest node below which nothing is.
    pub(crate) fn unmarked(&self, marked: &dyn Fn(usize) -> bool, security: Severity) -> Vec<Diagnostic> {
        let mut out = Vec::new();
        for document in self.documents.iter().filter(|document| document.report) {
            let mut path = String::new();
            for top in self.children(document.nodes.start) {
                if !ENVELOPE.contains(&self.name(top)) {
                    self.collapse(document, top, &mut path, marked, security, &mut out);
                }
            }
        }
        out
    }

    fn collapse(
        &self,
        document: &Document,
        at: u32,
        path: &mut String,
        marked: &dyn Fn(usize) -> bool,
        security: Severity,
        out: &mut Vec<Diagnostic>,
    ) {
        let Some(node) = self.node(at) else { return };
        if marked(at as usize) {
            return;
        }
        let length = path.len();
        self.push_step(at, path);
        if (at..node.end).any(|below| marked(below as usize)) {
            for child in self.children(at) {
                self.collapse(document, child, path, marked, security, out);
            }
        } else {
            let grave = document.security || self.is_security(document, at, node.end, path);
            let position =
                Position { file: Arc::clone(&document.file), line: node.line, column: node.column };
            out.push(not_enforced(path, grave, security).at(position).about(document.resource.clone()));
        }
        path.truncate(length);
    }

    /// Whether the subtree, or the path to it, is about TLS or JWT. The `tls` list of a VirtualService is routing.
    fn is_security(&self, document: &Document, at: u32, end: u32, path: &str) -> bool {
        if &*document.resource.kind == "VirtualService" {
            return false;
        }
        let grave = |name: &str| {
            name == "tls" || name == "mtls" || name.starts_with("jwt") || name == "portLevelMtls"
        };
        (at..end).any(|below| grave(self.name(below)))
            || Steps(path).any(|step| matches!(step, Step::Key(key) if grave(key)))
    }

    fn descend(&self, at: u32, mut steps: Steps<'_>, found: &mut dyn FnMut(usize)) {
        match steps.next() {
            None => found(at as usize),
            Some(step) => {
                for child in self.children(at) {
                    if self.is_step(child, &step) {
                        self.descend(child, steps.clone(), found);
                    }
                }
            }
        }
    }

    fn is_step(&self, at: u32, step: &Step<'_>) -> bool {
        let Some(node) = self.node(at) else { return false };
        match step {
            Step::Index(index) => node.name == ITEM | index,
            Step::EveryItem => node.name & ITEM != 0,
            Step::EveryKey => node.name & ITEM == 0,
            Step::Key(key) => {
                let name = self.name(at);
                node.name & ITEM == 0
                    && (name == *key || (name.contains('_') && snake_to_camel(name) == *key))
            }
        }
    }

    fn push_step(&self, at: u32, path: &mut String) {
        let Some(node) = self.node(at) else { return };
        if node.name & ITEM != 0 {
            path.push_str(&format!("[{}]", node.name & !ITEM));
            return;
        }
        let name = self.name(at);
        if is_plain_key(name) {
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(name);
        } else {
            path.push_str(&format!("[{name:?}]"));
        }
    }

    fn name(&self, at: u32) -> &str {
        let name = self.node(at).filter(|node| node.name & ITEM == 0).map(|node| node.name as usize);
        name.and_then(|name| self.names.get(name)).map_or("", |name| name)
    }

    fn children(&self, at: u32) -> impl Iterator<Item = u32> + '_ {
        let end = self.node(at).map_or(at, |node| node.end);
        let mut next = at + 1;
        std::iter::from_fn(move || {
            let child = next;
            if child >= end {
                return None;
            }
            next = self.node(child)?.end;
            Some(child)
        })
    }

    fn node(&self, at: u32) -> Option<&IndexNode> {
        self.nodes.get(at as usize)
    }

    fn document(&self, doc: DocId) -> Option<&Document> {
        self.documents.get(doc.0 as usize)
    }
}

/// What every Kubernetes resource has around its meaning.
const ENVELOPE: [&str; 4] = ["apiVersion", "kind", "metadata", "status"];

/// `snake_case` as `camelCase`; protobuf's JSON form accepts both.
pub(crate) fn snake_to_camel(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        if c == '_' {
            upper = true;
        } else {
            out.push(if upper { c.to_ascii_uppercase() } else { c });
            upper = false;
        }
    }
    out
}

/// Whether a key can stand in a path as it is.
pub(crate) fn is_plain_key(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// A step of a field path.
#[derive(Debug, PartialEq, Eq)]
enum Step<'a> {
    Key(&'a str),
    Index(u32),
    EveryItem,
    EveryKey,
}

/// The steps of `a.b[0]["c.d"][*].*`; a malformed rest is one key, which matches nothing.
#[derive(Clone, Debug)]
struct Steps<'a>(&'a str);

impl<'a> Iterator for Steps<'a> {
    type Item = Step<'a>;

    fn next(&mut self) -> Option<Step<'a>> {
        let rest = self.0.strip_prefix('.').unwrap_or(self.0);
        if rest.is_empty() {
            return None;
        }
        if let Some(quoted) = rest.strip_prefix("[\"") {
            let (key, rest) = quoted.split_once("\"]").unwrap_or((quoted, ""));
            self.0 = rest;
            return Some(Step::Key(key));
        }
        if let Some(bracketed) = rest.strip_prefix('[') {
            let (index, rest) = bracketed.split_once(']').unwrap_or((bracketed, ""));
            self.0 = rest;
            return Some(match index {
                "*" => Step::EveryItem,
                _ => index.parse().map_or(Step::Key(index), Step::Index),
            });
        }
        let end = rest.find(['.', '[']).unwrap_or(rest.len());
        let (key, rest) = rest.split_at(end);
        self.0 = rest;
        Some(if key == "*" { Step::EveryKey } else { Step::Key(key) })
    }
}

#[cfg(feature = "istio")]
pub(crate) use build::DocumentsBuilder;

#[cfg(feature = "istio")]
mod build {
    use std::collections::HashMap;
    use std::sync::Arc;

    use super::{DocId, Document, Documents, ITEM, IndexNode, Position, ResourceName};

    /// Collects the index while documents are loaded.
    #[derive(Debug, Default)]
    pub(crate) struct DocumentsBuilder {
        index: Documents,
        interned: HashMap<Arc<str>, u32, foldhash::fast::RandomState>,
    }

    impl DocumentsBuilder {
        /// Begins a document; its nodes follow, and then [`DocumentsBuilder::finish`].
        pub(crate) fn begin(
            &mut self,
            file: &Arc<str>,
            resource: ResourceName,
            security: bool,
            report: bool,
            line: u32,
            column: u32,
        ) -> DocId {
            let doc = DocId(count(self.index.documents.len()));
            let start = count(self.index.nodes.len());
            self.index.documents.push(Document {
                file: Arc::clone(file),
                resource,
                security,
                report,
                nodes: start..start,
            });
            self.index.nodes.push(IndexNode { name: ITEM, line, column, end: start });
            doc
        }

        /// Adds a field below the open nodes and opens it.
        pub(crate) fn open_field(&mut self, name: &str, line: u32, column: u32) -> u32 {
            let name = self.intern(name);
            self.open(name, line, column)
        }

        /// Adds a list item below the open nodes and opens it.
        pub(crate) fn open_item(&mut self, index: usize, line: u32, column: u32) -> u32 {
            self.open(ITEM | count(index), line, column)
        }

        /// Closes a node: what was added since is its subtree.
        pub(crate) fn close(&mut self, node: u32) {
            let end = count(self.index.nodes.len());
            if let Some(node) = self.index.nodes.get_mut(node as usize) {
                node.end = end;
            }
        }

        /// Ends the document that was begun last.
        pub(crate) fn finish(&mut self) {
            let end = count(self.index.nodes.len());
            if let Some(document) = self.index.documents.last_mut() {
                document.nodes.end = end;
                let root = document.nodes.start;
                self.close(root);
            }
        }

        /// Where a field of a finished document was written ([`Documents::position`]).
        pub(crate) fn position(&self, doc: DocId, path: &str) -> Option<Position> {
            self.index.position(doc, path)
        }

        /// The index, complete.
        pub(crate) fn build(mut self) -> Documents {
            self.index.documents.shrink_to_fit();
            self.index.nodes.shrink_to_fit();
            self.index.names.shrink_to_fit();
            self.index
        }

        fn open(&mut self, name: u32, line: u32, column: u32) -> u32 {
            let at = count(self.index.nodes.len());
            self.index.nodes.push(IndexNode { name, line, column, end: at + 1 });
            at
        }

        fn intern(&mut self, name: &str) -> u32 {
            if let Some(known) = self.interned.get(name) {
                return *known;
            }
            let id = count(self.index.names.len());
            let name: Arc<str> = name.into();
            self.index.names.push(Arc::clone(&name));
            self.interned.insert(name, id);
            id
        }
    }

    /// Indexes are 32 bits wide; the budget of the parser keeps them far below that.
    fn count(len: usize) -> u32 {
        u32::try_from(len).unwrap_or(u32::MAX)
    }
}

#[cfg(all(test, feature = "istio"))]
mod tests {
    use super::*;
    use crate::diagnostics::Diagnostics;

    /// `spec: {hosts: [a], http: [{route: 1, timeout: 2}, {route: 3}], trafficPolicy: {tls: {mode: x}}}`
    fn sample(kind: &str) -> (Arc<Documents>, DocId) {
        let mut b = DocumentsBuilder::default();
        let file: Arc<str> = "a.yaml".into();
        let doc = b.begin(&file, ResourceName::new(kind, "default", "x"), false, true, 1, 1);
        let kind_field = b.open_field("kind", 1, 1);
        b.close(kind_field);
        let spec = b.open_field("spec", 2, 1);
        let hosts = b.open_field("hosts", 3, 3);
        let item = b.open_item(0, 3, 10);
        b.close(item);
        b.close(hosts);
        let http = b.open_field("http", 4, 3);
        for index in 0..2 {
            let rule = b.open_item(index, 5 + index as u32, 5);
            let route = b.open_field("route", 5 + index as u32, 7);
            b.close(route);
            if index == 0 {
                let timeout = b.open_field("time_out", 9, 9);
                b.close(timeout);
            }
            b.close(rule);
        }
        b.close(http);
        let policy = b.open_field("trafficPolicy", 10, 3);
        let tls = b.open_field("tls", 11, 5);
        let mode = b.open_field("mode", 12, 7);
        for node in [mode, tls, policy, spec] {
            b.close(node);
        }
        b.finish();
        (Arc::new(b.build()), doc)
    }

    #[test]
    fn positions_of_what_is_written_and_of_the_nearest_ancestor() {
        let (documents, doc) = sample("DestinationRule");
        let at = |path| documents.position(doc, path).map(|p| (p.line, p.column));
        assert_eq!(at("spec.http[1].route"), Some((6, 7)));
        assert_eq!(at("spec.http[0].timeOut"), Some((9, 9)), "snake case is found by its camel case");
        assert_eq!(at("spec.http[1].timeOut"), Some((6, 5)));
        assert_eq!(at("spec.http[7].route"), Some((4, 3)));
        assert_eq!(at(""), Some((1, 1)));
        assert!(documents.is_present(doc, "spec.http[*].route") && !documents.is_present(doc, "spec.tcp"));
    }

    #[test]
    fn what_nobody_honours_is_reported_at_the_highest_ancestor() {
        let (documents, doc) = sample("DestinationRule");
        let mut diags = Diagnostics::about(Arc::clone(&documents));
        let seen = |diags: &Diagnostics| -> Vec<(String, Severity)> {
            diags.unhonoured(Severity::Error).into_iter().map(|d| (d.path, d.severity)).collect()
        };
        assert_eq!(seen(&diags), [("spec".to_owned(), Severity::Error)], "there is a tls block below");
        diags.honour_all(doc, &["spec.hosts", "spec.http[*].route", "spec.absent"]);
        assert_eq!(
            seen(&diags),
            [
                ("spec.http[0].time_out".to_owned(), Severity::Warning),
                ("spec.trafficPolicy".to_owned(), Severity::Error)
            ]
        );
        diags.honour(doc, "spec.http[0]");
        diags.honour(doc, "spec.trafficPolicy.*.mode");
        assert_eq!(seen(&diags), []);
    }

    #[test]
    fn the_tls_routes_of_a_virtual_service_are_not_security() {
        let (documents, _) = sample("VirtualService");
        let found = Diagnostics::about(documents).unhonoured(Severity::Error);
        assert_eq!(found.iter().map(|d| d.severity).collect::<Vec<_>>(), [Severity::Warning]);
    }

    #[test]
    fn steps_of_a_path() {
        let steps: Vec<_> = Steps("a.b[0][\"c.d\"].e[*].*").collect();
        use Step::*;
        assert_eq!(steps, [Key("a"), Key("b"), Index(0), Key("c.d"), Key("e"), EveryItem, EveryKey]);
    }
}
