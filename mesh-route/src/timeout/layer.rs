//! The timeout by itself: around any service.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body::Body as HttpBody;
use mesh_core::{Body, BoxError, Error, RequestContext};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::{Deadline, Idle, Limits, Timeouts, Timers};
use crate::grpc;

/// Bounds the time of a request: from the end of the request to the end of its response (VS-T01), and the time in which
/// nothing of the response is received.
///
/// What takes longer is answered 504, `UT` for the timeout and `SI` for the idle one; where the head of the response has
/// passed already its body fails. A gRPC client that waits less, by `grpc-timeout`, is the limit. The service hears how
/// long it is waited for: `x-envoy-expected-rq-timeout-ms`, and in gRPC a `grpc-timeout` of what is left.
///
/// Stands above what it bounds, retries among it, and below what makes replies of errors
/// ([`LocalReplyLayer`](mesh_core::LocalReplyLayer)). Needs a tokio runtime with time. A route has its timeout in
/// [`dispatch`](crate::dispatch()), without this layer.
///
/// ```
/// use std::time::Duration;
/// use http::{Request, Response};
/// use mesh_core::{Body, Direction, Error, LocalReplyLayer};
/// use mesh_route::TimeoutLayer;
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let service = ServiceBuilder::new()
///     .layer(LocalReplyLayer::new(Direction::Inbound))
///     .layer(TimeoutLayer::new(Duration::from_millis(250)))
///     .service_fn(|_: Request<Body>| async {
///         tokio::time::sleep(Duration::from_secs(3)).await;
///         Ok::<_, Error>(Response::new(Body::empty()))
///     });
/// let response = service.oneshot(Request::new(Body::empty())).await?;
/// assert_eq!(response.status(), 504);
/// # Ok(())
/// # }
/// # let mut runtime = tokio::runtime::Builder::new_current_thread();
/// # runtime.enable_time().start_paused(true).build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeoutLayer {
    timeout: Option<Duration>,
    idle: Option<Duration>,
}

impl TimeoutLayer {
    /// Bounds the whole; zero is no limit, Istio's default.
    #[must_use]
    pub const fn new(timeout: Duration) -> Self {
        Self { timeout: some(timeout), idle: None }
    }

    /// Bounds the time until the head of the response is received, and then that between its frames, while they are
    /// asked for; zero, the default, is no limit.
    #[must_use]
    pub const fn idle(mut self, timeout: Duration) -> Self {
        self.idle = some(timeout);
        self
    }
}

const fn some(timeout: Duration) -> Option<Duration> {
    if timeout.is_zero() { None } else { Some(timeout) }
}

impl<S> Layer<S> for TimeoutLayer {
    type Service = Timeout<S>;

    fn layer(&self, inner: S) -> Timeout<S> {
        let millis = self.timeout.map_or(0, |timeout| timeout.as_millis() as u64);
        let announced = (millis, HeaderValue::from(millis));
        Timeout { inner, limits: *self, announced, timers: Arc::default() }
    }
}

/// The service of [`TimeoutLayer`].
#[derive(Clone, Debug)]
pub struct Timeout<S> {
    inner: S,
    limits: TimeoutLayer,
    /// What most requests are told.
    announced: (u64, HeaderValue),
    timers: Arc<Timers>,
}

impl<S, B, R> Service<Request<B>> for Timeout<S>
where
    S: Service<Request<Body>, Response = Response<R>>,
    S::Error: Into<Error>,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture<S::Future> {
        let mut request = request.map(Body::new);
        let TimeoutLayer { timeout, idle } = self.limits;
        let grpc = grpc::is_grpc(request.headers());
        let received_at = || {
            let context = request.extensions().get::<RequestContext>();
            context.map_or_else(mesh_core::clock::now, RequestContext::received_at)
        };
        let timeouts = Timeouts { route: timeout, idle, ..Timeouts::default() };
        let timeouts = timeouts.capped(request.headers(), grpc, received_at);
        let millis = |millis| match &self.announced {
            (announced, text) if *announced == millis => text.clone(),
            _ => HeaderValue::from(millis),
        };
        timeouts.announce(request.headers_mut(), grpc, millis);
        let body = request.body_mut();
        let whole = timeouts.route.map(|whole| Deadline::new(&self.timers, whole, body, super::route));
        // While a body is still to come the whole stands still, and only the idle timeout bounds the upload.
        let is_whole = body.is_end_stream() || body.as_full().is_some();
        let head = idle.filter(|idle| !is_whole || timeouts.route.is_none_or(|whole| *idle < whole));
        let head = Limits { per_try: None, idle: head }.deadline(&self.timers, body);
        let idle = idle.map(|idle| Idle::new(&self.timers, idle));
        ResponseFuture { inner: self.inner.call(request), whole, head, idle }
    }
}

