//! A request over loopback: to the application itself, through a forwarder that does nothing but hyper, and through
//! the sidecar. Criterion tracks the mean; the percentiles are printed after it.
//!
//! The forwarder and the sidecar are processes of their own (this binary, which calls itself as one), so that the
//! three differ in nothing else.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "real time is what is measured"
)]

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser as _;
use criterion::Criterion;
use http::Request;
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::upstream::Echo;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// Requests of one turn; the three take turns, so that what the machine does else meets all of them.
const TURN: usize = 2_000;
const TURNS: usize = 9;

fn main() {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("sidecar") => {
            let args = std::iter::once("sidecar".to_owned()).chain(args);
            std::process::exit(match mesh_examples::sidecar(mesh_examples::cli::Sidecar::parse_from(args)) {
                code if code == std::process::ExitCode::SUCCESS => 0,
                _ => 1,
            });
        }
        Some("bare") => bare(args.next().unwrap().parse().unwrap()),
        _ => bench(),
    }
}

fn bench() {
    let runtime = Runtime::new().unwrap();
    let app = runtime.block_on(Echo::start("app"));
    let own = std::env::current_exe().unwrap().to_string_lossy().into_owned();
    let bare = Process::start(&own, &["bare", &app.addr.to_string()]);
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &format!("apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: app}}\nspec:\n  hosts: [app.default.svc.cluster.local]\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: {}, ports: {{http: {}}}}}]\n", app.addr.ip(), app.addr.port()));
    let any = "127.0.0.1:0";
    let config = dir.file("mesh.yaml");
    let sidecar = Process::start(
        &own,
        &[
            "sidecar",
            "--config",
            &config,
            "--outbound",
            any,
            "--admin",
            any,
            "--workers",
            "1",
            "--log",
            "error",
        ],
    );
    let mut clients = [
        ("direct", runtime.block_on(Client::connect(app.addr))),
        ("bare hyper", runtime.block_on(Client::connect(bare.address("bare")))),
        ("sidecar", runtime.block_on(Client::connect(sidecar.address("outbound")))),
    ];
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("end_to_end");
    for (name, client) in &mut clients {
        group.bench_function(*name, |b| {
            b.iter_custom(|count| {
                runtime.block_on(async {
                    let started = Instant::now();
                    for _ in 0..count {
                        client.get().await;
                    }
                    started.elapsed()
                })
            });
        });
    }
    group.finish();
    criterion.final_summary();

    let mut taken: [Vec<Duration>; 3] = Default::default();
    for _ in 0..TURNS {
        for ((_, client), taken) in clients.iter_mut().zip(&mut taken) {
            runtime.block_on(async {
                for _ in 0..TURN {
                    let started = Instant::now();
                    client.get().await;
                    taken.push(started.elapsed());
                }
            });
        }
    }
    println!("\n| {:10} | p50 us | p90 us | p99 us |\n|------------|-------:|-------:|-------:|", "");
    for ((name, _), taken) in clients.iter().zip(&mut taken) {
        taken.sort_unstable();
        let [p50, p90, p99] = [50, 90, 99].map(|share| taken[taken.len() * share / 100].as_secs_f64() * 1e6);
        println!("| {name:10} | {p50:6.1} | {p90:6.1} | {p99:6.1} |");
    }
}

struct Client(http1::SendRequest<Empty<Bytes>>);

impl Client {
    async fn connect(peer: SocketAddr) -> Self {
        let stream = TcpStream::connect(peer).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    async fn get(&mut self) {
        let request = Request::get("/api/v1/items").header("host", "app").body(Empty::new()).unwrap();
        self.0.ready().await.unwrap();
        let response = self.0.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().collect().await.unwrap();
    }
}

/// Forwards each connection over one of its own, and does nothing else.
fn bare(upstream: SocketAddr) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("listening bare={}", listener.local_addr().unwrap());
        std::io::stdout().flush().unwrap();
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                let to = TcpStream::connect(upstream).await.unwrap();
                to.set_nodelay(true).unwrap();
                let (sender, connection) = http1::handshake(TokioIo::new(to)).await.unwrap();
                tokio::spawn(connection);
                let sender = std::sync::Arc::new(tokio::sync::Mutex::new(sender));
                let forward = hyper::service::service_fn(move |request| {
                    let sender = std::sync::Arc::clone(&sender);
                    async move {
                        let mut sender = sender.lock().await;
                        sender.ready().await?;
                        sender.send_request(request).await
                    }
                });
                // A client that goes away is no event.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), forward)
                    .await;
            });
        }
    });
}
