//! Trust in peers that are open, by a judge that says what it is told to: whom it is asked about, and when.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http::{Request, Response};
use mesh_core::server::{
    DownstreamTls, Expect, Judge, L4, L4Conn, ListenerSpec, SecuredConn, Server, Terminate, Terminated,
    WithTls, Within,
};
use mesh_core::{Body, ConnInfo, Direction, Pinned, Prefixed};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tower::service_fn;

/// The shortest ClientHello, which asks for nothing.
const HELLO: [u8; 10] = [22, 3, 1, 0, 5, 1, 0, 0, 1, 0];

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

/// Shakes hands when it may, and trusts whom it is told to.
#[derive(Clone)]
struct Fake(Arc<State>);

struct State {
    trusts: AtomicBool,
    asked: AtomicUsize,
    begun: AtomicUsize,
    may_end: Semaphore,
    trust: watch::Sender<u64>,
    within: Within,
    served: AtomicUsize,
}

impl Judge for Fake {
    fn judge(&self, _: &ConnInfo, _: Option<&Pinned>) -> Result<(), String> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        if self.0.trusts.load(Ordering::SeqCst) { Ok(()) } else { Err("nobody is trusted".to_owned()) }
    }

    fn changes(&self) -> Vec<watch::Receiver<u64>> {
        vec![self.0.trust.subscribe()]
    }
}

impl Terminate for Fake {
    type Io = Prefixed<TcpStream>;

    fn expect(&self, _: &ConnInfo, _: Option<&Pinned>) -> DownstreamTls {
        DownstreamTls::Permissive
    }

    async fn terminate(
        &self,
        mut io: Prefixed<TcpStream>,
        _: &ConnInfo,
        _: Option<&Pinned>,
    ) -> io::Result<Terminated<Self::Io>> {
        self.0.begun.fetch_add(1, Ordering::SeqCst);
        io.read_exact(&mut [0; HELLO.len()]).await?;
        self.0.may_end.acquire().await.unwrap().forget();
        Ok(Terminated { io, protocol: None, sni: None, identity: None, within: self.0.within })
    }
}

impl L4 for Fake {
    fn expect(&self, _: &ConnInfo, _: Option<&Pinned>) -> Expect {
        Expect::Tcp
    }

    fn serve(&self, _: L4Conn) -> impl Future<Output = ()> + Send + 'static {
        std::future::ready(())
    }

    fn serve_secured(&self, accepted: SecuredConn) -> impl Future<Output = ()> + Send + 'static {
        let state = Arc::clone(&self.0);
        async move {
            state.served.fetch_add(1, Ordering::SeqCst);
            let SecuredConn { mut io, conn, .. } = accepted;
            let said = async {
                while let Ok(byte) = io.read_u8().await
                    && io.write_all(&[byte]).await.is_ok()
                {}
            };
            tokio::select! {
                () = said => {}
                () = conn.cut() => {}
            }
        }
    }
}

/// Waits until `condition` holds.
async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited for {what} in vain");
}

struct Scene {
    server: Server,
    address: SocketAddr,
    fake: Fake,
}

impl Scene {
    fn start(within: Within) -> Self {
        let fake = Fake(Arc::new(State {
            trusts: AtomicBool::new(true),
            asked: AtomicUsize::new(0),
            begun: AtomicUsize::new(0),
            may_end: Semaphore::new(0),
            trust: watch::Sender::new(1),
            within,
            served: AtomicUsize::new(0),
        }));
        let server = Server::builder().start().unwrap();
        let spec = ListenerSpec::new("inbound", (Ipv4Addr::LOCALHOST, 0).into(), Direction::Inbound);
        let tls = fake.clone();
        let hello = |_: Request<Body>| async { Ok::<_, Infallible>(Response::new(Body::full("hello"))) };
        let address = server
            .listen_with(
                spec,
                move |_| WithTls::new(tls.clone()).beside(tls.clone()),
                move |_| service_fn(hello),
            )
            .unwrap();
        Self { server, address, fake }
    }

    fn change(&self, trusts: bool) {
        self.fake.0.trusts.store(trusts, Ordering::SeqCst);
        self.fake.0.trust.send_modify(|trust| *trust += 1);
    }

    fn asked(&self) -> usize {
        self.fake.0.asked.load(Ordering::SeqCst)
    }

    async fn connect(&self, first: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(first).await.unwrap();
        stream
    }
}

async fn is_served(stream: &mut TcpStream) -> bool {
    let mut answer = [0; 15];
    stream.write_all(GET).await.is_ok()
        && stream.read_exact(&mut answer).await.is_ok()
        && answer == *b"HTTP/1.1 200 OK"
}

#[tokio::test]
async fn d9_trust_that_changes_during_a_handshake_counts_at_its_end() {
    let scene = Scene::start(Within::Http);
    let mut stream = scene.connect(&HELLO).await;
    until("the handshake", async || scene.fake.0.begun.load(Ordering::SeqCst) == 1).await;
    // Somebody who was let in shows when the round has been: who shakes hands is nobody in it.
    let mut other = scene.connect(b"").await;
    assert!(is_served(&mut other).await);
    let before = scene.asked();
    scene.change(false);
    until("the round", async || scene.asked() > before).await;
    assert_eq!(scene.asked(), before + 1);
    scene.fake.0.may_end.add_permits(1);
    assert!(!is_served(&mut stream).await);
    assert_eq!(scene.server.status()[0].distrusted, 2);
}

#[tokio::test]
async fn d9_bytes_within_tls_are_cut_when_trust_goes_and_never_served_after() {
    let scene = Scene::start(Within::Bytes);
    let served = || scene.fake.0.served.load(Ordering::SeqCst);
    let echoes = async |stream: &mut TcpStream| {
        let mut back = [0];
        stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut back).await.is_ok() && back == *b"x"
    };
    let mut open = scene.connect(&HELLO).await;
    scene.fake.0.may_end.add_permits(1);
    assert!(echoes(&mut open).await);
    let mut late = scene.connect(&HELLO).await;
    until("the handshake", async || scene.fake.0.begun.load(Ordering::SeqCst) == 2).await;
    scene.change(false);
    // Cut at once: it hears of no end to come.
    assert_eq!(open.read(&mut [0]).await.unwrap_or(0), 0);
    // Whose handshake ends after that has shaken hands in vain.
    scene.fake.0.may_end.add_permits(1);
    assert!(!echoes(&mut late).await);
    until("the verdict", async || scene.server.status()[0].distrusted == 2).await;
    assert_eq!(served(), 1);
}
