//! `VirtualService` (networking.istio.io): how requests to a host are routed.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::common::{Duration, Percent, PortSelector, StringMatch};

pub(super) mod validate;

/// Routes for a set of hosts (VS-01 … VS-09).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VirtualService {
    /// Hosts that the routes are for; empty in a delegate.
    pub hosts: Vec<String>,
    /// Gateways that the routes apply to; empty is `mesh`.
    pub gateways: Vec<String>,
    /// HTTP routes, in order; the first match wins.
    pub http: Vec<HttpRoute>,
    /// Routes by SNI of TLS that is not terminated.
    pub tls: Vec<TlsRoute>,
    /// Routes of opaque TCP.
    pub tcp: Vec<TcpRoute>,
    /// Namespaces that see the resource; empty is all.
    pub export_to: Vec<String>,
}

/// One HTTP route: when, and what then.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRoute {
    /// For logs and for `explain`.
    pub name: String,
    /// Any of these; empty is every request.
    #[serde(rename = "match")]
    pub matches: Vec<HttpMatchRequest>,
    /// Weighted destinations.
    pub route: Vec<HttpRouteDestination>,
    /// Answers with a redirect.
    pub redirect: Option<Box<HttpRedirect>>,
    /// Answers with a fixed response.
    pub direct_response: Option<HttpDirectResponse>,
    /// Takes the rest of the route from another VirtualService.
    pub delegate: Option<Delegate>,
    /// Changes path or authority before forwarding.
    pub rewrite: Option<Box<HttpRewrite>>,
    /// For the whole request with all retries; absent is none.
    pub timeout: Option<Duration>,
    /// Absent is the mesh's default.
    pub retries: Option<HttpRetry>,
    /// Injected delay and abort.
    pub fault: Option<Box<HttpFaultInjection>>,
    /// A destination that gets a copy.
    pub mirror: Option<Destination>,
    /// The deprecated share of copies in whole percent.
    pub mirror_percent: Option<u32>,
    /// The share of copies; absent is all.
    pub mirror_percentage: Option<Percent>,
    /// Several destinations that get copies.
    pub mirrors: Vec<HttpMirrorPolicy>,
    /// Cross-origin rules.
    pub cors_policy: Option<Box<CorsPolicy>>,
    /// Header operations for every destination.
    pub headers: Option<Box<Headers>>,
    /// Of Istio 1.1 and without effect even there: every route allows upgrades.
    pub websocket_upgrade: Option<bool>,
}

/// A condition; all of its parts must hold (VS-M01 … VS-M15).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpMatchRequest {
    /// For logs.
    pub name: String,
    /// The path, without query.
    pub uri: Option<StringMatch>,
    /// The scheme.
    pub scheme: Option<StringMatch>,
    /// The method.
    pub method: Option<StringMatch>,
    /// The authority.
    pub authority: Option<StringMatch>,
    /// Headers that must match; an empty match is "present".
    pub headers: BTreeMap<String, StringMatch>,
    /// The port of the listener; 0 is any.
    pub port: u32,
    /// Labels of the client's workload.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways, in place of those of the resource.
    pub gateways: Vec<String>,
    /// Query parameters that must match; an empty match is "present".
    pub query_params: BTreeMap<String, StringMatch>,
    /// Compares exact and prefix of `uri` without regard to case.
    pub ignore_uri_case: bool,
    /// Headers that must not match.
    pub without_headers: BTreeMap<String, StringMatch>,
    /// The namespace of the client's workload.
    pub source_namespace: String,
    /// Prefix of the statistics of this match.
    pub stat_prefix: String,
}

/// A destination with its share.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRouteDestination {
    /// Where to.
    pub destination: Option<Destination>,
    /// The share, relative to the sum of its siblings.
    pub weight: i32,
    /// Header operations for this destination.
    pub headers: Option<Box<Headers>>,
}

/// A service, or a subset of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Destination {
    /// The service; a short name is completed by the namespace of the rule.
    pub host: String,
    /// A subset of the DestinationRule; empty is the whole service.
    pub subset: String,
    /// The port; absent is the only one, else that of the listener.
    pub port: Option<PortSelector>,
}

/// Operations on request and response headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Headers {
    /// Before the request is forwarded.
    pub request: Option<HeaderOperations>,
    /// Before the response is returned.
    pub response: Option<HeaderOperations>,
}

/// Operations on headers; `remove` comes first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HeaderOperations {
    /// Replaces or makes.
    pub set: BTreeMap<String, String>,
    /// Appends.
    pub add: BTreeMap<String, String>,
    /// Removes.
    pub remove: Vec<String>,
}

/// Another VirtualService that continues the route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Delegate {
    /// Its name.
    pub name: String,
    /// Its namespace; empty is the root's own.
    pub namespace: String,
}

/// A redirect (VS-D01 … VS-D03).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRedirect {
    /// Replaces the whole path.
    pub uri: String,
    /// Replaces the authority.
    pub authority: String,
    /// The port of the location; xor `derive_port`.
    pub port: Option<u32>,
    /// Where the port of the location comes from.
    pub derive_port: Option<RedirectPortSelection>,
    /// `http` or `https`.
    pub scheme: String,
    /// 301 when 0.
    pub redirect_code: u32,
    /// Replaces the matched prefix; xor `uri`.
    pub prefix_rewrite: String,
}

/// Where the port of a redirect comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RedirectPortSelection {
    /// 80 or 443 by the scheme.
    #[default]
    FromProtocolDefault,
    /// The port of the request.
    FromRequestPort,
}

/// A fixed response (VS-D04).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpDirectResponse {
    /// 200..=599.
    pub status: u32,
    /// The body; absent is none.
    pub body: Option<HttpBody>,
}

