//! The one place that turns an [`Error`] into a reply.
//!
//! Layers end a request by returning an error; none of them builds a response. So flags and response code details
//! reach the [`RequestContext`] at one place, a reply to a gRPC request takes gRPC's form at one place, and layers
//! between the failing one and this one (CORS, header operations) can still add headers to it. `server` and `date`
//! are left to the HTTP codec.
//!
//! A gRPC client does not read HTTP statuses, so it is answered 200 with `grpc-status` and `grpc-message` in the
//! headers and nothing after them (X-10). A layer that knows better (an injected gRPC fault) says so with
//! [`Error::with_grpc_status`].
//!
//! The service's own error is [`Infallible`], so a single layer over a foreign server (axum) ends in it. It expects
//! telemetry above, which reads what is written here, and everything that may fail below.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body as HttpBody;
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::body::Body;
use crate::conn::Direction;
use crate::context::RequestContext;
use crate::error::{BoxError, Error, ErrorKind};

const GRPC: &str = "application/grpc";
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Makes [`LocalReply`] services.
///
/// ```
/// use http::{Request, StatusCode};
/// use mesh_core::{Body, Direction, Error, ErrorKind, LocalReplyLayer, ResponseFlags};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let service = ServiceBuilder::new()
///     .layer(LocalReplyLayer::new(Direction::Inbound))
///     .service_fn(|_: Request<Body>| async {
///         Err::<http::Response<Body>, _>(Error::new(
///             ErrorKind::NoHealthyUpstream,
///             StatusCode::SERVICE_UNAVAILABLE,
///             ResponseFlags::NO_HEALTHY_UPSTREAM,
///             "no_healthy_upstream",
///         ))
///     });
/// let plain = service.clone().oneshot(Request::get("http://a/").body(Body::empty())?).await?;
/// assert_eq!(plain.status(), StatusCode::SERVICE_UNAVAILABLE);
///
/// let grpc = Request::post("http://a/p.S/M").header("content-type", "application/grpc").body(Body::empty())?;
/// let answer = service.oneshot(grpc).await?;
/// assert_eq!((answer.status(), &answer.headers()["grpc-status"]), (StatusCode::OK, &"14".parse()?));
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Copy, Debug)]
pub struct LocalReplyLayer {
    direction: Direction,
}

impl LocalReplyLayer {
    /// For a stack that serves `direction`; it matters only to requests that come without a [`RequestContext`].
    #[must_use]
    pub const fn new(direction: Direction) -> Self {
        Self { direction }
    }
}

impl<S> Layer<S> for LocalReplyLayer {
    type Service = LocalReply<S>;

    fn layer(&self, inner: S) -> LocalReply<S> {
        LocalReply { inner, direction: self.direction, unready: None }
    }
}

/// Answers the errors of `S`.
#[derive(Debug)]
pub struct LocalReply<S> {
    inner: S,
    direction: Direction,
    unready: Option<Error>,
}

impl<S: Clone> Clone for LocalReply<S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), direction: self.direction, unready: None }
    }
}

impl<S, B, R> Service<Request<B>> for LocalReply<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<Error>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ResponseFuture<S::Future>;

    /// A failure to become ready has no request to answer. It is kept for the next call, which it fails.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        if let Err(error) = ready!(self.inner.poll_ready(cx)) {
            self.unready = Some(error.into());
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<B>) -> ResponseFuture<S::Future> {
        let context = RequestContext::ensure(request.extensions_mut(), self.direction);
        context.set_grpc(is_grpc(request.headers()));
        let head = *request.method() == Method::HEAD;
        let state = match self.unready.take() {
            Some(error) => State::Unready(Some(error)),
            None => State::Running(self.inner.call(request)),
        };
        ResponseFuture { state, context, head }
    }
}

/// The future of [`LocalReply`].
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F> {
    #[pin]
    state: State<F>,
    context: RequestContext,
    /// Whether the request is HEAD, to which no answer has a body.
    head: bool,
}

#[pin_project(project = StateProj)]
#[derive(Debug)]
enum State<F> {
    Unready(Option<Error>),
    Running(#[pin] F),
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<Error>,
    R: HttpBody<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let error = match this.state.project() {
            StateProj::Unready(error) => {
                error.take().unwrap_or_else(|| Error::internal("polled after it was done"))
            }
            StateProj::Running(inner) => match ready!(inner.poll(cx)) {
                Ok(response) => {
                    let response = response.map(Body::new);
                    return Poll::Ready(Ok(if *this.head { without_body(response) } else { response }));
                }
                Err(error) => error.into(),
            },
        };
        let reply = reply(this.context, error);
        Poll::Ready(Ok(if *this.head { without_body(reply) } else { reply }))
    }
}

