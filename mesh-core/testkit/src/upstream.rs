//! Upstreams: one that answers as an application does and says what it saw, one that records and writes raw bytes.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// An application that answers with what it saw, as JSON.
///
/// * `x-answer-status: N` sets the status;
/// * a path that begins with `/gate` waits for a permit of [`Echo::gate`] before the head of its answer, and one that
///   begins with `/slow` sends its head and half a body before it waits;
/// * `/trailers` answers with a body and the trailer `grpc-status: 0`;
/// * `Upgrade: echo` switches protocols and sends back what it is sent.
#[derive(Debug)]
pub struct Echo {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Lets gated answers go on.
    pub gate: Arc<Semaphore>,
    requests: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
    seen: Arc<Mutex<BTreeMap<String, usize>>>,
    accepting: JoinHandle<()>,
}

impl Echo {
    /// Starts one by name on a free port; it speaks HTTP/1 and h2c.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn start(name: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let (gate, seen) = (Arc::new(Semaphore::new(0)), Arc::default());
        let (requests, held) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let state = State {
            name,
            gate: Arc::clone(&gate),
            requests: Arc::clone(&requests),
            held: Arc::clone(&held),
            seen: Arc::clone(&seen),
        };
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = state.clone();
                tokio::spawn(async move {
                    let mut first = [0_u8; 4];
                    let http2 = matches!(stream.peek(&mut first).await, Ok(4)) && &first == b"PRI ";
                    let service = service_fn(move |request| {
                        let state = state.clone();
                        async move { Ok::<_, Infallible>(state.answer(request).await) }
                    });
                    let io = TokioIo::new(stream);
                    // A client that goes away is no event.
                    if http2 {
                        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                            .serve_connection(io, service)
                            .await;
                    } else {
                        let _ = hyper::server::conn::http1::Builder::new()
                            .serve_connection(io, service)
                            .with_upgrades()
                            .await;
                    }
                });
            }
        });
        Self { addr, gate, requests, held, seen, accepting }
    }

    /// Requests that it has seen.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Requests that wait at the gate now.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    /// How often each value of `x-id` has been seen.
    ///
    /// # Panics
    /// Never, but for a panic elsewhere.
    #[must_use]
    pub fn seen(&self) -> BTreeMap<String, usize> {
        self.seen.lock().expect("not poisoned").clone()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

#[derive(Clone)]
struct State {
    name: &'static str,
    gate: Arc<Semaphore>,
    requests: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
    seen: Arc<Mutex<BTreeMap<String, usize>>>,
}

type EchoBody = BoxBody<Bytes, Infallible>;

impl State {
    async fn answer(&self, mut request: Request<Incoming>) -> Response<EchoBody> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        if let Some(id) = request.headers().get("x-id").and_then(|id| id.to_str().ok()) {
            *self.seen.lock().expect("not poisoned").entry(id.to_owned()).or_default() += 1;
        }
        if request.headers().get("upgrade").is_some_and(|upgrade| upgrade == "echo") {
            return Self::upgrade(&mut request);
        }
        let status =
            request.headers().get("x-answer-status").and_then(|status| status.to_str().ok()?.parse().ok());
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let mut saw = describe(self.name, &request);
        let body = match request.into_body().collect().await {
            Ok(body) => body,
            Err(error) => {
                // The test that cut the request looks elsewhere.
                return text(StatusCode::BAD_REQUEST, error.to_string());
            }
        };
        saw["trailers"] = body.trailers().map_or(Value::Null, headers);
        saw["body_bytes"] = json!(body.to_bytes().len());
        if path.starts_with("/gate") {
            self.held.fetch_add(1, Ordering::SeqCst);
            if let Ok(permit) = self.gate.acquire().await {
                permit.forget();
            }
            self.held.fetch_sub(1, Ordering::SeqCst);
        }
        let text = saw.to_string();
        let mut response = if method == Method::HEAD {
            // Over HTTP/2 hyper leaves it to the application to send no body.
            let mut response = Response::new(Full::default().boxed());
            response.headers_mut().insert("content-length", HeaderValue::from(text.len()));
            response
        } else if path.starts_with("/slow") {
            Response::new(self.slow(text))
        } else if path == "/trailers" {
            let mut response = Response::new(with_trailers(text));
            // Over HTTP/1.1 only what is announced is sent.
            response.headers_mut().insert("trailer", HeaderValue::from_static("grpc-status"));
            response
        } else {
            Response::new(Full::from(text).boxed())
        };
        if let Some(status) = status {
            *response.status_mut() = status;
        }
        response
    }

    /// Half of the body at once, the other half when the gate opens.
    fn slow(&self, text: String) -> EchoBody {
        let gate = Arc::clone(&self.gate);
        let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
        tokio::spawn(async move {
            let (first, second) = text.split_at(text.len() / 2);
            if sender.send(Bytes::from(first.to_owned())).await.is_err() {
                return;
            }
            if let Ok(permit) = gate.acquire().await {
                permit.forget();
            }
            // Whoever does not read on does not want the rest.
            let _ = sender.send(Bytes::from(second.to_owned())).await;
        });
        ChannelBody(receiver).boxed()
    }

    fn upgrade(request: &mut Request<Incoming>) -> Response<EchoBody> {
        let upgraded = hyper::upgrade::on(request);
        tokio::spawn(async move {
            if let Ok(upgraded) = upgraded.await {
                let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            }
        });
        let mut response = text(StatusCode::SWITCHING_PROTOCOLS, String::new());
        response.headers_mut().insert("connection", HeaderValue::from_static("upgrade"));
        response.headers_mut().insert("upgrade", HeaderValue::from_static("echo"));
        response
    }
}

