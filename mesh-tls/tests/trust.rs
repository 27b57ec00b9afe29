//! What a change of trust does to connections that are open (D9): on the side of a server.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod peers;

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::config::{CompileContext, Compiler, Role, Transport};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use mesh_core::server::{ListenerSpec, Server, WithTls};
use mesh_core::{Body, ClientTls, Direction, Spoken};
use mesh_testkit::until;
use mesh_tls::{Acceptor, Connector, Inbound, InboundTls, Material, Materials};
use mesh_tls::{PeerRule, PeerVerifier, TrustBundle};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::client::TlsStream;
use tower::service_fn;

use peers::{Ca, DAY, HOUR, authority, leaf, material, provider, spiffe};

const GET: &[u8] = b"GET /quick HTTP/1.1\r\nhost: a\r\n\r\n";
const SLOW: &[u8] = b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n";
const SECOND: Duration = Duration::from_secs(1);

/// A workload behind mutual TLS, on two workers, whose configuration and whose trust can change.
struct Workload {
    server: Server,
    address: SocketAddr,
    compiler: Compiler<ResourceSet>,
    own: Materials,
    served: Arc<AtomicUsize>,
    /// Lets one slow request end.
    go: Arc<Notify>,
}

impl Workload {
    fn start(ca: &Ca, mode: &str) -> Self {
        let mut context = CompileContext::new(Role::Sidecar);
        context.transport = Transport { terminates: true, has_identity: true, ..Transport::default() };
        let mut compiler = Compiler::new(context);
        let modes = compiler.register::<InboundTls>();
        let own = material(ca, "spiffe://cluster.local/ns/default/sa/reviews");
        let inbound = Inbound::new(Acceptor::mutual(own.clone(), provider()).unwrap(), modes);
        let server = Server::builder().workers(2).snapshots(compiler.snapshots().clone()).start().unwrap();
        let (served, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let stack = (Arc::clone(&served), Arc::clone(&go));
        let spec = ListenerSpec::new("inbound", (Ipv4Addr::LOCALHOST, 0).into(), Direction::Inbound);
        let mut workload = Self { address: spec.address(), server, compiler, own, served, go };
        workload.mode(mode);
        let listened = workload.server.listen_with(
            spec,
            move |_| WithTls::new(inbound.clone()),
            move |_| {
                let (served, go) = stack.clone();
                service_fn(move |request: Request<Body>| {
                    let (served, go) = (Arc::clone(&served), Arc::clone(&go));
                    async move {
                        served.fetch_add(1, Ordering::Relaxed);
                        if request.uri().path() == "/slow" {
                            go.notified().await;
                        }
                        Ok::<_, Infallible>(Response::new(Body::full("hello")))
                    }
                })
            },
        );
        workload.address = listened.unwrap();
        workload
    }

    fn mode(&mut self, mode: &str) {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: default}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        );
        let (set, found) = ResourceSet::load(&[SourceFile::new("a.yaml", text)], &LoadOptions::default());
        let outcome = self.compiler.apply(&set, found);
        assert!(outcome.accepted, "{}", outcome.diagnostics);
    }

    fn revoke(&self, ca: &Ca, serial: &[u8]) {
        let crl = ca.0.revoke(&[serial.to_vec()], SystemTime::now(), DAY).unwrap();
        let bundle = TrustBundle::new([ca.0.root().clone()]).unwrap().with_crls([crl]).unwrap();
        self.own.store(Material { bundle: Arc::new(bundle), ..Material::clone(&self.own.load()) });
    }

    fn served(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }

    fn distrusted(&self) -> u64 {
        self.server.status()[0].distrusted
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn connect(&self, client: &Connector, spoken: Spoken) -> std::io::Result<TlsStream<TcpStream>> {
        let tls = ClientTls { sni: Some("reviews".to_owned()), ..ClientTls::default() };
        client.connect(self.tcp().await, &tls, spoken).await
    }
}

