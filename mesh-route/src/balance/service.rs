//! Load balancing by itself: one service over a service for each endpoint.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use mesh_core::{
    Body, BodyHook, BoxError, ConnInfo, Direction, EndOfBody, Error, RequestContext, UpstreamInfo,
};
use pin_project::pin_project;
use tower_service::Service;

use super::{Choice, peak_ewma};
use crate::cluster::{BalancerKind, Cluster, ClusterSpec, Discovery, EndpointSpec};
use crate::endpoint::{Endpoint, InFlight};
use crate::forward::give_cookie;
use crate::grpc;
use crate::hash_policy::RequestKey;
use crate::outlier::{Observation, no_healthy_upstream};
use crate::request_view::RequestView;
use crate::retry::PreviousHosts;
use crate::runtime::{ClusterRuntime, Clusters};
use crate::shard::Shard;

/// A balance over endpoints that are found at run time: it has a service for each endpoint, so they are a fixed list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a balance is over a fixed list of endpoints")]
pub struct NotStatic;

/// Sends each request to one of many services, and leaves out those that keep failing (DR-LB01 to DR-LB10, DR-OD01 to
/// DR-OD08).
///
/// Of the [`ClusterSpec`] it reads the endpoints with their weights, localities and priorities, the algorithm, the key of
/// a request, the warm-up, and outlier detection; connections are the services' business. A request goes by its key, if
/// the spec has one, and counts at its endpoint until its response has ended. Where no endpoint is available it is
/// answered 503 `UH`.
///
/// It is always ready: which service has to be is not known before the request, which then waits for it. A
/// [`CircuitBreakerLayer`](crate::CircuitBreakerLayer) around it, or around each service, bounds how many do. Below a
/// [`RetryLayer`](crate::RetryLayer) a retry goes to endpoints that were not tried (VS-Y07), if the request has a
/// [`RequestContext`], as it has below a [`LocalReplyLayer`](mesh_core::LocalReplyLayer).
///
/// ```
/// use http::{Request, Response, StatusCode};
/// use mesh_core::{Body, ClusterName, Direction, Error, LocalReplyLayer};
/// use mesh_route::{Balance, ClusterSpec, Clusters, Discovery, EndpointSpec, OutlierDetection};
/// use mesh_route::{RetryLayer, RetryOn, RetryPolicy};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let endpoints = (1..=3).map(|host| EndpointSpec::new(([10, 0, 0, host], 80).into())).collect();
/// let mut spec = ClusterSpec::new(ClusterName::custom("reviews"), Discovery::Static(endpoints));
/// spec.outlier_detection = Some(Box::new(OutlierDetection { max_ejection_percent: 50, ..OutlierDetection::default() }));
/// // A service for each endpoint: a hyper client, a tonic channel. Here the first one is broken.
/// let balance = Balance::new(spec, &Clusters::new(), |endpoint| {
///     let broken = endpoint.addr == ([10, 0, 0, 1], 80).into();
///     service_fn(move |_: Request<Body>| async move {
///         let mut response = Response::new(Body::empty());
///         if broken {
///             *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
///         }
///         Ok::<_, Error>(response)
///     })
/// })?;
/// let client = ServiceBuilder::new()
///     .layer(LocalReplyLayer::new(Direction::Outbound))
///     .layer(RetryLayer::new(RetryPolicy::new(2, RetryOn::parse("503")?)))
///     .service(balance.clone());
/// for _ in 0..100 {
///     assert_eq!(client.clone().oneshot(Request::new(Body::empty())).await?.status(), 200);
/// }
/// assert_eq!(balance.runtime().with_outliers(|outliers| outliers.ejected()), 1);
/// # Ok(())
/// # }
/// # let mut runtime = tokio::runtime::Builder::new_current_thread();
/// # runtime.enable_time().start_paused(true).build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Debug)]
pub struct Balance<S> {
    group: Arc<Group<S>>,
    shard: Arc<Shard>,
}

struct Group<S> {
    cluster: Arc<Cluster>,
    runtime: Arc<ClusterRuntime>,
    services: HashMap<u64, S, foldhash::fast::RandomState>,
    /// That of a request without a context.
    conn: ConnInfo,
}