struct ChannelBody(tokio::sync::mpsc::Receiver<Bytes>);

impl http_body::Body for ChannelBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
    }
}

fn with_trailers(text: String) -> EchoBody {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Ok(Frame::data(Bytes::from(text))), Ok(Frame::trailers(trailers))];
    StreamBody::new(Frames(frames.into_iter())).boxed()
}

struct Frames(std::array::IntoIter<Result<Frame<Bytes>, Infallible>, 2>);

impl futures_util::Stream for Frames {
    type Item = Result<Frame<Bytes>, Infallible>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.0.next())
    }
}

fn text(status: StatusCode, text: String) -> Response<EchoBody> {
    let mut response = Response::new(Full::from(text).boxed());
    *response.status_mut() = status;
    response
}

fn describe(name: &str, request: &Request<Incoming>) -> Value {
    json!({
        "name": name,
        "method": request.method().as_str(),
        "url": request.uri().path_and_query().map_or("/", |path| path.as_str()),
        "host": request.uri().authority().map(|authority| authority.to_string()).or_else(|| {
            request.headers().get("host").map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned())
        }),
        "protocol": format!("{:?}", request.version()),
        "headers": headers(request.headers()),
    })
}

fn headers(headers: &HeaderMap) -> Value {
    let mut all: BTreeMap<&str, String> = BTreeMap::new();
    for (name, value) in headers {
        let joined = all.entry(name.as_str()).or_default();
        if !joined.is_empty() {
            joined.push(',');
        }
        joined.push_str(&String::from_utf8_lossy(value.as_bytes()));
    }
    json!(all)
}

/// An upstream that keeps every byte of every connection and answers each with the same bytes.
#[derive(Debug)]
pub struct Recorder {
    /// Where it listens.
    pub addr: SocketAddr,
    connections: Arc<Mutex<Vec<Recorded>>>,
    accepting: JoinHandle<()>,
}

/// When and how a connection ends from our side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// When the client ends it.
    Never,
    /// Closed after the first answer.
    Close,
    /// Reset after the first answer.
    Reset,
}

/// What one connection brought.
#[derive(Debug, Default)]
struct Recorded {
    bytes: Vec<u8>,
    answered: usize,
}

