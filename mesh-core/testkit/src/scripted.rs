//! An upstream that does what a script says, request by request: answers, resets, hangs, fails late.

use std::fmt;
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
use tokio::io::{AsyncRead, AsyncWrite};
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
    /// A gRPC message, and trailers with this gRPC status.
    Message(&'static [u8], u16),
    /// Breaks the connection off; over HTTP/2 resets the stream.
    Reset,
    /// Refuses the stream, over HTTP/2.
    Refuse,
    /// Never answers.
    Hang,
    /// Sends its head and some body, and nothing after that.
    Stall,
    /// Sends its head and some body, and breaks the connection off; over HTTP/2 resets the stream.
    Cut,
    /// Answers after this time.
    After(std::time::Duration, u16),
}

/// What an upstream does, whatever it is connected by. Clones share what they have seen.
#[derive(Clone)]
pub struct Script {
    name: &'static str,
    script: Arc<dyn Fn(&Seen) -> Reply + Send + Sync>,
    seen: Arc<Mutex<Vec<Seen>>>,
    open: Arc<AtomicUsize>,
}

impl Script {
    /// An upstream of this name that answers as `script` says.
    pub fn new(name: &'static str, script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self { name, script: Arc::new(script), seen: Arc::default(), open: Arc::default() }
    }

    /// Serves one connection to its end.
    pub async fn serve<IO>(&self, io: IO, http2: bool)
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.open.fetch_add(1, Ordering::SeqCst);
        let _open = Open(Arc::clone(&self.open));
        let service = service_fn(move |request: Request<Incoming>| {
            let this = self.clone();
            async move {
                let seen = see(request, &this.seen).await?;
                reply(this.name, (this.script)(&seen)).await
            }
        });
        let io = TokioIo::new(io);
        // A connection that breaks off is what some scripts want.
        if http2 {
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(io, service)
                .await;
        } else {
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
        }
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
    ///
    /// # Panics
    /// Never, but for a panic elsewhere.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.seen.lock().expect("not poisoned").len()
    }

    /// How many connections are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Counts a connection until it has ended.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An upstream that follows a script, behind a port.
#[derive(Debug)]
pub struct Scripted {
    /// Where it listens.
    pub addr: SocketAddr,
    script: Script,
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
        let script = Script::new(name, script);
        let serving = script.clone();
        let connections: Arc<AtomicUsize> = Arc::default();
        let accepted = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::SeqCst);
                let script = serving.clone();
                tokio::spawn(async move {
                    let mut first = [0_u8; 4];
                    let http2 = matches!(stream.peek(&mut first).await, Ok(4)) && &first == b"PRI ";
                    script.serve(stream, http2).await;
                });
            }
        });
        Self { addr, script, connections, accepting }
    }

    /// Connections that it has accepted.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// The requests so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.script.seen()
    }

    /// How many requests there were.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.script.requests()
    }

    /// How many connections are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.script.open()
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

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
        Reply::LateStatus(code) => grpc(None, code),
        Reply::Message(message, code) => grpc(Some(message), code),
        Reply::Reset => return Err(Broken(None)),
        Reply::Refuse => return Err(Broken(Some(h2::Reason::REFUSED_STREAM.into()))),
        Reply::Hang => std::future::pending().await,
        Reply::Stall => {
            let some = futures_util::stream::iter([Ok(Frame::data(Bytes::from_static(b"some")))]);
            let stalled = futures_util::StreamExt::chain(some, futures_util::stream::pending());
            answer(StatusCode::OK, StreamBody::new(stalled).boxed())
        }
        Reply::Cut => {
            let some = futures_util::stream::iter([Ok(Frame::data(Bytes::from_static(b"some")))]);
            let end = futures_util::stream::once(async {
                // What has been said is on its way by then.
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                Err(std::io::Error::other("the script breaks off"))
            });
            answer(StatusCode::OK, StreamBody::new(futures_util::StreamExt::chain(some, end)).boxed())
        }
    })
}

fn grpc(message: Option<&[u8]>, code: u16) -> Response<ReplyBody> {
    let data = message.map(|message| {
        let length = u32::try_from(message.len()).expect("a short message");
        Ok(Frame::data([&[0][..], &length.to_be_bytes(), message].concat().into()))
    });
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", code.into());
    let frames = futures_util::stream::iter(data.into_iter().chain([Ok(Frame::trailers(trailers))]));
    let mut response = answer(StatusCode::OK, StreamBody::new(frames).boxed());
    response.headers_mut().insert("content-type", "application/grpc".parse().expect("a value"));
    response
}

fn answer(status: StatusCode, body: ReplyBody) -> Response<ReplyBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}
