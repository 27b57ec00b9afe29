//! The cost of each decision, by itself.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::cell::Cell;
use std::future::Future;
use std::hint::black_box;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main};
use http::{Request, Response};
use mesh_benches::table;
use mesh_core::config::{Compile, CompileContext, Compiler, Rejected, Role};
use mesh_core::diagnostics::Diagnostics;
use mesh_core::matcher::StringMatcher;
use mesh_core::{
    Body, ClusterName, ConnInfo, Direction, EdgeSettings, Error, LocalReplyLayer, NormalizeLayer,
    PathNormalization, RequestContext, Slot, Snapshots,
};
use mesh_route::balance::{Choice, Cursors};
use mesh_route::select::reselect;
use mesh_route::{
    ActionKind, Balance, Balancer, BalancerKind, CircuitBreakerLayer, Cluster, ClusterSpec, Clusters,
    CorsLayer, Discovery, EndpointSpec, FaultLayer, HeadersLayer, OutlierDetection, OutlierGroup,
    RequestView, RetryClass, RetryLayer, RetryOn, RetryPolicy, Route, RouteAction, RouteBuilder, RouteMatch,
    RouteTable, SelectRouteLayer, TimeoutLayer, VirtualHost, Weighted,
};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tower::{Layer as _, Service, ServiceBuilder, ServiceExt as _};

fn route_lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("route_lookup_by_services");
    let conn = ConnInfo::unknown(Direction::Outbound);
    for services in [10, 100, 1_000, 10_000] {
        let table = table(services, 3);
        // As many hosts are asked for at every size, so that it is the table that grows and not the working set.
        let requests: Vec<_> = (0..8)
            .map(|at| {
                let service = at * services / 8;
                Request::get("/api/v1/items").header("host", format!("s{service}")).body(()).unwrap()
            })
            .collect();
        group.bench_function(BenchmarkId::from_parameter(services), |b| {
            let mut at = 0;
            b.iter(|| {
                at = (at + 1) % requests.len();
                let view = RequestView::new(&requests[at], &conn);
                black_box(table.select(&view, &conn).is_some())
            });
        });
    }
    group.finish();
}

fn routes_of_one_host(c: &mut Criterion) {
    let mut group = c.benchmark_group("last_of_n_routes");
    let action = Arc::new(RouteAction::forward(cluster(1)));
    let conn = ConnInfo::unknown(Direction::Outbound);
    for (kind, make) in [
        ("prefix", (|n| StringMatcher::prefix(format!("/p{n}/"))) as fn(usize) -> StringMatcher),
        ("regex", |n| StringMatcher::regex(&format!("/p{n}/[a-z]+")).unwrap()),
    ] {
        for routes in [10, 100, 1_000] {
            let host = VirtualHost::new(
                "h",
                (0..routes).map(|n| {
                    let matcher = RouteMatch { path: Some(make(n)), ..RouteMatch::default() };
                    Arc::new(Route::new(n.to_string(), matcher, Arc::clone(&action)))
                }),
            );
            let request = Request::get(format!("/p{}/x", routes - 1)).header("host", "h").body(()).unwrap();
            group.bench_function(BenchmarkId::new(kind, routes), |b| {
                b.iter(|| black_box(host.select(&RequestView::new(&request, &conn)).is_some()));
            });
        }
    }
    group.finish();
}

fn choices(c: &mut Criterion) {
    let mut rng = SmallRng::seed_from_u64(1);
    let split = Weighted::new([(90, 'a'), (9, 'b'), (1, 'c')]).unwrap();
    c.bench_function("weighted_split", |b| b.iter(|| *split.pick(black_box(&mut rng))));
    let snapshots = Snapshots::new();
    c.bench_function("config_read_load_full", |b| b.iter(|| snapshots.load().generation()));
    let mut compiler = Compiler::<()>::new(CompileContext::new(Role::Sidecar));
    compiler.register::<Nothing>();
    c.bench_function("config_swap", |b| b.iter(|| compiler.apply(&(), Diagnostics::default()).generation));
    c.bench_function("normalize_a_normal_path", |b| {
        b.iter(|| PathNormalization::Base.apply(black_box("/api/v1/items")).len());
    });
}

