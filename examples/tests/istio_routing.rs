//! Istio's own routing tests, end to end through the binaries: the rows that need nothing of a later version.
//!
//! The rows leave two things to the cluster that they run in. Who is behind a Service with a selector is said here by
//! EndpointSlices, as Kubernetes' controller does. And of the rows that are not mechanical those are judged whose
//! expectation is clear in Go.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;

use http::{Request, Version};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::shared_data;
use mesh_testkit::upstream::Echo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// Rows that need what this version does not have, each with the reason.
const LATER: &[(&str, &str)] = &[
    ("gatewayCases#2392~80", "needs a secret, and an upstream in TLS, which nothing here makes yet"),
    ("trafficLoopCases#1748~54", "calls a pod's port 15001 through iptables"),
    ("trafficLoopCases#1748~55", "calls a pod's port 15006 through iptables"),
    ("autoPassthroughCases#1812~56", "the row has no request"),
    ("autoPassthroughCases#1812~57", "the row has no request"),
    ("autoPassthroughCases#1812~58", "the row has no request"),
    ("protocolSniffingCases#3449~116", "half a request of HTTP/1.0 to an original destination"),
    ("DNSTestCases#3787~131", "the DNS proxy"),
];

/// What the rows whose expectations are Go's expect.
const JUDGED: &[(&str, Judge)] = &[
    ("XFFGatewayCase#2504~83", |seen| {
        // Two proxies stand before the gateway of Istio's test.
        let header = |name: &str| seen[0].saw["headers"][name].as_str().unwrap_or("").to_owned();
        let forwarded = header("x-forwarded-for");
        let hops: Vec<_> = forwarded.split(',').map(str::trim).collect();
        header("x-envoy-external-address") == "72.9.5.6" && hops.len() == 4 && hops[1] == "72.9.5.6"
    }),
    ("externalNameCases#2917~91", |seen| seen[0].status == 200),
    ("consistentHashCases#3122~96", |seen| {
        !same_upstream(seen) && seen.iter().all(|answer| answer.status == 200)
    }),
    ("selfCallsCases#3290~110", |seen| {
        seen[0].status == 200 && seen[0].saw["headers"]["x-envoy-attempt-count"] == "1"
    }),
];

type Judge = fn(&[Answer]) -> bool;

struct Answer {
    status: u16,
    location: Option<String>,
    cookie: Option<String>,
    saw: Value,
}

fn same_upstream(answers: &[Answer]) -> bool {
    answers.windows(2).all(|pair| pair[0].saw["name"] == pair[1].saw["name"])
}

async fn send(peer: SocketAddr, case: &Value, host: &str, cookie: Option<&str>) -> Answer {
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
    if let Some(cookie) = cookie {
        builder = builder.header("cookie", cookie);
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
    let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    let location = header("location");
    let cookie = header("set-cookie").map(|made| made.split(';').next().unwrap_or("").to_owned());
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    Answer { status, location, cookie, saw: serde_json::from_slice(&body).unwrap_or(Value::Null) }
}

/// The applications of the topology, by name.
type Apps<'a> = [(&'a str, SocketAddr); 3];

fn services(apps: &Apps<'_>) -> String {
    let mut yaml = String::new();
    for (name, addr) in apps {
        let port = addr.port();
        yaml.push_str(&format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: ns}}\nspec:\n  hosts: [{name}.ns.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports:\n  - {{number: 80, name: http, protocol: HTTP}}\n  - {{number: 81, name: auto-http}}\n  - {{number: 85, name: http2, protocol: HTTP2}}\n  - {{number: 443, name: https, protocol: HTTPS}}\n  endpoints: [{{address: 127.0.0.1, ports: {{http: {port}, auto-http: {port}, http2: {port}, https: {port}}}, labels: {{app: {name}, version: v1}}}}]\n---\n"
        ));
    }
    yaml
}

/// The EndpointSlices of a Service with a selector, one for each application that it selects.
fn slices(document: &Value, apps: &Apps<'_>) -> String {
    let Some(selector) = document["spec"]["selector"].as_object().filter(|_| document["kind"] == "Service")
    else {
        return String::new();
    };
    let service = document["metadata"]["name"].as_str().unwrap();
    // Every application of the topology is of the class `standard`.
    let selected =
        |app: &str| selector.iter().all(|(key, value)| value == app && key == "app" || value == "standard");
    let ports = |port: u16| {
        let ports = document["spec"]["ports"].as_array().unwrap();
        let named = ports.iter().map(|named| format!("{{name: {}, port: {port}}}", named["name"]));
        named.collect::<Vec<_>>().join(", ")
    };
    apps.iter()
        .filter(|(app, _)| selected(app))
        .map(|(app, addr)| {
            format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {service}-{app}, namespace: ns, labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nendpoints: [{{addresses: [127.0.0.1]}}]\nports: [{}]\n---\n",
                ports(addr.port())
            )
        })
        .collect()
}

