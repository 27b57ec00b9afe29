//! A route: one match and what is done with the requests that it takes.
//!
//! As in Envoy, a route has exactly one match; an Istio rule with several compiles to as many routes that share one
//! action. A route that was selected is pinned to its request, so everything below selection reads it from there.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::Response;
use mesh_core::matcher::{HeaderMatcher, QueryMatcher, StringMatcher};
use mesh_core::{Body, ConnInfo, Error, PinnedRoute, RequestContext};
use rand::Rng;

use crate::canary::{CanarySpec, InvalidCanary, Split};
use crate::cluster::Cluster;
use crate::cors::CorsPolicy;
use crate::direct_response::DirectResponse;
use crate::fault::Fault;
use crate::hash_policy::HashPolicy;
use crate::headers::HeaderOps;
use crate::mirror::Mirror;
use crate::redirect::Redirect;
use crate::request_view::RequestView;
use crate::retry::RetryPolicy;
use crate::rewrite::Rewrite;
use crate::weighted::Weighted;

/// One match with its action.
#[derive(Clone, Debug)]
pub struct Route {
    name: Arc<str>,
    matcher: RouteMatch,
    action: Arc<RouteAction>,
    policies: u32,
}

/// Bits of [`PinnedRoute::policies`].
pub(crate) mod policies {
    pub(crate) const HEADERS: u32 = 1;
    pub(crate) const FAULT: u32 = 1 << 1;
    pub(crate) const CORS: u32 = 1 << 2;

    /// Whether the route of a request has this policy.
    #[inline]
    pub(crate) fn has<B>(request: &http::Request<B>, policy: u32) -> bool {
        let context = request.extensions().get::<mesh_core::RequestContext>();
        context.is_some_and(|context| context.route_policies() & policy != 0)
    }
}

/// What a request must be like. Every predicate must hold; no predicate at all matches everything.
#[derive(Clone, Debug, Default)]
pub struct RouteMatch {
    /// The path without query.
    pub path: Option<StringMatcher>,
    /// The method.
    pub method: Option<StringMatcher>,
    /// The scheme.
    pub scheme: Option<StringMatcher>,
    /// The authority, with its port if it was sent.
    pub authority: Option<StringMatcher>,
    /// Pseudo-headers that a rule names like headers (`:method`, `:path` with its query).
    pub pseudo_headers: Vec<PseudoHeaderMatcher>,
    /// Headers, joined when repeated.
    pub headers: Vec<HeaderMatcher>,
    /// Query parameters, the first of several.
    pub queries: Vec<QueryMatcher>,
}

/// A predicate on a pseudo-header, which every request has.
#[derive(Clone, Debug)]
pub struct PseudoHeaderMatcher {
    field: Field,
    value: StringMatcher,
    invert: bool,
}

impl PseudoHeaderMatcher {
    /// The pseudo-header of this name matches, or does not when `invert` is set; `None` for a name that is none of
    /// `:method`, `:scheme`, `:authority` and `:path`.
    #[must_use]
    pub fn new(name: &str, value: StringMatcher, invert: bool) -> Option<Self> {
        let field = match name {
            ":method" => Field::Method,
            ":scheme" => Field::Scheme,
            ":authority" => Field::Authority,
            ":path" => Field::Target,
            _ => return None,
        };
        Some(Self { field, value, invert })
    }

    fn matches(&self, request: &RequestView<'_>) -> bool {
        self.value.matches(self.field.of(request)) != self.invert
    }
}

impl fmt::Display for PseudoHeaderMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.invert { "not " } else { "" };
        write!(f, "{not}header :{} {}", self.field.name(), self.value)
    }
}

/// What is done with the requests that a route takes.
#[derive(Clone, Debug)]
pub struct RouteAction {
    /// Forward, redirect or answer.
    pub kind: ActionKind,
    /// Operations on the request's headers.
    pub request_headers: HeaderOps,
    /// Operations on the response's headers, local replies included.
    pub response_headers: HeaderOps,
    /// What is injected. Default nothing.
    pub fault: Option<Fault>,
    /// What browsers are told about other origins. Default nothing: that is left to the upstream.
    pub cors: Option<Box<CorsPolicy>>,
}

/// Forward, redirect or answer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ActionKind {
    /// Sends the request to one of some clusters.
    Forward(Forward),
    /// Answers with another place to go.
    Redirect(Redirect),
    /// Answers by itself.
    DirectResponse(DirectResponse),
}

