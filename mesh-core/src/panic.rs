//! A panic is the end of one request, not of its connection, its worker or the process (F7).
//!
//! Every worker drives many requests on one thread, and every request of an HTTP/1 connection shares its task, so an
//! unwinding layer would take innocent requests along. [`CatchPanic`] stops the unwinding at the request: the
//! panicking future is dropped and the request fails with a 500 of kind [`ErrorKind::Internal`], which takes the
//! ordinary way up through local reply and telemetry. It belongs right below [`LocalReply`](crate::local_reply);
//! the server's own edge has a second net around the whole stack, for the layers above.
//!
//! Unwind safety: a panicking future is never polled again, so nothing sees its torn state. What it shared with
//! others (a cluster's counters, a pool) is made of atomics and of guards that release on drop, which unwinding runs.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use http::{Request, Response, StatusCode};
use pin_project::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::error::{Error, ErrorKind};
use crate::flags::ResponseFlags;

/// How many requests ended in a panic. Cloning shares the count.
#[derive(Clone, Debug, Default)]
pub struct Panics(Arc<AtomicU64>);

impl Panics {
    /// The count so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes [`CatchPanic`] services.
///
/// ```
/// use http::{Request, Response, StatusCode};
/// use mesh_core::{Body, CatchPanicLayer, Direction, Error, LocalReplyLayer, Panics};
/// use tower::{ServiceBuilder, ServiceExt};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let panics = Panics::default();
/// let service = ServiceBuilder::new()
///     .layer(LocalReplyLayer::new(Direction::Inbound))
///     .layer(CatchPanicLayer::new(panics.clone()))
///     .service_fn(|request: Request<Body>| async move {
///         assert_ne!(request.uri().path(), "/bug");
///         Ok::<_, Error>(Response::new(Body::empty()))
///     });
/// let broken = service.clone().oneshot(Request::get("http://a/bug").body(Body::empty())?).await?;
/// assert_eq!((broken.status(), panics.count()), (StatusCode::INTERNAL_SERVER_ERROR, 1));
/// let whole = service.oneshot(Request::get("http://a/").body(Body::empty())?).await?;
/// assert_eq!(whole.status(), StatusCode::OK);
/// # Ok(())
/// # }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug, Default)]
pub struct CatchPanicLayer {
    panics: Panics,
}

impl CatchPanicLayer {
    /// Counts into `panics`.
    #[must_use]
    pub const fn new(panics: Panics) -> Self {
        Self { panics }
    }
}

impl<S> Layer<S> for CatchPanicLayer {
    type Service = CatchPanic<S>;

    fn layer(&self, inner: S) -> CatchPanic<S> {
        CatchPanic { inner, panics: self.panics.clone() }
    }
}

/// Turns a panic in `S` or in its future into an [`Error`].
#[derive(Clone, Debug)]
pub struct CatchPanic<S> {
    inner: S,
    panics: Panics,
}

impl<S, B, R> Service<Request<B>> for CatchPanic<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<Error>,
{
    type Response = Response<R>;
    type Error = Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture<S::Future> {
        let inner = catch(&self.panics, || self.inner.call(request)).ok();
        ResponseFuture { inner, panics: self.panics.clone() }
    }
}

/// The future of [`CatchPanic`].
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F> {
    #[pin]
    inner: Option<F>,
    panics: Panics,
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<Error>,
{
    type Output = Result<Response<R>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            return Poll::Ready(Err(error()));
        };
        match catch(this.panics, || inner.poll(cx)) {
            Ok(poll) => poll.map_err(Into::into),
            Err(Panicked) => {
                // Dropping what panicked may panic again; that is part of the same accident.
                let _ = catch_unwind(AssertUnwindSafe(|| this.inner.set(None)));
                Poll::Ready(Err(error()))
            }
        }
    }
}

/// Something panicked, and was counted and logged.
pub(crate) struct Panicked;

pub(crate) fn catch<T>(panics: &Panics, run: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|payload| {
        panics.add();
        tracing::error!(panic = message(&*payload), "a request panicked");
        Panicked
    })
}

pub(crate) fn error() -> Error {
    Error::new(ErrorKind::Internal, StatusCode::INTERNAL_SERVER_ERROR, ResponseFlags::NONE, "panic")
}

fn message(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&'static str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "(no message)"
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tower::{ServiceBuilder, ServiceExt as _, service_fn};

    use super::*;

    async fn touchy(request: Request<()>) -> Result<Response<()>, Infallible> {
        tokio::task::yield_now().await;
        assert!(request.uri().path() != "/panic", "touched");
        Ok(Response::new(()))
    }

    #[tokio::test]
    async fn f7_a_panic_fails_its_own_request_only() {
        let panics = Panics::default();
        let service =
            ServiceBuilder::new().layer(CatchPanicLayer::new(panics.clone())).service(service_fn(touchy));
        let request = |path: &'static str| Request::builder().uri(path).body(()).unwrap();
        let error = service.clone().oneshot(request("/panic")).await.unwrap_err();
        assert_eq!(error.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert_eq!(error.details(), "panic");
        assert!(service.oneshot(request("/")).await.is_ok());
        assert_eq!(panics.count(), 1);
    }

    #[tokio::test]
    async fn f7_a_panic_in_call_is_caught_too() {
        let panics = Panics::default();
        let service = ServiceBuilder::new().layer(CatchPanicLayer::new(panics.clone())).service(service_fn(
            |_: Request<()>| -> std::future::Ready<Result<Response<()>, Infallible>> {
                panic!("in {}", "call")
            },
        ));
        assert!(service.oneshot(Request::new(())).await.is_err());
        assert_eq!(panics.count(), 1);
    }
}
