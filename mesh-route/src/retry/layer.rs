//! Retries by themselves: around any service.
//!
//! A foreign service takes a request for good. So its head is kept for every class, *Connect* too; a body that the
//! service did not begin to read comes back, and one that it read is recorded where the class is *Replay*. A request
//! whose policy never tries again passes as it is.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Extensions, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame};
use mesh_core::{Body, BodyHook, BoxError, EndOfBody, Error, RequestContext, ResponseFlags, vendor};
use pin_project::pin_project;
use tokio::time::Sleep;
use tower_layer::Layer;
use tower_service::Service;

use super::lent::Lender;
use super::state::Counted;
use super::{Outcome, Replay, RetryClass, RetryPolicy, RetryState, after_retries, is_idempotent};
use crate::attempt::DISCARDED_FRAMES;
use crate::draws::Draws;
use crate::grpc;
use crate::timeout::{Deadline, Limits, Timers};

/// Sends a request again that failed, as a [`RetryPolicy`] says (VS-Y01 to VS-Y10).
///
/// The back-off is drawn with full jitter. A try that takes longer than the policy's `per_try_timeout` fails. The
/// service hears the number of the try as `x-envoy-attempt-count`. A [`RetryState`] that is shared bounds the retries of
/// a process; what it or the attempts refuse leaves the answer as it was, with the flag `UO` or `URX`. A body is sent
/// again when the service had not begun to read it, or had read it whole and it has at most 64 KiB (VS-Y08),
/// for which each of its pieces counts for 512 bytes at least.
///
/// Only what the error of the service tells is known of a failure: an error that is not a [`mesh_core::Error`] is a
/// defect, which no condition of a policy means. [`upstream_error`](crate::upstream_error) makes one of hyper's.
///
/// Expects above it what bounds the whole, a [`TimeoutLayer`](crate::TimeoutLayer), and below it what is to be done for
/// each try: limits, outlier detection, a [`Balance`](crate::Balance). Needs a tokio runtime with time. A route has its
/// retries in [`dispatch`](crate::dispatch()), without this layer.
///
/// ```
/// use std::sync::atomic::{AtomicU32, Ordering};
/// use http::{Request, Response, StatusCode};
/// use mesh_core::{Body, Error};
/// use mesh_route::{RetryBudget, RetryLayer, RetryOn, RetryPolicy, RetryState};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// static TRIES: AtomicU32 = AtomicU32::new(0);
/// let policy = RetryPolicy::new(2, RetryOn::parse("503,connect-failure")?);
/// let state = RetryState::new(10, Some(RetryBudget::default()));
/// let client = ServiceBuilder::new()
///     .layer(RetryLayer::new(policy).state(&state).seeded(1))
///     .service_fn(|_: Request<Body>| async {
///         let mut response = Response::new(Body::empty());
///         if TRIES.fetch_add(1, Ordering::Relaxed) == 0 {
///             *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
///         }
///         Ok::<_, Error>(response)
///     });
/// let response = client.oneshot(Request::post("/orders").body(Body::from("3 apples"))?).await?;
/// assert_eq!((response.status(), state.retried()), (StatusCode::OK, 1));
/// # Ok(())
/// # }
/// # let mut runtime = tokio::runtime::Builder::new_current_thread();
/// # runtime.enable_time().start_paused(true).build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct RetryLayer {
    policy: Arc<RetryPolicy>,
    state: RetryState,
    seed: Option<u64>,
}

impl RetryLayer {
    /// Retries by this policy, without another limit.
    #[must_use]
    pub fn new(policy: RetryPolicy) -> Self {
        Self { policy: Arc::new(policy), state: RetryState::default(), seed: None }
    }

    /// Counts its retries with all others of this state, and within its limits.
    #[must_use]
    pub fn state(self, state: &RetryState) -> Self {
        Self { state: state.clone(), ..self }
    }

    /// Draws the time between tries from this seed, so that it can be replayed. Without it each service has a seed of
    /// the operating system's.
    #[must_use]
    pub fn seeded(self, seed: u64) -> Self {
        Self { seed: Some(seed), ..self }
    }
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Retry<S> {
        let shared = Shared {
            policy: Arc::clone(&self.policy),
            state: self.state.clone(),
            draws: Draws::new(self.seed),
            timers: Arc::default(),
        };
        Retry { inner, shared: Arc::new(shared) }
    }
}

/// The service of [`RetryLayer`].
#[derive(Clone, Debug)]
pub struct Retry<S> {
    inner: S,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    policy: Arc<RetryPolicy>,
    state: RetryState,
    draws: Draws,
    timers: Arc<Timers>,
}

/// The endpoints of the tries before, for a balancer below: an extension of a request that is tried again.
#[derive(Clone, Debug)]
pub(crate) struct PreviousHosts {
    pub(crate) addrs: Vec<SocketAddr>,
    pub(crate) ignore: bool,
    pub(crate) remote_localities: bool,
}

