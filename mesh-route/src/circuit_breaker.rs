//! Circuit breaking by itself: limits on what a service has to do at once (DR-CP02, DR-CP04).
//!
//! What is over a limit is answered at once and does not queue: 503 `UO` with `x-envoy-overloaded: true`. That is a reply
//! of ours, so outlier detection does not count it. Counts are held by guards, in the future of a request and then in the
//! body of its response, so that a cancel at any await leaves them exact.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::Body as HttpBody;
use mesh_core::{Body, BodyHook, BoxError, EndOfBody, Error, ErrorKind, ResponseFlags, vendor};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::permit::Permit;

/// A limit refuses the request: 503 `UO`.
pub(crate) fn overflow() -> Error {
    Error::new(
        ErrorKind::Overflow,
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::UPSTREAM_OVERFLOW,
        "upstream_reset_before_response_started{overflow}",
    )
    .with_header(vendor::OVERLOADED.name(), HeaderValue::from_static("true"))
    .with_body("upstream connect error or disconnect/reset before headers. reset reason: overflow")
}

/// Bounds the requests of a service, and those that wait until it is ready. What is over is answered 503 `UO`.
///
/// The limits hold for the layer, its clones and everything that it made together: use one for each upstream and process.
/// The service is always ready, so that there is a request to refuse when it is not; while the service below is not
/// ready, requests wait for it, and that is what `max_pending_requests` bounds.
///
/// Stands above a balancer and below retries, so that each try has its place. A route has the limits of its cluster in
/// [`dispatch`](crate::dispatch()), without this layer.
///
/// ```
/// use http::{Request, Response};
/// use mesh_core::{Body, Direction, Error, LocalReplyLayer};
/// use mesh_route::CircuitBreakerLayer;
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let breaker = CircuitBreakerLayer::new().max_requests(1);
/// let service = ServiceBuilder::new()
///     .layer(LocalReplyLayer::new(Direction::Outbound))
///     .layer(breaker.clone())
///     .service_fn(|_: Request<Body>| async { Ok::<_, Error>(Response::new(Body::from("hello"))) });
/// let first = service.clone().oneshot(Request::new(Body::empty())).await?;
/// // The first response has not ended, so there is no room for another.
/// let second = service.clone().oneshot(Request::new(Body::empty())).await?;
/// assert_eq!((second.status().as_u16(), &second.headers()["x-envoy-overloaded"]), (503, &"true".parse()?));
/// drop(first);
/// assert_eq!(service.oneshot(Request::new(Body::empty())).await?.status(), 200);
/// assert_eq!(breaker.overflows(), 1);
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct CircuitBreakerLayer {
    max_requests: u32,
    max_pending: u32,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU32,
    pending: AtomicU32,
    overflows: AtomicU64,
}

impl CircuitBreakerLayer {
    /// Without limits, as Istio's default: 2³²−1.
    #[must_use]
    pub fn new() -> Self {
        Self { max_requests: u32::MAX, max_pending: u32::MAX, counts: Arc::default() }
    }

    /// Requests whose response has not ended, those that wait included (`http2MaxRequests`).
    #[must_use]
    pub fn max_requests(self, most: u32) -> Self {
        Self { max_requests: most, ..self }
    }

    /// Requests that wait until the service is ready (`http1MaxPendingRequests`).
    #[must_use]
    pub fn max_pending_requests(self, most: u32) -> Self {
        Self { max_pending: most, ..self }
    }

    /// Requests whose response has not ended.
    #[must_use]
    pub fn requests(&self) -> u32 {
        self.counts.requests.load(Ordering::Relaxed)
    }

    /// Requests that wait until the service is ready.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.counts.pending.load(Ordering::Relaxed)
    }

    /// Requests that a limit refused.
    #[must_use]
    pub fn overflows(&self) -> u64 {
        self.counts.overflows.load(Ordering::Relaxed)
    }
}

impl Default for CircuitBreakerLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for CircuitBreakerLayer {
    type Service = CircuitBreaker<S>;

    fn layer(&self, inner: S) -> CircuitBreaker<S> {
        CircuitBreaker { inner, is_ready: false, limits: self.clone() }
    }
}

/// The service of [`CircuitBreakerLayer`].
#[derive(Debug)]
pub struct CircuitBreaker<S> {
    inner: S,
    /// Whether the service below was ready when it was asked last.
    is_ready: bool,
    limits: CircuitBreakerLayer,
}

impl<S: Clone> Clone for CircuitBreaker<S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), is_ready: false, limits: self.limits.clone() }
    }
}

impl<S, B, R> Service<Request<B>> for CircuitBreaker<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    S::Error: Into<Error>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.is_ready = match self.inner.poll_ready(cx) {
            Poll::Ready(ready) => ready.map(|()| true).map_err(Into::into)?,
            Poll::Pending => false,
        };
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture<S, B> {
        let CircuitBreakerLayer { max_requests, max_pending, counts } = &self.limits;
        let refused = || {
            counts.overflows.fetch_add(1, Ordering::Relaxed);
            ResponseFuture { state: State::Refused(Some(overflow())), permit: None }
        };
        let Some(permit) = Permit::acquire(counts, |counts| &counts.requests, *max_requests) else {
            return refused();
        };
        let permit = Some(permit);
        if std::mem::take(&mut self.is_ready) {
            return ResponseFuture { state: State::Running(self.inner.call(request)), permit };
        }
        let Some(pending) = Permit::acquire(counts, |counts| &counts.pending, *max_pending) else {
            return refused();
        };
        // The service that is on its way to be ready goes along; the clone begins anew.
        let clone = self.inner.clone();
        let service = std::mem::replace(&mut self.inner, clone);
        let waiting = Waiting { service, request: Some(request), _pending: pending };
        ResponseFuture { state: State::Waiting(Box::new(waiting)), permit }
    }
}

