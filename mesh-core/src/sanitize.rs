//! One request out of what a client wrote, or a refusal.
//!
//! hyper reads a message's framing strictly, but deliberately judges neither its target nor its headers. Two readers
//! that take a request differently are how requests are smuggled and policies passed, so [`request()`] leaves exactly one
//! reading: one authority, one path, no header that speaks of the connection. Framing is never forwarded: hyper
//! writes it anew from the body.
//!
//! After it the authority stands in the URI, or else in the only `Host`; never in both.

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::request;
use http::response;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version};

use crate::normalize::PathNormalization;

/// Headers that speak of one connection, beside those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 6] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy-authenticate"),
    HeaderName::from_static("proxy-authorization"),
    HeaderName::from_static("http2-settings"),
    HeaderName::from_static("upgrade-insecure-connection"),
];

/// What is done with a header whose name has an underscore, which many servers read as a hyphen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Underscores {
    /// It passes.
    #[default]
    Keep,
    /// It is left out.
    Drop,
    /// The request is refused.
    Reject,
}

/// A request that is refused: what the client and the log are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    /// The status: 400 or 501.
    pub status: StatusCode,
    /// The response code details.
    pub details: &'static str,
    /// The reason in words.
    pub reason: &'static str,
}

const fn bad(details: &'static str, reason: &'static str) -> Refused {
    Refused { status: StatusCode::BAD_REQUEST, details, reason }
}

/// Leaves one reading of a request, in place.
///
/// # Errors
/// [`Refused`] when there is more than one reading, or none.
pub fn request(
    parts: &mut request::Parts,
    normalization: PathNormalization,
    underscores: Underscores,
) -> Result<(), Refused> {
    if parts.method.as_str().bytes().any(|byte| byte.is_ascii_lowercase()) {
        return Err(bad("invalid_method", "the method is not upper case"));
    }
    if [CONNECTION, UPGRADE]
        .iter()
        .any(|name| parts.headers.get_all(name).iter().any(|value| value.to_str().is_err()))
    {
        return Err(bad("invalid_connection_header", "Connection and Upgrade are of visible ASCII"));
    }
    framing(parts)?;
    target(parts, normalization)?;
    headers(parts, underscores)
}

/// Takes what speaks of the connection out of a response, in place. `upgrading` says that it answers an upgrade with
/// 101, whose headers stay.
///
/// # Errors
/// [`Refused`], with 502, when the upstream switched protocols though nobody asked.
pub fn response(parts: &mut response::Parts, upgrading: bool) -> Result<(), Refused> {
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        if upgrading {
            return Ok(());
        }
        return Err(Refused {
            status: StatusCode::BAD_GATEWAY,
            details: "upstream_reset_before_response_started{protocol_error}",
            reason: "the upstream switched protocols unasked",
        });
    }
    // The length of chunks is in the chunks, whatever else is said of it.
    let is_chunked = parts.headers.contains_key(TRANSFER_ENCODING);
    hop_by_hop(&mut parts.headers, false);
    parts.headers.remove(TE);
    if is_chunked || parts.status == StatusCode::NO_CONTENT {
        parts.headers.remove(CONTENT_LENGTH);
    }
    Ok(())
}

/// Whether a request asks to switch protocols, and to one that is tunnelled: HTTP/2 is spoken by its preface only.
#[must_use]
pub fn is_upgrade(version: Version, headers: &HeaderMap) -> bool {
    version == Version::HTTP_11
        && names(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"))
        && headers.contains_key(UPGRADE)
        && !names(headers, &UPGRADE).any(|token| token.to_ascii_lowercase().starts_with("h2"))
}

fn framing(parts: &mut request::Parts) -> Result<(), Refused> {
    if parts.headers.contains_key(TRANSFER_ENCODING) {
        let mut codings = names(&parts.headers, &TRANSFER_ENCODING);
        let first = codings.next();
        if codings.next().is_some() || !first.is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
            return Err(Refused {
                status: StatusCode::NOT_IMPLEMENTED,
                details: "unsupported_transfer_encoding",
                reason: "only one transfer coding, chunked, is known",
            });
        }
        drop(codings);
        parts.headers.remove(TRANSFER_ENCODING);
        parts.headers.remove(CONTENT_LENGTH);
    }
    Ok(())
}

