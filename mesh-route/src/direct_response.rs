//! A response that the route gives by itself (VS-D04).

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use mesh_core::{Body, RequestContext};

/// Status and body of a direct response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectResponse {
    /// 200 to 599.
    pub status: StatusCode,
    /// Empty for none.
    pub body: Bytes,
}

impl DirectResponse {
    /// The response.
    #[must_use]
    pub fn respond(&self, cx: &RequestContext) -> Response<Body> {
        cx.set_details("direct_response");
        let mut response = Response::new(Body::full(self.body.clone()));
        *response.status_mut() = self.status;
        if !self.body.is_empty() {
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        response
    }
}