/// A body: one of its fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpBody {
    /// Text.
    pub string: Option<String>,
    /// Bytes in base64.
    pub bytes: Option<String>,
}

/// A rewrite (VS-W01 … VS-W03).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRewrite {
    /// Replaces the matched prefix, or the whole path; empty is nothing.
    pub uri: String,
    /// Replaces the authority; empty is nothing.
    pub authority: String,
    /// Replaces by a regular expression; xor `uri`.
    pub uri_regex_rewrite: Option<RegexRewrite>,
}

/// A replacement by a regular expression.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RegexRewrite {
    /// RE2.
    #[serde(rename = "match")]
    pub pattern: String,
    /// With `\1` for groups.
    pub rewrite: String,
}

/// Retries (VS-Y01 … VS-Y10).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRetry {
    /// How many after the first; 0 is off.
    pub attempts: i32,
    /// Until the response headers of one try; absent is the route's timeout.
    pub per_try_timeout: Option<Duration>,
    /// Conditions, separated by commas; empty is the default.
    pub retry_on: String,
    /// Whether other localities may be tried; default false.
    pub retry_remote_localities: Option<bool>,
    /// Whether hosts that were tried are avoided; default true.
    pub retry_ignore_previous_hosts: Option<bool>,
    /// The base of the back-off; default 25 ms.
    pub backoff: Option<Duration>,
}

/// Fault injection (VS-F01 … VS-F05).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpFaultInjection {
    /// A delay before forwarding.
    pub delay: Option<FaultDelay>,
    /// An answer instead of forwarding.
    pub abort: Option<FaultAbort>,
}

/// An injected delay.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultDelay {
    /// The deprecated share in whole percent.
    pub percent: i32,
    /// The delay.
    pub fixed_delay: Option<Duration>,
    /// Not supported by Istio.
    pub exponential_delay: Option<Duration>,
    /// The share of requests; absent is none.
    pub percentage: Option<Percent>,
}

/// An injected answer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FaultAbort {
    /// The deprecated share in whole percent.
    pub percent: i32,
    /// The status of the answer.
    pub http_status: Option<i32>,
    /// The gRPC status of the answer, by name.
    pub grpc_status: Option<String>,
    /// Not supported by Istio.
    pub http2_error: Option<String>,
    /// The share of requests; absent is none.
    pub percentage: Option<Percent>,
}

impl FaultAbort {
    /// The number of the gRPC status, where there is one by a name that gRPC has.
    #[must_use]
    pub fn grpc_code(&self) -> Option<u32> {
        let name = self.grpc_status.as_deref()?;
        (0..).zip(validate::GRPC_STATUSES).find(|(_, known)| *known == name).map(|(code, _)| code)
    }
}

/// A destination that gets copies (VS-P01).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpMirrorPolicy {
    /// Where to.
    pub destination: Option<Destination>,
    /// The share; absent is all.
    pub percentage: Option<Percent>,
}

/// Cross-origin rules (VS-C01, VS-C02).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CorsPolicy {
    /// The deprecated exact origins.
    pub allow_origin: Vec<String>,
    /// Origins that are allowed.
    pub allow_origins: Vec<StringMatch>,
    /// Methods that are allowed.
    pub allow_methods: Vec<String>,
    /// Request headers that are allowed.
    pub allow_headers: Vec<String>,
    /// Response headers that scripts may read.
    pub expose_headers: Vec<String>,
    /// How long a preflight may be kept; whole seconds.
    pub max_age: Option<Duration>,
    /// Whether credentials may be sent.
    pub allow_credentials: Option<bool>,
    /// What becomes of a preflight that no origin matches.
    pub unmatched_preflights: UnmatchedPreflights,
}

/// What becomes of a preflight that no origin matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum UnmatchedPreflights {
    /// The default, which is to forward.
    #[default]
    Unspecified,
    /// Goes to the upstream.
    Forward,
    /// Is answered without the headers of CORS.
    Ignore,
}

/// A route by SNI (VS-L01).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TlsRoute {
    /// Any of these.
    #[serde(rename = "match")]
    pub matches: Vec<TlsMatchAttributes>,
    /// Weighted destinations.
    pub route: Vec<RouteDestination>,
}

/// A condition on a TLS connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TlsMatchAttributes {
    /// Server names; required.
    pub sni_hosts: Vec<String>,
    /// Addresses or CIDR blocks of the destination.
    pub destination_subnets: Vec<String>,
    /// The port of the listener; 0 is any.
    pub port: u32,
    /// Labels of the client's workload.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways, in place of those of the resource.
    pub gateways: Vec<String>,
    /// The namespace of the client's workload.
    pub source_namespace: String,
}

/// A route of opaque TCP (VS-L02).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpRoute {
    /// Any of these; empty is every connection.
    #[serde(rename = "match")]
    pub matches: Vec<L4MatchAttributes>,
    /// Weighted destinations.
    pub route: Vec<RouteDestination>,
}

/// A condition on a TCP connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct L4MatchAttributes {
    /// Addresses or CIDR blocks of the destination.
    pub destination_subnets: Vec<String>,
    /// The port of the listener; 0 is any.
    pub port: u32,
    /// An address or CIDR block of the client; hidden in Istio's documentation.
    pub source_subnet: String,
    /// Labels of the client's workload.
    pub source_labels: BTreeMap<String, String>,
    /// Gateways, in place of those of the resource.
    pub gateways: Vec<String>,
    /// The namespace of the client's workload.
    pub source_namespace: String,
}

/// A destination with its share, of a TLS or TCP route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteDestination {
    /// Where to.
    pub destination: Option<Destination>,
    /// The share, relative to the sum of its siblings.
    pub weight: i32,
}
