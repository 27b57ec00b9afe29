//! Draining over real sockets: nobody on a live connection notices, and nothing outlives the deadline.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::future::{Future, pending};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::server::{DrainTimes, Drained, ListenerSpec, Phase, Server, serve_here};
use mesh_core::{Body, Direction, RequestContext};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tower::service_fn;

const BODY: usize = 16 << 10;

fn spec() -> ListenerSpec {
    ListenerSpec::new("drained", (Ipv4Addr::LOCALHOST, 0).into(), Direction::Inbound)
}

fn times(drain_ms: u64, deadline_ms: u64) -> DrainTimes {
    DrainTimes { drain_time: Duration::from_millis(drain_ms), deadline: Duration::from_millis(deadline_ms) }
}

/// 16 KiB in eight pieces, over about 16 ms, so that many are in flight at any moment.
async fn slow_body(_: Request<Body>) -> Result<Response<Body>, Infallible> {
    let pieces = futures_util::stream::unfold(0, |sent| async move {
        if sent == 8 {
            return None;
        }
        sleep(Duration::from_millis(2)).await;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(vec![sent; BODY / 8]))), sent + 1))
    });
    Ok(Response::new(Body::new(StreamBody::new(pieces))))
}

fn get() -> Request<Full<Bytes>> {
    Request::builder().uri("http://test/").header("host", "test").body(Full::default()).unwrap()
}

#[derive(Default)]
struct Ledger {
    whole: AtomicU64,
    connections: AtomicU64,
    /// Connections that the kernel completed and nobody accepted.
    unserved: AtomicU64,
    goaway: AtomicU64,
}

/// Nothing here takes long; what does, hangs.
async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    let Ok(output) = timeout(Duration::from_secs(10), future).await else { panic!("{what} hangs") };
    output
}

async fn check(response: Response<hyper::body::Incoming>) {
    assert_eq!(response.status(), StatusCode::OK);
    let body = soon("a body", response.into_body().collect()).await.expect("a truncated body").to_bytes();
    assert_eq!(body.len(), BODY, "a truncated body was called complete");
}