/// Where requests are sent.
#[derive(Clone, Debug)]
pub struct Forward {
    /// The destinations with their weights.
    pub destinations: Weighted<Destination>,
    /// By what a client stays on its destination while weights change (VS-R05); requests without it are drawn. `None`,
    /// the default, draws every request.
    pub sticky: Option<Box<HashPolicy>>,
    /// Which of two destinations is a canary, whose share holds in the place of the weights.
    pub(crate) canary: Option<Box<Split>>,
    /// Time for the whole exchange once the request has been received; `None`, the default, is no limit.
    pub timeout: Option<Duration>,
    /// What is changed in path and authority.
    pub rewrite: Rewrite,
    /// When a request is tried again. Never, unless it is said; Istio's default is
    /// [`RetryPolicy::istio_default`](crate::RetryPolicy::istio_default).
    pub retry: RetryPolicy,
    /// How long nothing may be received of the response; `None`, the default, is no limit.
    pub idle_timeout: Option<Duration>,
    /// Whether Envoy's headers for timeouts and retries are followed (VS-T02). Default false.
    pub client_overrides: bool,
    /// Who gets copies of the requests (VS-P01). Default nobody.
    pub mirrors: Box<[Mirror]>,
}

/// One destination of a route.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The cluster; `None` is a destination that is not known: 503 `NC`.
    pub cluster: Option<Arc<Cluster>>,
    /// Its name, known or not.
    pub name: mesh_core::ClusterName,
    /// Operations on the request's headers, after those of the route.
    pub request_headers: HeaderOps,
    /// Operations on the response's headers, before those of the route.
    pub response_headers: HeaderOps,
    /// An authority that a header operation of this destination sets; that of the route comes before it.
    pub authority: Option<http::HeaderValue>,
}

/// A predicate that did not hold, with the value that it saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmet {
    /// The predicate, as configuration says it.
    pub predicate: String,
    /// What the request has there; `None` when it has nothing.
    pub seen: Option<String>,
}

impl Route {
    /// A route by the name that logs show.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, matcher: RouteMatch, action: Arc<RouteAction>) -> Self {
        let policies = action.policies();
        Self { name: name.into(), matcher, action, policies }
    }

    /// The name that logs show.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a request must be like.
    #[must_use]
    pub fn matcher(&self) -> &RouteMatch {
        &self.matcher
    }

    /// What is done with a request that it takes.
    #[must_use]
    pub fn action(&self) -> &RouteAction {
        &self.action
    }
}

impl PinnedRoute for Route {
    fn route_name(&self) -> &str {
        &self.name
    }

    fn policies(&self) -> u32 {
        self.policies
    }
}

impl RouteAction {
    /// An action without header operations, faults and CORS.
    #[must_use]
    pub fn new(kind: ActionKind) -> Self {
        Self {
            kind,
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            fault: None,
            cors: None,
        }
    }

    fn policies(&self) -> u32 {
        let headers = !self.request_headers.is_empty() || !self.response_headers.is_empty();
        [
            (headers, policies::HEADERS),
            (self.fault.is_some(), policies::FAULT),
            (self.cors.is_some(), policies::CORS),
        ]
        .into_iter()
        .filter_map(|(has, bit)| has.then_some(bit))
        .sum()
    }

    /// Everything to one cluster.
    #[must_use]
    pub fn forward(cluster: Arc<Cluster>) -> Self {
        Self::new(ActionKind::Forward(Forward::new(Weighted::single(Destination::new(cluster)))))
    }
}

impl Forward {
    /// To these destinations, without time limit, retries and rewrite.
    #[must_use]
    pub fn new(destinations: Weighted<Destination>) -> Self {
        Self {
            destinations: destinations.named(|to| to.name.as_str()),
            sticky: None,
            canary: None,
            timeout: None,
            rewrite: Rewrite::default(),
            retry: RetryPolicy::never(),
            idle_timeout: None,
            client_overrides: false,
            mirrors: Box::default(),
        }
    }

    /// The key by which a request sticks to its destination; `None` when it has none, or is not to stick.
    pub(crate) fn sticks_by(&self, request: &RequestView<'_>, conn: &ConnInfo) -> Option<u64> {
        self.sticky.as_ref()?.hash(request, conn)
    }

    /// Rolls the destination at this place, 0 or 1, out as a canary ([`canary`](crate::canary)). Its share holds in the
    /// place of the weights once [`Canaries::reconcile`](crate::canary::Canaries::reconcile) has seen the route.
    ///
    /// # Errors
    /// When there are not two destinations, or a value of the definition is out of its bounds.
    pub fn with_canary(self, spec: Arc<CanarySpec>, at: usize) -> Result<Self, InvalidCanary> {
        let split = Split::new(spec, &self.destinations, at)?;
        Ok(Self { canary: Some(Box::new(split)), ..self })
    }

    /// Counts the end of a request to one of the destinations, where one of them is a canary.
    pub(crate) fn count(
        &self,
        chosen: &Destination,
        cx: &RequestContext,
        answer: &mut Result<Response<Body>, Error>,
    ) {
        if let Some(canary) = &self.canary {
            canary.count(&self.destinations, chosen, cx.received_at(), answer);
        }
    }

    /// Chooses a destination: by its key if the request has one, else by a draw.
    pub(crate) fn choose(&self, key: Option<u64>, rng: &mut impl Rng) -> &Destination {
        if let Some(canary) = &self.canary
            && let Some(at) = canary.choose(&self.destinations, key, rng)
            && let Some(chosen) = self.destinations.get(at)
        {
            return chosen;
        }
        match key {
            Some(key) => self.destinations.pick_by(key),
            None => self.destinations.pick(rng),
        }
    }
}

