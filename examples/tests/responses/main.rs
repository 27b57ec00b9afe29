//! Upstreams that break the protocol, through the sidecar: what their clients get is one answer for each request, whole
//! and their own, or an error (A8).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod http1;
mod http2;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::get_json;
use mesh_testkit::until;
use mesh_tls::ca::Authority;
use mesh_tls::{Acceptor, Material, Materials, TrustBundle};
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::net::{TcpListener, TcpStream};

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";

/// How many broken answers each upstream gives, each followed by a good one.
const PAIRS: usize = 10_000;

/// What a client may see of a broken answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// 502, and the connection to the upstream is closed.
    Refused,
    /// This status and body, by the framing that wins, or by the method and status that have none.
    Status(u16, &'static str),
    /// The end of the connection, before that of the answer.
    Cut,
}

/// What is asked of an upstream that will break it.
struct Asked<'a> {
    name: &'a str,
    method: &'a str,
    /// What the client may see.
    seen: &'a [Seen],
}

/// How an upstream breaks the protocol.
trait Broken: Send + Sync + 'static {
    /// As a port of a ServiceEntry calls it.
    const PROTOCOL: &'static str;

    /// The request that is answered by a case; they repeat.
    fn asked(&self, at: usize) -> Asked<'_>;

    /// Answers `/bad/N/…` by case N, everything else by its path.
    fn serve<IO: AsyncRead + AsyncWrite + Unpin + Send>(&self, io: IO) -> impl Future<Output = ()> + Send;
}

/// How the transport to the upstream is secured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Security {
    Plaintext,
    Mutual,
}

/// An upstream, and how many connections it has open.
async fn upstream(broken: Arc<impl Broken>, tls: Option<Acceptor>) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let open = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&open);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (broken, open, tls) = (Arc::clone(&broken), Arc::clone(&counted), tls.clone());
            open.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                match tls {
                    None => broken.serve(stream).await,
                    Some(tls) => match tls.accept(stream).await {
                        Ok(secured) => broken.serve(secured.io).await,
                        Err(error) => panic!("no handshake: {error}"),
                    },
                }
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    (addr, open)
}

/// A sidecar in front of it. With an authority it has an identity, and the upstream another.
fn sidecar(upstream: SocketAddr, protocol: &str, ca: Option<&Authority>) -> (Process, [ConfigDir; 2]) {
    let (config, identity) = (ConfigDir::new(), ConfigDir::new());
    let account = if ca.is_some() { ", serviceAccount: app" } else { "" };
    config.write(
        "mesh.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: app, namespace: default}}\nspec:\n  hosts: [app.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: web, protocol: {protocol}}}]\n  endpoints: [{{address: {}, ports: {{web: {}}}{account}}}]\n",
            upstream.ip(),
            upstream.port()
        ),
    );
    let file = config.file("mesh.yaml");
    let mut args =
        vec!["--config", &file, "--outbound", ANY, "--admin", ANY, "--workers", "1", "--log", "error"];
    let path = identity.path().display().to_string();
    if let Some(ca) = ca {
        let id = "spiffe://cluster.local/ns/default/sa/client".parse().unwrap();
        let issued = ca.issue(&id, SystemTime::now(), HOUR).unwrap();
        identity.write("cert-chain.pem", &issued.certificate.chain_pem);
        identity.write("key.pem", &issued.key_pem());
        identity.write("root-cert.pem", ca.root_pem());
        args.extend(["--identity-dir", &path]);
    }
    (Process::start(SIDECAR, &args), [config, identity])
}

const HOUR: Duration = Duration::from_secs(3600);

/// What the upstream shows, and whom it lets in.
fn acceptor(ca: &Authority) -> Acceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let id = "spiffe://cluster.local/ns/default/sa/app".parse().unwrap();
    let identity = ca.issue(&id, SystemTime::now(), HOUR).unwrap().identity(&provider).unwrap();
    let bundle = Arc::new(TrustBundle::new([ca.root().clone()]).unwrap());
    let materials = Materials::new(Material { identity: Some(identity), bundle });
    Acceptor::mutual(materials, provider).unwrap()
}

