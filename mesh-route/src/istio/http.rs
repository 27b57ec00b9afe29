//! HTTP rules of a VirtualService compiled into routes.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::Resource;
use mesh_core::istio::effective::scope::is_subset;
use mesh_core::istio::types::common::{StringMatch, StringMatchKind};
use mesh_core::istio::types::virtual_service::{
    HeaderOperations, HttpMatchRequest, HttpRedirect, HttpRoute, HttpRouteDestination, RedirectPortSelection,
    VirtualService,
};
use mesh_core::matcher::{HeaderMatcher, QueryMatcher, StringMatcher};

use super::clusters::{Clusters, Found};
use super::mesh::Mesh;
use super::{annotations, retry};
use crate::cluster::Discovery;
use crate::direct_response::DirectResponse;
use crate::headers::HeaderOps;
use crate::redirect::{Redirect, RedirectPath, RedirectPort};
use crate::rewrite::{PathRewrite, RegexRewrite, Rewrite};
use crate::route::{ActionKind, Destination, Forward, PseudoHeaderMatcher, Route, RouteAction, RouteMatch};
use crate::weighted::Weighted;

/// Whether a header name of a match stands for a claim of a verified token (VS-M07).
pub(super) fn is_claim(name: &str) -> bool {
    name.to_ascii_lowercase().starts_with("@request.auth.claims")
}

/// Where the rules of a virtual service are compiled for.
pub(super) struct Place<'p> {
    /// `mesh`, or `namespace/name` of the gateways that expose this port.
    pub(super) gateways: &'p [String],
    /// The port of the listener; `None` for requests that name no port.
    pub(super) port: Option<u16>,
}

/// Compiles rules for one place. What cannot be compiled is reported; the rule is then left out.
pub(super) struct Rules<'a, 'm> {
    pub(super) mesh: &'a Mesh<'m>,
    pub(super) clusters: &'a mut Clusters<'m>,
    pub(super) diags: &'a mut Diagnostics,
}