/// A pick of each kind.
fn picks(c: &mut Criterion) {
    let mut rng = SmallRng::seed_from_u64(1);
    for count in [10, 1_000] {
        let mut group = c.benchmark_group(format!("pick_of_{count}"));
        let endpoints = cluster(count).endpoints();
        for (name, kind) in [
            ("round_robin", BalancerKind::RoundRobin),
            ("random", BalancerKind::Random),
            ("least_request", BalancerKind::LeastRequest),
            ("peak_ewma", BalancerKind::PeakEwma),
            ("ring_hash", BalancerKind::ring_hash()),
            ("maglev", BalancerKind::maglev()),
        ] {
            let spec = ClusterSpec::new(ClusterName::custom("a"), Discovery::Static(Vec::new()));
            let balancer = Balancer::new(&spec.with_balancer(kind), &endpoints);
            let mut cursors = Cursors::new(0);
            let mut hash = 0_u64;
            group.bench_function(name, |b| {
                b.iter(|| {
                    hash = hash.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let choice = Choice { hash: Some(hash), ..Choice::default() };
                    let picked = balancer.pick(&choice, &mut cursors, &mut rng, mesh_core::clock::now);
                    picked.map(|endpoint| endpoint.id())
                });
            });
        }
        group.finish();
    }
}

/// A model that costs nothing to compile, so that publishing it is what is measured.
struct Nothing;

impl Compile<()> for Nothing {
    fn compile((): &(), _: &CompileContext, _: &mut Diagnostics) -> Result<Self, Rejected> {
        Ok(Self)
    }

    fn closed(_: &CompileContext) -> Self {
        Self
    }
}

fn stack(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let direct = RouteBuilder::new("direct").respond(200, "").unwrap();
    let slot = Slot::fixed(RouteTable::builder().host("*", [direct]).build().unwrap());
    let edge = Slot::fixed(EdgeSettings::default());
    let mut stack = ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Outbound))
        .layer(NormalizeLayer::new(edge, Direction::Outbound).seed(1))
        .layer(SelectRouteLayer::new(slot))
        .layer(FaultLayer::new())
        .layer(CorsLayer::new())
        .layer(HeadersLayer::new())
        .service(mesh_route::dispatch(mesh_route::Shard::seeded(1)));
    c.bench_function("outbound_stack_direct_response", |b| {
        b.iter(|| {
            let request = Request::get("/api/v1/items").header("host", "a").body(Body::empty()).unwrap();
            let response: Result<_, Error> =
                runtime.block_on(async { Ok(stack.ready().await?.call(request).await?) });
            black_box(response.unwrap().status())
        });
    });
}

/// What a layer costs on a route that has no policy for it: the difference to `none`.
fn absent_policies(c: &mut Criterion) {
    let route = RouteBuilder::new("direct").respond(200, "").unwrap();
    let slot = Slot::fixed(RouteTable::builder().host("*", [route]).build().unwrap());
    let mut request = Request::get("/").header("host", "a").body(()).unwrap();
    RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
    reselect(&slot, &request).unwrap();
    let kept = Keep(Rc::new(Cell::new(Some(request))));
    let mut group = c.benchmark_group("absent_policy");
    absent(&mut group, "none", &kept, kept.clone());
    absent(&mut group, "fault", &kept, FaultLayer::new().layer(kept.clone()));
    absent(&mut group, "cors", &kept, CorsLayer::new().layer(kept.clone()));
    absent(&mut group, "headers", &kept, HeadersLayer::new().layer(kept.clone()));
    group.finish();
}

/// What dispatch asks of a route and its cluster for a policy that they do not have: the difference to `none`.
fn absent_in_dispatch(c: &mut Criterion) {
    let cluster = cluster(1);
    let action = RouteAction::forward(Arc::clone(&cluster));
    let ActionKind::Forward(forward) = &action.kind else { unreachable!("it forwards") };
    let mut group = c.benchmark_group("absent_in_dispatch");
    group.bench_function("none", |b| b.iter(|| black_box(forward)));
    group.bench_function("timeout", |b| b.iter(|| black_box(forward).timeout.is_some()));
    group.bench_function("idle timeout", |b| b.iter(|| black_box(forward).idle_timeout.is_some()));
    group.bench_function("sticky", |b| b.iter(|| black_box(forward).sticky.is_some()));
    group.bench_function("retry", |b| {
        let mut never = forward.clone();
        never.retry = RetryPolicy::never();
        b.iter(|| black_box(&never).retry.class(false, false, true, false) == RetryClass::Never);
    });
    group.bench_function("outlier detection", |b| {
        b.iter(|| black_box(&cluster).spec().outlier_detection.is_some());
    });
    group.bench_function("retry budget", |b| b.iter(|| black_box(&cluster).spec().retry_budget.is_some()));
    group.bench_function("hash policy", |b| b.iter(|| black_box(&cluster).spec().hash_policy.is_some()));
    group.finish();
}

