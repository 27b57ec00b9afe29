//! Bodies that flow both ways through the sidecar: streams, trailers, answers without bodies, interim answers, and
//! readers who stop reading (E6, H10, A9, A11).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body::Frame;
use http_body_util::{BodyExt as _, Empty, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_testkit::h2_upstream::{Act, Http2Upstream, INITIAL_WINDOW, MAX_STREAMS};
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::exchange;
use mesh_testkit::until;
use mesh_testkit::upstream::{Echo, Recorder};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc};

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";
const BOTH: [Version; 2] = [Version::HTTP_11, Version::HTTP_2];

/// A sidecar whose service `h1` speaks HTTP/1.1 to `upstream`, and `h2` HTTP/2.
fn sidecar(upstream: SocketAddr) -> (Process, ConfigDir) {
    let dir = ConfigDir::new();
    let service = |name: &str, protocol: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec:\n  hosts: [{name}.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: p, protocol: {protocol}}}]\n  endpoints: [{{address: {}, ports: {{p: {}}}}}]\n---\n",
            upstream.ip(),
            upstream.port()
        )
    };
    let empty = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: nobody}\nspec:\n  hosts: [nobody.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{number: 80, name: grpc, protocol: GRPC}]\n";
    dir.write("mesh.yaml", &format!("{}{}{empty}", service("h1", "HTTP"), service("h2", "HTTP2")));
    let config = dir.file("mesh.yaml");
    let process = Process::start(
        SIDECAR,
        &["--config", &config, "--outbound", ANY, "--admin", ANY, "--workers", "1", "--log", "error"],
    );
    (process, dir)
}

/// The name of the service that is spoken to in `version`.
fn host(version: Version) -> &'static str {
    if version == Version::HTTP_2 { "h2" } else { "h1" }
}

/// A body that a test feeds while it is sent.
struct Fed(mpsc::Receiver<Frame<Bytes>>);

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

fn fed() -> (mpsc::Sender<Frame<Bytes>>, Fed) {
    let (sender, receiver) = mpsc::channel(1);
    (sender, Fed(receiver))
}

type AnyBody = BoxBody<Bytes, Infallible>;

/// A client that speaks one version.
enum Client {
    Http1(http1::SendRequest<AnyBody>),
    Http2(http2::SendRequest<AnyBody>),
}

impl Client {
    async fn connect(peer: SocketAddr, version: Version) -> Self {
        let stream = TcpStream::connect(peer).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let stream = TokioIo::new(stream);
        if version == Version::HTTP_2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
            tokio::spawn(connection);
            Self::Http2(sender)
        } else {
            let (sender, connection) = http1::handshake(stream).await.unwrap();
            tokio::spawn(connection);
            Self::Http1(sender)
        }
    }

    async fn send(
        &mut self,
        host: &str,
        request: http::request::Builder,
        body: AnyBody,
    ) -> Response<Incoming> {
        let mut request = request.body(body).unwrap();
        let path = request.uri().path_and_query().unwrap().to_string();
        let sent = match self {
            Self::Http1(sender) => {
                request.headers_mut().insert("host", HeaderValue::from_str(host).unwrap());
                sender.ready().await.unwrap();
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                *request.uri_mut() = format!("http://{host}{path}").parse().unwrap();
                *request.version_mut() = Version::HTTP_2;
                sender.ready().await.unwrap();
                sender.send_request(request).await
            }
        };
        sent.unwrap()
    }
}

fn nothing() -> AnyBody {
    Empty::new().boxed()
}

