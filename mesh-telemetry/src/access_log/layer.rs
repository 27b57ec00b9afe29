//! The tower layer that writes one line per request.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{Request, Response};
use mesh_core::{Body, BodyHook, Direction, EndOfBody, RequestContext, ResponseFlags};
use pin_project::{pin_project, pinned_drop};
use tower_layer::Layer;
use tower_service::Service;

use super::entry::Entry;
use super::sink::AccessLogSink;

/// Adds an access log. Stands outermost; expects nothing above it.
///
/// ```
/// use http::{Request, Response};
/// use mesh_core::Body;
/// use mesh_telemetry::access_log::{AccessLogLayer, AccessLogSink};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), std::convert::Infallible> {
/// let (sink, writer) = AccessLogSink::new();
/// std::thread::spawn(move || writer.run(std::io::stdout()));
///
/// let service = ServiceBuilder::new()
///     .layer(AccessLogLayer::new(sink))
///     .service_fn(|_: Request<Body>| async { Ok::<_, std::convert::Infallible>(Response::new(Body::from("hello"))) });
/// let response = service.oneshot(Request::new(Body::empty())).await?;
/// # drop(response);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct AccessLogLayer {
    sink: Option<AccessLogSink>,
}

impl AccessLogLayer {
    /// Writes to `sink`.
    #[must_use]
    pub fn new(sink: AccessLogSink) -> Self {
        Self { sink: Some(sink) }
    }

    /// Writes nothing and costs nothing: Istio's default, `accessLogFile: ""`.
    #[must_use]
    pub fn off() -> Self {
        Self { sink: None }
    }

    /// Where the lines go; `None` when it writes nothing.
    #[must_use]
    pub fn sink(&self) -> Option<&AccessLogSink> {
        self.sink.as_ref()
    }
}

impl<S> Layer<S> for AccessLogLayer {
    type Service = AccessLog<S>;

    fn layer(&self, inner: S) -> AccessLog<S> {
        AccessLog { inner, sink: self.sink.clone() }
    }
}

/// The service of [`AccessLogLayer`].
#[derive(Clone, Debug)]
pub struct AccessLog<S> {
    inner: S,
    sink: Option<AccessLogSink>,
}

impl<S, B> Service<Request<B>> for AccessLog<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let pending = self.sink.as_ref().map(|sink| Pending {
            entry: Entry::capture(&request),
            context: RequestContext::ensure(request.extensions_mut(), Direction::Inbound),
            sink: sink.clone(),
        });
        ResponseFuture { inner: self.inner.call(request), pending }
    }
}

/// The future of [`AccessLog`]. Dropped before its response, it writes the line of a client that left.
#[pin_project(PinnedDrop)]
#[derive(Debug)]
pub struct ResponseFuture<F> {
    #[pin]
    inner: F,
    pending: Option<Pending>,
}

impl<F, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = Result<Response<Body>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(cx));
        let Some(mut pending) = this.pending.take() else {
            return Poll::Ready(response);
        };
        Poll::Ready(match response {
            Ok(response) => {
                pending.entry.responded(response.status().as_u16(), response.headers());
                Ok(response.map(|body| body.with_hook(pending)))
            }
            Err(error) => {
                pending.write();
                Err(error)
            }
        })
    }
}

#[pinned_drop]
impl<F> PinnedDrop for ResponseFuture<F> {
    fn drop(self: Pin<&mut Self>) {
        if let Some(pending) = self.project().pending.take() {
            pending.context.add_flags(ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION);
            pending.write();
        }
    }
}

#[derive(Debug)]
struct Pending {
    entry: Entry,
    context: RequestContext,
    sink: AccessLogSink,
}

impl Pending {
    fn write(&self) {
        let duration = mesh_core::clock::now().saturating_duration_since(self.context.received_at());
        self.sink.write(self.entry.line(&self.context, duration));
    }
}

