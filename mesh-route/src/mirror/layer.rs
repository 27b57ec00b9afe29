//! Mirroring as a layer by itself.

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use mesh_core::{Body, BoxError, Direction, RequestContext, sanitize};
use tower_layer::Layer;
use tower_service::Service;

use super::count::{InFlight, MirrorCounters, MirrorOutcome, Mirroring};
use super::send::{DISCARDED, LONGEST, discard, lost};
use super::tee::{Tee, UNREAD};
use super::unsampled::unsample;
use super::{MirrorAuthority, copy_of};
use crate::draws::Draws;
use crate::hash_policy::{HashPolicy, xxhash};
use crate::headers::HeaderOps;
use crate::percentage::Percentage;
use crate::request_view::RequestView;

/// Sends copies of requests to another service, of which neither the caller nor the inner service notices anything: for
/// a server that is to try its next version, or a client that does.
///
/// The copy runs in a task of its own (so this needs a tokio runtime with time), waits there until its target is ready,
/// and its answer is thrown away. Its body is teed, with the bounds that [`mirror`](crate::mirror) describes. Upgrades
/// are not copied, and copies are not copied again. The inner service takes requests over [`Body`]; those over another
/// body are taken too, and boxed once.
///
/// ```
/// use http::{Request, Response};
/// use mesh_core::{Body, Error};
/// use mesh_route::{MirrorLayer, Percentage};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let (tell, mut told) = tokio::sync::mpsc::channel(1);
/// // The target may be a hyper client, or any other service that can be cloned.
/// let next_version = tower::service_fn(move |request: Request<Body>| {
///     let tell = tell.clone();
///     async move {
///         tell.send(request.uri().path().to_owned()).await?;
///         Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Response::new(Body::empty()))
///     }
/// });
/// let service = ServiceBuilder::new()
///     .layer(MirrorLayer::new(next_version).percentage(Percentage::ALWAYS))
///     .service_fn(|_: Request<Body>| async { Ok::<_, Error>(Response::new(Body::from("primary"))) });
/// let response = service.oneshot(Request::get("http://a/items").body(Body::empty())?).await?;
/// assert_eq!(response.status(), 200);
/// assert_eq!(told.recv().await.as_deref(), Some("/items"));
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone)]
pub struct MirrorLayer<M> {
    target: M,
    policy: Arc<Policy>,
}

#[derive(Clone)]
struct Policy {
    percentage: Percentage,
    sample_by: Option<HashPolicy>,
    authority: MirrorAuthority,
    request_headers: HeaderOps,
    timeout: Duration,
    unread: usize,
    seed: Option<u64>,
    process: Mirroring,
    counters: Arc<MirrorCounters>,
}

impl<M> MirrorLayer<M> {
    /// Copies every request to `target`.
    #[must_use]
    pub fn new(target: M) -> Self {
        let policy = Policy {
            percentage: Percentage::ALWAYS,
            sample_by: None,
            authority: MirrorAuthority::Keep,
            request_headers: HeaderOps::default(),
            timeout: LONGEST,
            unread: UNREAD,
            seed: None,
            process: Mirroring::new(),
            counters: Arc::default(),
        };
        Self { target, policy: Arc::new(policy) }
    }

    /// Copies this share. Default all.
    #[must_use]
    pub fn percentage(self, percentage: Percentage) -> Self {
        self.with(|policy| policy.percentage = percentage)
    }

    /// Copies all requests of a key or none; those without the key are drawn. Default every request is drawn.
    #[must_use]
    pub fn sample_by(self, key: HashPolicy) -> Self {
        self.with(|policy| policy.sample_by = Some(key))
    }

    /// The authority of the copies. Default that of the request.
    #[must_use]
    pub fn authority(self, authority: MirrorAuthority) -> Self {
        self.with(|policy| policy.authority = authority)
    }

    /// Operations on the headers of the copies. Default none.
    #[must_use]
    pub fn request_headers(self, operations: HeaderOps) -> Self {
        self.with(|policy| policy.request_headers = operations)
    }

    /// How long a copy may take from its beginning to the end of its answer. Default a minute.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        self.with(|policy| policy.timeout = timeout)
    }

    /// The most bytes of its body that a copy may leave unread. Default 64 KiB.
    #[must_use]
    pub fn unread_bytes(self, most: usize) -> Self {
        self.with(|policy| policy.unread = most)
    }

    /// Draws that can be replayed. Default from a seed of the operating system's for each service built.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        self.with(|policy| policy.seed = Some(seed))
    }

    /// Shares the mark and the number of copies in flight with others of the process. Default its own.
    #[must_use]
    pub fn mirroring(self, process: Mirroring) -> Self {
        self.with(|policy| policy.process = process)
    }

    /// What became of the copies of every service that this layer makes.
    #[must_use]
    pub fn counters(&self) -> Arc<MirrorCounters> {
        Arc::clone(&self.policy.counters)
    }

    fn with(mut self, change: impl FnOnce(&mut Policy)) -> Self {
        change(Arc::make_mut(&mut self.policy));
        self
    }
}

