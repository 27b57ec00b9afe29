//! Injected delays and aborts (VS-F01 … VS-F05): a fault to order, so that what depends on a service can be seen to
//! bear it.
//!
//! What is injected is drawn by a pure function of the [`Fault`] and a random number generator. Delay and abort are
//! drawn independently; a request that draws both waits first and is then answered.
//!
//! The layer stands above the dispatch, so neither the route's timeout nor its retries apply to what it injects
//! (VS-F04): that is Istio's rule, and it is why nobody can see a retry policy at work with Istio's faults. A fault of
//! the scope [`FaultScope::PerTry`], an extension, is left to the dispatch, which draws it for each try.

mod headers;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Request, StatusCode};
use mesh_core::{Error, RequestContext, ResponseFlags};
use pin_project::pin_project;
use rand::Rng;
use tokio::time::Sleep;
use tower_layer::Layer;
use tower_service::Service;

use crate::draws::Draws;
use crate::percentage::Percentage;
use crate::route::{Route, policies};

/// What is injected into a share of a route's requests. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Makes requests wait.
    pub delay: Option<Delay>,
    /// Answers in the place of the upstream.
    pub abort: Option<Abort>,
    /// What is drawn for: the request, or each of its tries.
    pub scope: FaultScope,
}

/// An injected delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delay {
    /// How long a request waits; zero is no delay.
    pub duration: Duration,
    /// Which share of the requests does.
    pub percentage: Percentage,
}

/// An injected answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// The answer.
    pub kind: AbortKind,
    /// Which share of the requests gets it.
    pub percentage: Percentage,
}

/// The answer of an abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AbortKind {
    /// An HTTP status from 200 to 599; a gRPC request gets the status that goes with it (X-10).
    Http(StatusCode),
    /// A gRPC status, 0 to 16; a request that is not gRPC is answered 200.
    Grpc(u32),
}

/// What a fault is drawn for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FaultScope {
    /// Once for the request, outside timeouts and retries, as Istio's. The default.
    #[default]
    PerRequest,
    /// For each try, as if the upstream had failed: timeouts and retries apply. An extension.
    PerTry,
}

/// What was drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Injected {
    /// How long to wait, and that before the abort.
    pub delay: Option<Duration>,
    /// What to answer.
    pub abort: Option<AbortKind>,
}

/// A fault that is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidFault {
    /// An HTTP status that no answer has.
    #[error("an abort has an HTTP status from 200 to 599, not {0}")]
    HttpStatus(u16),
    /// A gRPC status that does not exist.
    #[error("an abort has a gRPC status from 0 to 16, not {0}")]
    GrpcStatus(u32),
}

impl Fault {
    /// No fault.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a share of the requests wait for `duration`.
    #[must_use]
    pub fn delay(mut self, duration: Duration, percentage: Percentage) -> Self {
        self.delay = Some(Delay { duration, percentage });
        self
    }

    /// Answers a share of the requests with an HTTP status.
    ///
    /// # Errors
    /// When the status is not from 200 to 599.
    pub fn abort_http(mut self, status: u16, percentage: Percentage) -> Result<Self, InvalidFault> {
        let kind = http_abort(status).ok_or(InvalidFault::HttpStatus(status))?;
        self.abort = Some(Abort { kind, percentage });
        Ok(self)
    }

    /// Answers a share of the requests with a gRPC status.
    ///
    /// # Errors
    /// When the status is above 16.
    pub fn abort_grpc(mut self, code: u32, percentage: Percentage) -> Result<Self, InvalidFault> {
        let kind = grpc_abort(code).ok_or(InvalidFault::GrpcStatus(code))?;
        self.abort = Some(Abort { kind, percentage });
        Ok(self)
    }

    /// Draws for each try, not once for the request.
    #[must_use]
    pub fn per_try(mut self) -> Self {
        self.scope = FaultScope::PerTry;
        self
    }

    /// What one request, or one try, gets. Delay and abort are drawn independently, the delay first.
    pub fn draw(&self, rng: &mut impl Rng) -> Injected {
        let delay = self.delay.filter(|delay| !delay.duration.is_zero() && delay.percentage.draw(rng));
        let abort = self.abort.filter(|abort| abort.percentage.draw(rng));
        Injected { delay: delay.map(|delay| delay.duration), abort: abort.map(|abort| abort.kind) }
    }
}

fn http_abort(status: u16) -> Option<AbortKind> {
    let status = StatusCode::from_u16(status).ok()?;
    (200..600).contains(&status.as_u16()).then_some(AbortKind::Http(status))
}

fn grpc_abort(code: u32) -> Option<AbortKind> {
    (code <= 16).then_some(AbortKind::Grpc(code))
}

impl Injected {
    /// Whether nothing was drawn.
    #[must_use]
    pub const fn is_nothing(&self) -> bool {
        self.delay.is_none() && self.abort.is_none()
    }
}

