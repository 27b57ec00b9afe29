//! Who a peer is: SPIFFE identities, and what else a verified certificate says.
//!
//! A [`SpiffeId`] can only be made of text that the SPIFFE-ID standard accepts, so that whoever holds one compares it as
//! text and needs no second reading: there is one spelling of each identity. Nothing here verifies anything. Whoever
//! ends TLS puts a [`PeerInfo`] into the connection once it has verified the chain; from there routing, authorization,
//! telemetry and programs that embed the layers read it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderValue;

/// The longest SPIFFE ID that is read or made (SPIFFE-ID §2.3).
pub const MAX_SPIFFE_ID: usize = 2048;

/// The longest name of a trust domain.
pub const MAX_TRUST_DOMAIN: usize = 255;

const SCHEME: &str = "spiffe://";

/// The name of a trust domain: `[a-z0-9._-]`, 1 to 255 bytes. An address is a name like any other.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// A SPIFFE ID: `spiffe://trust-domain/path`. The path may be empty.
///
/// ```
/// use mesh_core::identity::SpiffeId;
///
/// let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
/// assert_eq!(id.trust_domain(), "cluster.local");
/// assert_eq!((id.namespace(), id.service_account()), (Some("default"), Some("reviews")));
/// assert_eq!(id.principal(), "cluster.local/ns/default/sa/reviews");
/// # Ok::<_, mesh_core::identity::InvalidSpiffeId>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where the path begins.
    path: u16,
}

/// Why text is no SPIFFE ID, or no name of a trust domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidSpiffeId {
    /// Longer than 2048 bytes, or a trust domain longer than 255.
    #[error("it is too long")]
    TooLong,
    /// It does not begin with `spiffe://`.
    #[error("it does not begin with spiffe://")]
    Scheme,
    /// There is no trust domain.
    #[error("the trust domain is missing")]
    MissingTrustDomain,
    /// The trust domain has a user, a port, an upper-case letter, an escape or another byte that it may not have.
    #[error("a trust domain is of lower-case letters, digits, dots, dashes and underscores")]
    TrustDomainCharacter,
    /// The path has an escape, a query, a fragment or another byte that it may not have.
    #[error("a path is of letters, digits, dots, dashes, underscores and slashes")]
    PathCharacter,
    /// A segment of the path is empty.
    #[error("a segment of the path is empty")]
    EmptySegment,
    /// A segment of the path is `.` or `..`.
    #[error("a segment of the path is relative")]
    RelativeSegment,
    /// The path ends with a slash.
    #[error("the path ends with a slash")]
    TrailingSlash,
}

impl TrustDomain {
    /// Its name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidSpiffeId;

    fn from_str(name: &str) -> Result<Self, InvalidSpiffeId> {
        is_trust_domain(name)?;
        Ok(Self(name.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SpiffeId {
    /// Istio's identity of a workload: `spiffe://trust-domain/ns/namespace/sa/service-account`.
    ///
    /// # Errors
    /// When a part is empty or has a byte that no segment of a path has.
    pub fn workload(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidSpiffeId> {
        for segment in [namespace, service_account] {
            is_segment(segment)?;
        }
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name of its trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..usize::from(self.path)]
    }

    /// Its path with the first slash; empty for the identity of a trust domain itself.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.text[usize::from(self.path)..]
    }

    /// The text without `spiffe://`, which is how policies of Istio write a principal.
    #[must_use]
    pub fn principal(&self) -> &str {
        &self.text[SCHEME.len()..]
    }

    /// The namespace of an identity of Istio's form.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.istio().map(|(namespace, _)| namespace)
    }

    /// The service account of an identity of Istio's form.
    #[must_use]
    pub fn service_account(&self) -> Option<&str> {
        self.istio().map(|(_, service_account)| service_account)
    }

    fn istio(&self) -> Option<(&str, &str)> {
        let (namespace, rest) = self.path().strip_prefix("/ns/")?.split_once('/')?;
        let service_account = rest.strip_prefix("sa/").filter(|account| !account.contains('/'))?;
        Some((namespace, service_account))
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        if text.len() > MAX_SPIFFE_ID {
            return Err(InvalidSpiffeId::TooLong);
        }
        // The scheme of a URI has no case; ours is written in one, so that there is one spelling.
        let rest = text.strip_prefix(SCHEME).ok_or(InvalidSpiffeId::Scheme)?;
        let domain = rest.find('/').map_or(rest, |at| &rest[..at]);
        is_trust_domain(domain)?;
        let path = &rest[domain.len()..];
        if let Some(segments) = path.strip_prefix('/') {
            if segments.is_empty() || segments.ends_with('/') {
                return Err(InvalidSpiffeId::TrailingSlash);
            }
            segments.split('/').try_for_each(is_segment)?;
        }
        let path = u16::try_from(SCHEME.len() + domain.len()).map_err(|_| InvalidSpiffeId::TooLong)?;
        Ok(Self { text: text.into(), path })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.text, f)
    }
}

fn is_trust_domain(name: &str) -> Result<(), InvalidSpiffeId> {
    if name.is_empty() {
        return Err(InvalidSpiffeId::MissingTrustDomain);
    }
    if name.len() > MAX_TRUST_DOMAIN {
        return Err(InvalidSpiffeId::TooLong);
    }
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'_');
    if name.bytes().all(allowed) { Ok(()) } else { Err(InvalidSpiffeId::TrustDomainCharacter) }
}

