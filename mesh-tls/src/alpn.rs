//! The protocols that handshakes agree on.
//!
//! Inside the mesh a client says `istio` beside the HTTP that it speaks, as Istio's proxies do, so that a server of
//! Istio's tells mutual TLS of the mesh from TLS that an application ends.

use mesh_core::server::Protocol;

pub(crate) const H2: &[u8] = b"h2";
pub(crate) const HTTP_11: &[u8] = b"http/1.1";
pub(crate) const HTTP_10: &[u8] = b"http/1.0";
pub(crate) const ISTIO: &[u8] = b"istio";
const ISTIO_H2: &[u8] = b"istio-h2";
const ISTIO_HTTP_11: &[u8] = b"istio-http/1.1";
const ISTIO_HTTP_10: &[u8] = b"istio-http/1.0";
const ISTIO_PEER_EXCHANGE: &[u8] = b"istio-peer-exchange";

/// What a server of the mesh agrees to, the best first.
pub(crate) const SERVER: &[&[u8]] =
    &[H2, HTTP_11, HTTP_10, ISTIO_H2, ISTIO_HTTP_11, ISTIO_HTTP_10, ISTIO_PEER_EXCHANGE, ISTIO];

/// What a server at the edge agrees to, the best first.
pub(crate) const EDGE: &[&[u8]] = &[H2, HTTP_11, HTTP_10];

/// The HTTP that a name stands for; `None` for one that says nothing of it.
pub(crate) fn http(name: &[u8]) -> Option<Protocol> {
    match name {
        H2 | ISTIO_H2 => Some(Protocol::Http2),
        HTTP_11 | HTTP_10 | ISTIO_HTTP_11 | ISTIO_HTTP_10 => Some(Protocol::Http1),
        _ => None,
    }
}
