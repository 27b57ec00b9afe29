//! Connections to endpoints, kept for the next request.
//!
//! One pool per endpoint, protocol and shard, over `hyper::client::conn`. A connection belongs to the shard that made
//! it; what is counted (connections and pending requests of a cluster) is counted for the whole process.
//!
//! A request that meets a connection which died while idle is recovered from hyper's `TrySendError`: it was provably
//! not written, so it goes to another connection. A request that may have been written never does.
//!
//! A connection whose server would not be trusted any more takes no other request: what is trusted is compared as one
//! number, and where it changed the sweep judges the connections that are idle, so that few requests do.
//!
//! A connection that is being made outlives the request that began it: when that one is late or served otherwise, it is
//! made for the next. Else an endpoint that takes longer to connect to than a request has would never be connected to.

mod dial;
pub(crate) mod h1;
pub(crate) mod h2;

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::StatusCode;
use mesh_core::{Error, ErrorKind, ResponseFlags, Standing};
use pin_project::pin_project;

use self::dial::Dial;
use crate::circuit_breaker;
use crate::cluster::PoolSettings;
use crate::endpoint::Endpoint;
use crate::permit::Permit;
use crate::runtime::ClusterRuntime;

/// What a connection is, beside hyper's handle.
#[derive(Debug)]
pub(crate) struct ConnMeta {
    pub(crate) local: Option<SocketAddr>,
    pub(crate) endpoint: Arc<Endpoint>,
    standing: Option<Arc<dyn Standing>>,
    pub(crate) expires: Option<Instant>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) max_requests: u32,
    pub(crate) served: u32,
}

impl ConnMeta {
    fn new(
        local: Option<SocketAddr>,
        standing: Option<Arc<dyn Standing>>,
        endpoint: &Arc<Endpoint>,
        settings: &PoolSettings,
    ) -> Self {
        Self {
            local,
            endpoint: Arc::clone(endpoint),
            standing,
            expires: settings
                .max_connection_duration
                .and_then(|duration| mesh_core::clock::now().checked_add(duration)),
            idle_timeout: settings.idle_timeout,
            max_requests: settings.max_requests_per_connection.unwrap_or(u32::MAX),
            served: 0,
        }
    }

    /// Whether it may take another request.
    fn is_fresh(&self, now: impl FnOnce() -> Instant) -> bool {
        !self.endpoint.is_retired()
            && self.served < self.max_requests
            && self.expires.is_none_or(|expires| now() < expires)
            && self.standing.as_ref().is_none_or(|standing| standing.holds())
    }

    /// What it stands on, where that is not judged by what is trusted now.
    fn unjudged(&self) -> Option<Arc<dyn Standing>> {
        self.standing.as_ref().filter(|standing| !standing.is_judged()).map(Arc::clone)
    }
}

/// Counts an open connection in its cluster and at its endpoint; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    runtime: Arc<ClusterRuntime>,
    endpoint: Arc<Endpoint>,
    permit: Option<Permit<ClusterRuntime>>,
}

impl Slot {
    /// Takes a slot below the limit; `first` says that the shard has no connection to the endpoint, and may always
    /// have one, so that no worker starves.
    pub(crate) fn acquire(
        runtime: &Arc<ClusterRuntime>,
        endpoint: &Arc<Endpoint>,
        settings: &PoolSettings,
        first: bool,
    ) -> Option<Self> {
        let counter: fn(&ClusterRuntime) -> &AtomicU32 = |runtime| &runtime.connections;
        let permit = match Permit::acquire(runtime, counter, settings.max_connections) {
            Some(permit) => permit,
            None if first => Permit::force(runtime, counter),
            None => return None,
        };
        endpoint.connections_counter().fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Some(Self { runtime: Arc::clone(runtime), endpoint: Arc::clone(endpoint), permit: Some(permit) })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.endpoint.connections_counter().fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        // The slot must be free before anyone who waits for it is told.
        self.permit = None;
        self.runtime.freed.notify_waiters();
    }
}

/// A request that was handed to its connection. Without one there is nothing to wait for, and no end of it.
#[pin_project]
pub(crate) struct Handed<F>(#[pin] pub(crate) Option<F>);

impl<F: Future> Future for Handed<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        match self.project().0.as_pin_mut() {
            Some(handed) => handed.poll(cx),
            None => Poll::Pending,
        }
    }
}

/// A place among the requests that wait for a connection.
fn pending(runtime: &Arc<ClusterRuntime>, settings: &PoolSettings) -> Result<Permit<ClusterRuntime>, Error> {
    Permit::acquire(runtime, |runtime| &runtime.pending, settings.max_pending_requests)
        .ok_or_else(|| overflow(runtime))
}

/// A limit of the cluster refuses the request.
pub(crate) fn overflow(runtime: &ClusterRuntime) -> Error {
    runtime.overflows.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    circuit_breaker::overflow()
}

/// What hyper says of an exchange that failed after the request may have been written, for a client over
/// `hyper::client::conn` whose requests go through layers: retries and outlier detection read its kind. A connection that
/// could not be made is not hyper's to tell; that is [`ErrorKind::ConnectFailure`].
#[must_use]
pub fn upstream_error(error: hyper::Error) -> Error {
    let mut kind = ErrorKind::UpstreamReset;
    let (status, flags, reason) = if error.is_parse() || error.is_parse_too_large() {
        kind = ErrorKind::UpstreamProtocol;
        (StatusCode::BAD_GATEWAY, ResponseFlags::UPSTREAM_PROTOCOL_ERROR, "protocol_error")
    } else if let Some(reset) = h2_error(&error) {
        if reset.reason() == Some(::h2::Reason::REFUSED_STREAM) || reset.is_go_away() {
            kind = ErrorKind::RefusedStream;
        }
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        if reset.is_io() {
            (unavailable, ResponseFlags::UPSTREAM_CONNECTION_TERMINATION, "connection_termination")
        } else if reset.is_remote() {
            (unavailable, ResponseFlags::UPSTREAM_REMOTE_RESET, "remote_reset")
        } else {
            kind = ErrorKind::UpstreamProtocol;
            (StatusCode::BAD_GATEWAY, ResponseFlags::UPSTREAM_PROTOCOL_ERROR, "protocol_error")
        }
    } else {
        if let Some(downstream) = downstream_error(&error) {
            return downstream;
        }
        (
            StatusCode::SERVICE_UNAVAILABLE,
            ResponseFlags::UPSTREAM_CONNECTION_TERMINATION,
            "connection_termination",
        )
    };
    Error::new(kind, status, flags, format!("upstream_reset_before_response_started{{{reason}}}"))
        .with_body(format!(
            "upstream connect error or disconnect/reset before headers. reset reason: {}",
            reason.replace('_', " ")
        ))
        .with_source(error)
}

/// The body of the request failed: the downstream did, not the upstream.
fn downstream_error(error: &hyper::Error) -> Option<Error> {
    std::error::Error::source(error)?.downcast_ref::<Error>().map(again)
}

/// The same error for another request.
fn again(error: &Error) -> Error {
    let mut again = Error::new(error.kind(), error.status(), error.flags(), error.details().to_owned())
        .with_body(error.body().clone());
    *again.headers_mut() = error.headers().clone();
    match std::error::Error::source(error) {
        Some(source) => again.with_source(source.to_string()),
        None => again,
    }
}

fn h2_error(error: &hyper::Error) -> Option<&::h2::Error> {
    std::error::Error::source(error)?.downcast_ref()
}
