//! Identities from `mesh-ca`, with the binaries: the first one, the next one, another root, and when it is not there.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::exchange;
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use mesh_tls::Material;
use mesh_tls::istio_ca::{CaClientError, Code, IstioCa, Question, Sign as _};
use rcgen::{CertificateParams, KeyPair, SanType};
use serde_json::Value;
use tokio::task::JoinHandle;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const MESH_CA: &str = env!("CARGO_BIN_EXE_mesh-ca");
const ANY: &str = "127.0.0.1:0";

/// A directory for the authority's state and the tokens.
struct Place(ConfigDir);

impl Place {
    fn new() -> Self {
        Self(ConfigDir::new())
    }

    fn state(&self) -> String {
        self.0.file("state")
    }

    fn roots(&self) -> String {
        self.0.file("state/root-cert.pem")
    }

    fn read_roots(&self) -> String {
        std::fs::read_to_string(self.roots()).unwrap()
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(MESH_CA).args(["--dir", &self.state()]).args(args).output().unwrap()
    }

    fn serve(&self, listen: &str, more: &[&str]) -> Process {
        let state = self.state();
        let args = [&["--dir", state.as_str(), "--listen", listen], more].concat();
        Process::start(MESH_CA, &args)
    }

    /// A token for a service account, as a file.
    fn token(&self, service_account: &str, more: &[&str]) -> String {
        let file = self.0.file(&format!("{service_account}.token"));
        let args = [&["token", "--service-account", service_account, "--out", &file], more].concat();
        let made = self.run(&args);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        file
    }

    /// A sidecar of a service account that asks the authority at `ca`.
    fn sidecar(&self, name: &str, ca: SocketAddr, config: &str, app: Option<SocketAddr>) -> Sidecar {
        let token = self.token(name, &[]);
        self.sidecar_with(name, ca, config, app, &token, &self.roots())
    }

    fn sidecar_with(
        &self,
        name: &str,
        ca: SocketAddr,
        config: &str,
        app: Option<SocketAddr>,
        token: &str,
        roots: &str,
    ) -> Sidecar {
        let dir = ConfigDir::new();
        dir.write("mesh.yaml", config);
        let (file, app) = (dir.file("mesh.yaml"), app.map(|app| app.to_string()));
        let (ca, log) = (format!("https://{ca}"), dir.file("access.log"));
        let mut args = vec!["--config", &file, "--outbound", ANY, "--admin", ANY, "--health", ANY];
        args.extend(["--workers", "1"]);
        args.extend(["--access-log", &log]);
        args.extend(["--service-account", name, "--ca", &ca, "--bootstrap-token", token, "--ca-root", roots]);
        if let Some(app) = &app {
            args.extend(["--inbound", ANY, "--app", app]);
        }
        Sidecar { process: Process::start(SIDECAR, &args), dir }
    }
}

struct Sidecar {
    process: Process,
    dir: ConfigDir,
}

impl Sidecar {
    fn outbound(&self) -> SocketAddr {
        self.process.address("outbound")
    }

    fn inbound(&self) -> SocketAddr {
        self.process.address("inbound")
    }

    async fn readiness(&self) -> (u16, Value) {
        let seen = get(self.process.address("admin"), "localhost", "/ready").await;
        (seen.status, serde_json::from_str(&seen.body).unwrap())
    }

    async fn is_ready(&self) {
        until("an identity", async || self.readiness().await.0 == 200).await;
    }
}

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: istio-system}\nspec: {mtls: {mode: STRICT}}\n";

/// A service at an endpoint that shows an identity.
fn service(name: &str, endpoint: SocketAddr) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  hosts: [{name}.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: 127.0.0.1, ports: {{http: {}}}, serviceAccount: reviews}}]\n",
        endpoint.port()
    )
}

/// `reviews` with a handshake for each request, and `kept` at the same endpoint with one for all of them.
fn services(endpoint: SocketAddr) -> String {
    format!(
        "{}{}---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: reviews, namespace: default}}\nspec: {{host: reviews, trafficPolicy: {{connectionPool: {{http: {{maxRequestsPerConnection: 1}}}}}}}}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: reviews, namespace: default}}\nspec: {{hosts: [reviews], http: [{{route: [{{destination: {{host: reviews}}}}], retries: {{attempts: 0}}}}]}}\n",
        service("reviews", endpoint),
        service("kept", endpoint)
    )
}

/// An answer; status 0 is none.
#[derive(Debug)]
struct Seen {
    status: u16,
    body: String,
}

