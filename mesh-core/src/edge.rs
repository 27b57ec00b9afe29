//! The layer that makes one request of what a client wrote, before anything decides.
//!
//! It applies [`sanitize`](crate::sanitize) and [`forwarded`](crate::forwarded) with the settings of the generation
//! that the request pinned, and keeps the result in the request context for the telemetry above.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use http::{HeaderValue, Request, Response};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::conn::Direction;
use crate::context::{Normalized, RequestContext};
use crate::error::{Error, ErrorKind};
use crate::flags::ResponseFlags;
use crate::forwarded::{self, FORWARDED_FOR, REQUEST_ID};
use crate::normalize::PathNormalization;
use crate::sanitize::{self, Refused, Underscores};
use crate::snapshot::Slot;

/// How requests are normalised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EdgeSettings {
    /// How far paths are normalised. Default [`PathNormalization::Base`].
    pub normalization: PathNormalization,
    /// Proxies in front of a gateway whose `x-forwarded-for` is believed. Default 0.
    pub trusted_proxies: u32,
}

#[cfg(feature = "istio")]
impl crate::config::Compile<crate::istio::ResourceSet> for EdgeSettings {
    fn compile(
        set: &crate::istio::ResourceSet,
        _: &crate::config::CompileContext,
        diags: &mut crate::diagnostics::Diagnostics,
    ) -> Result<Self, crate::config::Rejected> {
        let mesh = set.mesh_config();
        diags.honour_mesh("pathNormalization");
        diags.honour_mesh("defaultConfig.gatewayTopology.numTrustedProxies");
        Ok(Self { normalization: mesh.normalization().into(), trusted_proxies: mesh.trusted_proxies() })
    }

    fn closed(_: &crate::config::CompileContext) -> Self {
        Self::default()
    }
}

/// Normalises requests. Expects nothing but telemetry and local replies above it, and every layer that decides below.
///
/// A gateway refuses header names with underscores, a sidecar's inbound side leaves them out, its outbound side lets
/// them pass.
///
/// ```
/// use http::{Request, Response};
/// use mesh_core::{Body, Direction, EdgeSettings, Error, NormalizeLayer, Slot};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let service = ServiceBuilder::new()
///     .layer(NormalizeLayer::new(Slot::fixed(EdgeSettings::default()), Direction::Inbound))
///     .service_fn(|request: Request<Body>| async move {
///         assert_eq!(request.uri(), "/admin");
///         assert!(request.headers().contains_key("x-request-id"));
///         Ok::<_, Error>(Response::new(Body::empty()))
///     });
/// let request = Request::get("/app/../%61dmin").header("host", "a").body(Body::empty())?;
/// service.oneshot(request).await?;
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct NormalizeLayer {
    settings: Slot<EdgeSettings>,
    direction: Direction,
    seed: Option<u64>,
}

impl NormalizeLayer {
    /// Normalises by the settings behind `settings`. `direction` is that of requests without a context.
    #[must_use]
    pub fn new(settings: Slot<EdgeSettings>, direction: Direction) -> Self {
        Self { settings, direction, seed: None }
    }

    /// Makes request ids that can be replayed. Default: a seed of the operating system's for each service built.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }
}

impl<S> Layer<S> for NormalizeLayer {
    type Service = Normalize<S>;

    fn layer(&self, inner: S) -> Normalize<S> {
        let seed = self.seed.unwrap_or_else(rand::random);
        Normalize {
            inner,
            settings: self.settings.clone(),
            direction: self.direction,
            ids: Arc::new(Ids { seed, next: AtomicU64::new(0) }),
        }
    }
}

/// The service of [`NormalizeLayer`].
#[derive(Clone, Debug)]
pub struct Normalize<S> {
    inner: S,
    settings: Slot<EdgeSettings>,
    direction: Direction,
    ids: Arc<Ids>,
}

/// Numbers for request ids: unique within a service, and not guessed from one another without the seed.
#[derive(Debug)]
struct Ids {
    seed: u64,
    next: AtomicU64,
}

impl Ids {
    fn next(&self) -> HeaderValue {
        let number = self.next.fetch_add(2, Ordering::Relaxed);
        forwarded::uuid(mixed(self.seed, number), mixed(self.seed, number.wrapping_add(1)))
    }
}

/// `SplitMix64`'s output for a place in its sequence.
fn mixed(seed: u64, place: u64) -> u64 {
    let mut bits = seed.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

impl<S> Normalize<S> {
    /// The request as everybody below reads it, and whether it asks for an upgrade.
    fn normalize<B>(&self, mut request: Request<B>) -> Result<(Request<B>, bool), Refused> {
        let context = RequestContext::ensure(request.extensions_mut(), self.direction);
        let settings = self.settings.get(&context).copied().unwrap_or_default();
        let underscores = match context.conn().direction {
            Direction::Gateway => Underscores::Reject,
            Direction::Inbound => Underscores::Drop,
            Direction::Outbound => Underscores::Keep,
        };
        let (mut parts, body) = request.into_parts();
        sanitize::request(&mut parts, settings.normalization, underscores)?;
        let upgrade = sanitize::is_upgrade(parts.version, &parts.headers);
        forwarded::apply(&mut parts.headers, context.conn(), settings.trusted_proxies, || self.ids.next());
        context.set_normalized(Normalized {
            uri: parts.uri.clone(),
            request_id: parts.headers.get(REQUEST_ID).cloned(),
            forwarded_for: parts.headers.get(FORWARDED_FOR).cloned(),
        });
        Ok((Request::from_parts(parts, body), upgrade))
    }
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Normalize<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: Into<Error>,
{
    type Response = Response<ResBody>;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        ResponseFuture(match self.normalize(request) {
            Ok((request, upgrade)) => State::Normal { inner: self.inner.call(request), upgrade },
            Err(refused) => State::Refused(Some(refused)),
        })
    }
}

/// The future of [`Normalize`].
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F>(#[pin] State<F>);

#[pin_project(project = StateProjection)]
#[derive(Debug)]
enum State<F> {
    Normal {
        #[pin]
        inner: F,
        upgrade: bool,
    },
    Refused(Option<Refused>),
}

impl<F, ResBody, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<ResBody>, E>>,
    E: Into<Error>,
{
    type Output = Result<Response<ResBody>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().0.project() {
            StateProjection::Normal { inner, upgrade } => {
                let response = ready!(inner.poll(cx)).map_err(Into::into)?;
                let (mut parts, body) = response.into_parts();
                sanitize::response(&mut parts, *upgrade).map_err(|refused| {
                    let kind = ErrorKind::UpstreamProtocol;
                    error(refused, kind, ResponseFlags::UPSTREAM_PROTOCOL_ERROR)
                })?;
                Poll::Ready(Ok(Response::from_parts(parts, body)))
            }
            StateProjection::Refused(refused) => match refused.take() {
                Some(refused) => Poll::Ready(Err(error(
                    refused,
                    ErrorKind::BadRequest,
                    ResponseFlags::DOWNSTREAM_PROTOCOL_ERROR,
                ))),
                // Polled after it was ready, which the contract of futures forbids.
                None => Poll::Pending,
            },
        }
    }
}

fn error(refused: Refused, kind: ErrorKind, flags: ResponseFlags) -> Error {
    Error::new(kind, refused.status, flags, refused.details).with_body(refused.reason)
}
