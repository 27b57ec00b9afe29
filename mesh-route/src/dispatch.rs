//! The end of every stack: does what the pinned route says.
//!
//! A redirect or a direct response is made here. A forward goes through, in this order: the weighted destination
//! (chosen once), its header operations, the rewrite, the limit on requests, the pick of an endpoint, a connection of
//! the shard's pool, the exchange. What fails is a [`mesh_core::Error`] with Envoy's flags and details.
//!
//! It is always ready: readiness depends on a route that is not known before the request. Back-pressure is the limits
//! of the cluster.
//!
//! **One exchange, exact books.** The request's place in the limits, its count at the endpoint and its connection are
//! held by the *body* of the response, and given back when that ends or is dropped. A connection goes back to the
//! pool only after a whole response, and is used again only when hyper says that both bodies are done.
//!
//! **Upgrades.** Only here is the downstream's upgrade taken. Bytes flow when the upstream has answered 101, never
//! before; the tunnel holds the books of its request and ends with the connection's drain.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use http::header::{CONNECTION, HOST, UPGRADE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use mesh_core::{
    Body, BodyHook, Direction, EndOfBody, Error, ErrorKind, RequestContext, ResponseFlags, Side, UpstreamInfo,
};
use tower_service::Service;

use crate::cluster::{BalancerKind, Cluster, Discovery, UpstreamProtocol};
use crate::endpoint::{Endpoint, InFlight};
use crate::headers::FormatContext;
use crate::headers_layer::AfterRoute;
use crate::pool::{exchange_error, h1, h2, overflow};
use crate::request_view::RequestView;
use crate::route::{ActionKind, Destination, Forward, Route};
use crate::runtime::{ClusterRuntime, Permit};
use crate::shard::Shard;
use crate::timeout::{self, Deadline};

const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// How often an unsent request is put on another connection. Idle connections may all have died together, so the
/// last try is always on a new one.
const UNSENT_TRIES: u32 = 4;

/// The service that does what the pinned route says. Always ready; cloning shares the shard.
///
/// In a proxy, build one per worker with the worker's own [`Shard`]. Embedded in a multi-threaded runtime one shard
/// serves all tasks; its lock is held for a few map operations.
///
/// ```no_run
/// use std::sync::Arc;
/// use http::Request;
/// use mesh_core::{Body, ClusterName, Slot};
/// use mesh_route::{Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, HeadersLayer, RouteBuilder};
/// use mesh_route::{RouteTable, SelectRouteLayer, Shard, dispatch};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let endpoints = Discovery::Static(vec![EndpointSpec::new("127.0.0.1:9080".parse()?)]);
/// let reviews = Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom("reviews"), endpoints)));
/// Clusters::new().reconcile(std::slice::from_ref(&reviews));
/// let table = RouteTable::builder()
///     .host("reviews", [RouteBuilder::new("all").forward(reviews)?])
///     .build()?;
///
/// let client = ServiceBuilder::new()
///     .layer(SelectRouteLayer::new(Slot::fixed(table)))
///     .layer(HeadersLayer::new())
///     .service(dispatch(Shard::new()));
/// let response = client.oneshot(Request::get("http://reviews/").body(Body::empty())?).await?;
/// # drop(response);
/// # Ok(())
/// # }
/// ```
pub fn dispatch(
    shard: Arc<Shard>,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Error, Future: Send> + Clone + Send {
    Dispatch { shard, run }
}

/// Generic in its future, so that an async function needs no box to be one.
#[derive(Clone, Debug)]
struct Dispatch<F> {
    shard: Arc<Shard>,
    run: F,
}

impl<F, Fut> Service<Request<Body>> for Dispatch<F>
where
    F: Fn(Arc<Shard>, Request<Body>) -> Fut,
    Fut: Future<Output = Result<Response<Body>, Error>>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Fut;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Fut {
        (self.run)(Arc::clone(&self.shard), request)
    }
}

async fn run(shard: Arc<Shard>, mut request: Request<Body>) -> Result<Response<Body>, Error> {
    let cx = RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
    if *request.method() == Method::CONNECT {
        return Err(local_reply(StatusCode::METHOD_NOT_ALLOWED, ResponseFlags::NONE, "connect_not_allowed"));
    }
    let route = cx.route::<Route>().ok_or_else(|| {
        local_reply(StatusCode::NOT_FOUND, ResponseFlags::NO_ROUTE_FOUND, "route_not_found")
    })?;
    match &route.action().kind {
        ActionKind::Redirect(redirect) => redirect.respond(&RequestView::new(&request, cx.conn()), &cx),
        ActionKind::DirectResponse(direct) => Ok(direct.respond(&cx)),
        ActionKind::Forward(to) => forward(&shard, to, &cx, &mut request).await,
    }
}

