//! The one error of every layer.
//!
//! A layer that ends a request does not build a response: it returns an [`Error`] that says what happened
//! ([`ErrorKind`]), what the client is told (status, body, headers) and what telemetry is told (flags, details).
//! [`LocalReply`](crate::local_reply) turns it into an HTTP or a gRPC reply at one place, so that layers between
//! can still add their headers. Being rare, it is one pointer wide.

use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::flags::ResponseFlags;

/// Any error, boxed.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a request, or a body, did not come to its normal end.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    status: StatusCode,
    flags: ResponseFlags,
    details: Cow<'static, str>,
    headers: HeaderMap,
    body: Bytes,
    grpc_status: Option<u32>,
    source: Option<BoxError>,
}

/// What went wrong, as far as retries and outlier detection care.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A policy of ours decided the reply: no route, denied, limited, injected.
    LocalReply,
    /// The downstream broke the protocol or sent something that is refused.
    BadRequest,
    /// The downstream went away.
    DownstreamReset,
    /// The upstream connection could not be made.
    ConnectFailure,
    /// The upstream connection was not made in time.
    ConnectTimeout,
    /// The connection died before any byte of the request was written: safe to send again.
    Unsent,
    /// The upstream refused the stream without looking at it (`REFUSED_STREAM`, or above GOAWAY's last id).
    RefusedStream,
    /// The connection or stream ended after the request was written, before the response was whole.
    UpstreamReset,
    /// The upstream broke the protocol.
    UpstreamProtocol,
    /// The route timeout or per-try timeout passed.
    Timeout,
    /// A limit of the cluster was reached.
    Overflow,
    /// No endpoint can take the request.
    NoHealthyUpstream,
    /// A defect of ours: a panic, a broken invariant, an error of a foreign layer.
    Internal,
}

impl ErrorKind {
    /// Whether the upstream cannot have seen the request, so that sending it again duplicates nothing.
    #[must_use]
    pub const fn is_unsent(self) -> bool {
        matches!(
            self,
            Self::ConnectFailure
                | Self::ConnectTimeout
                | Self::Unsent
                | Self::RefusedStream
                | Self::Overflow
                | Self::NoHealthyUpstream
        )
    }
}

impl Error {
    /// An error of `kind` that is answered with `status`; `details` are Envoy's response code details.
    #[must_use]
    pub fn new(
        kind: ErrorKind,
        status: StatusCode,
        flags: ResponseFlags,
        details: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self(Box::new(Inner {
            kind,
            status,
            flags,
            details: details.into(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            grpc_status: None,
            source: None,
        }))
    }

    /// A reply that a policy decided.
    #[must_use]
    pub fn local_reply(
        status: StatusCode,
        flags: ResponseFlags,
        details: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::new(ErrorKind::LocalReply, status, flags, details)
    }

    /// A defect of ours or of a foreign layer: 500.
    #[must_use]
    pub fn internal(source: impl Into<BoxError>) -> Self {
        Self::new(
            ErrorKind::Internal,
            StatusCode::INTERNAL_SERVER_ERROR,
            ResponseFlags::NONE,
            "internal_error",
        )
        .with_source(source)
    }

    /// Adds a header to the reply.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.append(name, value);
        self
    }

    /// Sets the body of the reply (`text/plain`; the `grpc-message` of a gRPC reply). Empty by default.
    #[must_use]
    pub fn with_body(mut self, body: impl Into<Bytes>) -> Self {
        self.0.body = body.into();
        self
    }

    /// Sets the status of a gRPC reply, 0 to 16. By default it follows from the HTTP status; a reply to a request
    /// that is not gRPC does not have it.
    #[must_use]
    pub fn with_grpc_status(mut self, code: u32) -> Self {
        self.0.grpc_status = Some(code);
        self
    }

    /// Adds what caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The HTTP status of the reply.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// The status of a gRPC reply, where it does not follow from the HTTP status.
    #[must_use]
    pub fn grpc_status(&self) -> Option<u32> {
        self.0.grpc_status
    }

    /// The response flags that this error sets.
    #[must_use]
    pub fn flags(&self) -> ResponseFlags {
        self.0.flags
    }

    /// The response code details, as Envoy words them (`route_not_found`).
    #[must_use]
    pub fn details(&self) -> &str {
        &self.0.details
    }

    /// The headers of the reply.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.0.headers
    }

    /// The headers of the reply, for layers that treat a reply like any response (CORS, header operations).
    pub fn headers_mut(&mut self) -> &mut HeaderMap {
        &mut self.0.headers
    }

    /// The body of the reply.
    #[must_use]
    pub fn body(&self) -> &Bytes {
        &self.0.body
    }

    pub(crate) fn into_reply(self) -> (StatusCode, ResponseFlags, Cow<'static, str>, HeaderMap, Bytes) {
        let inner = *self.0;
        (inner.status, inner.flags, inner.details, inner.headers, inner.body)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.0.details, self.0.status.as_u16())?;
        if !self.0.flags.is_empty() {
            write!(f, " {}", self.0.flags)?;
        }
        f.write_str(")")?;
        match &self.0.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("status", &self.0.status)
            .field("flags", &self.0.flags)
            .field("details", &self.0.details)
            .field("source", &self.0.source)
            .finish_non_exhaustive()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.source {
            Some(source) => Some(source.as_ref()),
            None => None,
        }
    }
}

impl From<Infallible> for Error {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// An [`Error`] in the box is taken out again; anything else is [`ErrorKind::Internal`].
impl From<BoxError> for Error {
    fn from(error: BoxError) -> Self {
        match error.downcast::<Self>() {
            Ok(error) => *error,
            Err(other) => Self::internal(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }

    #[test]
    fn survives_a_box() {
        let boxed: BoxError = Box::new(Error::local_reply(
            StatusCode::NOT_FOUND,
            ResponseFlags::NO_ROUTE_FOUND,
            "route_not_found",
        ));
        let error = Error::from(boxed);
        assert_eq!(error.status(), StatusCode::NOT_FOUND);
        assert_eq!(error.to_string(), "route_not_found (404 NR)");
        let foreign = Error::from(BoxError::from("boom"));
        assert_eq!(foreign.kind(), ErrorKind::Internal);
        assert_eq!(foreign.to_string(), "internal_error (500): boom");
    }
}