impl<'m> Rules<'_, 'm> {
    /// The routes of a virtual service, in order. Nothing follows a rule that takes every request (VS-03).
    pub(super) fn routes(
        &mut self,
        resource: &Resource<VirtualService>,
        rules: &[(String, HttpRoute)],
        place: &Place<'_>,
    ) -> Vec<Arc<Route>> {
        let mut routes = Vec::new();
        for (path, rule) in rules {
            let matches: Vec<_> =
                (0..).zip(&rule.matches).filter(|(_, m)| self.applies(resource, m, place)).collect();
            if matches.is_empty() && !rule.matches.is_empty() {
                continue;
            }
            let mut catch_all = rule.matches.is_empty();
            let mut compile = |matched: Option<(usize, &HttpMatchRequest)>| {
                let action = self.action(resource, path, rule, matched.map(|(_, m)| m), place)?;
                let matcher = match matched {
                    None => RouteMatch::default(),
                    Some((at, matched)) => self.matcher(resource, &format!("{path}.match[{at}]"), matched)?,
                };
                catch_all |= matcher.is_catch_all();
                let name = match matched.map(|(_, m)| m.name.as_str()).filter(|name| !name.is_empty()) {
                    Some(name) if rule.name.is_empty() => name.to_owned(),
                    Some(name) => format!("{}.{name}", rule.name),
                    None if rule.name.is_empty() => default_name(resource, path),
                    None => rule.name.clone(),
                };
                Some(Arc::new(Route::new(name, matcher, Arc::new(action))))
            };
            if matches.is_empty() {
                routes.extend(compile(None));
            } else {
                for matched in matches {
                    routes.extend(compile(Some(matched)));
                }
            }
            if catch_all {
                break;
            }
        }
        routes
    }

    /// Whether a match is for this place and workload: its own gateways override those of the virtual service, and
    /// then the source is not looked at (VS-M13).
    fn applies(
        &self,
        resource: &Resource<VirtualService>,
        matched: &HttpMatchRequest,
        place: &Place<'_>,
    ) -> bool {
        if matched.port != 0 && place.port.is_some_and(|port| matched.port != u32::from(port)) {
            return false;
        }
        if !matched.gateways.is_empty() {
            return names_gateway(&matched.gateways, &resource.meta.namespace, place.gateways);
        }
        let workload = &self.mesh.cx.workload;
        names_gateway(&resource.spec.gateways, &resource.meta.namespace, place.gateways)
            && is_subset(&matched.source_labels, &workload.labels)
            && (matched.source_namespace.is_empty() || matched.source_namespace == workload.namespace)
    }

    fn matcher(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        matched: &HttpMatchRequest,
    ) -> Option<RouteMatch> {
        let mut compile = |field: &str, matcher: &StringMatch| match string_matcher(matcher) {
            Ok(compiled) => Some(compiled),
            Err(reason) => {
                self.diags.error_at(resource.doc, format!("{path}.{field}"), reason);
                None
            }
        };
        let mut route = RouteMatch::default();
        if let Some(uri) = &matched.uri {
            let compiled = compile("uri", uri)?;
            route.path = Some(if matched.ignore_uri_case { compiled.ignore_case() } else { compiled });
        }
        for (field, matcher, slot) in [
            ("method", &matched.method, &mut route.method),
            ("scheme", &matched.scheme, &mut route.scheme),
            ("authority", &matched.authority, &mut route.authority),
        ] {
            if let Some(matcher) = matcher {
                *slot = Some(compile(field, matcher)?);
            }
        }
        for (field, headers, inverted) in
            [("headers", &matched.headers, false), ("withoutHeaders", &matched.without_headers, true)]
        {
            for (name, matcher) in headers {
                // Istio ignores these keys; what they say is said by the fields of that name (VS-M06).
                if matches!(name.as_str(), "uri" | "scheme" | "method" | "authority") {
                    continue;
                }
                if name.starts_with(':') {
                    let value =
                        if is_presence(matcher) { StringMatcher::any() } else { compile(field, matcher)? };
                    match PseudoHeaderMatcher::new(name, value, inverted) {
                        Some(pseudo) => route.pseudo_headers.push(pseudo),
                        None => {
                            let message = format!("{name:?} is no pseudo-header: the rule takes no request");
                            self.diags.error_at(resource.doc, format!("{path}.{field}"), message);
                            return None;
                        }
                    }
                    continue;
                }
                if is_claim(name) {
                    // Nothing here verifies tokens yet, so nobody has a claim: a rule that asks for one takes no
                    // request, and that one is absent always holds.
                    if inverted {
                        continue;
                    }
                    return None;
                }
                let name = match HeaderName::try_from(name.as_str()) {
                    Ok(name) => name,
                    Err(error) => {
                        let message = format!("{name:?}: {error}");
                        self.diags.error_at(resource.doc, format!("{path}.{field}"), message);
                        return None;
                    }
                };
                let header = if is_presence(matcher) {
                    HeaderMatcher::present(name)
                } else {
                    HeaderMatcher::value(name, compile(field, matcher)?)
                };
                route.headers.push(if inverted { header.inverted() } else { header });
            }
        }
        for (name, matcher) in &matched.query_params {
            route.queries.push(if is_presence(matcher) {
                QueryMatcher::present(name.as_str())
            } else {
                QueryMatcher::value(name.as_str(), compile("queryParams", matcher)?)
            });
        }
        Some(route)
    }

    fn action(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        rule: &HttpRoute,
        matched: Option<&HttpMatchRequest>,
        place: &Place<'_>,
    ) -> Option<RouteAction> {
        let kind = if let Some(redirect) = &rule.redirect {
            ActionKind::Redirect(self.redirect(resource, path, redirect, matched)?)
        } else if let Some(direct) = &rule.direct_response {
            let body = match direct.body.as_ref() {
                None => Bytes::new(),
                Some(body) => match (&body.string, &body.bytes) {
                    (Some(text), _) => Bytes::from(text.clone()),
                    (None, Some(encoded)) => match STANDARD.decode(encoded) {
                        Ok(decoded) => Bytes::from(decoded),
                        Err(error) => {
                            self.diags.error_at(
                                resource.doc,
                                format!("{path}.directResponse.body.bytes"),
                                error.to_string(),
                            );
                            return None;
                        }
                    },
                    (None, None) => Bytes::new(),
                },
            };
            let status =
                u16::try_from(direct.status).ok().and_then(|status| StatusCode::from_u16(status).ok())?;
            ActionKind::DirectResponse(DirectResponse { status, body })
        } else {
            ActionKind::Forward(self.forward(resource, path, rule, matched, place)?)
        };
        let mut action = RouteAction::new(kind);
        if let Some(headers) = &rule.headers {
            let field = format!("{path}.headers");
            let (request, authority) = self.header_ops(resource, &field, headers.request.as_ref(), true)?;
            action.request_headers = request;
            action.response_headers = self.header_ops(resource, &field, headers.response.as_ref(), false)?.0;
            // What a header operation says of the authority is a rewrite; the rewrite field itself excludes it.
            if let (Some(authority), ActionKind::Forward(forward)) = (authority, &mut action.kind) {
                forward.rewrite.authority.get_or_insert(authority);
            }
        }
        action.fault = rule.fault.as_ref().and_then(|fault| super::fault::compile(fault, &resource.meta));
        if let Some(policy) = &rule.cors_policy {
            match super::cors::compile(policy) {
                Ok(policy) => action.cors = Some(Box::new(policy)),
                Err((field, reason)) => {
                    self.diags.error_at(resource.doc, format!("{path}.corsPolicy{field}"), reason);
                    return None;
                }
            }
        }
        Some(action)
    }

    fn forward(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        rule: &HttpRoute,
        matched: Option<&HttpMatchRequest>,
        place: &Place<'_>,
    ) -> Option<Forward> {
        let mut destinations = Vec::with_capacity(rule.route.len());
        for (at, destination) in rule.route.iter().enumerate() {
            let path = format!("{path}.route[{at}]");
            let weight = u32::try_from(destination.weight).unwrap_or(0);
            destinations.push((weight, self.destination(resource, &path, destination, place)?));
        }
        let mut forward = match Weighted::new(destinations) {
            Ok(destinations) => Forward::new(destinations),
            Err(error) => {
                self.diags.error_at(resource.doc, format!("{path}.route"), error.to_string());
                return None;
            }
        };
        forward.timeout = rule.timeout.map(|timeout| timeout.to_std()).filter(|timeout| !timeout.is_zero());
        forward.retry = retry::of_rule(self.mesh, resource, path, rule.retries.as_ref(), self.diags)?;
        let annotation = |name: &str| resource.meta.annotations.get(name).map(String::as_str);
        // A value that is none was reported.
        forward.sticky =
            annotation(annotations::STICKY_SPLIT).and_then(|value| value.parse().ok()).map(Box::new);
        forward = super::canary::apply(self.mesh, resource, rule, forward);
        forward.idle_timeout =
            annotation(annotations::STREAM_IDLE_TIMEOUT).and_then(|value| annotations::duration(value).ok());
        forward.client_overrides = annotation(annotations::CLIENT_OVERRIDES) == Some("true");
        forward.mirrors = super::mirror::compile(self, resource, path, rule, place);
        if let Some(rewrite) = &rule.rewrite {
            let at = format!("{path}.rewrite");
            forward.rewrite = Rewrite {
                path: match &rewrite.uri_regex_rewrite {
                    Some(regex) => match RegexRewrite::new(&regex.pattern, &regex.rewrite) {
                        Ok(regex) => PathRewrite::Regex(Box::new(regex)),
                        Err(reason) => {
                            self.diags.error_at(resource.doc, format!("{at}.uriRegexRewrite"), reason);
                            return None;
                        }
                    },
                    None if rewrite.uri.is_empty() => PathRewrite::Keep,
                    None => path_rewrite(&rewrite.uri, matched),
                },
                authority: match rewrite.authority.as_str() {
                    "" => None,
                    authority => HeaderValue::try_from(authority).ok(),
                },
            };
        }
        Some(forward)
    }

    fn destination(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        destination: &HttpRouteDestination,
        place: &Place<'_>,
    ) -> Option<Destination> {
        let to = destination.destination.as_ref()?;
        let host = self.mesh.resolve(&to.host, &resource.meta.namespace);
        let port =
            to.port.as_ref().and_then(|port| u16::try_from(port.number).ok()).filter(|port| *port != 0);
        let mut warn = |field: &str, code, message: String| {
            self.diags.report(
                resource.doc,
                Severity::Warning,
                format!("{path}.destination.{field}"),
                message,
                code,
            );
        };
        let mut compiled = match self.clusters.find(&host, port, place.port, &to.subset) {
            Found::Cluster(cluster) => {
                let nobody =
                    matches!(&cluster.spec().discovery, Discovery::Static(listed) if listed.is_empty());
                // Slices and Endpoints do not carry the labels of pods: easily nobody is in any subset.
                let others = || self.mesh.service(&host).is_some_and(|service| !service.instances.is_empty());
                if nobody && !to.subset.is_empty() && others() {
                    let message = format!(
                        "no endpoint of {host:?} has the labels of the subset {:?}: requests get 503 UH",
                        to.subset
                    );
                    warn("subset", None, message);
                }
                Destination::new(cluster)
            }
            Found::UnknownHost(name) => {
                warn(
                    "host",
                    Some("IST0101"),
                    format!("no service has the host {host:?}: requests get 503 NC"),
                );
                Destination::unknown(name)
            }
            Found::UnknownPort(name) => {
                let message = match port {
                    Some(port) => format!("{host:?} has no port {port}: requests get 503 NC"),
                    None => format!("{host:?} has several ports, and none is named: requests get 503 NC"),
                };
                warn("port", Some("IST0101"), message);
                Destination::unknown(name)
            }
            Found::UnknownSubset(name) => {
                let message = format!(
                    "no destination rule defines the subset {:?} of {host:?}: requests get 503 NC",
                    to.subset
                );
                warn("subset", Some("IST0101"), message);
                Destination::unknown(name)
            }
        };
        if let Some(headers) = &destination.headers {
            let field = format!("{path}.headers");
            let (request, authority) = self.header_ops(resource, &field, headers.request.as_ref(), true)?;
            compiled.request_headers = request;
            compiled.authority = authority;
            compiled.response_headers =
                self.header_ops(resource, &field, headers.response.as_ref(), false)?.0;
        }
        Some(compiled)
    }

    fn redirect(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        redirect: &HttpRedirect,
        matched: Option<&HttpMatchRequest>,
    ) -> Option<Redirect> {
        let code = match redirect.redirect_code {
            0 | 301 => StatusCode::MOVED_PERMANENTLY,
            302 => StatusCode::FOUND,
            303 => StatusCode::SEE_OTHER,
            307 => StatusCode::TEMPORARY_REDIRECT,
            308 => StatusCode::PERMANENT_REDIRECT,
            other => {
                let message = format!("{other} is not 301, 302, 303, 307 or 308: the rule has no effect");
                self.diags.warning_at(resource.doc, format!("{path}.redirect.redirectCode"), message);
                return None;
            }
        };
        Some(Redirect {
            code,
            scheme: match redirect.scheme.as_str() {
                "http" => Some("http"),
                "https" => Some("https"),
                _ => None,
            },
            authority: Some(redirect.authority.as_str())
                .filter(|authority| !authority.is_empty())
                .map(Into::into),
            port: match (redirect.port, redirect.derive_port) {
                (Some(port), _) => u16::try_from(port).map_or(RedirectPort::Keep, RedirectPort::Number),
                (None, Some(RedirectPortSelection::FromRequestPort)) => RedirectPort::FromRequest,
                // Envoy's own way, which keeps a port that the authority has.
                (None, Some(RedirectPortSelection::FromProtocolDefault) | None) => RedirectPort::Keep,
            },
            path: match (redirect.uri.as_str(), redirect.prefix_rewrite.as_str()) {
                ("", "") => RedirectPath::Keep,
                ("", prefix) => {
                    let matched = matched.and_then(|m| m.uri.as_ref()).map(StringMatch::kind);
                    // No match at all is the prefix `/`, as for a rewrite.
                    let length = match matched {
                        Some(StringMatchKind::Prefix(matched)) => matched.len(),
                        _ => 1,
                    };
                    RedirectPath::ReplacePrefix(length, prefix.into())
                }
                (uri, _) => RedirectPath::Replace(uri.into()),
            },
        })
    }

    /// Header operations, and the authority that those of a request may set.
    fn header_ops(
        &mut self,
        resource: &Resource<VirtualService>,
        path: &str,
        operations: Option<&HeaderOperations>,
        request: bool,
    ) -> Option<(HeaderOps, Option<HeaderValue>)> {
        let Some(operations) = operations else { return Some((HeaderOps::default(), None)) };
        let is_authority =
            |name: &str| request && (name.eq_ignore_ascii_case("host") || name == ":authority");
        let authority = [&operations.set, &operations.add]
            .into_iter()
            .flatten()
            .find(|(name, _)| is_authority(name))
            .and_then(|(_, value)| HeaderValue::try_from(value.as_str()).ok());
        let kept = |pairs: &'_ std::collections::BTreeMap<String, String>| -> Vec<(String, String)> {
            pairs
                .iter()
                .filter(|(name, _)| !is_authority(name))
                .map(|(n, v)| (n.clone(), v.clone()))
                .collect()
        };
        let (set, add) = (kept(&operations.set), kept(&operations.add));
        let ops = HeaderOps::new(
            operations.remove.iter().map(String::as_str),
            set.iter().map(|(name, value)| (name.as_str(), value.as_str())),
            add.iter().map(|(name, value)| (name.as_str(), value.as_str())),
        );
        match ops {
            Ok(ops) => Some((ops, authority)),
            Err(error) => {
                let side = if request { "request" } else { "response" };
                self.diags.error_at(resource.doc, format!("{path}.{side}"), error.to_string());
                None
            }
        }
    }
}