/// The request stays where it is and is passed by reference until it is sent: what an async function takes by value
/// lies in its future once more, and futures are copied.
async fn forward(
    shard: &Arc<Shard>,
    forward: &Forward,
    cx: &RequestContext,
    request: &mut Request<Body>,
) -> Result<Response<Body>, Error> {
    let destination = forward.destinations.pick(&mut shard.lock().rng);
    cx.set_upstream(UpstreamInfo::new(destination.name.shared()));
    let known = destination.cluster.as_ref().and_then(|cluster| Some((cluster, cluster.runtime()?)));
    let Some((cluster, runtime)) = known else {
        return Err(local_reply(
            StatusCode::SERVICE_UNAVAILABLE,
            ResponseFlags::NO_CLUSTER_FOUND,
            "cluster_not_found",
        ));
    };
    if cluster.spec().discovery == Discovery::BlackHole {
        return Err(local_reply(StatusCode::BAD_GATEWAY, ResponseFlags::NONE, "direct_response"));
    }
    let version = request.version();
    let on_upgrade = take_upgrade(request);
    edit(request, forward, destination, cx)?;
    let permit = Permit::acquire(runtime, |runtime| &runtime.requests, cluster.spec().pool.max_requests)
        .ok_or_else(|| overflow(runtime))?;
    let deadline = timeout::of(forward.timeout, request.headers()).map(|timeout| {
        let (deadline, body) = Deadline::new(timeout, std::mem::take(request.body_mut()));
        *request.body_mut() = body;
        deadline
    });

    let attempt = Attempt { shard, cx, cluster, runtime, version, upgrade: on_upgrade.is_some() };
    let exchange = std::pin::pin!(attempt.run(request, permit, on_upgrade));
    let mut response = match deadline {
        None => exchange.await,
        Some(deadline) => deadline.bound(exchange).await,
    };
    apply_response_headers(destination, cx, version, &mut response);
    response
}

/// The destination's header operations, then the rewrite.
fn edit(
    request: &mut Request<Body>,
    forward: &Forward,
    destination: &Destination,
    cx: &RequestContext,
) -> Result<(), Error> {
    if !destination.request_headers.is_empty() {
        destination.request_headers.apply_to_request(request, cx);
    }
    forward.rewrite.apply_path(request)?;
    if let Some(authority) = forward.rewrite.authority.as_ref().or(destination.authority.as_ref()) {
        set_authority(request, authority.clone());
    }
    Ok(())
}

/// Where one request goes and for whom.
struct Attempt<'a> {
    shard: &'a Arc<Shard>,
    cx: &'a RequestContext,
    cluster: &'a Arc<Cluster>,
    runtime: &'a Arc<ClusterRuntime>,
    version: Version,
    upgrade: bool,
}

enum Lease {
    Http1(h1::Lease),
    Http2(h2::Lease),
}

