//! The key by which requests stick to an endpoint (DR-LB02, DR-LB03).
//!
//! What a key is hashed with is xxHash64, as in Envoy, so that the same keys give the same numbers there.

use std::fmt;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::header::COOKIE;
use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_core::ConnInfo;
use rand::{Rng, RngExt as _};
use twox_hash::XxHash64;

use crate::request_view::RequestView;

/// Where the key of a request is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HashPolicy {
    /// The value of this header; several values count together, in any order.
    Header(HeaderName),
    /// The value of a cookie.
    Cookie(HashCookie),
    /// The address of the client, without its port.
    SourceIp,
    /// The first value of this query parameter, as it was sent.
    QueryParameter(Arc<str>),
}

/// A cookie that holds the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashCookie {
    /// Its name.
    pub name: Arc<str>,
    /// How long it lives when the proxy makes it, zero for as long as the client's session; `None`: the proxy never
    /// makes it.
    pub ttl: Option<Duration>,
    /// The path for which it is made; empty is the client's choice.
    pub path: Arc<str>,
    /// Further attributes when the proxy makes it, with empty values for those without.
    pub attributes: Vec<(String, String)>,
}

/// The key of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RequestKey {
    /// None: an endpoint is picked by chance.
    #[default]
    Missing,
    /// Its number.
    Hash(u64),
    /// The value of a cookie that the client is given with the response, as [`HashCookie::set_cookie`] writes it.
    Issued(u64),
}

impl RequestKey {
    /// The number that picks the endpoint.
    #[must_use]
    pub fn hash(self) -> Option<u64> {
        match self {
            Self::Missing => None,
            Self::Hash(hash) => Some(hash),
            Self::Issued(value) => Some(xxhash(&hex(value), 0)),
        }
    }
}

impl HashPolicy {
    /// The key of a request; `None` when the request has none.
    #[must_use]
    pub fn hash(&self, request: &RequestView<'_>, conn: &ConnInfo) -> Option<u64> {
        match self {
            Self::Header(name) => header(request.headers, name),
            Self::Cookie(wanted) => cookie(request.headers, &wanted.name).map(|value| xxhash(value, 0)),
            Self::SourceIp => self.hash_connection(conn),
            Self::QueryParameter(name) => query(request.query, name).map(|value| xxhash(value.as_bytes(), 0)),
        }
    }

    /// The key of a connection of which no request is seen: only its address can be one.
    #[must_use]
    pub fn hash_connection(&self, conn: &ConnInfo) -> Option<u64> {
        match self {
            Self::SourceIp if !conn.peer.ip().is_unspecified() => Some(address(conn.peer.ip())),
            _ => None,
        }
    }

    /// The key of a request, with a new cookie where that is missing and has a time to live. A client has one cookie
    /// for all requests of its connection, and one by chance where nothing is known of the connection.
    #[must_use]
    pub fn hash_or_issue(
        &self,
        request: &RequestView<'_>,
        conn: &ConnInfo,
        rng: &mut impl Rng,
    ) -> RequestKey {
        match (self, self.hash(request, conn)) {
            (_, Some(hash)) => RequestKey::Hash(hash),
            (Self::Cookie(HashCookie { ttl: Some(_), .. }), None) => {
                RequestKey::Issued(if conn.peer.port() == 0 { rng.random() } else { connection(conn) })
            }
            (_, None) => RequestKey::Missing,
        }
    }
}

/// Prints as `header:NAME`, `cookie:NAME`, `source-ip` or `query:NAME`.
impl fmt::Display for HashPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Cookie(cookie) => write!(f, "cookie:{}", cookie.name),
            Self::SourceIp => f.write_str("source-ip"),
            Self::QueryParameter(name) => write!(f, "query:{name}"),
        }
    }
}

/// A text that names no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected header:NAME, cookie:NAME, source-ip or query:NAME")]
pub struct InvalidHashPolicy;

/// Reads what [`Display`](fmt::Display) prints. A cookie is one that the proxy does not make.
impl FromStr for HashPolicy {
    type Err = InvalidHashPolicy;