/// The future of [`Timeout`].
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F> {
    #[pin]
    inner: F,
    whole: Option<Deadline>,
    head: Option<Deadline>,
    idle: Option<Idle>,
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<Error>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Output = Result<Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Poll::Ready(response) = this.inner.poll(cx) else {
            // Where both pass at once, after an upload, it is the whole that is over.
            for deadline in [&mut *this.whole, &mut *this.head].into_iter().flatten() {
                if let Poll::Ready(late) = deadline.poll_passed(cx) {
                    return Poll::Ready(Err(late));
                }
            }
            return Poll::Pending;
        };
        let bound = |body: R| {
            let mut body = Body::new(body);
            if !body.is_end_stream() {
                if let Some(idle) = this.idle.take() {
                    body = body.with_hook(idle.beside(this.head.take()));
                }
                if let Some(deadline) = this.whole.take() {
                    body = body.with_hook(deadline);
                }
            }
            body
        };
        Poll::Ready(response.map(|response| response.map(bound)).map_err(Into::into))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::ready;

    use http::StatusCode;
    use http_body::Frame;
    use http_body_util::{BodyExt as _, Full};
    use mesh_core::{ErrorKind, ResponseFlags};
    use tokio::time::{Instant, Sleep, sleep};
    use tower::{ServiceBuilder, ServiceExt as _};

    use super::*;
    use crate::{RetryLayer, RetryOn, RetryPolicy};

    const SECOND: Duration = Duration::from_secs(1);

    /// A body whose frames come after these times.
    fn slow<const N: usize>(after: [Duration; N]) -> Body {
        Body::new(Paced { after: after.into(), sleep: None })
    }

    struct Paced {
        after: VecDeque<Duration>,
        sleep: Option<Pin<Box<Sleep>>>,
    }

    impl HttpBody for Paced {
        type Data = Bytes;
        type Error = Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
            if self.sleep.is_none() {
                let Some(after) = self.after.pop_front() else { return Poll::Ready(None) };
                self.sleep = Some(Box::pin(sleep(after)));
            }
            let this = &mut *self;
            ready!(this.sleep.as_mut().map_or(Poll::Ready(()), |sleep| sleep.as_mut().poll(cx)));
            this.sleep = None;
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b".")))))
        }
    }

    /// Reads its request, and answers after `head` with a body of frames `frames` apart.
    async fn exchange(
        layer: TimeoutLayer,
        request: Request<Body>,
        head: Duration,
        frames: [Duration; 2],
    ) -> (Result<(StatusCode, Result<usize, Error>), Error>, Duration) {
        let service =
            ServiceBuilder::new().layer(layer).service_fn(move |request: Request<Body>| async move {
                request.into_body().collect().await?;
                sleep(head).await;
                Ok::<_, Error>(Response::new(slow(frames)))
            });
        let started = Instant::now();
        let response = match service.oneshot(request).await {
            Err(error) => Err(error),
            Ok(response) => {
                let status = response.status();
                Ok((status, response.into_body().collect().await.map(|body| body.to_bytes().len())))
            }
        };
        (response, started.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_from_the_whole_request_to_the_end_of_the_response_layer() {
        let layer = TimeoutLayer::new(10 * SECOND);
        // A slow upload is not counted.
        let request = || Request::post("/").body(slow([8 * SECOND, 8 * SECOND])).unwrap();
        let (response, took) = exchange(layer, request(), 4 * SECOND, [3 * SECOND, 2 * SECOND]).await;
        assert!(matches!(response, Ok((StatusCode::OK, Ok(2)))));
        assert_eq!(took, 25 * SECOND);
        // Its head is late.
        let (response, took) = exchange(layer, request(), 11 * SECOND, [SECOND; 2]).await;
        let error = response.unwrap_err();
        assert_eq!(
            (error.status(), error.flags(), error.details()),
            (StatusCode::GATEWAY_TIMEOUT, ResponseFlags::UPSTREAM_REQUEST_TIMEOUT, "response_timeout")
        );
        assert_eq!(took, 26 * SECOND);
        // The end of its body is.
        let (response, took) = exchange(layer, request(), 4 * SECOND, [3 * SECOND, 4 * SECOND]).await;
        assert_eq!(response.unwrap().1.unwrap_err().flags(), ResponseFlags::UPSTREAM_REQUEST_TIMEOUT);
        assert_eq!(took, 26 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_bug_a_response_that_began_before_its_request_had_ended_was_not_bounded() {
        let service = ServiceBuilder::new().layer(TimeoutLayer::new(10 * SECOND)).service_fn(
            |request: Request<Body>| async {
                // Answers at once, and sends nothing, whatever it receives.
                tokio::spawn(request.into_body().collect());
                Ok::<_, Error>(Response::new(slow([1000 * SECOND])))
            },
        );
        let started = Instant::now();
        let request = Request::post("/").body(slow([2 * SECOND])).unwrap();
        let response = service.oneshot(request).await.unwrap();
        let error = response.into_body().collect().await.unwrap_err();
        assert_eq!(error.flags(), ResponseFlags::UPSTREAM_REQUEST_TIMEOUT);
        assert_eq!(started.elapsed(), 12 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_bug_a_service_that_hangs_and_leaves_the_body_unread_was_not_bounded_layer() {
        let layer = TimeoutLayer::new(10 * SECOND);
        for body in [Body::empty(), Body::from("whole"), slow([SECOND; 2])] {
            let service = ServiceBuilder::new().layer(layer).service_fn(|request: Request<Body>| async {
                let _unread = request;
                std::future::pending::<Result<Response<Body>, Error>>().await
            });
            let started = Instant::now();
            let request = Request::post("/").body(body).unwrap();
            let late = tokio::time::timeout(100 * SECOND, service.oneshot(request)).await.unwrap();
            assert_eq!(late.unwrap_err().flags(), ResponseFlags::UPSTREAM_REQUEST_TIMEOUT);
            assert_eq!(started.elapsed(), 10 * SECOND);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_an_upload_that_begins_late_is_not_cut_and_starts_the_time_again_layer() {
        let answered = |begins: u64, answers: u64| async move {
            let layer = TimeoutLayer::new(10 * SECOND);
            let service =
                ServiceBuilder::new().layer(layer).service_fn(move |request: Request<Body>| async move {
                    sleep(Duration::from_secs(begins)).await;
                    request.into_body().collect().await?;
                    sleep(Duration::from_secs(answers)).await;
                    Ok::<_, Error>(Response::new(Body::empty()))
                });
            let started = Instant::now();
            let request = Request::post("/").body(slow([8 * SECOND, 8 * SECOND])).unwrap();
            (service.oneshot(request).await.is_ok(), started.elapsed())
        };
        assert_eq!(answered(9, 9).await, (true, 34 * SECOND));
        assert_eq!(answered(9, 11).await, (false, 35 * SECOND));
        assert_eq!(answered(11, 0).await, (false, 10 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_bug_a_body_that_came_back_unread_was_waited_for_without_an_end_layer() {
        // The first try asks for the body, is told that there is nothing yet, and fails; the second hangs.
        let tries = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&tries);
        let stack = ServiceBuilder::new()
            .layer(TimeoutLayer::new(10 * SECOND))
            .layer(RetryLayer::new(RetryPolicy::new(1, RetryOn::parse("connect-failure").unwrap())).seeded(1))
            .service_fn(move |request: Request<Body>| {
                let first = counted.fetch_add(1, Ordering::Relaxed) == 0;
                async move {
                    let mut body = request.into_body();
                    if !first {
                        return std::future::pending::<Result<Response<Body>, Error>>().await;
                    }
                    sleep(4 * SECOND).await;
                    let asked = tokio::time::timeout(8 * SECOND, body.frame()).await;
                    assert!(asked.is_err(), "nothing has come");
                    let (status, flags) = (StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::NONE);
                    Err(Error::new(ErrorKind::ConnectFailure, status, flags, "gone"))
                }
            });
        let started = Instant::now();
        let request = Request::post("/").body(slow([1000 * SECOND])).unwrap();
        let late = tokio::time::timeout(100 * SECOND, stack.oneshot(request)).await.unwrap();
        assert_eq!(late.unwrap_err().flags(), ResponseFlags::UPSTREAM_REQUEST_TIMEOUT);
        assert_eq!(tries.load(Ordering::Relaxed), 2);
        // It stood still for the 8 seconds in which the client was waited for.
        assert_eq!(started.elapsed(), 18 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_bug_a_limit_that_no_clock_can_tell_panicked_layer() {
        let layer = TimeoutLayer::new(Duration::MAX);
        for layer in [layer, layer.idle(Duration::MAX), layer.idle(Duration::MAX - SECOND)] {
            for body in [Body::empty(), Body::from("whole"), slow([SECOND])] {
                let request = Request::post("/").body(body).unwrap();
                let (response, _) = exchange(layer, request, 1000 * SECOND, [1000 * SECOND; 2]).await;
                assert!(matches!(response, Ok((StatusCode::OK, Ok(2)))), "{response:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_bug_an_idle_timeout_longer_than_the_whole_did_not_bound_a_stalled_upload_layer() {
        let stalls = |idle: u32, at: [Duration; 1]| {
            let layer = TimeoutLayer::new(10 * SECOND).idle(idle * SECOND);
            exchange(layer, Request::post("/").body(slow(at)).unwrap(), SECOND, [SECOND; 2])
        };
        for idle in [10, 15] {
            let (response, took) = stalls(idle, [100_000 * SECOND]).await;
            let error = response.unwrap_err();
            assert_eq!((error.details(), took), ("stream_idle_timeout", idle * SECOND));
        }
        // With the end of the upload the whole begins, and passes first, or with the idle timeout.
        for idle in [10, 15] {
            let layer = TimeoutLayer::new(10 * SECOND).idle(idle * SECOND);
            let request = Request::post("/").body(slow([3 * SECOND])).unwrap();
            let (response, took) = exchange(layer, request, 100 * SECOND, [SECOND; 2]).await;
            assert_eq!(response.unwrap_err().flags(), ResponseFlags::UPSTREAM_REQUEST_TIMEOUT);
            assert_eq!(took, 13 * SECOND);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_idle_begins_again_with_each_frame_layer() {
        let layer = TimeoutLayer::default().idle(5 * SECOND);
        let request = || Request::new(Body::empty());
        let (response, took) = exchange(layer, request(), 4 * SECOND, [4 * SECOND; 2]).await;
        assert!(matches!(response, Ok((StatusCode::OK, Ok(2)))));
        assert_eq!(took, 12 * SECOND);
        let (response, took) = exchange(layer, request(), 6 * SECOND, [SECOND; 2]).await;
        assert_eq!(response.unwrap_err().flags(), ResponseFlags::STREAM_IDLE_TIMEOUT);
        assert_eq!(took, 5 * SECOND);
        let (response, took) = exchange(layer, request(), SECOND, [SECOND, 6 * SECOND]).await;
        assert_eq!(response.unwrap().1.unwrap_err().flags(), ResponseFlags::STREAM_IDLE_TIMEOUT);
        assert_eq!(took, 7 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_bug_an_upload_that_went_on_after_the_head_was_cut_as_idle_layer() {
        let layer = TimeoutLayer::default().idle(5 * SECOND);
        let ended = |upload: [Duration; 4]| async move {
            let service =
                ServiceBuilder::new().layer(layer).service_fn(|request: Request<Body>| async move {
                    tokio::spawn(request.into_body().collect());
                    Ok::<_, Error>(Response::new(slow([1000 * SECOND])))
                });
            let started = Instant::now();
            let request = Request::post("/").body(slow(upload)).unwrap();
            let response = service.oneshot(request).await.unwrap();
            let error = response.into_body().collect().await.unwrap_err();
            assert_eq!(error.flags(), ResponseFlags::STREAM_IDLE_TIMEOUT);
            started.elapsed()
        };
        assert_eq!(ended([4 * SECOND; 4]).await, 21 * SECOND, "after its end");
        assert_eq!(ended([4 * SECOND, 4 * SECOND, 9 * SECOND, SECOND]).await, 13 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn vs_t01_grpc_timeout_is_honoured_and_shortened_layer() {
        let asked = |layer: TimeoutLayer, grpc_timeout: Option<&'static str>| async move {
            let service =
                ServiceBuilder::new().layer(layer).service_fn(|request: Request<Body>| async move {
                    let text = |name: &str| {
                        request.headers().get(name).map(|value| value.to_str().unwrap().to_owned())
                    };
                    let mut response = Response::new(Body::empty());
                    response
                        .extensions_mut()
                        .insert((text("x-envoy-expected-rq-timeout-ms"), text("grpc-timeout")));
                    Ok::<_, Error>(response)
                });
            let mut request = Request::post("/").header("content-type", "application/grpc");
            if let Some(timeout) = grpc_timeout {
                request = request.header("grpc-timeout", timeout);
            }
            let mut request = request.body(Body::empty()).unwrap();
            RequestContext::ensure(request.extensions_mut(), mesh_core::Direction::Inbound);
            sleep(SECOND).await;
            let mut response = service.oneshot(request).await.unwrap();
            response.extensions_mut().remove::<(Option<String>, Option<String>)>().unwrap()
        };
        let both = |millis: &str| (Some(millis.to_owned()), Some(format!("{millis}m")));
        assert_eq!(asked(TimeoutLayer::new(15 * SECOND), Some("5S")).await, both("4000"));
        assert_eq!(asked(TimeoutLayer::new(15 * SECOND), Some("1H")).await, both("15000"));
        assert_eq!(asked(TimeoutLayer::new(15 * SECOND), None).await, both("15000"));
        assert_eq!(asked(TimeoutLayer::default(), Some("5S")).await, both("4000"));
        assert_eq!(asked(TimeoutLayer::default(), None).await, (None, None));
    }

    #[tokio::test]
    async fn a_service_without_a_limit_has_no_timer_and_any_body() {
        let foreign = Full::new(Bytes::from_static(b"a"));
        let service =
            ServiceBuilder::new().layer(TimeoutLayer::default()).service_fn(|request: Request<Body>| async {
                Ok::<_, Error>(Response::new(request.into_body()))
            });
        let response = service.oneshot(Request::new(foreign)).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "a");
    }
}
