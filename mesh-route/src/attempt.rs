//! One try: a place in the limits, an endpoint, a connection, the exchange up to the head of the response.
//!
//! What a try holds is in its guards, so that one that is dropped at any await leaves every count exact. A try that
//! was dropped says nothing of its endpoint; one that ended tells outlier detection how.
//!
//! **One exchange, exact books.** The request's place in the limits, its count at the endpoint and its connection are
//! held by the *body* of the response, and given back when that ends or is dropped. A connection goes back to the
//! pool only after a whole response, and is used again only when hyper says that both bodies are done.
//!
//! **Upgrades.** Bytes flow when the upstream has answered 101, never before; the tunnel holds the books of its request
//! and ends with the connection's drain.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body::{Body as _, Frame};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use mesh_core::{
    Body, BodyHook, EndOfBody, Error, ErrorKind, RequestContext, ResponseFlags, Side, UpstreamInfo, vendor,
};
use pin_project::pin_project;

use crate::balance::{Choice, peak_ewma};
use crate::cluster::{BalancerKind, Cluster, Discovery, UpstreamProtocol};
use crate::endpoint::{Endpoint, InFlight};
use crate::fault::{AbortKind, Fault};
use crate::grpc;
use crate::hash_policy::RequestKey;
use crate::outlier::{Observation, no_healthy_upstream};
use crate::permit::Permit;
use crate::pool::{Slot, h1, h2, overflow, upstream_error};
use crate::retry::RetryPolicy;
use crate::runtime::ClusterRuntime;
use crate::shard::Shard;
use crate::timeout::{self, Deadline, Idle, Limits};

/// How often an unsent request is put on another connection. Idle connections may all have died together, so the
/// last try is always on a new one.
const UNSENT_TRIES: u32 = 4;

/// Where one request goes and for whom.
pub(crate) struct Attempt<'a> {
    pub(crate) shard: &'a Arc<Shard>,
    pub(crate) cx: &'a RequestContext,
    pub(crate) cluster: &'a Arc<Cluster>,
    pub(crate) runtime: &'a Arc<ClusterRuntime>,
    pub(crate) version: Version,
    pub(crate) upgrade: bool,
    pub(crate) key: RequestKey,
    ignore_previous_hosts: bool,
    remote_localities: bool,
    /// A fault that is drawn for each try.
    pub(crate) fault: Option<&'a Fault>,
    /// The endpoint that has the request of the try that is under way, for a timeout that ends it from outside.
    current: Mutex<Option<Arc<Endpoint>>>,
}

/// The head of a response, and what the try holds.
pub(crate) struct Answer {
    pub(crate) response: Response<Incoming>,
    /// A frame of the body that was read already.
    first: Option<Box<Result<Frame<Bytes>, hyper::Error>>>,
    pub(crate) grpc_status: Option<u16>,
    books: Books,
    took: Duration,
}

/// A try without an answer.
pub(crate) struct Failure {
    pub(crate) error: Error,
    /// The request is in its place again, whole: nothing of it was sent.
    pub(crate) unsent: bool,
    /// Where it failed.
    pub(crate) endpoint: Option<u64>,
    /// What was injected in the place of an answer.
    pub(crate) injected: Option<AbortKind>,
}

enum Lease {
    Http1(h1::Lease),
    Http2(h2::Lease),
}

impl Lease {
    /// Sends the request, now; the future is that of its response.
    fn send(&mut self, request: Request<Body>) -> impl Future<Output = Sent> + use<> {
        match self {
            Self::Http1(lease) => Sending::Http1(lease.send(request)),
            Self::Http2(lease) => Sending::Http2(lease.send(request)),
        }
    }
}