/// The future of [`CircuitBreaker`].
#[pin_project]
pub struct ResponseFuture<S: Service<Request<B>>, B> {
    #[pin]
    state: State<S, B>,
    permit: Option<Permit<Counts>>,
}

#[pin_project(project = StateProjection)]
enum State<S: Service<Request<B>>, B> {
    /// Boxed, so that a request that need not wait has no room for it.
    Waiting(Box<Waiting<S, B>>),
    Running(#[pin] S::Future),
    Refused(Option<Error>),
}

struct Waiting<S, B> {
    service: S,
    /// There until the service is ready.
    request: Option<Request<B>>,
    _pending: Permit<Counts>,
}

impl<S, B, R> Future for ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<Error>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Output = Result<Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let next = match this.state.as_mut().project() {
                StateProjection::Waiting(waiting) => {
                    ready!(waiting.service.poll_ready(cx)).map_err(Into::into)?;
                    match waiting.request.take() {
                        Some(request) => State::Running(waiting.service.call(request)),
                        None => State::Refused(None),
                    }
                }
                StateProjection::Running(future) => {
                    let response = ready!(future.poll(cx)).map_err(Into::into)?;
                    let permit = this.permit.take();
                    return Poll::Ready(Ok(response.map(|body| held(Body::new(body), permit))));
                }
                StateProjection::Refused(error) => {
                    // Polled after it was ready, which the contract of futures forbids.
                    return error.take().map_or(Poll::Pending, |error| Poll::Ready(Err(error)));
                }
            };
            this.state.set(next);
        }
    }
}

/// Has the body hold the place of its request.
fn held(body: Body, permit: Option<Permit<Counts>>) -> Body {
    if body.is_end_stream() { body } else { body.with_hook(Held { _permit: permit }) }
}

struct Held {
    _permit: Option<Permit<Counts>>,
}

impl BodyHook for Held {
    fn on_end(&mut self, _: EndOfBody<'_>) {}
}

impl<S: Service<Request<B>>, B> fmt::Debug for ResponseFuture<S, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Waiting(_) => "waiting",
            State::Running(_) => "running",
            State::Refused(_) => "refused",
        };
        f.debug_tuple("ResponseFuture").field(&state).finish()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tower::limit::ConcurrencyLimitLayer;
    use tower::{ServiceBuilder, ServiceExt as _};

    use super::*;

    type Answer = Result<Response<Body>, Error>;

    fn request() -> Request<Body> {
        Request::new(Body::empty())
    }

    async fn hello(_: Request<Body>) -> Answer {
        Ok(Response::new(Body::from("hello")))
    }

    fn flags(answer: Answer) -> ResponseFlags {
        answer.map_or_else(|error| error.flags(), |_| ResponseFlags::NONE)
    }

    #[tokio::test]
    async fn dr_cp02_a_request_has_its_place_until_its_response_has_ended_layer() {
        let breaker = CircuitBreakerLayer::new().max_requests(2);
        // Two services of one layer have one limit, and clones have theirs.
        let [one, other] = [(); 2].map(|()| breaker.clone().layer(tower::service_fn(hello)));
        let first = one.clone().oneshot(request()).await.unwrap();
        let second = other.clone().oneshot(request()).await.unwrap();
        assert_eq!(breaker.requests(), 2);
        assert_eq!(flags(one.clone().oneshot(request()).await), ResponseFlags::UPSTREAM_OVERFLOW);
        first.into_body().collect().await.unwrap();
        assert_eq!(breaker.requests(), 1, "read to its end");
        drop(second);
        assert_eq!(breaker.requests(), 0, "dropped before its end");
        assert_eq!(flags(other.oneshot(request()).await), ResponseFlags::NONE);
        assert_eq!((breaker.requests(), breaker.overflows()), (0, 1));
    }

    #[tokio::test]
    async fn dr_cp02_pending_are_those_that_wait_for_the_service_layer() {
        let breaker = CircuitBreakerLayer::new().max_pending_requests(1);
        let service = ServiceBuilder::new()
            .layer(breaker.clone())
            .layer(ConcurrencyLimitLayer::new(1))
            .service_fn(|_: Request<Body>| std::future::pending::<Answer>());
        let send = || tokio::spawn(service.clone().oneshot(request()));
        let running = send();
        tokio::task::yield_now().await;
        let waiting = send();
        tokio::task::yield_now().await;
        assert_eq!((breaker.requests(), breaker.pending()), (2, 1));
        let over = service.clone().oneshot(request()).await;
        assert_eq!(over.as_ref().unwrap_err().headers()["x-envoy-overloaded"], "true");
        assert_eq!(flags(over), ResponseFlags::UPSTREAM_OVERFLOW);
        assert_eq!((breaker.requests(), breaker.pending()), (2, 1), "what was refused holds nothing");
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        tokio::task::yield_now().await;
        assert_eq!((breaker.requests(), breaker.pending()), (1, 0), "the place is that of who waited");
        waiting.abort();
        assert!(waiting.await.unwrap_err().is_cancelled());
        assert_eq!((breaker.requests(), breaker.pending()), (0, 0));
    }

    #[tokio::test]
    async fn dr_cp02_a_response_without_a_body_gives_its_place_back_at_once_layer() {
        let breaker = CircuitBreakerLayer::new().max_requests(1);
        let service = breaker.layer(tower::service_fn(|_: Request<Body>| async {
            Ok::<_, Error>(Response::new(Body::empty()))
        }));
        let kept = service.clone().oneshot(request()).await.unwrap();
        assert!(service.oneshot(request()).await.is_ok());
        assert_eq!((breaker.requests(), kept.status().as_u16()), (0, 200));
    }
}
