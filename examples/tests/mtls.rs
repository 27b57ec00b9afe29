//! Mutual TLS between two sidecars whose applications notice nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::exchange;
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use mesh_tls::ca::Authority;
use serde_json::Value;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";
const HOUR: Duration = Duration::from_secs(3600);

fn authority() -> Authority {
    Authority::new("cluster.local".parse().unwrap(), SystemTime::now(), 24 * HOUR).unwrap()
}

/// A directory with the identity of a service account.
fn identity(ca: &Authority, name: &str) -> ConfigDir {
    let dir = ConfigDir::new();
    renew(&dir, ca, name);
    dir
}

fn renew(dir: &ConfigDir, ca: &Authority, name: &str) {
    let id = format!("spiffe://cluster.local/ns/default/sa/{name}").parse().unwrap();
    let issued = ca.issue(&id, SystemTime::now(), HOUR).unwrap();
    dir.write("cert-chain.pem", &issued.certificate.chain_pem);
    dir.write("key.pem", &issued.key_pem());
    dir.write("root-cert.pem", ca.root_pem());
}

fn strict(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: istio-system}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

/// `reviews`, at an endpoint that shows an identity.
fn reviews(endpoint: SocketAddr, rule: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: reviews, namespace: default}}\nspec:\n  hosts: [reviews.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: 127.0.0.1, ports: {{http: {}}}, serviceAccount: reviews}}]\n{rule}",
        endpoint.port()
    )
}

fn rule(tls: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: reviews, namespace: default}}\nspec: {{host: reviews, trafficPolicy: {{tls: {tls}}}}}\n"
    )
}

struct Sidecar {
    process: Process,
    config: ConfigDir,
}

impl Sidecar {
    fn start(config: &str, identity: Option<&ConfigDir>, app: Option<SocketAddr>) -> Self {
        let dir = ConfigDir::new();
        dir.write("mesh.yaml", config);
        let (file, app) = (dir.file("mesh.yaml"), app.map(|app| app.to_string()));
        let mut args = vec!["--config", &file, "--outbound", ANY, "--admin", ANY, "--workers", "1"];
        if let Some(app) = &app {
            args.extend(["--inbound", ANY, "--app", app]);
        }
        let identity = identity.map(|dir| dir.path().display().to_string());
        if let Some(identity) = &identity {
            args.extend(["--identity-dir", identity]);
        }
        Self { process: Process::start(SIDECAR, &args), config: dir }
    }

    fn outbound(&self) -> SocketAddr {
        self.process.address("outbound")
    }

    fn inbound(&self) -> SocketAddr {
        self.process.address("inbound")
    }
}

/// An answer; status 0 is none.
#[derive(Debug)]
struct Seen {
    status: u16,
    body: String,
}

async fn ask(peer: SocketAddr) -> Seen {
    let request = b"GET /x HTTP/1.1\r\nhost: reviews\r\nx-forwarded-client-cert: Hash=forged\r\nconnection: close\r\n\r\n";
    let answer = exchange(peer, request, Duration::from_secs(5)).await;
    let text = String::from_utf8_lossy(&answer.bytes).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    Seen { status, body }
}

/// What the application was told of its client's certificate.
fn told(answer: &Seen) -> Value {
    serde_json::from_str::<Value>(&answer.body).unwrap()["headers"]["x-forwarded-client-cert"].clone()
}

async fn says(sidecar: &Sidecar, what: &str) {
    until(what, async || sidecar.process.stderr().contains(what)).await;
}

