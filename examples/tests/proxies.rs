//! The binaries as their users run them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use mesh_testkit::ledger::Load;
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{Answer, exchange, get, get_json};
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use serde_json::Value;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const ANY: &str = "127.0.0.1:0";

async fn send(peer: SocketAddr, request: &str) -> Answer {
    exchange(peer, request.as_bytes(), Duration::from_secs(5)).await
}

fn service(name: &str, endpoints: &[(&str, SocketAddr)]) -> String {
    let endpoints: String = endpoints
        .iter()
        .map(|(version, addr)| {
            format!(
                "  - {{address: {}, ports: {{http: {}}}, labels: {{version: {version}}}}}\n",
                addr.ip(),
                addr.port()
            )
        })
        .collect();
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  hosts: [{name}.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 9080, name: http, protocol: HTTP}}]\n  endpoints:\n{endpoints}---\n"
    )
}

#[tokio::test]
async fn the_demo_splits_ninety_to_ten_and_always_answers() {
    let mut demo = Process::start(SIDECAR, &["--demo", "--outbound", ANY, "--admin", ANY]);
    let outbound = demo.address("outbound");
    let mut versions: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..300 {
        let (status, body) = get(outbound, "reviews", "/").await;
        assert_eq!(status, 200, "{body}");
        *versions.entry(body.split_whitespace().take(2).collect::<Vec<_>>().join(" ")).or_default() += 1;
    }
    assert_eq!(versions.keys().map(String::as_str).collect::<Vec<_>>(), ["reviews v1", "reviews v3"]);
    assert!((8..=60).contains(&versions["reviews v3"]), "{versions:?}");
    let (status, body) = get(outbound, "productpage", "/").await;
    assert_eq!(status, 200);
    assert!(body.starts_with("productpage v1 <- reviews v"), "{body}");
    assert!(demo.stderr().contains("curl -H 'Host: reviews'"));
    demo.signal("TERM");
    assert!(demo.wait().await.success());
}

