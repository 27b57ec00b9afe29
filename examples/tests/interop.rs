//! Mutual TLS with what we did not write: openssl and curl, and Envoy where `ENVOY` names its binary. Both ends are tried
//! with each, as a client of a strict sidecar and as a server that a sidecar has to show its certificate to.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{exchange, get_json};
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use mesh_tls::ca::Authority;
use serde_json::{Value, json};

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";
const HOUR: Duration = Duration::from_secs(3600);

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";

/// What `productpage` is called by its server.
const PRODUCTPAGE: &str = "spiffe://cluster.local/ns/default/sa/productpage";
const REVIEWS: &str = "spiffe://cluster.local/ns/default/sa/reviews";

/// Ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn authority() -> Authority {
    Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), 24 * HOUR).unwrap()
}

fn identity(ca: &Authority, id: &str) -> ConfigDir {
    let dir = ConfigDir::new();
    let issued = ca.issue(&id.parse().unwrap(), SystemTime::now(), HOUR).unwrap();
    dir.write("cert-chain.pem", &issued.certificate.chain_pem);
    dir.write("key.pem", &issued.key_pem());
    dir.write("root-cert.pem", ca.root_pem());
    dir
}

/// Whether a tool is there; says so when it is not.
fn is_there(tool: &str, argument: &str) -> bool {
    let found = Command::new(tool).arg(argument).output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: there is no {tool}");
    }
    found
}

/// A strict sidecar in front of an application.
struct Server {
    _app: Echo,
    _identity: ConfigDir,
    _config: ConfigDir,
    sidecar: Process,
}

impl Server {
    async fn start(ca: &Authority) -> Self {
        let (app, identity, config) = (Echo::start("reviews").await, identity(ca, REVIEWS), ConfigDir::new());
        config.write("mesh.yaml", STRICT);
        let (file, dir, app_addr) =
            (config.file("mesh.yaml"), identity.path().display().to_string(), app.addr.to_string());
        let args = ["--config", &file, "--identity-dir", &dir, "--inbound", ANY, "--app", &app_addr];
        let rest = ["--outbound", ANY, "--admin", ANY, "--workers", "1"];
        let sidecar = Process::start(SIDECAR, &[&args[..], &rest[..]].concat());
        Self { _app: app, _identity: identity, _config: config, sidecar }
    }

    fn address(&self) -> SocketAddr {
        self.sidecar.address("inbound")
    }
}

/// A sidecar that speaks mutual TLS to `server`, and what it answers.
async fn through_a_sidecar(ca: &Authority, server: SocketAddr) -> String {
    let (config, identity) = (ConfigDir::new(), identity(ca, PRODUCTPAGE));
    config.write(
        "mesh.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: reviews, namespace: default}}\nspec:\n  hosts: [reviews.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: 127.0.0.1, ports: {{http: {}}}, serviceAccount: reviews}}]\n---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: reviews, namespace: default}}\nspec: {{host: reviews, trafficPolicy: {{tls: {{mode: ISTIO_MUTUAL, subjectAltNames: ['{REVIEWS}']}}}}}}\n",
            server.port()
        ),
    );
    let (file, dir) = (config.file("mesh.yaml"), identity.path().display().to_string());
    let sidecar = Process::start(
        SIDECAR,
        &["--config", &file, "--identity-dir", &dir, "--outbound", ANY, "--admin", ANY, "--workers", "1"],
    );
    let request = b"GET / HTTP/1.1\r\nhost: reviews\r\nconnection: close\r\n\r\n";
    let answer = exchange(sidecar.address("outbound"), request, Duration::from_secs(10)).await;
    String::from_utf8_lossy(&answer.bytes).into_owned()
}

/// Runs a client to its end with what it is to send.
async fn run(mut command: Command, input: &'static str) -> Output {
    tokio::task::spawn_blocking(move || {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the client starts");
        // A client that is refused may be gone already.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        child.wait_with_output().expect("the client ends")
    })
    .await
    .unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test]
