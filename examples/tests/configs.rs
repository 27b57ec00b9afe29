//! The configurations of `examples/config`, through the binaries as their users run them. Only the ports of the
//! applications are others, and of those only the numbers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod tls;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{exchange, get_json};
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::upstream::Echo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use tls::TlsUpstream;

const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const ANY: &str = "127.0.0.1:0";

/// A sidecar with one of the configurations, in which each `http: PORT` becomes the port of an application.
struct Example {
    dir: ConfigDir,
    sidecar: Process,
}

impl Example {
    fn start(name: &str, ports: &[(u16, SocketAddr)]) -> Self {
        Self::start_as(name, ports, &[])
    }

    fn start_as(name: &str, ports: &[(u16, SocketAddr)], more: &[&str]) -> Self {
        let file = format!("{}/config/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut yaml = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        for (port, addr) in ports {
            let written = format!("{{http: {port}}}");
            assert!(yaml.contains(&written), "{name} has no {written}");
            yaml = yaml.replace(&written, &format!("{{http: {}}}", addr.port()));
        }
        let dir = ConfigDir::new();
        dir.write(name, &yaml);
        let (config, log) = (dir.file(name), dir.file("access.log"));
        let args = ["--config", &config, "--outbound", ANY, "--admin", ANY, "--access-log", &log];
        let sidecar = Process::start(SIDECAR, &[&args, more].concat());
        Self { dir, sidecar }
    }

