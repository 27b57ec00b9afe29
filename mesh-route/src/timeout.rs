//! How long a request may take.
//!
//! The timeout of the route (VS-T01) goes from the end of the request to the end of the response. The timer starts when the whole request has been received, so a slow upload is not counted. It covers everything
//! after that: waiting for a connection, every attempt, and the body of the response. A route without a timeout has
//! none of this.
//!
//! A try has its own (VS-Y02), up to the head of its response. The idle timeout runs from the beginning, and begins
//! again with whatever passes: what the upstream takes of the request, and what it sends. Whoever lets it pass before
//! the request is whole is told 408, as by Envoy, and it says nothing of the endpoint.
//! Without any of these a request has no timer at all.
//!
//! A gRPC client says with `grpc-timeout` how long it waits. That holds, but never for longer than the route allows.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use mesh_core::{Body, BodyHook, EndOfBody, Error, ErrorKind, RequestContext, ResponseFlags};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::overrides::Overrides;
use crate::route::Forward;

const EXPECTED: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// How long a request may take, by its route and its client; `None` is no limit.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Timeouts {
    /// For everything from the whole request to the end of the response.
    pub(crate) route: Option<Duration>,
    /// For each try.
    pub(crate) per_try: Option<Duration>,
    /// Without anything being received.
    pub(crate) idle: Option<Duration>,
    /// When counting began; `None` where nothing is counted.
    since: Option<std::time::Instant>,
}

impl Timeouts {
    pub(crate) fn of(
        forward: &Forward,
        overrides: Option<&Overrides>,
        headers: &HeaderMap,
        cx: &RequestContext,
    ) -> Self {
        let route = match overrides.and_then(|overrides| overrides.timeout) {
            Some(timeout) => Some(timeout).filter(|timeout| !timeout.is_zero()),
            None => forward.timeout,
        };
        // The client began to wait when it sent the request, and time has gone since.
        let client = grpc_timeout(headers).map(|client| {
            let gone = mesh_core::clock::now().saturating_duration_since(cx.received_at());
            client.saturating_sub(gone).max(Duration::from_millis(1))
        });
        let route = match (route, client) {
            (Some(route), Some(client)) => Some(route.min(client)),
            (route, client) => route.or(client),
        };
        let per_try = overrides.and_then(|overrides| overrides.per_try).or(forward.retry.per_try_timeout);
        // One that is not shorter than the whole has no effect (VS-Y02).
        let per_try =
            per_try.filter(|per_try| !per_try.is_zero() && route.is_none_or(|route| *per_try < route));
        let since = (route.is_some() || per_try.is_some()).then(mesh_core::clock::now);
        Self { route, per_try, idle: forward.idle_timeout, since }
    }

    /// Tells the upstream how long it is waited for, as Envoy does: what it does after that is in vain.
    pub(crate) fn announce(&self, headers: &mut HeaderMap, grpc: bool) {
        let Some(since) = self.since else { return };
        let gone = mesh_core::clock::now().saturating_duration_since(since);
        // Out of time is still a millisecond: zero would be no limit.
        let left = self.route.map(|route| route.saturating_sub(gone).max(Duration::from_millis(1)));
        let Some(left) = [left, self.per_try].into_iter().flatten().min() else { return };
        headers.insert(EXPECTED, HeaderValue::from(left.as_millis() as u64));
        if grpc && let Ok(value) = HeaderValue::try_from(to_grpc_timeout(left)) {
            headers.insert(GRPC_TIMEOUT, value);
        }
    }
}

/// At most eight digits and the unit that they fit.
fn to_grpc_timeout(timeout: Duration) -> String {
    let millis = timeout.as_millis();
    if millis < 100_000_000 {
        format!("{millis}m")
    } else {
        format!("{}S", timeout.as_secs().min(99_999_999))
    }
}

/// What a gRPC client says: up to eight digits and a unit. `None` where it says nothing, nothing that can be read, or 0.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let content_type = headers.get(CONTENT_TYPE)?.as_bytes().strip_prefix(b"application/grpc")?;
    if !matches!(content_type.first(), None | Some(b'+' | b';')) {
        return None;
    }
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok().filter(|amount| *amount > 0)?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// The deadline of one exchange.
#[derive(Clone, Debug)]
pub(crate) struct Deadline(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    timeout: Duration,
    at: Mutex<Option<Instant>>,
    received: Notify,
    whole: AtomicBool,
}

impl Deadline {
    /// A deadline for a request with this body; the body says when it has been received.
    pub(crate) fn new(timeout: Duration, body: Body) -> (Self, Body) {
        let deadline = Self::after(timeout);
        if body.is_end_stream() {
            deadline.start();
            return (deadline, body);
        }
        let hook = Received { deadline: deadline.clone(), by_piece: false };
        (deadline, body.with_hook(hook))
    }