impl Destination {
    /// A destination without header operations.
    #[must_use]
    pub fn new(cluster: Arc<Cluster>) -> Self {
        let name = cluster.name().clone();
        Self { cluster: Some(cluster), ..Self::unknown(name) }
    }

    /// A destination whose cluster is not known: 503 `NC`.
    #[must_use]
    pub fn unknown(name: mesh_core::ClusterName) -> Self {
        Self {
            cluster: None,
            name,
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            authority: None,
        }
    }
}

impl RouteMatch {
    /// Whether the request is taken.
    #[must_use]
    pub fn matches(&self, request: &RequestView<'_>) -> bool {
        self.first_unmet(request).is_none()
    }

    /// Whether every request is taken.
    #[must_use]
    pub fn is_catch_all(&self) -> bool {
        self.path.as_ref().is_none_or(StringMatcher::is_any)
            && self.method.is_none()
            && self.scheme.is_none()
            && self.authority.is_none()
            && self.pseudo_headers.is_empty()
            && self.headers.is_empty()
            && self.queries.is_empty()
    }

    /// The first predicate that does not hold, with what it saw.
    #[must_use]
    pub fn explain(&self, request: &RequestView<'_>) -> Option<Unmet> {
        self.first_unmet(request).map(|predicate| predicate.unmet(request))
    }

    fn first_unmet<'m>(&'m self, request: &RequestView<'_>) -> Option<Predicate<'m>> {
        let strings = [
            (&self.path, Field::Path),
            (&self.method, Field::Method),
            (&self.scheme, Field::Scheme),
            (&self.authority, Field::Authority),
        ];
        for (matcher, field) in strings {
            if let Some(matcher) = matcher
                && !matcher.matches(field.of(request))
            {
                return Some(Predicate::Field(field, matcher));
            }
        }
        if let Some(matcher) = self.pseudo_headers.iter().find(|matcher| !matcher.matches(request)) {
            return Some(Predicate::Pseudo(matcher));
        }
        if let Some(matcher) = self.headers.iter().find(|matcher| !matcher.matches(request.headers)) {
            return Some(Predicate::Header(matcher));
        }
        self.queries.iter().find(|matcher| !matcher.matches(request.query)).map(Predicate::Query)
    }
}

/// The predicates in the order in which they are judged, as configuration says them.
impl fmt::Display for RouteMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strings = [
            ("uri", &self.path),
            ("method", &self.method),
            ("scheme", &self.scheme),
            ("authority", &self.authority),
        ];
        let mut separator = "";
        for (name, matcher) in strings {
            if let Some(matcher) = matcher {
                write!(f, "{separator}{name} {matcher}")?;
                separator = ", ";
            }
        }
        for matcher in &self.pseudo_headers {
            write!(f, "{separator}{matcher}")?;
            separator = ", ";
        }
        for matcher in &self.headers {
            write!(f, "{separator}{matcher}")?;
            separator = ", ";
        }
        for matcher in &self.queries {
            write!(f, "{separator}{matcher}")?;
            separator = ", ";
        }
        if separator.is_empty() { f.write_str("any request") } else { Ok(()) }
    }
}

#[derive(Clone, Copy, Debug)]
enum Field {
    Path,
    Target,
    Method,
    Scheme,
    Authority,
}

impl Field {
    fn of<'a>(self, request: &RequestView<'a>) -> &'a str {
        match self {
            Self::Path => request.path,
            Self::Target => request.target,
            Self::Method => request.method,
            Self::Scheme => request.scheme,
            Self::Authority => request.authority,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Path => "uri",
            Self::Target => "path",
            Self::Method => "method",
            Self::Scheme => "scheme",
            Self::Authority => "authority",
        }
    }
}

enum Predicate<'m> {
    Field(Field, &'m StringMatcher),
    Pseudo(&'m PseudoHeaderMatcher),
    Header(&'m HeaderMatcher),
    Query(&'m QueryMatcher),
}

impl Predicate<'_> {
    fn unmet(&self, request: &RequestView<'_>) -> Unmet {
        match self {
            Self::Field(field, matcher) => Unmet {
                predicate: format!("{} {matcher}", field.name()),
                seen: Some(field.of(request).to_owned()),
            },
            Self::Pseudo(matcher) => {
                Unmet { predicate: matcher.to_string(), seen: Some(matcher.field.of(request).to_owned()) }
            }
            Self::Header(matcher) => {
                let values: Vec<_> = request
                    .headers
                    .get_all(matcher.name())
                    .iter()
                    .map(|value| String::from_utf8_lossy(value.as_bytes()))
                    .collect::<Vec<Cow<'_, str>>>();
                Unmet { predicate: matcher.to_string(), seen: (!values.is_empty()).then(|| values.join(",")) }
            }
            Self::Query(matcher) => Unmet {
                predicate: matcher.to_string(),
                seen: (!request.query.is_empty()).then(|| request.query.to_owned()),
            },
        }
    }
}