async fn get(peer: SocketAddr, host: &str, path: &str) -> Seen {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let answer = exchange(peer, request.as_bytes(), Duration::from_secs(5)).await;
    let text = String::from_utf8_lossy(&answer.bytes).into_owned();
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    Seen { status, body }
}

/// What the application was told of its client's certificate.
fn told(answer: &Seen) -> String {
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    body["headers"]["x-forwarded-client-cert"].as_str().unwrap_or_default().to_owned()
}

/// Requests to `reviews` one after the other, each with a handshake of its own, until it is told to end.
struct Traffic {
    seen: Arc<Mutex<Answers>>,
    task: JoinHandle<()>,
}

/// What came of the requests.
#[derive(Default)]
struct Answers {
    all: usize,
    /// The clients' certificates that the application was told of.
    certificates: BTreeSet<String>,
    /// What is not 200.
    failed: Vec<Seen>,
    ends: bool,
}

impl Traffic {
    fn start(client: SocketAddr) -> Self {
        let seen = Arc::<Mutex<Answers>>::default();
        let answers = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            while !answers.lock().unwrap().ends {
                let answer = get(client, "reviews", "/").await;
                let mut answers = answers.lock().unwrap();
                answers.all += 1;
                if answer.status == 200 {
                    answers.certificates.insert(told(&answer));
                } else {
                    answers.failed.push(answer);
                }
            }
        });
        Self { seen, task }
    }

    /// Ends it once there were so many certificates; nothing may have failed.
    async fn end(self, what: &str, certificates: usize) {
        until("certificates", async || self.seen.lock().unwrap().certificates.len() >= certificates).await;
        self.seen.lock().unwrap().ends = true;
        self.task.await.unwrap();
        let answers = self.seen.lock().unwrap();
        let (all, failed) = (answers.all, &answers.failed);
        eprintln!(
            "{what}: {all} requests, {} certificates, {} failed",
            answers.certificates.len(),
            failed.len()
        );
        assert!(failed.is_empty(), "{} of {all} failed: {:?}", failed.len(), failed.first());
    }
}

fn count(process: &Process, what: &str) -> usize {
    process.stderr().matches(what).count()
}

async fn says(process: &Process, what: &str, times: usize) {
    until(what, async || count(process, what) >= times).await;
}

const RENEWED: &str = "a certificate came from the authority";

#[tokio::test]
async fn pa_05_two_sidecars_speak_mutual_tls_with_a_token_and_a_root() {
    let (place, app) = (Place::new(), Echo::start("reviews").await);
    let authority = place.serve(ANY, &[]);
    let ca = authority.address("ca");
    // What README.md says, but for the ports.
    let file = format!("{}/config/mutual-tls.yaml", env!("CARGO_MANIFEST_DIR"));
    let config = std::fs::read_to_string(file).unwrap();
    let server = place.sidecar("reviews", ca, &config, Some(app.addr));
    let endpoint = format!("{{http: {}}}", server.inbound().port());
    let client = place.sidecar("productpage", ca, &config.replace("{http: 15006}", &endpoint), None);
    server.is_ready().await;
    client.is_ready().await;
    let answer = get(client.outbound(), "reviews", "/").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let told = told(&answer);
    assert!(
        told.starts_with("By=spiffe://cluster.local/ns/default/sa/reviews;Hash=")
            && told.ends_with(";URI=spiffe://cluster.local/ns/default/sa/productpage"),
        "{told}"
    );
    assert_eq!(get(server.inbound(), "reviews", "/").await.status, 0, "plaintext is refused");
    let (_, ready) = client.readiness().await;
    assert_eq!(ready["identity"]["id"], "spiffe://cluster.local/ns/default/sa/productpage");
    assert_eq!((&ready["state"], &ready["identity"]["failures"]), (&Value::from("LIVE"), &Value::from(0)));
    let stats = get(client.process.address("admin"), "localhost", "/stats/prometheus").await.body;
    let left = stats.lines().find_map(|line| line.strip_prefix("mesh_cert_expiry_seconds "));
    let left: u32 = left.unwrap().parse().unwrap();
    assert!((86_000..=86_400).contains(&left), "{left}");

    // So does a gateway.
    let edge = "---\napiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: edge, namespace: default}\nspec:\n  selector: {istio: ingressgateway}\n  servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: edge, namespace: default}\nspec: {hosts: ['*'], gateways: [edge], http: [{route: [{destination: {host: reviews}}]}]}\n";
    place.0.write("edge.yaml", &format!("{}{edge}", config.replace("{http: 15006}", &endpoint)));
    let (token, file, url) = (place.token("edge", &[]), place.0.file("edge.yaml"), format!("https://{ca}"));
    let roots = place.roots();
    let args =
        ["--config", &file, "--bind", "127.0.0.1", "--map-port", "80=0", "--admin", ANY, "--workers", "1"];
    let ask = ["--service-account", "edge", "--ca", &url, "--ca-root", &roots, "--bootstrap-token", &token];
    let gateway = Process::start(GATEWAY, &[&args[..], &ask].concat());
    says(&gateway, RENEWED, 1).await;
    let answer = get(gateway.address("http"), "reviews", "/").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(self::told(&answer).ends_with("sa/edge"), "{answer:?}");

    // What an authority has is its own, and a token is nowhere but in its file.
    let mode = |path: PathBuf| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(place.state().into()), 0o700);
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(place.state()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(mode(entry.path()), 0o600, "{entry:?}");
        names.insert(entry.file_name().into_string().unwrap());
    }
    let expected = ["bootstrap-tokens", "root-cert.pem", "serving.lock", "state.json", "state.lock"];
    assert_eq!(names, expected.map(str::to_owned).into());
    let file = place.token("reviews", &[]);
    assert_eq!(mode(file.clone().into()), 0o600);
    let secret = std::fs::read_to_string(file).unwrap().trim().to_owned();
    let lines = std::fs::read_to_string(place.0.file("state/bootstrap-tokens")).unwrap();
    assert_eq!(lines.lines().count(), 4);
    for text in [lines, authority.stderr(), server.process.stderr(), client.process.stderr()] {
        assert!(!text.contains(&secret) && !text.contains("mesh-bootstrap-"), "{text}");
    }
}

