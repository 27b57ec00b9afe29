//! Requests over real sockets: what the pool and the dispatcher promise.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::{Body, ClusterName, Error, RequestContext, ResponseFlags, Slot};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, HeadersLayer, PoolSettings, Route, RouteBuilder,
    RouteTable, SelectRouteLayer, Shard, UpstreamProtocol, dispatch,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tower::{Service, ServiceBuilder, ServiceExt as _};

struct Upstream {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    seen: Arc<Mutex<HashMap<String, usize>>>,
    gate: Arc<Semaphore>,
}

/// Answers with the path; `/wait…` only when a permit of the gate is there.
async fn upstream(http2: bool) -> Upstream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let up = Upstream {
        addr: listener.local_addr().unwrap(),
        connections: Arc::default(),
        seen: Arc::default(),
        gate: Arc::new(Semaphore::new(0)),
    };
    let (connections, seen, gate) = (Arc::clone(&up.connections), Arc::clone(&up.seen), Arc::clone(&up.gate));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            connections.fetch_add(1, Ordering::SeqCst);
            let (seen, gate) = (Arc::clone(&seen), Arc::clone(&gate));
            let service = service_fn(move |request: Request<Incoming>| {
                let (seen, gate) = (Arc::clone(&seen), Arc::clone(&gate));
                async move {
                    let path = request.uri().path().to_owned();
                    *seen.lock().unwrap().entry(path.clone()).or_default() += 1;
                    if path.starts_with("/wait") {
                        gate.acquire().await.unwrap().forget();
                    }
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let text = format!("{path} {}", body.len());
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text))))
                }
            });
            tokio::spawn(async move {
                let io = TokioIo::new(stream);
                if http2 {
                    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(io, service)
                        .await;
                } else {
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                }
            });
        }
    });
    up
}

fn cluster(addr: SocketAddr, pool: PoolSettings, protocol: UpstreamProtocol) -> Arc<Cluster> {
    let mut spec =
        ClusterSpec::new(ClusterName::custom("up"), Discovery::Static(vec![EndpointSpec::new(addr)]));
    spec.pool = pool;
    spec.protocol = protocol;
    let cluster = Arc::new(Cluster::new(spec));
    Clusters::new().reconcile(std::slice::from_ref(&cluster));
    cluster
}