async fn openssl_is_let_in_by_its_certificate_alone() {
    if !is_there("openssl", "version") {
        return;
    }
    let ca = authority();
    let (server, client) = (Server::start(&ca).await, identity(&ca, PRODUCTPAGE));
    let s_client = |with_certificate: bool| {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-quiet", "-verify_return_error", "-alpn", "istio,http/1.1"]);
        command.args(["-connect", &server.address().to_string(), "-CAfile", &client.file("root-cert.pem")]);
        if with_certificate {
            command.args(["-cert", &client.file("cert-chain.pem"), "-key", &client.file("key.pem")]);
        }
        command
    };
    let request = "GET /openssl HTTP/1.1\r\nhost: reviews\r\nconnection: close\r\n\r\n";
    let answer = text(&run(s_client(true), request).await);
    assert!(answer.contains("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains(&format!("URI={PRODUCTPAGE}")), "the application is told who it was: {answer}");
    let refused = text(&run(s_client(false), request).await);
    assert!(!refused.contains("HTTP/1.1"), "{refused}");
}

#[tokio::test]
async fn a_sidecar_shows_its_certificate_to_openssl() {
    if !is_there("openssl", "version") {
        return;
    }
    let ca = authority();
    let dir = identity(&ca, REVIEWS);
    // Answers every request with what it knows of the connection, the client's certificate among it.
    let mut child = Command::new("openssl")
        .args(["s_server", "-accept", ANY, "-www", "-Verify", "2", "-verify_return_error"])
        .args(["-CAfile", &dir.file("root-cert.pem"), "-alpn", "istio,http/1.1"])
        .args(["-cert", &dir.file("cert-chain.pem"), "-key", &dir.file("key.pem")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let _server = Killed(child);
    let accepts = lines.find_map(|line| Some(line.ok()?.strip_prefix("ACCEPT ")?.to_owned())).unwrap();
    std::thread::spawn(move || lines.for_each(drop));
    let answer = through_a_sidecar(&ca, accepts.trim().parse().unwrap()).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("Client certificate"), "{answer}");
    assert!(answer.contains("URI:spiffe://cluster.local/ns/default/sa/productpage"), "{answer}");
}

#[tokio::test]
async fn curl_is_let_in_by_its_certificate_alone() {
    if !is_there("curl", "--version") {
        return;
    }
    let ca = authority();
    let (server, client) = (Server::start(&ca).await, identity(&ca, PRODUCTPAGE));
    let curl = |arguments: &[&str]| {
        let mut command = Command::new("curl");
        // A certificate of the mesh has no DNS name that curl could look for.
        command.args(["--silent", "--show-error", "--insecure", "--max-time", "10"]).args(arguments);
        command.arg(format!("https://{}/curl", server.address()));
        command
    };
    let (cert, key) = (client.file("cert-chain.pem"), client.file("key.pem"));
    for version in ["--http1.1", "--http2"] {
        let output = run(curl(&[version, "--cert", &cert, "--key", &key]), "").await;
        assert!(text(&output).contains(&format!("URI={PRODUCTPAGE}")), "{version}: {}", text(&output));
    }
    let refused = run(curl(&[]), "").await;
    assert!(!refused.status.success() && refused.stdout.is_empty(), "{}", text(&refused));
}

/// What Envoy of a service account shows, and whom it lets in.
fn tls(dir: &ConfigDir, peer: &str) -> Value {
    json!({
        // Of the cluster it is what its codec speaks.
        "alpn_protocols": ["http/1.1"],
        "tls_certificates": [{
            "certificate_chain": {"filename": dir.file("cert-chain.pem")},
            "private_key": {"filename": dir.file("key.pem")},
        }],
        "validation_context": {
            "trusted_ca": {"filename": dir.file("root-cert.pem")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    })
}

fn connection_manager(route: &Value) -> Value {
    let of = |name: &str| format!("type.googleapis.com/envoy.extensions.filters.{name}");
    json!([{"name": "http", "typed_config": {
        "@type": of("network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "http",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": of("http.router.v3.Router")}}],
    }}])
}

/// Envoy with a listener `server`, which asks for the certificate of `productpage`, and a listener `client`, which forwards
/// to `upstream` with that certificate.
struct Envoy {
    _process: Killed,
    _dirs: [ConfigDir; 3],
    ports: Value,
}

impl Envoy {
    async fn start(binary: &str, ca: &Authority, upstream: SocketAddr) -> Self {
        let (server, client, dir) = (identity(ca, REVIEWS), identity(ca, PRODUCTPAGE), ConfigDir::new());
        let socket = |port: u16| json!({"socket_address": {"address": "127.0.0.1", "port_value": port}});
        let of = |name: &str| format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{name}");
        let config = json!({
            "admin": {"address": socket(0)},
            "static_resources": {
                "listeners": [{
                    "name": "server",
                    "address": socket(0),
                    "filter_chains": [{
                        "transport_socket": {"name": "tls", "typed_config": {
                            "@type": of("DownstreamTlsContext"),
                            "require_client_certificate": true,
                            "common_tls_context": tls(&server, PRODUCTPAGE),
                        }},
                        "filters": connection_manager(&json!({
                            "match": {"prefix": "/"},
                            "direct_response": {"status": 200, "body": {"inline_string": "from envoy"}},
                        })),
                    }],
                }, {
                    "name": "client",
                    "address": socket(0),
                    "filter_chains": [{"filters": connection_manager(&json!({
                        "match": {"prefix": "/"}, "route": {"cluster": "sidecar"},
                    }))}],
                }],
                "clusters": [{
                    "name": "sidecar",
                    "load_assignment": {"cluster_name": "sidecar", "endpoints": [{"lb_endpoints": [
                        {"endpoint": {"address": socket(upstream.port())}},
                    ]}]},
                    "transport_socket": {"name": "tls", "typed_config": {
                        "@type": of("UpstreamTlsContext"),
                        "sni": "outbound_.80_._.reviews.default.svc.cluster.local",
                        "common_tls_context": tls(&client, REVIEWS),
                    }},
                }],
            },
        });
        dir.write("envoy.json", &config.to_string());
        let admin = dir.file("admin");
        let child = Command::new(binary)
            .args(["-c", &dir.file("envoy.json"), "--admin-address-path", &admin])
            .args(["--concurrency", "1", "--disable-hot-restart", "-l", "error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let process = Killed(child);
        let mut ports = Value::Null;
        until("Envoy listens", async || {
            let written = std::fs::read_to_string(&admin).unwrap_or_default();
            let Ok(admin) = written.trim().parse::<SocketAddr>() else { return false };
            let listeners = get_json(admin, "/listeners?format=json").await;
            let statuses = listeners["listener_statuses"].as_array().cloned().unwrap_or_default();
            for status in &statuses {
                let name = status["name"].as_str().unwrap_or_default();
                ports[name] = status["local_address"]["socket_address"]["port_value"].clone();
            }
            statuses.len() == 2
        })
        .await;
        Self { _process: process, _dirs: [server, client, dir], ports }
    }

    fn address(&self, name: &str) -> SocketAddr {
        let port = self.ports[name].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap();
        SocketAddr::from(([127, 0, 0, 1], port))
    }
}

#[tokio::test]
async fn envoy_is_let_in_by_a_sidecar_and_lets_one_in() {
    let binary = std::env::var("ENVOY").unwrap_or_else(|_| "envoy".to_owned());
    if !is_there(&binary, "--version") {
        return;
    }
    let ca = authority();
    let server = Server::start(&ca).await;
    let envoy = Envoy::start(&binary, &ca, server.address()).await;
    let request = b"GET /envoy HTTP/1.1\r\nhost: reviews\r\nconnection: close\r\n\r\n";
    let answer = exchange(envoy.address("client"), request, Duration::from_secs(10)).await;
    let answer = String::from_utf8_lossy(&answer.bytes);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains(&format!("URI={PRODUCTPAGE}")), "{answer}");
    let answer = through_a_sidecar(&ca, envoy.address("server")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("from envoy"), "{answer}");
    // Who is somebody else is refused by Envoy, not by chance.
    let stranger = through_a_sidecar(&authority(), envoy.address("server")).await;
    assert!(stranger.starts_with("HTTP/1.1 503"), "{stranger}");
}
