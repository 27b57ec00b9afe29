//! What the edge says about a request (VS-X01), and what it does not believe of what a client said.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::conn::{ConnInfo, Direction};
use crate::vendor;

/// `x-request-id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// `x-forwarded-for`.
pub const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Makes the headers of a request say what the edge knows.
///
/// * `x-forwarded-client-cert` says whose certificate was verified on this connection (PA-04): at a gateway in the place
///   of whatever the client says, for a workload behind what its peer in the mesh says. Where none was verified it goes.
/// * Always: `x-request-id` is made when it is absent (`id` is the text of a UUID); `x-forwarded-proto` is set when it is
///   absent.
/// * At a gateway: what only the mesh may say goes, the [mark of a copy](crate::mirrored) is not believed, the peer is
///   appended to `x-forwarded-for`, and the client's
///   address, `trusted_proxies` hops away, stands in `x-envoy-external-address` (or under another [prefix](crate::vendor)).
///   Without trusted proxies `x-forwarded-proto` is not believed either.
pub fn apply(
    headers: &mut HeaderMap,
    conn: &ConnInfo,
    trusted_proxies: u32,
    id: impl FnOnce() -> HeaderValue,
) {
    client_cert(headers, conn);
    let gateway = conn.direction == Direction::Gateway;
    if gateway {
        vendor::distrust(headers);
        crate::mirrored::distrust(headers);
        let client = client_address(headers, conn, trusted_proxies);
        if let Ok(address) = HeaderValue::try_from(client.to_string()) {
            vendor::EXTERNAL_ADDRESS.insert(headers, address);
        }
        append_peer(headers, conn);
        if trusted_proxies == 0 {
            headers.remove(FORWARDED_PROTO);
        }
    }
    if !headers.contains_key(FORWARDED_PROTO) {
        let proto = HeaderValue::from_static(if conn.tls { "https" } else { "http" });
        headers.insert(FORWARDED_PROTO, proto);
    }
    if !headers.contains_key(REQUEST_ID) {
        headers.insert(REQUEST_ID, id());
    }
}

fn client_cert(headers: &mut HeaderMap, conn: &ConnInfo) {
    let Some(peer) = &conn.identity else {
        headers.remove(CLIENT_CERT);
        return;
    };
    // Only who is of the mesh is believed what it says of those before it.
    if conn.direction != Direction::Inbound || peer.spiffe_id.is_none() {
        headers.remove(CLIENT_CERT);
    }
    if let Some(element) = &peer.forwarded {
        headers.append(CLIENT_CERT, element.clone());
    }
}

/// The address of the client: the direct peer, or what the last trusted proxy says it saw (Envoy's
/// `xff_num_trusted_hops`).
#[must_use]
pub fn client_address(headers: &HeaderMap, conn: &ConnInfo, trusted_proxies: u32) -> IpAddr {
    let peer = conn.peer.ip().to_canonical();
    if trusted_proxies == 0 {
        return peer;
    }
    let said: Vec<_> = headers
        .get_all(FORWARDED_FOR)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    // Fewer entries than hops is no chain of ours.
    let at = said.len().checked_sub(trusted_proxies as usize);
    at.and_then(|at| said.get(at)).and_then(|address| address.parse::<IpAddr>().ok()).unwrap_or(peer)
}

/// The text of a version 4 UUID of these random bits.
#[must_use]
pub fn uuid(high: u64, low: u64) -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let bits = (u128::from(high) << 64) | u128::from(low);
    let bits = bits & !(0xf_u128 << 76) | (0x4_u128 << 76);
    let bits = bits & !(0x3_u128 << 62) | (0x2_u128 << 62);
    let mut text = [b'-'; 36];
    let mut shift = 128;
    for (at, place) in text.iter_mut().enumerate() {
        if !matches!(at, 8 | 13 | 18 | 23) {
            shift -= 4;
            *place = DIGITS[(bits >> shift) as usize & 0xf];
        }
    }
    HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("-"))
}

