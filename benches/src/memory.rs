//! An upstream in memory: what the stack costs, without a kernel between.

use std::convert::Infallible;
use std::io;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use mesh_core::{Connect, ConnectTarget, Connecting, Io};

/// Connects to a server of its own, on the current runtime, which answers every request with `ok`.
#[derive(Clone, Copy, Debug)]
pub struct InMemory;

impl Connect for InMemory {
    fn connect(&self, _: &ConnectTarget) -> Connecting {
        Box::pin(async {
            let client: Box<dyn Io> = Box::new(serve());
            io::Result::Ok(client)
        })
    }
}

/// The client's end of a connection to a server that answers every request with `ok`.
#[must_use]
pub fn serve() -> tokio::io::DuplexStream {
    let (client, server) = tokio::io::duplex(64 * 1024);
    tokio::spawn(async move {
        let answer = service_fn(|_| async {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"ok"))))
        });
        // It ends with the client.
        let _ =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), answer).await;
    });
    client
}