impl BodyHook for Pending {
    fn on_end(&mut self, end: EndOfBody<'_>) {
        match end {
            EndOfBody::Complete => {}
            EndOfBody::Failed(error) => {
                self.context.add_flags(error.flags());
                self.context.set_details(error.details().to_owned());
            }
            _ => {
                self.context.add_flags(ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION);
                self.context.set_details("downstream_remote_disconnect");
            }
        }
        self.write();
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::pending;

    use http_body_util::BodyExt as _;
    use tower::{ServiceBuilder, ServiceExt as _};

    use super::*;
    use crate::access_log::Writer;

    fn written(writer: Writer) -> Vec<String> {
        let write = move || {
            let mut out = Vec::new();
            writer.run(&mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        std::thread::spawn(write).join().unwrap().lines().map(|line| line[26..].to_owned()).collect()
    }

    fn request() -> Request<Body> {
        Request::get("http://reviews/a?b=c")
            .header("user-agent", "curl/8")
            .header("x-forwarded-for", "10.0.0.1")
            .body(Body::empty())
            .unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn te_06_one_line_at_the_end_of_the_body() {
        let (sink, writer) = AccessLogSink::new();
        let service = ServiceBuilder::new().layer(AccessLogLayer::new(sink)).service_fn(
            async |request: Request<Body>| {
                let cx = request.extensions().get::<RequestContext>().unwrap();
                cx.set_details("via_upstream");
                Ok::<_, Infallible>(Response::new(Body::from("hello")))
            },
        );
        let response = service.oneshot(request()).await.unwrap();
        tokio::time::advance(std::time::Duration::from_millis(7)).await;
        response.into_body().collect().await.unwrap();
        assert_eq!(
            written(writer),
            [
                r#" "GET /a?b=c HTTP/1.1" 200 - via_upstream - "-" 0 0 7 - "10.0.0.1" "curl/8" "-" "reviews" "-" - - 0.0.0.0:0 0.0.0.0:0 - -"#
            ]
        );
    }

    #[tokio::test]
    async fn te_06_the_authority_is_the_one_that_is_routed() {
        let (sink, writer) = AccessLogSink::new();
        let service = ServiceBuilder::new()
            .layer(AccessLogLayer::new(sink))
            .layer(mesh_core::NormalizeLayer::new(
                mesh_core::Slot::fixed(mesh_core::EdgeSettings::default()),
                Direction::Outbound,
            ))
            .service_fn(async |request: Request<Body>| {
                assert_eq!(request.headers()["host"], "reviews", "the absolute form decides");
                Ok::<_, mesh_core::Error>(Response::new(Body::empty()))
            });
        let mut request = request();
        request.headers_mut().insert("host", http::HeaderValue::from_static("somebody.else"));
        service.oneshot(request).await.unwrap().into_body().collect().await.unwrap();
        let lines = written(writer);
        assert!(lines[0].contains(r#" "reviews" "-" "#), "{lines:?}");
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_code_0_and_dc() {
        let (sink, writer) = AccessLogSink::new();
        let service = ServiceBuilder::new()
            .layer(AccessLogLayer::new(sink))
            .service_fn(async |_: Request<Body>| pending::<Result<Response<Body>, Infallible>>().await);
        drop(service.oneshot(request()));
        let (sink, second) = AccessLogSink::new();
        let mut service = ServiceBuilder::new()
            .layer(AccessLogLayer::new(sink))
            .service_fn(async |_: Request<Body>| pending::<Result<Response<Body>, Infallible>>().await);
        drop(Service::call(&mut service, request()));
        drop(service);
        assert!(written(writer).is_empty(), "never called, never logged");
        let lines = written(second);
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains(r#"HTTP/1.1" 0 DC "#), "{lines:?}");
    }

    #[tokio::test]
    async fn a_body_that_nobody_reads_to_its_end_is_dc() {
        let (sink, writer) = AccessLogSink::new();
        let service = ServiceBuilder::new()
            .layer(AccessLogLayer::new(sink))
            .service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(Body::from("hello"))));
        drop(service.oneshot(request()).await.unwrap());
        let lines = written(writer);
        assert!(lines[0].contains(r#"HTTP/1.1" 200 DC downstream_remote_disconnect "#), "{lines:?}");
    }
}
