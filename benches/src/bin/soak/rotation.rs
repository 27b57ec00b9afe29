//! D1: certificates of both sides are renewed each 100 ms while strangers shake hands and friends go on talking.
//!
//! A real listener of two workers behind mutual TLS, and clients over the loopback interface. Every handshake is asked
//! afterwards which certificates it was made with, on both sides: they have to be among those that were in force while it
//! ran. Connections that were made at the beginning ask once a second until the end.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use mesh_core::server::{DownstreamTls, ListenerSpec, Server, WithTls};
use mesh_core::{Body, ClientTls, Direction, RequestContext, Slot, Spoken};
use mesh_tls::ca::Authority;
use mesh_tls::certificate::Leaf;
use mesh_tls::{Acceptor, Connector, Inbound, InboundTls, Material, Materials, TrustBundle};
use rustls::crypto::CryptoProvider;
use tokio::net::TcpStream;

/// How often both certificates are renewed.
const EVERY: Duration = Duration::from_millis(100);

/// Handshakes per second.
const RATE: u64 = 200;

/// Connections that live from the beginning to the end.
const FRIENDS: usize = 16;

/// One side: what it shows now, and the serial numbers of all that it has shown.
struct Side {
    name: &'static str,
    materials: Materials,
    bundle: Arc<TrustBundle>,
    shown: Mutex<Vec<Vec<u8>>>,
}

impl Side {
    fn new(ca: &Authority, name: &'static str, provider: &CryptoProvider) -> Self {
        let bundle = Arc::new(TrustBundle::new([ca.root().clone()]).expect("the bundle of our authority"));
        let side = Self { name, materials: Materials::none(), bundle, shown: Mutex::default() };
        side.renew(ca, provider);
        side.materials.set_trust_domains(vec!["cluster.local".to_owned()]);
        side
    }

    fn renew(&self, ca: &Authority, provider: &CryptoProvider) {
        let id = format!("spiffe://cluster.local/ns/default/sa/{}", self.name);
        let id = id.parse().expect("the identity of a workload");
        let issued = ca.issue(&id, SystemTime::now(), Duration::from_secs(3600)).expect("a certificate");
        let identity = issued.identity(provider).expect("a certificate with its key");
        let serial = Leaf::read(&identity.chain()[0]).expect("a certificate of ours").serial;
        // Noted before anybody can be shown it.
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).push(serial);
        self.materials.store(Material { identity: Some(identity), bundle: Arc::clone(&self.bundle) });
    }

    fn count(&self) -> usize {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether a certificate was in force at some time since `before` had been shown. The one that was replaced just then
    /// may have been taken for a handshake already.
    fn is_of(&self, serial: &[u8], before: usize) -> bool {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown[before.saturating_sub(2)..].iter().any(|known| known == serial)
    }
}

/// What was seen.
#[derive(Default)]
struct Seen {
    done: AtomicU64,
    failed: AtomicU64,
    stale: AtomicU64,
    micros: Mutex<Vec<u64>>,
}

struct Scene {
    address: SocketAddr,
    server: Side,
    client: Side,
    connector: Connector,
    seen: Seen,
}

