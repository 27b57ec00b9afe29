//! What the next hop is told of a client's certificate: an element of `x-forwarded-client-cert` (PA-04).
//!
//! It is the same for every request of a connection, so it is written once, after the handshake, and whoever edits headers
//! only adds it. What a client says of itself in that header is never believed from outside; see
//! [`mesh_core::forwarded`].

use std::fmt::Write as _;

use http::HeaderValue;
use mesh_core::identity::{PeerInfo, SpiffeId};

/// The element for `peer`, whom we met as `own`: `By`, `Hash`, `Subject`, `URI` and `DNS`, as Istio's proxies say them.
/// `None` when a name of the certificate can be in no header.
#[must_use]
pub fn element(own: Option<&SpiffeId>, peer: &PeerInfo) -> Option<HeaderValue> {
    let mut text = String::new();
    if let Some(own) = own {
        add(&mut text, "By", own.as_str());
    }
    let hash = peer.fingerprint.iter().fold(String::new(), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    add(&mut text, "Hash", &hash);
    // The subject is always quoted, also when there is none.
    let _ = write!(text, ";Subject=\"{}\"", escaped(&peer.subject));
    for uri in &peer.uri_sans {
        add(&mut text, "URI", uri);
    }
    for name in &peer.dns_sans {
        add(&mut text, "DNS", name);
    }
    HeaderValue::try_from(text).ok()
}

fn add(text: &mut String, key: &str, value: &str) {
    let separator = if text.is_empty() { "" } else { ";" };
    // A value with a separator of the header would be read as another pair, or another element.
    let _ = if value.contains([',', ';', '=', '"', '\\']) {
        write!(text, "{separator}{key}=\"{}\"", escaped(value))
    } else {
        write!(text, "{separator}{key}={value}")
    };
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn peer(subject: &str, uris: &[&str], names: &[&str]) -> PeerInfo {
        let mut peer = PeerInfo::new(None, SystemTime::UNIX_EPOCH);
        peer.subject = subject.to_owned();
        peer.fingerprint = [0xab; 32];
        peer.uri_sans = uris.iter().map(|uri| (*uri).to_owned()).collect();
        peer.dns_sans = names.iter().map(|name| (*name).to_owned()).collect();
        peer
    }

    #[test]
    fn pa_04_the_element_of_a_workload() {
        let own = "spiffe://td/ns/a/sa/server".parse().unwrap();
        let told = element(Some(&own), &peer("", &["spiffe://td/ns/a/sa/client"], &[])).unwrap();
        let hash = "ab".repeat(32);
        assert_eq!(
            told,
            format!("By=spiffe://td/ns/a/sa/server;Hash={hash};Subject=\"\";URI=spiffe://td/ns/a/sa/client")
                .as_str()
        );
    }

    #[test]
    fn pa_04_nothing_in_a_certificate_is_another_pair_or_element() {
        let told = element(None, &peer("CN=a\"b,O=c;URI=x", &["https://a/?b=c,d;By=e"], &["a.example"]));
        let hash = "ab".repeat(32);
        assert_eq!(
            told.unwrap(),
            format!(
                "Hash={hash};Subject=\"CN=a\\\"b,O=c;URI=x\";URI=\"https://a/?b=c,d;By=e\";DNS=a.example"
            )
            .as_str()
        );
        assert_eq!(element(None, &peer("a\r\nb", &[], &[])), None);
    }
}
