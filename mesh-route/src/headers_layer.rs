//! The layer that applies the header operations of the pinned route (VS-H01).
//!
//! Those of a destination come after these (VS-R04). Whoever picks it, below, applies its request operations, and its
//! response operations too unless the route has some: then they come up with the response as [`AfterRoute`].

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Request, Response, Version};
use mesh_core::{Error, RequestContext};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::headers::{FormatContext, HeaderOps, OwnedHead};
use crate::route::{Route, policies};

/// Applies the header operations of the pinned route. Expects [`SelectRouteLayer`](crate::SelectRouteLayer) above it;
/// a request without a pinned route passes as it is. Local replies of the layers below are treated like responses.
///
/// ```
/// use http::{Request, Response};
/// use mesh_core::{Body, Error, Slot};
/// use mesh_route::{HeadersLayer, RouteBuilder, RouteTable, SelectRouteLayer};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let route = RouteBuilder::new("all").response_header("x-mesh", "yes").respond(200, "")?;
/// let table = RouteTable::builder().host("*", [route]).build()?;
/// let service = ServiceBuilder::new()
///     .layer(SelectRouteLayer::new(Slot::fixed(table)))
///     .layer(HeadersLayer::new())
///     .service_fn(|_: Request<Body>| async { Ok::<_, Error>(Response::new(Body::empty())) });
/// let response = service.oneshot(Request::get("http://a/").body(Body::empty())?).await?;
/// assert_eq!(response.headers()["x-mesh"], "yes");
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadersLayer(());

impl HeadersLayer {
    /// The layer; what it does is in the route.
    #[must_use]
    pub const fn new() -> Self {
        Self(())
    }
}

impl<S> Layer<S> for HeadersLayer {
    type Service = Headers<S>;

    fn layer(&self, inner: S) -> Headers<S> {
        Headers { inner }
    }
}

/// The service of [`HeadersLayer`].
#[derive(Clone, Debug)]
pub struct Headers<S> {
    inner: S,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Headers<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: Into<Error>,
{
    type Response = S::Response;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        if policies::has(&request, policies::HEADERS) {
            return self.call_with_operations(request);
        }
        ResponseFuture { inner: self.inner.call(request), pending: None }
    }
}

impl<S> Headers<S> {
    /// Apart, so that what has no operations passes without a call, and without being moved.
    #[inline(never)]
    fn call_with_operations<B>(&mut self, mut request: Request<B>) -> ResponseFuture<S::Future>
    where
        S: Service<Request<B>>,
    {
        let pending = pending(&mut request);
        ResponseFuture { inner: self.inner.call(request), pending }
    }
}

/// Applies the operations of the route to the request; what is to be done to the response.
fn pending<B>(request: &mut Request<B>) -> Option<Pending> {
    let version = request.version();
    let context = request.extensions().get::<RequestContext>()?.clone();
    let route = context.route::<Route>()?;
    let action = route.action();
    if !action.request_headers.is_empty() {
        action.request_headers.apply_to_request(request, &context);
    }
    if action.response_headers.is_empty() {
        return None;
    }
    let head = OwnedHead::for_response(&action.response_headers, request);
    Some(Pending { route, context, version, head })
}

/// The future of [`Headers`].
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F> {
    #[pin]
    inner: F,
    pending: Option<Pending>,
}

/// Response operations of a destination that wait for those of the route; an extension of the response.
#[derive(Clone, Debug)]
pub(crate) struct AfterRoute(pub(crate) HeaderOps, pub(crate) Option<Box<OwnedHead>>);

#[derive(Debug)]
struct Pending {
    route: Arc<Route>,
    context: RequestContext,
    version: Version,
    head: Option<Box<OwnedHead>>,
}

impl Pending {
    fn apply(&self, headers: &mut HeaderMap) {
        self.route.action().response_headers.apply(headers, &self.format(self.head.as_deref()));
    }

    fn format<'a>(&'a self, head: Option<&'a OwnedHead>) -> FormatContext<'a> {
        let request = head.map(OwnedHead::borrowed);
        FormatContext { request, context: &self.context, version: self.version }
    }
}

impl<F, ResBody, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<ResBody>, E>>,
    E: Into<Error>,
{
    type Output = Result<Response<ResBody>, Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        // What has nothing to add passes the response on where it is.
        let Some(pending) = this.pending else { return this.inner.poll(cx).map_err(Into::into) };
        let mut result = ready!(this.inner.poll(cx)).map_err(Into::into);
        match &mut result {
            Ok(response) => {
                let after = response.extensions_mut().remove::<AfterRoute>();
                pending.apply(response.headers_mut());
                if let Some(AfterRoute(operations, head)) = after {
                    operations.apply(response.headers_mut(), &pending.format(head.as_deref()));
                }
            }
            Err(error) => pending.apply(error.headers_mut()),
        }
        Poll::Ready(result)
    }
}
