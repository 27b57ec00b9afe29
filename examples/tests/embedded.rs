//! The policies as plain layers, without a proxy: around the handler of a hyper server, and around hyper clients.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use mesh_core::{Body, ClusterName, Direction, Error, ErrorKind, LocalReplyLayer, ResponseFlags, Side, Slot};
use mesh_route::{
    Backoff, Balance, CircuitBreakerLayer, ClusterSpec, Clusters, Discovery, EndpointSpec, Fault, FaultLayer,
    OutlierDetection, Percentage, RetryBudget, RetryLayer, RetryOn, RetryPolicy, RetryState, RouteBuilder,
    RouteTable, SelectRouteLayer, TimeoutLayer, upstream_error,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tower::{Service, ServiceBuilder, ServiceExt as _};

/// Serves every connection with clones of a stack.
async fn serve<S>(stack: S) -> SocketAddr
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let stack = stack.clone();
            let handler = service_fn(move |request| stack.clone().oneshot(request));
            let builder = hyper::server::conn::http1::Builder::new();
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), handler));
        }
    });
    addr
}

/// A client of one address, with a connection for each request.
fn client(
    addr: SocketAddr,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Error, Future: Send> + Clone {
    tower::service_fn(move |request: Request<Body>| async move {
        let stream = TcpStream::connect(addr).await.map_err(|error| {
            let flags = ResponseFlags::UPSTREAM_CONNECTION_FAILURE;
            let unavailable = StatusCode::SERVICE_UNAVAILABLE;
            Error::new(ErrorKind::ConnectFailure, unavailable, flags, "connect").with_source(error)
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(upstream_error)?;
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(upstream_error)?;
        Ok(response.map(|body| Body::from_incoming(body, Side::Upstream)))
    })
}

fn get(path: &str) -> Request<Body> {
    Request::get(path).header("host", "a").body(Body::empty()).unwrap()
}

async fn text(response: Response<Body>) -> Bytes {
    response.into_body().collect().await.unwrap().to_bytes()
}

fn post(body: &'static str) -> Request<Body> {
    Request::post("/").header("host", "a").body(Body::from(body)).unwrap()
}

#[tokio::test]
async fn a_hyper_server_has_faults_and_a_timeout_around_its_handler() {
    let fault = Fault::new().abort_http(418, Percentage::ALWAYS).unwrap();
    let routes = [
        RouteBuilder::new("flaky").path_prefix("/flaky").fault(fault).respond(200, "").unwrap(),
        RouteBuilder::new("rest").respond(200, "").unwrap(),
    ];
    let table = RouteTable::builder().host("*", routes).build().unwrap();
    let stack = ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Inbound))
        .layer(SelectRouteLayer::new(Slot::fixed(table)))
        .layer(FaultLayer::seeded(1))
        .layer(TimeoutLayer::new(Duration::from_millis(50)))
        .service_fn(|request: Request<Body>| async move {
            if request.uri().path() == "/slow" {
                return std::future::pending().await;
            }
            // A body of hyper's own, as an axum handler would answer.
            let body = request.into_body().collect().await?.to_bytes();
            Ok::<_, Error>(Response::new(Full::new(body)))
        });
    let client = client(serve(stack).await);
    let ask = |request| client.clone().oneshot(request);
    assert_eq!(text(ask(post("hello")).await.unwrap()).await, "hello");
    assert_eq!(ask(get("/flaky")).await.unwrap().status(), 418);
    let late = ask(get("/slow")).await.unwrap();
    assert_eq!(late.status(), 504);
    assert_eq!(text(late).await, "upstream request timeout");
}

#[tokio::test]
async fn dr_cp02_a_hyper_server_refuses_what_is_over_its_limit_layer() {
    let breaker = CircuitBreakerLayer::new().max_requests(1);
    let (began, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let told = (Arc::clone(&began), Arc::clone(&release));
    let stack = ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Inbound))
        .layer(breaker.clone())
        .service_fn(move |_: Request<Incoming>| {
            let (began, release) = (Arc::clone(&told.0), Arc::clone(&told.1));
            async move {
                began.notify_one();
                release.notified().await;
                Ok::<_, Error>(Response::new(Body::from("done")))
            }
        });
    let client = client(serve(stack).await);
    let first = tokio::spawn(client.clone().oneshot(get("/")));
    began.notified().await;
    let refused = client.clone().oneshot(get("/")).await.unwrap();
    assert_eq!((refused.status(), breaker.overflows()), (StatusCode::SERVICE_UNAVAILABLE, 1));
    assert_eq!(refused.headers()["x-envoy-overloaded"], "true");
    release.notify_one();
    assert_eq!(text(first.await.unwrap().unwrap()).await, "done");
}

/// A server that answers with this status, and counts.
async fn answering(status: u16) -> (SocketAddr, Arc<AtomicU32>) {
    let requests = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&requests);
    let stack = ServiceBuilder::new().layer(LocalReplyLayer::new(Direction::Inbound)).service_fn(
        move |request: Request<Incoming>| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move {
                let try_number = request.headers()["x-envoy-attempt-count"].clone();
                let body = request.into_body().collect().await.map_err(Error::internal)?.to_bytes();
                let response = Response::builder().status(status).header("try", try_number);
                Ok::<_, Error>(response.body(Body::full(body)).unwrap())
            }
        },
    );
    (serve(stack).await, requests)
}

#[tokio::test]
async fn hyper_clients_have_retries_balancing_and_outlier_detection_around_them() {
    let (good, served) = answering(200).await;
    let (bad, failed) = answering(503).await;
    // A port that was open a moment ago: connections are refused.
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let endpoints = [good, bad, gone].map(EndpointSpec::new).into();
    let mut spec = ClusterSpec::new(ClusterName::custom("orders"), Discovery::Static(endpoints));
    let outliers =
        OutlierDetection { consecutive_5xx: 3, max_ejection_percent: 70, ..OutlierDetection::default() };
    spec.outlier_detection = Some(Box::new(outliers));
    let balance = Balance::new(spec, &Clusters::new(), |endpoint| client(endpoint.addr)).unwrap().seeded(7);
    let policy = RetryPolicy::new(5, RetryOn::parse("503,connect-failure").unwrap());
    let state = RetryState::new(10, Some(RetryBudget::default()));
    let stack = ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Outbound))
        .layer(TimeoutLayer::new(Duration::from_secs(30)))
        .layer(RetryLayer::new(policy.backoff(Backoff::new(Duration::ZERO))).state(&state).seeded(1))
        .layer(CircuitBreakerLayer::new().max_requests(100))
        .service(balance.clone());
    let mut tries = 0;
    for _ in 0..50 {
        let response = stack.clone().oneshot(post("3 apples")).await.unwrap();
        assert_eq!(response.status(), 200);
        tries += response.headers()["try"].to_str().unwrap().parse::<u64>().unwrap();
        assert_eq!(text(response).await, "3 apples");
    }
    assert_eq!(tries, 50 + state.retried());
    assert_eq!((served.load(Ordering::Relaxed), failed.load(Ordering::Relaxed)), (50, 3));
    assert_eq!(state.retried(), 6, "three of each that fails, and then they are left out");
    let ejected = balance.runtime().with_outliers(|outliers| {
        [good, bad, gone].map(|endpoint| outliers.ejected_until(&endpoint).is_some())
    });
    assert_eq!(ejected, [false, true, true]);
}
