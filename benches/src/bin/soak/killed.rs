//! A1: upstreams that are killed in the middle of their bodies, while others are served.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mesh_testkit::ledger::Load;
use mesh_testkit::process::ConfigDir;
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::proxy::{service, service_of, start};

/// Requests of others per second.
const RATE: u32 = 1000;

/// Between two kills.
const EVERY: Duration = Duration::from_millis(20);

/// How long nobody is killed, to compare with.
const QUIET: Duration = Duration::from_secs(10);

pub(crate) async fn run(kills: u32) -> bool {
    let app = Echo::start("app").await;
    let http1 = dying().await;
    let http2 = Scripted::start("dying", |_| Reply::Cut).await;
    let dir = ConfigDir::new();
    dir.write(
        "mesh.yaml",
        &[
            service(&[app.addr]),
            service_of("dying1", "HTTP", &[http1]),
            service_of("dying2", "HTTP2", &[http2.addr]),
        ]
        .concat(),
    );
    let (config, log, any) = (dir.file("mesh.yaml"), dir.file("access.log"), "127.0.0.1:0");
    let sidecar = start(
        "sidecar",
        &["--config", &config, "--outbound", any, "--admin", any, "--log", "error", "--access-log", &log],
    );
    let outbound = sidecar.address("outbound");

    let quiet = Load::paced(outbound, "app", 16, 1024, RATE);
    tokio::time::sleep(QUIET).await;
    let mut quiet = quiet.stop().await;

    let load = Load::paced(outbound, "app", 16, 1024, RATE);
    let mut tick = tokio::time::interval(EVERY);
    let mut clean = 0;
    for kill in 0..kills {
        tick.tick().await;
        let host = if kill % 5 == 4 { "dying2" } else { "dying1" };
        clean += u32::from(ends_well(outbound, host, kill).await);
    }
    let mut totals = load.stop().await;
    let twice = app.seen().values().filter(|count| **count > 2).count();
    // Who was cut is in the log, with the reason.
    let flagged = async || {
        let text = tokio::fs::read_to_string(&log).await.unwrap_or_default();
        let dying = text.lines().filter(|line| line.contains("/dying/"));
        dying.filter(|line| line.contains(" UC ") || line.contains(" UR ")).count()
    };
    until("the access log", async || flagged().await == kills as usize).await;
    println!(
        "a1: {kills} killed in mid-body, of which {clean} ended as if whole (goal 0), all flagged UC or UR; others: {} whole, {} refused, {} wrong, {} broken, {twice} sent twice (goal 0)",
        totals.whole, totals.refused, totals.wrong, totals.broken
    );
    println!(
        "a1: p99 of others {} us, quiet {} us (goal +10 %); p90 {} us, quiet {} us",
        totals.percentile(0.99),
        quiet.percentile(0.99),
        totals.percentile(0.90),
        quiet.percentile(0.90)
    );
    clean == 0 && quiet.is_clean() && totals.is_clean() && totals.connections == 16 && twice == 0
}

/// Whether the answer looks whole to its client.
async fn ends_well(proxy: SocketAddr, host: &str, kill: u32) -> bool {
    let stream = TcpStream::connect(proxy).await.expect("a connection");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
    tokio::spawn(connection);
    let request = Request::get(format!("/dying/{kill}")).header("host", host).body(Empty::<Bytes>::new());
    match sender.send_request(request.expect("a request")).await {
        // An error that comes before the head is one, and whole.
        Ok(response) if response.status() != 200 => false,
        Ok(response) => response.into_body().collect().await.is_ok(),
        Err(_) => false,
    }
}

/// Dies in the middle of each body: of known length or in chunks, with a FIN or a reset.
async fn dying() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        let mut number = 0_u32;
        while let Ok((mut stream, _)) = listener.accept().await {
            number += 1;
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    if !matches!(stream.read_buf(&mut head).await, Ok(1..)) {
                        return;
                    }
                }
                let begin: &[u8] = if number.is_multiple_of(2) {
                    b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nthe beginning"
                } else {
                    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nd\r\nthe beginning\r\n"
                };
                // The proxy is there as long as the run.
                let _ = stream.write_all(begin).await;
                if number % 4 < 2 {
                    // So that the head is there before the reset.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    let _ = stream.set_zero_linger();
                }
            });
        }
    });
    addr
}
