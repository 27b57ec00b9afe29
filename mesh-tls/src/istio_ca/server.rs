//! The server's side of one call: reads it within bounds, and writes what was decided.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use mesh_core::Body;

use super::PATH;
use super::message::{CertificateRequest, CertificateResponse};
use crate::grpc::{APPLICATION_GRPC, Code, Status, frame, unframe};

/// The longest request that is read, in bytes: a signing request with a large key is two thousand.
const MAX_REQUEST: usize = 32 * 1024;

/// How long a request may take to arrive.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was asked, and nothing of it is believed yet.
#[non_exhaustive]
pub struct Call {
    /// The message.
    pub request: CertificateRequest,
    /// The bearer token, where there is one. A secret.
    pub token: Option<String>,
}

impl Call {
    /// A call with this message and token.
    #[must_use]
    pub const fn new(request: CertificateRequest, token: Option<String>) -> Self {
        Self { request, token }
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("request", &self.request).finish_non_exhaustive()
    }
}

/// Answers a request to the certificate service: reads the call, lets `decide` decide of it, and writes what it says, the
/// chain of certificates in PEM with whom to believe last.
///
/// What is no such call is answered without `decide`: another path with `UNIMPLEMENTED`, a message that cannot be read
/// with `INVALID_ARGUMENT`, one of more than 32 KiB with `RESOURCE_EXHAUSTED`, one that takes longer than 10 s to arrive
/// with `DEADLINE_EXCEEDED`.
pub async fn answer<D>(request: Request<Body>, decide: D) -> Response<Body>
where
    D: FnOnce(Call) -> Result<Vec<String>, Status>,
{
    if request.method() != Method::POST {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED);
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
        return response;
    }
    let is_grpc = request.headers().get(CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.as_bytes();
        kind.starts_with(b"application/grpc") && matches!(kind.get(16), None | Some(b'+' | b';'))
    });
    if !is_grpc {
        return plain(StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }
    match read(request).await.and_then(decide) {
        Ok(chain) => granted(chain),
        Err(status) => refused(&status),
    }
}

async fn read(request: Request<Body>) -> Result<Call, Status> {
    let (head, body) = request.into_parts();
    if head.uri.path() != PATH {
        return Err(Status::new(Code::Unimplemented, format!("this server serves {PATH}")));
    }
    let token = bearer(&head.headers)?;
    let body = tokio::time::timeout(PATIENCE, Limited::new(body, MAX_REQUEST).collect());
    let body = match body.await {
        Err(_) => return Err(Status::new(Code::DeadlineExceeded, "the request did not arrive in time")),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            let words = format!("the request is longer than {MAX_REQUEST} bytes");
            return Err(Status::new(Code::ResourceExhausted, words));
        }
        Ok(Err(_)) => return Err(Status::new(Code::Cancelled, "the request broke off")),
        Ok(Ok(body)) => body.to_bytes(),
    };
    let request = CertificateRequest::decode(unframe(&body)?)
        .map_err(|error| Status::new(Code::InvalidArgument, error.to_string()))?;
    Ok(Call { request, token })
}

/// The token of `authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Result<Option<String>, Status> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let unreadable = || Status::new(Code::Unauthenticated, "authorization is not one bearer token");
    if values.next().is_some() {
        return Err(unreadable());
    }
    let (scheme, token) =
        value.to_str().ok().and_then(|value| value.split_once(' ')).ok_or_else(unreadable)?;
    if !scheme.eq_ignore_ascii_case("bearer") || token.trim().is_empty() {
        return Err(unreadable());
    }
    Ok(Some(token.trim().to_owned()))
}

fn granted(chain: Vec<String>) -> Response<Body> {
    let message = frame(&CertificateResponse::new(chain).encode());
    let mut trailers = HeaderMap::new();
    Status::new(Code::Ok, "").write(&mut trailers);
    let body = Full::new(message).with_trailers(async move { Some(Ok(trailers)) });
    let mut response = Response::new(Body::new(body));
    response.headers_mut().insert(CONTENT_TYPE, APPLICATION_GRPC);
    response
}

