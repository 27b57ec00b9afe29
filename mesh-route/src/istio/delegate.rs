//! Rules that another virtual service continues (VS-G01).

use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::Resource;
use mesh_core::istio::types::common::{StringMatch, StringMatchKind};
use mesh_core::istio::types::virtual_service::{HttpMatchRequest, HttpRoute, VirtualService};

use super::mesh::Mesh;

/// The rules of a virtual service with their paths, delegates put in their places.
pub(super) fn rules(
    mesh: &Mesh<'_>,
    resource: &Resource<VirtualService>,
    diags: &mut Diagnostics,
) -> Vec<(String, HttpRoute)> {
    let mut rules = Vec::with_capacity(resource.spec.http.len());
    for (at, rule) in resource.spec.http.iter().enumerate() {
        let path = format!("spec.http[{at}]");
        let Some(delegate) = &rule.delegate else {
            rules.push((path, rule.clone()));
            continue;
        };
        let namespace =
            if delegate.namespace.is_empty() { &resource.meta.namespace } else { &delegate.namespace };
        let found = mesh.set.virtual_services().iter().find(|candidate| {
            candidate.meta.name == delegate.name
                && candidate.meta.namespace == *namespace
                && candidate.spec.hosts.is_empty()
                && is_exported_to(candidate, &resource.meta.namespace)
        });
        let Some(found) = found else {
            let message =
                format!("no delegate {namespace}/{} is there: the rule has no effect", delegate.name);
            diags.report(
                resource.doc,
                Severity::Warning,
                format!("{path}.delegate"),
                message,
                Some("IST0101"),
            );
            continue;
        };
        for (inner_at, inner) in found.spec.http.iter().enumerate() {
            // A delegate delegates no further.
            if inner.delegate.is_some() {
                continue;
            }
            match merge(rule, inner) {
                Some(merged) => rules.push((path.clone(), merged)),
                None => diags.warning_at(
                    found.doc,
                    format!("spec.http[{inner_at}].match"),
                    format!(
                        "takes nothing that {path} of {} takes: the rule has no effect there",
                        resource.meta.name
                    ),
                ),
            }
        }
    }
    rules
}

fn is_exported_to(delegate: &Resource<VirtualService>, namespace: &str) -> bool {
    let export_to = &delegate.spec.export_to;
    export_to.is_empty()
        || export_to.iter().any(|to| match to.as_str() {
            "*" => true,
            "." => delegate.meta.namespace == namespace,
            other => other == namespace,
        })
}

/// The delegate's rule within the root's: its own values, else the root's. `None` when no match of the two agrees.
fn merge(root: &HttpRoute, delegate: &HttpRoute) -> Option<HttpRoute> {
    let mut merged = delegate.clone();
    merged.matches = match (root.matches.as_slice(), delegate.matches.as_slice()) {
        (outer, []) => outer.to_vec(),
        ([], inner) => inner.to_vec(),
        (outer, inner) => {
            let both: Vec<_> = inner
                .iter()
                .flat_map(|inner| outer.iter().filter_map(|outer| merge_match(outer, inner)))
                .collect();
            if both.is_empty() {
                return None;
            }
            both
        }
    };
    merged.name = match (root.name.as_str(), delegate.name.as_str()) {
        ("", name) | (name, "") => name.to_owned(),
        (root, name) => format!("{root}-{name}"),
    };
    merged.delegate = None;
    merged.rewrite = merged.rewrite.or_else(|| root.rewrite.clone());
    merged.direct_response = merged.direct_response.or_else(|| root.direct_response.clone());
    merged.timeout = merged.timeout.or(root.timeout);
    merged.retries = merged.retries.or_else(|| root.retries.clone());
    merged.fault = merged.fault.or_else(|| root.fault.clone());
    merged.mirror = merged.mirror.or_else(|| root.mirror.clone());
    merged.mirror_percentage = merged.mirror_percentage.or(root.mirror_percentage);
    merged.mirror_percent = merged.mirror_percent.or(root.mirror_percent);
    if merged.mirrors.is_empty() {
        merged.mirrors.clone_from(&root.mirrors);
    }
    merged.cors_policy = merged.cors_policy.or_else(|| root.cors_policy.clone());
    merged.headers = merged.headers.or_else(|| root.headers.clone());
    Some(merged)
}

/// What both matches take, when the delegate's is a part of the root's.
fn merge_match(root: &HttpMatchRequest, delegate: &HttpMatchRequest) -> Option<HttpMatchRequest> {
    let mut merged = delegate.clone();
    merged.name = match (root.name.as_str(), delegate.name.as_str()) {
        ("", name) | (name, "") => name.to_owned(),
        (root, name) => format!("{root}-{name}"),
    };
    merged.uri = merge_string(root.uri.as_ref(), delegate.uri.as_ref())?;
    merged.scheme = merge_string(root.scheme.as_ref(), delegate.scheme.as_ref())?;
    merged.method = merge_string(root.method.as_ref(), delegate.method.as_ref())?;
    merged.authority = merge_string(root.authority.as_ref(), delegate.authority.as_ref())?;
    merged.ignore_uri_case |= root.ignore_uri_case;
    for (root, merged) in [
        (&root.headers, &mut merged.headers),
        (&root.without_headers, &mut merged.without_headers),
        (&root.query_params, &mut merged.query_params),
    ] {
        for (key, outer) in root {
            let both = merge_string(Some(outer), merged.get(key))?;
            merged.insert(key.clone(), both.unwrap_or_default());
        }
    }
    for (key, value) in &root.source_labels {
        if merged.source_labels.get(key).is_some_and(|own| own != value) {
            return None;
        }
        merged.source_labels.insert(key.clone(), value.clone());
    }
    let same = |outer: &str, inner: &str| outer.is_empty() || inner.is_empty() || outer == inner;
    if !same(&root.source_namespace, &delegate.source_namespace)
        || (root.port != 0 && delegate.port != 0 && root.port != delegate.port)
    {
        return None;
    }
    if merged.source_namespace.is_empty() {
        merged.source_namespace.clone_from(&root.source_namespace);
    }
    if merged.port == 0 {
        merged.port = root.port;
    }
    if merged.gateways.is_empty() {
        merged.gateways.clone_from(&root.gateways);
    } else if !root.gateways.is_empty() && !merged.gateways.iter().all(|name| root.gateways.contains(name)) {
        return None;
    }
    Some(merged)
}

/// The narrower of two predicates; `None` when the inner is no part of the outer, or both are expressions.
fn merge_string(outer: Option<&StringMatch>, inner: Option<&StringMatch>) -> Option<Option<StringMatch>> {
    use StringMatchKind::{Exact, Prefix};
    let (Some(outer), Some(inner)) = (outer, inner) else {
        return Some(inner.or(outer).cloned());
    };
    let contained = match (outer.kind(), inner.kind()) {
        (Exact(outer), Exact(inner)) => outer == inner,
        (Prefix(outer), Exact(inner) | Prefix(inner)) => inner.starts_with(outer),
        _ => outer == inner && !matches!(outer.kind(), StringMatchKind::Regex(_)),
    };
    contained.then(|| Some(inner.clone()))
}