#[tokio::test]
async fn d10_without_an_authority_nothing_is_let_through_and_then_everything_by_itself() {
    let (place, app) = (Place::new(), Echo::start("reviews").await);
    let authority = place.serve(ANY, &[]);
    let ca = authority.address("ca");
    drop(authority);
    let server = place.sidecar("reviews", ca, STRICT, Some(app.addr));
    let client = place.sidecar("productpage", ca, &services(server.inbound()), None);
    says(&client.process, "no certificate, and whatever needs one is refused", 1).await;
    let (status, ready) = client.readiness().await;
    assert_eq!((status, &ready["state"]), (503, &Value::from("INITIALIZING")));
    let error = ready["identity"]["last_error"].as_str().unwrap();
    assert!(error.contains("cannot connect to 127.0.0.1:"), "{error}");
    // The other ports everyone may ask, and they name neither the authority nor files.
    let health = get(client.process.address("health"), "localhost", "/healthz/ready").await;
    let health: Value = serde_json::from_str(&health.body).unwrap();
    assert_eq!(health["identity"]["last_error"], "cannot connect to the authority", "{health}");
    let answer = get(client.outbound(), "reviews", "/").await;
    assert_eq!(answer.status, 503, "{answer:?}");
    let log = client.dir.file("access.log");
    until("a line", async || std::fs::read_to_string(&log).is_ok_and(|log| log.contains(" 503 UF "))).await;
    assert_eq!(get(server.inbound(), "reviews", "/").await.status, 0);
    assert_eq!(app.requests(), 0);

    let _authority = place.serve(&ca.to_string(), &[]);
    server.is_ready().await;
    client.is_ready().await;
    until("an answer", async || get(client.outbound(), "reviews", "/").await.status == 200).await;
}

#[tokio::test]
async fn d1_certificates_of_seconds_are_renewed_under_traffic() {
    let (place, app) = (Place::new(), Echo::start("reviews").await);
    let authority = place.serve(ANY, &["--leaf-ttl", "5s"]);
    let ca = authority.address("ca");
    let server = place.sidecar("reviews", ca, STRICT, Some(app.addr));
    let client = place.sidecar("productpage", ca, &services(server.inbound()), None);
    server.is_ready().await;
    client.is_ready().await;
    let first = told(&get(client.outbound(), "kept", "/").await);
    let traffic = Traffic::start(client.outbound());
    says(&client.process, RENEWED, 4).await;
    says(&server.process, RENEWED, 4).await;
    // A connection outlives the certificate that it was made with.
    let kept = get(client.outbound(), "kept", "/").await;
    assert_eq!((kept.status, told(&kept)), (200, first));
    traffic.end("leaves", 4).await;
    // The first time by the token, and then by the certificate too; either is proof.
    says(&authority, "signed", 8).await;
}