fn append_peer(headers: &mut HeaderMap, conn: &ConnInfo) {
    let peer = conn.peer.ip().to_canonical().to_string();
    let joined = crate::matcher::joined(headers, &FORWARDED_FOR);
    let all = match joined {
        Some(said) => HeaderValue::try_from(format!("{said},{peer}")),
        None => HeaderValue::try_from(peer),
    };
    if let Ok(all) = all {
        headers.insert(FORWARDED_FOR, all);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::identity::PeerInfo;

    use super::*;

    fn conn(direction: Direction) -> ConnInfo {
        ConnInfo { peer: "10.1.1.1:5".parse().unwrap(), ..ConnInfo::unknown(direction) }
    }

    fn applied(direction: Direction, trusted: u32, said: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers: HeaderMap = said
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        apply(&mut headers, &conn(direction), trusted, || uuid(1, 2));
        headers
    }

    #[test]
    fn vs_x01_a_request_id_is_made_once() {
        let headers = applied(Direction::Outbound, 0, &[]);
        assert_eq!(headers[REQUEST_ID], "00000000-0000-4001-8000-000000000002");
        assert_eq!(applied(Direction::Outbound, 0, &[("x-request-id", "mine")])[REQUEST_ID], "mine");
    }

    #[test]
    fn vs_x01_a_gateway_appends_its_peer_and_a_sidecar_does_not() {
        let said = [("x-forwarded-for", "56.5.6.7, 72.9.5.6, 98.1.2.3")];
        let gateway = applied(Direction::Gateway, 2, &said);
        assert_eq!(gateway[FORWARDED_FOR], "56.5.6.7, 72.9.5.6, 98.1.2.3,10.1.1.1");
        assert_eq!(gateway["x-envoy-external-address"], "72.9.5.6");
        assert_eq!(applied(Direction::Gateway, 4, &said)["x-envoy-external-address"], "10.1.1.1");
        let sidecar = applied(Direction::Inbound, 0, &said);
        assert_eq!(sidecar[FORWARDED_FOR], "56.5.6.7, 72.9.5.6, 98.1.2.3");
        assert!(!sidecar.contains_key("x-envoy-external-address"));
    }

    #[test]
    fn f3_nobody_outside_is_believed() {
        let said = [
            ("x-forwarded-client-cert", "By=x"),
            ("x-envoy-retry-on", "5xx"),
            ("x-envoy-external-address", "1.2.3.4"),
            ("x-forwarded-proto", "https"),
            ("x-istio-attributes", "x"),
        ];
        let gateway = applied(Direction::Gateway, 0, &said);
        assert!(
            !gateway.contains_key("x-forwarded-client-cert") && !gateway.contains_key("x-envoy-retry-on")
        );
        assert!(!gateway.contains_key("x-istio-attributes"));
        assert_eq!(
            (&gateway["x-envoy-external-address"], &gateway[FORWARDED_PROTO]),
            (&HeaderValue::from_static("10.1.1.1"), &HeaderValue::from_static("http"))
        );
        assert_eq!(applied(Direction::Gateway, 1, &said)[FORWARDED_PROTO], "https");
        assert!(!applied(Direction::Inbound, 0, &said).contains_key("x-forwarded-client-cert"));
    }

    #[test]
    fn pa_04_a_verified_certificate_is_told_and_no_other() {
        let mut peer = PeerInfo::new("spiffe://td/ns/a/sa/b".parse().ok(), std::time::SystemTime::UNIX_EPOCH);
        peer.forwarded = Some(HeaderValue::from_static("Hash=ours"));
        let known = Some(Arc::new(peer.clone()));
        peer.spiffe_id = None;
        let foreign = Some(Arc::new(peer));
        for (direction, identity, told) in [
            (Direction::Inbound, None, &[][..]),
            (Direction::Gateway, None, &[]),
            (Direction::Outbound, None, &[]),
            (Direction::Inbound, known.clone(), &["Hash=said", "Hash=ours"]),
            (Direction::Inbound, foreign, &["Hash=ours"]),
            (Direction::Gateway, known, &["Hash=ours"]),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CLIENT_CERT, HeaderValue::from_static("Hash=said"));
            let conn = ConnInfo { identity, ..ConnInfo::unknown(direction) };
            apply(&mut headers, &conn, 0, || HeaderValue::from_static("id"));
            assert_eq!(headers.get_all(CLIENT_CERT).iter().collect::<Vec<_>>(), told, "{direction:?}");
        }
    }
}
