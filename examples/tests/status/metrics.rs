//! Our metrics, and behind them the application's.

use std::net::SocketAddr;
use std::process::Command;

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mesh_testkit::process::Process;
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::upstream::{Ending, Recorder};
use tokio::net::{TcpListener, TcpStream};

use crate::{ANY, GATEWAY, SIDECAR, said, sidecar_with};

/// What is said of pages that do not come, or not whole.
const FAILED: &str = "the application's metrics are not all there: ";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PAGE: &str = "# TYPE app_things counter\napp_things_total 1\n";

fn annotations(port: u16) -> String {
    format!(
        "ISTIO_PROMETHEUS_ANNOTATIONS={{\"scrape\":\"true\",\"path\":\"/metrics?all\",\"port\":\"{port}\"}}"
    )
}

fn answer(headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\n{headers}content-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// The headers and the page of one scrape, which has to succeed.
async fn scrape(of: SocketAddr, path: &str, headers: &[(&str, &str)]) -> (HeaderMap, String) {
    let stream = TcpStream::connect(of).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = Request::get(path).header("host", "a");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    let headers = response.headers().clone();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (headers, String::from_utf8(body.to_vec()).unwrap())
}

/// A sidecar that scrapes an application which answers so, and one scrape of it.
async fn merged(answer: &[u8], close: Ending) -> (Process, String, String) {
    let app = Recorder::ending(answer, close).await;
    let sidecar = sidecar_with(&[&annotations(app.addr.port())]);
    let said = [("x-prometheus-scrape-timeout-seconds", "2")];
    let (headers, page) = scrape(sidecar.address("status"), "/stats/prometheus", &said).await;
    (sidecar, headers["content-type"].to_str().unwrap().to_owned(), page)
}

/// Our part of a page, which has to come first and whole.
fn own(page: &str) -> &str {
    assert!(page.starts_with("# HELP mesh_config_generation "), "{page}");
    assert!(!page.contains("\n\n"), "OpenMetrics has no empty lines: {page}");
    let last = page.rfind("mesh_").unwrap();
    &page[..=last + page[last..].find('\n').unwrap()]
}

/// How many pages of the application have failed, by our own metrics.
async fn failures(sidecar: &Process) -> u64 {
    let (_, page) = scrape(sidecar.address("admin"), "/stats/prometheus", &[]).await;
    let line = page.lines().find_map(|line| line.strip_prefix("mesh_application_scrape_failures_total "));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn pt_01_a_scrape_gets_our_metrics_and_then_the_applications() {
    let app = Recorder::start(&answer("content-type: text/plain\r\n", PAGE), true).await;
    let sidecar = sidecar_with(&[&annotations(app.addr.port())]);
    let status = sidecar.address("status");
    let proto =
        "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.7";
    let asked = [
        ("accept", format!("{proto},application/openmetrics-text;version=1.0.0;q=0.6,*/*;q=0.1")),
        ("user-agent", "Prometheus/3.0".to_owned()),
        ("x-prometheus-scrape-timeout-seconds", "7.5".to_owned()),
        ("authorization", "a secret".to_owned()),
    ];
    let asked: Vec<_> = asked.iter().map(|(name, value)| (*name, value.as_str())).collect();
    for path in ["/stats/prometheus", "/metrics"] {
        let (headers, page) = scrape(status, path, &asked).await;
        assert_eq!(headers["content-type"], TEXT);
        assert_eq!(page.strip_prefix(own(&page)).unwrap(), PAGE, "{path}");
    }
    let seen = String::from_utf8(app.connections().concat()).unwrap().to_ascii_lowercase();
    assert!(seen.starts_with("get /metrics?all http/1.1\r\n"), "{seen}");
    for header in [
        format!("host: localhost:{}", app.addr.port()),
        "accept: application/openmetrics-text;version=1.0.0;q=0.6,*/*;q=0.1".to_owned(),
        "user-agent: prometheus/3.0".to_owned(),
        "x-prometheus-scrape-timeout-seconds: 7.5".to_owned(),
    ] {
        assert!(seen.contains(&format!("\r\n{header}\r\n")), "{header}: {seen}");
    }
    assert!(!seen.contains("a secret"), "what is for us is not passed on: {seen}");
    // Elsewhere it is ours alone, and nobody asks the application.
    let (headers, page) = scrape(sidecar.address("admin"), "/stats/prometheus", &[]).await;
    assert_eq!(headers["content-type"], TEXT);
    assert_eq!(page, own(&page));
    assert_eq!(app.requests(), 2);
    assert_eq!(failures(&sidecar).await, 0);
}

#[tokio::test]
async fn pt_01_a_page_in_openmetrics_decides_the_format_of_the_whole() {
    let page = format!("{PAGE}# EOF\n");
    let open = answer("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n", &page);
    let (sidecar, content_type, merged) = merged(&open, Ending::Close).await;
    assert_eq!(content_type, OPEN);
    assert_eq!(merged.strip_prefix(own(&merged)).unwrap(), page);
    assert_eq!(failures(&sidecar).await, 0);
}

#[tokio::test]
async fn pt_01_an_application_that_fails_costs_its_own_metrics_only() {
    let short = "content-type: application/openmetrics-text\r\n";
    let broken = format!("HTTP/1.1 200 OK\r\n{short}content-length: 1000\r\n\r\n{PAGE}app_things_tot");
    let open = OPEN.replace("1.0.0", "0.0.1");
    for (answer, ending, expected, content_type, why) in [
        (
            b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno".to_vec(),
            Ending::Close,
            String::new(),
            TEXT,
            "500",
        ),
        (answer("content-encoding: gzip\r\n", PAGE), Ending::Close, String::new(), TEXT, "encoded as gzip"),
        (
            answer("content-type: application/vnd.google.protobuf; proto=a\r\n", PAGE),
            Ending::Close,
            String::new(),
            TEXT,
            "protobuf",
        ),
        (
            b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n".to_vec(),
            Ending::Close,
            String::new(),
            TEXT,
            "leads to elsewhere:80",
        ),
        // It breaks off, and it never comes to its end.
        (broken.clone().into_bytes(), Ending::Close, format!("{PAGE}# EOF\n"), &open, "end of file"),
        (broken.into_bytes(), Ending::Never, format!("{PAGE}# EOF\n"), &open, "not at its end in time"),
    ] {
        let (sidecar, its_type, page) = merged(&answer, ending).await;
        assert_eq!(page.strip_prefix(own(&page)).unwrap(), expected, "{why}");
        assert_eq!(its_type, content_type, "{why}");
        said(&sidecar, FAILED, why).await;
        assert_eq!(failures(&sidecar).await, 1, "{why}");
    }
}

#[tokio::test]
async fn pt_01_an_application_that_does_not_answer_leaves_the_scraper_time_for_ours() {
    let silent = TcpListener::bind(ANY).await.unwrap();
    let sidecar = sidecar_with(&[&annotations(silent.local_addr().unwrap().port())]);
    let waits = [("x-prometheus-scrape-timeout-seconds", "2")];
    let (_, page) = scrape(sidecar.address("status"), "/metrics", &waits).await;
    assert_eq!(page, own(&page));
    said(&sidecar, FAILED, "no answer within 1.8s").await;
}

#[tokio::test]
async fn pt_01_a_page_that_is_too_long_is_cut_at_a_line() {
    let line = format!("app_things{{name=\"{}\"}} 1\n", "x".repeat(1000));
    let page = line.repeat(64 * 1024 * 1024 / line.len() + 2);
    let (sidecar, _, merged) = merged(&answer("", &page), Ending::Close).await;
    let rest = merged.strip_prefix(own(&merged)).unwrap();
    assert!(rest.len() <= 64 * 1024 * 1024 && rest.len() > 63 * 1024 * 1024, "{}", rest.len());
    assert!(rest.ends_with(&line), "whole lines");
    assert_eq!(failures(&sidecar).await, 1);
}

#[tokio::test]
async fn pt_01_redirects_of_the_metrics_are_followed_at_the_same_port() {
    let app = Scripted::start("app", |seen| match seen.path.as_str() {
        "/metrics?all" => Reply::Headers(308, vec![("location", "metrics/")]),
        _ => Reply::Status(200),
    })
    .await;
    let sidecar = sidecar_with(&[&annotations(app.addr.port())]);
    let (_, page) = scrape(sidecar.address("status"), "/metrics", &[]).await;
    assert_eq!(page.strip_prefix(own(&page)).unwrap(), "app");
    assert_eq!(app.seen()[1].path, "/metrics/");
}

#[tokio::test]
async fn pt_01_nobody_is_scraped_unasked_and_behind_a_gateway_there_is_no_application() {
    let app = Recorder::start(&answer("", PAGE), true).await;
    let port = app.addr.port();
    let off = format!("ISTIO_PROMETHEUS_ANNOTATIONS={{\"scrape\":\"false\",\"port\":\"{port}\"}}");
    let ports = ["--bind", "127.0.0.1", "--admin", ANY, "--status", ANY];
    let gateway = Process::start("env", &[&[annotations(port).as_str(), GATEWAY], &ports[..]].concat());
    for process in [sidecar_with(&[]), sidecar_with(&[&off]), gateway] {
        let (headers, page) = scrape(process.address("status"), "/metrics", &[]).await;
        assert_eq!(page, own(&page));
        assert_eq!(headers["content-type"], TEXT);
    }
    assert_eq!(app.requests(), 0);
}

#[tokio::test]
async fn pt_01_annotations_that_cannot_be_meant_are_a_start_error() {
    // Refused before it is bound, so that it does not matter who has the port.
    let held = TcpListener::bind(ANY).await.unwrap();
    let (port, address) = (held.local_addr().unwrap().port(), held.local_addr().unwrap().to_string());
    let own = annotations(port);
    for (variable, flag, address, said) in [
        ("ISTIO_PROMETHEUS_ANNOTATIONS={\"port\":9090}", "--health", ANY, "9090 is not a string"),
        (&own, "--status", &address, "is our own and not the application's"),
        (&own, "--prometheus", &address, "is our own and not the application's"),
    ] {
        let (name, value) = variable.split_once('=').unwrap();
        let mut command = Command::new(SIDECAR);
        command.args(["--demo", "--outbound", ANY, "--admin", ANY, flag, address]).env(name, value);
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("ISTIO_PROMETHEUS_ANNOTATIONS: ") && told.contains(said), "{told}");
    }
}