/// A response to come, by protocol.
#[pin_project(project = SendingProjection)]
enum Sending<A, B> {
    Http1(#[pin] A),
    Http2(#[pin] B),
}

impl<A: Future<Output = Sent>, B: Future<Output = Sent>> Future for Sending<A, B> {
    type Output = Sent;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Sent> {
        match self.project() {
            SendingProjection::Http1(sending) => sending.poll(cx),
            SendingProjection::Http2(sending) => sending.poll(cx),
        }
    }
}

impl<'a> Attempt<'a> {
    pub(crate) fn new(
        shard: &'a Arc<Shard>,
        cx: &'a RequestContext,
        cluster: &'a Arc<Cluster>,
        runtime: &'a Arc<ClusterRuntime>,
        version: Version,
        upgrade: bool,
        fault: Option<&'a Fault>,
    ) -> Self {
        Self {
            shard,
            cx,
            cluster,
            runtime,
            version,
            upgrade,
            key: RequestKey::Missing,
            ignore_previous_hosts: false,
            remote_localities: false,
            fault,
            current: Mutex::default(),
        }
    }

    /// Picks endpoints by this key, and those of retries as the policy says.
    pub(crate) fn choosing(self, key: RequestKey, policy: &RetryPolicy) -> Self {
        let (ignore_previous_hosts, remote_localities) =
            (policy.ignore_previous_hosts, policy.remote_localities);
        Self { key, ignore_previous_hosts, remote_localities, ..self }
    }

    /// Tries once. `tried` are the ids of the endpoints of the tries before.
    pub(crate) async fn once(
        &self,
        request: &mut Request<Body>,
        limits: &Limits,
        tried: &[u64],
    ) -> Result<Answer, Failure> {
        let unsent = |error| Failure { error, unsent: true, endpoint: None, injected: None };
        let most = self.cluster.spec().pool.max_requests;
        let permit = Permit::acquire(self.runtime, |runtime| &runtime.requests, most)
            .ok_or_else(|| unsent(overflow(self.runtime)))?;
        let started = mesh_core::clock::now();
        let number = self.cx.count_attempt();
        let count = if number == 1 { HeaderValue::from_static("1") } else { HeaderValue::from(number) };
        vendor::ATTEMPT_COUNT.insert(request.headers_mut(), count);
        if let Some(fault) = self.fault {
            Box::pin(self.inject(fault, limits)).await?;
        }
        let http2 = self.speaks_http2();
        let mut tries = 0;
        loop {
            tries += 1;
            let endpoint = self.pick(tried).map_err(unsent)?;
            let failure =
                |error, unsent| Failure { error, unsent, endpoint: Some(endpoint.id()), injected: None };
            let in_flight = endpoint.start_request();
            let open = if tries < UNSENT_TRIES { self.open(&endpoint, http2) } else { None };
            let mut lease = match open {
                Some(lease) => lease,
                None => {
                    self.is_at(None);
                    // Boxed: a connection costs more than a box, and the future of every request would hold its making.
                    match Box::pin(self.lease(&endpoint, http2)).await {
                        Ok(lease) => lease,
                        Err(error) => {
                            self.observe_failure(&endpoint, error.kind());
                            return Err(failure(error, true));
                        }
                    }
                }
            };
            self.is_at(Some(&endpoint));
            self.note(&endpoint, &mut lease);
            let mut deadline = limits.deadline(self.shard.timers(), request.body_mut());
            let sending = pin!(lease.send(std::mem::take(request)));
            let sent = timeout::bound(&mut deadline, sending).await;
            match sent {
                Ok(Ok(response)) => {
                    let grpc_status = grpc::status(response.headers());
                    let now = mesh_core::clock::now();
                    let took = now.saturating_duration_since(started);
                    if self.cluster.spec().balancer == BalancerKind::PeakEwma {
                        endpoint.observe(took, now);
                    }
                    let answer = Answer {
                        response,
                        first: None,
                        grpc_status,
                        books: Books {
                            lease: Some(lease),
                            _slot: None,
                            // An upload puts off the idle timeout of its response too.
                            deadline: deadline.filter(Deadline::idles),
                            idle: None,
                            endpoint: Arc::clone(&endpoint),
                            _in_flight: in_flight,
                            _permit: permit,
                        },
                        took,
                    };
                    return Ok(answer);
                }
                // Provably not written.
                Ok(Err(mut failed)) => match failed.take_message() {
                    Some(unsent) if tries < UNSENT_TRIES => *request = unsent,
                    message => {
                        let error = upstream_error(failed.into_error());
                        self.observe_failure(&endpoint, error.kind());
                        let unsent = message.is_some();
                        if let Some(message) = message {
                            *request = message;
                        }
                        return Err(failure(error, unsent));
                    }
                },
                Err(late) => {
                    // Of a request that is not whole it is not known who is late.
                    if late.status() != StatusCode::REQUEST_TIMEOUT {
                        self.observe_failure(&endpoint, ErrorKind::Timeout);
                    }
                    return Err(failure(late, false));
                }
            }
        }
    }

    /// Draws the fault of a try: as if the upstream were late, or answered so.
    async fn inject(&self, fault: &Fault, limits: &Limits) -> Result<(), Failure> {
        let injected = fault.draw(&mut self.shard.lock().rng);
        let failure = |error, injected| Failure { error, unsent: true, endpoint: None, injected };
        if let Some(delay) = injected.delay {
            self.cx.add_flags(ResponseFlags::DELAY_INJECTED);
            let most = limits.per_try.filter(|per_try| *per_try <= delay);
            tokio::time::sleep(most.unwrap_or(delay)).await;
            if most.is_some() {
                return Err(failure(timeout::per_try(), None));
            }
        }
        match injected.abort {
            None => Ok(()),
            Some(abort) => Err(failure(abort.error(), Some(abort))),
        }
    }

    /// Whether the upstream is spoken to over HTTP/2.
    pub(crate) fn speaks_http2(&self) -> bool {
        !self.upgrade
            && match self.cluster.spec().protocol {
                UpstreamProtocol::Http1 => false,
                UpstreamProtocol::Http2 => true,
                UpstreamProtocol::Downstream => self.version == Version::HTTP_2,
            }
    }

    /// The timeout of the route has passed during the try.
    pub(crate) fn timed_out(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(endpoint) = current {
            self.observe_failure(&endpoint, ErrorKind::Timeout);
        }
    }

    /// Tells outlier detection of an answer.
    pub(crate) fn observe(&self, answer: &Answer) {
        if let Some(config) = &self.cluster.spec().outlier_detection {
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let seen = Observation::of_response(answer.response.status(), answer.grpc_status);
            self.runtime.observe(config, &answer.books.endpoint, seen, || self.cluster.endpoints().len());
        }
    }

    fn observe_failure(&self, endpoint: &Endpoint, kind: ErrorKind) {
        if self.cluster.spec().balancer == BalancerKind::PeakEwma && Observation::of_failure(kind).is_some() {
            endpoint.observe(peak_ewma::FAILED, mesh_core::clock::now());
        }
        if let Some(config) = &self.cluster.spec().outlier_detection
            && let Some(seen) = Observation::of_failure(kind)
        {
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.runtime.observe(config, endpoint, seen, || self.cluster.endpoints().len());
        }
    }

    /// Whose a timeout is from now on: the endpoint's that has the request, nobody's while it waits for a connection in
    /// our own queue (DR-CP04).
    fn is_at(&self, endpoint: Option<&Arc<Endpoint>>) {
        if self.cluster.spec().outlier_detection.is_some() {
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = endpoint.cloned();
        }
    }

    fn pick(&self, tried: &[u64]) -> Result<Arc<Endpoint>, Error> {
        let spec = self.cluster.spec();
        let original = self.cx.conn().original_dst;
        let endpoint = match (&spec.discovery, spec.balancer) {
            (Discovery::OriginalDst, _) | (_, BalancerKind::Passthrough) => {
                original.map(|addr| self.runtime.endpoint(addr, &spec.tls))
            }
            (Discovery::OriginalDstPort(port), _) => original.map(|mut addr| {
                addr.set_port(*port);
                self.runtime.endpoint(addr, &spec.tls)
            }),
            _ => {
                let choice = Choice {
                    hash: self.key.hash(),
                    tried,
                    ignore_previous_hosts: self.ignore_previous_hosts,
                    remote_localities: self.remote_localities,
                };
                self.shard.pick(self.cluster, self.runtime, &choice)
            }
        };
        endpoint.ok_or_else(no_healthy_upstream)
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
        let leased = if http2 {
            h2::Lease::acquire(self.shard, self.cluster, self.runtime, endpoint).await.map(Lease::Http2)
        } else {
            h1::Lease::acquire(self.shard, self.cluster, self.runtime, endpoint).await.map(Lease::Http1)
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

    /// Makes the answer that of the request.
    pub(crate) fn respond(
        &self,
        answer: Answer,
        idle: Option<Duration>,
        on_upgrade: Option<OnUpgrade>,
    ) -> Result<Response<Body>, Error> {
        let Answer { mut response, first, mut books, took, .. } = answer;
        let head = books.deadline.take();
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
            // With the answer hyper lets go of the connection, and the pool with it; the tunnel is one all the same.
            let slot = Slot::acquire(self.runtime, &books.endpoint, &self.cluster.spec().pool, true);
            let books = Books { _slot: slot, ..books };
            tokio::spawn(tunnel(downstream, upstream, books, self.cx.clone()));
            return Ok(response.map(|_| Body::empty()));
        }
        let took = HeaderValue::from(took.as_millis() as u64);
        vendor::UPSTREAM_SERVICE_TIME.insert(response.headers_mut(), took);
        // Over HTTP/2 an upstream can send a body where there is none; HTTP/1.1 would read it as the next answer.
        let bodiless = matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        Ok(response.map(|incoming| {
            let mut body = Body::from_incoming(incoming, Side::Upstream);
            if let Some(first) = first {
                body =
                    body.after((*first).map_err(|error| mesh_core::body::read_error(error, Side::Upstream)));
            }
            if bodiless && !body.is_end_stream() {
                books.close(false);
                Body::empty()
            } else if body.is_end_stream() {
                books.close(true);
                body
            } else {
                let idle = idle.map(|idle| Idle::new(self.shard.timers(), idle).beside(head));
                body.with_hook(Books { idle, ..books })
            }
        }))
    }
}

impl Answer {
    /// The endpoint that gave it.
    pub(crate) fn endpoint(&self) -> u64 {
        self.books.endpoint.id()
    }

    /// Whether its gRPC status may follow in trailers.
    pub(crate) fn may_have_trailers(&self) -> bool {
        self.grpc_status.is_none() && !self.response.body().is_end_stream()
    }

    /// Looks whether the trailers follow the head at once: where an upstream says so late that a call has failed. What
    /// is not there is not waited for.
    pub(crate) async fn peek_trailers(mut self: Box<Self>) -> Box<Self> {
        if let Some(Some(frame)) = frame_now(self.response.body_mut()).await {
            let trailers = frame.as_ref().ok().and_then(Frame::trailers_ref);
            self.grpc_status = trailers.and_then(grpc::status);
            self.first = Some(Box::new(frame));
        }
        self
    }

    /// Gives up the answer for another try. What of its body is there already is read, so that the connection can be
    /// kept.
    pub(crate) async fn discard(self) {
        let Self { response, books, .. } = self;
        let mut body = response.into_body();
        for _ in 0..DISCARDED_FRAMES {
            match frame_now(&mut body).await {
                Some(None) => return books.close(true),
                Some(Some(Ok(_))) => {}
                _ => return books.close(false),
            }
        }
        books.close(body.is_end_stream());
    }
}

/// The next frame, if it is there already: `None` when it is not, `Some(None)` at the end.
async fn frame_now(body: &mut Incoming) -> Option<Option<Result<Frame<Bytes>, hyper::Error>>> {
    poll_fn(|cx| {
        Poll::Ready(match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(frame) => Some(frame),
            Poll::Pending => None,
        })
    })
    .await
}

/// Frames of an answer that is given up which are read to keep its connection.
pub(crate) const DISCARDED_FRAMES: u32 = 4;

type Sent = Result<Response<Incoming>, TrySendError<Request<Body>>>;

/// What a request holds until its response has ended.
struct Books {
    lease: Option<Lease>,
    /// Counts the connection of a tunnel.
    _slot: Option<Slot>,
    /// That of the route.
    deadline: Option<Deadline>,
    idle: Option<Idle>,
    endpoint: Arc<Endpoint>,
    _in_flight: InFlight,
    _permit: Permit<ClusterRuntime>,
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
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.deadline.as_mut().map_or(Poll::Pending, |deadline| deadline.poll_passed(cx))
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.idle.as_mut().map_or(Poll::Pending, |idle| idle.poll_idle(cx))
    }

    fn on_data(&mut self, _: &Bytes) {
        if let Some(idle) = &mut self.idle {
            idle.received();
        }
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        self.end(matches!(end, EndOfBody::Complete));
    }
}

/// Ends the body of a response at the deadline, which goes where the books are, if they are still open.
pub(crate) fn bound(body: &mut Body, deadline: Deadline) {
    if let Some(books) = body.hook_mut::<Books>() {
        books.deadline = Some(deadline);
    } else if !body.is_end_stream() {
        *body = std::mem::take(body).with_hook(deadline);
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

/// Puts the request in the form of the upstream's protocol.
pub(crate) fn prepare(request: &mut Request<Body>, http2: bool, cx: &RequestContext) -> Result<(), Error> {
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
    // Without it hyper takes a GET of unknown length for one without a body, and sends none.
    if !request.body().is_end_stream() && request.body().size_hint().exact().is_none() {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    Ok(())
}
