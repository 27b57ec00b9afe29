//! The request context: what is known of one request, and the only insert into its extensions.
//!
//! Errors go up as [`Error`](crate::Error)s, but telemetry also has to count what never comes up: a client that
//! left before the response, a body cut after its headers. So the context is an `Arc` of write-through cells.
//! The edge makes it, every layer writes what it learns, telemetry keeps a clone and reads it once, at the end of
//! the body or on drop.
//!
//! The counters and flags are atomics. The rest stands behind a mutex that only this request's own future takes;
//! no other request or worker can hold it.

use std::any::Any;
use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use http::{Extensions, HeaderValue, Uri};

use crate::conn::{ConnInfo, Direction};
use crate::drain::Phase;
use crate::flags::ResponseFlags;
use crate::server::connection::InFlight;
use crate::snapshot::{Pinned, Snapshot, Snapshots};

/// A route that was selected for a request and pinned to it. The type behind it belongs to the routing crate.
pub trait PinnedRoute: Any + Send + Sync {
    /// The name that logs and metrics show.
    fn route_name(&self) -> &str;

    /// The policies that the route has, as bits that its crate gives out. A layer whose bit is not set lets the request
    /// pass without looking at the route. Default: all, so that every layer looks.
    fn policies(&self) -> u32 {
        u32::MAX
    }
}

/// What is known of one request. Cloning shares it.
#[derive(Clone)]
pub struct RequestContext(Arc<Cells>);

struct Cells {
    conn: Arc<ConnInfo>,
    /// Keeps the request counted on its connection; `None` behind a foreign server.
    in_flight: Option<InFlight>,
    snapshot: Option<Pinned>,
    received_at: Instant,
    grpc: AtomicBool,
    mirror: bool,
    /// Of the pinned route; 0 without one.
    policies: AtomicU32,
    flags: AtomicU64,
    attempts: AtomicU32,
    request_bytes: AtomicU64,
    response_bytes: AtomicU64,
    learnt: Mutex<Learnt>,
}

impl Cells {
    fn new(
        conn: Arc<ConnInfo>,
        in_flight: Option<InFlight>,
        snapshot: Option<Pinned>,
        received_at: Instant,
    ) -> Self {
        Self {
            conn,
            in_flight,
            snapshot,
            received_at,
            grpc: AtomicBool::new(false),
            mirror: false,
            policies: AtomicU32::new(0),
            flags: AtomicU64::new(0),
            attempts: AtomicU32::new(0),
            request_bytes: AtomicU64::new(0),
            response_bytes: AtomicU64::new(0),
            learnt: Mutex::default(),
        }
    }
}

#[derive(Default)]
struct Learnt {
    route: Option<Arc<dyn PinnedRoute>>,
    details: Option<Cow<'static, str>>,
    upstream: Option<UpstreamInfo>,
    transport_failure: Option<Cow<'static, str>>,
    normalized: Option<Normalized>,
}

/// The request as the edge made it: what routing, policy and telemetry all read.
#[derive(Clone, Debug, Default)]
pub struct Normalized {
    /// Authority, normalised path and query.
    pub uri: Uri,
    /// `x-request-id`, generated when there was none to trust.
    pub request_id: Option<HeaderValue>,
    /// `x-forwarded-for`, the peer appended.
    pub forwarded_for: Option<HeaderValue>,
}

/// Where the last attempt of a request went.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct UpstreamInfo {
    /// The cluster, in istiod's format.
    pub cluster: Arc<str>,
    /// The endpoint; `None` until one was picked.
    pub endpoint: Option<SocketAddr>,
    /// Our end of the connection; `None` until there was one.
    pub local: Option<SocketAddr>,
}

impl UpstreamInfo {
    /// An attempt at `cluster`, with no endpoint yet.
    #[must_use]
    pub fn new(cluster: Arc<str>) -> Self {
        Self { cluster, endpoint: None, local: None }
    }
}

impl RequestContext {
    /// A context for a request that arrived at `received_at` on `conn`, reading its models from `snapshot`.
    #[must_use]
    pub fn new(conn: Arc<ConnInfo>, snapshot: Option<Pinned>, received_at: Instant) -> Self {
        Self::make(conn, None, snapshot, received_at)
    }

    /// A context for a request on a connection of our own server.
    pub(crate) fn on_connection(in_flight: InFlight, snapshot: Option<Pinned>, received_at: Instant) -> Self {
        let conn = Arc::clone(in_flight.connection().info());
        Self::make(conn, Some(in_flight), snapshot, received_at)
    }

    fn make(
        conn: Arc<ConnInfo>,
        in_flight: Option<InFlight>,
        snapshot: Option<Pinned>,
        received_at: Instant,
    ) -> Self {
        Self(Arc::new(Cells::new(conn, in_flight, snapshot, received_at)))
    }

