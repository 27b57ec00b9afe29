//! Header operations of routes and destinations (VS-H01, VS-R04).
//!
//! Remove comes first, then set, then add, as Envoy does. Values may hold Envoy's `%VARIABLES%`; they are compiled when
//! configuration is loaded, and a value without any is one shared header value. A formatted value that turns out
//! empty is skipped.

use std::fmt::Write as _;
use std::net::SocketAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use mesh_core::RequestContext;

/// What is done to a set of headers. The default does nothing.
#[derive(Clone, Debug, Default)]
pub struct HeaderOps {
    remove: Box<[HeaderName]>,
    set: Box<[(HeaderName, Value)]>,
    add: Box<[(HeaderName, Value)]>,
}

/// An operation that is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidHeaderOp {
    /// Not a header name, or one that operations must not touch.
    #[error("`{0}` is not a header that can be changed")]
    Name(String),
    /// Not a header value.
    #[error("`{0}` is not a header value")]
    Value(String),
    /// A `%` that begins no variable that is known.
    #[error("{0}")]
    Format(String),
}

/// What a formatted value may speak of.
#[derive(Clone, Copy, Debug)]
pub struct FormatContext<'a> {
    /// The request, where the operations speak of it.
    pub request: Option<RequestHead<'a>>,
    /// The context of the request.
    pub context: &'a RequestContext,
    /// The protocol that the downstream spoke.
    pub version: Version,
}

/// The request that values may speak of.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    /// `:method`.
    pub method: &'a Method,
    /// `:path`, `:authority` and `:scheme`.
    pub uri: &'a Uri,
    /// The other headers.
    pub headers: &'a HeaderMap,
}

/// A copy of the head of a request, for operations on its response that speak of it.
#[derive(Clone, Debug)]
pub(crate) struct OwnedHead {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl OwnedHead {
    /// The head of a request, if `operations` speak of it.
    pub(crate) fn for_response<B>(operations: &HeaderOps, request: &Request<B>) -> Option<Box<Self>> {
        operations.reads_request().then(|| {
            Box::new(Self {
                method: request.method().clone(),
                uri: request.uri().clone(),
                headers: request.headers().clone(),
            })
        })
    }

    pub(crate) fn borrowed(&self) -> RequestHead<'_> {
        RequestHead { method: &self.method, uri: &self.uri, headers: &self.headers }
    }
}

#[derive(Clone, Debug)]
enum Value {
    Literal(HeaderValue),
    Format(Box<[Piece]>),
}

#[derive(Clone, Debug)]
enum Piece {
    Text(Box<str>),
    RequestHeader { name: Header, otherwise: Option<Header>, max: Option<usize> },
    DownstreamRemote { port: bool },
    DownstreamLocal { port: bool },
    DownstreamLocalPort,
    UpstreamRemote,
    UpstreamCluster,
    Protocol,
    RouteName,
    ResponseFlags,
    ResponseDetails,
}

#[derive(Clone, Debug)]
enum Header {
    Method,
    Path,
    Authority,
    Scheme,
    Field(HeaderName),
}

impl HeaderOps {
    /// Compiles operations. Names with a leading `:` and `host` are refused; the authority is changed by rewriting it.
    ///
    /// # Errors
    /// The first operation that is not accepted.
    pub fn new<'a>(
        remove: impl IntoIterator<Item = &'a str>,
        set: impl IntoIterator<Item = (&'a str, &'a str)>,
        add: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, InvalidHeaderOp> {
        let pairs = |pairs: &mut dyn Iterator<Item = (&'a str, &'a str)>| {
            pairs.map(|(key, text)| Ok((name(key)?, value(text)?))).collect::<Result<_, InvalidHeaderOp>>()
        };
        Ok(Self {
            remove: remove.into_iter().map(name).collect::<Result<_, _>>()?,
            set: pairs(&mut set.into_iter())?,
            add: pairs(&mut add.into_iter())?,
        })
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }

    /// Applies the operations.
    pub fn apply(&self, headers: &mut HeaderMap, cx: &FormatContext<'_>) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            if let Some(value) = value.format(cx) {
                headers.insert(name.clone(), value);
            }
        }
        for (name, value) in &self.add {
            if let Some(value) = value.format(cx) {
                headers.append(name.clone(), value);
            }
        }
    }

    /// Applies the operations to the very request that values may speak of.
    pub fn apply_to_request<B>(&self, request: &mut Request<B>, context: &RequestContext) {
        let version = request.version();
        // Values are formatted from the request as it is; only formats that read it need a copy.
        if self.reads_request() {
            let (method, uri, headers) =
                (request.method().clone(), request.uri().clone(), request.headers().clone());
            let head = RequestHead { method: &method, uri: &uri, headers: &headers };
            self.apply(request.headers_mut(), &FormatContext { request: Some(head), context, version });
        } else {
            self.apply(request.headers_mut(), &FormatContext { request: None, context, version });
        }
    }

    fn reads_request(&self) -> bool {
        self.set.iter().chain(&self.add).any(|(_, value)| match value {
            Value::Literal(_) => false,
            Value::Format(pieces) => pieces.iter().any(|piece| matches!(piece, Piece::RequestHeader { .. })),
        })
    }
}