fn is_segment(segment: &str) -> Result<(), InvalidSpiffeId> {
    match segment {
        "" => return Err(InvalidSpiffeId::EmptySegment),
        "." | ".." => return Err(InvalidSpiffeId::RelativeSegment),
        _ => {}
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if segment.bytes().all(allowed) { Ok(()) } else { Err(InvalidSpiffeId::PathCharacter) }
}

/// What a verified certificate says of a peer. It exists only for a peer whose chain was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerInfo {
    /// Its identity. A client of a gateway may have a certificate without one, and has then no principal.
    pub spiffe_id: Option<SpiffeId>,
    /// Every URI among its alternative names, as written.
    pub uri_sans: Vec<String>,
    /// Every DNS name among its alternative names, as written.
    pub dns_sans: Vec<String>,
    /// Its subject in the form of RFC 4514; empty when it has none.
    pub subject: String,
    /// The SHA-256 of its certificate.
    pub fingerprint: [u8; 32],
    /// Its serial number as X.509 encodes it.
    pub serial: Vec<u8>,
    /// When its certificate ends.
    pub not_after: SystemTime,
    /// Its certificates in DER, its own first, as it sent them.
    pub chain: Arc<[Vec<u8>]>,
    /// What the next hop is told of it: an element of `x-forwarded-client-cert`. `None` tells nothing.
    pub forwarded: Option<HeaderValue>,
}

impl PeerInfo {
    /// A peer with this identity and a certificate until `not_after`, of which nothing else is said.
    #[must_use]
    pub fn new(spiffe_id: Option<SpiffeId>, not_after: SystemTime) -> Self {
        Self {
            spiffe_id,
            uri_sans: Vec::new(),
            dns_sans: Vec::new(),
            subject: String::new(),
            fingerprint: [0; 32],
            serial: Vec::new(),
            not_after,
            chain: Arc::from([]),
            forwarded: None,
        }
    }