    /// A context for a mirrored copy of this request (VS-P02): the same connection and route, and nothing else. It
    /// pins no snapshot and does not count as in flight, so a copy that hangs holds up neither a reload nor a drain, and
    /// what it writes is seen by nobody who asks the request's own.
    #[must_use]
    pub fn of_mirror(&self) -> Self {
        let mut cells = Cells::new(Arc::clone(self.conn()), None, None, crate::clock::now());
        cells.mirror = true;
        cells.grpc = AtomicBool::new(self.is_grpc());
        cells.policies = AtomicU32::new(self.route_policies());
        cells.learnt = Mutex::new(Learnt { route: self.learnt().route.clone(), ..Learnt::default() });
        Self(Arc::new(cells))
    }

    /// Whether this is a mirrored copy: it is sampled by no trace, whatever its headers say, is not tried again, and is
    /// none of the requests that its workload has served.
    #[must_use]
    pub fn is_mirror(&self) -> bool {
        self.0.mirror
    }

    /// The context of this request. A request that has none (a lone layer over a foreign server) gets one now, with
    /// an unknown connection and no snapshot.
    pub fn ensure(extensions: &mut Extensions, direction: Direction) -> Self {
        if let Some(context) = extensions.get::<Self>() {
            return context.clone();
        }
        let context = Self::new(Arc::new(ConnInfo::unknown(direction)), None, crate::clock::now());
        extensions.insert(context.clone());
        context
    }

    /// The connection.
    #[must_use]
    pub fn conn(&self) -> &Arc<ConnInfo> {
        &self.0.conn
    }