fn client(ca: &Ca, name: &str) -> (Connector, Vec<u8>) {
    let issued =
        ca.0.issue(&spiffe(&format!("spiffe://cluster.local/ns/default/sa/{name}")), SystemTime::now(), HOUR);
    let issued = issued.unwrap();
    let serial = mesh_tls::certificate::Leaf::read(&issued.certificate.chain[0]).unwrap().serial;
    let identity = issued.identity(&provider()).unwrap();
    let own = Materials::new(Material { identity: Some(identity), bundle: ca.bundle() });
    (Connector::new(own, provider()), serial)
}

/// Asks once; the answer, or nothing where the connection is over.
async fn ask(io: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &[u8]) -> Option<String> {
    io.write_all(request).await.ok()?;
    io.flush().await.ok()?;
    let mut answer = Vec::new();
    loop {
        let mut piece = [0; 1024];
        match io.read(&mut piece).await {
            Ok(read @ 1..) => answer.extend(&piece[..read]),
            _ => return None,
        }
        let text = String::from_utf8_lossy(&answer);
        if text.ends_with("hello") || text.starts_with("HTTP/1.1 403") && text.contains("\r\n\r\n") {
            return Some(text.into_owned());
        }
    }
}

/// Reads until the peer closes, however it does.
async fn ends(io: &mut (impl AsyncRead + Unpin)) -> Duration {
    let start = mesh_core::clock::now();
    let mut rest = Vec::new();
    // A connection that is cut within TLS has no orderly end.
    let _ = io.read_to_end(&mut rest).await;
    start.elapsed()
}

#[tokio::test]
async fn d9_a_revoked_peer_is_served_no_other_request_and_its_connection_closes() {
    let ca = authority("cluster.local");
    let workload = Workload::start(&ca, "STRICT");
    let ((evil, serial), (good, _)) = (client(&ca, "evil"), client(&ca, "good"));
    let mut bad: Vec<_> = Vec::new();
    let mut fine: Vec<_> = Vec::new();
    for _ in 0..8 {
        bad.push(workload.connect(&evil, Spoken::Http1).await.unwrap());
        fine.push(workload.connect(&good, Spoken::Http1).await.unwrap());
    }
    for io in bad.iter_mut().chain(&mut fine) {
        assert!(ask(io, GET).await.unwrap().starts_with("HTTP/1.1 200"));
    }
    assert_eq!(workload.served(), 16);
    workload.revoke(&ca, &serial);
    for io in &mut bad {
        let took = ends(io).await;
        assert!(took < SECOND, "{took:?}");
        assert_eq!(ask(io, GET).await, None);
    }
    assert_eq!(workload.served(), 16);
    assert_eq!(workload.distrusted(), 8);
    for io in &mut fine {
        assert!(ask(io, GET).await.unwrap().starts_with("HTTP/1.1 200"));
    }
    let mut again = workload.connect(&evil, Spoken::Http1).await.unwrap();
    assert_eq!(ask(&mut again, GET).await, None, "with TLS 1.3 a client hears of its refusal when it reads");
    assert_eq!(workload.served(), 24);
}

#[tokio::test]
async fn d9_trust_that_changes_while_requests_come_lets_none_through_after_a_second() {
    let ca = authority("cluster.local");
    let workload = Workload::start(&ca, "STRICT");
    let (evil, serial) = client(&ca, "evil");
    let mut asking = Vec::new();
    for _ in 0..8 {
        let mut io = workload.connect(&evil, Spoken::Http1).await.unwrap();
        assert!(ask(&mut io, GET).await.is_some());
        asking.push(tokio::spawn(async move {
            let mut last = None;
            while let Some(answer) = ask(&mut io, GET).await {
                if !answer.starts_with("HTTP/1.1 200") {
                    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
                    assert!(answer.contains("connection: close"), "{answer}");
                    return (last, ends(&mut io).await < SECOND);
                }
                last = Some(mesh_core::clock::now());
            }
            (last, true)
        }));
    }
    until("requests", async || workload.served() > 100).await;
    workload.revoke(&ca, &serial);
    let changed = mesh_core::clock::now();
    for asking in asking {
        let (last, has_ended) = asking.await.unwrap();
        let after = last.map(|last| last.saturating_duration_since(changed)).unwrap_or_default();
        assert!(after < SECOND, "{after:?}");
        assert!(has_ended);
    }
}

