//! Raw messages against the gateway: what is refused, and that what is forwarded has one reading (E1, E3, E4, E6, E7).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::time::Duration;

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{Answer, counted, exchange};
use mesh_testkit::upstream::Recorder;
use mesh_testkit::{shared_data, until};
use serde_json::Value;

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");

/// How long a proxy may be silent before its answer counts as whole.
const SILENCE: Duration = Duration::from_millis(150);

/// The answer to a message that is answered in any case, however busy the machine is.
async fn answer_to(address: SocketAddr, message: &[u8]) -> Answer {
    for silence in [SILENCE, Duration::from_secs(2)] {
        let answer = exchange(address, message, silence).await;
        if !answer.statuses().is_empty() {
            return answer;
        }
    }
    exchange(address, message, Duration::from_secs(10)).await
}

fn gateway(upstream: SocketAddr) -> (Process, ConfigDir) {
    let dir = ConfigDir::new();
    dir.write(
        "mesh.yaml",
        &format!(
            "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: edge}}
spec: {{servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ['*']}}]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: edge}}
spec: {{hosts: ['*'], gateways: [edge], http: [{{route: [{{destination: {{host: app.example}}}}]}}]}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: app}}
spec:
  hosts: [app.example]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: {}, ports: {{http: {}}}}}]
