//! The protocol of a port, as Gateway, Sidecar and ServiceEntry write it (PT-04, GW-01).

use super::check::Checked;

/// What a port speaks. The names are read in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PortProtocol {
    /// HTTP/1.1.
    Http,
    /// HTTP/2 in clear text.
    Http2,
    /// gRPC, which is HTTP/2.
    Grpc,
    /// gRPC-Web.
    GrpcWeb,
    /// A port that takes HTTP proxy requests.
    HttpProxy,
    /// HTTP inside TLS.
    Https,
    /// Opaque TLS, routed by SNI.
    Tls,
    /// Opaque bytes.
    Tcp,
    /// Datagrams.
    Udp,
    /// MongoDB.
    Mongo,
    /// Redis.
    Redis,
    /// MySQL.
    Mysql,
    /// HTTP-based overlay network environment.
    Hbone,
    /// HBONE inside HBONE.
    DoubleHbone,
}

impl PortProtocol {
    /// The protocol of this name, in any case; `None` for a name that Istio does not know, the empty one among them.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        const NAMES: [(&str, PortProtocol); 14] = [
            ("http", PortProtocol::Http),
            ("http2", PortProtocol::Http2),
            ("grpc", PortProtocol::Grpc),
            ("grpc-web", PortProtocol::GrpcWeb),
            ("http_proxy", PortProtocol::HttpProxy),
            ("https", PortProtocol::Https),
            ("tls", PortProtocol::Tls),
            ("tcp", PortProtocol::Tcp),
            ("udp", PortProtocol::Udp),
            ("mongo", PortProtocol::Mongo),
            ("redis", PortProtocol::Redis),
            ("mysql", PortProtocol::Mysql),
            ("hbone", PortProtocol::Hbone),
            ("double-hbone", PortProtocol::DoubleHbone),
        ];
        NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, protocol)| *protocol)
    }

    /// Whether requests can be read without terminating TLS.
    #[must_use]
    pub const fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::HttpProxy | Self::Grpc | Self::GrpcWeb)
    }

    /// Whether connections begin with a TLS handshake.
    #[must_use]
    pub const fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }

    /// Whether connections are opaque to HTTP; HTTPS and TLS among them.
    #[must_use]
    pub const fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp | Self::Https | Self::Tls | Self::Mongo | Self::Redis | Self::Mysql)
    }
}

/// A protocol name that Istio knows, or none, which means that it is found out by sniffing.
///
/// # Errors
/// An unknown name.
pub fn known_protocol(name: &str) -> Checked {
    if name.is_empty() || PortProtocol::parse(name).is_some() {
        return Ok(());
    }
    Err(format!("unsupported protocol {name:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_any_case() {
        assert_eq!(PortProtocol::parse("gRPC-Web"), Some(PortProtocol::GrpcWeb));
        assert_eq!(PortProtocol::parse(""), None);
        assert!(known_protocol("").is_ok() && known_protocol("HTTP3").is_err());
        assert!(
            PortProtocol::Https.is_tls() && PortProtocol::Https.is_tcp() && !PortProtocol::Https.is_http()
        );
    }
}
