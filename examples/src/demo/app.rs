//! The applications of the demo: five servers, each behind mutual TLS with an identity of its own.
//!
//! A real workload leaves that to its sidecar. Here all are in one process, and each embeds what its sidecar would do: an
//! [`Acceptor`] before its HTTP server. How it calls others is what every application does: plain HTTP, to its sidecar's
//! outbound listener.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use mesh_core::Io;
use mesh_core::identity::PeerInfo;
use mesh_tls::Acceptor;
use tokio::net::{TcpListener, TcpStream};

use super::Identities;

/// Name and version of every server.
const WORKLOADS: [(&str, &str); 5] =
    [("productpage", "v1"), ("reviews", "v1"), ("reviews", "v2"), ("reviews", "v3"), ("ratings", "v1")];

/// What an answer says of who asked: the verified principal.
const ASKED_BY: HeaderName = HeaderName::from_static("x-asked-by");

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// `SERVICE-VERSION` of every server.
pub(super) fn workloads() -> impl Iterator<Item = String> {
    WORKLOADS.iter().map(|(service, version)| format!("{service}-{version}"))
}

/// Headers that an application passes on so that a trace and a user stay together.
const PROPAGATED: [&str; 4] = ["x-request-id", "traceparent", "end-user", "user-agent"];

/// The running servers.
#[derive(Debug)]
pub struct Bookinfo {
    ports: BTreeMap<String, u16>,
    served: BTreeMap<String, AtomicU64>,
    /// The sidecar of each workload.
    mesh: OnceLock<BTreeMap<String, SocketAddr>>,
    acceptors: BTreeMap<String, Acceptor>,
}

impl Bookinfo {
    pub(super) async fn start(identities: Option<&Identities>) -> io::Result<Arc<Self>> {
        let mut acceptors = BTreeMap::new();
        for workload in workloads() {
            if let Some(own) = identities.and_then(|identities| identities.of(&workload)) {
                let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
                let acceptor = Acceptor::mutual(own.clone(), provider).map_err(io::Error::other)?;
                acceptors.insert(workload, acceptor);
            }
        }
        let mut listeners = Vec::new();
        let mut ports = BTreeMap::new();
        let mut served = BTreeMap::new();
        for (service, version) in WORKLOADS {
            let workload = format!("{service}-{version}");
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            ports.insert(workload.clone(), listener.local_addr()?.port());
            served.insert(workload, AtomicU64::new(0));
            listeners.push((service, version, listener));
        }
        let bookinfo = Arc::new(Self { ports, served, mesh: OnceLock::new(), acceptors });
        for (service, version, listener) in listeners {
            tokio::spawn(serve(Arc::clone(&bookinfo), service, version, listener));
        }
        Ok(bookinfo)
    }

    /// Tells the applications where their sidecars listen, by `SERVICE-VERSION`.
    pub fn connect(&self, outbound: BTreeMap<String, SocketAddr>) {
        // A second call changes nothing: the applications have their sidecars.
        let _ = self.mesh.set(outbound);
    }

    /// Whether the servers ask for mutual TLS.
    #[must_use]
    pub fn is_secured(&self) -> bool {
        !self.acceptors.is_empty()
    }

    /// The port of every server, by `SERVICE-VERSION`.
    #[must_use]
    pub fn ports(&self) -> &BTreeMap<String, u16> {
        &self.ports
    }

    /// How many requests every server has answered, by `SERVICE-VERSION`.
    #[must_use]
    pub fn served(&self) -> BTreeMap<&str, u64> {
        self.served
            .iter()
            .map(|(workload, count)| (workload.as_str(), count.load(Ordering::Relaxed)))
            .collect()
    }

    /// Shakes hands, where the workload has an identity; who then is the client.
    async fn let_in(
        &self,
        service: &str,
        version: &str,
        stream: TcpStream,
    ) -> Option<(Box<dyn Io>, Option<Arc<PeerInfo>>)> {
        let Some(acceptor) = self.acceptors.get(&format!("{service}-{version}")) else {
            return Some((Box::new(stream), None));
        };
        match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(secured)) => Some((Box::new(secured.io), secured.peer)),
            Ok(Err(error)) => {
                tracing::info!(service, version, "the demo lets nobody in without an identity: {error}");
                None
            }
            Err(_) => None,
        }
    }

    async fn answer(
        &self,
        service: &str,
        version: &str,
        peer: Option<&PeerInfo>,
        request: Request<Incoming>,
    ) -> Response<Full<Bytes>> {
        let workload = format!("{service}-{version}");
        if let Some(count) = self.served.get(&workload) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let asks = match (service, version) {
            ("productpage", _) => Some("reviews"),
            ("reviews", "v2" | "v3") => Some("ratings"),
            _ => None,
        };
        let mut text = format!("{service} {version}");
        if let Some(next) = asks {
            match self.ask(&workload, next, &request).await {
                Ok(answer) => text = format!("{text} <- {answer}"),
                Err(error) => text = format!("{text} <- {next} unavailable ({error})"),
            }
        }
        text.push('\n');
        let mut response = Response::new(Full::from(text));
        if let Some(value) = peer.and_then(|peer| HeaderValue::from_str(peer.principal()?).ok()) {
            response.headers_mut().insert(ASKED_BY, value);
        }
        response
    }

    /// One request through the sidecar, on a connection of its own, as a simple client library makes it.
    async fn ask(
        &self,
        workload: &str,
        service: &'static str,
        cause: &Request<Incoming>,
    ) -> Result<String, String> {
        let mesh = self.mesh.get().and_then(|mesh| mesh.get(workload)).ok_or("the mesh is not there yet")?;
        let stream = TcpStream::connect(mesh).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        let connection = tokio::spawn(connection);
        let mut request = Request::new(Empty::<Bytes>::new());
        request.headers_mut().insert(HOST, HeaderValue::from_static(service));
        for name in PROPAGATED {
            if let Some(value) = cause.headers().get(name) {
                request.headers_mut().insert(name, value.clone());
            }
        }
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let status = response.status();
            let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
            match status {
                StatusCode::OK => Ok(String::from_utf8_lossy(&body).trim_end().to_owned()),
                _ => Err(status.to_string()),
            }
        };
        let answer = answer.await;
        connection.abort();
        answer
    }
}

async fn serve(bookinfo: Arc<Bookinfo>, service: &'static str, version: &'static str, listener: TcpListener) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(service, version, %error, "the demo application cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let bookinfo = Arc::clone(&bookinfo);
        tokio::spawn(async move {
            let Some((io, peer)) = bookinfo.let_in(service, version, stream).await else { return };
            let answer = service_fn(move |request| {
                let (bookinfo, peer) = (Arc::clone(&bookinfo), peer.clone());
                async move {
                    Ok::<_, Infallible>(bookinfo.answer(service, version, peer.as_deref(), request).await)
                }
            });
            // A client that goes away is no event for the demo.
            let _ =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), answer).await;
        });
    }
}
