//! Making a connection to an endpoint.

use std::io;
use std::net::SocketAddr;

use http::StatusCode;
use mesh_core::{ConnectTarget, Error, ErrorKind, ResponseFlags, UpstreamTls};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::cluster::{PoolSettings, TcpKeepalive};

/// A stream to an endpoint, and our end of it.
pub(crate) struct Connected {
    pub(crate) stream: TcpStream,
    pub(crate) local: Option<SocketAddr>,
}

/// Connects within the connect timeout, without Nagle's delay.
pub(crate) async fn connect(target: &ConnectTarget, settings: &PoolSettings) -> Result<Connected, Error> {
    if target.tls != UpstreamTls::Disable {
        return Err(failure(
            ErrorKind::ConnectFailure,
            "local_connection_failure",
            "TLS is demanded and cannot be originated",
        ));
    }
    let stream = match timeout(settings.connect_timeout, TcpStream::connect(target.addr)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            return Err(failure(ErrorKind::ConnectFailure, "remote_connection_failure", error));
        }
        Err(_) => return Err(failure(ErrorKind::ConnectTimeout, "connection_timeout", "connect timeout")),
    };
    let options = stream.set_nodelay(true).and_then(|()| match settings.tcp_keepalive {
        Some(keepalive) => set_keepalive(&stream, keepalive),
        None => Ok(()),
    });
    if let Err(error) = options {
        // The peer may be gone already; the first write will say so.
        tracing::debug!(addr = %target.addr, %error, "cannot set socket options");
    }
    let local = stream.local_addr().ok();
    Ok(Connected { stream, local })
}

fn set_keepalive(stream: &TcpStream, keepalive: TcpKeepalive) -> io::Result<()> {
    let mut options = socket2::TcpKeepalive::new();
    if let Some(time) = keepalive.time {
        options = options.with_time(time);
    }
    if let Some(interval) = keepalive.interval {
        options = options.with_interval(interval);
    }
    if let Some(probes) = keepalive.probes {
        options = options.with_retries(probes);
    }
    SockRef::from(stream).set_tcp_keepalive(&options)
}

fn failure(kind: ErrorKind, reason: &str, source: impl Into<mesh_core::BoxError>) -> Error {
    Error::new(
        kind,
        StatusCode::SERVICE_UNAVAILABLE,
        ResponseFlags::UPSTREAM_CONNECTION_FAILURE,
        format!("upstream_reset_before_response_started{{{reason}}}"),
    )
    .with_body(format!(
        "upstream connect error or disconnect/reset before headers. reset reason: {}",
        reason.replace('_', " ")
    ))
    .with_source(source)
}