    /// One request on a connection of its own; `headers` end with a line break each.
    async fn send(&self, method: &str, host: &str, path: &str, headers: &str) -> Answer {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\n{headers}connection: close\r\n\r\n");
        let sent = exchange(self.sidecar.address("outbound"), request.as_bytes(), Duration::from_secs(10));
        let text = String::from_utf8_lossy(&sent.await.bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let (status, headers) = head.split_once("\r\n").unwrap_or((head, ""));
        let headers = headers
            .split("\r\n")
            .filter_map(|line| {
                let (name, value) = line.split_once(": ")?;
                Some((name.to_ascii_lowercase(), value.to_owned()))
            })
            .collect();
        Answer { status: status[9..12].parse().unwrap(), headers, body: body.to_owned() }
    }

    /// The name of the application that answers.
    async fn by(&self, host: &str, headers: &str) -> String {
        let body = self.send("GET", host, "/", headers).await.body;
        let name = body.split("\"name\":\"").nth(1).and_then(|rest| rest.split('"').next());
        name.unwrap_or(&body).to_owned()
    }

    /// How many of so many requests each application answers.
    async fn shares(&self, host: &str, count: usize) -> BTreeMap<String, usize> {
        let mut shares = BTreeMap::new();
        for _ in 0..count {
            *shares.entry(self.by(host, "").await).or_default() += 1;
        }
        shares
    }

    /// A cluster as `/clusters` shows it.
    async fn cluster(&self, host: &str) -> serde_json::Value {
        let all = get_json(self.sidecar.address("admin"), "/clusters").await;
        let mut all = all["clusters"].as_array().unwrap().iter();
        all.find(|one| one["name"].as_str().unwrap().contains(&format!("||{host}."))).unwrap().clone()
    }

    /// The lines of the access log, once it has ended.
    async fn log(mut self) -> String {
        self.sidecar.signal("TERM");
        assert!(self.sidecar.wait().await.success());
        std::fs::read_to_string(self.dir.file("access.log")).unwrap()
    }
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

#[tokio::test]
async fn fault_injection() {
    let app = Echo::start("app").await;
    let example = Example::start("fault-injection.yaml", &[(9080, app.addr)]);

    let aborted = example.send("GET", "ratings", "/", "end-user: jason\r\n").await;
    assert_eq!((aborted.status, aborted.body.as_str()), (500, "fault filter abort"));

    let mut seen = [0_u32; 2];
    for _ in 0..6 {
        let before = mesh_core::clock::now();
        let slow = example.send("GET", "ratings", "/", "end-user: sam\r\n").await;
        assert!(before.elapsed() >= Duration::from_millis(500));
        match slow.status {
            200 => seen[0] += 1,
            503 => seen[1] += 1,
            other => panic!("{other}: {}", slow.body),
        }
    }
    assert_eq!(app.requests(), usize::try_from(seen[0]).unwrap());

    let grpc = "content-type: application/grpc\r\ncontent-length: 0\r\n";
    let refused = example.send("POST", "ratings", "/", grpc).await;
    assert_eq!((refused.status, refused.header("grpc-status")), (200, Some("14")));
    assert_eq!(refused.header("grpc-message"), Some("fault filter abort"));

    assert_eq!(example.send("GET", "ratings", "/", "").await.status, 200);
    for _ in 0..20 {
        assert_eq!(example.send("GET", "reviews", "/", "").await.status, 200, "retries hide it");
    }
    let log = example.log().await;
    let count = |what: &str| log.matches(what).count();
    assert_eq!(count("\" 500 FI fault_filter_abort"), 1, "{log}");
    assert_eq!(count("\" 200 DI via_upstream"), usize::try_from(seen[0]).unwrap(), "{log}");
    assert_eq!(count("\" 503 DI,FI fault_filter_abort"), usize::try_from(seen[1]).unwrap(), "{log}");
}

#[tokio::test]
async fn retries() {
    let flaky = Scripted::start("flaky", |_| Reply::Reset).await;
    let sound = Scripted::start("sound", |_| Reply::Status(200)).await;
    let example = Example::start("retries.yaml", &[(9080, flaky.addr), (9081, sound.addr)]);
    for _ in 0..20 {
        assert_eq!(example.send("GET", "reviews", "/", "").await.status, 200, "the other endpoint answers");
    }
    assert!(flaky.requests() > 0 && sound.requests() == 20);
    let mut failed = 0;
    for at in 0..20 {
        // Once it may have been seen, a POST is not repeated, unless its client gave it a key.
        let key = if at % 2 == 0 { "" } else { "idempotency-key: 7\r\n" };
        let answer = example.send("POST", "reviews", "/", &format!("{key}content-length: 0\r\n")).await;
        assert!(answer.status == 200 || key.is_empty(), "{} with a key", answer.status);
        failed += u32::from(answer.status == 503);
    }
    assert!(failed > 0);
    let log = example.log().await;
    assert_eq!(log.matches("\" 503 UC ").count(), usize::try_from(failed).unwrap(), "{log}");
}

#[tokio::test]
async fn circuit_breaking() {
    let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
    let good =
        Scripted::start("good", |seen| if seen.path == "/held" { Reply::Hang } else { Reply::Status(200) })
            .await;
    let example = Example::start("circuit-breaking.yaml", &[(9080, bad.addr), (9081, good.addr)]);
    let mut failed = 0;
    while failed < 3 {
        failed += u32::from(example.send("GET", "reviews", "/", "").await.status == 500);
    }
    for _ in 0..20 {
        assert_eq!(example.send("GET", "reviews", "/", "").await.status, 200, "the bad one is left out");
    }
    let clusters = get_json(example.sidecar.address("admin"), "/clusters").await;
    let clusters = clusters["clusters"].as_array().unwrap();
    let reviews = clusters.iter().find(|c| c["name"].as_str().unwrap().contains("reviews")).unwrap();
    assert_eq!(reviews["outlier_detection"]["ejected"], 1, "{reviews}");
    let event = reviews["outlier_detection"]["events"][0]["what"].as_str().unwrap();
    assert!(event.contains("3 consecutive5xxErrors reached"), "{event}");

    let outbound = example.sidecar.address("outbound");
    let mut held = Vec::new();
    for at in 1..=4 {
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(b"GET /held HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
        held.push(stream);
        let asked = async || good.seen().iter().filter(|seen| seen.path == "/held").count() == at;
        mesh_testkit::until("a request in flight", asked).await;
    }
    let refused = example.send("GET", "reviews", "/", "").await;
    assert_eq!((refused.status, refused.header("x-envoy-overloaded")), (503, Some("true")));
    drop(held);
    let log = example.log().await;
    assert_eq!(log.matches("\" 503 UO ").count(), 1, "{log}");
}

#[tokio::test]
async fn cors() {
    let app = Echo::start("app").await;
    let example = Example::start("cors.yaml", &[(9080, app.addr)]);
    let preflight = |origin: &str| format!("origin: {origin}\r\naccess-control-request-method: PUT\r\n");

    for origin in ["https://app.example.com", "https://preview-12.example.com"] {
        let answer = example.send("OPTIONS", "api", "/items", &preflight(origin)).await;
        assert_eq!(answer.status, 200);
        for (name, value) in [
            ("access-control-allow-origin", origin),
            ("access-control-allow-methods", "GET,PUT"),
            ("access-control-allow-headers", "content-type,x-request-id"),
            ("access-control-allow-credentials", "true"),
            ("access-control-max-age", "86400"),
        ] {
            assert_eq!(answer.header(name), Some(value), "{name}");
        }
    }
    let answer = example.send("OPTIONS", "api", "/items", &preflight("https://evil.example")).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, None));
    assert_eq!(app.requests(), 0, "all of them were answered by the proxy");

    let answer = example.send("OPTIONS", "api", "/other", &preflight("https://evil.example")).await;
    assert_eq!((answer.status, app.requests()), (200, 1));

    let answer = example.send("GET", "api", "/items", "origin: https://app.example.com\r\n").await;
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example.com"));
    assert_eq!(answer.header("access-control-expose-headers"), Some("x-envoy-upstream-service-time"));
    let answer = example.send("GET", "api", "/items", "origin: https://evil.example\r\n").await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, None));
    assert!(example.log().await.contains("\" 200 - cors_response"));
}

