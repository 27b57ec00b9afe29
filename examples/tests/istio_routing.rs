//! Istio's own routing tests, end to end through the binaries: the rows that need nothing of a later version.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::sync::Arc;

use http::{Request, Version};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::{ClientTls, Credential, CredentialFiles, Io, Spoken};
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::shared_data;
use mesh_testkit::upstream::Echo;
use mesh_tls::{Connector, Credentials, Materials};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// Rows that need what this version does not have, each with the reason.
const LATER: &[(&str, &str)] = &[
    (
        "serviceCases#2795~87",
        "endpoints of a selector come from EndpointSlices, which the row leaves to the cluster",
    ),
    ("consistentHashCases#3210~98", "consistent hashing"),
    ("consistentHashCases#3238~106", "consistent hashing"),
];

struct Answer {
    status: u16,
    location: Option<String>,
    saw: Value,
}

/// A stream to the proxy, in TLS where the row asks for HTTPS. Whose certificate is shown is not what the rows are about.
async fn connect(peer: SocketAddr, case: &Value, host: &str) -> Box<dyn Io> {
    let stream = TcpStream::connect(peer).await.unwrap();
    if case["request"]["port"]["Protocol"] != "HTTPS" {
        return Box::new(stream);
    }
    let tls = ClientTls {
        credential: Credential::Files(CredentialFiles::default()),
        sni: Some(host.to_owned()),
        host: host.to_owned(),
        insecure_skip_verify: true,
        ..ClientTls::default()
    };
    #[derive(Debug)]
    struct Nobody;
    impl Credentials for Nobody {
        fn find(&self, _: &Credential) -> Option<Materials> {
            Some(Materials::none())
        }
    }
    let connector = Connector::new(Materials::none(), provider()).credentials(Arc::new(Nobody));
    Box::new(connector.connect(stream, &tls, Spoken::Http1).await.unwrap())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The `cred` that rows name, and an upstream that speaks TLS with it in front of another.
async fn secured(upstream: SocketAddr) -> (SocketAddr, String) {
    let made = rcgen::generate_simple_self_signed(["b.ns.svc.cluster.local".to_owned()]).unwrap();
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![made.cert.der().clone()],
            PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut behind = TcpStream::connect(upstream).await.unwrap();
                // How it ends is the proxy's business.
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut behind).await;
            });
        }
    });
    let data = serde_json::json!({ "tls.crt": certificate, "tls.key": key });
    let secret = format!(
        "apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {{name: cred, namespace: ns}}\nstringData: {data}\n---\n"
    );
    (address, secret)
}

async fn send(peer: SocketAddr, case: &Value, host: &str) -> Answer {
    let request = &case["request"];
    let http2 = request["http2"] == true;
    let path = request["path"].as_str().unwrap_or("/");
    // A client does not send the fragment.
    let path = path.split('#').next().unwrap_or("/");
    let method = request["method"].as_str().unwrap_or("GET");
    let mut builder = Request::builder().method(method);
    builder = if http2 {
        builder.uri(format!("http://{host}{path}")).version(Version::HTTP_2)
    } else {
        builder.uri(path).header("host", host)
    };
    for (name, value) in request["headers"].as_object().into_iter().flatten() {
        builder = builder.header(name, value.as_str().unwrap());
    }
    let request = builder.body(Empty::<bytes::Bytes>::new()).unwrap();
    let stream = TokioIo::new(connect(peer, case, host).await);
    let response = if http2 {
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(request).await.unwrap()
    } else {
        let (mut sender, connection) = http1::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(request).await.unwrap()
    };
    let location = response.headers().get("location").map(|value| value.to_str().unwrap().to_owned());
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    Answer { status, location, saw: serde_json::from_slice(&body).unwrap_or(Value::Null) }
}