#[tokio::test]
async fn d2_another_root_under_traffic() {
    let (place, app) = (Place::new(), Echo::start("reviews").await);
    let authority = place.serve(ANY, &["--leaf-ttl", "5s"]);
    let ca = authority.address("ca");
    let old = place.read_roots();
    let server = place.sidecar("reviews", ca, STRICT, Some(app.addr));
    let client = place.sidecar("productpage", ca, &services(server.inbound()), None);
    server.is_ready().await;
    client.is_ready().await;
    let traffic = Traffic::start(client.outbound());
    let rotated = place.run(&["rotate"]);
    assert!(rotated.status.success(), "{rotated:?}");
    let again = place.run(&["rotate"]);
    assert!(
        !again.status.success() && String::from_utf8_lossy(&again.stderr).contains("is not over"),
        "{again:?}"
    );
    says(&authority, "a new root is handed out", 1).await;
    let both = place.read_roots();
    assert!(both.starts_with(&old) && both.len() > old.len());
    says(&authority, "the new root signs", 1).await;
    says(&authority, "one root signs", 2).await;
    let new = place.read_roots();
    assert_eq!(format!("{old}{new}"), both);
    // Everybody has gone on to certificates of the new root, with it alone, and asked by it for the next one.
    let (at_server, at_client) = (count(&server.process, RENEWED), count(&client.process, RENEWED));
    says(&server.process, RENEWED, at_server + 1).await;
    says(&client.process, RENEWED, at_client + 1).await;
    traffic.end("roots", 4).await;
    // Whoever comes with the old root alone does not believe the new one, and says so.
    place.0.write("old.pem", &old);
    let token = place.token("late", &[]);
    let late =
        place.sidecar_with("late", ca, &services(server.inbound()), None, &token, &place.0.file("old.pem"));
    says(&late.process, "not of an authority that is trusted", 1).await;
    place.0.write("old.pem", &new);
    late.is_ready().await;
}

#[tokio::test]
async fn d10_an_authority_that_is_killed_and_comes_back_costs_no_request() {
    let (place, app) = (Place::new(), Echo::start("reviews").await);
    let authority = place.serve(ANY, &["--leaf-ttl", "10s"]);
    let ca = authority.address("ca");
    let roots = place.read_roots();
    let server = place.sidecar("reviews", ca, STRICT, Some(app.addr));
    let client = place.sidecar("productpage", ca, &services(server.inbound()), None);
    server.is_ready().await;
    client.is_ready().await;
    let traffic = Traffic::start(client.outbound());
    // Killed, not ended: what it signed has to be on disk already.
    drop(authority);
    // From now on the token is worth nothing: the certificate is proof.
    std::fs::write(place.0.file("state/bootstrap-tokens"), "").unwrap();
    says(&client.process, "is not renewed and stays", 2).await;
    let (_, ready) = client.readiness().await;
    assert_eq!(ready["state"], "LIVE", "{ready}");
    assert!(ready["identity"]["failures"].as_u64().unwrap() >= 2, "{ready}");
    let authority = place.serve(&ca.to_string(), &["--leaf-ttl", "10s"]);
    assert_eq!(place.read_roots(), roots, "the state survives");
    says(&client.process, RENEWED, 2).await;
    says(&server.process, RENEWED, 2).await;
    traffic.end("outage", 2).await;
    says(&authority, "proof=\"certificate\"", 1).await;
    // But who has lost its certificate needs a token that is good.
    let token = place.0.file("productpage.token");
    let late = place.sidecar_with("productpage", ca, "", None, &token, &place.roots());
    says(&late.process, "UNAUTHENTICATED: the bootstrap token is not known", 1).await;
    assert_eq!(late.readiness().await.0, 503);
    place.token("productpage", &[]);
    late.is_ready().await;
}

fn csr(id: &str) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

