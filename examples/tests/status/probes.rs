//! Probes of the application.

use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mesh_testkit::process::Process;
use mesh_testkit::raw::{exchange, get};
use mesh_testkit::scripted::{Reply, Script, Scripted, Seen};
use mesh_testkit::upstream::Recorder;
use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::{ANY, PORTS, SIDECAR, said, sidecar_with};

/// A sidecar with these probers, by container.
fn probing(probers: &[(&str, String)]) -> Process {
    let probers: Vec<_> =
        probers.iter().map(|(name, prober)| format!("\"/app-health/{name}/livez\":{prober}")).collect();
    sidecar_with(&[&format!("ISTIO_KUBE_APP_PROBERS={{{}}}", probers.join(","))])
}

async fn probe(sidecar: &Process, name: &str) -> (u16, String) {
    get(sidecar.address("status"), "a", &format!("/app-health/{name}/livez")).await
}

/// An application behind TLS.
struct TlsApp {
    port: u16,
    script: Script,
    serving: JoinHandle<()>,
}

impl TlsApp {
    /// Speaks what of `alpn` it agrees to; its certificate is one that no verifier takes or even reads: of nobody known,
    /// for another name, long expired, and with a critical extension that means nothing.
    async fn start(alpn: &[&str], script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let mut params = CertificateParams::new(vec!["elsewhere.example".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
        extension.set_criticality(true);
        params.custom_extensions.push(extension);
        let key = KeyPair::generate().unwrap();
        let chain = vec![params.self_signed(&key).unwrap().der().clone()];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let provider = aws_lc_rs::default_provider();
        let key = provider.key_provider.load_private_key(key).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key))));
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(ANY).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let script = Script::new("tls", script);
        let serve = script.clone();
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, script) = (acceptor.clone(), serve.clone());
                tokio::spawn(async move {
                    let stream = acceptor.accept(stream).await.unwrap();
                    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    script.serve(stream, http2).await;
                });
            }
        });
        Self { port, script, serving }
    }
}