impl<S, B, R> Service<Request<B>> for Retry<S>
where
    S: Service<Request<Body>, Response = Response<R>> + Clone,
    S::Error: Into<Error>,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = ResponseFuture<S>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture<S> {
        let mut request = request.map(Body::new);
        let policy = &self.shared.policy;
        let grpc = grpc::is_grpc(request.headers());
        let idempotent = !policy.only_idempotent || is_idempotent(request.method(), request.headers());
        let has_body = !request.body().is_end_stream();
        // What is spoken below is not known, so that it may be HTTP/2.
        let class = policy.class(grpc, true, idempotent, has_body);
        if class == RetryClass::Never && policy.per_try_timeout.is_none() {
            let context = request.extensions().get::<RequestContext>();
            let number = context.map_or(1, RequestContext::count_attempt);
            count(&mut request, number);
            return ResponseFuture { state: State::Trying(self.inner.call(request)), kept: None };
        }
        // The service that is ready takes the request; the clone in its place has to become so.
        let clone = self.inner.clone();
        let service = std::mem::replace(&mut self.inner, clone);
        let (replay, lender) = match class {
            RetryClass::Never => (None, None),
            RetryClass::Head => (Some(Replay::of_head(&request)), None),
            RetryClass::Connect => (Some(Replay::of_head(&request)), has_body.then(Lender::default)),
            RetryClass::Replay => (Some(Replay::of(&mut request)), Some(Lender::default())),
        };
        if let Some(lender) = &lender {
            let body = std::mem::take(request.body_mut());
            *request.body_mut() = lender.lend(body);
        }
        let mut kept = Box::new(Kept {
            service,
            class,
            grpc,
            idempotent,
            replay,
            lender,
            extensions: request.extensions().clone(),
            context: request.extensions().get().cloned(),
            retries: 0,
            tried: Vec::new(),
            deadline: None,
            active: self.shared.state.begin(),
            retry: None,
            next: None,
            shared: Arc::clone(&self.shared),
        });
        let future = kept.send(request);
        ResponseFuture { state: State::Trying(future), kept: Some(kept) }
    }
}

fn count<B>(request: &mut Request<B>, number: u32) {
    let number = if number == 1 { HeaderValue::from_static("1") } else { HeaderValue::from(number) };
    vendor::ATTEMPT_COUNT.insert(request.headers_mut(), number);
}

/// What is kept of a request that may be tried again.
struct Kept<S> {
    /// The service, ready for the first try.
    service: S,
    shared: Arc<Shared>,
    class: RetryClass,
    grpc: bool,
    idempotent: bool,
    replay: Option<Replay>,
    lender: Option<Lender>,
    extensions: Extensions,
    context: Option<RequestContext>,
    retries: u32,
    tried: Vec<SocketAddr>,
    /// That of the try.
    deadline: Option<Deadline>,
    active: Option<Counted>,
    /// Counts the retry, from the decision to the head of its answer.
    retry: Option<Counted>,
    /// What is sent when the pause is over.
    next: Option<Request<Body>>,
}

#[allow(clippy::large_enum_variant, reason = "it is taken apart at once")]
enum Next {
    Done(Result<Response<Body>, Error>),
    Pause(Pin<Box<Sleep>>),
}

impl<S> Kept<S> {
    /// Sends a try; the service has to be ready.
    fn send<R>(&mut self, mut request: Request<Body>) -> S::Future
    where
        S: Service<Request<Body>, Response = Response<R>>,
    {
        let number = self.context.as_ref().map(RequestContext::count_attempt);
        count(&mut request, number.unwrap_or(self.retries + 1));
        let limits = Limits { per_try: self.shared.policy.per_try_timeout, idle: None };
        self.deadline = limits.deadline(&self.shared.timers, request.body_mut());
        self.service.call(request)
    }

    /// Decides what follows a try.
    fn after(&mut self, mut outcome: Result<Response<Body>, Error>, cx: &mut Context<'_>) -> Next {
        self.deadline = None;
        self.retry = None;
        let policy = &self.shared.policy;
        let grpc_status = match &mut outcome {
            Ok(response) => self.grpc_status(response, cx),
            Err(_) => None,
        };
        let seen = match &outcome {
            Ok(response) => {
                Outcome::Response { status: response.status(), headers: response.headers(), grpc_status }
            }
            Err(error) => Outcome::Failed(error.kind()),
        };
        if self.class == RetryClass::Never || !policy.wants(&seen, self.idempotent) {
            return self.done(outcome);
        }
        if self.retries >= policy.attempts {
            return self.refused(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED, outcome);
        }
        let Some(mut request) = self.request() else {
            return self.refused(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED, outcome);
        };
        self.retry = self.shared.state.admit();
        if self.retry.is_none() {
            return self.refused(ResponseFlags::UPSTREAM_OVERFLOW, outcome);
        }
        self.retries += 1;
        if let Ok(response) = outcome {
            discard(response.into_body(), cx);
        }
        let upstream = self.context.as_ref().and_then(RequestContext::upstream);
        self.tried.extend(upstream.and_then(|upstream| upstream.endpoint));
        if !self.tried.is_empty() {
            request.extensions_mut().insert(PreviousHosts {
                addrs: self.tried.clone(),
                ignore: policy.ignore_previous_hosts,
                remote_localities: policy.remote_localities,
            });
        }
        let pause = policy.backoff.before(self.retries, &mut self.shared.draws.rng());
        self.next = Some(request);
        Next::Pause(Box::pin(tokio::time::sleep(pause)))
    }

