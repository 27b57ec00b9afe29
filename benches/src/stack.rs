//! The outbound stack, and policies that are present and do nothing.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use mesh_core::matcher::StringMatcher;
use mesh_core::{Body, ClusterName, Direction, EdgeSettings, LocalReplyLayer, NormalizeLayer, Slot};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, CorsLayer, CorsPolicy, Discovery, EndpointSpec, Fault, FaultLayer,
    HashPolicy, HeadersLayer, OutlierDetection, Percentage, RetryBudget, RetryOn, RetryPolicy, RouteBuilder,
    RouteTable, SelectRouteLayer, Shard, dispatch,
};
use tower::{Service, ServiceBuilder};

use crate::memory::InMemory;

/// A policy of a cluster and a route that is there and does nothing to a request that succeeds.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// What it is called.
    pub name: &'static str,
    cluster: fn(&mut ClusterSpec),
    route: fn(RouteBuilder) -> RouteBuilder,
}

const fn of_cluster(name: &'static str, cluster: fn(&mut ClusterSpec)) -> Idle {
    Idle { name, cluster, route: |route| route }
}

const fn of_route(name: &'static str, route: fn(RouteBuilder) -> RouteBuilder) -> Idle {
    Idle { name, cluster: |_| {}, route }
}

/// No policy.
pub const NONE: Idle = of_route("no policy", |route| route);

/// Retries of class *Connect*, which are those of Istio on a route that says nothing.
pub const RETRY_CONNECT: Idle =
    of_route("retries (Connect)", |route| route.retry(RetryPolicy::istio_default()));

/// Retries of class *Head* for a request without a body, *Replay* for one with a body.
pub const RETRY_ANSWERS: Idle = of_route("retries (Head)", |route| route.retry(of_answers()));

/// Each policy by itself.
pub const EACH: &[Idle] = &[
    of_route("fault of 0 %", fault),
    of_route("CORS", cors),
    of_route("sticky split", sticky),
    of_route("timeout", timeout),
    of_route("idle timeout", idle_timeout),
    of_route("per-try timeout", |route| route.retry(RetryPolicy::istio_default().per_try_timeout(LONG))),
    RETRY_CONNECT,
    of_cluster("limits", limits),
    of_cluster("outlier detection", outlier),
    of_cluster("retry budget", |spec| spec.retry_budget = Some(RetryBudget::default())),
];

/// All of them together, with retries of class *Connect*.
pub const ALL: Idle = Idle {
    name: "every policy, retries (Connect)",
    cluster: all,
    route: |route| layers(route).retry(RetryPolicy::istio_default().per_try_timeout(LONG)),
};

/// All of them together, with retries of class *Head* or *Replay*.
pub const ALL_ANSWERS: Idle = Idle {
    name: "every policy, retries (Head)",
    cluster: all,
    route: |route| layers(route).retry(of_answers().per_try_timeout(LONG)),
};

const LONG: Duration = Duration::from_secs(10);

fn of_answers() -> RetryPolicy {
    RetryPolicy::new(2, RetryOn::parse("5xx,reset,connect-failure").expect("conditions"))
}

fn fault(route: RouteBuilder) -> RouteBuilder {
    route.fault(Fault::new().abort_http(503, Percentage::NEVER).expect("a status"))
}

fn cors(route: RouteBuilder) -> RouteBuilder {
    let policy = CorsPolicy::builder().allow_origin(StringMatcher::exact("https://b"));
    route.cors(policy.build().expect("a policy"))
}

fn sticky(route: RouteBuilder) -> RouteBuilder {
    route.sticky(HashPolicy::SourceIp)
}

fn timeout(route: RouteBuilder) -> RouteBuilder {
    route.timeout(Duration::from_secs(15))
}

fn idle_timeout(route: RouteBuilder) -> RouteBuilder {
    route.idle_timeout(Duration::from_secs(60))
}

fn layers(route: RouteBuilder) -> RouteBuilder {
    idle_timeout(timeout(sticky(cors(fault(route)))))
}

fn limits(spec: &mut ClusterSpec) {
    spec.pool.max_connections = 100;
    spec.pool.max_pending_requests = 100;
    spec.pool.max_requests = 1000;
    spec.pool.max_retries = 10;
}

fn outlier(spec: &mut ClusterSpec) {
    spec.outlier_detection = Some(Box::new(OutlierDetection::default()));
}

fn all(spec: &mut ClusterSpec) {
    limits(spec);
    outlier(spec);
    spec.retry_budget = Some(RetryBudget::default());
}

/// The outbound stack with a policy, over an upstream in memory.
#[must_use]
pub fn in_memory(
    idle: Idle,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone {
    to(idle, ([127, 0, 0, 1], 1).into(), Shard::connecting_by(1, Arc::new(InMemory)))
}

/// The outbound stack with a policy, to this upstream.
#[must_use]
pub fn to(
    idle: Idle,
    upstream: SocketAddr,
    shard: Arc<Shard>,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone {
    let endpoints = Discovery::Static(vec![EndpointSpec::new(upstream)]);
    let mut spec = ClusterSpec::new(ClusterName::custom("c"), endpoints);
    (idle.cluster)(&mut spec);
    let cluster = Arc::new(Cluster::new(spec));
    Clusters::new().reconcile(std::slice::from_ref(&cluster));
    let route = (idle.route)(RouteBuilder::new("r").path_prefix("/api/"));
    let route = route.forward(cluster).expect("a route");
    let slot = Slot::fixed(RouteTable::builder().host("*", [route]).build().expect("a table"));
    let edge = Slot::fixed(EdgeSettings::default());
    ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Outbound))
        .layer(NormalizeLayer::new(edge, Direction::Outbound).seed(1))
        .layer(SelectRouteLayer::new(slot))
        .layer(FaultLayer::seeded(1))
        .layer(CorsLayer::new())
        .layer(HeadersLayer::new())
        .service(dispatch(shard))
}

/// What is sent through it.
#[must_use]
pub fn request(body: Body) -> Request<Body> {
    let mut request = Request::new(body);
    *request.uri_mut() = http::Uri::from_static("/api/v1/items");
    request.headers_mut().insert(http::header::HOST, http::HeaderValue::from_static("a"));
    request
}