    fn from_str(text: &str) -> Result<Self, InvalidHashPolicy> {
        match text.split_once(':') {
            None if text == "source-ip" => Ok(Self::SourceIp),
            Some(("header", name)) => {
                HeaderName::try_from(name).map(Self::Header).map_err(|_| InvalidHashPolicy)
            }
            // What a cookie can be called, a header can.
            Some(("cookie", name)) if HeaderName::try_from(name).is_ok() => {
                Ok(Self::Cookie(HashCookie::passive(name)))
            }
            Some(("query", name)) if !name.is_empty() => Ok(Self::QueryParameter(name.into())),
            _ => Err(InvalidHashPolicy),
        }
    }
}

impl HashCookie {
    /// A cookie that the proxy does not make.
    #[must_use]
    pub fn passive(name: impl Into<Arc<str>>) -> Self {
        Self { name: name.into(), ttl: None, path: Arc::from(""), attributes: Vec::new() }
    }

    /// The `Set-Cookie` for a value: `name="value"; Max-Age=N; Path=P; attributes; HttpOnly`, as Envoy writes it. `None`
    /// when name, path or an attribute cannot stand in a header.
    #[must_use]
    pub fn set_cookie(&self, issued: u64) -> Option<HeaderValue> {
        let mut text = format!("{}=\"{issued:016x}\"", self.name);
        if let Some(ttl) = self.ttl.filter(|ttl| !ttl.is_zero()) {
            text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
        }
        if !self.path.is_empty() {
            text.push_str(&format!("; Path={}", self.path));
        }
        for (name, value) in &self.attributes {
            text.push_str("; ");
            text.push_str(name);
            if !value.is_empty() {
                text.push('=');
                text.push_str(value);
            }
        }
        text.push_str("; HttpOnly");
        HeaderValue::try_from(text).ok()
    }
}

/// xxHash64.
pub(crate) fn xxhash(bytes: &[u8], seed: u64) -> u64 {
    XxHash64::oneshot(seed, bytes)
}

fn header(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    let mut values = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let first = values.next()?;
    let Some(second) = values.next() else { return Some(xxhash(first, 0)) };
    let mut all = vec![first, second];
    all.extend(values);
    all.sort_unstable();
    Some(all.into_iter().fold(0, |seed, value| xxhash(value, seed)))
}

/// The value of a cookie, without the quotes around it.
fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h [u8]> {
    let pairs = headers.get_all(COOKIE).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b';'));
    let value = pairs.map(<[u8]>::trim_ascii).find_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        (pair[..at].trim_ascii_end() == name.as_bytes()).then(|| pair[at + 1..].trim_ascii_start())
    })?;
    let unquoted = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
    (!unquoted.is_empty()).then_some(unquoted)
}

fn query<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

/// The number of an address in text form.
fn address(ip: IpAddr) -> u64 {
    let mut text = [0; 48];
    let left = {
        let mut rest = text.as_mut_slice();
        // The longest address has 45 characters.
        let _ = write!(rest, "{ip}");
        rest.len()
    };
    xxhash(&text[..text.len() - left], 0)
}

/// The number of a connection.
fn connection(conn: &ConnInfo) -> u64 {
    let part = |addr: SocketAddr, seed| address(addr.ip()).wrapping_add(seed) ^ u64::from(addr.port());
    let mut both = [0; 16];
    both[..8].copy_from_slice(&part(conn.peer, 0).to_le_bytes());
    both[8..].copy_from_slice(&part(conn.local, 1).to_le_bytes());
    xxhash(&both, 0)
}

/// The value of a cookie that is made, as the client will send it.
fn hex(value: u64) -> [u8; 16] {
    let mut text = [0; 16];
    for (at, digit) in text.iter_mut().enumerate() {
        let nibble = (value >> (60 - 4 * at)) as u8 & 0xf;
        *digit = if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    }
    text
}

#[cfg(test)]
mod tests {
    use http::Request;
    use mesh_core::Direction;
    use rand::SeedableRng as _;
    use rand::rngs::SmallRng;

    use super::*;

    fn conn(peer: &str) -> ConnInfo {
        ConnInfo { peer: peer.parse().unwrap(), ..ConnInfo::unknown(Direction::Outbound) }
    }