impl Recorder {
    /// Answers `answer` whenever the end of a head or of a chunked body has come, and closes after it if `close`.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn start(answer: &[u8], close: bool) -> Self {
        Self::ending(answer, if close { Ending::Close } else { Ending::Never }).await
    }

    /// Answers `answer` whenever the end of a head or of a body has come, and ends the connection in this way.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn ending(answer: &[u8], ending: Ending) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let connections: Arc<Mutex<Vec<Recorded>>> = Arc::default();
        let record = Arc::clone(&connections);
        let answer: Arc<[u8]> = answer.into();
        let accepting = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (record, answer) = (Arc::clone(&record), Arc::clone(&answer));
                let at = {
                    let mut all = record.lock().expect("not poisoned");
                    all.push(Recorded::default());
                    all.len() - 1
                };
                tokio::spawn(async move {
                    let mut buffer = vec![0_u8; 16384];
                    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                        let due = {
                            let mut all = record.lock().expect("not poisoned");
                            let recorded = &mut all[at];
                            recorded.bytes.extend_from_slice(&buffer[..read]);
                            let whole = requests(&recorded.bytes);
                            whole - std::mem::replace(&mut recorded.answered, whole)
                        };
                        for _ in 0..due {
                            if stream.write_all(&answer).await.is_err() {
                                return;
                            }
                            if ending == Ending::Reset {
                                // Whoever is gone already needs no reset.
                                let _ = stream.set_zero_linger();
                            }
                            if ending != Ending::Never {
                                return;
                            }
                        }
                    }
                });
            }
        });
        Self { addr, connections, accepting }
    }

    /// What every connection has brought so far.
    ///
    /// # Panics
    /// Never, but for a panic elsewhere.
    #[must_use]
    pub fn connections(&self) -> Vec<Vec<u8>> {
        self.connections.lock().expect("not poisoned").iter().map(|recorded| recorded.bytes.clone()).collect()
    }

    /// How many requests have come, as a strict reader counts them.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.connections().iter().map(|bytes| requests(bytes)).sum()
    }

    /// Forgets what came.
    ///
    /// # Panics
    /// Never, but for a panic elsewhere.
    pub fn clear(&self) {
        for recorded in self.connections.lock().expect("not poisoned").iter_mut() {
            *recorded = Recorded::default();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Whole requests at the beginning of `bytes`, framed by content length or chunks.
///
/// # Panics
/// When a head has both: nobody may forward that.
#[must_use]
pub fn requests(bytes: &[u8]) -> usize {
    let mut count = 0;
    let mut rest = bytes;
    while let Some(head_end) = rest.windows(4).position(|end| end == b"\r\n\r\n") {
        let head = String::from_utf8_lossy(&rest[..head_end]).to_ascii_lowercase();
        let header = |name: &str| {
            head.lines().find_map(|line| {
                line.split_once(':').filter(|(key, _)| *key == name).map(|(_, v)| v.trim().to_owned())
            })
        };
        let (length, chunked) = (header("content-length"), header("transfer-encoding"));
        assert!(length.is_none() || chunked.is_none(), "both framings were forwarded: {head}");
        let mut at = head_end + 4;
        if chunked.is_some() {
            loop {
                let Some(line) =
                    rest.get(at..).and_then(|tail| tail.windows(2).position(|end| end == b"\r\n"))
                else {
                    return count;
                };
                let text = String::from_utf8_lossy(&rest[at..at + line]).into_owned();
                let Ok(size) = usize::from_str_radix(text.trim(), 16) else { return count };
                at += line + 2;
                if size == 0 {
                    let Some(end) = rest.get(at..).and_then(|tail| {
                        if tail.starts_with(b"\r\n") {
                            Some(2)
                        } else {
                            tail.windows(4).position(|e| e == b"\r\n\r\n").map(|p| p + 4)
                        }
                    }) else {
                        return count;
                    };
                    at += end;
                    break;
                }
                at += size + 2;
            }
        } else if let Some(length) = length {
            at += length.parse::<usize>().unwrap_or(0);
        }
        if at > rest.len() {
            return count;
        }
        count += 1;
        rest = &rest[at..];
    }
    count
}