/// What a layer by itself costs around a service that answers at once: the difference to `none`, or for a request with a
/// body to `none, with a body`.
fn idle_layers(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let mut group = c.benchmark_group("idle_layer");
    let group = &mut group;
    let retry = |on| RetryLayer::new(RetryPolicy::new(2, RetryOn::parse(on).unwrap())).layer(AtOnce);
    let empty: fn() -> Body = Body::empty;
    let full: fn() -> Body = || Body::full(Bytes::from_static(b"abc"));
    idle(group, "none", empty, AtOnce);
    idle(group, "timeout, absent", empty, TimeoutLayer::default().layer(AtOnce));
    idle(group, "timeout", empty, TimeoutLayer::new(Duration::from_secs(15)).layer(AtOnce));
    idle(group, "retry, absent", empty, RetryLayer::new(RetryPolicy::never()).layer(AtOnce));
    idle(group, "retry (Connect)", empty, retry("connect-failure"));
    idle(group, "retry (Head)", empty, retry("5xx"));
    idle(group, "circuit breaker", empty, CircuitBreakerLayer::new().max_requests(10).layer(AtOnce));
    let outliers = OutlierGroup::new("a", OutlierDetection::default());
    let addr = |port| ([127, 0, 0, 1], port).into();
    idle(group, "outlier detection", empty, outliers.endpoint(addr(1)).layer(AtOnce));
    let endpoints = Discovery::Static((1..=3).map(|port| EndpointSpec::new(addr(port))).collect());
    let spec = ClusterSpec::new(ClusterName::custom("b"), endpoints);
    let balance = Balance::new(spec, &Clusters::new(), |_| AtOnce).unwrap().seeded(1);
    idle(group, "balance of three", empty, balance);
    idle(group, "none, with a body", full, AtOnce);
    idle(group, "retry (Connect), with a body", full, retry("connect-failure"));
    idle(group, "retry (Replay)", full, retry("5xx"));
}

fn idle<S>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, body: fn() -> Body, mut service: S)
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Error>,
{
    let mut cx = Context::from_waker(Waker::noop());
    group.bench_function(name, |b| {
        b.iter(|| {
            assert!(service.poll_ready(&mut cx).is_ready());
            let future = pin!(service.call(mesh_benches::stack::request(body())));
            let Poll::Ready(Ok(response)) = future.poll(&mut cx) else { panic!("it did not answer") };
            response.status()
        });
    });
}

/// Answers at once, with a body.
#[derive(Clone)]
struct AtOnce;

impl Service<Request<Body>> for AtOnce {
    type Response = Response<Body>;
    type Error = Error;
    type Future = std::future::Ready<Result<Response<Body>, Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        std::future::ready(Ok(Response::new(Body::full(Bytes::from_static(b"ok")))))
    }
}

fn absent<S>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, kept: &Keep, mut service: S)
where
    S: Service<Request<()>, Response = Response<()>, Error = Error>,
{
    let mut cx = Context::from_waker(Waker::noop());
    group.bench_function(name, |b| {
        b.iter(|| {
            let future = pin!(service.call(kept.0.take().unwrap()));
            future.poll(&mut cx).map(|response| response.map(|response| response.status()))
        });
    });
}

/// Answers at once and keeps the request, so that none has to be made for the next.
#[derive(Clone)]
struct Keep(Rc<Cell<Option<Request<()>>>>);

impl Service<Request<()>> for Keep {
    type Response = Response<()>;
    type Error = Error;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        self.0.set(Some(request));
        Answer
    }
}

/// Makes the response when it is polled: one that lay in the future would be moved by every layer.
struct Answer;

impl Future for Answer {
    type Output = Result<Response<()>, Error>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(Ok(Response::new(())))
    }
}

fn cluster(endpoints: u16) -> Arc<Cluster> {
    let endpoints = (1..=endpoints).map(|port| EndpointSpec::new(([127, 0, 0, 1], port).into())).collect();
    let cluster =
        Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom("c"), Discovery::Static(endpoints))));
    Clusters::new().reconcile(std::slice::from_ref(&cluster));
    cluster
}

criterion_group!(
    benches,
    route_lookup,
    routes_of_one_host,
    choices,
    picks,
    absent_policies,
    absent_in_dispatch,
    idle_layers,
    stack
);
criterion_main!(benches);