#[tokio::test]
async fn d9_http2_says_goaway_and_what_is_in_flight_ends() {
    let ca = authority("cluster.local");
    let workload = Workload::start(&ca, "STRICT");
    let (evil, serial) = client(&ca, "evil");
    let io = workload.connect(&evil, Spoken::Http2).await.unwrap();
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    let ended = tokio::spawn(async move { (connection.await.is_ok(), mesh_core::clock::now()) });
    let get = |path: &str| Request::get(format!("https://a{path}")).body(Empty::<Bytes>::new()).unwrap();
    let quick = send.send_request(get("/quick")).await.unwrap();
    assert_eq!(quick.status(), StatusCode::OK);
    let slow = tokio::spawn(send.send_request(get("/slow")));
    until("the slow request", async || workload.served() == 2).await;
    workload.revoke(&ca, &serial);
    let changed = mesh_core::clock::now();
    until("distrust", async || workload.distrusted() == 1).await;
    // Another stream on the connection is refused, whether or not its client has heard of the GOAWAY.
    if let Ok(late) = send.send_request(get("/quick")).await {
        assert_eq!(late.status(), StatusCode::FORBIDDEN);
    }
    workload.go.notify_one();
    let slow = slow.await.unwrap().unwrap();
    assert_eq!(slow.into_body().collect().await.unwrap().to_bytes(), "hello");
    let (clean, at) = ended.await.unwrap();
    assert!(clean && at - changed < SECOND * 2, "{clean} {:?}", at - changed);
    assert_eq!(workload.served(), 2);
}

#[tokio::test]
async fn d9_what_does_not_end_within_a_second_is_cut() {
    let ca = authority("cluster.local");
    let workload = Workload::start(&ca, "STRICT");
    let (evil, serial) = client(&ca, "evil");
    let mut io = workload.connect(&evil, Spoken::Http1).await.unwrap();
    io.write_all(SLOW).await.unwrap();
    until("the slow request", async || workload.served() == 1).await;
    workload.revoke(&ca, &serial);
    let took = ends(&mut io).await;
    assert!(took >= SECOND - Duration::from_millis(50) && took < SECOND * 2, "{took:?}");
}

#[tokio::test]
async fn d9_plaintext_that_is_open_closes_when_tls_is_demanded() {
    let ca = authority("cluster.local");
    for open in ["PERMISSIVE", "DISABLE"] {
        let mut workload = Workload::start(&ca, open);
        let mut plain = workload.tcp().await;
        assert!(ask(&mut plain, GET).await.unwrap().starts_with("HTTP/1.1 200"));
        let mut silent = workload.tcp().await;
        let mut secured = None;
        if open == "PERMISSIVE" {
            let mut io = workload.connect(&client(&ca, "good").0, Spoken::Http1).await.unwrap();
            assert!(ask(&mut io, GET).await.unwrap().starts_with("HTTP/1.1 200"));
            secured = Some(io);
        }
        workload.mode("STRICT");
        let took = ends(&mut plain).await;
        assert!(took < SECOND, "{open}: {took:?}");
        // Who has said nothing yet is met by the mode that was in force when it came, and then by the one that is now.
        silent.write_all(GET).await.unwrap();
        let served = workload.served();
        assert!(ends(&mut silent).await < SECOND, "{open}");
        assert_eq!(workload.served(), served, "{open}");
        if let Some(io) = &mut secured {
            assert!(ask(io, GET).await.unwrap().starts_with("HTTP/1.1 200"));
        }
    }
}

