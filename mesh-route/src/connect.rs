//! Making a connection to an endpoint.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::StatusCode;
use mesh_core::{ConnectTarget, Error, ErrorKind, Io, Originated, ResponseFlags, Standing};
use pin_project::pin_project;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::cluster::{PoolSettings, TcpKeepalive};
use crate::shard::Shard;

/// The transport to an endpoint: TCP as it is, or what a connector made of it, or in its place.
#[pin_project(project = StreamProjection)]
pub(crate) enum Stream {
    Tcp(#[pin] TcpStream),
    Made(#[pin] Box<dyn Io>),
}

/// A transport to an endpoint.
pub(crate) struct Opened {
    pub(crate) stream: Stream,
    /// Our end, where it is known.
    pub(crate) local: Option<SocketAddr>,
    /// What its security stands on.
    pub(crate) standing: Option<Arc<dyn Standing>>,
}

/// Opens the transport to an endpoint: by the connector of the shard, or by TCP and what secures it. All of it within the
/// connect timeout.
pub(crate) async fn open(
    shard: &Shard,
    target: &ConnectTarget,
    settings: &PoolSettings,
) -> Result<Opened, Error> {
    if let Some(connector) = shard.connector() {
        let made = within(settings, connector.connect(target)).await?;
        return Ok(Opened { stream: Stream::Made(made), local: None, standing: None });
    }
    let Some(tls) = &target.tls else {
        let stream = within(settings, TcpStream::connect(target.addr)).await?;
        set_options(&stream, target, settings);
        let local = stream.local_addr().ok();
        return Ok(Opened { stream: Stream::Tcp(stream), local, standing: None });
    };
    // Never in plaintext instead.
    let originator = shard.originator().ok_or_else(|| {
        failure(
            ErrorKind::ConnectFailure,
            "local_connection_failure",
            "TLS is demanded and cannot be originated",
        )
    })?;
    let mut local = None;
    let secured = async {
        let stream = TcpStream::connect(target.addr).await?;
        set_options(&stream, target, settings);
        local = stream.local_addr().ok();
        originator.originate(stream, tls, target.spoken).await
    };
    let Originated { io, standing } = within(settings, secured).await?;
    Ok(Opened { stream: Stream::Made(io), local, standing })
}

/// No delay by Nagle's algorithm, and the keep-alive that is asked for.
fn set_options(stream: &TcpStream, target: &ConnectTarget, settings: &PoolSettings) {
    let options = stream.set_nodelay(true).and_then(|()| match settings.tcp_keepalive {
        Some(keepalive) => set_keepalive(stream, keepalive),
        None => Ok(()),
    });
    if let Err(error) = options {
        // The peer may be gone already; the first write will say so.
        tracing::debug!(addr = %target.addr, %error, "cannot set socket options");
    }
}

async fn within<T>(
    settings: &PoolSettings,
    connecting: impl Future<Output = io::Result<T>>,
) -> Result<T, Error> {
    match timeout(settings.connect_timeout, connecting).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(failure(ErrorKind::ConnectFailure, "remote_connection_failure", error)),
        Err(_) => Err(failure(ErrorKind::ConnectTimeout, "connection_timeout", "connect timeout")),
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.project() {
            StreamProjection::Tcp(stream) => stream.poll_read(cx, buffer),
            StreamProjection::Made(stream) => stream.poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.project() {
            StreamProjection::Tcp(stream) => stream.poll_write(cx, data),
            StreamProjection::Made(stream) => stream.poll_write(cx, data),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.project() {
            StreamProjection::Tcp(stream) => stream.poll_write_vectored(cx, data),
            StreamProjection::Made(stream) => stream.poll_write_vectored(cx, data),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Made(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project() {
            StreamProjection::Tcp(stream) => stream.poll_flush(cx),
            StreamProjection::Made(stream) => stream.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project() {
            StreamProjection::Tcp(stream) => stream.poll_shutdown(cx),
            StreamProjection::Made(stream) => stream.poll_shutdown(cx),
        }
    }
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