#[tokio::test]
async fn sticky_canary() {
    let (one, two) = (Echo::start("v1").await, Echo::start("v2").await);
    let example = Example::start("sticky-canary.yaml", &[(9081, one.addr), (9082, two.addr)]);
    let version = async |user: u32| {
        let body = example.send("GET", "reviews", "/", &format!("x-user: user-{user}\r\n")).await.body;
        if body.contains("\"name\":\"v2\"") { "v2" } else { "v1" }
    };
    let versions = async || {
        let mut all = Vec::new();
        for user in 0..60 {
            all.push(version(user).await);
        }
        all
    };
    let before = versions().await;
    assert_eq!(before, versions().await, "a user stays");
    let canary = |versions: &[&str]| versions.iter().filter(|version| **version == "v2").count();
    assert!((4..22).contains(&canary(&before)), "{before:?}");

    let file = "sticky-canary.yaml";
    let yaml = std::fs::read_to_string(example.dir.file(file)).unwrap();
    example.dir.write(file, &yaml.replace("weight: 80", "weight: 50").replace("weight: 20", "weight: 50"));
    let admin = example.sidecar.address("admin");
    let applied = async || get_json(admin, "/ready").await["generation"] == 2;
    mesh_testkit::until("the new weights are in force", applied).await;
    let after = versions().await;
    assert!(canary(&after) > canary(&before), "{after:?}");
    assert!(before.iter().zip(&after).all(|(before, after)| before == after || *after == "v2"));

    let explained = get_json(admin, "/explain?url=http://reviews/&header=x-user:user-7").await;
    let sticky = serde_json::json!({"key": "header:x-user", "present": true});
    assert_eq!(explained["decision"]["sticky"], sticky);
    let to = explained["decision"]["forward"].as_array().unwrap();
    assert_eq!(to.iter().find(|to| to["chosen"] == true).unwrap()["subset"], after[7]);
}

#[tokio::test]
async fn mirroring() {
    let v1 = Echo::start("v1").await;
    let v2 = Scripted::start("v2", |_| Reply::Status(500)).await;
    let audit = Scripted::start("audit", |_| Reply::Reset).await;
    let ports = [(9081, v1.addr), (9082, v2.addr), (9083, audit.addr)];
    let example = Example::start("mirroring.yaml", &ports);
    let path = format!("{}/config/mirroring.yaml", env!("CARGO_MANIFEST_DIR"));
    let checked = Command::new(SIDECAR).args(["--check", "--config", &path]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&checked.stdout), "0 errors, 0 warnings\n");
    let users = 60;
    for _ in 0..2 {
        for user in 0..users {
            let headers = format!("x-user: user-{user}\r\ncookie: secret=1\r\n");
            let answer = example.send("GET", "reviews", "/items?q=1", &headers).await;
            assert_eq!(answer.status, 200);
            assert!(
                answer.body.contains("\"name\":\"v1\"") && answer.body.contains("secret=1"),
                "{}",
                answer.body
            );
        }
    }
    let admin = example.sidecar.address("admin");
    let over = async || {
        let (_, stats) = mesh_testkit::raw::get(admin, "localhost", "/stats/prometheus").await;
        stats.contains("mesh_mirrored_requests_in_flight 0\n")
    };
    mesh_testkit::until("every copy has come to its end", over).await;
    let copies = v2.seen();
    assert_eq!((copies.len(), v1.requests()), (120, 120), "no retries, no copies of copies");
    for copy in &copies {
        assert_eq!((copy.path.as_str(), copy.header("host")), ("/items?q=1", Some("reviews")));
        assert_eq!((copy.header("x-mirrored-from"), copy.header("cookie")), (Some("reviews v1"), None));
    }
    let mut audited: BTreeMap<String, u32> = BTreeMap::new();
    for copy in audit.seen() {
        assert_eq!((copy.header("host"), copy.header("cookie")), (Some("audit.example"), Some("secret=1")));
        *audited.entry(copy.header("x-user").unwrap().to_owned()).or_default() += 1;
    }
    assert!((5..28).contains(&audited.len()), "about a quarter of {users}: {audited:?}");
    assert!(audited.values().all(|times| *times == 2), "a user is copied always or never: {audited:?}");

    let (_, stats) = mesh_testkit::raw::get(admin, "localhost", "/stats/prometheus").await;
    let counted = |cluster: &str, outcome: &str| {
        let name = format!("mesh_mirrored_requests_total{{cluster=\"{cluster}\",outcome=\"{outcome}\"}} ");
        let line = stats.lines().find_map(|line| line.strip_prefix(name.as_str()));
        line.unwrap_or_else(|| panic!("no {name} in {stats}")).parse::<usize>().unwrap()
    };
    assert_eq!(counted("outbound|80|v2|reviews.default.svc.cluster.local", "answered"), 120);
    assert_eq!(counted("outbound|80||audit.default.svc.cluster.local", "failed"), audited.len() * 2);
    let clusters = get_json(admin, "/clusters").await;
    let shown = clusters["clusters"].as_array().unwrap();
    let shown =
        |part: &str| shown.iter().find(|cluster| cluster["name"].as_str().unwrap().contains(part)).unwrap();
    assert_eq!(shown("|v2|")["mirrored"]["answered"], 120);
    assert!(shown("|v1|")["mirrored"].is_null());
    let log = example.log().await;
    assert_eq!(log.lines().count(), 120, "copies have no line: {log}");
    assert_eq!(log.matches("\" 200 - via_upstream").count(), 120, "{log}");
}