fn target(parts: &mut request::Parts, normalization: PathNormalization) -> Result<(), Refused> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = hosts.next().cloned();
    if hosts.next().is_some() {
        return Err(bad("duplicate_host_header", "there is more than one Host"));
    }
    if let Some(host) = &host
        && !(host.is_empty() && parts.version == Version::HTTP_10)
    {
        is_authority(host.as_bytes())?;
    }
    if parts.method == Method::CONNECT {
        return Ok(());
    }
    let in_uri = parts.uri.authority().cloned();
    if let Some(authority) = &in_uri {
        is_authority(authority.as_str().as_bytes())?;
    }
    let path = parts.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    if path == "*" {
        if parts.method != Method::OPTIONS {
            return Err(bad("invalid_path", "only OPTIONS has the target `*`"));
        }
    } else if !path.is_empty() && !path.starts_with(['/', '?'])
        || (in_uri.is_some() && parts.uri.scheme().is_none())
    {
        // What hyper reads as an authority alone (`GET admin`) is a path without its slash.
        return Err(bad("missing_path", "the path does not begin with a slash"));
    }
    if path.bytes().any(|byte| !(b'!'..=b'~').contains(&byte)) {
        return Err(bad("path_normalization_failed", "the target has a byte that must be escaped"));
    }
    // In a query it is data.
    if parts.uri.path().as_bytes().windows(3).any(|escape| escape == b"%00") {
        return Err(bad("path_normalization_failed", "the path has an escaped NUL"));
    }
    match (in_uri, host) {
        (Some(authority), host) if parts.version < Version::HTTP_2 => {
            // Absolute form: the target's authority counts, whatever Host says (RFC 9112 §3.2.2).
            if host.is_none_or(|host| host.as_bytes() != authority.as_str().as_bytes()) {
                let host = HeaderValue::from_str(authority.as_str())
                    .map_err(|_| bad("invalid_host", "the authority is no header value"))?;
                parts.headers.insert(HOST, host);
            }
            set_path(parts, normalization)
        }
        (Some(_), _) => {
            parts.headers.remove(HOST);
            set_path(parts, normalization)
        }
        (None, Some(_)) => set_path(parts, normalization),
        (None, None) if parts.version < Version::HTTP_11 => {
            parts.headers.insert(HOST, HeaderValue::from_static(""));
            set_path(parts, normalization)
        }
        (None, None) => Err(bad("missing_host_header", "there is no Host")),
    }
}

/// Puts the normalised path in the place of the old one, in origin form for HTTP/1.
fn set_path(parts: &mut request::Parts, normalization: PathNormalization) -> Result<(), Refused> {
    let path = match parts.uri.path() {
        "*" => return Ok(()),
        "" => "/",
        path => path,
    };
    let normal = normalization.apply(path);
    let absolute = parts.version < Version::HTTP_2 && parts.uri.authority().is_some();
    if !absolute && matches!(normal, std::borrow::Cow::Borrowed(_)) && parts.uri.path() == path {
        return Ok(());
    }
    let target = match parts.uri.query() {
        Some(query) => format!("{normal}?{query}"),
        None => normal.into_owned(),
    };
    let invalid = |_| bad("path_normalization_failed", "the path cannot be normalised");
    let path = PathAndQuery::try_from(target).map_err(invalid)?;
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.path_and_query = Some(path);
    if absolute {
        uri.scheme = None;
        uri.authority = None;
    }
    parts.uri = Uri::from_parts(uri).map_err(|_| bad("path_normalization_failed", "the target is no URI"))?;
    Ok(())
}