/// Asks on one connection after another until connecting is refused. What fails on a connection that has answered
/// before, or after its first answer began, is a panic.
async fn http1_client(address: SocketAddr, ledger: Arc<Ledger>) {
    while let Ok(stream) = soon("connecting", TcpStream::connect(address)).await {
        let (mut send, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut first = true;
        while soon("readiness", send.ready()).await.is_ok() {
            match soon("an HTTP/1 request", send.send_request(get())).await {
                Ok(response) => {
                    let last = response.headers().get(CONNECTION).is_some_and(|value| value == "close");
                    ledger.connections.fetch_add(u64::from(first), Ordering::Relaxed);
                    check(response).await;
                    ledger.whole.fetch_add(1, Ordering::Relaxed);
                    first = false;
                    if last {
                        break;
                    }
                }
                Err(error) => {
                    assert!(first, "a live connection was reset: {error:?}");
                    ledger.unserved.fetch_add(1, Ordering::Relaxed);
                    break;
                }
            }
        }
    }
}

async fn http2_client(address: SocketAddr, ledger: Arc<Ledger>) {
    while let Ok(stream) = soon("connecting", TcpStream::connect(address)).await {
        let Ok((send, connection)) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await
        else {
            ledger.unserved.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        tokio::spawn(connection);
        let served = AtomicU64::new(0);
        let (served, ledger) = (&served, &*ledger);
        let stream = |mut send: http2::SendRequest<Full<Bytes>>| async move {
            while soon("readiness", send.ready()).await.is_ok() {
                match soon("an HTTP/2 request", send.try_send_request(get())).await {
                    Ok(response) => {
                        check(response).await;
                        served.fetch_add(1, Ordering::Relaxed);
                        ledger.whole.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(mut error) => {
                        if error.take_message().is_some() {
                            // Given back: it was not sent, so it goes elsewhere.
                            break;
                        }
                        let error = error.into_error();
                        assert!(
                            served.load(Ordering::Relaxed) == 0,
                            "a live connection was reset: {error:?}"
                        );
                        ledger.unserved.fetch_add(1, Ordering::Relaxed);
                        return;
                    }
                }
            }
            ledger.goaway.fetch_add(1, Ordering::Relaxed);
        };
        tokio::join!(stream(send.clone()), stream(send.clone()), stream(send));
        ledger.connections.fetch_add(u64::from(served.load(Ordering::Relaxed) > 0), Ordering::Relaxed);
    }
}

#[tokio::test]
async fn h1_a_drain_under_load_resets_and_truncates_nothing() {
    let server = Server::builder().workers(2).start().unwrap();
    let address = server.listen(spec(), |_| service_fn(slow_body)).unwrap();
    let ledger = Arc::new(Ledger::default());
    let mut clients = Vec::new();
    for _ in 0..16 {
        clients.push(tokio::spawn(http1_client(address, Arc::clone(&ledger))));
    }
    for _ in 0..4 {
        clients.push(tokio::spawn(http2_client(address, Arc::clone(&ledger))));
    }
    sleep(Duration::from_millis(500)).await;
    let before = ledger.whole.load(Ordering::Relaxed);
    let start = Instant::now();
    let drained = server.drain().run(times(500, 10_000), pending()).await;
    assert_eq!(drained, Drained::Finished);
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(500) && elapsed < Duration::from_secs(3), "{elapsed:?}");
    for client in clients {
        client.await.unwrap();
    }
    let [whole, connections, unserved, goaway] =
        [&ledger.whole, &ledger.connections, &ledger.unserved, &ledger.goaway]
            .map(|count| count.load(Ordering::Relaxed));
    println!("{whole} responses, {connections} connections, {unserved} never accepted, {goaway} GOAWAY");
    assert!(before > 100 && whole > before, "the load went on while it drained: {before} of {whole}");
    assert!(goaway > 0);
    // Whatever was accepted was answered; what a client had half open when the socket closed never was.
    let status = server.status();
    assert_eq!((status[0].accepted, status[0].open), (connections, 0), "{unserved} unserved");
}

#[tokio::test]
async fn h2_streams_that_never_end_are_cut_at_the_deadline_and_flagged() {
    let server = Server::builder().workers(2).start().unwrap();
    let contexts = Arc::new(Mutex::new(Vec::<RequestContext>::new()));
    let address = server
        .listen(spec(), {
            let contexts = Arc::clone(&contexts);
            move |_| {
                let contexts = Arc::clone(&contexts);
                service_fn(move |request: Request<Body>| {
                    let context = request.extensions().get::<RequestContext>().unwrap().clone();
                    contexts.lock().unwrap().push(context);
                    async move {
                        if request.uri().path() == "/silent" {
                            return pending::<Result<Response<Body>, Infallible>>().await;
                        }
                        let endless = futures_util::stream::unfold((), |()| async {
                            sleep(Duration::from_millis(5)).await;
                            Some((Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"tick\n"))), ()))
                        });
                        Ok(Response::new(Body::new(StreamBody::new(endless))))
                    }
                })
            }
        })
        .unwrap();
    let mut bodies = Vec::new();
    for path in ["/ticks", "/silent"] {
        let request = || {
            let mut request = get();
            *request.uri_mut() = format!("http://test{path}").parse().unwrap();
            request
        };
        let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
        let (mut one, connection) = http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
        let (mut two, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        let (request1, request2) = (request(), request());
        bodies.push(tokio::spawn(async move { one.send_request(request1).await?.collect().await }));
        bodies.push(tokio::spawn(async move { two.send_request(request2).await?.collect().await }));
    }
    while contexts.lock().unwrap().len() < 4 {
        sleep(Duration::from_millis(1)).await;
    }
    let start = Instant::now();
    // How late this machine keeps its appointments is not the drain's doing.
    let (drained, deadline) = tokio::join!(
        async { (server.drain().run(times(100, 400), pending()).await, Instant::now()) },
        async {
            sleep(Duration::from_millis(400)).await;
            Instant::now()
        }
    );
    let (drained, end) = drained;
    assert_eq!(drained, Drained::Cut(4));
    assert!(end - start >= Duration::from_millis(400), "{:?}", end - start);
    assert!(end.saturating_duration_since(deadline) < Duration::from_millis(110), "{:?}", end - deadline);
    for body in bodies {
        assert!(body.await.unwrap().is_err(), "a cut body was called complete");
    }
    for context in contexts.lock().unwrap().iter() {
        assert_eq!(context.flags().to_string(), "DC,SI");
    }
}

#[tokio::test]
async fn a_second_signal_cuts_at_once() {
    let server = Server::builder().start().unwrap();
    let address = server
        .listen(spec(), |_| {
            service_fn(|_: Request<Body>| async { pending::<Result<Response<Body>, Infallible>>().await })
        })
        .unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    while server.drain().open() == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    let start = Instant::now();
    let again = sleep(Duration::from_millis(50));
    assert_eq!(server.drain().run(DrainTimes::default(), again).await, Drained::AtOnce(1));
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0);
}

/// Reads frames until `wanted` of type GOAWAY came; returns their last stream ids. Answers pings.
async fn goaways(stream: &mut TcpStream, wanted: usize) -> Vec<u32> {
    let mut ids = Vec::new();
    while ids.len() < wanted {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        match (head[3], head[4]) {
            (6, 0) => {
                head[4] = 1;
                stream.write_all(&head).await.unwrap();
                stream.write_all(&payload).await.unwrap();
            }
            (7, _) => {
                assert_eq!(payload[4..8], [0; 4], "NO_ERROR");
                ids.push(u32::from_be_bytes([payload[0], payload[1], payload[2], payload[3]]));
            }
            _ => {}
        }
    }
    ids
}

