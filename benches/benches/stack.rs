//! The whole outbound stack over an in-memory transport: what it costs beside hyper alone, and what policies add.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use http::Request;
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use mesh_benches::memory::{InMemory, serve};
use mesh_core::matcher::StringMatcher;
use mesh_core::{Body, ClusterName, Direction, EdgeSettings, LocalReplyLayer, NormalizeLayer, Slot};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, CorsLayer, CorsPolicy, Discovery, EndpointSpec, Fault, FaultLayer,
    HeadersLayer, OutlierDetection, Percentage, RetryBudget, RetryOn, RetryPolicy, RouteBuilder, RouteTable,
    SelectRouteLayer, Shard, dispatch,
};
use tower::{Service, ServiceBuilder, ServiceExt as _};

fn stack(
    cluster: impl FnOnce(&mut ClusterSpec),
    route: impl FnOnce(RouteBuilder) -> RouteBuilder,
) -> impl Service<Request<Body>, Response = http::Response<Body>, Error = std::convert::Infallible> {
    let endpoints = Discovery::Static(vec![EndpointSpec::new(([127, 0, 0, 1], 1).into())]);
    let mut spec = ClusterSpec::new(ClusterName::custom("c"), endpoints);
    cluster(&mut spec);
    let cluster = Arc::new(Cluster::new(spec));
    Clusters::new().reconcile(std::slice::from_ref(&cluster));
    let route = route(RouteBuilder::new("r").path_prefix("/api/")).forward(cluster).unwrap();
    let slot = Slot::fixed(RouteTable::builder().host("*", [route]).build().unwrap());
    let edge = Slot::fixed(EdgeSettings::default());
    ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Outbound))
        .layer(NormalizeLayer::new(edge, Direction::Outbound).seed(1))
        .layer(SelectRouteLayer::new(slot))
        .layer(FaultLayer::seeded(1))
        .layer(CorsLayer::new())
        .layer(HeadersLayer::new())
        .service(dispatch(Shard::connecting_by(1, Arc::new(InMemory))))
}

fn request() -> Request<Body> {
    Request::get("/api/v1/items").header("host", "a").body(Body::empty()).unwrap()
}

fn bench<S>(c: &mut Criterion, name: &str, stack: impl FnOnce() -> S)
where
    S: Service<Request<Body>, Response = http::Response<Body>>,
    S::Error: std::fmt::Debug,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut stack = stack();
    c.benchmark_group("outbound_stack_in_memory").bench_function(name, |b| {
        b.iter(|| {
            runtime.block_on(async {
                let response = stack.ready().await.unwrap().call(request()).await.unwrap();
                response.into_body().collect().await.unwrap().to_bytes()
            })
        });
    });
}

fn hyper_alone(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut sender = runtime.block_on(async {
        let (sender, connection) =
            hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(serve())).await.unwrap();
        tokio::spawn(connection);
        sender
    });
    c.benchmark_group("outbound_stack_in_memory").bench_function("hyper alone", |b| {
        b.iter(|| {
            runtime.block_on(async {
                sender.ready().await.unwrap();
                let response = sender.send_request(request()).await.unwrap();
                response.into_body().collect().await.unwrap().to_bytes()
            })
        });
    });
}

fn policies(c: &mut Criterion) {
    hyper_alone(c);
    bench(c, "no policy", || stack(|_| {}, |route| route));
    bench(c, "retries, Istio's default", || stack(|_| {}, |route| route.retry(RetryPolicy::istio_default())));
    let on_answers = || RetryPolicy::new(2, RetryOn::parse("5xx,reset,connect-failure").unwrap());
    bench(c, "retries of answers", || stack(|_| {}, |route| route.retry(on_answers())));
    bench(c, "limits and outlier detection", || stack(limited, |route| route));
    bench(c, "timeout", || stack(|_| {}, |route| route.timeout(Duration::from_secs(15))));
    let idle_layers = |route: RouteBuilder| {
        let fault = Fault::new().abort_http(503, Percentage::NEVER).unwrap();
        let cors = CorsPolicy::builder().allow_origin(StringMatcher::exact("https://b")).build().unwrap();
        route.fault(fault).cors(cors)
    };
    bench(c, "fault of 0 % and CORS", || stack(|_| {}, idle_layers));
    bench(c, "every policy, idle", || {
        stack(limited, |route| {
            idle_layers(route).retry(RetryPolicy::istio_default()).timeout(Duration::from_secs(15))
        })
    });
    bench(c, "every policy, idle, retries of answers", || {
        stack(limited, |route| idle_layers(route).retry(on_answers()).timeout(Duration::from_secs(15)))
    });
}

fn limited(spec: &mut ClusterSpec) {
    spec.pool.max_connections = 100;
    spec.pool.max_pending_requests = 100;
    spec.pool.max_requests = 1000;
    spec.pool.max_retries = 10;
    spec.retry_budget = Some(RetryBudget::default());
    spec.outlier_detection = Some(OutlierDetection::default());
}

criterion_group!(benches, policies);
criterion_main!(benches);
