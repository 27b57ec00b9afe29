//! An end and a drain that are asked for.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_testkit::h2_raw::{Fate, Http2};
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{exchange, get};
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use tokio::net::TcpStream;

use crate::{PORTS, SIDECAR};

async fn app(dir: &ConfigDir) -> (Echo, Process) {
    let app = Echo::start("app").await;
    let port = app.addr.port();
    dir.write("mesh.yaml", &format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: app}}\nspec:\n  hosts: [app.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}}}}}]\n"
    ));
    let config = dir.file("mesh.yaml");
    // The held request decides when a drain ends, not a time.
    let times = ["--config", &config, "--drain-time", "10ms", "--drain-deadline", "60s"];
    let sidecar = Process::start(SIDECAR, &[&PORTS[..], &times].concat());
    (app, sidecar)
}

async fn ask(status: SocketAddr, method: &str, path: &str) -> Vec<u16> {
    let request =
        format!("{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    exchange(status, request.as_bytes(), Duration::from_secs(5)).await.statuses()
}

#[tokio::test]
async fn pt_01_quitquitquit_drains_and_ends_and_a_get_of_it_does_nothing() {
    let dir = ConfigDir::new();
    let (app, mut sidecar) = app(&dir).await;
    let (status, outbound) = (sidecar.address("status"), sidecar.address("outbound"));
    for path in ["/quitquitquit", "/drain"] {
        assert_eq!(ask(status, "GET", path).await, [405]);
        assert_eq!(ask(sidecar.address("admin"), "POST", path).await, [405], "not on this port");
    }
    assert_eq!(get(status, "a", "/healthz/ready").await.0, 200);
    let held = tokio::spawn(async move { get(outbound, "app", "/gate").await });
    until("the held request", async || app.held() == 1).await;
    assert_eq!(ask(status, "POST", "/quitquitquit").await, [200]);
    until("the drain", async || get(status, "a", "/healthz/ready").await.0 == 503).await;
    assert_eq!(ask(status, "POST", "/quitquitquit").await, [200], "asked again it cuts nothing");
    // The kubelet's signal is no second one.
    sidecar.signal("TERM");
    until("the signal", async || sidecar.stderr().contains("a signal joins the drain")).await;
    app.gate.add_permits(1);
    assert_eq!(held.await.unwrap().0, 200, "what is in flight ends whole");
    assert!(sidecar.wait().await.success());
}

#[tokio::test]
async fn pt_01_quitquitquit_is_answered_when_nothing_is_in_flight() {
    let dir = ConfigDir::new();
    let (_app, mut sidecar) = app(&dir).await;
    assert_eq!(ask(sidecar.address("status"), "POST", "/quitquitquit").await, [200]);
    assert!(sidecar.wait().await.success());
}

#[tokio::test]
async fn pt_01_a_drain_closes_the_listeners_and_the_process_stays() {
    let dir = ConfigDir::new();
    let (app, mut sidecar) = app(&dir).await;
    let (status, outbound) = (sidecar.address("status"), sidecar.address("outbound"));
    let held = tokio::spawn(async move {
        let request = b"GET /gate HTTP/1.1\r\nhost: app\r\n\r\n";
        exchange(outbound, request, Duration::from_secs(15)).await
    });
    until("the held request", async || app.held() == 1).await;
    assert_eq!(ask(status, "POST", "/drain").await, [200]);
    until("the drain", async || get(status, "a", "/healthz/ready").await.0 == 503).await;
    until("the listener to close", async || TcpStream::connect(outbound).await.is_err()).await;
    app.gate.add_permits(1);
    let answer = held.await.unwrap();
    let said = String::from_utf8_lossy(&answer.bytes).to_ascii_lowercase();
    assert!(answer.statuses() == [200] && answer.closed && said.contains("connection: close"), "{said}");
    until("the end of the drain", async || sidecar.stderr().contains("the listeners are drained")).await;
    assert_eq!(ask(status, "POST", "/drain").await, [200]);
    assert_eq!(get(status, "a", "/healthz/ready").await.0, 503, "it stays, and is not ready");
    assert_eq!(ask(status, "POST", "/quitquitquit").await, [200]);
    assert!(sidecar.wait().await.success());
}

#[tokio::test]
async fn pt_01_a_drain_tells_an_open_http2_connection_and_lets_its_streams_end() {
    let dir = ConfigDir::new();
    let (app, sidecar) = app(&dir).await;
    let mut open = Http2::connect(sidecar.address("outbound")).await;
    let request = |path: &'static [u8]| -> [(&'static [u8], &'static [u8]); 4] {
        [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", path)]
    };
    open.headers(1, &request(b"/"), true).await;
    assert_eq!(open.fate(1).await, Fate::Status(200));
    open.headers(3, &request(b"/gate"), true).await;
    until("the held stream", async || app.held() == 1).await;
    assert_eq!(ask(sidecar.address("status"), "POST", "/drain").await, [200]);
    let (code, _) = open.go_away().await;
    assert_eq!(code, 0, "an orderly end");
    app.gate.add_permits(1);
    assert_eq!(open.fate(3).await, Fate::Status(200), "what is in flight ends whole");
    assert_eq!(open.fate(5).await, Fate::Closed);
    until("the end of the drain", async || sidecar.stderr().contains("the listeners are drained")).await;
}
