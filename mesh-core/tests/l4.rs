//! Connections that are not HTTP, beside an HTTP stack on one listener: who takes them, how they count, how they drain.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::future::pending;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use http::{Request, Response};
use mesh_core::server::{
    DrainTimes, Drained, Expect, L4, L4Conn, ListenerProtocol, ListenerSpec, Phase, Server,
};
use mesh_core::{Body, ConnInfo, Direction, Pinned};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::TcpStream;
use tower::service_fn;

/// Says how a connection came, and then gives back what it gets.
struct Serving(Expect);

impl L4 for Serving {
    fn expect(&self, _: &ConnInfo, _: Option<&Pinned>) -> Expect {
        self.0
    }

    fn serve(&self, conn: L4Conn) -> impl Future<Output = ()> + Send + 'static {
        echo(conn)
    }
}

async fn echo(mut conn: L4Conn) {
    if conn.sni.as_deref() == Some("reset") {
        return conn.reset();
    }
    let greeting = format!("tls={} sni={:?}\n", conn.tls, conn.sni.as_deref());
    conn.io.write_all(greeting.as_bytes()).await.unwrap();
    let (ours, theirs) = tokio::io::duplex(64);
    let (mut ours, (mut read, mut write)) = (ours, tokio::io::split(theirs));
    tokio::spawn(async move {
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        write.shutdown().await.unwrap();
    });
    tokio::select! {
        _ = copy_bidirectional(&mut conn.io, &mut ours) => {}
        () = conn.conn.cut() => {}
    }
}

async fn hello(_: Request<Body>) -> Result<Response<Body>, Infallible> {
    Ok(Response::new(Body::full("hello")))
}

fn serve(protocol: ListenerProtocol, expect: Expect) -> (Server, SocketAddr) {
    let server = Server::builder().workers(2).start().unwrap();
    let spec = ListenerSpec::new("mixed", (Ipv4Addr::LOCALHOST, 0).into(), Direction::Outbound);
    let listened =
        server.listen_l4(spec.protocol(protocol), move |_| Serving(expect), |_| service_fn(hello)).unwrap();
    (server, listened)
}

/// What comes back until the other side closes; `None` when it resets.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.ok()?;
    stream.shutdown().await.ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok()?;
    Some(String::from_utf8_lossy(&answer).into_owned())
}

/// A ClientHello with this server name and nothing else.
fn client_hello(name: &str) -> Vec<u8> {
    let vector = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
    let names = vector(&[&[0][..], &vector(name.as_bytes())].concat());
    let extensions = vector(&[&[0, 0][..], &vector(&names)].concat());
    let body = [&[3, 3][..], &[0; 32], &[0], &[0, 2, 0x13, 1], &[1, 0], &extensions].concat();
    let message = [&[1][..], &(body.len() as u32).to_be_bytes()[1..], &body].concat();
    [&[22, 3, 1][..], &vector(&message)].concat()
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn a_listener_that_sniffs_tells_http_from_the_rest() {
    let (_server, address) = serve(ListenerProtocol::Sniff, Expect::Sniff { patience: None });
    // The HTTP side counts a half that is closed as a client that left; ask it with the half open.
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(GET).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("hello"), "{answer}");
    assert_eq!(exchange(address, b"\x01\x02raw").await.unwrap(), "tls=false sni=None\n\x01\x02raw");
    let hello = client_hello("a.example.com");
    let answer = exchange(address, &hello).await.unwrap();
    assert!(answer.starts_with("tls=true sni=Some(\"a.example.com\")\n"), "{answer}");
    assert_eq!(exchange(address, &client_hello("reset")).await, None);
}

#[tokio::test]
async fn what_is_expected_is_not_sniffed() {
    let (_server, address) = serve(ListenerProtocol::Sniff, Expect::Tcp);
    // The server speaks first.
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut greeting = [0; 19];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"tls=false sni=None\n");
    let (_server, address) = serve(ListenerProtocol::Sniff, Expect::Http);
    let answer = exchange(address, b"\x01\x02\r\n\r\n").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let (_server, address) = serve(ListenerProtocol::Sniff, Expect::HttpOrTls);
    let answer = exchange(address, b"\x01\x02\r\n\r\n").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let answer = exchange(address, &client_hello("a.b")).await.unwrap();
    assert!(answer.starts_with("tls=true"), "{answer}");
    // The listener's own word comes before the L4's.
    let echoed = format!("tls=false sni=None\n{}", String::from_utf8_lossy(GET));
    let (_server, address) = serve(ListenerProtocol::Tcp, Expect::Http);
    assert_eq!(exchange(address, GET).await.unwrap(), echoed);
    let (_server, address) = serve(ListenerProtocol::Tls, Expect::Http);
    assert_eq!(exchange(address, GET).await.unwrap(), echoed);
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(10), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited for {what} in vain");
}

#[tokio::test]
async fn h9_bytes_count_as_open_and_outlive_a_drain_until_their_end() {
    for cut in [false, true] {
        let (server, address) = serve(ListenerProtocol::Sniff, Expect::Sniff { patience: None });
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"\x01begin").await.unwrap();
        let mut answer = [0; 25];
        stream.read_exact(&mut answer).await.unwrap();
        let mut silent = TcpStream::connect(address).await.unwrap();
        until("both to be open", || server.status()[0].open == 2).await;
        assert_eq!(server.status()[0].protocol.as_str(), "sniff");

        let drain = server.drain().clone();
        let times = DrainTimes { drain_time: Duration::from_millis(20), deadline: Duration::from_secs(30) };
        // The second signal, which cuts as the deadline does.
        let (signal, second) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn(async move {
            let second = async move {
                if second.await.is_err() {
                    pending::<()>().await;
                }
            };
            drain.run(times, second).await
        });
        until("the listener to close", || server.drain().phase() >= Phase::Closing).await;
        // Who has said nothing is let go; who speaks goes on.
        assert_eq!(silent.read(&mut [0; 1]).await.unwrap_or(0), 0);
        stream.write_all(b"still").await.unwrap();
        let mut still = [0; 5];
        stream.read_exact(&mut still).await.unwrap();
        assert_eq!(&still, b"still");
        if cut {
            signal.send(()).unwrap();
            assert_eq!(stream.read(&mut [0; 1]).await.unwrap_or(0), 0);
            assert_eq!(running.await.unwrap(), Drained::AtOnce(1));
        } else {
            drop(stream);
            assert_eq!(running.await.unwrap(), Drained::Finished);
        }
    }
}
