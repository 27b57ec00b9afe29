//! What a validator found, by field path.
//!
//! A validator never stops at its first finding. It walks the resource with [`Findings::within`], so that each
//! finding carries the whole path (`spec.http[2].route[0].weight`); the loader adds the position in the file.

use std::fmt::{Display, Write as _};

use super::envelope::Metadata;
use crate::diagnostics::Severity;

/// One finding of a validator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Error or warning.
    pub severity: Severity,
    /// The field, as `spec.http[2].route[0].weight`.
    pub path: String,
    /// The reason, without the path.
    pub message: String,
    /// Istio's analysis code (`IST0106`), where Istio has one for it.
    pub code: Option<&'static str>,
}

/// The findings of one resource, in the order in which they were made.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    subject: Metadata,
    prefix: String,
    items: Vec<Finding>,
}

impl Findings {
    /// An empty list whose paths begin with `prefix` (`spec`).
    #[must_use]
    pub fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), ..Self::default() }
    }

    /// An empty list for the resource that `subject` names, whose paths begin with `prefix` (`spec`).
    #[must_use]
    pub fn about(subject: Metadata, prefix: impl Into<String>) -> Self {
        Self { subject, prefix: prefix.into(), items: Vec::new() }
    }

    /// The resource that is judged: some rules speak of its name, its namespace or its annotations.
    #[must_use]
    pub const fn subject(&self) -> &Metadata {
        &self.subject
    }

    /// Runs `f` with `path` in place of the current path, for the rules about `metadata`.
    pub fn at_root<R>(&mut self, path: impl Into<String>, f: impl FnOnce(&mut Self) -> R) -> R {
        let before = std::mem::replace(&mut self.prefix, path.into());
        let result = f(self);
        self.prefix = before;
        result
    }

    /// Records an error at `field` below the current path (`""` is the current path itself).
    pub fn error(&mut self, field: &str, message: impl Into<String>) {
        self.push(Severity::Error, field, message.into(), None);
    }

    /// Records a warning at `field` below the current path (`""` is the current path itself).
    pub fn warning(&mut self, field: &str, message: impl Into<String>) {
        self.push(Severity::Warning, field, message.into(), None);
    }

    /// Records a warning under one of Istio's analysis codes.
    pub fn warning_code(&mut self, field: &str, message: impl Into<String>, code: &'static str) {
        self.push(Severity::Warning, field, message.into(), Some(code));
    }

    /// Runs `f` with `.field` appended to the current path.
    pub fn within<R>(&mut self, field: impl Display, f: impl FnOnce(&mut Self) -> R) -> R {
        self.scoped(|prefix| join(prefix, &field.to_string()), f)
    }

    /// Runs `f` with `.field[index]` appended to the current path.
    pub fn item<R>(&mut self, field: impl Display, index: usize, f: impl FnOnce(&mut Self) -> R) -> R {
        self.scoped(|prefix| join(prefix, &format!("{field}[{index}]")), f)
    }

    /// Whether there is an error among the findings.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.items.iter().any(|finding| finding.severity == Severity::Error)
    }

    /// The findings so far.
    pub fn iter(&self) -> std::slice::Iter<'_, Finding> {
        self.items.iter()
    }

    /// The findings, consumed.
    #[must_use]
    pub fn into_vec(self) -> Vec<Finding> {
        self.items
    }

    fn scoped<R>(&mut self, extend: impl FnOnce(&mut String), f: impl FnOnce(&mut Self) -> R) -> R {
        let length = self.prefix.len();
        extend(&mut self.prefix);
        let result = f(self);
        self.prefix.truncate(length);
        result
    }

    fn push(&mut self, severity: Severity, field: &str, message: String, code: Option<&'static str>) {
        let mut path = self.prefix.clone();
        join(&mut path, field);
        self.items.push(Finding { severity, path, message, code });
    }
}

impl<'a> IntoIterator for &'a Findings {
    type Item = &'a Finding;
    type IntoIter = std::slice::Iter<'a, Finding>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A resource that can say what is wrong with it, by itself and without IO.
pub trait Validate {
    /// Appends every error and warning to `out`; the current path of `out` is that of `self`.
    fn validate(&self, out: &mut Findings);
}

fn join(prefix: &mut String, field: &str) {
    if field.is_empty() {
        return;
    }
    if !prefix.is_empty() && !field.starts_with('[') {
        prefix.push('.');
    }
    // Writing to a String cannot fail.
    let _ = prefix.write_str(field);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_nest_and_unwind() {
        let mut out = Findings::new("spec");
        out.item("http", 2, |out| {
            out.item("route", 0, |out| out.error("weight", "must not be negative"));
            out.warning("", "shadowed");
        });
        out.error("hosts", "missing");
        let paths: Vec<_> = out.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(paths, ["spec.http[2].route[0].weight", "spec.http[2]", "spec.hosts"]);
        assert!(out.has_errors());
    }
}