#[tokio::test]
async fn mirror_diffing() {
    let (v1, v2) = (Echo::start("v1").await, Echo::start("v2").await);
    let example = Example::start("mirror-diffing.yaml", &[(9081, v1.addr), (9082, v2.addr)]);
    for at in 0..250 {
        let answer = example
            .send("GET", "reviews", &format!("/items/{at}"), "authorization: secret\r\nx-api-key: secret\r\n")
            .await;
        assert_eq!(answer.status, 200);
        assert!(answer.body.contains("\"name\":\"v1\""), "{}", answer.body);
    }
    let admin = example.sidecar.address("admin");
    let compared = async || {
        let found = get_json(admin, "/mirror_diff").await;
        found["comparisons"][0]["compared"] == 250
    };
    mesh_testkit::until("every copy was compared", compared).await;
    let found = get_json(admin, "/mirror_diff").await;
    let pair = &found["comparisons"][0];
    assert_eq!((pair["route"].as_str(), pair["different"].as_u64()), (Some("all"), Some(250)));
    assert_eq!(pair["mirror"], "outbound|80|v2|reviews.default.svc.cluster.local");
    assert!(pair["baselines"].as_u64().unwrap() >= 10, "{pair}");
    let place = |name: &str| {
        let places = pair["places"].as_array().unwrap();
        places.iter().find(|place| place["place"] == name).unwrap_or_else(|| panic!("no {name} in {pair}"))["noise"]
            == true
    };
    assert!(!place("$.name"), "that is what differs");
    assert!(place("$.headers.x-mesh-mirrored"), "every copy has it, that for the baseline too");
    assert_eq!(found["samples"].as_array().unwrap().len(), 100, "the last ones");
    assert_eq!(found["samples"][0]["mirror"]["status"], 200);
    let (_, stats) = mesh_testkit::raw::get(admin, "localhost", "/stats/prometheus").await;
    let series = "mesh_mirror_comparisons_total{route=\"all\",cluster=\"outbound|80|v2|reviews.default.svc.cluster.local\",verdict=\"different\"} 250\n";
    assert!(stats.contains(series), "{stats}");

    let (status, lines) = mesh_testkit::raw::get(admin, "localhost", "/mirror_diff?captured").await;
    assert_eq!((status, lines.lines().count()), (200, 250));
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let named = |pair: &serde_json::Value| pair[0] == "authorization" || pair[0] == "x-api-key";
        assert!(!line["headers"].as_array().unwrap().iter().any(named), "credentials are not written down");
    }
    example.dir.write("requests.jsonl", &lines);
    let file = example.dir.file("requests.jsonl");
    let replay = async |args: Vec<String>| {
        let run = move || Command::new(SIDECAR).args(args).output().unwrap();
        let output = tokio::task::spawn_blocking(run).await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let args = |against: SocketAddr, baseline: Option<SocketAddr>| {
        let mut args =
            vec!["--replay".to_owned(), file.clone(), "--against".to_owned(), format!("http://{against}")];
        args.extend(baseline.into_iter().flat_map(|url| ["--baseline".to_owned(), format!("http://{url}")]));
        args
    };
    let (code, table, _) = replay(args(v2.addr, Some(v1.addr))).await;
    assert_eq!(code, Some(1), "{table}");
    assert!(table.starts_with("250 requests: 0 equal, 0 differ by noise, 250 differ"), "{table}");
    assert!(table.contains("\nGET reviews/items/0\n  $.name: \"v1\" is now \"v2\"\n"), "{table}");
    let (code, table, _) = replay(args(v1.addr, Some(v1.addr))).await;
    assert_eq!(code, Some(0), "{table}");
    assert!(table.starts_with("250 requests: 250 equal"), "{table}");
    // What was captured was no copy; what is asked now is, and this service tells.
    let (code, table, _) = replay(args(v1.addr, None)).await;
    assert_eq!(code, Some(1), "{table}");
    let row = table.lines().find(|line| line.starts_with("$.headers.x-mesh-mirrored")).unwrap();
    assert_eq!(row.split_whitespace().skip(1).collect::<Vec<_>>(), ["added", "250", "0"]);
    example.dir.write("requests.jsonl", "{}");
    let (code, _, said) = replay(args(v1.addr, None)).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("requests.jsonl:1: response is missing"), "{said}");
}

