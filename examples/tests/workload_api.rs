//! Identities of the SPIFFE Workload API, with the binaries.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../mesh-tls/tests/agent/mod.rs"]
mod agent;

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, SystemTime};

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::exchange;
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use mesh_tls::ca::Authority;
use mesh_tls::spiffe::{X509Svid, X509SvidResponse};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::Value;

use agent::Agent;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";
const HOUR: Duration = Duration::from_secs(3600);
const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";

fn says(ca: &Authority, id: &str) -> X509SvidResponse {
    let issued = ca.issue(&id.parse().unwrap(), SystemTime::now(), HOUR).unwrap();
    let key = PrivatePkcs8KeyDer::from_pem_slice(issued.key_pem().as_bytes()).unwrap();
    let mut answer = X509SvidResponse::default();
    answer.svids.push(X509Svid::new(id, issued.certificate.chain[0].to_vec(), key, ca.root().to_vec()));
    answer
}

fn reviews(endpoint: SocketAddr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: reviews, namespace: default}}\nspec:\n  hosts: [reviews.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: 127.0.0.1, ports: {{http: {}}}, serviceAccount: reviews}}]\n",
        endpoint.port()
    )
}

fn sidecar(dir: &ConfigDir, config: &str, args: &[&str]) -> Process {
    dir.write("mesh.yaml", config);
    let file = dir.file("mesh.yaml");
    let common = ["--config", &file, "--outbound", ANY, "--admin", ANY, "--workers", "1"];
    Process::start(SIDECAR, &[&common, args].concat())
}

async fn get(peer: SocketAddr, path: &str) -> (u16, Value) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: reviews\r\nconnection: close\r\n\r\n");
    let answer = exchange(peer, request.as_bytes(), Duration::from_secs(5)).await;
    let text = String::from_utf8_lossy(&answer.bytes).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str(body).ok());
    (status, body.unwrap_or_default())
}

#[tokio::test]
async fn pa_05_a_sidecar_of_the_workload_api_and_one_of_files_know_each_other() {
    // Not the trust domain that Istio presumes: nothing but the agent says it.
    let ca = Authority::new("example.org".parse().unwrap(), SystemTime::now(), 24 * HOUR).unwrap();
    let (agent, app) = (Agent::start("sidecar"), Echo::start("reviews").await);
    let (server_dir, client_dir, files) = (ConfigDir::new(), ConfigDir::new(), ConfigDir::new());
    let (endpoint, app_addr) = (agent.endpoint(), app.addr.to_string());
    let args = ["--inbound", ANY, "--app", &app_addr, "--spiffe-endpoint", &endpoint];
    let server = sidecar(&server_dir, STRICT, &args);
    let (ready, _) = get(server.address("admin"), "/ready").await;
    assert_eq!(ready, 503);
    agent.say(&says(&ca, "spiffe://example.org/reviews"));
    until("an identity", async || get(server.address("admin"), "/ready").await.0 == 200).await;
    let (_, state) = get(server.address("admin"), "/ready").await;
    assert_eq!(state["identity"]["id"], "spiffe://example.org/reviews");

    let issued =
        ca.issue(&"spiffe://example.org/productpage".parse().unwrap(), SystemTime::now(), HOUR).unwrap();
    files.write("cert-chain.pem", &issued.certificate.chain_pem);
    files.write("key.pem", &issued.key_pem());
    files.write("root-cert.pem", ca.root_pem());
    let dir = files.path().display().to_string();
    let client = sidecar(&client_dir, &reviews(server.address("inbound")), &["--identity-dir", &dir]);
    let (status, body) = get(client.address("outbound"), "/x").await;
    assert_eq!(status, 200, "{}", client.stderr());
    let told = body["headers"]["x-forwarded-client-cert"].as_str().unwrap();
    assert!(told.starts_with("By=spiffe://example.org/reviews;"), "{told}");
    assert!(told.ends_with(";URI=spiffe://example.org/productpage"), "{told}");
    // A configuration that is read again does not forget whom the agent named.
    server_dir.replace("mesh.yaml", &format!("{STRICT}---\n{}", reviews(app.addr)));
    until("a reload", async || server.stderr().contains("generation=2")).await;
    let again = ConfigDir::new();
    let client = sidecar(&again, &reviews(server.address("inbound")), &["--identity-dir", &dir]);
    assert_eq!(get(client.address("outbound"), "/x").await.0, 200, "{}", client.stderr());
    assert_eq!(agent.strange(), 0);
}

#[test]
fn flags_of_the_agent_go_together() {
    for (args, reason) in [
        (&["--spiffe-endpoint", "unix:///a", "--identity-dir", "."][..], "cannot be used with"),
        (
            &["--spiffe-endpoint", "unix:///a", "--ca", "ca:1", "--bootstrap-token", "x"],
            "cannot be used with",
        ),
        (&["--spiffe-svid", "internal"], "--spiffe-endpoint"),
        (&["--spiffe-endpoint", "tcp://127.0.0.1:1"], "not taken over TCP"),
        (&["--spiffe-endpoint", "unix:///a", "--spiffe-svid", "spiffe://A/b"], "--spiffe-svid spiffe://A/b"),
        (&["--spiffe-endpoint"], "SPIFFE_ENDPOINT_SOCKET is not set"),
    ] {
        let mut command = Command::new(SIDECAR);
        command.env_remove("SPIFFE_ENDPOINT_SOCKET").args(["--outbound", ANY, "--admin", ANY]).args(args);
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(reason), "{reason}: {stderr}");
    }
}
