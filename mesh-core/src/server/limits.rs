//! What a downstream may take.

use std::time::Duration;

/// The limits of a listener's connections. The defaults are safe at the edge of a mesh; none of them has an Istio
/// resource behind it, so they hold unless a program sets them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerLimits {
    /// Open connections per listener, over all workers; tunnels count. What comes above is accepted and closed.
    /// Default 10,000.
    pub max_connections: usize,
    /// From the first byte of an HTTP/1 request to the end of its head; then 408. Default 10 s.
    pub head_timeout: Duration,
    /// From the first byte of a TLS connection to the end of its handshake; then it is closed. Default 10 s.
    pub tls_handshake_timeout: Duration,
    /// TLS handshakes at once per listener, over all workers. What comes above is closed. Default 1,000.
    pub max_tls_handshakes: usize,
    /// Bytes of a request's head: request line and header fields of HTTP/1, header list of HTTP/2 (counted as
    /// HPACK counts, 32 bytes per field included). Above it, 431. Default 60 KiB.
    pub max_head_bytes: u32,
    /// Header fields of a request. Above it, 431. Default 100.
    pub max_fields: usize,
    /// Concurrent streams of an HTTP/2 connection. Default 100.
    pub h2_max_streams: u32,
    /// Receive window of an HTTP/2 stream, in bytes. Default 64 KiB.
    pub h2_stream_window_bytes: u32,
    /// Receive window of an HTTP/2 connection, in bytes. Default 1 MiB.
    pub h2_connection_window_bytes: u32,
    /// Streams that the peer reset before we looked at them; more is a rapid reset, answered by
    /// GOAWAY(ENHANCE_YOUR_CALM). Default 20.
    pub h2_max_pending_accept_resets: usize,
    /// Streams that we reset because of the peer's errors; more ends the connection (MadeYouReset). Default 100.
    pub h2_max_local_error_resets: usize,
    /// Response bytes that are buffered per HTTP/1 connection or HTTP/2 stream. Default 64 KiB.
    pub send_buffer_bytes: usize,
    /// A connection without a request in flight closes after this time; `None`: never. Default 1 h (Envoy).
    pub idle_timeout: Option<Duration>,
    /// A connection older than this is drained; `None`: never. Default `None`.
    pub max_connection_age: Option<Duration>,
    /// Every so often an HTTP/2 peer is pinged, and dropped when it does not answer within 20 s. Default `None`
    /// (Envoy).
    pub h2_ping_interval: Option<Duration>,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            max_connections: 10_000,
            head_timeout: Duration::from_secs(10),
            tls_handshake_timeout: Duration::from_secs(10),
            max_tls_handshakes: 1_000,
            max_head_bytes: 60 << 10,
            max_fields: 100,
            h2_max_streams: 100,
            h2_stream_window_bytes: 64 << 10,
            h2_connection_window_bytes: 1 << 20,
            h2_max_pending_accept_resets: 20,
            h2_max_local_error_resets: 100,
            send_buffer_bytes: 64 << 10,
            idle_timeout: Some(Duration::from_secs(60 * 60)),
            max_connection_age: None,
            h2_ping_interval: None,
        }
    }
}