#[tokio::test]
async fn canary() {
    let mended = Arc::new(AtomicBool::new(false));
    let sound = Arc::clone(&mended);
    let v1 = Scripted::start("v1", |_| Reply::After(Duration::from_millis(4), 200)).await;
    let v2 = Scripted::start("v2", move |seen| {
        let fails = seen.nth % 3 == 0 && !sound.load(Ordering::Relaxed);
        Reply::After(Duration::from_millis(4), if fails { 500 } else { 200 })
    })
    .await;
    let example = Example::start("canary.yaml", &[(9081, v1.addr), (9082, v2.addr)]);
    let (admin, outbound) = (example.sidecar.address("admin"), example.sidecar.address("outbound"));
    let canary = async || get_json(admin, "/canary").await["canaries"][0].clone();
    let first = canary().await;
    assert_eq!(
        (&first["share"], &first["phase"], &first["run"]),
        (&20.into(), &"running".into(), &"1".into())
    );
    // Eight clients at a time, until the rollout has ended.
    let end = async || {
        let ask = async || {
            let mut clients = tokio::task::JoinSet::new();
            for _ in 0..8 {
                clients.spawn(async move {
                    for _ in 0..10 {
                        mesh_testkit::raw::get(outbound, "reviews", "/").await;
                    }
                });
            }
            clients.join_all().await;
            canary().await["phase"] != "running"
        };
        mesh_testkit::until("the end of the rollout", ask).await;
        canary().await
    };
    let shown = end().await;
    assert_eq!((&shown["share"], &shown["phase"]), (&0.into(), &"rolled_back".into()), "{shown}");
    let what = shown["events"][0]["what"].as_str().unwrap();
    assert!(what.starts_with("rolled back, now 0 %: it is "), "{what}");
    assert!(example.sidecar.stderr().contains(what), "the same is logged");
    let before = v2.requests();
    for _ in 0..50 {
        assert_eq!(example.send("GET", "reviews", "/", "").await.status, 200);
    }
    assert_eq!(v2.requests(), before, "nobody is sent there any more");
    let explained = get_json(admin, "/explain?url=http://reviews/").await;
    let weights: Vec<_> =
        explained["decision"]["forward"].as_array().unwrap().iter().map(|to| to["weight"].clone()).collect();
    assert_eq!(weights, [100, 0]);
    assert_eq!(explained["decision"]["canary"]["phase"], "rolled_back");
    let (_, metrics) = mesh_testkit::raw::get(admin, "admin", "/stats/prometheus").await;
    for line in [
        "mesh_canary_events_total{event=\"rolled_back\"} 1".to_owned(),
        "mesh_canary_share{canary=\"default/reviews\"} 0".to_owned(),
        format!(
            "mesh_canary_requests_total{{canary=\"default/reviews\",version=\"canary\",result=\"failure\"}} {}",
            shown["total"]["canary"]["failures"]
        ),
    ] {
        assert!(metrics.contains(&line), "no {line} in {metrics}");
    }

    // A reload that leaves the rollout as it is changes nothing of it; another run begins with a mended version.
    let yaml = std::fs::read_to_string(example.dir.file("canary.yaml")).unwrap();
    let reload = async |yaml: &str, generation: u64| {
        example.dir.write("canary.yaml", yaml);
        let applied = async || get_json(admin, "/ready").await["generation"] == generation;
        mesh_testkit::until("the generation to be in force", applied).await;
    };
    reload(&yaml.replace("weight: 100", "weight: 90"), 2).await;
    let kept = canary().await;
    assert_eq!((&kept["phase"], &kept["total"]["canary"]), (&shown["phase"], &shown["total"]["canary"]));
    mended.store(true, Ordering::Relaxed);
    reload(&yaml.replace("run=1", "run=2"), 3).await;
    let shown = end().await;
    assert_eq!((&shown["share"], &shown["phase"]), (&100.into(), &"promoted".into()), "{shown}");
    let shares: Vec<_> =
        shown["events"].as_array().unwrap().iter().map(|event| event["share"].clone()).collect();
    assert_eq!(shares, [50, 100, 100]);
    let before = v1.requests();
    for _ in 0..50 {
        assert_eq!(example.send("GET", "reviews", "/", "").await.body, "v2");
    }
    assert_eq!(v1.requests(), before, "everybody is sent to v2");
    let (_, metrics) = mesh_testkit::raw::get(admin, "admin", "/stats/prometheus").await;
    assert!(metrics.contains("mesh_canary_events_total{event=\"promoted\"} 1"), "{metrics}");
}