fn refused(status: &Status) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    response.headers_mut().insert(CONTENT_TYPE, APPLICATION_GRPC);
    status.write(response.headers_mut());
    response
}

fn plain(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::full(Bytes::from_static(b"this is a gRPC service\n")));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn post(body: impl Into<Bytes>) -> Request<Body> {
        let request = Request::post(PATH).header(CONTENT_TYPE, "application/grpc");
        request.body(Body::full(body)).unwrap()
    }

    fn asking(csr: &str) -> Request<Body> {
        post(frame(&CertificateRequest::new(csr.to_owned(), 60).encode()))
    }

    async fn status(request: Request<Body>) -> Status {
        let response = answer(request, |_| Ok(Vec::new())).await;
        assert_eq!(response.status(), StatusCode::OK);
        let (head, body) = response.into_parts();
        let trailers = body.collect().await.unwrap().trailers().cloned();
        Status::read(&head.headers).or_else(|| Status::read(&trailers?)).unwrap()
    }

    #[tokio::test]
    async fn pa_05_a_call_is_read_and_its_answer_written() {
        let mut request = asking("CSR");
        request.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("bearer secret"));
        let response = answer(request, |call| {
            assert_eq!((call.request.csr.as_str(), call.request.validity_duration), ("CSR", 60));
            assert_eq!(call.token.as_deref(), Some("secret"));
            assert!(!format!("{call:?}").contains("secret"));
            Ok(vec!["leaf".to_owned(), "root".to_owned()])
        });
        let body = response.await.into_body().collect().await.unwrap();
        assert_eq!(Status::read(body.trailers().unwrap()).unwrap().code, Code::Ok);
        let bytes = body.to_bytes();
        let response = CertificateResponse::decode(unframe(&bytes).unwrap()).unwrap();
        assert_eq!(response.cert_chain, ["leaf", "root"]);
        let no = answer(asking("CSR"), |_| Err(Status::new(Code::PermissionDenied, "no"))).await;
        assert_eq!(Status::read(no.headers()).unwrap(), Status::new(Code::PermissionDenied, "no"));
    }

    #[tokio::test]
    async fn what_is_no_call_is_refused() {
        assert_eq!(status(asking("CSR")).await.code, Code::Ok);
        assert_eq!(status(post("")).await.code, Code::InvalidArgument);
        assert_eq!(status(post(frame(b"\x08\x01"))).await.code, Code::InvalidArgument);
        assert_eq!(status(asking(&"x".repeat(MAX_REQUEST))).await.code, Code::ResourceExhausted);
        let mut elsewhere = asking("CSR");
        *elsewhere.uri_mut() = "/istio.v1.auth.IstioCertificateService/Other".parse().unwrap();
        assert_eq!(status(elsewhere).await.code, Code::Unimplemented);
        for values in [&["Basic abc"][..], &["Bearer"], &["Bearer "], &["Bearer a", "Bearer b"]] {
            let mut request = asking("CSR");
            for value in values {
                request.headers_mut().append(AUTHORIZATION, HeaderValue::from_static(value));
            }
            assert_eq!(status(request).await.code, Code::Unauthenticated, "{values:?}");
        }
        let http = async |change: fn(&mut Request<Body>)| {
            let mut request = asking("CSR");
            change(&mut request);
            answer(request, |_| Ok(Vec::new())).await.status()
        };
        let get = http(|request| *request.method_mut() = Method::GET).await;
        let json = http(|request| {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        });
        assert_eq!((get, json.await), (StatusCode::METHOD_NOT_ALLOWED, StatusCode::UNSUPPORTED_MEDIA_TYPE));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_arrive_is_given_up() {
        struct Never;
        impl hyper::body::Body for Never {
            type Data = Bytes;
            type Error = std::convert::Infallible;

            fn poll_frame(
                self: std::pin::Pin<&mut Self>,
                _: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
                std::task::Poll::Pending
            }
        }
        assert_eq!(status(asking("CSR").map(|_| Body::new(Never))).await.code, Code::DeadlineExceeded);
    }
}