impl<S> Balance<S> {
    /// A service over what `make` makes for each endpoint. Ejections and counts are kept in `clusters`, by the name of
    /// the cluster, so that whoever makes another balance of this name there goes on with them.
    ///
    /// # Errors
    /// When the endpoints are not a fixed list.
    pub fn new(
        spec: ClusterSpec,
        clusters: &Clusters,
        mut make: impl FnMut(&EndpointSpec) -> S,
    ) -> Result<Self, NotStatic> {
        let Discovery::Static(endpoints) = &spec.discovery else { return Err(NotStatic) };
        let mut made: HashMap<_, _> = endpoints.iter().map(|spec| (spec.addr, make(spec))).collect();
        let cluster = Arc::new(Cluster::new(spec));
        clusters.reconcile(std::slice::from_ref(&cluster));
        let runtime = cluster.runtime().map(Arc::clone).ok_or(NotStatic)?;
        let endpoints = cluster.endpoints();
        let services = endpoints
            .iter()
            .filter_map(|endpoint| Some((endpoint.id(), made.remove(&endpoint.addr())?)))
            .collect();
        let conn = ConnInfo::unknown(Direction::Outbound);
        let group = Group { cluster, runtime, services, conn };
        Ok(Self { group: Arc::new(group), shard: Shard::new() })
    }

    /// Draws from this seed, so that its choices can be replayed.
    #[must_use]
    pub fn seeded(self, seed: u64) -> Self {
        Self { shard: Shard::seeded(seed), ..self }
    }

    /// Its counts and ejections.
    #[must_use]
    pub fn runtime(&self) -> &Arc<ClusterRuntime> {
        &self.group.runtime
    }

    fn pick<B>(&self, request: &mut Request<B>) -> Option<(Arc<Endpoint>, RequestKey)> {
        let Group { cluster, runtime, conn, .. } = &*self.group;
        let context = request.extensions().get::<RequestContext>().cloned();
        let key = match &cluster.spec().hash_policy {
            None => RequestKey::Missing,
            Some(policy) => {
                let conn = context.as_ref().map_or(conn, |context| context.conn());
                policy.hash_or_issue(&RequestView::new(request, conn), conn, &mut self.shard.lock().rng)
            }
        };
        let previous = request.extensions_mut().remove::<PreviousHosts>();
        let tried = previous.as_ref().map(|previous| self.ids(previous)).unwrap_or_default();
        let choice = Choice {
            hash: key.hash(),
            tried: &tried,
            ignore_previous_hosts: previous.as_ref().is_some_and(|previous| previous.ignore),
            remote_localities: previous.is_some_and(|previous| previous.remote_localities),
        };
        let endpoint = self.shard.pick(cluster, runtime, &choice);
        if let Some(context) = context {
            let mut upstream = UpstreamInfo::new(cluster.name().shared());
            upstream.endpoint = endpoint.as_ref().map(|endpoint| endpoint.addr());
            context.set_upstream(upstream);
        }
        endpoint.map(|endpoint| (endpoint, key))
    }

    /// The endpoints that were tried, in order.
    fn ids(&self, previous: &PreviousHosts) -> Vec<u64> {
        let endpoints = self.group.cluster.endpoints();
        let of = |addr| endpoints.iter().find(|endpoint| endpoint.addr() == addr);
        previous.addrs.iter().filter_map(|addr| of(*addr)).map(|endpoint| endpoint.id()).collect()
    }
}

impl<S> Group<S> {
    fn observe(&self, endpoint: &Endpoint, seen: Observation) {
        if let Some(config) = &self.cluster.spec().outlier_detection {
            self.runtime.observe(config, endpoint, seen, || self.cluster.endpoints().len());
        }
    }
}

impl<S> Clone for Balance<S> {
    fn clone(&self) -> Self {
        Self { group: Arc::clone(&self.group), shard: Arc::clone(&self.shard) }
    }
}

impl<S> fmt::Debug for Group<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("runtime", &self.runtime).finish_non_exhaustive()
    }
}

