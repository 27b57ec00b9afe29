//! Mirrors that lead back to where they came from, through the binaries: the mark of a copy ends them (VS-P04).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::time::Duration;

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{exchange, get, get_json};
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::upstream::Echo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";

fn service(name: &str, to: SocketAddr) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: default}}\nspec: {{hosts: [{name}.default.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: {}, ports: {{http: {}}}}}]}}\n",
        to.ip(),
        to.port()
    )
}

/// `app`, whose requests are mirrored to `mirror`.
fn mirrored(gateways: &str, app: SocketAddr, mirror: SocketAddr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app, namespace: default}}\nspec: {{hosts: [app.default.svc.cluster.local]{gateways}, http: [{{route: [{{destination: {{host: app}}}}], mirror: {{host: mirror}}}}]}}\n{}{}",
        service("app", app),
        service("mirror", mirror)
    )
}

/// Waits until the process has that generation.
async fn generation(process: &Process, generation: u64) {
    let admin = process.address("admin");
    let applied = async || get_json(admin, "/ready").await["generation"] == generation;
    mesh_testkit::until("the configuration is in force", applied).await;
}

/// Waits until no copy is in flight, and gives the lines of statistics about mirrors.
async fn settled(process: &Process) -> String {
    let admin = process.address("admin");
    let over = async || {
        let (_, stats) = get(admin, "localhost", "/stats/prometheus").await;
        stats.contains("mesh_mirrored_requests_in_flight 0\n") && stats.contains("outcome=\"answered\"")
    };
    mesh_testkit::until("every copy has come to its end", over).await;
    let (_, stats) = get(admin, "localhost", "/stats/prometheus").await;
    stats.lines().filter(|line| line.starts_with("mesh_mirrored")).collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn vs_p04_a_sidecar_that_mirrors_to_itself_stops() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &mirrored("", app.addr, app.addr));
    let file = dir.file("mesh.yaml");
    let sidecar = Process::start(SIDECAR, &["--config", &file, "--outbound", ANY, "--admin", ANY]);
    let outbound = sidecar.address("outbound");
    dir.write("mesh.yaml", &mirrored("", app.addr, outbound));
    generation(&sidecar, 2).await;
    for at in 1..=5 {
        let (status, _) = get(outbound, "app.default.svc.cluster.local", "/").await;
        assert_eq!(status, 200);
        // The request, and its copy that came back and was not copied again.
        let both = async || app.requests() == at * 2;
        mesh_testkit::until("the copy has come round", both).await;
    }
    let stats = settled(&sidecar).await;
    assert!(stats.contains("outcome=\"answered\"} 5"), "{stats}");
    assert_eq!(app.requests(), 10);
}

#[tokio::test]
async fn vs_p04_gateways_that_mirror_to_each_other_stop_and_believe_no_stranger() {
    const HOST: &str = "app.default.svc.cluster.local";
    let app = Echo::start("app").await;
    let yaml = |mirror: SocketAddr| {
        mirrored(", gateways: [edge]", app.addr, mirror)
            + "---\napiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: edge, namespace: default}\nspec: {selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}\n"
    };
    let dirs = [ConfigDir::new(), ConfigDir::new()];
    let gateways = dirs.each_ref().map(|dir| {
        dir.write("mesh.yaml", &yaml(app.addr));
        let file = dir.file("mesh.yaml");
        Process::start(
            GATEWAY,
            &["--config", &file, "--bind", "127.0.0.1", "--map-port", "80=0", "--admin", ANY],
        )
    });
    let edge = |at: usize| gateways[at].address("http");
    dirs[0].write("mesh.yaml", &yaml(edge(1)));
    dirs[1].write("mesh.yaml", &yaml(edge(0)));
    for gateway in &gateways {
        generation(gateway, 2).await;
    }
    assert_eq!(get(edge(0), HOST, "/").await.0, 200);
    // The request; the copy that the first made; the copy that the second, which believes nobody, made of that.
    mesh_testkit::until("the copies have come round", async || app.requests() == 3).await;
    for gateway in &gateways {
        assert!(settled(gateway).await.contains("outcome=\"answered\"} 1"));
    }
    // Who makes up a mark does not hide by it.
    let marked = format!(
        "GET / HTTP/1.1\r\nhost: {HOST}\r\nx-mesh-mirrored: 0123456789abcdef\r\nconnection: close\r\n\r\n"
    );
    let answer = exchange(edge(0), marked.as_bytes(), Duration::from_secs(10)).await;
    let text = String::from_utf8_lossy(&answer.bytes).into_owned();
    assert!(text.contains("\"x-mesh-mirrored\":\"~0123456789abcdef\""), "{text}");
    mesh_testkit::until("the copies have come round", async || app.requests() == 6).await;
    for gateway in &gateways {
        assert!(settled(gateway).await.contains("outcome=\"answered\"} 2"));
    }
    assert_eq!(app.requests(), 6);
    let found = get_json(gateways[0].address("admin"), "/mirror_diff").await;
    assert_eq!(
        found["comparisons"],
        serde_json::json!([]),
        "a gateway shows it too; nothing asked for it here"
    );
}

#[tokio::test]
async fn vs_p03_an_upgraded_connection_is_not_mirrored() {
    let (app, mirror) = (Echo::start("app").await, Scripted::start("mirror", |_| Reply::Status(200)).await);
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &mirrored("", app.addr, mirror.addr));
    let file = dir.file("mesh.yaml");
    let sidecar = Process::start(SIDECAR, &["--config", &file, "--outbound", ANY, "--admin", ANY]);
    let outbound = sidecar.address("outbound");
    let mut stream = TcpStream::connect(outbound).await.unwrap();
    let upgrade = "GET /up HTTP/1.1\r\nhost: app.default.svc.cluster.local\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
    stream.write_all(upgrade.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    stream.write_all(b"hello").await.unwrap();
    let mut echoed = [0; 5];
    stream.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"hello");
    drop(stream);
    assert_eq!(get(outbound, "app.default.svc.cluster.local", "/plain").await.0, 200);
    settled(&sidecar).await;
    let paths: Vec<_> = mirror.seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths, ["/plain"]);
}
