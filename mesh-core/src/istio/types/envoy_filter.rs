//! `networking.istio.io` EnvoyFilter (EF-01): data that is never applied, with the name of what does the same here.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::check;
use super::common::{NetworkingWorkloadSelector, PolicyTargetReference};
use super::target;
use crate::istio::findings::{Findings, Validate};

/// Patches of an Envoy's configuration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvoyFilter {
    /// The workloads; not together with target references.
    pub workload_selector: Option<NetworkingWorkloadSelector>,
    /// The targets.
    pub target_refs: Vec<PolicyTargetReference>,
    /// The patches, in order.
    pub config_patches: Vec<EnvoyConfigObjectPatch>,
    /// Lower comes first; default 0.
    pub priority: i32,
}

/// One patch.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvoyConfigObjectPatch {
    /// What is patched.
    pub apply_to: ApplyTo,
    /// Which of them.
    #[serde(rename = "match")]
    pub matches: Option<EnvoyConfigObjectMatch>,
    /// How; required.
    pub patch: Option<Patch>,
}

/// What is patched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the names are Envoy's own")]
pub enum ApplyTo {
    #[default]
    Invalid,
    Listener,
    FilterChain,
    NetworkFilter,
    HttpFilter,
    RouteConfiguration,
    VirtualHost,
    HttpRoute,
    Cluster,
    ExtensionConfig,
    Bootstrap,
    ListenerFilter,
}

/// Where the patched object is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the names are Istio's own")]
pub enum PatchContext {
    #[default]
    Any,
    SidecarInbound,
    SidecarOutbound,
    Gateway,
    Waypoint,
}

/// How an object is patched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the names say it")]
pub enum PatchOperation {
    #[default]
    Invalid,
    Merge,
    Add,
    Remove,
    InsertBefore,
    InsertAfter,
    InsertFirst,
    Replace,
    MergeAndReplaceList,
}

/// Where an added filter stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[expect(missing_docs, reason = "the names are Istio's phases")]
pub enum FilterClass {
    #[default]
    Unspecified,
    Authn,
    Authz,
    Stats,
}

/// Which objects are patched.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvoyConfigObjectMatch {
    /// Inbound, outbound, gateway or waypoint.
    pub context: PatchContext,
    /// Which proxies.
    pub proxy: Option<ProxyMatch>,
    /// A listener, its filter chain and filters.
    pub listener: Option<ListenerMatch>,
    /// A route configuration, its virtual hosts and routes.
    pub route_configuration: Option<Value>,
    /// A cluster.
    pub cluster: Option<Value>,
    /// The parts of a waypoint.
    pub waypoint: Option<WaypointMatch>,
}

/// Which proxies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyMatch {
    /// A regular expression for the proxy's version.
    pub proxy_version: String,
    /// Metadata that the proxy must have.
    pub metadata: BTreeMap<String, String>,
}

/// Which listeners, and what in them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListenerMatch {
    /// The port.
    pub port_number: u32,
    /// Not implemented by Istio.
    pub port_name: String,
    /// The filter chain.
    pub filter_chain: Option<FilterChainMatch>,
    /// The name of a listener filter.
    pub listener_filter: String,
    /// The listener's name.
    pub name: String,
}

/// Which filter chain, and what in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FilterChainMatch {
    /// The name.
    pub name: String,
    /// The SNI name.
    pub sni: String,
    /// `raw_buffer` or `tls`.
    pub transport_protocol: String,
    /// Comma-separated ALPN names.
    pub application_protocols: String,
    /// The network filter.
    pub filter: Option<FilterMatch>,
    /// The destination port.
    pub destination_port: u32,
}

/// Which network filter, and which HTTP filter in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FilterMatch {
    /// The network filter's name.
    pub name: String,
    /// The HTTP filter.
    pub sub_filter: Option<SubFilterMatch>,
}

/// Which HTTP filter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SubFilterMatch {
    /// The name.
    pub name: String,
}

/// What of a waypoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WaypointMatch {
    /// The filter.
    pub filter: Option<FilterMatch>,
    /// The service's port; none is all.
    pub port_number: Option<u32>,
    /// The route.
    pub route: Option<SubFilterMatch>,
}

/// How an object is patched.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Patch {
    /// The operation; required.
    pub operation: PatchOperation,
    /// Envoy's own configuration, as JSON.
    pub value: Option<Value>,
    /// Where an added filter stands.
    pub filter_class: FilterClass,
}

/// The HTTP connection manager, by its name and by its old one.
const HTTP_CONNECTION_MANAGER: [&str; 2] =
    ["envoy.filters.network.http_connection_manager", "envoy.http_connection_manager"];

/// A part of the name of a filter, and what does the same here.
const EQUIVALENTS: [(&str, &str); 7] = [
    ("local_ratelimit", "the local rate limit layer of mesh-authz"),
    ("ratelimit", "the local rate limit layer of mesh-authz"),
    ("filters.http.fault", "VirtualService http[].fault"),
    ("filters.http.cors", "VirtualService http[].corsPolicy"),
    ("ext_authz", "AuthorizationPolicy with the action CUSTOM"),
    ("jwt_authn", "RequestAuthentication"),
    ("filters.http.lua", "VirtualService http[].headers for header edits, else a tower layer"),
];