impl Attempt<'_> {
    async fn run(
        &self,
        request: &mut Request<Body>,
        permit: Permit,
        on_upgrade: Option<OnUpgrade>,
    ) -> Result<Response<Body>, Error> {
        let started = mesh_core::clock::now();
        if self.cx.count_attempt() == 1 {
            request.headers_mut().insert(ATTEMPT_COUNT, HeaderValue::from_static("1"));
        }
        let http2 = !self.upgrade && self.speaks_http2();
        prepare(request, http2, self.cx)?;
        let mut tries = 0;
        let (lease, in_flight, response) = loop {
            tries += 1;
            let endpoint = self.pick()?;
            let in_flight = endpoint.start_request();
            let mut lease = match self.open(&endpoint, http2) {
                Some(lease) => lease,
                // Boxed: a connection costs more than a box, and the future of every request would hold its making.
                None => Box::pin(self.lease(&endpoint, http2)).await?,
            };
            self.note(&endpoint, &mut lease);
            let taken = std::mem::take(request);
            let sent = match &mut lease {
                Lease::Http1(lease) => lease.send(taken).await,
                Lease::Http2(lease) => lease.send(taken).await,
            };
            match sent {
                Ok(response) => break (lease, in_flight, response),
                // Provably not written.
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) if tries < UNSENT_TRIES => *request = unsent,
                    _ => return Err(exchange_error(failed.into_error())),
                },
            }
        };
        self.respond(
            response,
            Books { lease: Some(lease), _in_flight: in_flight, _permit: permit },
            started,
            on_upgrade,
        )
    }

    fn speaks_http2(&self) -> bool {
        match self.cluster.spec().protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            UpstreamProtocol::Downstream => self.version == Version::HTTP_2,
        }
    }

    fn pick(&self) -> Result<Arc<Endpoint>, Error> {
        let spec = self.cluster.spec();
        let original = self.cx.conn().original_dst;
        let endpoint = match (&spec.discovery, spec.balancer) {
            (Discovery::OriginalDst, _) | (_, BalancerKind::Passthrough) => {
                original.map(|addr| self.runtime.endpoint(addr))
            }
            (Discovery::OriginalDstPort(port), _) => original.map(|mut addr| {
                addr.set_port(*port);
                self.runtime.endpoint(addr)
            }),
            (_, kind) => self.shard.pick(kind, self.runtime, &self.cluster.endpoints()),
        };
        endpoint.ok_or_else(|| {
            Error::new(
                ErrorKind::NoHealthyUpstream,
                StatusCode::SERVICE_UNAVAILABLE,
                ResponseFlags::NO_HEALTHY_UPSTREAM,
                "no_healthy_upstream",
            )
            .with_body("no healthy upstream")
        })
    }

    /// What is open already, if it has room.
    fn open(&self, endpoint: &Endpoint, http2: bool) -> Option<Lease> {
        if http2 {
            h2::Lease::idle(self.shard, endpoint).map(Lease::Http2)
        } else {
            h1::Lease::idle(self.shard, endpoint).map(Lease::Http1)
        }
    }

    async fn lease(&self, endpoint: &Arc<Endpoint>, http2: bool) -> Result<Lease, Error> {
        let spec = self.cluster.spec();
        let leased = if http2 {
            h2::Lease::acquire(self.shard, self.runtime, spec, endpoint).await.map(Lease::Http2)
        } else {
            h1::Lease::acquire(self.shard, self.runtime, spec, endpoint).await.map(Lease::Http1)
        };
        leased.inspect_err(|error| {
            if let Some(source) = std::error::Error::source(error) {
                self.cx.set_transport_failure(source.to_string());
            }
        })
    }

    fn note(&self, endpoint: &Endpoint, lease: &mut Lease) {
        let mut upstream = UpstreamInfo::new(self.cluster.name().shared());
        upstream.endpoint = Some(endpoint.addr());
        upstream.local = match lease {
            Lease::Http1(lease) => lease.meta().local,
            Lease::Http2(lease) => lease.local(),
        };
        self.cx.set_upstream(upstream);
    }

    fn respond(
        &self,
        mut response: Response<Incoming>,
        books: Books,
        started: Instant,
        on_upgrade: Option<OnUpgrade>,
    ) -> Result<Response<Body>, Error> {
        let took = mesh_core::clock::now().saturating_duration_since(started);
        self.cx.set_details("via_upstream");
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(downstream) = on_upgrade else {
                return Err(Error::new(
                    ErrorKind::UpstreamProtocol,
                    StatusCode::BAD_GATEWAY,
                    ResponseFlags::UPSTREAM_PROTOCOL_ERROR,
                    "upstream_reset_before_response_started{protocol_error}",
                ));
            };
            let upstream = hyper::upgrade::on(&mut response);
            tokio::spawn(tunnel(downstream, upstream, books, self.cx.clone()));
            return Ok(response.map(|_| Body::empty()));
        }
        response.headers_mut().insert(SERVICE_TIME, HeaderValue::from(took.as_millis() as u64));
        // Over HTTP/2 an upstream can send a body where there is none; HTTP/1.1 would read it as the next answer.
        let bodiless = matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        Ok(response.map(|incoming| {
            let body = Body::from_incoming(incoming, Side::Upstream);
            if bodiless && !body.is_end_stream() {
                books.close(false);
                Body::empty()
            } else if body.is_end_stream() {
                books.close(true);
                body
            } else {
                body.with_hook(books)
            }
        }))
    }
}

