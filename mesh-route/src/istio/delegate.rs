//! Rules that another virtual service continues (VS-G01).

use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::Resource;
use mesh_core::istio::effective::visibility::is_visible;
use mesh_core::istio::types::common::{StringMatch, StringMatchKind};
use mesh_core::istio::types::virtual_service::{HttpMatchRequest, HttpRoute, VirtualService};

use super::http::gateway_name;
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
        let default = &mesh.config.default_virtual_service_export_to;
        let found = mesh.set.virtual_services().iter().find(|candidate| {
            candidate.meta.name == delegate.name
                && candidate.meta.namespace == *namespace
                && candidate.spec.hosts.is_empty()
                && is_visible(&candidate.spec.export_to, default, namespace, &resource.meta.namespace)
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
            let mut root = rule.clone();
            qualify_gateways(&mut root, &resource.meta.namespace);
            match merge(&root, qualified(mesh, inner, namespace)) {
                Some(merged) => rules.push((path.clone(), merged)),
                None => diags.warning_at(
                    found.doc,
                    format!("spec.http[{inner_at}].match"),
                    format!(
                        "one of them takes nothing that {path} of {} takes: the rule has no effect there",
                        resource.meta.name
                    ),
                ),
            }
        }
    }
    rules
}

/// The rule with the names in it as its own namespace means them, for it will stand in another's.
fn qualified(mesh: &Mesh<'_>, rule: &HttpRoute, namespace: &str) -> HttpRoute {
    let mut rule = rule.clone();
    qualify_gateways(&mut rule, namespace);
    let destinations = rule.route.iter_mut().filter_map(|to| to.destination.as_mut());
    let mirrors = rule.mirrors.iter_mut().filter_map(|to| to.destination.as_mut());
    for to in destinations.chain(mirrors).chain(&mut rule.mirror) {
        to.host = mesh.resolve(&to.host, namespace);
    }
    rule
}

fn qualify_gateways(rule: &mut HttpRoute, namespace: &str) {
    for name in rule.matches.iter_mut().flat_map(|matched| &mut matched.gateways) {
        *name = gateway_name(name, namespace);
    }
}

/// The delegate's rule within the root's: its own values, else the root's. `None` when one of its matches lies within
/// none of the root's; the others do not count then.
fn merge(root: &HttpRoute, delegate: HttpRoute) -> Option<HttpRoute> {
    let mut merged = delegate;
    if merged.matches.is_empty() {
        merged.matches.clone_from(&root.matches);
    } else if !root.matches.is_empty() {
        let mut both = Vec::with_capacity(merged.matches.len());
        for inner in &merged.matches {
            let before = both.len();
            both.extend(root.matches.iter().filter_map(|outer| merge_match(outer, inner)));
            if both.len() == before {
                return None;
            }
        }
        merged.matches = both;
    }
    merged.name = match (root.name.as_str(), merged.name.as_str()) {
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
    if root.ignore_uri_case != delegate.ignore_uri_case {
        return None;
    }
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
    // A namespace of the root has to be repeated, in Istio too.
    if !root.source_namespace.is_empty() && root.source_namespace != delegate.source_namespace {
        return None;
    }
    if root.port != 0 && delegate.port != 0 && root.port != delegate.port {
        return None;
    }
    if merged.port == 0 {
        merged.port = root.port;
    }
    if merged.stat_prefix.is_empty() {
        merged.stat_prefix.clone_from(&root.stat_prefix);
    }
    if merged.gateways.is_empty() {
        merged.gateways.clone_from(&root.gateways);
    } else if !root.gateways.is_empty() && !merged.gateways.iter().all(|name| root.gateways.contains(name)) {
        return None;
    }
    Some(merged)
}

/// The narrower of two predicates; `None` when the inner is no part of the outer, as Istio tells it: an expression,
/// an empty predicate and the empty string contain nothing and lie within nothing.
fn merge_string(outer: Option<&StringMatch>, inner: Option<&StringMatch>) -> Option<Option<StringMatch>> {
    use StringMatchKind::{Exact, Prefix};
    let (Some(outer), Some(inner)) = (outer, inner) else {
        return Some(inner.or(outer).cloned());
    };
    let contained = match (outer.kind(), inner.kind()) {
        (Exact(outer), Exact(inner)) => !outer.is_empty() && outer == inner,
        (Prefix(outer), Exact(inner) | Prefix(inner)) => !outer.is_empty() && inner.starts_with(outer),
        _ => false,
    };
    contained.then(|| Some(inner.clone()))
}
