//! The applications of the demo: five servers that know nothing of a mesh.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

/// Name and version of every server.
const WORKLOADS: [(&str, &str); 5] =
    [("productpage", "v1"), ("reviews", "v1"), ("reviews", "v2"), ("reviews", "v3"), ("ratings", "v1")];

/// Headers that an application passes on so that a trace and a user stay together.
const PROPAGATED: [&str; 4] = ["x-request-id", "traceparent", "end-user", "user-agent"];

/// The running servers.
#[derive(Debug)]
pub struct Bookinfo {
    ports: BTreeMap<String, u16>,
    served: BTreeMap<String, AtomicU64>,
    mesh: OnceLock<SocketAddr>,
}

impl Bookinfo {
    pub(super) async fn start() -> io::Result<Arc<Self>> {
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
        let bookinfo = Arc::new(Self { ports, served, mesh: OnceLock::new() });
        for (service, version, listener) in listeners {
            tokio::spawn(serve(Arc::clone(&bookinfo), service, version, listener));
        }
        Ok(bookinfo)
    }

    /// Tells the applications where their sidecar listens.
    pub fn connect(&self, outbound: SocketAddr) {
        // A second call changes nothing: the applications have their sidecar.
        let _ = self.mesh.set(outbound);
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

    async fn answer(
        &self,
        service: &str,
        version: &str,
        request: Request<Incoming>,
    ) -> Response<Full<Bytes>> {
        if let Some(count) = self.served.get(&format!("{service}-{version}")) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let asks = match (service, version) {
            ("productpage", _) => Some("reviews"),
            ("reviews", "v2" | "v3") => Some("ratings"),
            _ => None,
        };
        let mut text = format!("{service} {version}");
        if let Some(next) = asks {
            match self.ask(next, &request).await {
                Ok(answer) => text = format!("{text} <- {answer}"),
                Err(error) => text = format!("{text} <- {next} unavailable ({error})"),
            }
        }
        text.push('\n');
        Response::new(Full::from(text))
    }

    /// One request through the sidecar, on a connection of its own, as a simple client library makes it.
    async fn ask(&self, service: &'static str, cause: &Request<Incoming>) -> Result<String, String> {
        let mesh = self.mesh.get().ok_or("the mesh is not there yet")?;
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
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let bookinfo = Arc::clone(&bookinfo);
        tokio::spawn(async move {
            let answer = service_fn(move |request| {
                let bookinfo = Arc::clone(&bookinfo);
                async move { Ok::<_, Infallible>(bookinfo.answer(service, version, request).await) }
            });
            // A client that goes away is no event for the demo.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}
