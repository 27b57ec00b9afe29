//! The headers of the proxies with another vendor's prefix. It is the process's, so only a process of its own shows it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{exchange, get_json};
use mesh_testkit::scripted::{Reply, Scripted, Seen};
use mesh_testkit::until;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const ANY: &str = "127.0.0.1:0";

/// One service with room for one request, whose clients may say when to retry.
fn config(app: SocketAddr) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: edge, namespace: default}}
spec: {{servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ['*']}}]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: app, namespace: default, annotations: {{mesh.rs/client-overrides: 'true'}}}}
spec:
  hosts: [app.example]
  gateways: [edge, mesh]
  http:
  - match: [{{uri: {{prefix: /old}}}}]
    rewrite: {{uri: /new}}
    timeout: 20s
    retries: {{attempts: 0}}
    route: [{{destination: {{host: app.example}}}}]
  - retries: {{attempts: 0}}
    route: [{{destination: {{host: app.example}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: app, namespace: default}}
spec: {{host: app.example, trafficPolicy: {{connectionPool: {{http: {{http2MaxRequests: 1}}}}}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: app, namespace: default}}
spec:
  hosts: [app.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: {}, ports: {{http: {}}}}}]
",
        app.ip(),
        app.port()
    )
}

/// The head of the answer, in lower case; `headers` end with a line break each.
async fn head(proxy: SocketAddr, path: &str, headers: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: app.example\r\n{headers}connection: close\r\n\r\n");
    let answer = exchange(proxy, request.as_bytes(), Duration::from_secs(10)).await;
    let text = String::from_utf8_lossy(&answer.bytes).to_ascii_lowercase();
    text.split("\r\n\r\n").next().unwrap().to_owned()
}

/// The headers with this prefix that a request came with.
fn with_prefix(seen: &Seen, prefix: &str) -> Vec<String> {
    let mut found: Vec<_> = seen
        .headers
        .iter()
        .filter(|(name, _)| name.as_str().starts_with(prefix))
        .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
        .collect();
    found.sort();
    found
}

async fn app() -> Scripted {
    Scripted::start("app", |seen| match seen.path.as_str() {
        "/fails" => Reply::Status(503),
        "/limited" => Reply::Headers(503, vec![("x-acme-ratelimited", "true")]),
        "/hangs" => Reply::Hang,
        _ => Reply::Status(200),
    })
    .await
}

#[tokio::test]
async fn vs_x01_the_vendor_prefix_is_configurable() {
    let app = app().await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &config(app.addr));
    let (config, log) = (dir.file("mesh.yaml"), dir.file("access.log"));
    let args = ["--header-prefix", "X-Acme", "--config", &config, "--outbound", ANY, "--admin", ANY];
    let mut sidecar = Process::start(SIDECAR, &[&args[..], &["--access-log", &log]].concat());
    let outbound = sidecar.address("outbound");
    let info = get_json(sidecar.address("admin"), "/server_info").await;
    assert_eq!(info["node"]["header_prefix"], "x-acme", "{info}");

    let answer = head(outbound, "/old", "").await;
    assert!(answer.starts_with("http/1.1 200") && answer.contains("\r\nx-acme-upstream-service-time: "));
    assert!(!answer.contains("x-envoy"), "{answer}");
    let first = &app.seen()[0];
    assert_eq!(first.path, "/new");
    let told = ["attempt-count: 1", "expected-rq-timeout-ms: 20000", "original-path: /old"];
    assert_eq!(with_prefix(first, "x-"), {
        let id = format!("x-request-id: {}", first.header("x-request-id").unwrap());
        let told = told.map(|header| format!("x-acme-{header}"));
        [&told[..], &["x-forwarded-proto: http".to_owned(), id]].concat()
    });

    // What a client says counts with the prefix, and with Envoy's it is a header like any other.
    let retry = |prefix: &str| format!("{prefix}-retry-on: 5xx\r\n{prefix}-max-retries: 1\r\n");
    head(outbound, "/fails", &retry("x-acme")).await;
    let tries: Vec<_> = app.seen()[1..].iter().map(|seen| with_prefix(seen, "x-acme-")).collect();
    assert_eq!(tries, [["x-acme-attempt-count: 1"], ["x-acme-attempt-count: 2"]]);
    head(outbound, "/fails", &retry("x-envoy")).await;
    assert_eq!(app.requests(), 4, "nothing is tried again");
    assert_eq!(with_prefix(&app.seen()[3], "x-envoy-"), ["x-envoy-max-retries: 1", "x-envoy-retry-on: 5xx"]);
    head(outbound, "/limited", &retry("x-acme")).await;
    assert_eq!(app.requests(), 5, "the upstream limits requests, and they are not tried again");

    let mut held = TcpStream::connect(outbound).await.unwrap();
    held.write_all(b"GET /hangs HTTP/1.1\r\nhost: app.example\r\n\r\n").await.unwrap();
    until("a request in flight", async || app.requests() == 6).await;
    let refused = head(outbound, "/", "").await;
    assert!(refused.starts_with("http/1.1 503") && refused.contains("\r\nx-acme-overloaded: true"));
    assert!(!refused.contains("x-envoy"), "{refused}");
    drop(held);

    sidecar.signal("TERM");
    assert!(sidecar.wait().await.success());
    let log = std::fs::read_to_string(&log).unwrap();
    let line = log.lines().next().unwrap();
    let rest = line.split_once("\"GET /old HTTP/1.1\" 200 - via_upstream - \"-\" ").unwrap().1;
    // Bytes received, bytes sent, duration, and how long the upstream took.
    let took = rest.split(' ').nth(3).unwrap();
    assert!(took.parse::<u64>().is_ok(), "{line}");
}

#[tokio::test]
async fn vs_x01_a_gateway_believes_no_client_with_either_prefix() {
    let app = app().await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &config(app.addr));
    let config = dir.file("mesh.yaml");
    let gateway = Process::start(
        GATEWAY,
        &[
            "--header-prefix",
            "x-acme",
            "--config",
            &config,
            "--bind",
            "127.0.0.1",
            "--map-port",
            "80=0",
            "--admin",
            ANY,
        ],
    );
    let said = ["x-acme", "x-envoy"].map(|prefix| {
        format!("{prefix}-retry-on: 5xx\r\n{prefix}-max-retries: 3\r\n{prefix}-external-address: 1.2.3.4\r\n")
    });
    let answer = head(gateway.address("http"), "/fails", &said.concat()).await;
    assert!(answer.starts_with("http/1.1 503") && answer.contains("x-acme-upstream-service-time: "));
    assert_eq!(app.requests(), 1, "nothing is tried again");
    let seen = &app.seen()[0];
    assert_eq!(with_prefix(seen, "x-envoy-"), [""; 0]);
    let own = ["x-acme-attempt-count: 1", "x-acme-external-address: 127.0.0.1"];
    assert_eq!(with_prefix(seen, "x-acme-"), own);
}

#[test]
fn vs_x01_what_is_no_prefix_is_refused_with_its_reason() {
    for (binary, prefix, reason) in [
        (SIDECAR, "x acme", "cannot begin the name of a header"),
        (GATEWAY, "x-acme-", "leave out the one at its end"),
        (GATEWAY, "x-forwarded", "x-forwarded-client-cert"),
    ] {
        let output = Command::new(binary).args(["--header-prefix", prefix]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("--header-prefix") && said.contains(reason), "{said}");
        assert_eq!(output.status.code(), Some(2));
    }
}
