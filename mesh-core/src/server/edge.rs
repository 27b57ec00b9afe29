//! Where hyper ends and the mesh begins: one per listener and worker.
//!
//! For each request the [`EdgeService`] makes the [`RequestContext`], the one insert into the extensions; pins the
//! worker's copy of the snapshot; gives both bodies our type and their meters; and runs the worker's stack.
//!
//! The stack is built once per worker and is *not cloned per request*: [`ResponseFuture`] locks it for `poll_ready`
//! and `call` only, and as all connections of an edge are polled by one thread nobody else can hold that lock. When
//! the stack is not ready, the request takes a clone of its own and waits on that, so that it blocks nobody else.
//! The future is named and its states are inline; no request is boxed here.
//!
//! The edge also owns what must hold whatever the stack is: a drain is announced on HTTP/1 responses, a request
//! whose client goes away is flagged `DC`, and a panic above the stack's own net is a 500 of that request alone.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use http::header::{CONNECTION, CONTENT_LENGTH};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::TokioTimer;
use pin_project::{pin_project, pinned_drop};
use tower_service::Service;

use super::connection::{Connection, Connections, InFlight};
use super::limits::ServerLimits;
use crate::body::{Body, Side};
use crate::context::RequestContext;
use crate::drain::Phase;
use crate::error::{Error, ErrorKind};
use crate::flags::ResponseFlags;
use crate::local_reply;
use crate::panic::{Panics, catch, error as panic_error};
use crate::snapshot::Pinned;

/// What a listener serves: a tower stack that has an answer for everything. Implemented for every such service.
pub trait HttpStack:
    Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + 'static
{
}

impl<S> HttpStack for S where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + 'static
{
}

/// The stack of one listener on one worker, and what its connections share.
#[derive(Debug)]
pub(crate) struct Edge<S> {
    local: Mutex<Local<S>>,
    pub(crate) limits: ServerLimits,
    pub(crate) http1: http1::Builder,
    pub(crate) http2: http2::Builder<Spawn>,
    pub(crate) connections: Arc<Connections>,
    panics: Panics,
}

#[derive(Debug)]
struct Local<S> {
    stack: S,
    pinned: Option<Pinned>,
}

impl<S> Edge<S> {
    pub(crate) fn new(stack: S, pinned: Option<Pinned>, limits: ServerLimits, panics: Panics) -> Self {
        let mut http1 = http1::Builder::new();
        http1
            // We time heads ourselves: hyper's timer would run on idle connections too, and costs a box per request.
            .header_read_timeout(None)
            .max_header_size(limits.max_head_bytes as usize)
            .max_buf_size(limits.send_buffer_bytes.max(limits.max_head_bytes as usize + 4096).max(8192))
            // A client that closes its half is gone, as for Envoy: work for it stops at once.
            .half_close(false)
            // A response is flushed when it is there, pipelined or not.
            .pipeline_flush(false);
        if limits.max_fields != 100 {
            // hyper's own limit of 100 has its array on the stack; any other is on the heap.
            http1.max_headers(limits.max_fields);
        }
        let mut http2 = http2::Builder::new(Spawn);
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.h2_max_streams)
            .initial_stream_window_size(limits.h2_stream_window_bytes)
            .initial_connection_window_size(limits.h2_connection_window_bytes)
            .max_pending_accept_reset_streams(limits.h2_max_pending_accept_resets)
            .max_local_error_reset_streams(limits.h2_max_local_error_resets)
            .max_header_list_size(limits.max_head_bytes)
            .max_send_buf_size(limits.send_buffer_bytes)
            .keep_alive_interval(limits.h2_ping_interval);
        Self {
            local: Mutex::new(Local { stack, pinned }),
            limits,
            http1,
            http2,
            connections: Arc::default(),
            panics,
        }
    }

    /// The snapshot that requests take now.
    pub(crate) fn pinned(&self) -> Option<Pinned> {
        self.local().pinned.clone()
    }

    /// Gives requests from now on another snapshot.
    pub(crate) fn pin(&self, pinned: Pinned) {
        self.local().pinned = Some(pinned);
    }

    fn local(&self) -> MutexGuard<'_, Local<S>> {
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What hyper calls, one per connection.
#[derive(Debug)]
pub(crate) struct EdgeService<S> {
    edge: Arc<Edge<S>>,
    connection: Arc<Connection>,
}

impl<S> EdgeService<S> {
    pub(crate) const fn new(edge: Arc<Edge<S>>, connection: Arc<Connection>) -> Self {
        Self { edge, connection }
    }
}

