//! The request as matching sees it: the one normalised request, taken apart without copying.

use http::request::Parts;
use http::{HeaderMap, Request};
use mesh_core::ConnInfo;

/// What predicates read. Made from the request that the edge normalised; nothing reads the raw target.
#[derive(Clone, Copy, Debug)]
pub struct RequestView<'a> {
    /// The method, upper case.
    pub method: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// `Host` or `:authority`, with its port if it was sent.
    pub authority: &'a str,
    /// The path without query; `/` when there is none.
    pub path: &'a str,
    /// The query without `?`; empty when there is none.
    pub query: &'a str,
    /// Path and query as they were sent on: Envoy's `:path`.
    pub target: &'a str,
    /// The headers.
    pub headers: &'a HeaderMap,
}

impl<'a> RequestView<'a> {
    /// The view of a request on `conn`.
    #[must_use]
    pub fn new<B>(request: &'a Request<B>, conn: &ConnInfo) -> Self {
        Self::of(request.method(), request.uri(), request.headers(), conn)
    }

    /// The view of a request's parts.
    #[must_use]
    pub fn from_parts(parts: &'a Parts, conn: &ConnInfo) -> Self {
        Self::of(&parts.method, &parts.uri, &parts.headers, conn)
    }

    fn of(method: &'a http::Method, uri: &'a http::Uri, headers: &'a HeaderMap, conn: &ConnInfo) -> Self {
        let authority = match uri.authority() {
            Some(authority) => authority.as_str(),
            None => headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or(""),
        };
        Self {
            method: method.as_str(),
            scheme: uri.scheme_str().unwrap_or(if conn.tls { "https" } else { "http" }),
            authority,
            path: match uri.path() {
                "" => "/",
                path => path,
            },
            query: uri.query().unwrap_or(""),
            target: uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str),
            headers,
        }
    }
}
