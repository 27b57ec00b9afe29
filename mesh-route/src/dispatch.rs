//! The end of every stack: does what the pinned route says.
//!
//! A redirect or a direct response is made here. A forward goes through the mirrors, the timeout of the route, and
//! tries that each pick an endpoint of the cluster. What fails is a [`mesh_core::Error`] with Envoy's flags and details.
//!
//! It is always ready: readiness depends on a route that is not known before the request. Back-pressure is the limits
//! of the cluster. Only here is the downstream's upgrade taken.

use std::future::Future;
use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use mesh_core::{Body, Direction, Error, RequestContext, ResponseFlags};
use tower_service::Service;

use crate::fault::FaultScope;
use crate::forward::forward;
use crate::request_view::RequestView;
use crate::route::{ActionKind, Route};
use crate::shard::Shard;

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

#[allow(clippy::manual_async_fn, reason = "what an async function takes lies in its future twice")]
fn run(
    shard: Arc<Shard>,
    mut request: Request<Body>,
) -> impl Future<Output = Result<Response<Body>, Error>> + Send {
    async move {
        let cx = RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
        if *request.method() == Method::CONNECT {
            return Err(local_reply(
                StatusCode::METHOD_NOT_ALLOWED,
                ResponseFlags::NONE,
                "connect_not_allowed",
            ));
        }
        let route = cx.route::<Route>().ok_or_else(|| {
            local_reply(StatusCode::NOT_FOUND, ResponseFlags::NO_ROUTE_FOUND, "route_not_found")
        })?;
        match &route.action().kind {
            ActionKind::Redirect(redirect) => redirect.respond(&RequestView::new(&request, cx.conn()), &cx),
            ActionKind::DirectResponse(direct) => Ok(direct.respond(&cx)),
            ActionKind::Forward(to) => {
                let fault = route.action().fault.as_ref().filter(|fault| fault.scope == FaultScope::PerTry);
                forward(&shard, to, fault, &cx, &mut request).await
            }
        }
    }
}

fn local_reply(status: StatusCode, flags: ResponseFlags, details: &'static str) -> Error {
    Error::local_reply(status, flags, details)
}
