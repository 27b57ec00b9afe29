//! The route timeout (VS-T01): from the end of the request to the end of the response.
//!
//! The timer starts when the whole request has been received, so a slow upload is not counted. It covers everything
//! after that: waiting for a connection, every attempt, and the body of the response. A route without a timeout has
//! none of this.
//!
//! A gRPC client says with `grpc-timeout` how long it waits. That holds, but never for longer than the route allows.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use mesh_core::{Body, BodyHook, EndOfBody, Error, ErrorKind, ResponseFlags};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

/// How long the exchange of a request may take, by its route and, for gRPC, its client; `None` is no limit.
pub(crate) fn of(route: Option<Duration>, headers: &HeaderMap) -> Option<Duration> {
    match (route, grpc_timeout(headers)) {
        (Some(route), Some(client)) => Some(route.min(client)),
        (route, client) => route.or(client),
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
}

impl Deadline {
    /// A deadline for a request with this body; the body says when it has been received.
    pub(crate) fn new(timeout: Duration, body: Body) -> (Self, Body) {
        let deadline = Self(Arc::new(Shared { timeout, at: Mutex::default(), received: Notify::new() }));
        if body.is_end_stream() {
            deadline.start();
            return (deadline, body);
        }
        let hook = Received(deadline.clone());
        (deadline, body.with_hook(hook))
    }

    fn start(&self) {
        *self.0.at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + self.0.timeout);
        self.0.received.notify_one();
    }

    fn at(&self) -> Option<Instant> {
        *self.0.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn passed(&self) {
        loop {
            match self.at() {
                Some(at) => return sleep_until(at).await,
                None => self.0.received.notified().await,
            }
        }
    }

    /// Runs an exchange up to its response, and bounds the body of that response too.
    pub(crate) async fn bound(
        &self,
        exchange: impl Future<Output = Result<http::Response<Body>, Error>>,
    ) -> Result<http::Response<Body>, Error> {
        let response = tokio::select! {
            biased;
            response = exchange => response?,
            () = self.passed() => return Err(timed_out()),
        };
        // The response may begin before the request has ended; then its body waits for the start as well.
        let deadline = self.clone();
        Ok(response.map(|inner| {
            if inner.is_end_stream() {
                return inner;
            }
            let timer = deadline.at().map(|at| Box::pin(sleep_until(at)));
            Body::new(Bounded { inner, deadline, timer })
        }))
    }
}

struct Received(Deadline);

impl BodyHook for Received {
    fn on_end(&mut self, _: EndOfBody<'_>) {
        self.0.start();
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
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        if self.timer.is_none() {
            self.timer = self.deadline.at().map(|at| Box::pin(sleep_until(at)));
        }
        if let Some(timer) = &mut self.timer
            && timer.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(timed_out())));
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

fn timed_out() -> Error {
    Error::new(
        ErrorKind::Timeout,
        StatusCode::GATEWAY_TIMEOUT,
        ResponseFlags::UPSTREAM_REQUEST_TIMEOUT,
        "response_timeout",
    )
    .with_body("upstream request timeout")
}
