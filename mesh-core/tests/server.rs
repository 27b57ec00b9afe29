//! The server over real sockets: protocols, limits, workers, panics, reloads.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::config::{Compile, CompileContext, Compiler, Rejected, Role};
use mesh_core::diagnostics::Diagnostics;
use mesh_core::server::{ListenerSpec, Protocol, Server, ServerLimits, serve_here};
use mesh_core::{Body, Direction, RequestContext};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tower::service_fn;

fn spec(name: &'static str) -> ListenerSpec {
    ListenerSpec::new(name, (Ipv4Addr::LOCALHOST, 0).into(), Direction::Inbound)
}

async fn hello(request: Request<Body>) -> Result<Response<Body>, Infallible> {
    let thread = std::thread::current().name().unwrap_or_default().to_owned();
    let body = format!("{} {:?} {thread}", request.uri().path(), request.version());
    Ok(Response::new(Body::full(body)))
}

type H1 = http1::SendRequest<Full<Bytes>>;
type H2 = http2::SendRequest<Full<Bytes>>;

async fn h1(address: SocketAddr) -> H1 {
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (send, connection) = http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    send
}

async fn h2(address: SocketAddr) -> H2 {
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (send, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    send
}

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::builder().uri(format!("http://test{path}")).header("host", "test").body(Full::default()).unwrap()
}