/// What to do instead where no filter's name tells.
const OTHERWISE: &str = "headers, faults, CORS and rewrites belong into a VirtualService, connection settings into a \
    DestinationRule, access rules into an AuthorizationPolicy, logs and metrics into a Telemetry, and anything else \
    into a tower layer";

impl Validate for EnvoyFilter {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        out.warning(
            "",
            format!("not applied: the patches are Envoy's own configuration; {}", self.equivalent()),
        );
        target::networking_selector(out, self.workload_selector.as_ref());
        if self.workload_selector.is_some() && !self.target_refs.is_empty() {
            out.error("", "only one of targetRefs and workloadSelector can be set");
        }
        target::aim(out, None, None, &self.target_refs);
        for (index, patch) in self.config_patches.iter().enumerate() {
            out.item("configPatches", index, |out| patch.validate(out));
        }
    }
}

impl EnvoyFilter {
    /// What does the same here as the patches do, as far as their filters' names tell.
    fn equivalent(&self) -> String {
        let mut found = Vec::new();
        for value in self.config_patches.iter().filter_map(|patch| patch.patch.as_ref()?.value.as_ref()) {
            let text = value.to_string();
            let equivalent = EQUIVALENTS.iter().find(|(part, _)| text.contains(part)).map(|(_, what)| *what);
            found.extend(equivalent.filter(|what| !found.contains(what)));
        }
        if found.is_empty() {
            return OTHERWISE.to_owned();
        }
        format!("use {}", found.join("; "))
    }
}

impl Validate for EnvoyConfigObjectPatch {
    fn validate(&self, out: &mut Findings) {
        if self.apply_to == ApplyTo::Invalid {
            out.error("applyTo", "Envoy filter: missing applyTo");
        }
        match &self.patch {
            None => out.error("patch", "Envoy filter: missing patch"),
            Some(patch) => {
                if patch.operation == PatchOperation::Invalid {
                    out.error("patch.operation", "Envoy filter: missing patch operation");
                } else if patch.operation != PatchOperation::Remove && patch.value.is_none() {
                    out.error("patch.value", "Envoy filter: missing patch value for non-remove operation");
                }
            }
        }
        if let Some(matches) = &self.matches {
            out.within("match", |out| matches.validate_for(out, self.apply_to));
        }
    }
}

impl EnvoyConfigObjectMatch {
    fn validate_for(&self, out: &mut Findings, apply_to: ApplyTo) {
        if let Some(proxy) = &self.proxy
            && !proxy.proxy_version.is_empty()
        {
            out.check("proxy.proxyVersion", check::regex(&proxy.proxy_version));
        }
        if (self.context == PatchContext::Waypoint) != self.waypoint.is_some() && self.has_object() {
            out.error("", "only support waypointMatch when context is WAYPOINT");
        }
        if let Some(number) = self.waypoint.as_ref().and_then(|waypoint| waypoint.port_number) {
            out.check("waypoint.portNumber", check::port(number));
        }
        let objects = [
            self.listener.is_some(),
            self.route_configuration.is_some(),
            self.cluster.is_some(),
            self.waypoint.is_some(),
        ];
        if objects.into_iter().filter(|set| *set).count() > 1 {
            out.error("", "only one of listener, routeConfiguration, cluster and waypoint may be set");
        }
        if !self.has_object() || self.waypoint.is_some() {
            return;
        }
        match apply_to {
            ApplyTo::Listener | ApplyTo::FilterChain | ApplyTo::NetworkFilter | ApplyTo::HttpFilter => {
                match &self.listener {
                    Some(listener) => out.within("listener", |out| listener.validate_for(out, apply_to)),
                    None => {
                        out.error("", "applyTo for listener class objects cannot have non listener match");
                    }
                }
            }
            ApplyTo::RouteConfiguration | ApplyTo::VirtualHost | ApplyTo::HttpRoute
                if self.route_configuration.is_none() =>
            {
                out.error(
                    "",
                    "applyTo for http route class objects cannot have non route configuration match",
                );
            }
            ApplyTo::Cluster if self.cluster.is_none() => {
                out.error("", "applyTo for cluster class objects cannot have non cluster match");
            }
            _ => {}
        }
    }

    fn has_object(&self) -> bool {
        self.listener.is_some()
            || self.route_configuration.is_some()
            || self.cluster.is_some()
            || self.waypoint.is_some()
    }
}

impl ListenerMatch {
    fn validate_for(&self, out: &mut Findings, apply_to: ApplyTo) {
        let Some(filter) = self.filter_chain.as_ref().and_then(|chain| chain.filter.as_ref()) else { return };
        out.within("filterChain.filter", |out| {
            if matches!(apply_to, ApplyTo::Listener | ApplyTo::FilterChain) {
                out.warning("", "a filter match has no effect when used with LISTENER or FILTER_CHAIN");
            }
            if filter.name.is_empty() {
                out.error("name", "filter match has no name to match on");
                return;
            }
            let Some(sub_filter) = &filter.sub_filter else { return };
            if apply_to != ApplyTo::HttpFilter {
                out.error("subFilter", "subfilter match can be used with applyTo HTTP_FILTER only");
            } else if !HTTP_CONNECTION_MANAGER.contains(&filter.name.as_str()) {
                out.error(
                    "subFilter",
                    format!("subfilter match requires filter match with {}", HTTP_CONNECTION_MANAGER[0]),
                );
            } else if sub_filter.name.is_empty() {
                out.error("subFilter.name", "subfilter match has no name to match on");
            }
        });
    }
}