impl<M: fmt::Debug> fmt::Debug for MirrorLayer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MirrorLayer")
            .field("target", &self.target)
            .field("percentage", &self.policy.percentage)
            .finish_non_exhaustive()
    }
}

impl<S, M: Clone> Layer<S> for MirrorLayer<M> {
    type Service = MirrorRequests<S, M>;

    fn layer(&self, inner: S) -> MirrorRequests<S, M> {
        MirrorRequests { inner, layer: self.clone(), draws: Arc::new(Draws::new(self.policy.seed)) }
    }
}

/// The service of [`MirrorLayer`].
#[derive(Clone)]
pub struct MirrorRequests<S, M> {
    inner: S,
    layer: MirrorLayer<M>,
    draws: Arc<Draws>,
}

impl<S: fmt::Debug, M: fmt::Debug> fmt::Debug for MirrorRequests<S, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MirrorRequests")
            .field("inner", &self.inner)
            .field("layer", &self.layer)
            .finish_non_exhaustive()
    }
}

impl<S, M> MirrorRequests<S, M> {
    /// Whether the request is copied, and the copy's place.
    fn admit(&self, request: &Request<Body>, cx: &RequestContext) -> Option<InFlight> {
        let policy = &self.layer.policy;
        if policy.process.id().declines(request.headers())
            || sanitize::is_upgrade(request.version(), request.headers())
        {
            return None;
        }
        let view = RequestView::new(request, cx.conn());
        let chosen = match policy.sample_by.as_ref().and_then(|key| key.hash(&view, cx.conn())) {
            Some(key) => policy.percentage.takes(xxhash(b"mirror", key)),
            None => policy.percentage.draw(&mut self.draws.rng()),
        };
        if !chosen {
            return None;
        }
        let slot = policy.process.admit();
        if slot.is_none() {
            policy.counters.count(MirrorOutcome::Dropped);
        }
        slot
    }
}

impl<S, M> MirrorRequests<S, M>
where
    M: Clone,
{
    fn start<RB>(&self, request: &mut Request<Body>)
    where
        M: Service<Request<Body>, Response = Response<RB>> + Send + 'static,
        M::Future: Send,
        M::Error: Into<BoxError>,
        RB: HttpBody<Data = Bytes> + Send,
        RB::Error: Into<BoxError>,
    {
        let cx = RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
        let Some(slot) = self.admit(request, &cx) else { return };
        let policy = Arc::clone(&self.layer.policy);
        let (body, mut copies) = Tee::split(std::mem::take(request.body_mut()), 1, policy.unread);
        *request.body_mut() = body;
        let Some((body, tee)) = copies.pop() else { return };
        let mut copy = copy_of(request).map(|()| body);
        let cx = cx.of_mirror();
        policy.authority.apply(&mut copy);
        if !policy.request_headers.is_empty() {
            policy.request_headers.apply_to_request(&mut copy, &cx);
        }
        unsample(copy.headers_mut());
        policy.process.id().mark(copy.headers_mut());
        copy.extensions_mut().insert(cx);
        let target = self.layer.target.clone();
        tokio::spawn(async move {
            let _slot = slot;
            let outcome = tokio::select! {
                biased;
                lost = lost(tee.as_ref()) => lost.into(),
                answered = tokio::time::timeout(policy.timeout, exchange(target, copy)) => match answered {
                    Ok(Ok(())) => MirrorOutcome::Answered,
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "a mirrored request failed");
                        MirrorOutcome::Failed
                    }
                    Err(_) => MirrorOutcome::Failed,
                },
            };
            policy.counters.count(outcome);
        });
    }
}

async fn exchange<M, RB>(mut target: M, request: Request<Body>) -> Result<(), BoxError>
where
    M: Service<Request<Body>, Response = Response<RB>>,
    M::Error: Into<BoxError>,
    RB: HttpBody<Data = Bytes>,
    RB::Error: Into<BoxError>,
{
    poll_fn(|cx| target.poll_ready(cx)).await.map_err(Into::into)?;
    let response = target.call(request).await.map_err(Into::into)?;
    discard(response.into_body(), DISCARDED, |_| {}).await.map_err(Into::into)
}

impl<S, M, B, RB> Service<Request<B>> for MirrorRequests<S, M>
where
    S: Service<Request<Body>>,
    M: Service<Request<Body>, Response = Response<RB>> + Clone + Send + 'static,
    M::Future: Send,
    M::Error: Into<BoxError>,
    RB: HttpBody<Data = Bytes> + Send,
    RB::Error: Into<BoxError>,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> S::Future {
        let mut request = request.map(Body::new);
        self.start(&mut request);
        self.inner.call(request)
    }
}