async fn text(response: Response<hyper::body::Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

async fn raw(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is an end like any other.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// Serves on this test's runtime.
fn here(limits: ServerLimits) -> SocketAddr {
    let (address, serving) = serve_here(spec("here"), service_fn(hello), limits, None).unwrap();
    tokio::spawn(serving);
    address
}

#[tokio::test]
async fn pt_04_http1_and_h2c_share_a_port() {
    let server = Server::builder().start().unwrap();
    let address = server.listen(spec("auto"), |_| service_fn(hello)).unwrap();
    let response = h1(address).await.send_request(get("/one")).await.unwrap();
    assert_eq!(text(response).await, "/one HTTP/1.1 mesh-worker-0");
    let response = h2(address).await.send_request(get("/two")).await.unwrap();
    assert_eq!(text(response).await, "/two HTTP/2.0 mesh-worker-0");
    // A method that begins like the preface, a byte at a time.
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for byte in b"PRI * HTTP/2 /x" {
        stream.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    stream.write_all(b"\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let answer = raw(address, b"PUT /three HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
}

#[tokio::test]
async fn pt_04_a_listener_of_one_protocol_refuses_the_other() {
    let server = Server::builder().start().unwrap();
    let only1 = server.listen(spec("1").protocol(Protocol::Http1), |_| service_fn(hello)).unwrap();
    let only2 = server.listen(spec("2").protocol(Protocol::Http2), |_| service_fn(hello)).unwrap();
    assert!(h2(only2).await.send_request(get("/")).await.is_ok());
    assert!(h1(only1).await.send_request(get("/")).await.is_ok());
    assert!(h2(only1).await.send_request(get("/")).await.is_err());
    assert!(h1(only2).await.send_request(get("/")).await.is_err());
}

#[tokio::test]
async fn few_long_lived_connections_spread_over_the_workers() {
    let server = Server::builder().workers(3).start().unwrap();
    let address = server.listen(spec("spread"), |_| service_fn(hello)).unwrap();
    let mut connections = Vec::new();
    let mut threads = HashSet::new();
    for _ in 0..9 {
        let mut connection = h2(address).await;
        let answer = text(connection.send_request(get("/")).await.unwrap()).await;
        threads.insert(answer.rsplit_once(' ').unwrap().1.to_owned());
        connections.push(connection);
    }
    let loads = server.loads();
    assert_eq!(loads.iter().sum::<usize>(), 9);
    assert!(loads.iter().all(|load| (2..=4).contains(load)), "{loads:?}");
    assert_eq!(threads.len(), 3);
    assert_eq!(server.status()[0].open, 9);
}

/// Panics, in its future or in `call`, where the path says so.
#[derive(Clone)]
struct Touchy;

impl tower_service::Service<Request<Body>> for Touchy {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        assert!(request.uri().path() != "/call", "in call");
        Box::pin(async move {
            tokio::task::yield_now().await;
            assert!(request.uri().path() != "/future", "in the future");
            hello(request).await
        })
    }
}

#[tokio::test]
async fn f7_a_thousand_panics_hurt_nobody_else() {
    let server = Server::builder().start().unwrap();
    let address = server.listen(spec("touchy"), |_| Touchy).unwrap();
    let mut one = h1(address).await;
    let two = h2(address).await;
    for round in 0..250 {
        let path = if round % 2 == 0 { "/call" } else { "/future" };
        let same_stream = one.send_request(get(path)).await.unwrap();
        assert_eq!(same_stream.status(), StatusCode::INTERNAL_SERVER_ERROR);
        same_stream.into_body().collect().await.unwrap();
        one.ready().await.unwrap();
        assert_eq!(one.send_request(get("/fine")).await.unwrap().status(), StatusCode::OK);
        let [mut a, mut b, mut c, mut d] = [(); 4].map(|()| two.clone());
        let (a, b, c, d) = tokio::join!(
            a.send_request(get(path)),
            b.send_request(get("/fine")),
            c.send_request(get("/future")),
            d.send_request(get("/call")),
        );
        assert_eq!(b.unwrap().status(), StatusCode::OK);
        for panicked in [a, c, d] {
            assert_eq!(panicked.unwrap().status(), StatusCode::INTERNAL_SERVER_ERROR);
        }
    }
    assert_eq!(server.panics().count(), 1000);
}

#[tokio::test]
async fn connections_above_the_limit_are_closed_at_once() {
    let mut limits = ServerLimits::default();
    limits.max_connections = 3;
    let server = Server::builder().workers(2).limits(limits).start().unwrap();
    let address = server.listen(spec("few"), |_| service_fn(hello)).unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut connection = h1(address).await;
        text(connection.send_request(get("/")).await.unwrap()).await;
        held.push(connection);
    }
    assert_eq!(raw(address, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await, "");
    assert_eq!((server.status()[0].open, server.status()[0].refused), (3, 1));
    held.pop();
    until(|| server.status()[0].open == 2).await;
    assert!(h1(address).await.send_request(get("/")).await.is_ok());
}

/// Waits for what another thread is about to do.
async fn until(reached: impl Fn() -> bool) {
    for _ in 0..5000 {
        if reached() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("it never came");
}

#[tokio::test]
async fn g7_heads_have_limits() {
    let address = here(ServerLimits::default());
    let h1 = |fields: String| async move {
        raw(address, format!("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{fields}\r\n").as_bytes())
            .await
    };
    let many = |count: usize| (0..count).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
    assert!(h1(many(98)).await.starts_with("HTTP/1.1 200"));
    assert!(h1(many(99)).await.starts_with("HTTP/1.1 431"));
    let long = |bytes: usize| format!("x: {}\r\n", "a".repeat(bytes));
    assert!(h1(long(59 << 10)).await.starts_with("HTTP/1.1 200"));
    assert!(h1(long(60 << 10)).await.starts_with("HTTP/1.1 431"));

    let connection = h2(address).await;
    let ask = |fields: Vec<(String, String)>| {
        let mut request = get("/");
        request.headers_mut().clear();
        for (name, value) in fields {
            let name = http::HeaderName::try_from(name).unwrap();
            request.headers_mut().append(name, value.parse().unwrap());
        }
        let mut connection = connection.clone();
        async move { connection.send_request(request).await.map(|response| response.status()) }
    };
    let many = |count: usize| (0..count).map(|n| (format!("x-{n}"), "1".to_owned())).collect::<Vec<_>>();
    assert_eq!(ask(many(100)).await.unwrap(), StatusCode::OK);
    assert_eq!(ask(many(101)).await.unwrap(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let long = |bytes: usize| vec![("x".to_owned(), "a".repeat(bytes))];
    assert_eq!(ask(long(59 << 10)).await.unwrap(), StatusCode::OK);
    assert_eq!(ask(long(60 << 10)).await.unwrap(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
}

/// Ready for one caller at a time; who waits is woken in turn. Counts its clones.
struct Turnstile {
    state: Arc<Mutex<(bool, Vec<Waker>)>>,
    clones: Arc<AtomicUsize>,
    mine: bool,
}

impl Clone for Turnstile {
    fn clone(&self) -> Self {
        self.clones.fetch_add(1, Ordering::Relaxed);
        Self { state: Arc::clone(&self.state), clones: Arc::clone(&self.clones), mine: false }
    }
}

impl tower_service::Service<Request<Body>> for Turnstile {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        let mut state = self.state.lock().unwrap();
        if !self.mine {
            if state.0 {
                state.1.push(cx.waker().clone());
                return Poll::Pending;
            }
            state.0 = true;
            self.mine = true;
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        assert!(std::mem::take(&mut self.mine), "called without being ready");
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            {
                let mut state = state.lock().unwrap();
                state.0 = false;
                state.1.drain(..).for_each(Waker::wake);
            }
            hello(request).await
        })
    }
}

#[tokio::test]
async fn the_stack_is_cloned_only_for_requests_that_wait() {
    let server = Server::builder().start().unwrap();
    let clones = Arc::new(AtomicUsize::new(0));
    let address = server
        .listen(spec("turnstile"), {
            let clones = Arc::clone(&clones);
            move |_| Turnstile { state: Arc::default(), clones: Arc::clone(&clones), mine: false }
        })
        .unwrap();
    let mut one = h1(address).await;
    for _ in 0..20 {
        one.ready().await.unwrap();
        text(one.send_request(get("/")).await.unwrap()).await;
    }
    assert_eq!(clones.load(Ordering::Relaxed), 0);
    let two = h2(address).await;
    let all = (0..10).map(|_| {
        let mut two = two.clone();
        async move { two.send_request(get("/")).await.unwrap().status() }
    });
    for status in futures_util::future::join_all(all).await {
        assert_eq!(status, StatusCode::OK);
    }
    assert!((1..=9).contains(&clones.load(Ordering::Relaxed)), "{clones:?}");
}

struct Model(Arc<()>);

impl Compile<Arc<()>> for Model {
    fn compile(source: &Arc<()>, _: &CompileContext, _: &mut Diagnostics) -> Result<Self, Rejected> {
        Ok(Self(Arc::clone(source)))
    }

    fn closed(_: &CompileContext) -> Self {
        Self(Arc::default())
    }
}

#[tokio::test]
async fn a_reload_reaches_every_worker_idle_ones_too() {
    let mut compiler = Compiler::<Arc<()>>::new(CompileContext::new(Role::Sidecar));
    let slot = compiler.register::<Model>();
    let first = Arc::new(());
    compiler.apply(&first, Diagnostics::default());
    let server = Server::builder().workers(2).snapshots(compiler.snapshots().clone()).start().unwrap();
    let address = server
        .listen(spec("reload"), {
            move |_| {
                let slot = slot.clone();
                service_fn(move |request: Request<Body>| {
                    let context = request.extensions().get::<RequestContext>().unwrap();
                    assert!(slot.get(context).is_some_and(|model| Arc::strong_count(&model.0) > 0));
                    let generation = context.snapshot().unwrap().generation().to_string();
                    ready(Ok::<_, Infallible>(Response::new(Body::full(generation))))
                })
            }
        })
        .unwrap();
    // One connection, so one of the workers has none.
    let mut one = h1(address).await;
    assert_eq!(text(one.send_request(get("/")).await.unwrap()).await, "1");
    assert!(Arc::strong_count(&first) > 1);
    compiler.apply(&Arc::new(()), Diagnostics::default());
    until(|| Arc::strong_count(&first) == 1).await;
    one.ready().await.unwrap();
    assert_eq!(text(one.send_request(get("/")).await.unwrap()).await, "2");
}

#[tokio::test]
async fn c4_kept_listeners_refuse_nobody_while_others_come_and_go() {
    let server = Server::builder().workers(2).start().unwrap();
    let answer = |name: &'static str| {
        move |_: Request<Body>| -> Ready<Result<_, Infallible>> { ready(Ok(Response::new(Body::full(name)))) }
    };
    let kept = server.listen(spec("kept"), move |_| service_fn(answer("kept"))).unwrap();
    let old = server.listen(spec("old"), move |_| service_fn(answer("old"))).unwrap();
    let mut on_old = h1(old).await;
    text(on_old.send_request(get("/")).await.unwrap()).await;

    let stop = Arc::new(AtomicUsize::new(0));
    let load = tokio::spawn({
        let stop = Arc::clone(&stop);
        async move {
            let mut served = 0;
            while stop.load(Ordering::Relaxed) == 0 {
                let response = h1(kept).await.send_request(get("/")).await.unwrap();
                assert_eq!(text(response).await, "kept");
                served += 1;
            }
            served
        }
    });
    let wanted = ListenerSpec::new("new", old, Direction::Inbound);
    let keep = spec("kept");
    let done = server
        .reconcile(vec![keep.clone(), wanted], |server, spec| {
            server.listen(spec, move |_| service_fn(answer("new")))
        })
        .await;
    assert_eq!(done.kept.iter().map(|name| &**name).collect::<Vec<_>>(), ["kept"]);
    assert_eq!(done.removed.iter().map(|name| &**name).collect::<Vec<_>>(), ["old"]);
    assert_eq!(done.added, [(Arc::from("new"), old)]);
    // The connection to the old listener is told with its next response, and new ones meet the new listener.
    on_old.ready().await.unwrap();
    let response = on_old.send_request(get("/")).await.unwrap();
    assert_eq!(response.headers()["connection"], "close");
    assert_eq!(text(response).await, "old");
    assert_eq!(text(h1(old).await.send_request(get("/")).await.unwrap()).await, "new");
    for _ in 0..5 {
        let done = server.reconcile(vec![keep.clone()], |_, _| unreachable!("nothing is missing")).await;
        assert_eq!(done.kept.len(), 1);
        let extra = spec("extra");
        let done = server
            .reconcile(vec![keep.clone(), extra], |server, spec| {
                server.listen(spec, move |_| service_fn(answer("extra")))
            })
            .await;
        assert_eq!((done.kept.len(), done.added.len()), (1, 1));
    }
    stop.store(1, Ordering::Relaxed);
    assert!(load.await.unwrap() > 0);
    let busy = server
        .listen(ListenerSpec::new("busy", kept, Direction::Inbound), move |_| service_fn(answer("busy")));
    assert!(busy.unwrap_err().to_string().contains(&kept.to_string()));
}

#[tokio::test]
async fn a_request_in_flight_when_its_client_leaves_is_flagged() {
    let server = Server::builder().start().unwrap();
    let contexts = Arc::new(Mutex::new(Vec::new()));
    let address = server
        .listen(spec("left"), {
            let contexts = Arc::clone(&contexts);
            move |_| {
                let contexts = Arc::clone(&contexts);
                service_fn(move |request: Request<Body>| {
                    contexts
                        .lock()
                        .unwrap()
                        .push(request.extensions().get::<RequestContext>().unwrap().clone());
                    async move {
                        if request.uri().path() == "/body" {
                            let endless = futures_util::stream::repeat_with(|| {
                                Ok::<_, Infallible>(http_body::Frame::data(Bytes::from_static(&[0; 1024])))
                            });
                            return Ok(Response::new(Body::new(http_body_util::StreamBody::new(endless))));
                        }
                        std::future::pending::<Result<_, Infallible>>().await
                    }
                })
            }
        })
        .unwrap();
    for (path, one) in [("/head", true), ("/body", true), ("/head", false), ("/body", false)] {
        // Dropping the runtime of the client drops its sockets.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let asked = async {
                        if one {
                            h1(address).await.send_request(get(path)).await.map(|_| ())
                        } else {
                            h2(address).await.send_request(get(path)).await.map(|_| ())
                        }
                    };
                    let _ = tokio::time::timeout(Duration::from_millis(100), asked).await;
                });
            });
        });
        until(|| server.status()[0].open == 1 || server.status()[0].open == 0).await;
        until(|| {
            contexts.lock().unwrap().last().is_some_and(|cx: &RequestContext| cx.flags().to_string() == "DC")
        })
        .await;
        contexts.lock().unwrap().clear();
    }
    until(|| server.status()[0].open == 0).await;
}