    /// The gRPC status, from the head or from trailers that follow it at once.
    fn grpc_status(&self, response: &mut Response<Body>, cx: &mut Context<'_>) -> Option<u16> {
        let in_head = grpc::status(response.headers());
        if in_head.is_some() || !self.grpc || self.retries >= self.shared.policy.attempts {
            return in_head;
        }
        let body = response.body_mut();
        if body.is_end_stream() {
            return None;
        }
        let Poll::Ready(Some(frame)) = Pin::new(&mut *body).poll_frame(cx) else { return None };
        let status = frame.as_ref().ok().and_then(Frame::trailers_ref).and_then(grpc::status);
        *body = std::mem::take(body).after(frame);
        status
    }

    /// The request once more: with its body as it came back, or as it was recorded.
    fn request(&self) -> Option<Request<Body>> {
        let replay = self.replay.as_ref()?;
        let mut request = match self.lender.as_ref().map(|lender| (lender, lender.take())) {
            None => replay.request()?,
            Some((lender, Some(body))) => replay.with_body(lender.lend(body)),
            Some(_) if self.class == RetryClass::Replay => replay.request()?,
            Some(_) => return None,
        };
        *request.extensions_mut() = self.extensions.clone();
        Some(request)
    }

    fn refused(&mut self, flag: ResponseFlags, outcome: Result<Response<Body>, Error>) -> Next {
        if let Some(context) = &self.context {
            context.add_flags(flag);
        }
        self.done(outcome)
    }

    fn done(&mut self, outcome: Result<Response<Body>, Error>) -> Next {
        let active = self.active.take();
        Next::Done(match outcome {
            Ok(response) => Ok(response.map(|body| match active {
                Some(active) if !body.is_end_stream() => body.with_hook(active),
                _ => body,
            })),
            Err(error) if self.retries > 0 => Err(after_retries(error)),
            Err(error) => Err(error),
        })
    }
}

/// Reads what is there already, so that the connection that it came from can be kept.
fn discard(mut body: Body, cx: &mut Context<'_>) {
    for _ in 0..DISCARDED_FRAMES {
        if !matches!(Pin::new(&mut body).poll_frame(cx), Poll::Ready(Some(Ok(_)))) {
            return;
        }
    }
}

impl BodyHook for Counted {
    fn on_end(&mut self, _: EndOfBody<'_>) {}
}

/// The future of [`Retry`].
#[pin_project]
pub struct ResponseFuture<S: Service<Request<Body>>> {
    #[pin]
    state: State<S::Future>,
    /// `None` for a request that is sent once. Boxed, as few need it.
    kept: Option<Box<Kept<S>>>,
}

#[pin_project(project = StateProjection)]
enum State<F> {
    Trying(#[pin] F),
    Pausing(Pin<Box<Sleep>>),
    /// For the next try.
    Readying,
}

impl<S, R> Future for ResponseFuture<S>
where
    S: Service<Request<Body>, Response = Response<R>>,
    S::Error: Into<Error>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Output = Result<Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let next = match (this.state.as_mut().project(), &mut *this.kept) {
                (StateProjection::Trying(future), kept) => {
                    let outcome = match (future.poll(cx), &mut *kept) {
                        (Poll::Ready(outcome), _) => {
                            outcome.map(|response| response.map(Body::new)).map_err(Into::into)
                        }
                        (Poll::Pending, kept) => {
                            let deadline = kept.as_mut().and_then(|kept| kept.deadline.as_mut());
                            match deadline {
                                Some(deadline) => Err(ready!(deadline.poll_passed(cx))),
                                None => return Poll::Pending,
                            }
                        }
                    };
                    let Some(kept) = kept else { return Poll::Ready(outcome) };
                    // Its request comes back when it is dropped.
                    this.state.set(State::Readying);
                    match kept.after(outcome, cx) {
                        Next::Done(outcome) => return Poll::Ready(outcome),
                        Next::Pause(sleep) => State::Pausing(sleep),
                    }
                }
                (StateProjection::Pausing(sleep), _) => {
                    ready!(sleep.as_mut().poll(cx));
                    State::Readying
                }
                (StateProjection::Readying, Some(kept)) => {
                    ready!(kept.service.poll_ready(cx)).map_err(|error| after_retries(error.into()))?;
                    match kept.next.take() {
                        Some(request) => State::Trying(kept.send(request)),
                        // Polled after it was ready, which the contract of futures forbids.
                        None => return Poll::Pending,
                    }
                }
                (StateProjection::Readying, None) => return Poll::Pending,
            };
            this.state.set(next);
        }
    }
}

impl<S: Service<Request<Body>>> fmt::Debug for ResponseFuture<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture")
            .field("retries", &self.kept.as_ref().map(|kept| kept.retries))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