#[tokio::test]
async fn a_busy_port_is_named_with_its_flag() {
    let taken = std::net::TcpListener::bind(ANY).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for flag in ["--outbound", "--inbound", "--admin", "--prometheus", "--status", "--health"] {
        let mut args = vec!["--demo", flag, &address];
        for other in ["--outbound", "--admin"] {
            if flag != other {
                args.extend([other, ANY]);
            }
        }
        let output = Command::new(SIDECAR).args(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{flag}");
        assert!(output.stdout.is_empty(), "nobody is told that it listens: {flag}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(&address) && said.contains(flag), "{said}");
    }
}

#[tokio::test]
async fn pt_01_each_port_serves_its_own_endpoints() {
    let sidecar = Process::start(
        SIDECAR,
        &["--demo", "--outbound", ANY, "--admin", ANY, "--prometheus", ANY, "--status", ANY, "--health", ANY],
    );
    let all = [
        "/ready",
        "/healthz/ready",
        "/config_dump",
        "/clusters",
        "/listeners",
        "/server_info",
        "/explain?url=http://reviews/",
        "/stats/prometheus",
    ];
    for (port, served) in [
        ("admin", &all[..]),
        ("prometheus", &["/stats/prometheus"]),
        ("status", &["/healthz/ready", "/stats/prometheus"]),
        ("health", &["/healthz/ready"]),
    ] {
        for path in all {
            let (status, body) = get(sidecar.address(port), "admin", path).await;
            let expected = if served.contains(&path) { 200 } else { 404 };
            assert_eq!(status, expected, "{port} {path}: {body}");
        }
        let written =
            b"POST /healthz/ready HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let answer = exchange(sidecar.address(port), written, Duration::from_secs(5)).await;
        assert_eq!(answer.statuses(), [405], "{port}: nothing is changed here");
    }
}

#[tokio::test]
async fn usage_is_2_and_a_bad_configuration_is_1_with_its_position() {
    let output = Command::new(SIDECAR).args(["--no-such-flag"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    for filter in ["nonsense=", "warning", "info,mesh_route=loud", ""] {
        for binary in [SIDECAR, GATEWAY, env!("CARGO_BIN_EXE_mesh-ca")] {
            let output = Command::new(binary).args(["--log", filter]).output().unwrap();
            assert_eq!(output.status.code(), Some(2), "--log {filter:?}");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("--log") && said.contains("is no level"), "{said}");
        }
    }
    let dir = ConfigDir::new();
    dir.write(
        "bad.yaml",
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v}\nspec:\n  hosts: [v]\n  http:\n  - route:\n    - destination: {host: v, subst: x}\n",
    );
    for extra in [&["--check"][..], &[]] {
        let mut args = vec!["--config", dir.path().to_str().unwrap(), "--outbound", ANY, "--admin", ANY];
        args.extend(extra);
        let output = Command::new(SIDECAR).args(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(
            said.contains("bad.yaml:8:") && said.contains("spec.http[0].route[0].destination.subst"),
            "{said}"
        );
    }
}

#[tokio::test]
async fn what_kubectl_prints_loads_without_a_word() {
    let dir = ConfigDir::new();
    // A list, with all that the API server adds; of other kinds, one count.
    dir.write(
        "all.yaml",
        "
apiVersion: v1
kind: List
metadata: {resourceVersion: ''}
items:
- apiVersion: networking.istio.io/v1
  kind: VirtualService
  metadata:
    annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}'}
    creationTimestamp: '2026-01-01T00:00:00Z'
    generation: 3
    managedFields: [{apiVersion: networking.istio.io/v1, fieldsType: FieldsV1, fieldsV1: {'f:spec': {}}, manager: kubectl, operation: Update}]
    name: a
    namespace: default
    resourceVersion: '12'
    uid: 0a4a1f5e
  spec: {hosts: [a], http: [{route: [{destination: {host: a}}]}]}
  status: {observedGeneration: '3', conditions: [{type: Reconciled, status: 'True'}], validationMessages: []}
- apiVersion: v1
  kind: Service
  metadata: {name: a, namespace: default, resourceVersion: '13'}
  spec:
    clusterIP: 10.1.1.1
    clusterIPs: [10.1.1.1]
    internalTrafficPolicy: Cluster
    ipFamilies: [IPv4]
    ipFamilyPolicy: SingleStack
    ports: [{name: http, port: 80, protocol: TCP, targetPort: web}]
    selector: {app: a}
    sessionAffinity: None
    type: ClusterIP
  status: {loadBalancer: {}}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  addressType: IPv4
  metadata:
    generateName: a-
    labels: {endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io, kubernetes.io/service-name: a}
    name: a-x1
    namespace: default
    ownerReferences: [{apiVersion: v1, blockOwnerDeletion: true, controller: true, kind: Service, name: a, uid: 1b}]
  endpoints:
  - addresses: [127.0.0.1]
    conditions: {ready: true, serving: true, terminating: false}
    nodeName: node
    targetRef: {kind: Pod, name: a-1, namespace: default, uid: 2c}
    zone: z
  ports: [{name: http, port: 8080, protocol: TCP}]
- {apiVersion: apps/v1, kind: Deployment, metadata: {name: a}, spec: {replicas: 1}}
- {apiVersion: apps/v1, kind: Deployment, metadata: {name: b}, spec: {replicas: 1}}
- {apiVersion: v1, kind: Job, metadata: {name: c}, data: {}}
",
    );
    let output = Command::new(SIDECAR).args(["--check", "--config", &dir.file("all.yaml")]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "3 documents of other kinds are skipped (Deployment 2, Job 1)\n0 errors, 0 warnings\n"
    );
    assert_eq!(output.status.code(), Some(0));
}

#[tokio::test]
async fn check_refuses_security_that_nothing_enforces() {
    let dir = ConfigDir::new();
    dir.write(
        "policy.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny}\nspec: {}\n",
    );
    let config = dir.file("policy.yaml");
    let output = Command::new(SIDECAR).args(["--check", "--config", &config]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    let mut running = Process::start(SIDECAR, &["--config", &config, "--outbound", ANY, "--admin", ANY]);
    let ready = get_json(running.address("admin"), "/ready").await;
    assert!(!ready["security_not_enforced"].as_array().unwrap().is_empty(), "{ready}");
    running.signal("TERM");
    assert!(running.wait().await.success());
}

#[tokio::test]
async fn inbound_leads_to_the_application_whatever_the_host() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    let log = dir.file("access.log");
    let mut sidecar = Process::start(
        SIDECAR,
        &[
            "--inbound",
            ANY,
            "--app",
            &app.addr.to_string(),
            "--outbound",
            ANY,
            "--admin",
            ANY,
            "--access-log",
            &log,
        ],
    );
    let (status, body) = get(sidecar.address("inbound"), "anything.example", "/a/../b?c=d").await;
    assert_eq!(status, 200);
    let saw: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((saw["url"].as_str(), saw["host"].as_str()), (Some("/b?c=d"), Some("anything.example")));
    assert!(saw["headers"]["x-request-id"].is_string());
    let explained = get_json(sidecar.address("admin"), "/explain?direction=inbound&url=http://x/").await;
    assert_eq!(explained["decision"]["forward"][0]["cluster"], format!("inbound|{}||", app.addr.port()));
    sidecar.signal("TERM");
    assert!(sidecar.wait().await.success());
    let line = std::fs::read_to_string(&log).unwrap();
    assert!(line.contains("\"GET /b?c=d HTTP/1.1\" 200 - via_upstream"), "{line}");
}

#[tokio::test]
async fn inbound_is_explained_for_each_application() {
    let (one, two) = (Echo::start("one").await, Echo::start("two").await);
    let (app_one, app_two) = (one.addr.to_string(), two.addr.to_string());
    let sidecar = Process::start(
        SIDECAR,
        &[
            "--inbound",
            ANY,
            "--app",
            &app_one,
            "--inbound",
            ANY,
            "--app",
            &app_two,
            "--outbound",
            ANY,
            "--admin",
            ANY,
        ],
    );
    let admin = sidecar.address("admin");
    for app in [one.addr, two.addr] {
        let path = format!("/explain?direction=inbound&port={}&url=http://x/", app.port());
        let explained = get_json(admin, &path).await;
        assert_eq!(explained["attributes"]["destination.port"], app.port());
        assert_eq!(explained["attributes"]["request.host"], "x");
        let destination = &explained["decision"]["forward"][0];
        assert_eq!(destination["cluster"], format!("inbound|{}||", app.port()));
        assert_eq!(destination["endpoints"][0], app.to_string());
    }
    let (status, said) = get(admin, "admin", "/explain?direction=inbound&port=1&url=http://x/").await;
    assert!(status == 404 && said.contains("no inbound listener for port 1"), "{said}");
    let (status, said) = get(admin, "admin", "/explain?url=http://x/&colour=red").await;
    assert!(status == 400 && said.contains("colour: unknown parameter"), "{said}");
}

#[tokio::test]
async fn a_changed_file_is_in_force_and_a_bad_one_is_not() {
    let (v1, v2) = (Echo::start("v1").await, Echo::start("v2").await);
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service("app", &[("v1", v1.addr)]));
    let sidecar = Process::start(
        SIDECAR,
        &["--config", dir.path().to_str().unwrap(), "--outbound", ANY, "--admin", ANY],
    );
    let (outbound, admin) = (sidecar.address("outbound"), sidecar.address("admin"));
    assert!(get(outbound, "app", "/").await.1.contains("\"v1\""));
    dir.replace("mesh.yaml", &service("app", &[("v2", v2.addr)]));
    until("the second generation", async || get_json(admin, "/ready").await["generation"] == 2).await;
    assert!(get(outbound, "app", "/").await.1.contains("\"v2\""));
    dir.replace("mesh.yaml", "kind: [broken\n");
    until("a rejection", async || get_json(admin, "/ready").await["rejected"] == 1).await;
    assert!(get(outbound, "app", "/").await.1.contains("\"v2\""), "the last good generation stays");
    // The log says it after the status does.
    until("the reason in the log", async || sidecar.stderr().contains("mesh.yaml:")).await;
    // A file that is emptied keeps the last good set; SIGHUP says that it is meant.
    dir.replace("mesh.yaml", "\n");
    assert!(get(outbound, "app", "/").await.1.contains("\"v2\""));
    sidecar.signal("HUP");
    // Where five seconds have passed before the signal comes, it loads what is in force already.
    until("the empty generation", async || get_json(admin, "/ready").await["generation"].as_u64() >= Some(3))
        .await;
    assert_eq!(get(outbound, "app", "/").await.0, 503);
}

#[tokio::test]
async fn c1_reloads_under_load_drop_nothing_and_mix_nothing() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    // Each generation says its number twice, once in a header of the request and once in the path.
    let generation = |number: u32| {
        format!(
            "{}apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app, namespace: default}}\nspec:\n  hosts: [app]\n  http:\n  - headers: {{request: {{set: {{x-generation: g{number}}}}}}}\n    rewrite: {{uri: /g{number}}}\n    match: [{{uri: {{prefix: /echo}}}}]\n    route: [{{destination: {{host: app}}}}]\n",
            service("app", &[("v1", app.addr)])
        )
    };
    dir.write("mesh.yaml", &generation(0));
    let sidecar = Process::start(
        SIDECAR,
        &["--config", &dir.file("mesh.yaml"), "--outbound", ANY, "--admin", ANY, "--workers", "2"],
    );
    let load = Load::start(sidecar.address("outbound"), "app", 4, 100);
    let admin = sidecar.address("admin");
    // A thousand by hand (`.ci/nightly`).
    let reloads: u64 = std::env::var("MESH_RELOADS").ok().and_then(|text| text.parse().ok()).unwrap_or(100);
    for number in 1..=reloads {
        dir.replace("mesh.yaml", &generation(number as u32));
        sidecar.signal("HUP");
        until("the next generation", async || {
            get_json(admin, "/ready").await["generation"].as_u64() > Some(number)
        })
        .await;
    }
    until("load between and after the reloads", async || load.done() > 1000).await;
    let totals = load.stop().await;
    println!("c1: {reloads} reloads, {totals:?}");
    assert_eq!((totals.wrong, totals.broken, totals.refused), (0, 0, 0), "{totals:?}");
    assert_eq!(totals.connections, 4, "{totals:?}");
    assert!(app.seen().values().all(|count| *count == 1), "no request was sent twice");
}