pub(crate) async fn run(time: Duration) -> bool {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let domain = "cluster.local".parse().expect("a trust domain");
    let ca = Authority::new(domain, SystemTime::now(), Duration::from_secs(86_400)).expect("an authority");
    let (server, client) = (Side::new(&ca, "server", &provider), Side::new(&ca, "client", &provider));
    let acceptor = Acceptor::mutual(server.materials.clone(), Arc::clone(&provider)).expect("TLS 1.3");
    let inbound = Inbound::new(acceptor, Slot::fixed(InboundTls::all(DownstreamTls::Strict)));
    let workers = Server::builder().workers(2).start().expect("workers");
    let spec = ListenerSpec::new("inbound", (Ipv4Addr::LOCALHOST, 0).into(), Direction::Inbound);
    let stack = tower::service_fn(async |request: Request<Body>| {
        // The certificate that the client showed, for it to compare.
        let context = request.extensions().get::<RequestContext>().expect("the context of a request");
        let peer = context.conn().identity.as_ref().expect("a peer behind mutual TLS");
        Ok::<_, Infallible>(Response::new(Body::full(peer.serial.clone())))
    });
    let listened = workers.listen_with(spec, move |_| WithTls::new(inbound.clone()), move |_| stack);
    let scene = Arc::new(Scene {
        address: listened.expect("a port"),
        connector: Connector::new(client.materials.clone(), Arc::clone(&provider)),
        server,
        client,
        seen: Seen::default(),
    });

    let end = Instant::now() + time;
    let broken = Arc::new(AtomicUsize::new(0));
    let asked = Arc::new(AtomicU64::new(0));
    let mut friends = Vec::new();
    for _ in 0..FRIENDS {
        let mut send = connect(&scene).await.expect("the first connections").0;
        let (broken, asked) = (Arc::clone(&broken), Arc::clone(&asked));
        friends.push(tokio::spawn(async move {
            while Instant::now() < end {
                if ask(&mut send).await.is_none() {
                    broken.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                asked.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }));
    }
    let rotating = {
        let (scene, provider) = (Arc::clone(&scene), Arc::clone(&provider));
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(EVERY);
            while Instant::now() < end {
                tick.tick().await;
                scene.server.renew(&ca, &provider);
                scene.client.renew(&ca, &provider);
            }
        })
    };
    // Open loop: a handshake that is slow delays none of the others.
    let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut strangers = tokio::task::JoinSet::new();
    while Instant::now() < end {
        tick.tick().await;
        strangers.spawn(stranger(Arc::clone(&scene)));
    }
    strangers.join_all().await;
    for friend in friends {
        friend.await.expect("a friend");
    }
    rotating.await.expect("the rotation");
    drop(workers);

    let seen = &scene.seen;
    let [done, failed, stale] =
        [&seen.done, &seen.failed, &seen.stale].map(|count| count.load(Ordering::Relaxed));
    let mut micros = seen.micros.lock().unwrap_or_else(PoisonError::into_inner);
    micros.sort_unstable();
    let at = |part: usize| micros.get((micros.len() * part / 1000).min(micros.len().saturating_sub(1)));
    let broken = broken.load(Ordering::Relaxed);
    println!(
        "d1: {} certificates of each side in {time:?}, {done} handshakes ({:.0} per second): {failed} failed, {stale} with a certificate that was not in force (goal 0)",
        scene.server.count(),
        done as f64 / time.as_secs_f64(),
    );
    println!(
        "d1: a handshake and its first request took {:?} µs (p50), {:?} µs (p99), {:?} µs (p99.9)",
        at(500).unwrap_or(&0),
        at(990).unwrap_or(&0),
        at(999).unwrap_or(&0)
    );
    println!(
        "d1: {FRIENDS} connections from before: {} requests, {broken} broken (goal 0)",
        asked.load(Ordering::Relaxed)
    );
    failed == 0 && stale == 0 && broken == 0 && done > 0
}

async fn stranger(scene: Arc<Scene>) {
    let before = (scene.server.count(), scene.client.count());
    let begun = Instant::now();
    let told = async {
        let (mut send, server) = connect(&scene).await?;
        Some((server, ask(&mut send).await?))
    };
    let Some((server, client)) = told.await else {
        scene.seen.failed.fetch_add(1, Ordering::Relaxed);
        return;
    };
    let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    scene.seen.micros.lock().unwrap_or_else(PoisonError::into_inner).push(took);
    scene.seen.done.fetch_add(1, Ordering::Relaxed);
    if !scene.server.is_of(&server, before.0) || !scene.client.is_of(&client, before.1) {
        scene.seen.stale.fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection, and the serial number of the certificate that the server showed.
async fn connect(scene: &Scene) -> Option<(SendRequest<Empty<Bytes>>, Vec<u8>)> {
    let tls = ClientTls { sni: Some("server.default.svc.cluster.local".to_owned()), ..ClientTls::default() };
    let failed = |error: std::io::Error| eprintln!("d1: a handshake failed: {error}");
    let tcp = TcpStream::connect(scene.address).await.map_err(failed).ok()?;
    // As the proxies do: else the request waits for the acknowledgement of the handshake.
    tcp.set_nodelay(true).ok()?;
    let stream = scene.connector.connect(tcp, &tls, Spoken::Http1).await.map_err(failed).ok()?;
    let shown = stream.get_ref().1.peer_certificates()?.first()?;
    let serial = Leaf::read(shown).ok()?.serial;
    let (send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    tokio::spawn(connection);
    Some((send, serial))
}

/// Asks which certificate we showed.
async fn ask(send: &mut SendRequest<Empty<Bytes>>) -> Option<Vec<u8>> {
    send.ready().await.ok()?;
    let request = Request::get("/").header("host", "server").body(Empty::new()).ok()?;
    let answer = send.send_request(request).await.ok()?;
    let is_ok = answer.status().is_success();
    let told = answer.into_body().collect().await.ok()?.to_bytes().to_vec();
    is_ok.then_some(told)
}
