//! A body that comes back when nobody has read of it.
//!
//! A service that could not send a request drops it. What it had not begun to read is as good as new, however large.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use mesh_core::{Body, Error};

/// Where a body comes back to.
#[derive(Clone, Debug, Default)]
pub(super) struct Lender(Arc<Mutex<Option<Body>>>);

impl Lender {
    /// Lends a body.
    pub(super) fn lend(&self, body: Body) -> Body {
        Body::new(Lent { body: Some(body), lender: Some(self.clone()) })
    }

    /// What came back.
    pub(super) fn take(&self) -> Option<Body> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

struct Lent {
    /// There until it is dropped.
    body: Option<Body>,
    /// `None` once it was read of.
    lender: Option<Lender>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        this.lender = None;
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(Lender(lender)) = &self.lender {
            if let Some(body) = &mut self.body {
                body.give_back();
            }
            *lender.lock().unwrap_or_else(PoisonError::into_inner) = self.body.take();
        }
    }
}