impl Value {
    fn format(&self, cx: &FormatContext<'_>) -> Option<HeaderValue> {
        let pieces = match self {
            Self::Literal(value) => return (!value.is_empty()).then(|| value.clone()),
            Self::Format(pieces) => pieces,
        };
        let mut text = String::new();
        for piece in pieces {
            piece.format(&mut text, cx);
        }
        // What a client sent has been a header value before, so only an empty one is left out.
        HeaderValue::try_from(text).ok().filter(|value| !value.is_empty())
    }
}

impl Piece {
    fn format(&self, out: &mut String, cx: &FormatContext<'_>) {
        let conn = cx.context.conn();
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Text(text) => out.write_str(text),
            Self::RequestHeader { name, otherwise, max } => {
                let find = |name: &Header| cx.request.and_then(|request| name.of(request));
                let value = find(name).or_else(|| otherwise.as_ref().and_then(find));
                let value = value.map(String::from_utf8_lossy);
                let value = value.as_deref().unwrap_or("");
                let end = max.map_or(value.len(), |max| value.floor_char_boundary(max));
                out.write_str(&value[..end])
            }
            Self::DownstreamRemote { port } => write_addr(out, conn.peer, *port),
            Self::DownstreamLocal { port } => write_addr(out, conn.local, *port),
            Self::DownstreamLocalPort => write!(out, "{}", conn.local.port()),
            Self::UpstreamRemote => match cx.context.upstream().and_then(|upstream| upstream.endpoint) {
                Some(addr) => write!(out, "{addr}"),
                None => Ok(()),
            },
            Self::UpstreamCluster => match cx.context.upstream() {
                Some(upstream) => out.write_str(&upstream.cluster),
                None => Ok(()),
            },
            Self::Protocol => write!(out, "{:?}", cx.version).map(|()| {
                if out.ends_with("HTTP/2.0") {
                    out.truncate(out.len() - 2);
                }
            }),
            Self::RouteName => cx.context.with_route_name(|name| out.write_str(name.unwrap_or(""))),
            Self::ResponseFlags => write!(out, "{}", cx.context.flags()),
            Self::ResponseDetails => out.write_str(cx.context.details().as_deref().unwrap_or("")),
        };
    }
}

impl Header {
    fn new(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":path" => Self::Path,
            ":authority" | "host" => Self::Authority,
            ":scheme" => Self::Scheme,
            name => Self::Field(HeaderName::try_from(name).ok()?),
        })
    }

    fn of<'a>(&self, request: RequestHead<'a>) -> Option<&'a [u8]> {
        let field = |name: &HeaderName| request.headers.get(name).map(HeaderValue::as_bytes);
        match self {
            Self::Method => Some(request.method.as_str().as_bytes()),
            Self::Path => request.uri.path_and_query().map(|path| path.as_str().as_bytes()),
            Self::Authority => match request.uri.authority() {
                Some(authority) => Some(authority.as_str().as_bytes()),
                None => field(&http::header::HOST),
            },
            Self::Scheme => request.uri.scheme_str().map(str::as_bytes),
            Self::Field(name) => field(name),
        }
    }
}

fn write_addr(out: &mut String, addr: SocketAddr, port: bool) -> std::fmt::Result {
    if port { write!(out, "{addr}") } else { write!(out, "{}", addr.ip()) }
}

fn name(text: &str) -> Result<HeaderName, InvalidHeaderOp> {
    match HeaderName::try_from(text) {
        Ok(name) if name != http::header::HOST => Ok(name),
        _ => Err(InvalidHeaderOp::Name(text.to_owned())),
    }
}

fn value(text: &str) -> Result<Value, InvalidHeaderOp> {
    let literal =
        |text: &str| HeaderValue::from_str(text).map_err(|_| InvalidHeaderOp::Value(text.to_owned()));
    if !text.contains('%') {
        return literal(text).map(Value::Literal);
    }
    let mut pieces = Vec::new();
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        plain.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            plain.push('%');
            rest = after;
            continue;
        }
        let end = rest.find('%').ok_or_else(|| {
            InvalidHeaderOp::Format(format!(
                "`{text}` has a `%` that is not closed; a literal one is written `%%`"
            ))
        })?;
        if !plain.is_empty() {
            literal(&plain)?;
            pieces.push(Piece::Text(std::mem::take(&mut plain).into()));
        }
        pieces.push(piece(&rest[..end])?);
        rest = &rest[end + 1..];
    }
    plain.push_str(rest);
    literal(&plain)?;
    if pieces.is_empty() {
        return literal(&plain).map(Value::Literal);
    }
    if !plain.is_empty() {
        pieces.push(Piece::Text(plain.into()));
    }
    Ok(Value::Format(pieces.into()))
}

