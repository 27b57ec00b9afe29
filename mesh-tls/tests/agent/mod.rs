//! A Workload API on a Unix socket. Its messages are written by another library than the one that is tested.
#![allow(dead_code, reason = "each test file has a use for another part")]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_tls::spiffe::{Code, X509SvidResponse};
use prost::Message as _;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

#[derive(Clone, PartialEq, prost::Message)]
struct Answer {
    #[prost(message, repeated, tag = "1")]
    svids: Vec<Svid>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    crl: Vec<Vec<u8>>,
    #[prost(btree_map = "string, bytes", tag = "3")]
    federated_bundles: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Svid {
    #[prost(string, tag = "1")]
    spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    x509_svid: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    x509_svid_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    bundle: Vec<u8>,
    #[prost(string, tag = "5")]
    hint: String,
}

/// An answer as it is on the wire, with its frame.
pub(crate) fn encode(answer: &X509SvidResponse) -> Vec<u8> {
    let svid = |svid: &mesh_tls::spiffe::X509Svid| Svid {
        spiffe_id: svid.spiffe_id.clone(),
        x509_svid: svid.chain.clone(),
        x509_svid_key: svid.key.secret_pkcs8_der().to_vec(),
        bundle: svid.bundle.clone(),
        hint: svid.hint.clone(),
    };
    let message = Answer {
        svids: answer.svids.iter().map(svid).collect(),
        crl: answer.crls.clone(),
        federated_bundles: answer.federated_bundles.clone(),
    }
    .encode_to_vec();
    let mut out = vec![0];
    out.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    out.extend(message);
    out
}

#[derive(Default)]
struct Shared {
    /// What holds now, as it is on the wire; without it nobody has an identity.
    now: Option<Vec<u8>>,
    calls: Vec<mpsc::UnboundedSender<Frame<Bytes>>>,
    ends_next: bool,
    strange: usize,
}

/// An agent, its socket, and a directory that goes with the test.
pub(crate) struct Agent {
    dir: PathBuf,
    shared: Arc<Mutex<Shared>>,
    serving: Option<JoinHandle<()>>,
}

impl Agent {
    pub(crate) fn start(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("mesh-spiffe-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut agent = Self { dir, shared: Arc::default(), serving: None };
        agent.restart();
        agent
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("unix://{}", self.dir.join("agent.sock").display())
    }

    /// Says it to all who ask, now and later.
    pub(crate) fn say(&self, answer: &X509SvidResponse) {
        self.say_raw(encode(answer));
    }

    pub(crate) fn say_raw(&self, bytes: Vec<u8>) {
        let mut shared = self.shared.lock().unwrap();
        shared.calls.retain(|call| send(call, &bytes));
        shared.now = Some(bytes);
    }

    /// Ends the calls that are open.
    pub(crate) fn end(&self, code: Code) {
        for call in self.shared.lock().unwrap().calls.drain(..) {
            // Who asked may have left.
            let _ = call.send(Frame::trailers(status(code, "")));
        }
    }

    /// Ends the next call after what holds now.
    pub(crate) fn end_next(&self) {
        self.shared.lock().unwrap().ends_next = true;
    }

    /// How many calls were not what SPIFFE says.
    pub(crate) fn strange(&self) -> usize {
        self.shared.lock().unwrap().strange
    }

    /// Is gone, with all connections.
    pub(crate) fn stop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
        self.shared.lock().unwrap().calls.clear();
        // It may be gone already.
        let _ = std::fs::remove_file(self.dir.join("agent.sock"));
    }

    pub(crate) fn restart(&mut self) {
        self.stop();
        let listener = UnixListener::bind(self.dir.join("agent.sock")).unwrap();
        let shared = Arc::clone(&self.shared);
        self.serving = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(request, Arc::clone(&shared)));
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    // It ends when the client is gone.
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        }));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop();
        // It may be gone already.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// In two parts, as a large message comes.
fn send(call: &mpsc::UnboundedSender<Frame<Bytes>>, bytes: &[u8]) -> bool {
    let (one, two) = bytes.split_at(3);
    [one, two].into_iter().all(|part| call.send(Frame::data(Bytes::copy_from_slice(part))).is_ok())
}

fn status(code: Code, message: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("grpc-status", HeaderValue::from(code as u16));
    headers.insert("grpc-message", HeaderValue::from_static(message));
    headers
}

async fn answer(
    request: Request<Incoming>,
    shared: Arc<Mutex<Shared>>,
) -> Result<Response<Call>, Infallible> {
    let (head, body) = request.into_parts();
    let asked = body.collect().await.unwrap().to_bytes();
    let has = |name: &str, value: &str| head.headers.get(name).is_some_and(|is| is == value);
    let is_right = head.method == Method::POST
        && head.uri.path() == "/SpiffeWorkloadAPI/FetchX509SVID"
        && has("content-type", "application/grpc")
        && has("te", "trailers")
        && has("workload.spiffe.io", "true")
        && asked.as_ref() == b"\0\0\0\0\0";
    let (call, frames) = mpsc::unbounded_channel();
    let mut response = Response::new(Call(frames));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let mut shared = shared.lock().unwrap();
    match (is_right, shared.now.clone()) {
        (false, _) => {
            shared.strange += 1;
            response.headers_mut().extend(status(Code::InvalidArgument, "security header missing"));
        }
        (true, None) => response.headers_mut().extend(status(Code::PermissionDenied, "no identity issued")),
        (true, Some(bytes)) => {
            send(&call, &bytes);
            if std::mem::take(&mut shared.ends_next) {
                call.send(Frame::trailers(status(Code::Ok, ""))).unwrap();
            } else {
                shared.calls.push(call);
            }
        }
    }
    Ok(response)
}

/// The body of an answer that goes on.
struct Call(mpsc::UnboundedReceiver<Frame<Bytes>>);

impl Body for Call {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}