#[tokio::test]
async fn d9_roots_and_trust_domains_that_are_taken_away_close_connections() {
    let (ours, theirs) = (authority("cluster.local"), authority("old.example"));
    let workload = Workload::start(&ours, "STRICT");
    let both = TrustBundle::new([ours.0.root().clone(), theirs.0.root().clone()]).unwrap();
    let both = Arc::new(both);
    let trust = |bundle: &Arc<TrustBundle>| {
        workload.own.store(Material { bundle: Arc::clone(bundle), ..Material::clone(&workload.own.load()) });
    };
    let domains = |names: &[&str]| {
        workload.own.set_trust_domains(names.iter().map(|name| (*name).to_owned()).collect());
    };
    trust(&both);
    domains(&["cluster.local", "old.example"]);
    let issued = theirs.0.issue(&spiffe("spiffe://old.example/ns/a/sa/b"), SystemTime::now(), HOUR).unwrap();
    let stranger = Materials::new(Material {
        identity: Some(issued.identity(&provider()).unwrap()),
        bundle: ours.bundle(),
    });
    stranger.set_trust_domains(vec!["cluster.local".to_owned()]);
    let stranger = Connector::new(stranger, provider());
    let mut io = workload.connect(&stranger, Spoken::Http1).await.unwrap();
    assert!(ask(&mut io, GET).await.is_some());
    domains(&["cluster.local"]);
    assert!(ends(&mut io).await < SECOND);
    domains(&["cluster.local", "old.example"]);
    let mut io = workload.connect(&stranger, Spoken::Http1).await.unwrap();
    assert!(ask(&mut io, GET).await.is_some());
    trust(&ours.bundle());
    assert!(ends(&mut io).await < SECOND);
    assert_eq!(workload.distrusted(), 2);
}

#[tokio::test]
async fn pa_05_a_certificate_that_is_renewed_judges_nobody_again() {
    let ca = authority("cluster.local");
    let workload = Workload::start(&ca, "STRICT");
    let trust = workload.own.trust_generation();
    let issued = ca.0.issue(&spiffe("spiffe://cluster.local/ns/default/sa/reviews"), SystemTime::now(), HOUR);
    let identity = issued.unwrap().identity(&provider()).unwrap();
    // The same authorities, read anew.
    workload.own.store(Material { identity: Some(identity), bundle: ca.bundle() });
    assert_eq!(workload.own.trust_generation(), trust);
    assert!(!workload.own.trust_changes().has_changed().unwrap());
}

#[test]
fn d9_a_certificate_that_has_ended_is_no_reason_and_one_that_is_revoked_is() {
    let ca = authority("cluster.local");
    let peer = leaf(&ca, |_| {});
    let own = material(&ca, "spiffe://cluster.local/ns/default/sa/reviews");
    let rule = PeerRule::Svid { trust_domains: None, any_of: Vec::new() };
    let verifier = PeerVerifier::new(own.clone(), provider(), rule);
    let chain: Vec<_> = peer.chain().iter().map(|der| der.to_vec()).collect();
    let in_a_week = SystemTime::now() + 7 * DAY;
    assert_eq!(verifier.judge_client_again(&chain, SystemTime::now()), Ok(()));
    assert_eq!(verifier.judge_client_again(&chain, in_a_week), Ok(()));
    let crl = ca.0.revoke(&[peer.serial()], SystemTime::now(), DAY).unwrap();
    let bundle = TrustBundle::new([ca.0.root().clone()]).unwrap().with_crls([crl]).unwrap();
    own.store(Material { bundle: Arc::new(bundle), ..Material::clone(&own.load()) });
    for now in [SystemTime::now(), in_a_week] {
        let refusal = verifier.judge_client_again(&chain, now).unwrap_err();
        assert!(refusal.to_string().contains("Revoked"), "{refusal}");
    }
    assert!(verifier.judge_client_again::<Vec<u8>>(&[], in_a_week).is_err());
}