#[tokio::test]
async fn nobody_gets_what_is_not_its_own() {
    let place = Place::new();
    let authority = place.serve(ANY, &["--leaf-ttl", "1h"]);
    let address = authority.address("ca").to_string();
    let ask = async |token: &str, csr: &str| {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client = IstioCa::new(&address, token.into(), place.roots().into(), provider).unwrap();
        let nothing = Material::default();
        match client.sign(Question::new(csr, Duration::from_secs(3600), &nothing)).await {
            Ok(chain) => Ok(chain),
            Err(CaClientError::Refused(status)) => Err((status.code, status.message)),
            Err(other) => panic!("{other}"),
        }
    };
    let own = csr("spiffe://cluster.local/ns/default/sa/reviews");
    let token = place.token("reviews", &[]);
    assert_eq!(ask(&token, &own).await.unwrap().len(), 2);
    let other = csr("spiffe://cluster.local/ns/default/sa/ratings");
    let (code, message) = ask(&token, &other).await.unwrap_err();
    assert_eq!(code, Code::PermissionDenied);
    assert!(message.contains("sa/ratings") && message.contains("sa/reviews may be had"), "{message}");
    assert_eq!(ask(&token, "garbage").await.unwrap_err().0, Code::InvalidArgument);
    let long = ask(&token, &"x".repeat(64 * 1024)).await.unwrap_err();
    assert_eq!(long.0, Code::ResourceExhausted);

    place.0.write("wrong", "mesh-bootstrap-0000");
    let (code, message) = ask(&place.0.file("wrong"), &own).await.unwrap_err();
    assert_eq!(code, Code::Unauthenticated);
    assert!(message.contains("not known") && !message.contains("0000"), "{message}");
    let short = place.token("ratings", &["--ttl", "1s"]);
    until("the end of the token", async || {
        ask(&short, &other)
            .await
            .is_err_and(|(code, message)| code == Code::Unauthenticated && message.contains("has expired"))
    })
    .await;
    // A line that is taken away is refused at once.
    std::fs::write(place.0.file("state/bootstrap-tokens"), "").unwrap();
    assert_eq!(ask(&token, &own).await.unwrap_err().0, Code::Unauthenticated);
    // And a list that cannot be read is none: whoever wrote it may have ended any of them.
    let again = place.token("reviews", &[]);
    let lines = std::fs::read_to_string(place.0.file("state/bootstrap-tokens")).unwrap();
    assert!(ask(&again, &own).await.is_ok());
    std::fs::write(place.0.file("state/bootstrap-tokens"), format!("{lines}nonsense\n")).unwrap();
    assert_eq!(ask(&again, &own).await.unwrap_err().0, Code::Unavailable);
    says(&authority, "line 2", 1).await;
    std::fs::write(place.0.file("state/bootstrap-tokens"), &lines).unwrap();
    assert!(ask(&again, &own).await.is_ok());
    let list = place.0.file("state/bootstrap-tokens");
    let chmod = |mode| std::fs::set_permissions(&list, std::fs::Permissions::from_mode(mode)).unwrap();
    chmod(0o644);
    assert_eq!(ask(&again, &own).await.unwrap_err().0, Code::Unavailable);
    says(&authority, "`chmod 600`", 1).await;
    chmod(0o600);
    assert!(ask(&again, &own).await.is_ok());
    // Plaintext is reset before a byte of it is read.
    assert_eq!(get(authority.address("ca"), "ca", "/").await.status, 0);
}

/// What Istio's agent writes, by clients that we did not write.
#[test]
fn pa_05_a_foreign_client_is_served() {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !has("curl") {
        eprintln!("SKIPPED pa_05_a_foreign_client_is_served: there is no curl");
        return;
    }
    let place = Place::new();
    let authority = place.serve(ANY, &[]);
    let token = std::fs::read_to_string(place.token("reviews", &[])).unwrap();
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    // csr (1), validity_duration (3) of 600 s, and metadata (4) as Istio's agent sends it.
    let mut message = vec![0x0a, request.len() as u8 | 0x80, (request.len() >> 7) as u8];
    message.extend(request.bytes().chain(*b"\x18\xd8\x04\x22\x12\x0a\x10\x0a\x0aCertSigner\x12\x02\x1a\x00"));
    let body = [&[0], &(message.len() as u32).to_be_bytes()[..], &message].concat();
    std::fs::write(place.0.file("body"), body).unwrap();
    place.0.write("key.pem", &key.serialize_pem());
    let curl = |proof: &[&str]| {
        let url = format!(
            "https://{}/istio.v1.auth.IstioCertificateService/CreateCertificate",
            authority.address("ca")
        );
        let data = format!("@{}", place.0.file("body"));
        let output = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--include",
                "--http2",
                "--cacert",
                &place.roots(),
                "--data-binary",
            ])
            .args([
                &data,
                "-H",
                "content-type: application/grpc",
                "-H",
                "te: trailers",
                "-H",
                "clusterid: Kubernetes",
            ])
            .args(proof)
            .arg(&url)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let header = format!("authorization: Bearer {}", token.trim());
    let answer = curl(&["-H", &header]);
    assert!(answer.starts_with("HTTP/2 200") && answer.matches("BEGIN CERTIFICATE").count() == 2, "{answer}");
    let end = "-----END CERTIFICATE-----\n";
    let leaf = &answer[answer.find("-----BEGIN").unwrap()..=answer.find(end).unwrap() + end.len() - 1];
    place.0.write("leaf.pem", leaf);
    let (leaf, key) = (place.0.file("leaf.pem"), place.0.file("key.pem"));
    let again = curl(&["--cert", &leaf, "--key", &key]);
    assert_eq!(again.matches("BEGIN CERTIFICATE").count(), 2, "{again}");
    let refused = curl(&[]);
    assert!(refused.contains("grpc-status: 16") && !refused.contains("BEGIN"), "{refused}");
}

