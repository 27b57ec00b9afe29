//! How long a request may take.
//!
//! The timeout of the route (VS-T01) goes from the end of the request to the end of the response. The timer starts when
//! the whole request has been received, so a slow upload is not counted; one that nobody has begun to read is waited for
//! as if it were whole. It covers everything after that: waiting for a connection, every attempt, and the body of the
//! response. A route without a timeout has none of this.
//!
//! A try has its own (VS-Y02), up to the head of its response. The idle timeout runs from the beginning, and begins
//! again with whatever passes: what the upstream takes of the request, and what it sends. Whoever lets it pass before
//! the request is whole is told 408, as by Envoy, and it says nothing of the endpoint.
//! Without any of these a request has no timer at all.
//!
//! A gRPC client says with `grpc-timeout` how long it waits. That holds, but never for longer than the route allows.

mod deadline;
mod idle;
mod layer;
mod limits;
mod timers;

use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use mesh_core::{Error, ErrorKind, RequestContext, ResponseFlags, vendor};

pub(crate) use self::deadline::{Deadline, bound};
pub(crate) use self::idle::Idle;
pub use self::layer::{Timeout, TimeoutLayer};
pub(crate) use self::limits::Limits;
pub(crate) use self::timers::Timers;

use crate::overrides::Overrides;
use crate::route::Forward;

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
    since: Option<Instant>,
}

impl Timeouts {
    /// Those of a route.
    pub(crate) fn of(
        forward: &Forward,
        overrides: Option<&Overrides>,
        headers: &HeaderMap,
        grpc: bool,
        cx: &RequestContext,
    ) -> Self {
        let route = match overrides.and_then(|overrides| overrides.timeout) {
            Some(timeout) => Some(timeout).filter(|timeout| !timeout.is_zero()),
            None => forward.timeout,
        };
        let per_try = overrides.and_then(|overrides| overrides.per_try).or(forward.retry.per_try_timeout);
        Self { route, per_try, idle: forward.idle_timeout, since: None }
            .capped(headers, grpc, || cx.received_at())
    }

    /// The same, but not longer than the client waits, who began to wait when it sent the request.
    fn capped(mut self, headers: &HeaderMap, grpc: bool, received_at: impl FnOnce() -> Instant) -> Self {
        if grpc && let Some(client) = grpc_timeout(headers) {
            let gone = mesh_core::clock::now().saturating_duration_since(received_at());
            let client = client.saturating_sub(gone).max(Duration::from_millis(1));
            self.route = Some(self.route.map_or(client, |route| route.min(client)));
        }
        // One that is not shorter than the whole has no effect (VS-Y02).
        let Self { route, per_try, .. } = self;
        self.per_try =
            per_try.filter(|per_try| !per_try.is_zero() && route.is_none_or(|route| *per_try < route));
        self.since = (self.route.is_some() || self.per_try.is_some()).then(mesh_core::clock::now);
        self
    }

    /// Tells the upstream how long it is waited for, as Envoy does: what it does after that is in vain.
    pub(crate) fn announce(
        &self,
        headers: &mut HeaderMap,
        grpc: bool,
        millis: impl FnOnce(u64) -> HeaderValue,
    ) {
        let Some(since) = self.since else { return };
        // In whole milliseconds, as they are announced: what has just begun has all its time.
        let gone = mesh_core::clock::now().saturating_duration_since(since).as_millis() as u64;
        // Out of time is still a millisecond: zero would be no limit.
        let left = self.route.map(|route| route.saturating_sub(Duration::from_millis(gone)));
        let left = left.map(|left| left.max(Duration::from_millis(1)));
        let Some(left) = [left, self.per_try].into_iter().flatten().min() else { return };
        vendor::EXPECTED_RQ_TIMEOUT_MS.insert(headers, millis(left.as_millis() as u64));
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
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
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