#[tokio::test]
async fn pa_01_strict_lets_in_who_shows_an_identity_and_tells_the_application_whose() {
    let (ca, app) = (authority(), Echo::start("reviews").await);
    let (server_id, client_id) = (identity(&ca, "reviews"), identity(&ca, "productpage"));
    let server = Sidecar::start(&strict("STRICT"), Some(&server_id), Some(app.addr));
    let client = Sidecar::start(&reviews(server.inbound(), ""), Some(&client_id), None);
    for _ in 0..3 {
        let answer = ask(client.outbound()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let told = told(&answer).as_str().unwrap().to_owned();
        assert!(
            told.starts_with("By=spiffe://cluster.local/ns/default/sa/reviews;Hash=")
                && told.ends_with(";URI=spiffe://cluster.local/ns/default/sa/productpage"),
            "{told}"
        );
    }
    // Plaintext is reset before a byte of it is a request, and the log says why.
    assert_eq!(ask(server.inbound()).await.status, 0);
    says(&server, "refused plaintext").await;
    // So is a workload of another authority.
    let stranger = identity(&authority(), "productpage");
    let strange = Sidecar::start(&reviews(server.inbound(), ""), Some(&stranger), None);
    let answer = ask(strange.outbound()).await;
    assert_eq!(answer.status, 503, "{answer:?}");
    // And one that has no identity calls in plaintext, which is refused.
    let nobody = Sidecar::start(&reviews(server.inbound(), ""), None, None);
    assert_eq!(ask(nobody.outbound()).await.status, 503);
    assert_eq!(app.requests(), 3);
}

#[tokio::test]
async fn pa_01_permissive_takes_both_on_one_port_and_disable_takes_plaintext() {
    let (ca, app) = (authority(), Echo::start("reviews").await);
    let (server_id, client_id) = (identity(&ca, "reviews"), identity(&ca, "productpage"));
    let server = Sidecar::start(&strict("PERMISSIVE"), Some(&server_id), Some(app.addr));
    let client = Sidecar::start(&reviews(server.inbound(), ""), Some(&client_id), None);
    let (secured, plain) = (ask(client.outbound()).await, ask(server.inbound()).await);
    assert_eq!((secured.status, plain.status), (200, 200));
    assert!(told(&secured).as_str().unwrap().contains("sa/productpage"));
    assert_eq!(told(&plain), Value::Null);
    // Without mTLS by rule, the same client is nobody to the application.
    client.config.replace("mesh.yaml", &reviews(server.inbound(), &rule("{mode: DISABLE}")));
    says(&client, "generation=2").await;
    let answer = ask(client.outbound()).await;
    assert_eq!((answer.status, told(&answer)), (200, Value::Null));
    server.config.replace("mesh.yaml", &strict("STRICT"));
    says(&server, "generation=2").await;
    assert_eq!(ask(server.inbound()).await.status, 0);
}

#[tokio::test]
async fn dr_tls01_a_rule_demands_mutual_tls_and_names_who_answers() {
    let (ca, app) = (authority(), Echo::start("reviews").await);
    let (server_id, client_id) = (identity(&ca, "reviews"), identity(&ca, "productpage"));
    let server = Sidecar::start(&strict("STRICT"), Some(&server_id), Some(app.addr));
    let with = |tls: &str| reviews(server.inbound(), &rule(tls));
    let right = "{mode: ISTIO_MUTUAL, subjectAltNames: ['spiffe://cluster.local/ns/default/sa/reviews']}";
    let client = Sidecar::start(&with(right), Some(&client_id), None);
    assert_eq!(ask(client.outbound()).await.status, 200);
    let wrong = "{mode: ISTIO_MUTUAL, subjectAltNames: ['spiffe://cluster.local/ns/default/sa/details']}";
    client.config.replace("mesh.yaml", &with(wrong));
    says(&client, "generation=2").await;
    // A connection that was made for another expectation is not used for this one (D11).
    assert_eq!(ask(client.outbound()).await.status, 503);
    // Demanded and without an identity: never plaintext instead.
    let nobody = Sidecar::start(&with("{mode: ISTIO_MUTUAL}"), None, None);
    let answer = ask(nobody.outbound()).await;
    assert_eq!(answer.status, 503);
    assert_eq!(app.requests(), 1);
}

#[tokio::test]
async fn pa_05_a_renewed_identity_is_shown_and_nothing_breaks() {
    let (ca, app) = (authority(), Echo::start("reviews").await);
    let (server_id, client_id) = (identity(&ca, "reviews"), identity(&ca, "productpage"));
    let server = Sidecar::start(&strict("STRICT"), Some(&server_id), Some(app.addr));
    let client = Sidecar::start(&reviews(server.inbound(), ""), Some(&client_id), None);
    let before = told(&ask(client.outbound()).await);
    renew(&client_id, &ca, "productpage");
    renew(&server_id, &ca, "reviews");
    for sidecar in [&client, &server] {
        says(sidecar, "certificates renewed from files").await;
    }
    // The connection that is open lives on with the certificate that it was made with.
    assert_eq!(told(&ask(client.outbound()).await), before);
    let another = Sidecar::start(&reviews(server.inbound(), ""), Some(&client_id), None);
    let answer = ask(another.outbound()).await;
    assert_eq!(answer.status, 200);
    assert_ne!(told(&answer), before);
}

#[test]
fn an_identity_that_is_not_there_is_said_by_its_flag() {
    let dir = ConfigDir::new();
    let output = std::process::Command::new(SIDECAR)
        .args(["--outbound", ANY, "--admin", ANY, "--identity-dir", &dir.path().display().to_string()])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("--identity-dir") && stderr.contains("cert-chain.pem"), "{stderr}");
}