#[tokio::test]
async fn tcp_routing() {
    async fn named(name: &'static str) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                // The server speaks first.
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.write_all(name.as_bytes()).await;
            }
        });
        addr
    }
    let (v1, v2) = (named("v1").await, named("v2").await);
    let shop = TlsUpstream::start(&["shop.example.com"]).await;
    let site = TlsUpstream::start(&["www.example.com"]).await;
    let path = format!("{}/config/tcp-routing.yaml", env!("CARGO_MANIFEST_DIR"));
    let checked = Command::new(GATEWAY).args(["--check", "--config", &path]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&checked.stdout), "0 errors, 0 warnings\n");
    let mut text = std::fs::read_to_string(path).unwrap();
    for (port, addr) in
        [("tcp: 9001", v1), ("tcp: 9002", v2), ("tls: 9443", shop.addr), ("tls: 9444", site.addr)]
    {
        assert!(text.contains(port), "no {port}");
        text = text.replace(port, &format!("{}{}", &port[..5], addr.port()));
    }
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &text);
    let file = dir.file("mesh.yaml");
    let process = Process::start(
        GATEWAY,
        &[
            "--config",
            &file,
            "--bind",
            "127.0.0.1",
            "--admin",
            ANY,
            "--map-port",
            "443=0",
            "--map-port",
            "31400=0",
        ],
    );
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect(process.address("tcp")).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        *counts.entry(answer).or_default() += 1;
    }
    assert!(counts["v1"] + counts["v2"] == 200 && (140..185).contains(&counts["v1"]), "{counts:?}");
    let peer = process.address("tls");
    let (said, back) = shop.exchange(peer, "shop.example.com", None, b"order").await.unwrap();
    assert_eq!((said.as_str(), back.as_slice()), ("shop.example.com", &b"order"[..]));
    let (said, _) = site.exchange(peer, "www.example.com", None, b"").await.unwrap();
    assert_eq!(said, "www.example.com");
    assert!(site.exchange(peer, "www.example.org", None, b"").await.is_err());
}

#[test]
fn every_configuration_is_checked_without_a_word() {
    let folder = format!("{}/config", env!("CARGO_MANIFEST_DIR"));
    let mut checked = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // That of the demo has the ports of its applications filled in when it runs, and scenarios have a run of their own.
        if path.ends_with("demo.yaml") || path.is_dir() {
            continue;
        }
        let mut check = Command::new(SIDECAR);
        check.arg("--check").arg("--config").arg(&path);
        if path.ends_with("mutual-tls.yaml") {
            // Who has no identity and asks for none enforces nothing of it, and says so.
            assert_eq!(check.output().unwrap().status.code(), Some(1));
            check.args([
                "--ca",
                "https://127.0.0.1:15012",
                "--ca-root",
                "root.pem",
                "--bootstrap-token",
                "token",
            ]);
        }
        let said = check.output().unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout), "0 errors, 0 warnings\n", "{}", path.display());
        checked += 1;
    }
    assert!(checked > 10);
}