/// An application by function, over HTTP/1.1 and h2c.
async fn application<F, Fut>(answer: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Response<AnyBody>> + Send + 'static,
{
    let listener = TcpListener::bind(ANY).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            let answer = answer.clone();
            let service = hyper::service::service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            tokio::spawn(async move {
                let mut first = [0_u8; 4];
                let http2 = matches!(stream.peek(&mut first).await, Ok(4)) && &first == b"PRI ";
                let io = TokioIo::new(stream);
                // A client that goes away is no event.
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
    addr
}

/// A gRPC message.
fn message(text: &str) -> Bytes {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
    bytes.into()
}

fn status(code: &'static str) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(code));
    Frame::trailers(trailers)
}

/// A gRPC service: answers every message as it comes, `/many` with five messages, each when `step` lets it.
async fn grpc(step: Arc<Semaphore>) -> SocketAddr {
    application(move |request: Request<Incoming>| {
        let step = Arc::clone(&step);
        async move {
            let (sender, body) = fed();
            let many = request.uri().path() == "/s/many";
            let trailers_wanted = request.headers().get("te").is_some_and(|te| te == "trailers");
            tokio::spawn(async move {
                let mut incoming = request.into_body();
                while let Some(Ok(frame)) = incoming.frame().await {
                    if let Ok(data) = frame.into_data()
                        && !many
                        && sender.send(Frame::data(data)).await.is_err()
                    {
                        return;
                    }
                }
                for number in 0..if many { 5 } else { 0 } {
                    step.acquire().await.unwrap().forget();
                    let _ = sender.send(Frame::data(message(&number.to_string()))).await;
                }
                let _ = sender.send(status(if trailers_wanted { "0" } else { "13" })).await;
            });
            let mut response = Response::new(body.boxed());
            response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
            response
        }
    })
    .await
}

fn call(path: &str) -> http::request::Builder {
    Request::post(path).header("content-type", "application/grpc").header("te", "trailers")
}

async fn next(body: &mut Incoming) -> Frame<Bytes> {
    let frame = tokio::time::timeout(mesh_testkit::PATIENCE, body.frame()).await.expect("a frame in time");
    frame.expect("a frame").expect("a sound frame")
}

fn assert_ok(frame: &Frame<Bytes>) {
    assert_eq!(frame.trailers_ref().expect("trailers")["grpc-status"], "0");
}

#[tokio::test]
async fn grpc_unary_and_every_kind_of_stream() {
    let step = Arc::new(Semaphore::new(0));
    let upstream = grpc(Arc::clone(&step)).await;
    let (sidecar, _dir) = sidecar(upstream);
    let mut client = Client::connect(sidecar.address("outbound"), Version::HTTP_2).await;

    // Unary.
    let answer = client.send("h2", call("/s/echo"), Full::new(message("one")).boxed()).await;
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    let answer = answer.into_body().collect().await.unwrap();
    assert_eq!(answer.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(answer.to_bytes(), message("one"));

    // From the server: each message comes before the next is made.
    let mut body = client.send("h2", call("/s/many"), nothing()).await.into_body();
    for number in 0..5 {
        step.add_permits(1);
        assert_eq!(next(&mut body).await.into_data().unwrap(), message(&number.to_string()));
    }
    assert_ok(&next(&mut body).await);

    // Both ways: every message is answered before the next is sent.
    let (feed, sent) = fed();
    let mut body = client.send("h2", call("/s/echo"), sent.boxed()).await.into_body();
    for number in 0..20 {
        let one = message(&format!("message {number}"));
        feed.send(Frame::data(one.clone())).await.unwrap();
        assert_eq!(next(&mut body).await.into_data().unwrap(), one);
    }
    drop(feed);
    assert_ok(&next(&mut body).await);

    // From the client: what it sends is whole, in order.
    let (feed, sent) = fed();
    let body = client.send("h2", call("/s/echo"), sent.boxed()).await.into_body();
    let all = tokio::spawn(body.collect());
    let mut expected = Vec::new();
    for number in 0..100 {
        let one = message(&number.to_string());
        expected.extend_from_slice(&one);
        feed.send(Frame::data(one)).await.unwrap();
    }
    drop(feed);
    let all = all.await.unwrap().unwrap();
    assert_eq!(all.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(all.to_bytes(), expected);

    // No endpoint: an answer of ours, in the words of gRPC.
    let answer = client.send("nobody", call("/s/echo"), nothing()).await;
    assert_eq!(
        (answer.status(), &answer.headers()["grpc-status"]),
        (StatusCode::OK, &HeaderValue::from_static("14"))
    );
}

#[tokio::test]
async fn e6_trailers_pass_both_ways_between_every_pair_of_versions() {
    let upstream = Echo::start("app").await;
    let (sidecar, _dir) = sidecar(upstream.addr);
    for down in BOTH {
        for up in BOTH {
            let mut client = Client::connect(sidecar.address("outbound"), down).await;
            let (feed, body) = fed();
            let feeding = tokio::spawn(async move {
                feed.send(Frame::data(Bytes::from_static(b"body"))).await.unwrap();
                let mut trailers = HeaderMap::new();
                trailers.insert("x-sum", HeaderValue::from_static("7"));
                feed.send(Frame::trailers(trailers)).await.unwrap();
            });
            let request = Request::post("/trailers").header("te", "trailers").header("trailer", "x-sum");
            let answer = client.send(host(up), request, body.boxed()).await;
            assert_eq!(answer.status(), 200);
            let answer = answer.into_body().collect().await.unwrap();
            feeding.await.unwrap();
            let case = format!("{down:?} to {up:?}");
            assert_eq!(answer.trailers().expect(&case)["grpc-status"], "0", "{case}");
            let saw: Value = serde_json::from_slice(&answer.to_bytes()).unwrap();
            assert_eq!(saw["protocol"], format!("{up:?}"), "{case}");
            assert_eq!(
                (&saw["body_bytes"], &saw["trailers"]["x-sum"]),
                (&4.into(), &"7".into()),
                "{case}: {saw}"
            );
        }
    }
}

#[tokio::test]
async fn e6_answers_without_a_body_leave_the_connection_usable() {
    let upstream = Echo::start("app").await;
    let (sidecar, _dir) = sidecar(upstream.addr);
    for down in BOTH {
        for up in BOTH {
            let mut client = Client::connect(sidecar.address("outbound"), down).await;
            for _ in 0..3 {
                let head = client.send(host(up), Request::head("/x"), nothing()).await;
                assert_eq!(head.status(), 200);
                assert!(head.into_body().collect().await.unwrap().to_bytes().is_empty());
                // Nor has an answer of ours one.
                let head = client.send("nobody", Request::head("/x"), nothing()).await;
                assert_eq!(head.status(), 503);
                assert!(head.into_body().collect().await.unwrap().to_bytes().is_empty());
                for code in ["204", "304"] {
                    let request = Request::get("/x").header("x-answer-status", code);
                    let answer = client.send(host(up), request, nothing()).await;
                    assert_eq!(answer.status().as_str(), code);
                    assert!(answer.into_body().collect().await.unwrap().to_bytes().is_empty());
                }
                let answer = client.send(host(up), Request::get("/after"), nothing()).await;
                let saw: Value =
                    serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes()).unwrap();
                assert_eq!(saw["url"], "/after", "{down:?} to {up:?}");
            }
        }
    }
}

#[tokio::test]
async fn e6_interim_answers_do_not_count_as_answers() {
    let hints = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </b>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let upstream = Recorder::start(hints, false).await;
    let (sidecar, _dir) = sidecar(upstream.addr);
    let two =
        "GET /one HTTP/1.1\r\nhost: h1\r\n\r\nGET /two HTTP/1.1\r\nhost: h1\r\nconnection: close\r\n\r\n";
    let answer = exchange(sidecar.address("outbound"), two.as_bytes(), mesh_testkit::PATIENCE).await;
    assert_eq!(answer.statuses(), [200, 200], "{}", String::from_utf8_lossy(&answer.bytes));
    assert_eq!(upstream.requests(), 2);
    let mut client = Client::connect(sidecar.address("outbound"), Version::HTTP_2).await;
    for _ in 0..3 {
        let answer = client.send("h1", Request::get("/three"), nothing()).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "ok");
    }
}

/// Reads until the end of a head.
async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    let read = async {
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
    };
    tokio::time::timeout(mesh_testkit::PATIENCE, read).await.expect("a head in time");
    String::from_utf8_lossy(&head).into_owned()
}

#[tokio::test]
async fn e6_expect_100_continue_is_answered_before_the_body_is_sent() {
    let upstream = Echo::start("app").await;
    let (sidecar, _dir) = sidecar(upstream.addr);
    for up in ["h1", "h2"] {
        let mut stream = TcpStream::connect(sidecar.address("outbound")).await.unwrap();
        let ask =
            format!("POST /a HTTP/1.1\r\nhost: {up}\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.unwrap();
        assert!(head(&mut stream).await.starts_with("HTTP/1.1 100"));
        stream.write_all(b"hello").await.unwrap();
        assert!(head(&mut stream).await.starts_with("HTTP/1.1 200"));
        // A client that does not wait.
        let early = format!("{}hello", ask.replace("content-length", "connection: close\r\ncontent-length"));
        let answer = exchange(sidecar.address("outbound"), early.as_bytes(), mesh_testkit::PATIENCE).await;
        assert_eq!(answer.statuses(), [200]);
        assert!(String::from_utf8_lossy(&answer.bytes).contains("\"body_bytes\":5"));
    }
    // A client that is refused before it sends its body may not have it read as the next request.
    let refusing =
        Recorder::start(b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\n\r\n", true).await;
    let (sidecar, _dir) = self::sidecar(refusing.addr);
    let ask = "GET /x HTTP/1.1\r\nhost: nowhere\r\nexpect: 100-continue\r\ncontent-length: 28\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n\r\n";
    let answer = exchange(sidecar.address("outbound"), ask.as_bytes(), Duration::from_millis(500)).await;
    assert!(answer.statuses().len() <= 1, "{}", String::from_utf8_lossy(&answer.bytes));
    assert!(!refusing.connections().concat().windows(8).any(|bytes| bytes == b"smuggled"));
}

#[tokio::test]
async fn http_1_0_gets_no_chunks_and_keeps_alive_when_it_asks() {
    let upstream = Echo::start("app").await;
    upstream.gate.add_permits(100);
    let (sidecar, _dir) = sidecar(upstream.addr);
    let outbound = sidecar.address("outbound");
    // The length of a streamed answer is not known.
    let streamed =
        exchange(outbound, b"GET /slow HTTP/1.0\r\nhost: h1\r\n\r\n", mesh_testkit::PATIENCE).await;
    let text = String::from_utf8_lossy(&streamed.bytes).to_ascii_lowercase();
    assert!(streamed.closed && !text.contains("transfer-encoding"), "{text}");
    let body = text.split("\r\n\r\n").nth(1).unwrap();
    assert!(serde_json::from_str::<Value>(body).is_ok(), "a whole body and nothing else: {body}");
    let kept =
        b"GET /a HTTP/1.0\r\nhost: h1\r\nconnection: keep-alive\r\n\r\nGET /b HTTP/1.0\r\nhost: h1\r\n\r\n";
    let answer = exchange(outbound, kept, mesh_testkit::PATIENCE).await;
    let text = String::from_utf8_lossy(&answer.bytes).into_owned();
    assert!(answer.closed && text.contains("\"/a\"") && text.contains("\"/b\""), "{text}");
}

/// Bytes that back-pressure has to hold back.
const FLOOD: usize = 64 << 20;
const CHUNK: usize = 64 << 10;

/// What the sockets of two hops may hold; the proxy itself holds far less.
const SOCKETS: usize = 40 << 20;

/// What a proxy may hold of one stream that nobody reads, in KiB.
const HELD_KIB: u64 = 2 << 10;

/// A body of [`FLOOD`] bytes that counts what is taken from it.
struct Flood {
    left: usize,
    taken: Arc<AtomicUsize>,
}

impl Flood {
    fn counted(taken: &Arc<AtomicUsize>) -> AnyBody {
        Self { left: FLOOD, taken: Arc::clone(taken) }.boxed()
    }
}

impl http_body::Body for Flood {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        static ZEROS: [u8; CHUNK] = [0; CHUNK];
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.left -= CHUNK;
        self.taken.fetch_add(CHUNK, Ordering::SeqCst);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&ZEROS)))))
    }
}