    fn hash(policy: &HashPolicy, url: &str, headers: &[(&str, &str)]) -> Option<u64> {
        let mut request = Request::get(url).body(()).unwrap();
        for (name, value) in headers {
            request.headers_mut().append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        let conn = conn("10.1.2.3:4567");
        policy.hash(&RequestView::new(&request, &conn), &conn)
    }

    #[test]
    fn dr_lb02_the_four_keys() {
        let of = |text: &str| Some(XxHash64::oneshot(0, text.as_bytes()));
        let header = HashPolicy::Header(HeaderName::from_static("x-user"));
        assert_eq!(hash(&header, "/", &[("x-user", "ann")]), of("ann"));
        assert_eq!(hash(&header, "/", &[]), None);
        let both = [("x-user", "ann"), ("x-user", "bob")];
        assert_eq!(hash(&header, "/", &both), hash(&header, "/", &[both[1], both[0]]));
        assert_ne!(hash(&header, "/", &both), of("ann"));
        let cookie = HashPolicy::Cookie(HashCookie::passive("user"));
        assert_eq!(hash(&cookie, "/", &[("cookie", "a=b; user=ann; c")]), of("ann"));
        assert_eq!(hash(&cookie, "/", &[("cookie", "a=b"), ("cookie", "user=\"ann\"")]), of("ann"));
        assert_eq!(hash(&cookie, "/", &[("cookie", "xuser=ann; user")]), None);
        let query = HashPolicy::QueryParameter("user".into());
        assert_eq!(hash(&query, "/?a=b&user=ann&user=bob", &[]), of("ann"));
        assert_eq!(hash(&query, "/?users=ann", &[]), None);
        assert_eq!(hash(&HashPolicy::SourceIp, "/", &[]), of("10.1.2.3"));
        let nowhere = ConnInfo::unknown(Direction::Outbound);
        assert_eq!(HashPolicy::SourceIp.hash_connection(&nowhere), None);
        let six = conn("[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:1");
        assert_eq!(HashPolicy::SourceIp.hash_connection(&six), of("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"));
    }

    #[test]
    fn a_key_is_read_as_it_is_printed() {
        for text in ["header:x-user", "cookie:User.Id", "source-ip", "query:user"] {
            assert_eq!(text.parse::<HashPolicy>().unwrap().to_string(), text);
        }
        for text in
            ["", "header", "header:", "header:a b", "cookie:", "cookie:a;b", "query:", "source-ip:", "ip"]
        {
            assert_eq!(text.parse::<HashPolicy>(), Err(InvalidHashPolicy), "{text}");
        }
    }

    #[test]
    fn dr_lb03_a_cookie_that_is_made_hashes_alike_when_it_comes_back() {
        let made = HashCookie {
            ttl: Some(Duration::from_secs(60)),
            path: "/app".into(),
            attributes: vec![("SameSite".into(), "Lax".into()), ("Secure".into(), String::new())],
            ..HashCookie::passive("user")
        };
        let policy = HashPolicy::Cookie(made.clone());
        let request = Request::get("/").body(()).unwrap();
        let mut rng = SmallRng::seed_from_u64(1);
        let mut issue =
            |conn: &ConnInfo| policy.hash_or_issue(&RequestView::new(&request, conn), conn, &mut rng);
        let first = issue(&conn("10.1.2.3:4567"));
        assert_eq!(first, issue(&conn("10.1.2.3:4567")), "one cookie for a connection");
        assert_ne!(first, issue(&conn("10.1.2.3:4568")));
        let unknown = ConnInfo::unknown(Direction::Outbound);
        assert_ne!(issue(&unknown), issue(&unknown));
        let RequestKey::Issued(value) = first else { panic!("{first:?}") };
        let text = made.set_cookie(value).unwrap();
        let (pair, attributes) = text.to_str().unwrap().split_once("; ").unwrap();
        assert_eq!(attributes, "Max-Age=60; Path=/app; SameSite=Lax; Secure; HttpOnly");
        assert_eq!(hash(&policy, "/", &[("cookie", pair)]), first.hash());
        let session = HashCookie { ttl: Some(Duration::ZERO), ..HashCookie::passive("s") };
        assert_eq!(session.set_cookie(10).unwrap(), "s=\"000000000000000a\"; HttpOnly");
        let passive = HashPolicy::Cookie(HashCookie::passive("user"));
        let known = conn("10.1.2.3:4567");
        assert_eq!(
            passive.hash_or_issue(&RequestView::new(&request, &known), &known, &mut rng),
            RequestKey::Missing
        );
    }
}
