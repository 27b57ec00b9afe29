//! An upstream that does what a script says, request by request: answers, resets, hangs, fails late.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// What a request that the upstream received was like.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The number of this request, from 1.
    pub nth: usize,
    /// Its method.
    pub method: String,
    /// Its path with its query.
    pub path: String,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// Its trailers.
    pub trailers: Option<HeaderMap>,
    /// When it had been received.
    pub at: tokio::time::Instant,
}

impl Seen {
    /// The value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// What the upstream does with a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Answers with this status and the name of the upstream.
    Status(u16),
    /// Answers with this status and these headers.
    Headers(u16, Vec<(&'static str, &'static str)>),
    /// A gRPC status in the headers, without a body.
    TrailersOnly(u16),
    /// Headers, and right behind them trailers with this gRPC status.
    LateStatus(u16),
    /// Breaks the connection off; over HTTP/2 resets the stream.
    Reset,
    /// Refuses the stream, over HTTP/2.
    Refuse,
    /// Never answers.
    Hang,
    /// Sends its head and some body, and nothing after that.
    Stall,
    /// Answers after this time.
    After(std::time::Duration, u16),
}

/// An upstream that follows a script.
#[derive(Debug)]
pub struct Scripted {
    /// Where it listens.
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

type ReplyBody = BoxBody<Bytes, std::io::Error>;

impl Scripted {
    /// Starts one on a free port; it speaks HTTP/1 and h2c.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn start(name: &'static str, script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (log, script) = (Arc::clone(&seen), Arc::new(script));
        let connections: Arc<AtomicUsize> = Arc::default();
        let accepted = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::SeqCst);
                let (log, script) = (Arc::clone(&log), Arc::clone(&script));
                tokio::spawn(async move {
                    let mut first = [0_u8; 4];
                    let http2 = matches!(stream.peek(&mut first).await, Ok(4)) && &first == b"PRI ";
                    let service = service_fn(move |request: Request<Incoming>| {
                        let (log, script) = (Arc::clone(&log), Arc::clone(&script));
                        async move {
                            let seen = see(request, &log).await?;
                            reply(name, script(&seen)).await
                        }
                    });
                    let io = TokioIo::new(stream);
                    // A connection that breaks off is what some scripts want.
                    if http2 {
                        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                            .serve_connection(io, service)
                            .await;
                    } else {
                        let _ =
                            hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                    }
                });
            }
        });
        Self { addr, seen, connections, accepting }
    }

    /// Connections that it has accepted.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// The requests so far.
    ///
    /// # Panics
    /// Never, but for a panic elsewhere.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("not poisoned").clone()
    }

    /// How many requests there were.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.seen().len()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A request that ends without an answer.
#[derive(Debug)]
struct Broken(Option<h2::Error>);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the script breaks off")
    }
}

impl std::error::Error for Broken {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.as_ref().map(|error| error as _)
    }
}

async fn see(request: Request<Incoming>, log: &Mutex<Vec<Seen>>) -> Result<Seen, Broken> {
    let (parts, body) = request.into_parts();
    let collected = body.collect().await.map_err(|_| Broken(None))?;
    let mut log = log.lock().expect("not poisoned");
    let seen = Seen {
        nth: log.len() + 1,
        method: parts.method.to_string(),
        path: parts.uri.path_and_query().map_or_else(String::new, ToString::to_string),
        headers: parts.headers,
        trailers: collected.trailers().cloned(),
        body: collected.to_bytes(),
        at: tokio::time::Instant::now(),
    };
    log.push(seen.clone());
    Ok(seen)
}

async fn reply(name: &'static str, reply: Reply) -> Result<Response<ReplyBody>, Broken> {
    let text = |text: &'static str| Full::from(text).map_err(|never| match never {}).boxed();
    let status = |code: u16| StatusCode::from_u16(code).expect("a status");
    Ok(match reply {
        Reply::Status(code) => answer(status(code), text(name)),
        Reply::After(time, code) => {
            tokio::time::sleep(time).await;
            answer(status(code), text(name))
        }
        Reply::Headers(code, headers) => {
            let mut response = answer(status(code), text(name));
            for (name, value) in headers {
                response.headers_mut().append(name, value.parse().expect("a value"));
            }
            response
        }
        Reply::TrailersOnly(code) => {
            let mut response = answer(StatusCode::OK, text(""));
            response.headers_mut().insert("content-type", "application/grpc".parse().expect("a value"));
            response.headers_mut().insert("grpc-status", code.into());
            response
        }
        Reply::LateStatus(code) => {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", code.into());
            let frames = futures_util::stream::iter([Ok(Frame::trailers(trailers))]);
            let mut response = answer(StatusCode::OK, StreamBody::new(frames).boxed());
            response.headers_mut().insert("content-type", "application/grpc".parse().expect("a value"));
            response
        }
        Reply::Reset => return Err(Broken(None)),
        Reply::Refuse => return Err(Broken(Some(h2::Reason::REFUSED_STREAM.into()))),
        Reply::Hang => std::future::pending().await,
        Reply::Stall => {
            let some = futures_util::stream::iter([Ok(Frame::data(Bytes::from_static(b"some")))]);
            let stalled = futures_util::StreamExt::chain(some, futures_util::stream::pending());
            answer(StatusCode::OK, StreamBody::new(stalled).boxed())
        }
    })
}

fn answer(status: StatusCode, body: ReplyBody) -> Response<ReplyBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}
