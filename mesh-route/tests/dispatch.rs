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

/// Frames that are there, of a length that nobody says.
struct Chunks(std::vec::IntoIter<&'static str>);

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Error>>> {
        let next = self.0.next().map(|text| Ok(http_body::Frame::data(Bytes::from_static(text.as_bytes()))));
        std::task::Poll::Ready(next)
    }
}

#[tokio::test]
async fn bug_a_get_of_unknown_length_lost_its_body() {
    for method in ["GET", "DELETE", "OPTIONS", "POST"] {
        let up = upstream(false).await;
        let cluster = cluster(up.addr, PoolSettings::default(), UpstreamProtocol::Http1);
        let client = client(RouteBuilder::new("all").forward(cluster).unwrap());
        let body = Body::new(Chunks(vec!["query", "more"].into_iter()));
        let request = Request::builder().method(method).uri("http://up/search").body(body).unwrap();
        assert_eq!(text(client.oneshot(request).await.unwrap()).await, "/search 9", "{method}");
    }
}

#[tokio::test]
async fn bug_http2_to_an_endpoint_that_retired_connected_again_and_again() {
    let up = upstream(true).await;
    let registry = Clusters::new();
    let cluster = |endpoints: Vec<EndpointSpec>| {
        let mut spec = ClusterSpec::new(ClusterName::custom("up"), Discovery::Static(endpoints));
        spec.protocol = UpstreamProtocol::Http2;
        let cluster = Arc::new(Cluster::new(spec));
        registry.reconcile(std::slice::from_ref(&cluster));
        cluster
    };
    let old = cluster(vec![EndpointSpec::new(up.addr)]);
    let new = cluster(Vec::new());
    assert!(old.endpoints().iter().all(|endpoint| endpoint.is_retired()));
    let client = client(RouteBuilder::new("all").forward(old).unwrap());
    let exchange = tokio::time::timeout(Duration::from_secs(10), client.oneshot(get("/old")));
    assert_eq!(text(exchange.await.expect("it ends").unwrap()).await, "/old 0");
    assert_eq!(up.connections.load(Ordering::SeqCst), 1);
    drop(new);
}

/// An address that accepts no connection and refuses none: its backlog is full.
fn black_hole() -> (SocketAddr, Vec<Box<dyn std::any::Any>>) {
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let addr = listener.local_addr().unwrap().as_socket().unwrap();
    let mut kept: Vec<Box<dyn std::any::Any>> = vec![Box::new(listener)];
    for _ in 0..8 {
        let filler = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        filler.set_nonblocking(true).unwrap();
        // In progress, or waiting for ever.
        let _ = filler.connect(&addr.into());
        kept.push(Box::new(filler));
    }
    (addr, kept)
}

#[tokio::test(start_paused = true)]
async fn bug_requests_that_waited_for_one_connection_failed_one_after_the_other() {
    let (addr, _kept) = black_hole();
    let pool = PoolSettings { connect_timeout: Duration::from_secs(10), ..PoolSettings::default() };
    let cluster = cluster(addr, pool, UpstreamProtocol::Http2);
    let runtime = Arc::clone(cluster.runtime().unwrap());
    let client = client(RouteBuilder::new("all").forward(cluster).unwrap());
    let started = tokio::time::Instant::now();
    let mut requests = tokio::task::JoinSet::new();
    for _ in 0..50 {
        requests.spawn(client.clone().oneshot(get("/")));
    }
    while let Some(response) = requests.join_next().await {
        let error = response.unwrap().unwrap_err();
        assert_eq!(error.flags(), ResponseFlags::UPSTREAM_CONNECTION_FAILURE);
        assert!(error.details().contains("connection_timeout"), "{error}");
    }
    assert_eq!(started.elapsed(), Duration::from_secs(10), "all of them after one timeout");
    assert_eq!((runtime.pending(), runtime.requests(), runtime.connections()), (0, 0, 0));
}

#[tokio::test]
async fn bug_a_connection_that_was_still_sending_was_waited_for_by_nobody() {
    // Answers each head at once, whatever of its body is still to come.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut received = Vec::new();
        let mut answered = 0;
        while stream.read_buf(&mut received).await.is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&received);
            let heads = text.matches("HTTP/1.1").count();
            for _ in answered..heads {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            }
            answered = heads;
        }
    });
    let pool = PoolSettings { max_connections: 1, ..PoolSettings::default() };
    let cluster = cluster(addr, pool, UpstreamProtocol::Http1);
    let runtime = Arc::clone(cluster.runtime().unwrap());
    let client = client(RouteBuilder::new("all").forward(cluster).unwrap());
    let (more, rest) = tokio::sync::mpsc::channel(1);
    let upload = Request::post("http://up/first").body(Body::new(Channel(rest))).unwrap();
    assert_eq!(text(client.clone().oneshot(upload).await.unwrap()).await, "ok");
    let second = tokio::spawn(client.oneshot(get("/second")));
    until(|| runtime.pending() == 1).await;
    drop(more);
    let second = tokio::time::timeout(Duration::from_secs(10), second).await.expect("it ends");
    assert_eq!(text(second.unwrap().unwrap()).await, "ok");
}

/// A body that ends when its sender is dropped.
struct Channel(tokio::sync::mpsc::Receiver<Bytes>);

impl http_body::Body for Channel {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Error>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(http_body::Frame::data(data))))
    }
}