impl AbortKind {
    /// The answer as an error: flag `FI`, details `fault_filter_abort`, and Envoy's body.
    #[must_use]
    pub fn error(self) -> Error {
        let reply = |status| {
            Error::local_reply(status, ResponseFlags::FAULT_INJECTED, "fault_filter_abort")
                .with_body("fault filter abort")
        };
        match self {
            Self::Http(status) => reply(status),
            Self::Grpc(code) => reply(StatusCode::OK).with_grpc_status(code),
        }
    }
}

/// Prints as `500` or `gRPC 14`.
impl fmt::Display for AbortKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(status) => write!(f, "{}", status.as_u16()),
            Self::Grpc(code) => write!(f, "gRPC {code}"),
        }
    }
}

/// Injects the fault of the pinned route. Expects [`SelectRouteLayer`](crate::SelectRouteLayer) above it and everything
/// that must not see an aborted request below it; above it also what makes replies of errors
/// ([`LocalReplyLayer`](mesh_core::LocalReplyLayer)). A request whose route has no fault passes without being touched.
///
/// A delay needs a tokio runtime with time. A request that is delayed is kept in a box, with a clone of the service
/// left in the place of the one that it takes along.
///
/// ```
/// use http::{Request, Response};
/// use mesh_core::{Body, Direction, Error, LocalReplyLayer, Slot};
/// use mesh_route::{Fault, FaultLayer, Percentage, RouteBuilder, RouteTable, SelectRouteLayer};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let fault = Fault::new().abort_http(503, Percentage::from_percent(50.0))?;
/// let route = RouteBuilder::new("flaky").fault(fault).respond(200, "")?;
/// let table = RouteTable::builder().host("*", [route]).build()?;
/// let service = ServiceBuilder::new()
///     .layer(LocalReplyLayer::new(Direction::Outbound))
///     .layer(SelectRouteLayer::new(Slot::fixed(table)))
///     .layer(FaultLayer::seeded(7))
///     .service_fn(|_: Request<Body>| async { Ok::<_, Error>(Response::new(Body::from("hello"))) });
/// let mut aborted = 0;
/// for _ in 0..1000 {
///     let request = Request::get("http://a/").body(Body::empty())?;
///     aborted += u32::from(service.clone().oneshot(request).await?.status() == 503);
/// }
/// assert!((450..550).contains(&aborted));
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultLayer {
    seed: Option<u64>,
    trust_headers: bool,
}

impl FaultLayer {
    /// The layer; what it does is in the route. Each service that it makes draws from a seed of the operating system's.
    #[must_use]
    pub const fn new() -> Self {
        Self { seed: None, trust_headers: false }
    }

    /// A layer whose draws can be replayed: every service that it makes draws the same sequence, and the clones of one
    /// service share theirs.
    #[must_use]
    pub const fn seeded(seed: u64) -> Self {
        Self { seed: Some(seed), trust_headers: false }
    }

    /// Whether requests may order a fault by Envoy's headers (VS-F05): `x-envoy-fault-delay-request` (milliseconds),
    /// `x-envoy-fault-abort-request` (an HTTP status), `x-envoy-fault-abort-grpc-request` (a gRPC status; the HTTP
    /// status wins), and for the share in whole percent `x-envoy-fault-delay-request-percentage` and
    /// `x-envoy-fault-abort-request-percentage`, by default 100. What they order takes the place of the route's delay or
    /// abort; a value that is not understood orders nothing. Whoever can send such a header can make this program hold
    /// requests, so the default is no.
    #[must_use]
    pub const fn trust_headers(mut self, trust: bool) -> Self {
        self.trust_headers = trust;
        self
    }
}

impl<S> Layer<S> for FaultLayer {
    type Service = InjectFault<S>;

    fn layer(&self, inner: S) -> InjectFault<S> {
        InjectFault { inner, draws: Arc::new(Draws::new(self.seed)), trust_headers: self.trust_headers }
    }
}

/// The service of [`FaultLayer`].
#[derive(Clone, Debug)]
pub struct InjectFault<S> {
    inner: S,
    draws: Arc<Draws>,
    trust_headers: bool,
}

impl<S> InjectFault<S> {
    fn injected<B>(&self, request: &Request<B>) -> Injected {
        let route = request.extensions().get::<RequestContext>().and_then(RequestContext::route::<Route>);
        let mut fault = route
            .and_then(|route| route.action().fault)
            .filter(|fault| fault.scope == FaultScope::PerRequest)
            .unwrap_or_default();
        if self.trust_headers {
            fault.delay = headers::delay(request.headers()).or(fault.delay);
            fault.abort = headers::abort(request.headers()).or(fault.abort);
        }
        if fault == Fault::default() { Injected::default() } else { fault.draw(&mut self.draws.rng()) }
    }
}

impl<S, B, T> Service<Request<B>> for InjectFault<S>
where
    S: Service<Request<B>, Response = T> + Clone,
    S::Error: Into<Error>,
{
    type Response = T;
    type Error = Error;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> ResponseFuture<S, B> {
        if self.trust_headers || policies::has(&request, policies::FAULT) {
            return self.call_with_fault(request);
        }
        ResponseFuture(State::Running(self.inner.call(request)))
    }
}