",
            upstream.ip(),
            upstream.port()
        ),
    );
    let process = Process::start(
        GATEWAY,
        &[
            "--config",
            &dir.file("mesh.yaml"),
            "--bind",
            "127.0.0.1",
            "--map-port",
            "80=0",
            "--admin",
            "127.0.0.1:0",
            "--workers",
            "1",
            "--log",
            "error",
        ],
    );
    (process, dir)
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn e1_probes_of_what_hyper_accepts() {
    let upstream = Recorder::start(OK, false).await;
    let (gateway, _dir) = gateway(upstream.addr);
    let address = gateway.address("http");
    for (name, message, status) in [
        ("no host", "GET / HTTP/1.1\r\n\r\n", 400),
        ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("userinfo", "GET / HTTP/1.1\r\nHost: a@b/c\r\n\r\n", 400),
        ("underscore", "GET / HTTP/1.1\r\nHost: a\r\nX_A: 1\r\nX-A: 2\r\n\r\n", 400),
        ("NUL", "GET /a%00b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("no slash", "GET admin HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("star", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("options star", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        ("lower method", "get / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (
            "two codings",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            501,
        ),
        ("connect", "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", 405),
        (
            "both framings",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            200,
        ),
        (
            "same lengths",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nab",
            200,
        ),
        (
            "other lengths",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
            400,
        ),
        ("1.0", "GET / HTTP/1.0\r\n\r\n", 200),
        (
            "h2c upgrade",
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
            200,
        ),
        ("backslash", "GET /a\\b HTTP/1.1\r\nHost: a\r\n\r\n", 200),
    ] {
        let answer = answer_to(address, message.as_bytes()).await;
        assert_eq!(
            answer.statuses().first(),
            Some(&status),
            "{name}: {}",
            String::from_utf8_lossy(&answer.bytes)
        );
    }
    let sent: Vec<u8> = upstream.connections().concat();
    let sent = String::from_utf8_lossy(&sent).to_ascii_lowercase();
    for never in ["http2-settings", "upgrade:", "keep-alive", "x_a", "\\"] {
        assert!(!sent.contains(never), "{never} was forwarded: {sent}");
    }
}

/// A proxy says its own version (RFC 9110, 2.5). As HTTP/1.0 the answer ended the connection of a client of HTTP/1.1.
#[tokio::test]
async fn an_upstream_of_http_1_0_does_not_make_the_answer_one_of_http_1_0() {
    let upstream = Recorder::start(b"HTTP/1.0 200 OK\r\n\r\nok", true).await;
    let (gateway, _dir) = gateway(upstream.addr);
    let twice = b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = exchange(gateway.address("http"), twice, Duration::from_secs(10)).await;
    let text = String::from_utf8_lossy(&answer.bytes);
    assert_eq!(text.matches("HTTP/1.1 200").count(), 2, "{text}");
    assert_eq!(text.matches("2\r\nok\r\n0\r\n").count(), 2, "{text}");
    let old = exchange(gateway.address("http"), b"GET / HTTP/1.0\r\n\r\n", Duration::from_secs(10)).await;
    let text = String::from_utf8_lossy(&old.bytes);
    assert!(text.starts_with("HTTP/1.0 200") && text.ends_with("\r\n\r\nok"), "{text}");
}

#[tokio::test]
async fn e1_a_matrix_of_framings_has_one_reading() {
    let upstream = Recorder::start(OK, false).await;
    let (gateway, _dir) = gateway(upstream.addr);
    let address = gateway.address("http");
    let lengths = [
        "",
        "Content-Length: 0\r\n",
        "Content-Length: 6\r\n",
        "Content-Length: +6\r\n",
        "Content-Length: 6, 6\r\n",
        "Content-Length : 6\r\n",
        "Content-Length: 0x6\r\n",
        "Content-Length: -1\r\n",
    ];
    let codings = [
        "",
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding:\x0bchunked\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "transfer-encoding: CHUNKED\r\n",
        "Transfer-Encoding: identity\r\n",
        "X: a\r\n\tTransfer-Encoding: chunked\r\n",
    ];
    let bodies =
        ["", "0\r\n\r\n", "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", "6\r\nabcdef\r\n0\r\n\r\n"];
    let mut count = 0;
    for length in lengths {
        for coding in codings {
            for body in bodies {
                let message = format!("POST /first HTTP/1.1\r\nHost: a\r\n{length}{coding}\r\n{body}");
                let (forwarded, answered) = counted(address, &upstream, message.as_bytes()).await;
                assert!(forwarded <= answered, "{forwarded} forwarded, {answered} answered: {message:?}");
                let sent = upstream.connections();
                assert!(!sent.iter().any(|bytes| has_both_framings(bytes)), "{sent:?}: {message:?}");
                count += 1;
            }
        }
    }
    println!("e1: {count} framings");
    assert!(count >= 300);
}

#[tokio::test]
async fn e3_nothing_follows_an_upgrade_before_101() {
    let message = b"GET /first HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let forbidden = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n";
    // Refused, answered as if nothing had been asked, and not answered at all.
    for (answers, silence) in [(&forbidden[..], 10_000), (OK, 10_000), (b"", 500)] {
        let upstream = Recorder::start(answers, false).await;
        let (gateway, _dir) = gateway(upstream.addr);
        let answer = exchange(gateway.address("http"), message, Duration::from_millis(silence)).await;
        let sent = upstream.connections().concat();
        let first = sent.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
        let rest = String::from_utf8_lossy(&sent[first..]).into_owned();
        // What comes after it is the next request, once the first one has its answer, or nothing.
        let next = !answers.is_empty() && rest.starts_with("GET /smuggled HTTP/1.1\r\n");
        assert!(rest.is_empty() || next, "{rest}");
        assert!(upstream.requests() <= answer.statuses().len().max(1));
    }
}

#[tokio::test]
async fn e4_a_connection_with_an_unread_body_is_not_used_again() {
    // An upstream that answers at the end of the head, whatever body there is to come.
    let upstream = Recorder::start(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n", true).await;
    let (gateway, _dir) = gateway(upstream.addr);
    let address = gateway.address("http");
    for _ in 0..20 {
        let message =
            format!("POST /big HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{}", "x".repeat(100_000));
        let answer = exchange(address, message.as_bytes(), SILENCE).await;
        assert!(matches!(answer.statuses().first(), Some(413 | 503) | None), "{:?}", answer.statuses());
        for bytes in upstream.connections() {
            let heads = bytes.windows(5).filter(|head| head == b"POST ").count();
            assert!(heads <= 1, "a second request on a connection with an unread body");
        }
    }
}

#[tokio::test]
async fn e7_hop_by_hop_names_do_not_remove_what_the_edge_adds() {
    let upstream = Recorder::start(OK, false).await;
    let (gateway, _dir) = gateway(upstream.addr);
    let message = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x-forwarded-for, x-request-id, authorization, x-envoy-external-address\r\nAuthorization: secret\r\nX-Forwarded-Client-Cert: forged\r\n\r\n";
    let answer = answer_to(gateway.address("http"), message).await;
    assert_eq!(answer.statuses(), [200]);
    let sent = String::from_utf8_lossy(&upstream.connections().concat()).to_ascii_lowercase();
    assert!(!sent.contains("secret") && !sent.contains("forged"));
    for added in ["x-forwarded-for: 127.0.0.1", "x-request-id: ", "x-envoy-external-address: 127.0.0.1"] {
        assert!(sent.contains(added), "{added} is missing: {sent}");
    }
}

/// Whether a message has a length and a coding: two readers may take it differently.
fn has_both_framings(message: &[u8]) -> bool {
    let text = String::from_utf8_lossy(message).to_ascii_lowercase();
    let head = text.split("\r\n\r\n").next().unwrap_or_default();
    head.contains("\r\ncontent-length:") && head.contains("\r\ntransfer-encoding:")
}

#[tokio::test]
async fn the_wire_table_of_requests() {
    let Some(data) = shared_data("the_wire_table_of_requests", "http1-wire") else { return };
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(data.join("open.json")).unwrap()).unwrap();
    let upstream = Recorder::start(OK, false).await;
    let (gateway, _dir) = gateway(upstream.addr);
    let address = gateway.address("http");
    let (mut passed, mut failed) = (0, Vec::new());
    for case in cases.iter().filter(|case| case["direction"] == "request") {
        let id = case["id"].as_str().unwrap();
        let bytes = base64(case["request_base64"].as_str().unwrap());
        let (forwarded, answered) = counted(address, &upstream, &bytes).await;
        let ambiguous = upstream.connections().iter().any(|bytes| has_both_framings(bytes));
        if forwarded <= answered && !ambiguous {
            passed += 1;
        } else {
            failed.push(format!(
                "{id}: {forwarded} forwarded, {answered} answered, both framings: {ambiguous}"
            ));
        }
    }
    println!("http1-wire requests: {passed} passed, {} failed", failed.len());
    assert!(failed.is_empty(), "{failed:#?}");
    until("a healthy gateway", async || {
        exchange(address, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", SILENCE).await.statuses() == [200]
    })
    .await;
}

#[tokio::test]
async fn the_wire_table_of_responses() {
    let Some(data) = shared_data("the_wire_table_of_responses", "http1-wire") else { return };
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(data.join("open.json")).unwrap()).unwrap();
    let mut passed = 0;
    for case in cases.iter().filter(|case| case["direction"] == "response") {
        let bytes = base64(case["request_base64"].as_str().unwrap());
        let upstream = Recorder::start(&bytes, true).await;
        let (gateway, _dir) = gateway(upstream.addr);
        let address = gateway.address("http");
        let both =
            b"GET /one HTTP/1.1\r\nHost: a\r\n\r\nGET /two HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let answer = exchange(address, both, Duration::from_millis(100)).await;
        let text = String::from_utf8_lossy(&answer.bytes).to_ascii_lowercase();
        for head in text.split("http/1.1 ").skip(1) {
            assert!(!has_both_framings(head.as_bytes()), "{}: both framings: {head}", case["id"]);
        }
        assert!(answer.statuses().len() <= 2, "{}: more responses than requests: {text}", case["id"]);
        passed += 1;
    }
    println!("http1-wire responses: {passed} passed, 0 failed");
}

fn base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut bytes = Vec::new();
    let mut bits = (0_u32, 0);
    for digit in text.bytes().filter_map(value) {
        bits = (bits.0 << 6 | u32::from(digit), bits.1 + 6);
        if bits.1 >= 8 {
            bits.1 -= 8;
            bytes.push((bits.0 >> bits.1) as u8);
        }
    }
    bytes
}
