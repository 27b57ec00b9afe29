//! Redirects (VS-D01, VS-D02, VS-D03).

use std::fmt::Write as _;

use http::header::LOCATION;
use http::{HeaderValue, Response, StatusCode};
use mesh_core::{Body, ConnInfo, Direction, Error, RequestContext, ResponseFlags};

use crate::request_view::RequestView;

/// Where a client is sent instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308. Default 301.
    pub code: StatusCode,
    /// `http` or `https`; `None` keeps that of the request.
    pub scheme: Option<&'static str>,
    /// `None` keeps that of the request.
    pub authority: Option<Box<str>>,
    /// What becomes of the port.
    pub port: RedirectPort,
    /// What becomes of the path.
    pub path: RedirectPath,
}

/// What becomes of the port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RedirectPort {
    /// That of the authority; a default port of the old scheme is dropped with the scheme.
    #[default]
    Keep,
    /// This one; the default of the new scheme is as [`Keep`](Self::Keep).
    Number(u16),
    /// The default of the new scheme: none is written.
    ProtocolDefault,
    /// The one that the request arrived at; the default of the new scheme is as [`Keep`](Self::Keep).
    FromRequest,
}

/// What becomes of the path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RedirectPath {
    /// Path and query stay.
    #[default]
    Keep,
    /// The whole path is replaced; the query stays unless the new path has one.
    Replace(Box<str>),
    /// The matched prefix of this length is replaced; the query stays.
    ReplacePrefix(usize, Box<str>),
}

impl Default for Redirect {
    fn default() -> Self {
        Self {
            code: StatusCode::MOVED_PERMANENTLY,
            scheme: None,
            authority: None,
            port: RedirectPort::default(),
            path: RedirectPath::default(),
        }
    }
}

impl Redirect {
    /// Sends every request to `https`, as a gateway's `httpsRedirect` does.
    #[must_use]
    pub fn to_https() -> Self {
        Self { scheme: Some("https"), ..Self::default() }
    }

    /// The value of `Location`.
    #[must_use]
    pub fn location(&self, request: &RequestView<'_>, arrived_at: u16) -> String {
        let scheme = self.scheme.unwrap_or(request.scheme);
        let (host, kept) = split_port(request.authority);
        let stated = match self.port {
            RedirectPort::Keep | RedirectPort::ProtocolDefault => None,
            RedirectPort::Number(port) => Some(port),
            RedirectPort::FromRequest => Some(arrived_at),
        };
        // A default port is as good as none stated: in Envoy the authority then stays what it was, its port included.
        let stated = stated.map(|port| port.to_string()).filter(|port| !is_default(scheme, port));
        let kept = kept.filter(|port| {
            self.port != RedirectPort::ProtocolDefault
                && stated.is_none()
                && !(scheme != request.scheme && is_default(request.scheme, port))
        });
        let (host, kept) = match &self.authority {
            Some(authority) => (&**authority, None),
            None => (host, kept),
        };
        let mut location = String::with_capacity(64);
        location.push_str(scheme);
        location.push_str("://");
        location.push_str(host);
        if let Some(port) = stated.as_deref().or(kept) {
            // Writing to a String cannot fail.
            let _ = write!(location, ":{port}");
        }
        let has_query = match &self.path {
            RedirectPath::Keep => {
                location.push_str(request.path);
                false
            }
            RedirectPath::Replace(path) => {
                location.push_str(path);
                path.contains('?')
            }
            RedirectPath::ReplacePrefix(length, prefix) => {
                location.push_str(prefix);
                location.push_str(request.path.get(*length..).unwrap_or(""));
                false
            }
        };
        if !has_query && !request.query.is_empty() {
            location.push('?');
            location.push_str(request.query);
        }
        location
    }

    /// The response.
    ///
    /// # Errors
    /// 500 when what the request says cannot stand in a header; a request that the edge normalised never does.
    pub fn respond(&self, request: &RequestView<'_>, cx: &RequestContext) -> Result<Response<Body>, Error> {
        let location = HeaderValue::try_from(self.location(request, arrived_at(request, cx.conn())))
            .map_err(|error| {
                Error::local_reply(StatusCode::INTERNAL_SERVER_ERROR, ResponseFlags::NONE, "invalid_redirect")
                    .with_source(error)
            })?;
        cx.set_details("direct_response");
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.code;
        response.headers_mut().insert(LOCATION, location);
        Ok(response)
    }
}