#[tokio::test]
async fn responses_that_end_early_by_rule_are_not_flagged() {
    let server = Server::builder().start().unwrap();
    let last = Arc::new(Mutex::new(None::<RequestContext>));
    let address = server
        .listen(spec("rules"), {
            let last = Arc::clone(&last);
            move |_| {
                let last = Arc::clone(&last);
                service_fn(move |request: Request<Body>| {
                    *last.lock().unwrap() = request.extensions().get::<RequestContext>().cloned();
                    let mut response = Response::new(Body::full("twelve bytes"));
                    if request.uri().path() == "/304" {
                        *response.status_mut() = StatusCode::NOT_MODIFIED;
                    }
                    ready(Ok::<_, Infallible>(response))
                })
            }
        })
        .unwrap();
    let mut one = h1(address).await;
    for (method, path, bytes) in [("GET", "/", 12), ("HEAD", "/", 0), ("GET", "/304", 0)] {
        one.ready().await.unwrap();
        let mut request = get(path);
        *request.method_mut() = method.parse().unwrap();
        text(one.send_request(request).await.unwrap()).await;
        let context = last.lock().unwrap().take().unwrap();
        assert_eq!(
            (context.flags().to_string().as_str(), context.response_bytes()),
            ("-", bytes),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn empty_bodies_and_versions_reach_the_stack_as_they_are() {
    let address = here(ServerLimits::default());
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (mut send, connection) = http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let request = Request::builder().uri("/v").header("host", "a").version(Version::HTTP_10);
    let response = send.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    assert!(text(response).await.starts_with("/v HTTP/1.0"));
}