#[tokio::test]
async fn h1_sigterm_under_load_breaks_no_request() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service("app", &[("v1", app.addr)]));
    let mut sidecar = Process::start(
        SIDECAR,
        &["--config", &dir.file("mesh.yaml"), "--outbound", ANY, "--admin", ANY, "--drain-time", "1s"],
    );
    let load = Load::start(sidecar.address("outbound"), "app", 8, 16 * 1024);
    until("some load", async || load.done() > 200).await;
    sidecar.signal("TERM");
    assert!(sidecar.wait().await.success());
    let totals = load.stop().await;
    println!("h1: {totals:?}");
    assert_eq!((totals.wrong, totals.broken, totals.refused), (0, 0, 0), "{totals:?}");
}

#[tokio::test]
async fn h2_an_endless_stream_is_cut_at_the_deadline() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service("app", &[("v1", app.addr)]));
    let mut sidecar = Process::start(
        SIDECAR,
        &[
            "--config",
            &dir.file("mesh.yaml"),
            "--outbound",
            ANY,
            "--admin",
            ANY,
            "--drain-time",
            "100ms",
            "--drain-deadline",
            "500ms",
        ],
    );
    let outbound = sidecar.address("outbound");
    let endless = tokio::spawn(async move { get(outbound, "app", "/slow").await });
    until("the request", async || app.requests() == 1).await;
    sidecar.signal("TERM");
    assert!(sidecar.wait().await.success());
    endless.await.unwrap();
}

