//! Making route tables in Rust, without YAML and without features.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode};
use mesh_core::matcher::{HeaderMatcher, InvalidPattern, QueryMatcher, StringMatcher};

use crate::canary::{CanaryPolicy, CanarySpec, InvalidCanary};
use crate::cluster::Cluster;
use crate::cors::CorsPolicy;
use crate::direct_response::DirectResponse;
use crate::fault::Fault;
use crate::hash_policy::HashPolicy;
use crate::headers::{HeaderOps, InvalidHeaderOp};
use crate::mirror::Mirror;
use crate::redirect::Redirect;
use crate::retry::RetryPolicy;
use crate::rewrite::{PathRewrite, Rewrite};
use crate::route::{ActionKind, Destination, Forward, Route, RouteAction, RouteMatch};
use crate::table::{KeyedBy, RouteTable, VirtualHost};
use crate::weighted::{InvalidWeights, Weighted};

/// Builds a [`RouteTable`] whose hosts answer at any port.
#[derive(Debug, Default)]
pub struct RouteTableBuilder {
    hosts: Vec<(String, Vec<Route>)>,
    unknown: Option<Route>,
}

/// Builds one [`Route`]: predicates, header operations, then what is done.
#[derive(Clone, Debug)]
pub struct RouteBuilder {
    name: Arc<str>,
    matcher: RouteMatch,
    prefix: usize,
    timeout: Option<Duration>,
    idle_timeout: Option<Duration>,
    sticky: Option<HashPolicy>,
    canary: Option<(Duration, CanaryPolicy)>,
    retry: RetryPolicy,
    client_overrides: bool,
    rewrite: Option<Box<str>>,
    authority: Option<HeaderValue>,
    request_set: Vec<(String, String)>,
    response_set: Vec<(String, String)>,
    fault: Option<Fault>,
    cors: Option<Box<CorsPolicy>>,
    mirrors: Vec<Mirror>,
}