#[tokio::test]
async fn a_directory_is_one_authoritys_and_closed_to_others() {
    let place = Place::new();
    let nothing = place.run(&["rotate"]);
    assert!(
        !nothing.status.success()
            && String::from_utf8_lossy(&nothing.stderr).contains("run mesh-ca on it first")
    );
    let authority = place.serve(ANY, &[]);
    let fails = |args: &[&str], reason: &str| {
        let output = place.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(reason), "{stderr}");
    };
    fails(&["--listen", ANY], "another mesh-ca serves from this directory");
    drop(authority);
    fails(&["--listen", ANY, "--trust-domain", "example.org"], "is of the trust domain cluster.local");
    fails(&["token", "--service-account", "a/b"], "letters, digits");
    let open = |path: &str, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let file = place.0.file("state/state.json");
    open(&file, 0o640);
    fails(&["--listen", ANY], "chmod 600");
    open(&file, 0o600);
    open(&place.state(), 0o755);
    fails(&["--listen", ANY], "chmod 700");
    open(&place.state(), 0o700);
    place.0.write("state/state.json", "{");
    fails(&["--listen", ANY], "it is no JSON");
}

#[test]
fn bug_a_new_root_that_ended_within_the_overlap_was_made() {
    let place = Place::new();
    let authority = place.serve(ANY, &["--leaf-ttl", "1h"]);
    let short = place.run(&["rotate", "--root-ttl", "2h"]);
    let stderr = String::from_utf8_lossy(&short.stderr);
    assert!(!short.status.success() && stderr.contains("has to live for more than 7202s"), "{stderr}");
    drop(authority);
    assert!(place.run(&["rotate", "--root-ttl", "3h"]).status.success());
}

#[tokio::test]
async fn bug_whoever_held_the_lock_of_the_state_held_the_authority() {
    let place = Place::new();
    let mut authority = place.serve(ANY, &["--leaf-ttl", "1h"]);
    let address = authority.address("ca").to_string();
    let token = place.token("reviews", &[]);
    let held = std::fs::File::options().write(true).open(place.0.file("state/state.lock")).unwrap();
    held.lock().unwrap();
    // What is there for a look to do: the state has another time.
    let state = std::fs::File::options().write(true).open(place.0.file("state/state.json")).unwrap();
    state.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = IstioCa::new(&address, token.into(), place.roots().into(), provider).unwrap();
    let (nothing, own) = (Material::default(), csr("spiffe://cluster.local/ns/default/sa/reviews"));
    let ask = async || client.sign(Question::new(&own, Duration::from_secs(3600), &nothing)).await;
    ask().await.unwrap();
    says(&authority, "another process has held the lock", 1).await;
    ask().await.unwrap();
    authority.signal("TERM");
    let ended = tokio::time::timeout(Duration::from_secs(20), authority.wait()).await;
    assert!(ended.expect("it ends by itself").success());
    drop(held);
}

#[test]
fn flags_of_the_authority_go_together() {
    for (args, reason) in [
        (&["--ca", "https://ca:1"][..], "--bootstrap-token"),
        (&["--bootstrap-token", "x"], "--ca"),
        (&["--ca", "http://ca:1", "--bootstrap-token", "x", "--ca-root", "y"], "over TLS alone"),
        (&["--ca", "ca:1", "--bootstrap-token", "x", "--identity-dir", "."], "cannot be used with"),
    ] {
        let output =
            Command::new(SIDECAR).args(["--outbound", ANY, "--admin", ANY]).args(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(reason), "{stderr}");
    }
}