impl<S: HttpStack> hyper::service::Service<Request<Incoming>> for EdgeService<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ResponseFuture<S>;

    fn call(&self, request: Request<Incoming>) -> ResponseFuture<S> {
        self.connection.count_request();
        let pinned = self.edge.pinned();
        let in_flight = InFlight::on(Arc::clone(&self.connection));
        let context = RequestContext::on_connection(in_flight, pinned, crate::clock::now());
        let version = request.version();
        let head = request.method() == Method::HEAD;
        let refused = if self.connection.is_distrusted() {
            Some(Refused::Peer)
        } else if version == Version::HTTP_2 && request.headers().len() > self.edge.limits.max_fields {
            Some(Refused::Fields)
        } else {
            None
        };

        let mut request = request.map(|incoming| match Body::from_incoming(incoming, Side::Downstream) {
            body if body.is_end_stream() => body,
            body => body.metered(context.clone(), Side::Downstream),
        });
        request.extensions_mut().insert(context.clone());
        ResponseFuture {
            state: refused.map_or(State::Arrived(Some(request)), State::Refused),
            edge: Arc::clone(&self.edge),
            context,
            version,
            head,
            answered: false,
        }
    }
}

/// One request on its way through the stack. When it is dropped before its response, the client is gone.
#[pin_project(PinnedDrop)]
pub(crate) struct ResponseFuture<S: HttpStack> {
    #[pin]
    state: State<S>,
    edge: Arc<Edge<S>>,
    context: RequestContext,
    version: Version,
    head: bool,
    answered: bool,
}

#[pin_project(project = StateProj)]
enum State<S: HttpStack> {
    Arrived(Option<Request<Body>>),
    Waiting(S, Option<Request<Body>>),
    Running(#[pin] S::Future),
    Refused(Refused),
    Panicked,
}

/// Why a request does not come to the stack.
#[derive(Clone, Copy)]
enum Refused {
    Fields,
    Peer,
}

impl<S: HttpStack> Future for ResponseFuture<S> {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let panics = &this.edge.panics;
        let response = loop {
            let next = match this.state.as_mut().project() {
                StateProj::Arrived(request) => {
                    let mut local = this.edge.local();
                    let stack = &mut local.stack;
                    catch(panics, || match stack.poll_ready(cx) {
                        Poll::Ready(Ok(())) => call(stack, request),
                        Poll::Pending => State::Waiting(stack.clone(), request.take()),
                    })
                }
                StateProj::Waiting(stack, request) => {
                    match catch(panics, || stack.poll_ready(cx).map(|Ok(())| call(stack, request))) {
                        Ok(Poll::Ready(running)) => Ok(running),
                        Ok(Poll::Pending) => return Poll::Pending,
                        Err(panicked) => Err(panicked),
                    }
                }
                StateProj::Running(answer) => match catch(panics, || answer.poll(cx)) {
                    Ok(Poll::Ready(Ok(response))) => break response,
                    Ok(Poll::Pending) => return Poll::Pending,
                    Err(panicked) => Err(panicked),
                },
                StateProj::Refused(why) => break local_reply::reply(this.context, why.error()),
                StateProj::Panicked => break local_reply::reply(this.context, panic_error()),
            };
            let next = next.unwrap_or(State::Panicked);
            // Dropping what panicked may panic again; that is part of the same accident.
            if catch(panics, || this.state.set(next)).is_err() {
                break local_reply::reply(this.context, panic_error());
            }
        };
        *this.answered = true;
        Poll::Ready(Ok(finish(response, this.context, *this.version, *this.head)))
    }
}

fn call<S: HttpStack>(stack: &mut S, request: &mut Option<Request<Body>>) -> State<S> {
    request.take().map_or(State::Panicked, |request| State::Running(stack.call(request)))
}

/// Gives the response our version, announces a drain, and gives the body its meter.
fn finish(
    mut response: Response<Body>,
    context: &RequestContext,
    version: Version,
    head: bool,
) -> Response<Body> {
    let status = response.status();
    // Not the upstream's. The codec answers a client of HTTP/1.0 as such by itself.
    *response.version_mut() = if version < Version::HTTP_2 { Version::HTTP_11 } else { version };
    if version < Version::HTTP_2
        && status != StatusCode::SWITCHING_PROTOCOLS
        && context.phase() > Phase::Serving
    {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let bodiless = head || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if response.body().is_end_stream() {
        return response;
    }
    // The codec stops reading at the known end and drops the body: that is its end, not a client that left.
    let length = if bodiless { Some(0) } else { length(&response) };
    response.map(|body| body.metered_for(context.clone(), Side::Upstream, length))
}

fn length(response: &Response<Body>) -> Option<u64> {
    response
        .body()
        .size_hint()
        .exact()
        .or_else(|| response.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok())
}

impl Refused {
    fn error(self) -> Error {
        match self {
            Self::Fields => Error::new(
                ErrorKind::BadRequest,
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
                "http2.too_many_headers",
            ),
            Self::Peer => Error::local_reply(
                StatusCode::FORBIDDEN,
                ResponseFlags::NONE,
                "downstream_peer_no_longer_trusted",
            ),
        }
    }
}

#[pinned_drop]
impl<S: HttpStack> PinnedDrop for ResponseFuture<S> {
    fn drop(self: Pin<&mut Self>) {
        // Runs before the stack's future is dropped, so that telemetry in it reads the flag.
        if !self.answered {
            self.context.downstream_left();
        }
    }
}

/// Spawns HTTP/2 streams on the current runtime.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spawn;

impl<F> hyper::rt::Executor<F> for Spawn
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, future: F) {
        tokio::spawn(future);
    }
}