/// What Istio's test makes in Go of the row about forwarded addresses.
const XFF: &str = "apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: gateway, namespace: ns}
spec: {selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: b, namespace: ns}
spec: {hosts: [b.ns.svc.cluster.local], gateways: [gateway], http: [{route: [{destination: {host: b.ns.svc.cluster.local, port: {number: 80}}}]}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |-
    defaultConfig: {gatewayTopology: {numTrustedProxies: 2}}
---
";

/// What does not hold of an answer.
fn unmet(expected: &Value, answer: &Answer, host: &str) -> Option<String> {
    let (key, value) = expected.as_object()?.iter().next()?;
    let header =
        |name: &str| answer.saw["headers"][name.to_ascii_lowercase()].as_str().unwrap_or("").to_owned();
    let holds = match key.as_str() {
        "status" => value == answer.status,
        // Judged over all answers.
        "all_requests_same_upstream" => return None,
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
async fn the_rows_of_istios_routing_tests() {
    let Some(data) = shared_data("the_rows_of_istios_routing_tests", "istio-routing") else {
        return;
    };
    let table: Value = serde_json::from_slice(&std::fs::read(data.join("open.json")).unwrap()).unwrap();
    let echoes = [Echo::start("a").await, Echo::start("b").await, Echo::start("c").await];
    let apps = [("a", echoes[0].addr), ("b", echoes[1].addr), ("c", echoes[2].addr)];
    let (mut passed, mut later, mut failed) = (0, Vec::new(), Vec::new());
    for case in table["cases"].as_array().unwrap() {
        let id = case["id"].as_str().unwrap();
        let judge = JUDGED.iter().find(|(row, _)| *row == id).map(|(_, judge)| judge);
        if LATER.iter().any(|(row, _)| *row == id) || id.starts_with("jwtClaimRoute") {
            later.push(id.to_owned());
            continue;
        }
        assert!(case["mechanical"] == true || judge.is_some(), "nobody judges {id}");
        let answers = answers(case, id, &apps).await;
        let host = case["request"]["host"].as_str().unwrap_or("b");
        let expected = || case["expect"].as_array().unwrap().iter().filter(|_| judge.is_none());
        let mut unmet: Vec<_> = answers
            .iter()
            .flat_map(|answer| expected().filter_map(|expected| unmet(expected, answer, host)))
            .collect();
        if expected().any(|expected| expected["all_requests_same_upstream"] == true)
            && !same_upstream(&answers)
        {
            unmet.push("several upstreams answered".to_owned());
        }
        if judge.is_some_and(|judge| !judge(&answers)) {
            unmet.push(format!("judged: {} {}", answers[0].status, answers[0].saw));
        }
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

/// The answers to the requests of a row, which carry the cookie that one before was given.
async fn answers(case: &Value, id: &str, apps: &Apps<'_>) -> Vec<Answer> {
    let is_xff = id.starts_with("XFF");
    let mut yaml = services(apps) + if is_xff { XFF } else { "" };
    for document in case["config"].as_array().into_iter().flatten() {
        yaml.push_str(&format!("{document}\n---\n{}", slices(document, apps)));
    }
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &yaml);
    let config = dir.file("mesh.yaml");
    let ingress = is_xff || case["request"]["from"] == "ingress";
    let mut args = vec!["--config", &config, "--namespace", "ns", "--admin", "127.0.0.1:0"];
    args.extend(["--workers", "1", "--log", "error"]);
    let process = if ingress {
        args.extend(["--bind", "127.0.0.1", "--map-port", "80=0"]);
        Process::start(env!("CARGO_BIN_EXE_gateway"), &args)
    } else {
        args.extend(["--outbound", "127.0.0.1:0"]);
        Process::start(env!("CARGO_BIN_EXE_sidecar"), &args)
    };
    let peer = process.address(if ingress { "http" } else { "outbound" });
    let mut case = case.clone();
    let mut host =
        case["request"]["host"].as_str().or(case["request"]["address"].as_str()).unwrap_or("b").to_owned();
    if is_xff {
        host = "b.ns.svc.cluster.local".to_owned();
        case["request"]["headers"] = json!({"x-forwarded-for": "56.5.6.7, 72.9.5.6, 98.1.2.3"});
    }
    if id.starts_with("externalName") {
        host = "b-ext-no-port".to_owned();
    }
    let mut answers: Vec<Answer> = Vec::new();
    for _ in 0..case["request"]["count"].as_u64().unwrap_or(1) {
        let cookie = answers.iter().find_map(|answer| answer.cookie.clone());
        answers.push(send(peer, &case, &host, cookie.as_deref()).await);
    }
    answers
}