/// Whether one of `named`, as a rule in `namespace` names them, is one of `gateways`. No name is `mesh`.
pub(super) fn names_gateway(named: &[String], namespace: &str, gateways: &[String]) -> bool {
    if named.is_empty() {
        return gateways.iter().any(|gateway| gateway == "mesh");
    }
    named.iter().any(|name| gateways.contains(&gateway_name(name, namespace)))
}

/// A gateway as a rule in `namespace` names it, in full: `mesh` or `namespace/name`.
pub(super) fn gateway_name(name: &str, namespace: &str) -> String {
    match name.split_once('/') {
        Some((".", name)) => format!("{namespace}/{name}"),
        None if name != "mesh" => format!("{namespace}/{name}"),
        _ => name.to_owned(),
    }
}

/// The name of a rule that has none: its virtual service and place, so that a log line finds it.
pub(super) fn default_name(resource: &Resource<VirtualService>, path: &str) -> String {
    let rule = path.strip_prefix("spec.").unwrap_or(path);
    format!("{}.{}.{rule}", resource.meta.name, resource.meta.namespace)
}

fn is_presence(matcher: &StringMatch) -> bool {
    match matcher.kind() {
        StringMatchKind::Regex("*") => true,
        StringMatchKind::Exact(_) | StringMatchKind::Prefix(_) | StringMatchKind::Regex(_) => false,
        _ => true,
    }
}

pub(super) fn string_matcher(matcher: &StringMatch) -> Result<StringMatcher, String> {
    Ok(match matcher.kind() {
        StringMatchKind::Exact(value) => StringMatcher::exact(value),
        StringMatchKind::Prefix(value) => StringMatcher::prefix(value),
        StringMatchKind::Regex(value) => StringMatcher::regex(value).map_err(|error| error.to_string())?,
        _ => StringMatcher::any(),
    })
}

/// A prefix match replaces the prefix, any other the whole path; no match at all is the prefix `/` (VS-W01).
fn path_rewrite(to: &str, matched: Option<&HttpMatchRequest>) -> PathRewrite {
    match matched.and_then(|m| m.uri.as_ref()).map(StringMatch::kind) {
        Some(StringMatchKind::Exact(_) | StringMatchKind::Regex(_)) => PathRewrite::Full(to.into()),
        Some(StringMatchKind::Prefix(prefix)) => PathRewrite::Prefix(prefix.len(), to.into()),
        _ => PathRewrite::Prefix(1, to.into()),
    }
}