/// Waits until a count has been the same for a while.
async fn settled(count: &AtomicUsize) -> usize {
    let (mut last, mut same) = (0, 0);
    until("a stream to stop", async || {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = count.load(Ordering::SeqCst);
        same = if now == last && now > 0 { same + 1 } else { 0 };
        last = now;
        same == 15
    })
    .await;
    last
}

#[tokio::test]
async fn a11_what_nobody_reads_is_not_taken_in() {
    let (open, taken, made) =
        (Arc::new(Notify::new()), Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let upstream = {
        let (open, taken, made) = (Arc::clone(&open), Arc::clone(&taken), Arc::clone(&made));
        application(move |request: Request<Incoming>| {
            let (open, taken, made) = (Arc::clone(&open), Arc::clone(&taken), Arc::clone(&made));
            async move {
                if request.uri().path() == "/down" {
                    return Response::new(Flood::counted(&made));
                }
                open.notified().await;
                let mut body = request.into_body();
                while let Some(Ok(frame)) = body.frame().await {
                    taken.fetch_add(frame.data_ref().map_or(0, Bytes::len), Ordering::SeqCst);
                }
                Response::new(nothing())
            }
        })
        .await
    };
    for down in BOTH {
        for up in BOTH {
            let case = format!("{down:?} to {up:?}");
            let (sidecar, _dir) = sidecar(upstream);
            let mut client = Client::connect(sidecar.address("outbound"), down).await;
            // A small one first, so that what is kept anyway is there.
            open.notify_one();
            client.send(host(up), Request::post("/up"), Full::from("x").boxed()).await;
            let before = sidecar.anonymous_kib();

            taken.store(0, Ordering::SeqCst);
            let sent = Arc::<AtomicUsize>::default();
            let flood = Flood::counted(&sent);
            let uploading =
                tokio::spawn(async move { client.send(host(up), Request::post("/up"), flood).await });
            let stopped = settled(&sent).await;
            let held = sidecar.anonymous_kib().saturating_sub(before);
            println!("a11 {case}: upload stopped at {} KiB, the proxy holds {held} KiB", stopped >> 10);
            assert!(stopped < SOCKETS && held < HELD_KIB, "{case}: {stopped} bytes, {held} KiB");
            open.notify_one();
            assert_eq!(uploading.await.unwrap().status(), 200);
            assert_eq!(taken.load(Ordering::SeqCst), FLOOD, "{case}");

            made.store(0, Ordering::SeqCst);
            let download = async || {
                let mut client = Client::connect(sidecar.address("outbound"), down).await;
                client.send(host(up), Request::get("/down"), nothing()).await
            };
            // What the first one makes the allocator keep is there before the others are counted.
            let answer = download().await;
            settled(&made).await;
            let before = sidecar.anonymous_kib();
            let others = [download().await, download().await, download().await, download().await];
            let stopped = settled(&made).await / 5;
            let held = sidecar.anonymous_kib().saturating_sub(before) / 4;
            println!(
                "a11 {case}: downloads stopped at {} KiB, the proxy holds {held} KiB of each",
                stopped >> 10
            );
            assert!(stopped < SOCKETS && held < HELD_KIB, "{case}: {stopped} bytes, {held} KiB");
            drop(others);
            assert_eq!(answer.into_body().collect().await.unwrap().to_bytes().len(), FLOOD, "{case}");
        }
    }
}

/// What a proxy may hold of a stream whose upstream reads nothing, in KiB.
const HELD_OF_A_STREAM_KIB: u64 = 64;

#[tokio::test]
async fn a11_a_hundred_streams_to_an_upstream_that_stops_reading_cost_a_bounded_amount() {
    const STREAMS: usize = 100;
    let up = Http2Upstream::start(&[(MAX_STREAMS, 1000), (INITIAL_WINDOW, 0)], Act::Answer).await;
    for down in BOTH {
        let (sidecar, _dir) = sidecar(up.addr);
        let connections = if down == Version::HTTP_2 { 1 } else { STREAMS };
        let mut clients = Vec::new();
        for _ in 0..connections {
            let mut client = Client::connect(sidecar.address("outbound"), down).await;
            // A small one first, so that what is kept anyway is there.
            assert_eq!(client.send("h2", Request::post("/"), nothing()).await.status(), 200);
            clients.push(client);
        }
        let before = sidecar.anonymous_kib();
        let sent = Arc::<AtomicUsize>::default();
        let (requests, mut uploads) = (up.requests().len(), tokio::task::JoinSet::new());
        for mut client in clients {
            for _ in 0..STREAMS / connections {
                let flood = Flood::counted(&sent);
                match &mut client {
                    Client::Http1(sender) => {
                        let request = Request::post("/").header("host", "h2").body(flood).unwrap();
                        let sending = sender.send_request(request);
                        uploads.spawn(async move { sending.await.is_ok() });
                    }
                    Client::Http2(sender) => {
                        let mut request = Request::post("http://h2/").body(flood).unwrap();
                        *request.version_mut() = Version::HTTP_2;
                        let sending = sender.send_request(request);
                        uploads.spawn(async move { sending.await.is_ok() });
                    }
                }
            }
            // A client that is dropped goes on with what it has begun.
        }
        until("a hundred streams", async || up.requests().len() == requests + STREAMS).await;
        settled(&sent).await;
        let held = sidecar.anonymous_kib().saturating_sub(before) / STREAMS as u64;
        println!(
            "a11 {down:?}: the proxy holds {held} KiB of each of {STREAMS} streams (goal {HELD_OF_A_STREAM_KIB})"
        );
        assert!(held <= HELD_OF_A_STREAM_KIB, "{down:?}: {held} KiB");
        assert!(up.requests()[requests..].iter().all(|request| request.body.is_empty()), "it reads nothing");
        // The upstream leaves, and nothing is in flight any more.
        (0..up.connections()).for_each(|connection| up.close(connection));
        let admin = sidecar.address("admin");
        until("everything to be given back", async || {
            let clusters = mesh_testkit::raw::get_json(admin, "/clusters").await;
            clusters["clusters"].as_array().unwrap().iter().all(|cluster| {
                cluster["now"]["requests"].as_u64() == Some(0)
                    && cluster["now"]["pending_requests"].as_u64() == Some(0)
            })
        })
        .await;
    }
}

#[tokio::test]
async fn a9_goaway_loses_no_stream() {
    let (leave, go) = (Arc::new(Notify::new()), Arc::new(Semaphore::new(0)));
    let (connections, held) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let listener = TcpListener::bind(ANY).await.unwrap();
    let addr = listener.local_addr().unwrap();
    {
        let (leave, go) = (Arc::clone(&leave), Arc::clone(&go));
        let (connections, held) = (Arc::clone(&connections), Arc::clone(&held));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                let (leave, go, held) = (Arc::clone(&leave), Arc::clone(&go), Arc::clone(&held));
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                        let (go, held) = (Arc::clone(&go), Arc::clone(&held));
                        async move {
                            if request.uri().path() == "/held" {
                                held.fetch_add(1, Ordering::SeqCst);
                                go.acquire().await.unwrap().forget();
                            }
                            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"whole"))))
                        }
                    });
                    let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service);
                    let (mut serving, told) = (std::pin::pin!(serving), AtomicBool::new(false));
                    loop {
                        tokio::select! {
                            _ = serving.as_mut() => return,
                            () = leave.notified(), if !told.load(Ordering::SeqCst) => {
                                told.store(true, Ordering::SeqCst);
                                serving.as_mut().graceful_shutdown();
                            }
                        }
                    }
                });
            }
        });
    }
    let (sidecar, _dir) = sidecar(addr);
    let outbound = sidecar.address("outbound");
    let streams: Vec<_> = (0..20)
        .map(|_| {
            tokio::spawn(async move {
                let mut client = Client::connect(outbound, Version::HTTP_11).await;
                let answer = client.send("h2", Request::get("/held"), nothing()).await;
                (answer.status(), answer.into_body().collect().await.unwrap().to_bytes())
            })
        })
        .collect();
    until("the streams", async || held.load(Ordering::SeqCst) == 20).await;
    let before = connections.load(Ordering::SeqCst);
    leave.notify_waiters();
    // New requests find another connection, while the old streams go on.
    until("another connection", async || {
        let mut client = Client::connect(outbound, Version::HTTP_11).await;
        assert_eq!(client.send("h2", Request::get("/x"), nothing()).await.status(), 200);
        connections.load(Ordering::SeqCst) > before
    })
    .await;
    go.add_permits(20);
    for stream in streams {
        assert_eq!(stream.await.unwrap(), (StatusCode::OK, Bytes::from_static(b"whole")));
    }
}