/// What cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A host was given twice.
    #[error(transparent)]
    Host(#[from] mesh_core::matcher::DuplicateHost),
    /// The weights leave nothing to choose from.
    #[error(transparent)]
    Weights(#[from] InvalidWeights),
    /// A header operation is not accepted.
    #[error(transparent)]
    Header(#[from] InvalidHeaderOp),
    /// A canary cannot be rolled out so.
    #[error(transparent)]
    Canary(#[from] InvalidCanary),
    /// A direct response has a status outside 200 to 599.
    #[error("a direct response has a status from 200 to 599, not {0}")]
    Status(u16),
}

impl RouteTable {
    /// Builds a table in Rust.
    #[must_use]
    pub fn builder() -> RouteTableBuilder {
        RouteTableBuilder::default()
    }
}

impl RouteTableBuilder {
    /// A host (`a.example.com`, `*.example.com`, `*`) with its routes in order.
    #[must_use]
    pub fn host(mut self, pattern: impl Into<String>, routes: impl IntoIterator<Item = Route>) -> Self {
        self.hosts.push((pattern.into(), routes.into_iter().collect()));
        self
    }

    /// The route for every other host; without it they are answered 404 `NR`.
    #[must_use]
    pub fn otherwise(mut self, route: Route) -> Self {
        self.unknown = Some(route);
        self
    }

    /// The table.
    ///
    /// # Errors
    /// When a host was given twice.
    pub fn build(self) -> Result<RouteTable, BuildError> {
        let mut table = RouteTable::empty(KeyedBy::Listener);
        let mut clusters: Vec<Arc<Cluster>> = Vec::new();
        let mut note = |route: &Route| {
            if let ActionKind::Forward(forward) = &route.action().kind {
                let named = forward.destinations.iter().filter_map(|(_, to)| to.cluster.clone());
                let mirrors = forward.mirrors.iter().filter_map(|mirror| mirror.cluster.clone());
                for cluster in named.chain(mirrors) {
                    if !clusters.iter().any(|known| Arc::ptr_eq(known, &cluster)) {
                        clusters.push(cluster);
                    }
                }
            }
        };
        for (pattern, routes) in self.hosts {
            routes.iter().for_each(&mut note);
            let host = VirtualHost::new(pattern.as_str(), routes.into_iter().map(Arc::new));
            table.insert(None, &pattern, Arc::new(host))?;
        }
        if let Some(route) = self.unknown {
            note(&route);
            table.set_unknown(Arc::new(route));
        }
        table.set_clusters(clusters);
        Ok(table)
    }
}

impl RouteBuilder {
    /// A route that takes every request until it is given predicates.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            matcher: RouteMatch::default(),
            prefix: 1,
            timeout: None,
            idle_timeout: None,
            sticky: None,
            canary: None,
            retry: RetryPolicy::never(),
            client_overrides: false,
            rewrite: None,
            authority: None,
            request_set: Vec::new(),
            response_set: Vec::new(),
            fault: None,
            cors: None,
            mirrors: Vec::new(),
        }
    }

    /// The whole path.
    #[must_use]
    pub fn path_exact(mut self, path: &str) -> Self {
        self.matcher.path = Some(StringMatcher::exact(path));
        self.prefix = usize::MAX;
        self
    }

    /// The beginning of the path, byte for byte: `/foo` takes `/foobar`.
    #[must_use]
    pub fn path_prefix(mut self, prefix: &str) -> Self {
        self.matcher.path = Some(StringMatcher::prefix(prefix));
        self.prefix = prefix.len();
        self
    }

    /// The whole path against an RE2 expression.
    ///
    /// # Errors
    /// When the expression is not accepted.
    pub fn path_regex(mut self, expression: &str) -> Result<Self, InvalidPattern> {
        self.matcher.path = Some(StringMatcher::regex(expression)?);
        self.prefix = usize::MAX;
        Ok(self)
    }

    /// The method, upper case.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        self.matcher.method = Some(StringMatcher::exact(method));
        self
    }

    /// A header.
    #[must_use]
    pub fn header(mut self, matcher: HeaderMatcher) -> Self {
        self.matcher.headers.push(matcher);
        self
    }

    /// A header with exactly this value.
    #[must_use]
    pub fn header_exact(self, name: HeaderName, value: &str) -> Self {
        self.header(HeaderMatcher::value(name, StringMatcher::exact(value)))
    }

    /// A query parameter.
    #[must_use]
    pub fn query(mut self, matcher: QueryMatcher) -> Self {
        self.matcher.queries.push(matcher);
        self
    }

    /// Time for the whole exchange once the request has been received. Default none.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// How long nothing may be received of the response. Default for ever.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = Some(timeout);
        self
    }

    /// When a request is tried again. Default never.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Keeps a client on its destination of a split while weights change, by this key; requests without it are drawn
    /// (VS-R05). Default every request is drawn.
    #[must_use]
    pub fn sticky(mut self, key: HashPolicy) -> Self {
        self.sticky = Some(key);
        self
    }

    /// Rolls the second of the two clusters of [`split`](Self::split) out as a canary, which is looked at after every
    /// `interval` ([`canary`](crate::canary)). It is called by the name of the route, and the versions by those of their
    /// clusters. Default weights hold.
    #[must_use]
    pub fn canary(mut self, interval: Duration, policy: CanaryPolicy) -> Self {
        self.canary = Some((interval, policy));
        self
    }

    /// Follows Envoy's headers for timeouts and retries (`x-envoy-max-retries` and its kin). Only for clients that may
    /// multiply their load. Default no.
    #[must_use]
    pub fn trust_client_overrides(mut self) -> Self {
        self.client_overrides = true;
        self
    }

    /// Replaces what the path predicate matched: the prefix, or the whole path of an exact or regular one.
    #[must_use]
    pub fn rewrite_path(mut self, path: &str) -> Self {
        self.rewrite = Some(path.into());
        self
    }

    /// Replaces the authority.
    #[must_use]
    pub fn rewrite_authority(mut self, authority: HeaderValue) -> Self {
        self.authority = Some(authority);
        self
    }

    /// Sets a header of the request; the value may hold Envoy's `%VARIABLES%`.
    #[must_use]
    pub fn request_header(mut self, name: &str, value: &str) -> Self {
        self.request_set.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets a header of the response; the value may hold Envoy's `%VARIABLES%`.
    #[must_use]
    pub fn response_header(mut self, name: &str, value: &str) -> Self {
        self.response_set.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Injects delays and aborts ([`FaultLayer`](crate::FaultLayer)). Default none.
    #[must_use]
    pub fn fault(mut self, fault: Fault) -> Self {
        self.fault = Some(fault);
        self
    }

    /// Copies requests to another cluster, of which the client notices nothing ([`mirror`](crate::mirror)). Several are
    /// drawn each by itself. Default none.
    #[must_use]
    pub fn mirror(mut self, mirror: Mirror) -> Self {
        self.mirrors.push(mirror);
        self
    }

    /// Tells browsers which other origins may read the responses ([`CorsLayer`](crate::CorsLayer)). Default nothing.
    #[must_use]
    pub fn cors(mut self, policy: CorsPolicy) -> Self {
        self.cors = Some(Box::new(policy));
        self
    }

    /// Sends every request to one cluster.
    ///
    /// # Errors
    /// When a header operation is not accepted.
    pub fn forward(self, cluster: Arc<Cluster>) -> Result<Route, BuildError> {
        self.split([(1, cluster)])
    }

    /// Splits the requests over clusters by weight. A single one gets everything; among several, weight 0 gets nothing.
    ///
    /// # Errors
    /// When there is no cluster, all of several have weight 0, a header operation is not accepted, or a canary cannot be
    /// rolled out so.
    pub fn split(self, clusters: impl IntoIterator<Item = (u32, Arc<Cluster>)>) -> Result<Route, BuildError> {
        let destinations = clusters.into_iter().map(|(weight, cluster)| (weight, Destination::new(cluster)));
        let mut forward = Forward::new(Weighted::new(destinations)?);
        if let Some((interval, policy)) = &self.canary {
            let names: Vec<_> = forward.destinations.iter().map(|(_, to)| to.name.as_str()).collect();
            let [stable, canary] = names[..] else {
                return Err(InvalidCanary::Destinations(names.len()).into());
            };
            let spec = CanarySpec::new(Arc::clone(&self.name), stable, canary, policy.clone());
            forward = forward.with_canary(Arc::new(CanarySpec { interval: *interval, ..spec }), 1)?;
        }
        forward.sticky = self.sticky.clone().map(Box::new);
        forward.timeout = self.timeout;
        forward.idle_timeout = self.idle_timeout;
        forward.retry = self.retry.clone();
        forward.client_overrides = self.client_overrides;
        forward.mirrors = self.mirrors.clone().into();
        forward.rewrite = Rewrite {
            path: match self.rewrite.clone() {
                None => PathRewrite::Keep,
                Some(path) if self.prefix == usize::MAX => PathRewrite::Full(path),
                Some(path) => PathRewrite::Prefix(self.prefix, path),
            },
            authority: self.authority.clone(),
        };
        self.finish(ActionKind::Forward(forward))
    }

    /// Redirects.
    ///
    /// # Errors
    /// When a header operation is not accepted.
    pub fn redirect(self, redirect: Redirect) -> Result<Route, BuildError> {
        self.finish(ActionKind::Redirect(redirect))
    }

    /// Answers by itself.
    ///
    /// # Errors
    /// When the status is not from 200 to 599, or a header operation is not accepted.
    pub fn respond(self, status: u16, body: impl Into<Bytes>) -> Result<Route, BuildError> {
        let status = StatusCode::from_u16(status)
            .ok()
            .filter(|code| (200..600).contains(&code.as_u16()))
            .ok_or(BuildError::Status(status))?;
        self.finish(ActionKind::DirectResponse(DirectResponse { status, body: body.into() }))
    }

    fn finish(self, kind: ActionKind) -> Result<Route, BuildError> {
        let ops = |set: &[(String, String)]| {
            HeaderOps::new([], set.iter().map(|(name, value)| (name.as_str(), value.as_str())), [])
        };
        let mut action = RouteAction::new(kind);
        action.request_headers = ops(&self.request_set)?;
        action.response_headers = ops(&self.response_set)?;
        action.fault = self.fault;
        action.cors = self.cors;
        Ok(Route::new(self.name, self.matcher, Arc::new(action)))
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::ClusterName;

    use super::*;
    use crate::cluster::{ClusterSpec, Discovery};

    #[test]
    fn what_cannot_be_built_says_why() {
        let only = Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom("a"), Discovery::BlackHole)));
        let canary = RouteBuilder::new("a").canary(Duration::from_secs(1), CanaryPolicy::default());
        let one = canary.forward(only).unwrap_err();
        assert_eq!(one, BuildError::Canary(InvalidCanary::Destinations(1)));
        assert_eq!(RouteBuilder::new("a").respond(199, "").unwrap_err(), BuildError::Status(199));
        assert_eq!(RouteBuilder::new("a").split([]).unwrap_err(), BuildError::Weights(InvalidWeights::Empty));
        let route = || RouteBuilder::new("a").respond(200, "").unwrap();
        let twice = RouteTable::builder().host("a", [route()]).host("A.", [route()]).build();
        assert!(matches!(twice, Err(BuildError::Host(_))));
        assert!(matches!(
            RouteBuilder::new("a").request_header("host", "b").respond(200, ""),
            Err(BuildError::Header(_))
        ));
    }
}
