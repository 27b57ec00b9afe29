//! What a large mesh costs while nothing happens.

use std::time::Duration;

use mesh_benches::mesh_yaml;
use mesh_testkit::process::ConfigDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::proxy::start;

const SERVICES: usize = 1_000;
const SUBSETS: usize = 3;
const CONNECTIONS: usize = 100;

/// Proportional memory, in KiB.
const GOAL: u64 = 30 << 10;

pub(crate) async fn run() -> bool {
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &mesh_yaml(SERVICES, SUBSETS));
    let config = dir.file("mesh.yaml");
    let any = "127.0.0.1:0";
    let sidecar =
        start("sidecar", &["--config", &config, "--outbound", any, "--admin", any, "--log", "error"]);
    let loaded = sidecar.pss_kib();
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        // One request each, so that everything a connection needs is there; nobody listens at the endpoints.
        let mut stream = TcpStream::connect(sidecar.address("outbound")).await.expect("a connection");
        stream.write_all(b"GET / HTTP/1.1\r\nhost: nobody\r\n\r\n").await.expect("a request");
        let mut answer = [0_u8; 12];
        stream.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer[9..], b"503");
        connections.push(stream);
    }
    // Memory that is freed by and by is not held.
    let mut lowest = u64::MAX;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        lowest = lowest.min(sidecar.pss_kib());
    }
    drop(connections);
    println!(
        "memory: {SERVICES} services of {SUBSETS} subsets {loaded} KiB, with {CONNECTIONS} idle connections {lowest} KiB (goal {GOAL})"
    );
    lowest <= GOAL
}
