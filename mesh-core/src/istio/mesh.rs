//! Reading [`MeshConfig`], which is no resource: a file of its own, or a text within a ConfigMap.

use std::sync::Arc;

use super::document::position;
use super::findings::{Findings, Validate};
use super::loader::readable;
use super::resource_set::SourceFile;
use super::types::mesh_config::MeshConfig;
use super::yaml::{self, Node, Problem, Value};
use crate::diagnostics::{Diagnostic, Position, Severity};

/// The ConfigMap that istiod reads, and its key.
const CONFIG_MAP: &str = "istio";
const KEY: &str = "mesh";

/// The largest file that is read, in bytes.
const MAX_BYTES: usize = 32 << 20;

impl MeshConfig {
    /// Reads the settings of a mesh from a file, which may also be the ConfigMap `istio`. Fields that are not known
    /// are warnings, since the file is shared with istiod. No settings come back when there is an error.
    #[must_use]
    pub fn load(file: &SourceFile) -> (Option<Self>, Vec<Diagnostic>) {
        let text = match readable(file, MAX_BYTES) {
            Ok(text) => text,
            Err(problem) => return (None, vec![diagnostic(&file.name, Severity::Error, problem)]),
        };
        let (documents, problems) = parse(text);
        if !problems.is_empty() {
            let errors = problems.into_iter();
            return (None, errors.map(|problem| diagnostic(&file.name, Severity::Error, problem)).collect());
        }
        let [node] = documents.as_slice() else {
            let what = if documents.is_empty() { "is empty" } else { "holds more than one document" };
            let problem = Problem::new(format!("the file of the mesh's settings {what}"), 1, 1);
            return (None, vec![diagnostic(&file.name, Severity::Error, problem)]);
        };
        match (node.get("apiVersion").and_then(Node::as_str), node.get("kind").and_then(Node::as_str)) {
            (Some(version), Some(kind)) if is_config_map(version, kind, node) => {
                from_config_map(&file.name, node)
            }
            (Some(_), Some(kind)) => {
                let message = format!("{kind} is a resource and not the settings of a mesh");
                (
                    None,
                    vec![diagnostic(
                        &file.name,
                        Severity::Error,
                        Problem::new(message, node.line, node.column),
                    )],
                )
            }
            _ => read(&file.name, node, 0),
        }
    }
}

/// Whether the document is the ConfigMap from which istiod takes its settings.
pub(super) fn is_config_map(api_version: &str, kind: &str, node: &Node) -> bool {
    api_version == "v1"
        && kind == "ConfigMap"
        && node.get("metadata").and_then(|meta| meta.get("name")).and_then(Node::as_str) == Some(CONFIG_MAP)
        && node.get("data").is_some_and(|data| data.get(KEY).is_some())
}

/// Reads the settings within a ConfigMap. Positions are those of the file, to the line.
pub(super) fn from_config_map(file: &Arc<str>, node: &Node) -> (Option<MeshConfig>, Vec<Diagnostic>) {
    let Some(value) = node.get("data").and_then(|data| data.get(KEY)) else { return (None, Vec::new()) };
    let path = format!("data.{KEY}");
    let Some(text) = value.as_str() else {
        let problem = Problem { path, ..Problem::new("expected a text", value.line, value.column) };
        return (None, vec![diagnostic(file, Severity::Error, problem)]);
    };
    let (documents, problems) = parse(text);
    let before = value.line.saturating_sub(1);
    let mut diagnostics: Vec<Diagnostic> = problems
        .into_iter()
        .map(|problem| diagnostic(file, Severity::Error, moved(problem, before)))
        .collect();
    if !diagnostics.is_empty() {
        return (None, diagnostics);
    }
    let Some(inner) = documents.first() else { return (Some(MeshConfig::default()), diagnostics) };
    let (mesh, found) = read(file, inner, before);
    diagnostics.extend(found);
    (mesh, diagnostics)
}

fn read(file: &Arc<str>, node: &Node, before: u32) -> (Option<MeshConfig>, Vec<Diagnostic>) {
    if !matches!(node.value, Value::Map(_)) {
        let problem =
            Problem::new("expected the settings of a mesh, which are a mapping", node.line, node.column);
        return (None, vec![diagnostic(file, Severity::Error, moved(problem, before))]);
    }
    let read = yaml::read::<MeshConfig>(node, "", &[]);
    let unknown = read.unknown.into_iter().map(|problem| (Severity::Warning, problem));
    let errors = read.errors.into_iter().map(|problem| (Severity::Error, problem));
    let mut diagnostics: Vec<Diagnostic> = unknown
        .chain(errors)
        .map(|(severity, problem)| diagnostic(file, severity, moved(problem, before)))
        .collect();
    let Some(mut mesh) = read.value else { return (None, diagnostics) };
    mesh.written = written(file, node, before);
    let mut findings = Findings::new("");
    mesh.validate(&mut findings);
    let valid = !findings.has_errors();
    for finding in findings.into_vec() {
        let (line, column) = place(node, &finding.path);
        let problem = Problem { path: finding.path, line, column, message: finding.message };
        diagnostics.push(diagnostic(file, finding.severity, moved(problem, before)));
    }
    (valid.then_some(mesh), diagnostics)
}

/// The fields that were written. What lies in these is named by itself: one may be honoured and its neighbour not.
const OPENED: [&str; 3] = ["defaultConfig", "defaultConfig.gatewayTopology", PROXY_METADATA];

/// Not fields but names of the user's.
const PROXY_METADATA: &str = "defaultConfig.proxyMetadata";