fn headers(parts: &mut request::Parts, underscores: Underscores) -> Result<(), Refused> {
    let upgrade = is_upgrade(parts.version, &parts.headers);
    let trailers = names(&parts.headers, &TE).any(|coding| coding.eq_ignore_ascii_case("trailers"));
    hop_by_hop(&mut parts.headers, upgrade);
    if parts.headers.contains_key(TE) {
        parts.headers.remove(TE);
    }
    if trailers {
        parts.headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if underscores != Underscores::Keep {
        let named: Vec<_> =
            parts.headers.keys().filter(|name| name.as_str().contains('_')).cloned().collect();
        if underscores == Underscores::Reject && !named.is_empty() {
            return Err(bad("unexpected_underscore", "a header name has an underscore"));
        }
        for name in named {
            parts.headers.remove(name);
        }
    }
    Ok(())
}

/// Removes `Connection`, what it names, and what always speaks of the connection.
fn hop_by_hop(headers: &mut HeaderMap, upgrade: bool) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = names(headers, &CONNECTION)
            .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
            // What says whom and how much is asked is not the connection's, whatever it says.
            .filter(|name| !matches!(*name, HOST | CONTENT_LENGTH | UPGRADE | TE))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    headers.remove(TRANSFER_ENCODING);
    if upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    } else {
        headers.remove(UPGRADE);
    }
}

fn is_authority(text: &[u8]) -> Result<(), Refused> {
    let sound = !text.contains(&b'@')
        && Authority::try_from(text).is_ok_and(|authority| {
            let port = authority.as_str().strip_prefix(authority.host());
            let digits =
                |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok();
            !authority.host().is_empty()
                && port.is_some_and(|port| port.is_empty() || port.strip_prefix(':').is_some_and(digits))
        });
    if sound { Ok(()) } else { Err(bad("invalid_host", "Host is not a host and a port")) }
}