#[tokio::test]
async fn timeouts() {
    let app = Scripted::start("app", |seen| match seen.path.as_str() {
        "/reports/slow" => Reply::After(Duration::from_millis(700), 200),
        "/reports/stalled" => Reply::Stall,
        "/hangs" => Reply::Hang,
        _ => Reply::Status(200),
    })
    .await;
    let example = Example::start("timeouts.yaml", &[(9080, app.addr)]);
    assert_eq!(example.send("GET", "reviews", "/", "").await.status, 200);
    assert_eq!(app.seen()[0].header("x-envoy-expected-rq-timeout-ms"), Some("200"), "that of the try");

    let before = mesh_core::clock::now();
    let late = example.send("GET", "reviews", "/hangs", "").await;
    assert_eq!(late.status, 504);
    assert!(
        before.elapsed() >= Duration::from_millis(500),
        "two tries of 200 ms, and what is left for a third"
    );
    let grpc = "content-type: application/grpc\r\ncontent-length: 0\r\n";
    let late = example.send("POST", "reviews", "/hangs", grpc).await;
    assert_eq!((late.status, late.header("grpc-status")), (200, Some("14")));
    let shorter = "x-envoy-upstream-rq-timeout-ms: 50\r\n";
    let late = example.send("GET", "reviews", "/reports/slow", shorter).await;
    assert_eq!(late.status, 504, "the client is asked for less patience");
    assert_eq!(example.send("GET", "reviews", "/reports/slow", "").await.status, 200);
    let stalled = example.send("GET", "reviews", "/reports/stalled", "").await;
    assert_eq!(stalled.status, 200, "its head had come");
    let log = example.log().await;
    assert_eq!(log.matches("\" 504 UT ").count(), 2, "{log}");
    assert_eq!(log.matches("\" 200 SI ").count(), 1, "{log}");
}

#[tokio::test]
async fn outlier_detection() {
    let gateway = Scripted::start("gateway", |_| Reply::Status(503)).await;
    let broken = Scripted::start("broken", |_| Reply::Reset).await;
    let sound = Scripted::start("sound", |_| Reply::Status(200)).await;
    let example = Example::start(
        "outlier-detection.yaml",
        &[(9080, gateway.addr), (9081, broken.addr), (9082, sound.addr)],
    );
    let mut asked = 0;
    while gateway.requests() < 3 || broken.requests() < 2 {
        example.send("GET", "reviews", "/", "").await;
        asked += 1;
        assert!(asked < 200);
    }
    // Now one of three is in, which is less than the share below which all are used again.
    let cluster = example.cluster("reviews").await;
    assert_eq!(cluster["priorities"][0]["available"], 1, "{cluster}");
    assert_eq!(cluster["priorities"][0]["panic"], true, "{cluster}");
    let why = |at: usize| cluster["endpoints"][at]["ejection"]["why"].as_str().unwrap().to_owned();
    assert!(why(0).starts_with("3 consecutiveGatewayErrors"), "{}", why(0));
    assert!(why(1).starts_with("2 consecutiveLocalOriginFailures"), "{}", why(1));
    assert!(cluster["endpoints"][2]["ejection"].is_null());
    while gateway.requests() == 3 {
        example.send("GET", "reviews", "/", "").await;
        asked += 1;
        assert!(asked < 400, "in panic everybody is asked again");
    }
}

#[tokio::test]
async fn load_balancing() {
    let (one, two) = (Echo::start("one").await, Echo::start("two").await);
    let example =
        Example::start_as("load-balancing.yaml", &[(9080, one.addr), (9081, two.addr)], &["--workers", "1"]);
    let turns = example.shares("turns", 40).await;
    assert_eq!((turns["one"], turns["two"]), (30, 10));
    let new = example.shares("new", 40).await;
    assert_eq!((new["one"], new["two"]), (20, 20), "those that appeared together share at once");

    let outbound = example.sidecar.address("outbound");
    let mut held = TcpStream::connect(outbound).await.unwrap();
    held.write_all(b"GET /gate HTTP/1.1\r\nhost: least\r\n\r\n").await.unwrap();
    mesh_testkit::until("a request that lasts", async || one.held() + two.held() == 1).await;
    let busy = if one.held() == 1 { "one" } else { "two" };
    let cluster = example.cluster("least").await;
    let in_flight = |at: usize| cluster["endpoints"][at]["in_flight"].as_u64().unwrap();
    assert_eq!((cluster["balancer"].as_str(), in_flight(0) + in_flight(1)), (Some("LeastRequest"), 1));
    let least = example.shares("least", 60).await;
    // Both draws fall on the busy one in a quarter of the cases: 15, and four standard deviations are 13.
    assert!(least.get(busy).is_none_or(|count| *count <= 28), "{least:?}");

    assert_eq!(example.cluster("fast").await["balancer"], "PeakEwma");
    assert_eq!(example.shares("fast", 10).await.values().sum::<usize>(), 10);
    assert_eq!(example.cluster("new").await["balancing"]["warm_up"]["duration_ms"], 60_000);
    one.gate.add_permits(1);
    two.gate.add_permits(1);
}