#[tokio::test]
async fn h9_an_upgrade_lives_through_a_reload() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service("app", &[("v1", app.addr)]));
    let sidecar =
        Process::start(SIDECAR, &["--config", &dir.file("mesh.yaml"), "--outbound", ANY, "--admin", ANY]);
    let mut stream = tokio::net::TcpStream::connect(sidecar.address("outbound")).await.unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: app\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        .await
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    let mut answer = [0_u8; 5];
    stream.write_all(b"first").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"first");
    sidecar.signal("HUP");
    let admin = sidecar.address("admin");
    until("a reload", async || get_json(admin, "/ready").await["generation"] == 2).await;
    stream.write_all(b"again").await.unwrap();
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"again");
}

#[tokio::test]
async fn h10_trailers_pass_and_local_replies_speak_grpc() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service("app", &[("v1", app.addr)]));
    let sidecar =
        Process::start(SIDECAR, &["--config", &dir.file("mesh.yaml"), "--outbound", ANY, "--admin", ANY]);
    let outbound = sidecar.address("outbound");
    let with_trailers =
        send(outbound, "GET /trailers HTTP/1.1\r\nhost: app\r\nte: trailers\r\nconnection: te\r\n\r\n").await;
    let text = String::from_utf8_lossy(&with_trailers.bytes).into_owned();
    assert!(text.contains("chunked"), "{text}");
    let refused = send(outbound, "POST / HTTP/1.1\r\nhost: app:1\r\ncontent-type: application/grpc\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
    let text = String::from_utf8_lossy(&refused.bytes).to_ascii_lowercase();
    assert!(text.starts_with("http/1.1 200") && text.contains("grpc-status: 14"), "{text}");
}

