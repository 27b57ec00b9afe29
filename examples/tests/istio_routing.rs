//! Istio's own routing tests, end to end through the binaries: the rows that need nothing of a later version.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;

use http::{Request, Version};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::shared_data;
use mesh_testkit::upstream::Echo;
use serde_json::Value;
use tokio::net::TcpStream;

/// Rows that need what this version does not have, each with the reason.
const LATER: &[(&str, &str)] = &[
    ("gatewayCases#2392~80", "TLS at the gateway"),
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
    let stream = TokioIo::new(TcpStream::connect(peer).await.unwrap());
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

fn services(b: SocketAddr) -> String {
    let port = b.port();
    let mut yaml = String::new();
    for name in ["a", "b", "c"] {
        yaml.push_str(&format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: ns}}\nspec:\n  hosts: [{name}.ns.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports:\n  - {{number: 80, name: http, protocol: HTTP}}\n  - {{number: 81, name: auto-http}}\n  - {{number: 85, name: http2, protocol: HTTP2}}\n  - {{number: 443, name: https, protocol: HTTPS}}\n  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}, auto-http: {port}, http2: {port}, https: {port}}}, labels: {{app: {name}, version: v1}}}}]\n---\n"
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
    let (mut passed, mut later, mut failed) = (0, Vec::new(), Vec::new());
    for case in table["cases"].as_array().unwrap().iter().filter(|case| case["mechanical"] == true) {
        let id = case["id"].as_str().unwrap();
        if LATER.iter().any(|(row, _)| *row == id) || id.starts_with("jwtClaimRoute") {
            later.push(id.to_owned());
            continue;
        }
        let mut yaml = services(upstream.addr);
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
            args.extend(["--bind", "127.0.0.1", "--map-port", "80=0"]);
            Process::start(env!("CARGO_BIN_EXE_gateway"), &args)
        } else {
            let mut args = common.to_vec();
            args.extend(["--outbound", "127.0.0.1:0"]);
            Process::start(env!("CARGO_BIN_EXE_sidecar"), &args)
        };
        let peer = process.address(if ingress { "http" } else { "outbound" });
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