    /// How far the drain of this request's connection is; [`Phase::Serving`] behind a foreign server.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.0.in_flight.as_ref().map_or(Phase::Serving, |in_flight| in_flight.connection().phase())
    }

    /// Waits until this request's connection is to be cut: the end of a drain. What outlives the HTTP exchange (a
    /// tunnel) ends itself then. Never completes behind a foreign server.
    pub async fn cut(&self) {
        match &self.0.in_flight {
            Some(in_flight) => in_flight.connection().cut().await,
            None => std::future::pending().await,
        }
    }

    /// Notes that whoever was to receive the response is gone, or was cut off by the end of a drain.
    pub(crate) fn downstream_left(&self) {
        self.add_flags(ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION);
        if self.phase() == Phase::Cut {
            self.add_flags(ResponseFlags::STREAM_IDLE_TIMEOUT);
        }
    }

    /// The snapshot that this request pinned when it arrived.
    #[must_use]
    pub fn snapshot(&self) -> Option<&Snapshot> {
        self.0.snapshot.as_deref().map(|pinned| &**pinned)
    }

    /// When the head of the request had been received.
    #[must_use]
    pub fn received_at(&self) -> Instant {
        self.0.received_at
    }

    /// Whether local replies take gRPC's form. Set from the request's content type by the local reply layer.
    #[must_use]
    pub fn is_grpc(&self) -> bool {
        self.0.grpc.load(Ordering::Relaxed)
    }

    /// Says that the request is gRPC.
    pub fn set_grpc(&self, grpc: bool) {
        self.0.grpc.store(grpc, Ordering::Relaxed);
    }

    /// The response flags so far.
    #[must_use]
    pub fn flags(&self) -> ResponseFlags {
        ResponseFlags::from_bits(self.0.flags.load(Ordering::Relaxed))
    }

    /// Adds response flags.
    pub fn add_flags(&self, flags: ResponseFlags) {
        self.0.flags.fetch_or(flags.bits(), Ordering::Relaxed);
    }

    /// How often the request was sent upstream.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.0.attempts.load(Ordering::Relaxed)
    }

    /// Counts one attempt and returns its number, from 1.
    pub fn count_attempt(&self) -> u32 {
        self.0.attempts.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// Bytes of request body that came from downstream so far.
    #[must_use]
    pub fn request_bytes(&self) -> u64 {
        self.0.request_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of response body that went downstream so far.
    #[must_use]
    pub fn response_bytes(&self) -> u64 {
        self.0.response_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn add_request_bytes(&self, bytes: u64) {
        self.0.request_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_response_bytes(&self, bytes: u64) {
        self.0.response_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Pins the route that was selected. A later selection replaces it.
    pub fn pin_route(&self, route: Arc<dyn PinnedRoute>) {
        self.0.policies.store(route.policies(), Ordering::Relaxed);
        self.learnt().route = Some(route);
    }

    /// The policies of the pinned route ([`PinnedRoute::policies`]); 0 without one.
    #[must_use]
    #[inline]
    pub fn route_policies(&self) -> u32 {
        self.0.policies.load(Ordering::Relaxed)
    }

    /// The pinned route, if it is an `R`.
    #[must_use]
    pub fn route<R: PinnedRoute>(&self) -> Option<Arc<R>> {
        let route: Arc<dyn PinnedRoute> = self.learnt().route.clone()?;
        let route: Arc<dyn Any + Send + Sync> = route;
        route.downcast().ok()
    }

    /// Reads the name of the pinned route.
    pub fn with_route_name<T>(&self, read: impl FnOnce(Option<&str>) -> T) -> T {
        read(self.learnt().route.as_deref().map(PinnedRoute::route_name))
    }

    /// The response code details, if any layer gave some. What comes from upstream is `via_upstream`.
    #[must_use]
    pub fn details(&self) -> Option<Cow<'static, str>> {
        self.learnt().details.clone()
    }

    /// Sets the response code details; the last word counts.
    pub fn set_details(&self, details: impl Into<Cow<'static, str>>) {
        self.learnt().details = Some(details.into());
    }

    /// Where the last attempt went.
    #[must_use]
    pub fn upstream(&self) -> Option<UpstreamInfo> {
        self.learnt().upstream.clone()
    }

    /// Says where the current attempt goes.
    pub fn set_upstream(&self, upstream: UpstreamInfo) {
        self.learnt().upstream = Some(upstream);
    }

    /// Why the transport to the upstream failed, if it did.
    #[must_use]
    pub fn transport_failure(&self) -> Option<Cow<'static, str>> {
        self.learnt().transport_failure.clone()
    }

    /// Says why the transport to the upstream failed.
    pub fn set_transport_failure(&self, reason: impl Into<Cow<'static, str>>) {
        self.learnt().transport_failure = Some(reason.into());
    }

    /// The request as the edge made it; `None` until it did.
    #[must_use]
    pub fn normalized(&self) -> Option<Normalized> {
        self.learnt().normalized.clone()
    }

    /// Keeps the request as the edge made it, for the telemetry that stands above the edge.
    pub fn set_normalized(&self, normalized: Normalized) {
        self.learnt().normalized = Some(normalized);
    }

    fn learnt(&self) -> MutexGuard<'_, Learnt> {
        self.0.learnt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives every request a context with the current snapshot, for stacks behind a foreign server or client.
///
/// A proxy's own edge does this with a copy of the worker's; here each request takes the shared one, about 20 ns.
///
/// ```
/// use http::{Request, Response};
/// use mesh_core::context::ContextLayer;
/// use mesh_core::{Body, Direction, Error, RequestContext, Snapshots};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Error> {
/// let service = ServiceBuilder::new()
///     .layer(ContextLayer::new(Snapshots::new(), Direction::Outbound))
///     .service_fn(|request: Request<Body>| async move {
///         assert!(request.extensions().get::<RequestContext>().is_some());
///         Ok::<_, Error>(Response::new(Body::empty()))
///     });
/// service.oneshot(Request::new(Body::empty())).await?;
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct ContextLayer {
    snapshots: Snapshots,
    conn: Arc<ConnInfo>,
}

impl ContextLayer {
    /// Pins the snapshot that is current when a request comes.
    #[must_use]
    pub fn new(snapshots: Snapshots, direction: Direction) -> Self {
        Self { snapshots, conn: Arc::new(ConnInfo::unknown(direction)) }
    }
}

impl<S> tower_layer::Layer<S> for ContextLayer {
    type Service = WithContext<S>;

    fn layer(&self, inner: S) -> WithContext<S> {
        WithContext { inner, layer: self.clone() }
    }
}

/// The service of [`ContextLayer`].
#[derive(Clone, Debug)]
pub struct WithContext<S> {
    inner: S,
    layer: ContextLayer,
}

impl<S, B> tower_service::Service<http::Request<B>> for WithContext<S>
where
    S: tower_service::Service<http::Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> S::Future {
        if request.extensions().get::<RequestContext>().is_none() {
            let pinned = Arc::new(self.layer.snapshots.load());
            let conn = Arc::clone(&self.layer.conn);
            request.extensions_mut().insert(RequestContext::new(conn, Some(pinned), crate::clock::now()));
        }
        self.inner.call(request)
    }
}

impl fmt::Debug for RequestContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestContext")
            .field("conn", &self.0.conn)
            .field("generation", &self.snapshot().map(Snapshot::generation))
            .field("flags", &self.flags())
            .field("attempts", &self.attempts())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(&'static str);

    impl PinnedRoute for Named {
        fn route_name(&self) -> &str {
            self.0
        }
    }

    #[test]
    fn a_clone_sees_what_another_wrote() {
        let mut extensions = Extensions::new();
        let context = RequestContext::ensure(&mut extensions, Direction::Outbound);
        let kept = context.clone();
        context.add_flags(ResponseFlags::NO_ROUTE_FOUND);
        context.set_details("route_not_found");
        context.pin_route(Arc::new(Named("first")));
        context.pin_route(Arc::new(Named("second")));
        assert_eq!(kept.flags(), ResponseFlags::NO_ROUTE_FOUND);
        assert_eq!(kept.details().as_deref(), Some("route_not_found"));
        assert_eq!(kept.with_route_name(|name| name.map(str::to_owned)).as_deref(), Some("second"));
        assert_eq!(kept.route::<Named>().map(|r| r.0), Some("second"));
        let again = RequestContext::ensure(&mut extensions, Direction::Inbound);
        assert_eq!(again.conn().direction, Direction::Outbound, "ensure keeps the context that is there");
    }
}