fn client(
    route: Route,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Error, Future: Send> + Clone + Send {
    let table = RouteTable::builder().host("*", [route]).build().unwrap();
    ServiceBuilder::new()
        .layer(SelectRouteLayer::new(Slot::fixed(table)))
        .layer(HeadersLayer::new())
        .service(dispatch(Shard::seeded(1)))
}

fn get(path: &str) -> Request<Body> {
    Request::get(format!("http://up{path}")).body(Body::empty()).unwrap()
}

async fn text(response: Response<Body>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

/// Waits for a condition on observable state, with a bound.
async fn until(condition: impl Fn() -> bool) {
    let bounded = tokio::time::timeout(Duration::from_secs(10), async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    });
    bounded.await.expect("the condition holds within ten seconds");
}

#[tokio::test]
async fn a_connection_is_used_again_and_the_books_are_exact() {
    for (http2, protocol) in [(false, UpstreamProtocol::Http1), (true, UpstreamProtocol::Http2)] {
        let up = upstream(http2).await;
        let cluster = cluster(up.addr, PoolSettings::default(), protocol);
        let client = client(RouteBuilder::new("all").forward(Arc::clone(&cluster)).unwrap());
        for number in 0..20 {
            let response = client.clone().oneshot(get(&format!("/{number}"))).await.unwrap();
            assert_eq!(response.status(), 200);
            assert!(response.headers().contains_key("x-envoy-upstream-service-time"));
            assert_eq!(text(response).await, format!("/{number} 0"));
        }
        let runtime = cluster.runtime().unwrap();
        assert_eq!(up.connections.load(Ordering::SeqCst), 1, "http2 {http2}");
        assert_eq!((runtime.requests(), runtime.pending(), runtime.connections()), (0, 0, 1));
        assert_eq!(cluster.endpoints().iter().next().unwrap().in_flight(), 0);
    }
}

#[tokio::test]
async fn dr_cp02_max_requests_per_connection() {
    let up = upstream(false).await;
    let pool = PoolSettings { max_requests_per_connection: Some(2), ..PoolSettings::default() };
    let cluster = cluster(up.addr, pool, UpstreamProtocol::Http1);
    let client = client(RouteBuilder::new("all").forward(cluster).unwrap());
    for _ in 0..6 {
        text(client.clone().oneshot(get("/")).await.unwrap()).await;
    }
    assert_eq!(up.connections.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn dr_cp01_max_connections_queues_and_dr_cp02_pending_overflows_by_one() {
    let up = upstream(false).await;
    let pool = PoolSettings { max_connections: 1, max_pending_requests: 1, ..PoolSettings::default() };
    let cluster = cluster(up.addr, pool, UpstreamProtocol::Http1);
    let runtime = Arc::clone(cluster.runtime().unwrap());
    let client = client(RouteBuilder::new("all").forward(cluster).unwrap());
    let first = tokio::spawn(client.clone().oneshot(get("/wait/1")));
    until(|| up.seen.lock().unwrap().contains_key("/wait/1")).await;
    let second = tokio::spawn(client.clone().oneshot(get("/wait/2")));
    until(|| runtime.pending() == 1).await;
    let refused = client.clone().oneshot(get("/wait/3")).await.unwrap_err();
    assert_eq!(refused.flags(), ResponseFlags::UPSTREAM_OVERFLOW);
    assert_eq!(refused.headers()["x-envoy-overloaded"], "true");
    assert_eq!(runtime.overflows(), 1);
    up.gate.add_permits(2);
    assert_eq!(text(first.await.unwrap().unwrap()).await, "/wait/1 0");
    assert_eq!(text(second.await.unwrap().unwrap()).await, "/wait/2 0");
    assert_eq!(up.connections.load(Ordering::SeqCst), 1);
    assert_eq!((runtime.requests(), runtime.pending()), (0, 0));
}

#[tokio::test]
async fn a_cancelled_request_leaves_the_books_exact() {
    let up = upstream(false).await;
    let pool = PoolSettings { max_connections: 1, ..PoolSettings::default() };
    let cluster = cluster(up.addr, pool, UpstreamProtocol::Http1);
    let runtime = Arc::clone(cluster.runtime().unwrap());
    let client = client(RouteBuilder::new("all").forward(cluster).unwrap());
    let running = tokio::spawn(client.clone().oneshot(get("/wait/1")));
    until(|| up.seen.lock().unwrap().contains_key("/wait/1")).await;
    let queued = tokio::spawn(client.clone().oneshot(get("/2")));
    until(|| runtime.pending() == 1).await;
    queued.abort();
    until(|| runtime.pending() == 0).await;
    running.abort();
    until(|| runtime.requests() == 0 && runtime.connections() == 0).await;
    assert_eq!(text(client.oneshot(get("/3")).await.unwrap()).await, "/3 0");
}

#[tokio::test]
async fn a2_idle_reset_races() {
    // An upstream that closes each connection right after its response, without saying so.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let seen: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let record = Arc::clone(&seen);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let record = Arc::clone(&record);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
                *record.lock().unwrap().entry(line).or_default() += 1;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            });
        }
    });
    let cluster = cluster(addr, PoolSettings::default(), UpstreamProtocol::Http1);
    let client = client(RouteBuilder::new("all").forward(cluster).unwrap());
    let mut failed = 0;
    for number in 0..10_000 {
        match client.clone().oneshot(get(&format!("/{number}"))).await {
            Ok(response) => assert_eq!(text(response).await, "ok"),
            // Written before the close was seen: it must not be sent again.
            Err(error) => {
                assert_eq!(error.flags(), ResponseFlags::UPSTREAM_CONNECTION_TERMINATION, "{error}");
                failed += 1;
            }
        }
    }
    let seen = seen.lock().unwrap();
    assert!(seen.values().all(|count| *count == 1), "no request reached the upstream twice");
    println!("a2: 10000 requests, 0 duplicates, {failed} failed after they were written");
}

#[tokio::test]
async fn a5_a_refused_connection_is_uf() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let cluster = cluster(closed, PoolSettings::default(), UpstreamProtocol::Http1);
    let client = client(RouteBuilder::new("all").forward(cluster).unwrap());
    let mut request = get("/");
    let cx = RequestContext::ensure(request.extensions_mut(), mesh_core::Direction::Outbound);
    let error = client.oneshot(request).await.unwrap_err();
    assert_eq!(
        (error.status(), error.flags()),
        (StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UPSTREAM_CONNECTION_FAILURE)
    );
    assert!(error.details().contains("remote_connection_failure"), "{error}");
    assert!(cx.transport_failure().is_some());
}

#[tokio::test]
async fn vs_t01_the_route_timeout_is_504_ut_and_frees_everything() {
    let up = upstream(false).await;
    let cluster = cluster(up.addr, PoolSettings::default(), UpstreamProtocol::Http1);
    let runtime = Arc::clone(cluster.runtime().unwrap());
    let route = RouteBuilder::new("all").timeout(Duration::from_millis(50)).forward(cluster).unwrap();
    let error = client(route).oneshot(get("/wait")).await.unwrap_err();
    assert_eq!(
        (error.status(), error.flags()),
        (StatusCode::GATEWAY_TIMEOUT, ResponseFlags::UPSTREAM_REQUEST_TIMEOUT)
    );
    until(|| runtime.requests() == 0 && runtime.connections() == 0).await;
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    for (http2, protocol) in [(false, UpstreamProtocol::Http1), (true, UpstreamProtocol::Http2)] {
        let up = upstream(http2).await;
        let client = client(
            RouteBuilder::new("all").forward(cluster(up.addr, PoolSettings::default(), protocol)).unwrap(),
        );
        let request = Request::post("http://up/body").body(Body::full(vec![7_u8; 3_000_000])).unwrap();
        assert_eq!(text(client.oneshot(request).await.unwrap()).await, "/body 3000000");
    }
}