fn piece(command: &str) -> Result<Piece, InvalidHeaderOp> {
    let unknown = || InvalidHeaderOp::Format(format!("`%{command}%` is not a variable that is known"));
    if let Some(argument) = command.strip_prefix("REQ(") {
        let (names, max) = argument.split_once(')').ok_or_else(unknown)?;
        let max = match max.strip_prefix(':') {
            Some(max) => Some(max.parse().map_err(|_| unknown())?),
            None if max.is_empty() => None,
            None => return Err(unknown()),
        };
        let (first, otherwise) = match names.split_once('?') {
            Some((first, otherwise)) => (first, Some(otherwise)),
            None => (names, None),
        };
        let header = |text: &str| Header::new(text).ok_or_else(unknown);
        return Ok(Piece::RequestHeader {
            name: header(first)?,
            otherwise: otherwise.map(header).transpose()?,
            max,
        });
    }
    Ok(match command {
        "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => {
            Piece::DownstreamRemote { port: true }
        }
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            Piece::DownstreamRemote { port: false }
        }
        "DOWNSTREAM_LOCAL_ADDRESS" => Piece::DownstreamLocal { port: true },
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Piece::DownstreamLocal { port: false },
        "DOWNSTREAM_LOCAL_PORT" => Piece::DownstreamLocalPort,
        "UPSTREAM_REMOTE_ADDRESS" | "UPSTREAM_HOST" => Piece::UpstreamRemote,
        "UPSTREAM_CLUSTER" => Piece::UpstreamCluster,
        "PROTOCOL" => Piece::Protocol,
        "ROUTE_NAME" => Piece::RouteName,
        "RESPONSE_FLAGS" => Piece::ResponseFlags,
        "RESPONSE_CODE_DETAILS" => Piece::ResponseDetails,
        _ => return Err(unknown()),
    })
}

#[cfg(test)]
mod tests {
    use mesh_core::Direction;

    use super::*;

    fn context() -> RequestContext {
        RequestContext::ensure(&mut http::Extensions::new(), Direction::Outbound)
    }

    fn applied(ops: &HeaderOps, headers: &[(&'static str, &'static str)]) -> Vec<(String, String)> {
        let mut request = Request::get("http://host/path?query").version(Version::HTTP_2).body(()).unwrap();
        *request.headers_mut() = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        ops.apply_to_request(&mut request, &context());
        let mut all: Vec<_> = request
            .headers()
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        // The order of one header's values counts, that of the headers does not.
        all.sort_by(|left, right| left.0.cmp(&right.0));
        all
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn vs_h01_remove_then_set_then_add() {
        let ops =
            HeaderOps::new(["a"], [("a", "set"), ("b", "set")], [("b", "added"), ("c", "added")]).unwrap();
        assert_eq!(
            applied(&ops, &[("a", "old"), ("b", "old"), ("b", "older"), ("c", "old")]),
            pairs(&[("a", "set"), ("b", "set"), ("b", "added"), ("c", "old"), ("c", "added")])
        );
    }

    #[test]
    fn vs_h01_values_are_formatted_and_empty_ones_skipped() {
        let ops = HeaderOps::new(
            [],
            [
                ("x-from", "a %REQ(from)% %PROTOCOL% 100%%"),
                ("x-none", "%REQ(missing)%"),
                ("x-cut", "%REQ(m?from):2%"),
            ],
            [],
        )
        .unwrap();
        assert_eq!(
            applied(&ops, &[("from", "me")]),
            pairs(&[("from", "me"), ("x-cut", "me"), ("x-from", "a me HTTP/2 100%")])
        );
    }

    #[test]
    fn vs_h01_pseudo_headers_host_and_unknown_variables_are_refused() {
        assert!(matches!(HeaderOps::new([":path"], [], []), Err(InvalidHeaderOp::Name(_))));
        assert!(matches!(HeaderOps::new([], [("Host", "a")], []), Err(InvalidHeaderOp::Name(_))));
        assert!(matches!(HeaderOps::new([], [("a", "b\n")], []), Err(InvalidHeaderOp::Value(_))));
        for bad in ["100%", "%NOPE%", "%REQ(a%", "%REQ(a):x%"] {
            assert!(matches!(HeaderOps::new([], [("a", bad)], []), Err(InvalidHeaderOp::Format(_))), "{bad}");
        }
    }
}