/// What answers HEAD: the head of the answer to GET, with the length of the body that it does not have. Over HTTP/1.1
/// hyper would leave the body out; over HTTP/2 it would send it, and the client would have to reset the stream.
fn without_body(mut response: Response<Body>) -> Response<Body> {
    if response.body().is_end_stream() {
        return response;
    }
    if let Some(length) = response.body().size_hint().exact()
        && !response.headers().contains_key(CONTENT_LENGTH)
    {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    response.map(|_| Body::empty())
}

/// Makes the reply that `error` asks for, and writes its flags and details into `context`.
pub(crate) fn reply(context: &RequestContext, error: Error) -> Response<Body> {
    match error.kind() {
        ErrorKind::Internal => tracing::error!(%error, "a request failed for a defect of ours"),
        _ => tracing::debug!(%error, "local reply"),
    }
    let grpc = error.grpc_status();
    let (status, flags, details, mut headers, body) = error.into_reply();
    context.add_flags(flags);
    context.set_details(details);
    headers.remove(CONTENT_LENGTH);

    let (status, body) = if context.is_grpc() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
        if grpc.is_some() || !headers.contains_key(GRPC_STATUS) {
            headers.insert(GRPC_STATUS, HeaderValue::from(grpc.unwrap_or_else(|| grpc_status(status))));
        }
        if !body.is_empty() && !headers.contains_key(GRPC_MESSAGE) {
            headers.insert(GRPC_MESSAGE, percent_encode(&body));
        }
        (StatusCode::OK, Body::empty())
    } else {
        if !body.is_empty() && !headers.contains_key(CONTENT_TYPE) {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        (status, Body::full(body))
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// `application/grpc`, alone or with a suffix (`+proto`) or parameters. gRPC-Web is another protocol and reads HTTP
/// statuses.
fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.as_bytes().strip_prefix(GRPC.as_bytes()))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// Envoy's mapping of HTTP statuses (X-10).
fn grpc_status(status: StatusCode) -> u32 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

/// What gRPC's `grpc-message` asks for: printable ASCII but `%` stands for itself.
fn percent_encode(message: &[u8]) -> HeaderValue {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut encoded = Vec::with_capacity(message.len());
    for &byte in message {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            encoded.push(byte);
        } else {
            encoded.extend([b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
    HeaderValue::from_maybe_shared(Bytes::from(encoded))
        .unwrap_or_else(|_| HeaderValue::from_static("message could not be encoded"))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tower::{ServiceBuilder, ServiceExt as _, service_fn};

    use super::*;
    use crate::flags::ResponseFlags;

    fn not_found() -> Error {
        Error::local_reply(StatusCode::NOT_FOUND, ResponseFlags::NO_ROUTE_FOUND, "route_not_found")
            .with_header(HeaderName::from_static("x-from-a-layer"), HeaderValue::from_static("1"))
            .with_body("no such route: 100%\n")
    }

    async fn answer(content_type: Option<&'static str>, error: Error) -> (Response<Body>, RequestContext) {
        let mut error = Some(error);
        let service =
            ServiceBuilder::new().layer(LocalReplyLayer::new(Direction::Inbound)).service(service_fn(
                move |_: Request<()>| std::future::ready(Err::<Response<Body>, _>(error.take().unwrap())),
            ));
        let mut request = Request::new(());
        if let Some(value) = content_type {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(value));
        }
        let context = RequestContext::ensure(request.extensions_mut(), Direction::Inbound);
        (service.oneshot(request).await.unwrap(), context)
    }

    #[tokio::test]
    async fn bug_an_answer_to_head_had_a_body() {
        let answer = |fails: bool| {
            LocalReplyLayer::new(Direction::Inbound).layer(service_fn(move |_: Request<()>| async move {
                if fails {
                    let error = Error::local_reply(StatusCode::NOT_FOUND, ResponseFlags::NO_ROUTE_FOUND, "x");
                    return Err(error.with_body("nothing here"));
                }
                Ok(Response::new(Body::from("hello")))
            }))
        };
        for (fails, status, length) in [(true, StatusCode::NOT_FOUND, "12"), (false, StatusCode::OK, "5")] {
            let request = Request::head("/").body(()).unwrap();
            let response = answer(fails).oneshot(request).await.unwrap();
            assert_eq!(response.status(), status);
            assert_eq!(response.headers()["content-length"], length);
            assert!(response.body().is_end_stream());
        }
    }

    #[tokio::test]
    async fn an_http_request_gets_status_headers_and_text() {
        let (response, context) = answer(None, not_found()).await;
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(response.headers()[CONTENT_TYPE], "text/plain");
        assert_eq!(response.headers()["x-from-a-layer"], "1");
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "no such route: 100%\n");
        assert_eq!(context.flags(), ResponseFlags::NO_ROUTE_FOUND);
        assert_eq!(context.details().as_deref(), Some("route_not_found"));
        assert!(!context.is_grpc());
    }

    #[tokio::test]
    async fn x_10_a_grpc_request_gets_a_status_in_the_headers() {
        for content_type in ["application/grpc", "application/grpc+proto"] {
            let (response, context) = answer(Some(content_type), not_found()).await;
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.headers()[CONTENT_TYPE], "application/grpc");
            assert_eq!(response.headers()["grpc-status"], "12");
            assert_eq!(response.headers()["grpc-message"], "no such route: 100%25%0A");
            assert_eq!(response.headers()["x-from-a-layer"], "1");
            assert!(response.into_body().is_end_stream());
            assert!(context.is_grpc());
            assert_eq!(context.flags(), ResponseFlags::NO_ROUTE_FOUND);
        }
    }

    #[tokio::test]
    async fn x_10_grpc_web_reads_http_statuses() {
        let (response, _) = answer(Some("application/grpc-web"), not_found()).await;
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn a_grpc_status_that_a_layer_chose_stands() {
        let error = Error::local_reply(StatusCode::OK, ResponseFlags::FAULT_INJECTED, "fault_filter_abort")
            .with_header(GRPC_STATUS, HeaderValue::from_static("8"));
        let (response, _) = answer(Some("application/grpc"), error).await;
        assert_eq!(response.headers().get_all("grpc-status").iter().count(), 1);
        assert_eq!(response.headers()["grpc-status"], "8");
    }

    #[tokio::test]
    async fn x_10_an_error_says_its_own_status_to_grpc_alone() {
        let injected = || {
            Error::local_reply(StatusCode::OK, ResponseFlags::FAULT_INJECTED, "fault_filter_abort")
                .with_grpc_status(14)
                .with_body("fault filter abort")
        };
        let (response, _) = answer(Some("application/grpc"), injected()).await;
        assert_eq!(
            (response.status(), &response.headers()["grpc-status"]),
            (StatusCode::OK, &"14".parse().unwrap())
        );
        assert_eq!(response.headers()["grpc-message"], "fault filter abort");
        let (response, _) = answer(None, injected()).await;
        assert_eq!((response.status(), response.headers().get("grpc-status")), (StatusCode::OK, None));
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "fault filter abort");
    }

    #[test]
    fn x_10_the_table() {
        let table = [
            (400, 13),
            (401, 16),
            (403, 7),
            (404, 12),
            (429, 14),
            (502, 14),
            (503, 14),
            (504, 14),
            (500, 2),
            (418, 2),
        ];
        for (http, grpc) in table {
            assert_eq!(grpc_status(StatusCode::from_u16(http).unwrap()), grpc, "{http}");
        }
    }

    #[tokio::test]
    async fn a_body_of_ours_passes_unboxed_and_a_foreign_one_is_boxed() {
        let service = ServiceBuilder::new()
            .layer(LocalReplyLayer::new(Direction::Inbound))
            .service(service_fn(async |_: Request<()>| Ok::<_, Error>(Response::new(Body::full("ours")))));
        let response = service.oneshot(Request::new(())).await.unwrap();
        assert!(format!("{:?}", response.body()).contains("Full"));
        let service = ServiceBuilder::new()
            .layer(LocalReplyLayer::new(Direction::Inbound))
            .service(service_fn(async |_: Request<()>| Ok::<_, Error>(Response::new("foreign".to_owned()))));
        let response = service.oneshot(Request::new(())).await.unwrap();
        assert!(format!("{:?}", response.body()).contains("Boxed"));
    }

    #[tokio::test]
    async fn a_service_that_cannot_become_ready_is_answered() {
        struct Broken;
        impl Service<Request<()>> for Broken {
            type Response = Response<Body>;
            type Error = Error;
            type Future = std::future::Ready<Result<Response<Body>, Error>>;
            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
                Poll::Ready(Err(Error::internal("broken")))
            }
            fn call(&mut self, _: Request<()>) -> Self::Future {
                unreachable!("it never was ready")
            }
        }
        let service = LocalReplyLayer::new(Direction::Inbound).layer(Broken);
        let response = service.oneshot(Request::new(())).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }
}