impl<S, B, R> Service<Request<B>> for Balance<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    S::Error: Into<Error>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<B>) -> ResponseFuture<S, B> {
        let picked = self.pick(&mut request).and_then(|(endpoint, key)| {
            let service = self.group.services.get(&endpoint.id())?.clone();
            Some((endpoint, key, service))
        });
        let Some((endpoint, key, service)) = picked else {
            return ResponseFuture { state: State::Refused(Some(no_healthy_upstream())), sent: None };
        };
        let sent = Sent {
            in_flight: endpoint.start_request(),
            group: Arc::clone(&self.group),
            started: (self.group.cluster.spec().balancer == BalancerKind::PeakEwma)
                .then(mesh_core::clock::now),
            endpoint,
            key,
        };
        ResponseFuture { state: State::Readying(service, Some(request)), sent: Some(sent) }
    }
}

/// The future of [`Balance`].
#[pin_project]
pub struct ResponseFuture<S: Service<Request<B>>, B> {
    #[pin]
    state: State<S, B>,
    sent: Option<Sent<S>>,
}

#[pin_project(project = StateProjection)]
#[allow(clippy::large_enum_variant, reason = "the future of a service holds its request too")]
enum State<S: Service<Request<B>>, B> {
    /// The request is there until the service is ready.
    Readying(S, Option<Request<B>>),
    Running(#[pin] S::Future),
    Refused(Option<Error>),
}

/// A request that has its endpoint.
struct Sent<S> {
    in_flight: InFlight,
    group: Arc<Group<S>>,
    endpoint: Arc<Endpoint>,
    key: RequestKey,
    /// `None` where latency does not count.
    started: Option<Instant>,
}

impl<S> Sent<S> {
    fn failed(self, error: Error) -> Error {
        if let Some(seen) = Observation::of_failure(error.kind()) {
            self.took(|_| peak_ewma::FAILED);
            self.group.observe(&self.endpoint, seen);
        }
        error
    }

    fn answered(self, mut response: Response<Body>) -> Response<Body> {
        self.took(|took| took);
        let seen = Observation::of_response(response.status(), grpc::status(response.headers()));
        self.group.observe(&self.endpoint, seen);
        if let RequestKey::Issued(issued) = self.key {
            give_cookie(self.group.cluster.spec(), issued, &mut response);
        }
        response.map(|body| {
            if body.is_end_stream() { body } else { body.with_hook(Counted { _in_flight: self.in_flight }) }
        })
    }

    fn took(&self, measure: impl FnOnce(Duration) -> Duration) {
        if let Some(started) = self.started {
            let now = mesh_core::clock::now();
            self.endpoint.observe(measure(now.saturating_duration_since(started)), now);
        }
    }
}

/// Counts a request at its endpoint until its response has ended.
struct Counted {
    _in_flight: InFlight,
}

impl BodyHook for Counted {
    fn on_end(&mut self, _: EndOfBody<'_>) {}
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
            let outcome = match this.state.as_mut().project() {
                StateProjection::Readying(service, request) => match ready!(service.poll_ready(cx)) {
                    Ok(()) => {
                        // Polled after it was ready, which the contract of futures forbids.
                        let Some(request) = request.take() else { return Poll::Pending };
                        let future = service.call(request);
                        this.state.set(State::Running(future));
                        continue;
                    }
                    Err(error) => Err(error.into()),
                },
                StateProjection::Running(future) => ready!(future.poll(cx)).map_err(Into::into),
                StateProjection::Refused(error) => {
                    return error.take().map_or(Poll::Pending, |error| Poll::Ready(Err(error)));
                }
            };
            let Some(sent) = this.sent.take() else { return Poll::Pending };
            return Poll::Ready(match outcome {
                Ok(response) => Ok(sent.answered(response.map(Body::new))),
                Err(error) => Err(sent.failed(error)),
            });
        }
    }
}

impl<S: Service<Request<B>>, B> fmt::Debug for ResponseFuture<S, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Readying(..) => "readying",
            State::Running(_) => "running",
            State::Refused(_) => "refused",
        };
        f.debug_tuple("ResponseFuture").field(&state).finish()
    }
}

#[cfg(test)]
mod tests;