fn services(b: SocketAddr, secured: SocketAddr) -> String {
    let (port, secured) = (b.port(), secured.port());
    let mut yaml = String::new();
    for name in ["a", "b", "c"] {
        yaml.push_str(&format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: ns}}\nspec:\n  hosts: [{name}.ns.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports:\n  - {{number: 80, name: http, protocol: HTTP}}\n  - {{number: 81, name: auto-http}}\n  - {{number: 85, name: http2, protocol: HTTP2}}\n  - {{number: 443, name: https, protocol: HTTPS}}\n  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}, auto-http: {port}, http2: {port}, https: {secured}}}, labels: {{app: {name}, version: v1}}}}]\n---\n"
        ));
    }
    yaml
}

/// What does not hold of an answer.
fn unmet(expected: &Value, answer: &Answer, host: &str) -> Option<String> {
    let (key, value) = expected.as_object()?.iter().next()?;
    let header =
        |name: &str| answer.saw["headers"][name.to_ascii_lowercase()].as_str().unwrap_or("").to_owned();
    let holds = match key.as_str() {
        "status" => value == answer.status,
        "upstream_header" => {
            value.as_object()?.iter().all(|(name, value)| header(name) == value.as_str().unwrap_or(""))
        }
        "upstream_host" => answer.saw["host"] == *value,
        "upstream_url" => answer.saw["url"] == *value,
        "upstream_protocol" => answer.saw["protocol"] == *value,
        "redirect_location" => {
            let wanted = value.as_str()?.replace("{{.Hostname}}", host);
            answer.location.as_deref() == Some(wanted.as_str())
        }
        other => return Some(format!("an assertion that is not known: {other}")),
    };
    (!holds).then(|| {
        format!("{key}: expected {value}, got status {} {:?} {}", answer.status, answer.location, answer.saw)
    })
}

#[tokio::test]
async fn the_mechanical_rows_of_istios_routing_tests() {
    let Some(data) = shared_data("the_mechanical_rows_of_istios_routing_tests", "istio-routing") else {
        return;
    };
    let table: Value = serde_json::from_slice(&std::fs::read(data.join("open.json")).unwrap()).unwrap();
    let upstream = Echo::start("b").await;
    let (behind_tls, secret) = secured(upstream.addr).await;
    let (mut passed, mut later, mut failed) = (0, Vec::new(), Vec::new());
    for case in table["cases"].as_array().unwrap().iter().filter(|case| case["mechanical"] == true) {
        let id = case["id"].as_str().unwrap();
        if LATER.iter().any(|(row, _)| *row == id) || id.starts_with("jwtClaimRoute") {
            later.push(id.to_owned());
            continue;
        }
        let mut yaml = services(upstream.addr, behind_tls) + &secret;
        for document in case["config"].as_array().unwrap() {
            yaml.push_str(&document.to_string());
            yaml.push_str("\n---\n");
        }
        let dir = ConfigDir::new();
        dir.write("mesh.yaml", &yaml);
        let config = dir.file("mesh.yaml");
        let ingress = case["request"]["from"] == "ingress";
        let common = [
            "--config",
            &config,
            "--namespace",
            "ns",
            "--admin",
            "127.0.0.1:0",
            "--workers",
            "1",
            "--log",
            "error",
        ];
        let process = if ingress {
            let mut args = common.to_vec();
            args.extend(["--bind", "127.0.0.1", "--map-port", "80=0", "--map-port", "443=0"]);
            Process::start(env!("CARGO_BIN_EXE_gateway"), &args)
        } else {
            let mut args = common.to_vec();
            args.extend(["--outbound", "127.0.0.1:0"]);
            Process::start(env!("CARGO_BIN_EXE_sidecar"), &args)
        };
        let listener = match case["request"]["port"]["Protocol"].as_str() {
            Some("HTTPS") if ingress => "https",
            _ if ingress => "http",
            _ => "outbound",
        };
        let peer = process.address(listener);
        let host = case["request"]["host"].as_str().unwrap_or("b");
        let answer = send(peer, case, host).await;
        let unmet: Vec<_> = case["expect"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|expected| unmet(expected, &answer, host))
            .collect();
        if unmet.is_empty() {
            passed += 1;
        } else {
            failed.push(format!("{id}: {unmet:?}"));
        }
    }
    println!(
        "istio-routing: {passed} passed, {} failed, {} out of scope: {later:?}",
        failed.len(),
        later.len()
    );
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(passed > 0);
}