/// One answer as a strict client reads it; `None` when the connection ends before its end.
async fn answer(stream: &mut BufReader<TcpStream>, method: &str) -> (u16, Option<String>) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
            return (0, None);
        }
    }
    let lower = head.to_ascii_lowercase();
    let status: u16 = lower.split(' ').nth(1).unwrap().parse().unwrap();
    if (100..200).contains(&status) {
        return Box::pin(answer(stream, method)).await;
    }
    let header = |name: &str| {
        let mut found =
            lower.lines().filter_map(|line| line.split_once(": ")).filter(|(key, _)| *key == name);
        let value = found.next().map(|(_, value)| value.to_owned());
        assert!(found.next().is_none(), "{name} twice: {head}");
        value
    };
    let (length, coding) = (header("content-length"), header("transfer-encoding"));
    assert!(length.is_none() || coding.is_none(), "both framings: {head}");
    if method == "HEAD" || matches!(status, 204 | 304) {
        return (status, Some(String::new()));
    }
    let mut body = Vec::new();
    if coding.is_some() {
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                return (status, None);
            }
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            if stream.read_exact(&mut chunk).await.is_err() {
                return (status, None);
            }
            if size == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else {
        body = vec![0; length.expect("a framing").parse().unwrap()];
        if stream.read_exact(&mut body).await.is_err() {
            return (status, None);
        }
    }
    (status, Some(String::from_utf8(body).unwrap()))
}

/// Asks for a broken answer and for a good one, as a client that pipelines does, again and again.
async fn leave_later_ones_alone<B: Broken>(broken: Arc<B>, security: Security) {
    let ca = (security == Security::Mutual)
        .then(|| Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), 24 * HOUR).unwrap());
    let (addr, open) = upstream(Arc::clone(&broken), ca.as_ref().map(acceptor)).await;
    let (sidecar, _dirs) = sidecar(addr, B::PROTOCOL, ca.as_ref());
    let connect = async || BufReader::new(TcpStream::connect(sidecar.address("outbound")).await.unwrap());
    let request = |method: &str, path: &str| {
        let length = if B::PROTOCOL == "HTTP" { 0 } else { path.len() };
        let body = &path[..length];
        format!("{method} {path} HTTP/1.1\r\nhost: app\r\ncontent-length: {length}\r\n\r\n{body}")
    };
    let mut stream = connect().await;
    let mut cut = 0;
    let mut wrong = BTreeMap::new();
    for pair in 0..PAIRS {
        let Asked { name, method, seen } = broken.asked(pair);
        // Both at once, as a client that pipelines writes them.
        let good = request("POST", &format!("/good/{pair}"));
        let both = format!("{}{good}", request(method, &format!("/bad/{pair}/")));
        stream.get_mut().write_all(both.as_bytes()).await.unwrap();
        let (status, body) = answer(&mut stream, method).await;
        let was_cut = body.is_none();
        let is_legal = seen.iter().any(|seen| match (seen, status, &body) {
            (Seen::Refused, 502, Some(_)) => true,
            (Seen::Status(want, text), got, Some(body)) => *want == got && body == *text,
            // A head that was not written yet is lost with its body.
            (Seen::Cut, 200 | 0, None) => true,
            _ => false,
        });
        if !is_legal {
            wrong.insert(name, format!("{name}: {status} {body:?}, not {seen:?}"));
        }
        if was_cut {
            // The end of the connection is what tells the client, and the second request goes with it.
            cut += 1;
            stream = connect().await;
            stream.get_mut().write_all(good.as_bytes()).await.unwrap();
        }
        let good = answer(&mut stream, "POST").await;
        if good != (200, Some(format!("/good/{pair}"))) {
            wrong.insert(name, format!("after {name}: {good:?}"));
            stream = connect().await;
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    println!("a8 {}: {PAIRS} pairs, 0 lost their place, {cut} were cut", B::PROTOCOL);
    // One connection is kept, and it is one that has answered well.
    until("the broken connections to close", async || {
        let clusters = get_json(sidecar.address("admin"), "/clusters").await;
        let now = clusters["clusters"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["now"]["connections"].as_u64().unwrap_or(0));
        let connections: u64 = now.sum();
        connections <= 1 && open.load(Ordering::SeqCst) as u64 == connections
    })
    .await;
}