#[tokio::test]
async fn consistent_hash() {
    let apps = [Echo::start("a").await, Echo::start("b").await, Echo::start("c").await];
    let ports = [(9080, apps[0].addr), (9081, apps[1].addr), (9082, apps[2].addr)];
    let example = Example::start_as("consistent-hash.yaml", &ports, &["--workers", "2"]);
    let mut seen = std::collections::BTreeSet::new();
    for user in 0..20 {
        let headers = format!("x-user: user-{user}\r\n");
        let first = example.by("carts", &headers).await;
        for _ in 0..3 {
            assert_eq!(example.by("carts", &headers).await, first, "each on a connection of its own");
        }
        seen.insert(first);
    }
    assert_eq!(seen.len(), 3);
    let admin = example.sidecar.address("admin");
    let explained = get_json(admin, "/explain?url=http://carts/&header=x-user:user-7").await;
    let key = &explained["decision"]["endpoint_key"];
    let by = example.by("carts", "x-user: user-7\r\n").await;
    let picked = ports.iter().zip(["a", "b", "c"]).find(|(_, name)| *name == by).unwrap().0.1;
    assert_eq!((&key["key"], &key["endpoint"]), (&"header:x-user".into(), &picked.to_string().into()));

    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..12 {
        let answer = example.send("GET", "sessions", "/", "").await;
        let cookie = answer.header("set-cookie").unwrap();
        let (pair, attributes) = cookie.split_at(cookie.find(';').unwrap());
        assert_eq!(attributes, "; Max-Age=3600; Path=/; SameSite=Lax; Secure; HttpOnly");
        let name = |body: &str| body.split("\"name\":\"").nth(1).unwrap()[..1].to_owned();
        let again = example.send("GET", "sessions", "/", &format!("cookie: {pair}\r\n")).await;
        assert_eq!((name(&again.body), again.header("set-cookie")), (name(&answer.body), None));
        seen.insert(name(&answer.body));
    }
    assert!(seen.len() > 1, "{seen:?}");
    assert!(example.by("sessions", "cookie: session=mine\r\n").await.len() == 1, "any value is a key");
}

#[tokio::test]
async fn locality() {
    let near = Scripted::start("near", |seen| {
        Reply::Status(if seen.header("x-fail").is_some() { 500 } else { 200 })
    })
    .await;
    let (west, eu) = (Echo::start("west").await, Echo::start("eu").await);
    let here = ["--labels", "app=web,topology.kubernetes.io/region=us,topology.kubernetes.io/zone=east"];
    let ports = [(9080, near.addr), (9081, west.addr), (9082, eu.addr)];
    let example = Example::start_as("locality.yaml", &ports, &here);
    let all = |name: &str, count: usize| BTreeMap::from([(name.to_owned(), count)]);

    assert_eq!(example.shares("details", 20).await, all("near", 20), "each zone has room for its own");
    let ratings = example.shares("ratings", 200).await;
    // Four standard deviations of 200 draws with a fifth are 23.
    assert!(ratings.len() == 2 && ratings["west"].abs_diff(40) < 23, "{ratings:?}");
    let priorities = example.cluster("ratings").await["priorities"].clone();
    assert_eq!(priorities[0]["localities"][1], serde_json::json!({"locality": "us/west", "percent": 20.0}));

    assert_eq!(example.shares("reviews", 10).await, all("near", 10));
    for _ in 0..2 {
        assert_eq!(example.send("GET", "reviews", "/", "x-fail: 1\r\n").await.status, 500);
    }
    assert_eq!(example.shares("reviews", 10).await, all("west", 10), "the region before others");
    let reviews = example.cluster("reviews").await;
    let percent = |at: usize| reviews["priorities"][at]["percent"].as_u64().unwrap();
    assert_eq!([0, 1, 2].map(percent), [0, 100, 0]);
    assert_eq!(reviews["endpoints"][2]["priority"], 2);

    let elsewhere = ["--labels", "istio-locality=eu.central"];
    let example = Example::start_as("locality.yaml", &ports, &elsewhere);
    assert_eq!(example.shares("reviews", 10).await, all("eu", 10));
}