fn written(file: &Arc<str>, node: &Node, before: u32) -> Vec<(String, Position)> {
    let mut fields = Vec::new();
    let mut open = vec![(String::new(), node)];
    while let Some((prefix, node)) = open.pop() {
        let Value::Map(entries) = &node.value else { continue };
        for entry in entries {
            let is_name = prefix.strip_suffix('.') == Some(PROXY_METADATA);
            let path = if is_name {
                format!("{prefix}{}", entry.key)
            } else {
                format!("{prefix}{}", camel(&entry.key))
            };
            if OPENED.contains(&path.as_str()) {
                open.push((format!("{path}."), &entry.value));
            } else {
                fields.push((path, position(file, entry.line.saturating_add(before), entry.column)));
            }
        }
    }
    fields
}

/// The form of a name that paths have; both forms are read.
fn camel(name: &str) -> String {
    let mut upper = false;
    name.chars()
        .filter_map(|letter| {
            let was = std::mem::replace(&mut upper, letter == '_');
            (!upper).then(|| if was { letter.to_ascii_uppercase() } else { letter })
        })
        .collect()
}

/// Every document of a text, and what could not be read.
fn parse(text: &str) -> (Vec<Node>, Vec<Problem>) {
    let mut reader = yaml::Reader::new(text);
    let documents = std::iter::from_fn(|| reader.document()).collect();
    let problems = reader.problems();
    (documents, problems)
}

/// Where the outermost field of `path` is written.
fn place(node: &Node, path: &str) -> (u32, u32) {
    let field = path.split(['.', '[']).next().unwrap_or_default();
    node.entry(field).map_or((node.line, node.column), |entry| (entry.line, entry.column))
}

fn moved(mut problem: Problem, lines: u32) -> Problem {
    problem.line = problem.line.saturating_add(lines);
    problem
}

fn diagnostic(file: &Arc<str>, severity: Severity, problem: Problem) -> Diagnostic {
    Diagnostic::new(severity, problem.path, problem.message).at(position(file, problem.line, problem.column))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::{LoadOptions, ResourceSet};

    const CONFIG_MAP_YAML: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: istio\n  namespace: istio-system\n\
        data:\n  meshNetworks: 'networks: {}'\n  mesh: |-\n    trustDomain: td\n    ingressClass: x\n    \
        defaultConfig:\n      gatewayTopology:\n        numTrustedProxies: 1\n";

    fn lines(diagnostics: &[Diagnostic]) -> Vec<String> {
        diagnostics.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn mc_01_a_bare_file() {
        let file = SourceFile::new("mesh.yaml", "rootNamespace: root\nfoo: 1\nconnect_timeout: 5s\n");
        let (mesh, diagnostics) = MeshConfig::load(&file);
        assert_eq!(mesh.unwrap().root_namespace(), "root");
        let [unknown] = diagnostics.as_slice() else { panic!("{:?}", lines(&diagnostics)) };
        assert_eq!((unknown.severity, unknown.path.as_str()), (Severity::Warning, "foo"));
        let bad = SourceFile::new("mesh.yaml", "trustDomain: 'a b'\noutboundTrafficPolicy: {mode: X}\n");
        assert_eq!(MeshConfig::load(&bad).0, None);
        let bad = SourceFile::new("mesh.yaml", "\nconnectTimeout: 2h\n");
        let (mesh, diagnostics) = MeshConfig::load(&bad);
        assert_eq!(mesh, None);
        assert_eq!(diagnostics[0].position.as_ref().map(|at| at.line), Some(2));
    }

    #[test]
    fn mc_01_what_nobody_honours_is_reported() {
        let text = "connect_timeout: 5s\ndefaultHttpRetryPolicy: {attempts: 3}\ndefaultConfig:\n  drainDuration: 5s\n  gatewayTopology: {numTrustedProxies: 1}\nmeshMTLS: {minProtocolVersion: TLSV1_3}\n";
        let (mesh, _) = MeshConfig::load(&SourceFile::new("mesh.yaml", text));
        let (set, mut diags) = ResourceSet::load(&[], &LoadOptions::default());
        let set = set.with_mesh_config(mesh.unwrap());
        for path in ["connectTimeout", "defaultConfig.gatewayTopology.numTrustedProxies"] {
            diags.honour_mesh(path);
        }
        assert_eq!(
            lines(&set.unhonoured(&diags, Severity::Error)),
            [
                "warning: mesh.yaml:2:1: defaultHttpRetryPolicy: not enforced by this build",
                "error: mesh.yaml:6:1: meshMTLS: security setting is not enforced by this build",
                "warning: mesh.yaml:4:3: defaultConfig.drainDuration: not enforced by this build",
            ]
        );
    }

    #[test]
    fn mc_01_the_config_map() {
        let file = SourceFile::new("a.yaml", CONFIG_MAP_YAML);
        let (set, diags) = ResourceSet::load(std::slice::from_ref(&file), &LoadOptions::default());
        assert_eq!((set.mesh_config().trust_domain(), set.mesh_config().trusted_proxies()), ("td", 1));
        let [unknown] = &diags.iter().collect::<Vec<_>>()[..] else { panic!("{diags}") };
        assert_eq!((unknown.severity, unknown.path.as_str()), (Severity::Warning, "ingressClass"));
        assert_eq!(unknown.position.as_ref().map(|at| at.line), Some(10));
        assert_eq!(MeshConfig::load(&file).0.unwrap().trust_domain(), "td");

        let set = set.with_mesh_config(MeshConfig::default());
        assert_eq!(set.mesh_config().trust_domain(), "cluster.local");
    }
}