/// The tokens of a header, over all of its values.
fn names<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn sanitized(
        version: Version,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        underscores: Underscores,
    ) -> Result<request::Parts, Refused> {
        let mut builder = Request::builder().method(method).uri(target).version(version);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let (mut parts, ()) = builder.body(()).unwrap().into_parts();
        request(&mut parts, PathNormalization::Base, underscores)?;
        Ok(parts)
    }

    fn h1(target: &str, headers: &[(&str, &str)]) -> Result<request::Parts, Refused> {
        sanitized(Version::HTTP_11, "GET", target, headers, Underscores::Keep)
    }

    fn refusal(result: Result<request::Parts, Refused>) -> (u16, &'static str) {
        let refused = result.expect_err("refused");
        (refused.status.as_u16(), refused.details)
    }

    #[test]
    fn e1_one_host_or_none() {
        assert_eq!(refusal(h1("/", &[])), (400, "missing_host_header"));
        assert_eq!(refusal(h1("/", &[("host", "a"), ("host", "a")])), (400, "duplicate_host_header"));
        for host in ["a@b", "a/b", "a b", "", ":80", "a:", "[::1", "a:b", "a:65536", "[::1]:99999"] {
            assert_eq!(refusal(h1("/", &[("host", host)])), (400, "invalid_host"), "{host:?}");
        }
        for host in ["a", "a:80", "a:65535", "[::1]:80", "10.0.0.1", "xn--a.example"] {
            assert_eq!(h1("/", &[("host", host)]).unwrap().headers[HOST], host);
        }
        assert!(sanitized(Version::HTTP_10, "GET", "/", &[], Underscores::Keep).is_ok());
    }

    #[test]
    fn e1_absolute_form_decides_the_authority() {
        let parts = h1("http://real/a/../b?c", &[("host", "other")]).unwrap();
        assert_eq!(
            (parts.uri.to_string().as_str(), &parts.headers[HOST]),
            ("/b?c", &HeaderValue::from_static("real"))
        );
        let parts =
            sanitized(Version::HTTP_2, "GET", "http://real/%61", &[("host", "other")], Underscores::Keep)
                .unwrap();
        assert_eq!(parts.uri.to_string(), "http://real/a");
        assert!(!parts.headers.contains_key(HOST));
        assert_eq!(refusal(h1("http://u@real/", &[("host", "real")])), (400, "invalid_host"));
    }

    #[test]
    fn e1_targets() {
        let host = [("host", "a")];
        assert_eq!(refusal(h1("/a%00b", &host)), (400, "path_normalization_failed"));
        assert_eq!(refusal(h1("/a%00?b", &host)), (400, "path_normalization_failed"));
        assert_eq!(h1("/a?info_hash=%00%01", &host).unwrap().uri, "/a?info_hash=%00%01");
        assert_eq!(refusal(h1("admin", &host)), (400, "missing_path"));
        assert_eq!(refusal(h1("*", &host)), (400, "invalid_path"));
        assert!(sanitized(Version::HTTP_11, "OPTIONS", "*", &host, Underscores::Keep).is_ok());
        assert_eq!(
            refusal(sanitized(Version::HTTP_11, "get", "/", &host, Underscores::Keep)),
            (400, "invalid_method")
        );
        assert_eq!(h1("/a\\b/./c?d=/../e", &host).unwrap().uri, "/a/b/c?d=/../e");
    }

    #[test]
    fn e1_transfer_codings() {
        for coding in ["gzip, chunked", "chunked, chunked", "identity", "xchunked"] {
            let refused = refusal(h1("/", &[("host", "a"), ("transfer-encoding", coding)]));
            assert_eq!(refused, (501, "unsupported_transfer_encoding"), "{coding}");
        }
        let parts =
            h1("/", &[("host", "a"), ("transfer-encoding", "chunked"), ("content-length", "5")]).unwrap();
        assert!(
            !parts.headers.contains_key(TRANSFER_ENCODING) && !parts.headers.contains_key(CONTENT_LENGTH)
        );
    }

    #[test]
    fn e7_hop_by_hop_headers_go_and_what_they_name() {
        let parts = h1(
            "/",
            &[
                ("host", "a"),
                ("connection", "close, x-secret, Host, content-length"),
                ("connection", "keep-alive"),
                ("x-secret", "1"),
                ("keep-alive", "5"),
                ("proxy-authorization", "x"),
                ("te", "gzip, trailers"),
                ("upgrade", "h2c"),
                ("content-length", "0"),
            ],
        )
        .unwrap();
        let left: Vec<_> = parts.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(parts.headers[TE], "trailers");
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(parts.headers.contains_key(HOST) && parts.headers.contains_key(CONTENT_LENGTH));
    }

    #[test]
    fn bug_a_length_beside_chunks_cut_the_body() {
        let response = http::Response::builder()
            .header(CONTENT_LENGTH, 2)
            .header(TRANSFER_ENCODING, "chunked")
            .body(())
            .unwrap();
        let (mut parts, ()) = response.into_parts();
        super::response(&mut parts, false).unwrap();
        assert!(parts.headers.is_empty(), "{:?}", parts.headers);
    }

    #[test]
    fn an_upgrade_keeps_what_it_needs() {
        let parts =
            h1("/", &[("host", "a"), ("connection", "Upgrade, x-y"), ("upgrade", "websocket")]).unwrap();
        assert_eq!(
            (&parts.headers[CONNECTION], &parts.headers[UPGRADE]),
            (&HeaderValue::from_static("upgrade"), &HeaderValue::from_static("websocket"))
        );
        let parts = h1(
            "/",
            &[
                ("host", "a"),
                ("connection", "upgrade, http2-settings"),
                ("upgrade", "h2c"),
                ("http2-settings", "x"),
            ],
        )
        .unwrap();
        assert_eq!(parts.headers.len(), 1);
    }

    #[test]
    fn underscores_by_policy() {
        let with = |underscores| {
            sanitized(Version::HTTP_11, "GET", "/", &[("host", "a"), ("x_a", "1")], underscores)
        };
        assert!(with(Underscores::Keep).unwrap().headers.contains_key("x_a"));
        assert!(!with(Underscores::Drop).unwrap().headers.contains_key("x_a"));
        assert_eq!(refusal(with(Underscores::Reject)), (400, "unexpected_underscore"));
    }

    #[test]
    fn a_second_time_changes_nothing() {
        let mut parts =
            h1("http://real/a/../b?c", &[("host", "x"), ("te", "trailers"), ("connection", "te")]).unwrap();
        let before = (parts.uri.clone(), parts.headers.clone());
        request(&mut parts, PathNormalization::Base, Underscores::Reject).unwrap();
        assert_eq!((parts.uri, parts.headers), before);
    }
}