impl<S> InjectFault<S> {
    /// Apart, so that what has no fault passes without a call.
    #[inline(never)]
    fn call_with_fault<B>(&mut self, request: Request<B>) -> ResponseFuture<S, B>
    where
        S: Service<Request<B>> + Clone,
    {
        let injected = self.injected(&request);
        ResponseFuture(match injected {
            Injected { delay: None, abort: None } => State::Running(self.inner.call(request)),
            Injected { delay: None, abort: Some(abort) } => State::Aborted(Some(abort.error())),
            Injected { delay: Some(delay), abort } => {
                if let Some(context) = request.extensions().get::<RequestContext>() {
                    context.add_flags(ResponseFlags::DELAY_INJECTED);
                }
                // The service that is ready goes along with the request; the clone has to become so.
                let clone = self.inner.clone();
                let ready = std::mem::replace(&mut self.inner, clone);
                State::Delayed(Box::pin(Delayed {
                    sleep: tokio::time::sleep(delay),
                    then: Some((ready, request)),
                    abort,
                }))
            }
        })
    }
}

/// The future of [`InjectFault`].
#[pin_project]
pub struct ResponseFuture<S: Service<Request<B>>, B>(#[pin] State<S, B>);

#[pin_project(project = StateProjection)]
enum State<S: Service<Request<B>>, B> {
    Running(#[pin] S::Future),
    Aborted(Option<Error>),
    /// Boxed, so that a request that is not delayed has no room for its timer.
    Delayed(Pin<Box<Delayed<S, B>>>),
}

#[pin_project]
struct Delayed<S, B> {
    #[pin]
    sleep: Sleep,
    /// The request is kept even if it will be aborted: a client sees a server that takes its time.
    then: Option<(S, Request<B>)>,
    abort: Option<AbortKind>,
}

impl<S, B, T> Future for ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = T>,
    S::Error: Into<Error>,
{
    type Output = Result<T, Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().0;
        match state.as_mut().project() {
            StateProjection::Running(future) => future.poll(cx).map_err(Into::into),
            _ => state.poll_injected(cx),
        }
    }
}

impl<S, B, T> State<S, B>
where
    S: Service<Request<B>, Response = T>,
    S::Error: Into<Error>,
{
    #[inline(never)]
    fn poll_injected(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T, Error>> {
        let mut state = self;
        loop {
            let next = match state.as_mut().project() {
                StateProjection::Running(future) => return future.poll(cx).map_err(Into::into),
                StateProjection::Aborted(error) => {
                    return match error.take() {
                        Some(error) => Poll::Ready(Err(error)),
                        // Polled after it was ready, which the contract of futures forbids.
                        None => Poll::Pending,
                    };
                }
                StateProjection::Delayed(delayed) => {
                    let delayed = delayed.as_mut().project();
                    ready!(delayed.sleep.poll(cx));
                    match (delayed.abort, delayed.then.take()) {
                        (Some(abort), _) => State::Aborted(Some(abort.error())),
                        (None, Some((mut ready, request))) => State::Running(ready.call(request)),
                        (None, None) => State::Aborted(None),
                    }
                }
            };
            state.set(next);
        }
    }
}

impl<S: Service<Request<B>>, B> fmt::Debug for ResponseFuture<S, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.0 {
            State::Running(_) => "running",
            State::Aborted(_) => "aborted",
            State::Delayed(_) => "delayed",
        };
        f.debug_tuple("ResponseFuture").field(&state).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_accepted_says_why() {
        let all = Percentage::ALWAYS;
        for status in [0, 199, 600, 999, 1000] {
            assert_eq!(Fault::new().abort_http(status, all).unwrap_err(), InvalidFault::HttpStatus(status));
        }
        assert_eq!(Fault::new().abort_grpc(17, all).unwrap_err(), InvalidFault::GrpcStatus(17));
        for status in [200, 599] {
            assert!(Fault::new().abort_http(status, all).is_ok());
        }
        assert!(Fault::new().abort_grpc(16, all).is_ok());
    }

    #[test]
    fn a_seed_replays_what_is_drawn_and_clones_do_not_repeat_it() {
        let fault = Fault::new().abort_http(500, Percentage::from_percent(50.0)).unwrap();
        let drawn = |draws: &Draws| -> Vec<bool> {
            (0..256).map(|_| !fault.draw(&mut draws.rng()).is_nothing()).collect()
        };
        let draws = |seed| Draws::new(Some(seed));
        assert_eq!(drawn(&draws(7)), drawn(&draws(7)));
        assert_ne!(drawn(&draws(7)), drawn(&draws(1 << 40)));
        let service = FaultLayer::seeded(7).layer(());
        let clone = service.clone();
        assert_ne!(drawn(&service.draws), drawn(&clone.draws));
    }
}