#[tokio::test]
async fn h1_http2_gets_two_goaways_and_streams_between_them_are_served() {
    let server = Server::builder().start().unwrap();
    let served = Arc::new(AtomicU64::new(0));
    let address = server
        .listen(spec(), {
            let served = Arc::clone(&served);
            move |_| {
                let served = Arc::clone(&served);
                service_fn(move |request: Request<Body>| {
                    served.fetch_add(1, Ordering::Relaxed);
                    slow_body(request)
                })
            }
        })
        .unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    // HEADERS, END_STREAM | END_HEADERS: GET http /, with no authority.
    let headers = |id: u8| [0, 0, 3, 1, 5, 0, 0, 0, id, 0x82, 0x86, 0x84];
    stream.write_all(&headers(1)).await.unwrap();
    while served.load(Ordering::Relaxed) < 1 {
        sleep(Duration::from_millis(1)).await;
    }
    let draining = tokio::spawn({
        let drain = server.drain().clone();
        async move { drain.run(times(5_000, 10_000), pending()).await }
    });
    let mut phase = server.drain().subscribe();
    phase.wait_for(|phase| *phase == Phase::Draining).await.unwrap();
    // This stream is on its way when the first GOAWAY is; it comes before the pong.
    stream.write_all(&headers(3)).await.unwrap();
    assert_eq!(goaways(&mut stream, 2).await, [(1 << 31) - 1, 3]);
    assert_eq!(served.load(Ordering::Relaxed), 2);
    assert_eq!(draining.await.unwrap(), Drained::Finished);
}

#[tokio::test]
async fn h9_a_tunnel_outlives_the_drain_time_and_is_cut_at_the_deadline() {
    let server = Server::builder().start().unwrap();
    let address = server
        .listen(spec(), |_| {
            service_fn(|mut request: Request<Body>| async move {
                let context = request.extensions().get::<RequestContext>().unwrap().clone();
                let upgrade = hyper::upgrade::on(&mut request);
                tokio::spawn(async move {
                    let mut io = TokioIo::new(upgrade.await.unwrap());
                    let mut buf = [0; 16];
                    loop {
                        tokio::select! {
                            () = context.cut() => return,
                            read = io.read(&mut buf) => match read {
                                Ok(read) if read > 0 => io.write_all(&buf[..read]).await.unwrap(),
                                _ => return,
                            },
                        }
                    }
                });
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
                response.headers_mut().insert(UPGRADE, HeaderValue::from_static("echo"));
                Ok::<_, Infallible>(response)
            })
        })
        .unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let draining = tokio::spawn({
        let drain = server.drain().clone();
        let mut phase = drain.subscribe();
        async move {
            while drain.open() == 0 {
                sleep(Duration::from_millis(1)).await;
            }
            let running = drain.run(times(100, 600), pending());
            let (drained, ()) = tokio::join!(running, async {
                phase.wait_for(|phase| *phase == Phase::Closing).await.unwrap();
            });
            drained
        }
    });
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 101 ") && !head.contains("close"), "{head}");
    let start = Instant::now();
    let mut echoed = 0;
    while stream.write_all(b"ping").await.is_ok() {
        let mut buf = [0; 4];
        if stream.read_exact(&mut buf).await.is_err() {
            break;
        }
        echoed += 1;
        sleep(Duration::from_millis(10)).await;
    }
    assert!(echoed > 10 && start.elapsed() > Duration::from_millis(300), "{echoed} in {:?}", start.elapsed());
    assert_eq!(draining.await.unwrap(), Drained::Cut(1));
}

#[tokio::test]
async fn an_admin_listener_answers_while_the_rest_drains() {
    let server = Server::builder().start().unwrap();
    let address = server.listen(spec(), |_| service_fn(slow_body)).unwrap();
    let drain = server.drain().clone();
    let ready = service_fn(move |_: Request<Body>| {
        let mut response = Response::new(Body::empty());
        if drain.phase() > Phase::Serving {
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        }
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let (admin, serving) = serve_here(spec(), ready, Default::default(), None).unwrap();
    tokio::spawn(serving);
    let ask = || async move {
        let io = TokioIo::new(TcpStream::connect(admin).await.unwrap());
        let (mut send, connection) = http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        let response = send.send_request(get()).await.unwrap();
        (response.status().as_u16(), response.headers().contains_key(CONNECTION))
    };
    assert_eq!(ask().await, (200, false));
    let _held = TcpStream::connect(address).await.unwrap();
    while server.drain().open() == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    let drain = server.drain().clone();
    let draining = tokio::spawn(async move { drain.run(times(100, 5_000), pending()).await });
    server.drain().subscribe().wait_for(|phase| *phase == Phase::Draining).await.unwrap();
    assert_eq!(ask().await, (503, false));
    // The connection that never said anything closes when the drain time is over.
    assert_eq!(draining.await.unwrap(), Drained::Finished);
    assert!(TcpStream::connect(address).await.is_err());
    assert_eq!(ask().await, (503, false));
}