#[tokio::test]
async fn a_gateway_serves_its_servers_and_follows_its_configuration() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    let gateway = |servers: &str| {
        format!(
            "{}apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: edge, namespace: default}}\nspec:\n  selector: {{istio: ingressgateway}}\n  servers:\n{servers}---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app, namespace: default}}\nspec:\n  hosts: ['*.example.com']\n  gateways: [edge]\n  http: [{{route: [{{destination: {{host: app}}}}]}}]\n",
            service("app", &[("v1", app.addr)])
        )
    };
    let plain = "  - {port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}\n";
    let secure = "  - {port: {number: 443, name: https, protocol: HTTPS}, hosts: ['*'], tls: {mode: SIMPLE, credentialName: c}}\n";
    let redirect = "  - {port: {number: 81, name: redirect, protocol: HTTP}, hosts: ['*'], tls: {httpsRedirect: true}}\n";
    dir.write("mesh.yaml", &gateway(&format!("{plain}{secure}")));
    let process = Process::start(
        GATEWAY,
        &[
            "--config",
            &dir.file("mesh.yaml"),
            "--bind",
            "127.0.0.1",
            "--map-port",
            "80=0",
            "--map-port",
            "81=0",
            "--map-port",
            "443=0",
            "--admin",
            ANY,
        ],
    );
    let (http, admin) = (process.address("http"), process.address("admin"));
    let (status, body) = get(http, "a.example.com", "/x").await;
    assert_eq!(status, 200, "{body}");
    let saw: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(saw["headers"]["x-forwarded-for"], "127.0.0.1");
    assert_eq!(get(http, "example.com", "/x").await.0, 404);
    let node = &get_json(admin, "/server_info").await["node"];
    assert_eq!(node["labels"]["istio"], "ingressgateway", "what a gateway is labelled with by default");
    let names = |listeners: &Value| -> Vec<String> {
        listeners["listeners"]
            .as_array()
            .unwrap()
            .iter()
            .map(|l| l["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(&get_json(admin, "/listeners").await), ["http", "https"]);
    // Its secret is missing: it answers no handshake, and plaintext not at all.
    let request = "GET / HTTP/1.1\r\nhost: a.example.com\r\n\r\n";
    let answer = send(process.address("https"), request).await;
    assert!(answer.closed && answer.bytes.is_empty(), "TLS is never served in plaintext");
    dir.replace("mesh.yaml", &gateway(&format!("{plain}{redirect}")));
    let redirects = async || names(&get_json(admin, "/listeners").await) == ["http", "redirect"];
    until("the redirecting server", redirects).await;
    let listeners = get_json(admin, "/listeners").await;
    let address = |name: &str| -> SocketAddr {
        let all = listeners["listeners"].as_array().unwrap();
        all.iter().find(|l| l["name"] == name).unwrap()["address"].as_str().unwrap().parse().unwrap()
    };
    assert_eq!(address("http"), http, "a server that stays keeps its socket");
    let answer =
        send(address("redirect"), "GET /p HTTP/1.1\r\nhost: a.example.com\r\nconnection: close\r\n\r\n")
            .await;
    let text = String::from_utf8_lossy(&answer.bytes).into_owned();
    assert!(text.starts_with("HTTP/1.1 301") && text.contains("location: https://a.example.com/p"), "{text}");
}

#[tokio::test]
async fn the_client_and_the_custom_proxy_embed_the_same_layers() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service("app", &[("v1", app.addr)]));
    let config = dir.file("mesh.yaml");
    let run = move || {
        Command::new(env!("CARGO_BIN_EXE_client"))
            .args(["--config", &config, "http://app/hello", "3"])
            .output()
            .unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        said.lines().filter(|line| line.starts_with("200 ") && line.contains("/hello")).count(),
        3,
        "{said}"
    );
    let proxy = Process::start(env!("CARGO_BIN_EXE_custom_proxy"), &[ANY, &app.addr.to_string()]);
    let address = proxy.address("custom");
    assert_eq!(get(address, "a", "/api/x").await.0, 200);
    assert_eq!(get(address, "a", "/other").await.0, 404);
    assert_eq!(get(address, "a", "/other/../api/x").await.0, 200, "what is routed is what is forwarded");
}