/// What a request holds until its response has ended.
struct Books {
    lease: Option<Lease>,
    _in_flight: InFlight,
    _permit: Permit,
}

impl Books {
    /// Gives everything back; the connection too, when the response came whole.
    fn close(mut self, whole: bool) {
        self.end(whole);
    }

    fn end(&mut self, whole: bool) {
        if let Some(Lease::Http1(lease)) = self.lease.take()
            && whole
        {
            lease.give_back();
        }
    }
}

impl BodyHook for Books {
    fn on_end(&mut self, end: EndOfBody<'_>) {
        self.end(matches!(end, EndOfBody::Complete));
    }
}

/// Copies between two upgraded connections until both directions have ended or the drain cuts them.
async fn tunnel(downstream: OnUpgrade, upstream: OnUpgrade, books: Books, cx: RequestContext) {
    let copy = async {
        let (downstream, upstream) = tokio::try_join!(downstream, upstream)?;
        tokio::io::copy_bidirectional(&mut TokioIo::new(downstream), &mut TokioIo::new(upstream))
            .await
            .map_err(mesh_core::BoxError::from)
    };
    tokio::select! {
        ended = copy => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a tunnel broke");
            }
        }
        () = cx.cut() => {}
    }
    drop(books);
}

/// The downstream's upgrade, when the request asks for one over HTTP/1.1.
fn take_upgrade(request: &mut Request<Body>) -> Option<OnUpgrade> {
    let on_upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let headers = request.headers();
    let asked = request.version() == Version::HTTP_11
        && headers.contains_key(UPGRADE)
        && headers.get_all(CONNECTION).iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|value| value.split(',').any(|token| token.trim().eq_ignore_ascii_case("upgrade")))
        });
    on_upgrade.filter(|_| asked)
}

/// Puts the request in the form of the upstream's protocol.
fn prepare(request: &mut Request<Body>, http2: bool, cx: &RequestContext) -> Result<(), Error> {
    // Extensions are the downstream's business; hyper would keep them alive with the exchange.
    request.extensions_mut().clear();
    if http2 {
        *request.version_mut() = Version::HTTP_2;
        if request.uri().authority().is_none() {
            let host = request.headers_mut().remove(HOST);
            let authority = host.as_ref().map(|host| Authority::try_from(host.as_bytes()));
            let Some(Ok(authority)) = authority else {
                return Err(Error::new(
                    ErrorKind::BadRequest,
                    StatusCode::BAD_REQUEST,
                    ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
                    "missing_host_header",
                ));
            };
            let mut uri = std::mem::take(request.uri_mut()).into_parts();
            uri.authority = Some(authority);
            uri.scheme.get_or_insert(if cx.conn().tls { Scheme::HTTPS } else { Scheme::HTTP });
            uri.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
            *request.uri_mut() = Uri::from_parts(uri).map_err(Error::internal)?;
        } else {
            request.headers_mut().remove(HOST);
        }
        return Ok(());
    }
    *request.version_mut() = Version::HTTP_11;
    if let Some(authority) = request.uri().authority() {
        if !request.headers().contains_key(HOST) {
            let host = HeaderValue::from_str(authority.as_str()).map_err(Error::internal)?;
            request.headers_mut().insert(HOST, host);
        }
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    }
    Ok(())
}

/// Replaces the authority where the request has it.
fn set_authority(request: &mut Request<Body>, authority: HeaderValue) {
    if request.uri().authority().is_some() {
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    }
    request.headers_mut().insert(HOST, authority);
}

fn apply_response_headers(
    destination: &Destination,
    cx: &RequestContext,
    version: Version,
    response: &mut Result<Response<Body>, Error>,
) {
    if destination.response_headers.is_empty() {
        return;
    }
    let format = FormatContext { request: None, context: cx, version };
    // Those of the route come first (VS-R04), so the layer that applies them goes on with these.
    let after_route = || cx.route::<Route>().is_some_and(|route| !route.action().response_headers.is_empty());
    match response {
        Ok(response) if after_route() => {
            response.extensions_mut().insert(AfterRoute(destination.response_headers.clone()));
        }
        Ok(response) => destination.response_headers.apply(response.headers_mut(), &format),
        Err(error) => destination.response_headers.apply(error.headers_mut(), &format),
    }
}

fn local_reply(status: StatusCode, flags: ResponseFlags, details: &'static str) -> Error {
    Error::local_reply(status, flags, details)
}