/// The port that a request was sent to. A client that speaks to a sidecar's own port meant that of the authority.
pub(crate) fn arrived_at(request: &RequestView<'_>, conn: &ConnInfo) -> u16 {
    if conn.direction != Direction::Outbound || conn.original_dst.is_some() {
        return conn.port;
    }
    let named = split_port(request.authority).1.and_then(|port| port.parse().ok());
    named.unwrap_or(if request.scheme == "https" { 443 } else { 80 })
}

/// Splits a port off an authority; an IPv6 address keeps its brackets.
pub(crate) fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port))
            if !port.is_empty()
                && port.bytes().all(|byte| byte.is_ascii_digit())
                && (host.ends_with(']') || !host.contains(':')) =>
        {
            (host, Some(port))
        }
        _ => (authority, None),
    }
}

fn is_default(scheme: &str, port: &str) -> bool {
    matches!((scheme, port), ("http", "80") | ("https", "443"))
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn location(redirect: &Redirect, authority: &str, path: &str, query: &str) -> String {
        let headers = HeaderMap::new();
        let view = RequestView {
            method: "GET",
            scheme: "http",
            authority,
            path,
            query,
            target: path,
            headers: &headers,
        };
        redirect.location(&view, 8080)
    }

    #[test]
    fn vs_d01_uri_keeps_the_query_unless_it_has_its_own() {
        let to = |path: &str| Redirect { path: RedirectPath::Replace(path.into()), ..Redirect::default() };
        assert_eq!(location(&to("/new"), "a", "/old", "x=1"), "http://a/new?x=1");
        assert_eq!(location(&to("/new?y=2"), "a", "/old", "x=1"), "http://a/new?y=2");
        assert_eq!(location(&to("/new"), "a", "/old", ""), "http://a/new");
    }

    #[test]
    fn vs_d01_authority_scheme_and_ports() {
        let with = |scheme, port| Redirect { scheme, port, ..Redirect::default() };
        for (redirect, authority, expected) in [
            (with(Some("https"), RedirectPort::Number(80)), "b", "https://b:80/foo"),
            (with(Some("https"), RedirectPort::Number(443)), "b:8080", "https://b:8080/foo"),
            (with(None, RedirectPort::Number(80)), "b", "http://b/foo"),
            (with(None, RedirectPort::Number(8081)), "b:1", "http://b:8081/foo"),
            (with(None, RedirectPort::Number(80)), "b:80", "http://b:80/foo"),
            (with(Some("https"), RedirectPort::Number(443)), "b:80", "https://b/foo"),
            (with(Some("https"), RedirectPort::Keep), "b:80", "https://b/foo"),
            (with(Some("https"), RedirectPort::Keep), "b:8080", "https://b:8080/foo"),
            (with(Some("https"), RedirectPort::ProtocolDefault), "b:8080", "https://b/foo"),
            (with(None, RedirectPort::FromRequest), "b", "http://b:8080/foo"),
            (with(None, RedirectPort::Keep), "[::1]:81", "http://[::1]:81/foo"),
        ] {
            assert_eq!(location(&redirect, authority, "/foo", ""), expected, "{redirect:?}");
        }
        let authority = Redirect { authority: Some("c.example".into()), ..Redirect::default() };
        assert_eq!(location(&authority, "b:81", "/foo", "q"), "http://c.example/foo?q");
    }

    #[test]
    fn vs_d03_prefix_rewrite_is_textual() {
        let redirect = Redirect { path: RedirectPath::ReplacePrefix(4, "/".into()), ..Redirect::default() };
        assert_eq!(location(&redirect, "a", "/foo/baz", "x"), "http://a//baz?x");
    }

    #[test]
    fn vs_d02_the_default_code_is_301() {
        assert_eq!(Redirect::default().code, 301);
    }
}
