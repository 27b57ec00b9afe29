//! What connections cost, and what happens when there is nothing left to give. Alone in this process, as it measures
//! and limits the whole of it: one test after the other.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::fs::File;
use std::future::ready;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use http::{Request, Response};
use mesh_core::server::{ListenerSpec, Server};
use mesh_core::{Body, Direction};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tower::service_fn;

fn start() -> (Server, SocketAddr) {
    let server = Server::builder().start().unwrap();
    let spec = ListenerSpec::new("resources", (Ipv4Addr::LOCALHOST, 0).into(), Direction::Inbound);
    let hello = |_: Request<Body>| ready(Ok::<_, Infallible>(Response::new(Body::full("hello"))));
    let address = server.listen(spec, move |_| service_fn(hello)).unwrap();
    (server, address)
}

async fn until(reached: impl Fn() -> bool) {
    let wait = async {
        while !reached() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(10), wait).await.expect("it never came");
}

/// Asks once, and reads the whole answer.
async fn ask(stream: &mut TcpStream) {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nhello") {
        answer.push(stream.read_u8().await.unwrap());
    }
}

fn proc_kib(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The processor time of this process. The file is kept open, as there may be no descriptor to open it.
fn cpu(stat: &mut File) -> Duration {
    let mut text = String::new();
    stat.seek(SeekFrom::Start(0)).unwrap();
    stat.read_to_string(&mut text).unwrap();
    let fields: Vec<_> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[tokio::test]
async fn resources() {
    idle_connections_are_cheap().await;
    g6_running_out_of_descriptors_is_waited_for().await;
}

/// Both ends of the sockets are in this process, so it measures too much rather than too little.
async fn idle_connections_are_cheap() {
    const COUNT: u64 = 400;
    let (server, address) = start();
    let mut streams = Vec::new();
    for (round, asks) in [("silent", false), ("idle after a request", true)] {
        // What is allocated once is paid by the first.
        for _ in 0..20 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            ask(&mut stream).await;
            streams.push(stream);
        }
        let before = proc_kib("VmRSS:");
        for _ in 0..COUNT {
            let mut stream = TcpStream::connect(address).await.unwrap();
            if asks {
                ask(&mut stream).await;
            }
            streams.push(stream);
        }
        until(|| server.status()[0].open == streams.len()).await;
        let (Some(before), Some(after)) = (before, proc_kib("VmRSS:")) else {
            println!("SKIPPED: no /proc here, so the memory of connections is not measured");
            return;
        };
        let each = after.saturating_sub(before) as f64 / COUNT as f64;
        println!("{round}: {each:.1} KiB per connection");
        assert!(each <= 24.0, "{round}: {each:.1} KiB per connection");
    }
}

async fn g6_running_out_of_descriptors_is_waited_for() {
    let (server, address) = start();
    ask(&mut TcpStream::connect(address).await.unwrap()).await;
    let stat = File::open("/proc/self/stat");
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let limit = format!("--nofile={}:", open + 16);
    let pid = std::process::id().to_string();
    let limited = Command::new("prlimit").args(["--pid", &pid, &limit]).status();
    if open == 0 || !limited.is_ok_and(|status| status.success()) {
        println!("SKIPPED: no prlimit here, so running out of descriptors is not tried");
        return;
    }
    let mut stat = stat.unwrap();
    // Each takes one descriptor at this end and wants one at the other.
    let mut streams = Vec::new();
    while let Ok(stream) = TcpStream::connect(address).await {
        streams.push(stream);
    }
    until(|| server.status()[0].accept_errors > 0).await;
    let (errors, busy) = (server.status()[0].accept_errors, cpu(&mut stat));
    sleep(Duration::from_millis(500)).await;
    let (errors, busy) = (server.status()[0].accept_errors - errors, cpu(&mut stat) - busy);
    assert!((1..=15).contains(&errors), "{errors} tries in half a second");
    assert!(busy <= Duration::from_millis(100), "spun for {busy:?}");
    let start = Instant::now();
    streams.clear();
    let mut stream = loop {
        match TcpStream::connect(address).await {
            Ok(stream) => break stream,
            Err(_) => sleep(Duration::from_millis(1)).await,
        }
    };
    ask(&mut stream).await;
    assert!(start.elapsed() < Duration::from_secs(1), "recovered after {:?}", start.elapsed());
}
