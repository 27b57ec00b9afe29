//! The status port through the binary (PT-01): an end and a drain that are asked for, and probes of the application.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{exchange, get};
use mesh_testkit::until;
use mesh_testkit::upstream::{Echo, Recorder};
use tokio::net::{TcpListener, TcpStream};

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";
const PORTS: [&str; 6] = ["--outbound", ANY, "--admin", ANY, "--status", ANY];

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

/// A sidecar with these probers in its environment.
fn probing(probers: &str) -> Process {
    let variable = format!("ISTIO_KUBE_APP_PROBERS={probers}");
    Process::start("env", &[&["-u", "INSTANCE_IP", &variable, SIDECAR, "--demo"], &PORTS[..]].concat())
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
async fn pt_01_probes_are_asked_of_the_application_and_its_answer_is_passed_on() {
    let up = Recorder::start(b"HTTP/1.1 204 No Content\r\n\r\n", true).await;
    let down = Recorder::start(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy", true).await;
    let moved = Recorder::start(
        b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n",
        true,
    )
    .await;
    let around =
        Recorder::start(b"HTTP/1.1 302 Found\r\nlocation: /again\r\ncontent-length: 0\r\n\r\n", true).await;
    // It accepts, and never answers.
    let silent = TcpListener::bind(ANY).await.unwrap();
    let (up_port, silent_port) = (up.addr.port(), silent.local_addr().unwrap().port());
    let refused = std::net::TcpListener::bind(ANY).unwrap().local_addr().unwrap().port();
    let http = |port: u16| format!("{{\"httpGet\":{{\"port\":{port}}},\"timeoutSeconds\":1}}");
    let sidecar = probing(&format!(
        r#"{{"/app-health/up/livez":{{"httpGet":{{"path":"well?a=b","port":{up_port},"scheme":"HTTP","httpHeaders":[{{"name":"x-probe","value":"yes"}}]}},"timeoutSeconds":5}},
            "/app-health/down/readyz":{},"/app-health/moved/livez":{},"/app-health/around/livez":{},
            "/app-health/silent/livez":{},"/app-health/refused/livez":{},
            "/app-health/tcp/startupz":{{"tcpSocket":{{"port":{silent_port}}}}},
            "/app-health/closed/startupz":{{"tcpSocket":{{"port":{refused}}}}},
            "/app-health/grpc/livez":{{"grpc":{{"port":1}}}},
            "/app-health/tls/livez":{{"httpGet":{{"port":1,"scheme":"HTTPS"}}}}}}"#,
        http(down.addr.port()),
        http(moved.addr.port()),
        http(around.addr.port()),
        http(silent_port),
        http(refused),
    ));
    let status = sidecar.address("status");
    let request = format!(
        "GET /app-health/up/livez HTTP/1.1\r\nhost: pod.example:{}\r\nuser-agent: kube-probe/1.31\r\nconnection: close\r\n\r\n",
        status.port()
    );
    let answer = exchange(status, request.as_bytes(), Duration::from_secs(5)).await;
    assert_eq!(answer.statuses(), [204]);
    let seen = String::from_utf8(up.connections().concat()).unwrap().to_ascii_lowercase();
    assert!(seen.starts_with("get /well?a=b http/1.1\r\n"), "{seen}");
    for header in
        [format!("host: pod.example:{up_port}"), "user-agent: kube-probe/1.31".into(), "x-probe: yes".into()]
    {
        assert!(seen.contains(&format!("\r\n{header}\r\n")), "{header}: {seen}");
    }
    assert_eq!(get(status, "a", "/app-health/down/readyz").await, (503, "busy".to_owned()));
    for (path, expected) in [
        ("/app-health/moved/livez", 200),
        ("/app-health/around/livez", 500),
        ("/app-health/silent/livez", 500),
        ("/app-health/refused/livez", 500),
        ("/app-health/tcp/startupz", 200),
        ("/app-health/closed/startupz", 500),
        ("/app-health/grpc/livez", 501),
        ("/app-health/tls/livez", 501),
        ("/app-health/up/readyz", 400),
    ] {
        assert_eq!(get(status, "a", path).await.0, expected, "{path}");
    }
    assert_eq!(around.requests(), 11, "one probe and ten redirects");
    assert!(sidecar.stderr().contains("no answer within 1s"), "{}", sidecar.stderr());
    assert_eq!(get(sidecar.address("admin"), "a", "/app-health/up/livez").await.0, 404, "not on this port");
}

#[tokio::test]
async fn pt_01_probers_that_cannot_be_read_are_a_start_error() {
    let mut command = Command::new(SIDECAR);
    command.arg("--demo").args(PORTS).env("ISTIO_KUBE_APP_PROBERS", "{\"/app-health/a/livez\":{}}");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty(), "nobody is told that it listens");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("ISTIO_KUBE_APP_PROBERS: /app-health/a/livez: expected one of"), "{said}");
}