impl Drop for TlsApp {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn http(port: u16) -> String {
    format!("{{\"httpGet\":{{\"port\":{port}}},\"timeoutSeconds\":5}}")
}

fn https(port: u16) -> String {
    format!(
        "{{\"httpGet\":{{\"port\":{port},\"scheme\":\"HTTPS\",\"path\":\"/well\"}},\"timeoutSeconds\":5}}"
    )
}

fn grpc(port: u16, service: &str) -> String {
    format!("{{\"grpc\":{{\"port\":{port},\"service\":{service}}},\"timeoutSeconds\":5}}")
}

#[tokio::test]
async fn pt_01_probes_are_asked_of_the_application_and_its_answer_is_passed_on() {
    let up = Recorder::start(b"HTTP/1.1 204 No Content\r\n\r\n", true).await;
    let down = Recorder::start(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy", true).await;
    let long = [&b"HTTP/1.1 200 OK\r\ncontent-length: 20000\r\n\r\n"[..], &[b'x'; 20_000]].concat();
    let long = Recorder::start(&long, true).await;
    // It accepts, and never answers.
    let silent = TcpListener::bind(ANY).await.unwrap();
    let (up_port, silent_port) = (up.addr.port(), silent.local_addr().unwrap().port());
    let refused = std::net::TcpListener::bind(ANY).unwrap().local_addr().unwrap().port();
    let sidecar = probing(&[
        (
            "up",
            format!(
                r#"{{"httpGet":{{"path":"well?a=b","port":{up_port},"scheme":"HTTP","httpHeaders":[{{"name":"x-probe","value":"yes"}}]}},"timeoutSeconds":5}}"#
            ),
        ),
        ("down", http(down.addr.port())),
        ("long", http(long.addr.port())),
        ("silent", format!("{{\"httpGet\":{{\"port\":{silent_port}}},\"timeoutSeconds\":1}}")),
        ("refused", http(refused)),
        ("tcp", format!("{{\"tcpSocket\":{{\"port\":{silent_port}}}}}")),
        ("closed", format!("{{\"tcpSocket\":{{\"port\":{refused}}}}}")),
    ]);
    let status = sidecar.address("status");
    let request = format!(
        "GET /app-health/up/livez HTTP/1.1\r\nhost: pod.example:{}\r\nuser-agent: kube-probe/1.31\r\nconnection: close\r\n\r\n",
        status.port()
    );
    let answer = exchange(status, request.as_bytes(), Duration::from_secs(5)).await;
    assert_eq!(answer.statuses(), [204]);
    let seen = String::from_utf8(up.connections().concat()).unwrap().to_ascii_lowercase();
    assert!(seen.starts_with("get /well?a=b http/1.1\r\n"), "{seen}");
    for header in
        [format!("host: pod.example:{up_port}"), "user-agent: kube-probe/1.31".into(), "x-probe: yes".into()]
    {
        assert!(seen.contains(&format!("\r\n{header}\r\n")), "{header}: {seen}");
    }
    assert_eq!(probe(&sidecar, "down").await, (503, "busy".to_owned()));
    let (status_of_long, body) = probe(&sidecar, "long").await;
    assert_eq!((status_of_long, body), (200, "x".repeat(10 * 1024)), "the first 10 KiB");
    assert_eq!(probe(&sidecar, "tcp").await.0, 200);
    let (_, from) = silent.accept().await.unwrap();
    assert_eq!(from.ip().to_string(), "127.0.0.6", "what iptables does not redirect");
    for (name, expected) in [("silent", 500), ("refused", 500), ("closed", 500), ("unknown", 400)] {
        assert_eq!(probe(&sidecar, name).await.0, expected, "{name}");
    }
    assert_eq!(get(status, "a", "/app-health/up/readyz").await.0, 400);
    said(&sidecar, "/app-health/silent/livez: ", "no answer within 1s").await;
    assert_eq!(get(sidecar.address("admin"), "a", "/app-health/up/livez").await.0, 404, "not on this port");
}

#[tokio::test]
async fn pt_01_a_probe_goes_to_the_address_of_the_pod() {
    let pod = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = pod.local_addr().unwrap().port();
    let probers = format!("{{\"/app-health/pod/livez\":{{\"tcpSocket\":{{\"port\":{port}}}}}}}");
    let variables = ["INSTANCE_IP=127.0.0.2", &format!("ISTIO_KUBE_APP_PROBERS={probers}")];
    let sidecar = sidecar_with(&variables);
    assert_eq!(probe(&sidecar, "pod").await.0, 200);
    assert_eq!(pod.accept().await.unwrap().0.local_addr().unwrap().ip().to_string(), "127.0.0.2");
}

#[tokio::test]
async fn pt_01_redirects_are_followed_as_the_kubelet_does() {
    let moved = Recorder::start(
        b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n",
        true,
    )
    .await;
    let around =
        Recorder::start(b"HTTP/1.1 302 Found\r\nlocation: /again\r\ncontent-length: 0\r\n\r\n", true).await;
    let choice = Recorder::start(
        b"HTTP/1.1 300 Multiple Choices\r\nlocation: /again\r\ncontent-length: 0\r\n\r\n",
        true,
    )
    .await;
    let unreadable =
        Recorder::start(b"HTTP/1.1 302 Found\r\nlocation: http://a b/\r\ncontent-length: 0\r\n\r\n", true)
            .await;
    let relative = Scripted::start("relative", |seen| match seen.path.as_str() {
        "/a/well" => Reply::Headers(302, vec![("location", "again?x=y")]),
        "/a/again?x=y" => Reply::Status(418),
        _ => Reply::Status(404),
    })
    .await;
    let tls = TlsApp::start(&["h2"], |_| Reply::Status(418)).await;
    let location: &'static str = format!("https://127.0.0.1:{}/", tls.port).leak();
    let to_tls = Scripted::start("to-tls", |_| Reply::Headers(308, vec![("location", location)])).await;
    let sidecar = probing(&[
        ("moved", http(moved.addr.port())),
        ("around", http(around.addr.port())),
        ("choice", http(choice.addr.port())),
        ("unreadable", http(unreadable.addr.port())),
        (
            "relative",
            format!(
                "{{\"httpGet\":{{\"port\":{},\"path\":\"/a/well\"}},\"timeoutSeconds\":5}}",
                relative.addr.port()
            ),
        ),
        ("to-tls", http(to_tls.addr.port())),
    ]);
    for (name, expected) in [
        ("moved", 200),
        ("around", 500),
        ("choice", 200),
        ("unreadable", 500),
        ("relative", 418),
        ("to-tls", 418),
    ] {
        assert_eq!(probe(&sidecar, name).await.0, expected, "{name}: {}", sidecar.stderr());
    }
    assert_eq!(around.requests(), 10, "with those that redirects lead to");
    assert_eq!(choice.requests(), 1);
    let hosts: Vec<_> = relative.seen().iter().map(|seen| seen.header("host").map(str::to_owned)).collect();
    assert_eq!(
        hosts,
        [Some("a".to_owned()), Some("a".to_owned())],
        "a relative one keeps the kubelet's host"
    );
    assert_eq!(tls.script.requests(), 1);
}

#[tokio::test]
async fn pt_01_bug_redirects_of_probes_took_the_callers_headers_anywhere_in_the_pod() {
    let other = Scripted::start("other", |_| Reply::Status(418)).await;
    let to_other: &'static str = format!("http://127.0.0.1:{}/", other.addr.port()).leak();
    let moved = Scripted::start("moved", |seen| match seen.path.as_str() {
        "/" => Reply::Headers(302, vec![("location", "/here")]),
        _ => Reply::Headers(302, vec![("location", to_other)]),
    })
    .await;
    let secure = TlsApp::start(&["h2"], |_| Reply::Headers(302, vec![("location", to_other)])).await;
    let headers = r#"[{"name":"x-probe","value":"one"},{"name":"x-probe","value":"two"}]"#;
    let prober = |port: u16, scheme: &str| {
        format!(
            r#"{{"httpGet":{{"port":{port},"scheme":"{scheme}","httpHeaders":{headers}}},"timeoutSeconds":5}}"#
        )
    };
    let sidecar =
        probing(&[("moved", prober(moved.addr.port(), "HTTP")), ("secure", prober(secure.port, "HTTPS"))]);
    for name in ["moved", "secure"] {
        let request = format!(
            "GET /app-health/{name}/livez HTTP/1.1\r\nhost: a\r\nuser-agent: kube-probe/1.31\r\nauthorization: secret\r\nx-forwarded-for: 10.0.0.1\r\nconnection: close\r\n\r\n"
        );
        let answer = exchange(sidecar.address("status"), request.as_bytes(), Duration::from_secs(5)).await;
        assert_eq!(answer.statuses(), [418], "{name}: {}", sidecar.stderr());
    }
    let probes = |seen: &Seen| seen.headers.get_all("x-probe").iter().cloned().collect::<Vec<_>>();
    for seen in moved.seen().iter().chain(&secure.script.seen()) {
        assert_eq!(seen.header("authorization"), Some("secret"), "at the place that is probed they go along");
        assert_eq!(probes(seen), ["one", "two"], "both");
    }
    assert_eq!((moved.requests(), other.requests()), (2, 2));
    for seen in other.seen() {
        assert_eq!([seen.header("authorization"), seen.header("x-forwarded-for")], [None, None]);
        assert_eq!(seen.header("user-agent"), Some("kube-probe/1.31"));
        assert_eq!(probes(&seen), ["one", "two"]);
    }
}

#[tokio::test]
async fn pt_01_bug_redirects_of_probes_reached_our_own_ports() {
    // They are known only after the application's.
    let own = Arc::new(OnceLock::<[u16; 3]>::new());
    let known = Arc::clone(&own);
    let app = Scripted::start("app", move |seen| {
        let port = known.get().unwrap()[seen.path[1..].parse::<usize>().unwrap()];
        let location: &'static str = format!("http://127.0.0.1:{port}/ready").leak();
        Reply::Headers(302, vec![("location", location)])
    })
    .await;
    let prober = |at: usize| format!(r#"{{"httpGet":{{"port":{},"path":"/{at}"}}}}"#, app.addr.port());
    let sidecar = probing(&[("0", prober(0)), ("1", prober(1)), ("2", prober(2))]);
    own.set(["admin", "status", "outbound"].map(|name| sidecar.address(name).port())).unwrap();
    for name in ["0", "1", "2"] {
        assert_eq!(probe(&sidecar, name).await.0, 500, "{name}");
        said(&sidecar, &format!("/app-health/{name}/livez: "), "which is our own").await;
    }
}

#[tokio::test]
async fn pt_01_https_probes_take_any_certificate_over_both_versions_of_http() {
    let by_version = |seen: &Seen| match seen.header("host") {
        Some(_) => Reply::Status(211),
        None => Reply::Status(222),
    };
    let both = TlsApp::start(&["h2", "http/1.1"], by_version).await;
    let first = TlsApp::start(&["http/1.1"], by_version).await;
    let none = TlsApp::start(&[], by_version).await;
    let failing = TlsApp::start(&["h2"], |_| Reply::Status(503)).await;
    let plain = Scripted::start("plain", |_| Reply::Status(200)).await;
    let sidecar = probing(&[
        ("both", https(both.port)),
        ("first", https(first.port)),
        ("none", https(none.port)),
        ("failing", https(failing.port)),
        ("plain", https(plain.addr.port())),
    ]);
    for (name, expected) in [("both", 222), ("first", 211), ("none", 211), ("failing", 503), ("plain", 500)] {
        assert_eq!(probe(&sidecar, name).await.0, expected, "{name}: {}", sidecar.stderr());
    }
    assert_eq!(both.script.seen()[0].path, "/well");
    said(&sidecar, "/app-health/plain/livez: ", "TLS: ").await;
}

#[tokio::test]
async fn pt_01_grpc_probes_ask_the_health_protocol() {
    // The health of each service is the answer's field 1: none is UNKNOWN.
    let app = Scripted::start("grpc", |seen| match &seen.body[..] {
        b"\0\0\0\0\0" => Reply::Message(b"\x08\x01", 0),
        b"\0\0\0\0\x06\x0a\x04down" => Reply::Message(b"\x08\x02", 0),
        b"\0\0\0\0\x09\x0a\x07unknown" => Reply::Message(b"", 0),
        b"\0\0\0\0\x08\x0a\x06failed" => Reply::Message(b"\x08\x01", 13),
        b"\0\0\0\0\x08\x0a\x06absent" => Reply::TrailersOnly(5),
        b"\0\0\0\0\x06\x0a\x04none" => Reply::LateStatus(0),
        b"\0\0\0\0\x07\x0a\x05reset" => Reply::Reset,
        b"\0\0\0\0\x06\x0a\x04hang" => Reply::Hang,
        _ => Reply::TrailersOnly(12),
    })
    .await;
    let first = Recorder::start(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", true).await;
    let refused = std::net::TcpListener::bind(ANY).unwrap().local_addr().unwrap().port();
    let port = app.addr.port();
    let sidecar = probing(&[
        ("up", grpc(port, "null")),
        ("empty", grpc(port, "\"\"")),
        ("down", grpc(port, "\"down\"")),
        ("unknown", grpc(port, "\"unknown\"")),
        ("failed", grpc(port, "\"failed\"")),
        ("absent", grpc(port, "\"absent\"")),
        ("none", grpc(port, "\"none\"")),
        ("reset", grpc(port, "\"reset\"")),
        ("hang", format!("{{\"grpc\":{{\"port\":{port},\"service\":\"hang\"}}}}")),
        ("other", grpc(port, "\"other\"")),
        ("http", grpc(first.addr.port(), "null")),
        ("refused", grpc(refused, "null")),
    ]);
    let status = sidecar.address("status");
    let request = "GET /app-health/up/livez HTTP/1.1\r\nhost: a\r\nuser-agent: kube-probe/1.31\r\nconnection: close\r\n\r\n";
    let answer = exchange(status, request.as_bytes(), Duration::from_secs(5)).await;
    assert_eq!(answer.statuses(), [200], "{}", sidecar.stderr());
    let seen = app.seen();
    assert_eq!((seen[0].method.as_str(), seen[0].path.as_str()), ("POST", "/grpc.health.v1.Health/Check"));
    for (name, value) in [
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("user-agent", "kube-probe/1.31"),
        ("grpc-timeout", "5000m"),
    ] {
        assert_eq!(seen[0].header(name), Some(value), "{name}");
    }
    assert_eq!(probe(&sidecar, "empty").await.0, 200);
    for (name, why) in [
        ("down", "the health is NOT_SERVING"),
        ("unknown", "the health is UNKNOWN"),
        ("failed", "gRPC status 13"),
        ("absent", "gRPC status 5"),
        ("none", "the answer has no message"),
        ("reset", "the probe of the application failed"),
        ("hang", "no answer within 1s"),
        ("other", "does not implement grpc.health.v1.Health"),
        ("http", "the probe of the application failed"),
        ("refused", "refused"),
    ] {
        assert_eq!(probe(&sidecar, name).await.0, 500, "{name}");
        said(&sidecar, &format!("/app-health/{name}/livez: "), why).await;
    }
}

#[tokio::test]
async fn pt_01_probers_that_cannot_be_read_are_a_start_error() {
    let mut command = Command::new(SIDECAR);
    command.arg("--demo").args(PORTS).env("ISTIO_KUBE_APP_PROBERS", "{\"/app-health/a/livez\":{}}");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty(), "nobody is told that it listens");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("ISTIO_KUBE_APP_PROBERS: /app-health/a/livez: expected one of"), "{said}");
}