    /// How policies name it: its identity without `spiffe://`.
    #[must_use]
    pub fn principal(&self) -> Option<&str> {
        self.spiffe_id.as_ref().map(SpiffeId::principal)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<SpiffeId, InvalidSpiffeId> {
        text.parse()
    }

    #[test]
    fn spiffe_id_2_the_scheme_is_spiffe_and_there_is_no_query_or_fragment() {
        for text in ["", "spiffe", "spiffe:", "spiffe:/td", "http://td", "SPIFFE://td", " spiffe://td"] {
            assert_eq!(parse(text), Err(InvalidSpiffeId::Scheme), "{text:?}");
        }
        for text in ["spiffe://td?a", "spiffe://td#a"] {
            assert_eq!(parse(text), Err(InvalidSpiffeId::TrustDomainCharacter), "{text:?}");
        }
        for text in ["spiffe://td/a?b=c", "spiffe://td/a#b"] {
            assert_eq!(parse(text), Err(InvalidSpiffeId::PathCharacter), "{text:?}");
        }
    }

    #[test]
    fn spiffe_id_2_1_the_trust_domain() {
        assert_eq!(parse("spiffe://"), Err(InvalidSpiffeId::MissingTrustDomain));
        assert_eq!(parse("spiffe:///a"), Err(InvalidSpiffeId::MissingTrustDomain));
        for domain in ["user@td", "user:secret@td", "td:80", "Td", "t%64", "t d", "té", "[::1]", "t!d"] {
            assert_eq!(
                parse(&format!("spiffe://{domain}/a")),
                Err(InvalidSpiffeId::TrustDomainCharacter),
                "{domain}"
            );
        }
        for domain in ["a", "10.0.0.1", "1.2.3", "example.org", "a_b-c.d", "..", "-"] {
            assert_eq!(parse(&format!("spiffe://{domain}/a")).unwrap().trust_domain(), domain);
            assert_eq!(domain.parse::<TrustDomain>().unwrap().as_str(), domain);
        }
        let long = "a".repeat(MAX_TRUST_DOMAIN);
        assert!(parse(&format!("spiffe://{long}")).is_ok());
        assert_eq!(parse(&format!("spiffe://{long}a")), Err(InvalidSpiffeId::TooLong));
    }

    #[test]
    fn spiffe_id_2_2_the_path() {
        for (path, reason) in [
            ("/", InvalidSpiffeId::TrailingSlash),
            ("/a/", InvalidSpiffeId::TrailingSlash),
            ("//", InvalidSpiffeId::TrailingSlash),
            ("/a//b", InvalidSpiffeId::EmptySegment),
            ("//a", InvalidSpiffeId::EmptySegment),
            ("/.", InvalidSpiffeId::RelativeSegment),
            ("/a/../b", InvalidSpiffeId::RelativeSegment),
            ("/%61", InvalidSpiffeId::PathCharacter),
            ("/a b", InvalidSpiffeId::PathCharacter),
            ("/ä", InvalidSpiffeId::PathCharacter),
            ("/a\\b", InvalidSpiffeId::PathCharacter),
            ("/a:b", InvalidSpiffeId::PathCharacter),
        ] {
            assert_eq!(parse(&format!("spiffe://td{path}")), Err(reason), "{path}");
        }
        for path in ["", "/a", "/ns/default/sa/A_b-c.d", "/...", "/.a"] {
            assert_eq!(parse(&format!("spiffe://td{path}")).unwrap().path(), path);
        }
    }

    #[test]
    fn spiffe_id_2_3_2048_bytes_and_no_more() {
        let text = |length: usize| format!("spiffe://td/{}", "a".repeat(length - "spiffe://td/".len()));
        assert_eq!(parse(&text(2048)).unwrap().as_str().len(), 2048);
        assert_eq!(parse(&text(2049)), Err(InvalidSpiffeId::TooLong));
    }

    #[test]
    fn the_form_of_istio() {
        let domain: TrustDomain = "td".parse().unwrap();
        let id = SpiffeId::workload(&domain, "foo", "bar").unwrap();
        assert_eq!(id.as_str(), "spiffe://td/ns/foo/sa/bar");
        assert_eq!(id.principal(), "td/ns/foo/sa/bar");
        assert_eq!((id.namespace(), id.service_account()), (Some("foo"), Some("bar")));
        for other in
            ["spiffe://td", "spiffe://td/ns/foo", "spiffe://td/ns/foo/sa/bar/baz", "spiffe://td/sa/bar"]
        {
            assert_eq!(parse(other).unwrap().namespace(), None, "{other}");
        }
        for part in ["", "a/b", "..", "a b"] {
            assert!(SpiffeId::workload(&domain, part, "bar").is_err(), "{part:?}");
            assert!(SpiffeId::workload(&domain, "foo", part).is_err(), "{part:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_alike(text in "spiffe://[a-z0-9._-]{1,20}(/[a-zA-Z0-9_-]{1,10}){0,5}") {
            let id = parse(&text).unwrap();
            prop_assert_eq!(id.as_str(), text.as_str());
            prop_assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        }

        #[test]
        fn no_text_is_too_strange(text in "\\PC{0,64}|spiffe://\\PC{0,64}") {
            if let Ok(id) = parse(&text) {
                prop_assert_eq!(id.as_str(), text.as_str());
                prop_assert!(!text.contains(['%', '?', '#', '@', ':']) || text.matches(':').count() == 1);
            }
        }
    }
}
