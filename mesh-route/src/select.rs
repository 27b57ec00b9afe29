//! The layer that selects a route and pins it to its request.
//!
//! Selection comes before everything that is per route, and happens once. A layer that changes what routing looked at
//! asks for it again with [`reselect`]; nothing is implicit.
//!
//! At a gateway that ends TLS, a request comes over a connection whose handshake was that of one server. A client that
//! has a certificate's other names in mind may ask for the host of another server over the same connection (HTTP/2 calls
//! it coalescing); it is told 421, and asks again over a connection of its own (RFC 9110 §15.5.20). Whether the handshake
//! was good enough for that host is what [`Servers::is_misdirected`] says. Istio answers 404 there, which clients take
//! for an answer.
//!
//! [`Servers::is_misdirected`]: mesh_core::Servers::is_misdirected

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, StatusCode};
use mesh_core::{Direction, Error, ListenerSet, RequestContext, ResponseFlags, Slot};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::request_view::RequestView;
use crate::table::RouteTable;

/// Selects routes from a table. Expects the request context and normalisation above it, and the layers that are per
/// route below it; a request that no route takes is answered 404 `NR` without reaching them.
///
/// ```
/// use std::sync::Arc;
/// use http::{Request, Response};
/// use mesh_core::{Body, Direction, Error, LocalReplyLayer, RequestContext, Slot};
/// use mesh_route::{RouteBuilder, RouteTable, SelectRouteLayer};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let table = RouteTable::builder()
///     .host("reviews", [RouteBuilder::new("hello").path_prefix("/hello").respond(200, "hi")?])
///     .build()?;
/// let service = ServiceBuilder::new()
///     .layer(LocalReplyLayer::new(Direction::Outbound))
///     .layer(SelectRouteLayer::new(Slot::fixed(table)))
///     .service_fn(|request: Request<Body>| async move {
///         let context = request.extensions().get::<RequestContext>().cloned();
///         let name = context.and_then(|context| context.with_route_name(|name| name.map(str::to_owned)));
///         Ok::<_, Error>(Response::new(Body::from(name.unwrap_or_default())))
///     });
/// let taken = Request::get("http://reviews/hello/world").body(Body::empty())?;
/// assert_eq!(service.clone().oneshot(taken).await?.status(), 200);
/// let lost = Request::get("http://reviews/bye").body(Body::empty())?;
/// assert_eq!(service.oneshot(lost).await?.status(), 404);
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct SelectRouteLayer {
    table: Slot<RouteTable>,
    direction: Direction,
    servers: Option<Slot<ListenerSet>>,
}

impl SelectRouteLayer {
    /// Selects from the table behind `table`, for requests that the program makes.
    #[must_use]
    pub fn new(table: Slot<RouteTable>) -> Self {
        Self { table, direction: Direction::Outbound, servers: None }
    }

    /// The direction of requests that come without a context. Default outbound.
    #[must_use]
    pub fn direction(mut self, direction: Direction) -> Self {
        self.direction = direction;
        self
    }

    /// Answers 421 to requests that come over a TLS connection to another server of a gateway. Default: the name that
    /// was asked for in the handshake is not looked at.
    #[must_use]
    pub fn servers(mut self, servers: Slot<ListenerSet>) -> Self {
        self.servers = Some(servers);
        self
    }
}

impl<S> Layer<S> for SelectRouteLayer {
    type Service = SelectRoute<S>;

    fn layer(&self, inner: S) -> SelectRoute<S> {
        SelectRoute {
            inner,
            table: self.table.clone(),
            direction: self.direction,
            servers: self.servers.clone(),
        }
    }
}

/// The service of [`SelectRouteLayer`].
#[derive(Clone, Debug)]
pub struct SelectRoute<S> {
    inner: S,
    table: Slot<RouteTable>,
    direction: Direction,
    servers: Option<Slot<ListenerSet>>,
}

impl<S, B> Service<Request<B>> for SelectRoute<S>
where
    S: Service<Request<B>>,
    S::Error: Into<Error>,
{
    type Response = S::Response;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        RequestContext::ensure(request.extensions_mut(), self.direction);
        let directed = self.servers.as_ref().map_or(Ok(()), |servers| directed(servers, &request));
        match directed.and_then(|()| reselect(&self.table, &request)) {
            Ok(()) => ResponseFuture(State::Selected(self.inner.call(request))),
            Err(error) => ResponseFuture(State::Lost(Some(error))),
        }
    }
}

/// Selects a route for the request as it is now and pins it in the place of the one that was.
///
/// # Errors
/// 404 `NR` when no route takes the request, or when the request has no context or the slot no model.
pub fn reselect<B>(table: &Slot<RouteTable>, request: &Request<B>) -> Result<(), Error> {
    let context = request.extensions().get::<RequestContext>().ok_or_else(not_found)?;
    let route = table
        .get(context)
        .and_then(|table| table.select(&RequestView::new(request, context.conn()), context.conn()))
        .ok_or_else(not_found)?;
    context.pin_route(Arc::clone(route) as _);
    Ok(())
}

/// 421 when the connection's handshake was that of another server than the request is for.
fn directed<B>(servers: &Slot<ListenerSet>, request: &Request<B>) -> Result<(), Error> {
    let Some(context) = request.extensions().get::<RequestContext>() else { return Ok(()) };
    let conn = context.conn();
    if !conn.tls {
        return Ok(());
    }
    let listener = servers.get(context).and_then(|set| set.port(conn.port));
    let authority = RequestView::new(request, conn).authority;
    if listener.is_some_and(|listener| listener.servers.is_misdirected(conn, authority)) {
        return Err(Error::local_reply(
            StatusCode::MISDIRECTED_REQUEST,
            ResponseFlags::NONE,
            "misdirected_request",
        ));
    }
    Ok(())
}

fn not_found() -> Error {
    Error::local_reply(StatusCode::NOT_FOUND, ResponseFlags::NO_ROUTE_FOUND, "route_not_found")
}

/// The future of [`SelectRoute`].
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F>(#[pin] State<F>);

#[pin_project(project = StateProjection)]
#[derive(Debug)]
enum State<F> {
    Selected(#[pin] F),
    Lost(Option<Error>),
}

impl<F, T, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<T, E>>,
    E: Into<Error>,
{
    type Output = Result<T, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().0.project() {
            StateProjection::Selected(future) => future.poll(cx).map_err(Into::into),
            StateProjection::Lost(error) => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                // Polled after it was ready, which the contract of futures forbids.
                None => Poll::Pending,
            },
        }
    }
}