    /// A deadline that runs from now, and from each piece of this body that is taken.
    pub(crate) fn idle(timeout: Duration, body: Body) -> (Self, Body) {
        let deadline = Self::after(timeout);
        deadline.start();
        // What is here already is nobody's to wait for.
        let is_here = body.is_end_stream() || body.as_full().is_some();
        deadline.0.whole.store(is_here, Ordering::Relaxed);
        if body.is_end_stream() {
            return (deadline, body);
        }
        let hook = Received { deadline: deadline.clone(), by_piece: true };
        (deadline, body.with_hook(hook))
    }

    fn after(timeout: Duration) -> Self {
        Self(Arc::new(Shared {
            timeout,
            at: Mutex::default(),
            received: Notify::new(),
            whole: AtomicBool::new(false),
        }))
    }

    /// Whether the whole request has been received.
    pub(crate) fn is_whole(&self) -> bool {
        self.0.whole.load(Ordering::Relaxed)
    }

    fn start(&self) {
        *self.0.at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + self.0.timeout);
        self.0.received.notify_one();
    }

    fn at(&self) -> Option<Instant> {
        *self.0.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes when it has passed.
    pub(crate) async fn passed(&self) {
        loop {
            match self.at() {
                Some(at) => {
                    sleep_until(at).await;
                    if self.at() == Some(at) {
                        return;
                    }
                }
                None => self.0.received.notified().await,
            }
        }
    }

    /// Runs an exchange up to its response, and bounds the body of that response too; `None` when the deadline passed.
    pub(crate) async fn bound(
        &self,
        exchange: impl Future<Output = Result<http::Response<Body>, Error>>,
    ) -> Option<Result<http::Response<Body>, Error>> {
        let response = tokio::select! {
            biased;
            response = exchange => response,
            () = self.passed() => return None,
        };
        // The response may begin before the request has ended; then its body waits for the start as well.
        let deadline = self.clone();
        let bound = |inner: Body| {
            if inner.is_end_stream() {
                return inner;
            }
            let timer = deadline.at().map(|at| Box::pin(sleep_until(at)));
            Body::new(Bounded { inner, deadline, timer })
        };
        Some(response.map(|response| response.map(bound)))
    }
}

struct Received {
    deadline: Deadline,
    by_piece: bool,
}

impl BodyHook for Received {
    fn on_data(&mut self, _: &Bytes) {
        if self.by_piece {
            self.deadline.start();
        }
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        if matches!(end, EndOfBody::Complete) {
            self.deadline.0.whole.store(true, Ordering::Relaxed);
        }
        self.deadline.start();
    }
}

struct Bounded {
    inner: Body,
    deadline: Deadline,
    timer: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for Bounded {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.timer.is_none() {
            self.timer = self.deadline.at().map(|at| Box::pin(sleep_until(at)));
        }
        // First, so that a body that always has more does not outrun it.
        if let Some(timer) = &mut self.timer
            && timer.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(route())));
        }
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A body that fails when nothing is received of it for `timeout`.
pub(crate) fn bound_idle(inner: Body, timeout: Duration) -> Body {
    Body::new(Idle { inner, timeout, timer: None, waiting: false })
}

struct Idle {
    inner: Body,
    timeout: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    waiting: bool,
}

impl HttpBody for Idle {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            this.waiting = false;
            return Poll::Ready(frame);
        }
        let timeout = this.timeout;
        let timer = this.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        // The time between frames in which nobody asked for one is not the upstream's.
        if !std::mem::replace(&mut this.waiting, true) {
            timer.as_mut().reset(Instant::now() + timeout);
        }
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Some(Err(idle()))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The timeout of the route.
pub(crate) fn route() -> Error {
    timed_out(ResponseFlags::UPSTREAM_REQUEST_TIMEOUT, "response_timeout", "upstream request timeout")
}

/// The timeout of a try.
pub(crate) fn per_try() -> Error {
    timed_out(ResponseFlags::UPSTREAM_REQUEST_TIMEOUT, "upstream_per_try_timeout", "upstream request timeout")
}

/// Nothing of the request passed for too long, and it is not whole.
pub(crate) fn idle_request() -> Error {
    Error::new(
        ErrorKind::Timeout,
        StatusCode::REQUEST_TIMEOUT,
        ResponseFlags::STREAM_IDLE_TIMEOUT,
        "stream_idle_timeout",
    )
    .with_body("stream timeout")
}

/// Nothing was received for too long.
pub(crate) fn idle() -> Error {
    timed_out(ResponseFlags::STREAM_IDLE_TIMEOUT, "stream_idle_timeout", "stream timeout")
}

fn timed_out(flags: ResponseFlags, details: &'static str, body: &'static str) -> Error {
    Error::new(ErrorKind::Timeout, StatusCode::GATEWAY_TIMEOUT, flags, details).with_body(body)
}
