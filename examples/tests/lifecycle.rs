//! Configuration that changes under load, and proxies that end: nothing is dropped, nothing is cut before its time.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use mesh_testkit::ledger::Load;
use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{get, get_json};
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const ANY: &str = "127.0.0.1:0";

fn service(app: SocketAddr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: app}}\nspec:\n  hosts: [app.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{{address: {}, ports: {{http: {}}}}}]\n---\n",
        app.ip(),
        app.port()
    )
}

/// The service, and a rule that says its number in a header and in the path.
fn generation(app: SocketAddr, number: u32) -> String {
    format!(
        "{}apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app}}\nspec:\n  hosts: [app]\n  http:\n  - headers: {{request: {{set: {{x-generation: g{number}}}}}}}\n    rewrite: {{uri: /g{number}/echo}}\n    match: [{{uri: {{prefix: /echo}}}}]\n    route: [{{destination: {{host: app}}}}]\n",
        service(app)
    )
}

async fn counter(admin: SocketAddr, name: &str) -> u64 {
    get_json(admin, "/ready").await[name].as_u64().unwrap_or(0)
}

/// What the application saw of the generation in force; `None` when it saw nothing.
async fn in_force_or_none(outbound: SocketAddr) -> Option<String> {
    let (status, body) = get(outbound, "app", "/echo").await;
    let saw: Value = serde_json::from_str(&body).ok().filter(|_| status == 200)?;
    Some(saw["headers"]["x-generation"].as_str().unwrap_or("none").to_owned())
}

async fn in_force(outbound: SocketAddr) -> String {
    in_force_or_none(outbound).await.expect("an answer")
}

/// Puts a new version behind `..data`, as the kubelet does: a folder, a link beside the old one, a rename over it.
fn swap(volume: &Path, number: u32, text: &str) {
    let folder = format!("..2026_11_24_{number}");
    std::fs::create_dir(volume.join(&folder)).unwrap();
    std::fs::write(volume.join(&folder).join("mesh.yaml"), text).unwrap();
    let old = std::fs::read_link(volume.join("..data")).ok();
    symlink(&folder, volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if let Some(old) = old {
        std::fs::remove_dir_all(volume.join(old)).unwrap();
    }
}

#[tokio::test]
async fn c3_symlink_swaps_half_written_files_and_removals_never_empty_a_configuration() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    let volume = dir.path();
    swap(volume, 0, &generation(app.addr, 0));
    symlink("..data/mesh.yaml", volume.join("mesh.yaml")).unwrap();
    let sidecar = Process::start(
        SIDECAR,
        &["--config", volume.to_str().unwrap(), "--outbound", ANY, "--admin", ANY, "--log", "error"],
    );
    let (outbound, admin) = (sidecar.address("outbound"), sidecar.address("admin"));
    assert_eq!(in_force(outbound).await, "g0", "a mounted volume is one file, not three");
    let load = Load::start(outbound, "app", 2, 100);

    for number in 1..=5 {
        swap(volume, number, &generation(app.addr, number));
        // Not the count of what was accepted: the version before may be looked at again as its folder goes.
        let swapped = Some(format!("g{number}"));
        until("the swapped version", async || in_force_or_none(outbound).await == swapped).await;
    }

    // A second file is written a piece at a time; each piece stays long enough to be looked at.
    let extra = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: extra}\nspec:\n  hosts: [extra]\n  http: [{route: [{destination: {host: app}}]}]\n";
    for end in [20, 60, 100, extra.len()] {
        dir.write("extra.yaml", &extra[..end]);
        let seen = counter(admin, "rejected").await + counter(admin, "accepted").await;
        until("a verdict on the piece", async || {
            counter(admin, "rejected").await + counter(admin, "accepted").await > seen
        })
        .await;
        assert_eq!(in_force(outbound).await, "g5");
    }
    until("the second file", async || get(outbound, "extra", "/").await.0 == 200).await;

    // A thousand touches change nothing.
    let before = counter(admin, "generation").await;
    let text = std::fs::read_to_string(volume.join("extra.yaml")).unwrap();
    for _ in 0..1000 {
        dir.write("extra.yaml", &text);
    }
    // Gone for a moment, as some editors do it, and back with another text.
    std::fs::remove_file(volume.join("extra.yaml")).unwrap();
    assert_eq!(get(outbound, "extra", "/").await.0, 200, "the last good configuration stays");
    dir.write("extra.yaml", &extra.replace("hosts: [extra]", "hosts: [extra, more]"));
    until("the new text", async || get(outbound, "more", "/").await.0 == 200).await;
    assert_eq!(counter(admin, "generation").await, before + 1, "nothing but the new text was loaded");

    let totals = load.stop().await;
    println!("c3: {totals:?}");
    assert!(totals.is_clean() && totals.whole > 100, "{totals:?}");
}

#[tokio::test]
async fn c4_a_port_comes_and_goes_and_the_other_stays() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    let gateway = |servers: &str| {
        format!(
            "{}apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: edge}}\nspec:\n  servers:\n  - {{port: {{number: 80, name: kept, protocol: HTTP}}, hosts: ['*']}}\n{servers}---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app}}\nspec:\n  hosts: ['*']\n  gateways: [edge]\n  http: [{{route: [{{destination: {{host: app}}}}]}}]\n",
            service(app.addr)
        )
    };
    let both = gateway("  - {port: {number: 81, name: changing, protocol: HTTP}, hosts: ['*']}\n");
    let one = gateway("");
    dir.write("mesh.yaml", &both);
    let config = dir.file("mesh.yaml");
    let process = Process::start(
        GATEWAY,
        &[
            "--config",
            &config,
            "--bind",
            "127.0.0.1",
            "--map-port",
            "80=0",
            "--map-port",
            "81=0",
            "--admin",
            ANY,
            "--log",
            "error",
        ],
    );
    let (kept, admin) = (process.address("kept"), process.address("admin"));
    let listener = async |name: &str| -> Option<SocketAddr> {
        let listeners = get_json(admin, "/listeners").await;
        let all = listeners["listeners"].as_array().unwrap();
        let found = all.iter().find(|listener| listener["name"] == name && listener["phase"] == "serving");
        found.map(|listener| listener["address"].as_str().unwrap().parse().unwrap())
    };
    let load = Load::start(kept, "app", 4, 100);
    for round in 0..10_u32 {
        let changing = listener("changing").await.expect("both ports");
        let held = tokio::spawn(async move { get(changing, "app", "/gate").await });
        until("the held request", async || app.held() == 1).await;
        dir.replace("mesh.yaml", &one);
        process.signal("HUP");
        until("the port to go", async || listener("changing").await.is_none()).await;
        assert_eq!(get(kept, "app", "/").await.0, 200, "no connection to the port that stays is refused");
        // What was in flight at the port that went ends whole.
        app.gate.add_permits(1);
        let (status, body) = held.await.unwrap();
        assert_eq!(status, 200, "round {round}: {body}");
        dir.replace("mesh.yaml", &both);
        process.signal("HUP");
        until("the port to come back", async || listener("changing").await.is_some()).await;
        assert_eq!(listener("kept").await, Some(kept), "a port that stays keeps its socket");
    }
    let totals = load.stop().await;
    println!("c4: {totals:?}");
    assert!(totals.is_clean() && totals.connections == 4, "{totals:?}");
}

#[tokio::test]
async fn h9_an_upgrade_lives_through_a_drain_until_its_client_leaves() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service(app.addr));
    let config = dir.file("mesh.yaml");
    let mut sidecar = Process::start(
        SIDECAR,
        &["--config", &config, "--outbound", ANY, "--admin", ANY, "--drain-time", "10ms", "--log", "info"],
    );
    let mut stream = TcpStream::connect(sidecar.address("outbound")).await.unwrap();
    let ask = b"GET / HTTP/1.1\r\nhost: app\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
    stream.write_all(ask).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    sidecar.signal("TERM");
    until("the drain", async || sidecar.stderr().contains("draining")).await;
    let mut answer = [0_u8; 5];
    for text in [b"still", b"alive", b"after"] {
        stream.write_all(text).await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, text);
    }
    drop(stream);
    assert!(sidecar.wait().await.success(), "and then it ends at once");
}

#[tokio::test]
async fn h2_what_is_cut_at_the_deadline_is_in_the_access_log() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service(app.addr));
    let (config, log) = (dir.file("mesh.yaml"), dir.file("access.log"));
    let mut sidecar = Process::start(
        SIDECAR,
        &[
            "--config",
            &config,
            "--outbound",
            ANY,
            "--admin",
            ANY,
            "--drain-time",
            "10ms",
            "--drain-deadline",
            "200ms",
            "--access-log",
            &log,
        ],
    );
    let outbound = sidecar.address("outbound");
    let endless = tokio::spawn(async move { get(outbound, "app", "/slow").await });
    until("the request", async || app.requests() == 1).await;
    sidecar.signal("TERM");
    assert!(sidecar.wait().await.success());
    endless.await.unwrap();
    let line = std::fs::read_to_string(&log).unwrap();
    assert!(line.contains(" 200 DC,SI "), "{line}");
}

/// `app` with two versions, of which one has a subset, and a rule that sends everything to the subset `to`.
fn versions(one: &Echo, two: &Echo, subsets: &[&str], to: &str) -> (String, String) {
    let endpoint = |echo: &Echo, version: &str| {
        format!(
            "{{address: 127.0.0.1, ports: {{http: {}}}, labels: {{version: {version}}}}}",
            echo.addr.port()
        )
    };
    let subsets: String =
        subsets.iter().map(|name| format!("{{name: {name}, labels: {{version: {name}}}}},")).collect();
    let rule = format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app}}\nspec:\n  hosts: [app]\n  http: [{{route: [{{destination: {{host: app, subset: {to}}}}}]}}]\n"
    );
    let services = format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: app}}\nspec:\n  hosts: [app.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints: [{}, {}]\n---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: app}}\nspec: {{host: app, subsets: [{subsets}]}}\n",
        endpoint(one, "v1"),
        endpoint(two, "v2")
    );
    (rule, services)
}

#[tokio::test]
async fn x_09_a_subset_that_is_named_before_it_exists_fails_no_request() {
    let (one, two) = (Echo::start("v1").await, Echo::start("v2").await);
    let dir = ConfigDir::new();
    let (rule, services) = versions(&one, &two, &["v1"], "v1");
    dir.write("rule.yaml", &rule);
    dir.write("services.yaml", &services);
    let config = dir.path().to_str().unwrap();
    let sidecar = Process::start(SIDECAR, &["--config", config, "--outbound", ANY, "--admin", ANY]);
    let (outbound, admin) = (sidecar.address("outbound"), sidecar.address("admin"));
    let load = Load::start(outbound, "app", 2, 100);
    // The route first, and what it names a while later.
    let (rule, services) = versions(&one, &two, &["v1", "v2"], "v2");
    dir.replace("rule.yaml", &rule);
    until("the wait", async || sidecar.stderr().contains("what is in force stays")).await;
    assert_eq!(counter(admin, "generation").await, 1);
    assert!(get(outbound, "app", "/").await.1.contains("\"v1\""), "the last good generation");
    dir.replace("services.yaml", &services);
    until("the subset", async || get(outbound, "app", "/").await.1.contains("\"v2\"")).await;
    assert_eq!((counter(admin, "generation").await, counter(admin, "rejected").await), (2, 0));
    let totals = load.stop().await;
    assert!(totals.is_clean() && totals.whole > 10, "{totals:?}");
    // Whoever means it says so, or waits: nobody defines v3.
    dir.replace("rule.yaml", &versions(&one, &two, &[], "v3").0);
    sidecar.signal("HUP");
    until("the third generation", async || counter(admin, "generation").await == 3).await;
    assert_eq!(get(outbound, "app", "/").await.0, 503);
}

#[tokio::test]
async fn x_09_a_request_in_flight_keeps_the_generation_that_it_came_with() {
    let (one, two) = (Echo::start("v1").await, Echo::start("v2").await);
    let dir = ConfigDir::new();
    let both = |to: &str| {
        let (rule, services) = versions(&one, &two, &["v1", "v2"], to);
        format!("{rule}---\n{services}")
    };
    dir.write("mesh.yaml", &both("v1"));
    let config = dir.file("mesh.yaml");
    let sidecar = Process::start(SIDECAR, &["--config", &config, "--outbound", ANY, "--admin", ANY]);
    let outbound = sidecar.address("outbound");
    let held = tokio::spawn(async move { get(outbound, "app", "/gate").await });
    until("the held request", async || one.held() == 1).await;
    dir.replace("mesh.yaml", &both("v2"));
    until("the second generation", async || get(outbound, "app", "/").await.1.contains("\"v2\"")).await;
    one.gate.add_permits(1);
    let (status, body) = held.await.unwrap();
    assert!(status == 200 && body.contains("\"v1\""), "{status} {body}");
}

#[tokio::test]
async fn an_admin_connection_keeps_neither_the_log_nor_the_process() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &service(app.addr));
    let (config, log) = (dir.file("mesh.yaml"), dir.file("access.log"));
    let mut sidecar = Process::start(
        SIDECAR,
        &["--config", &config, "--outbound", ANY, "--admin", ANY, "--access-log", &log],
    );
    let mut watching = TcpStream::connect(sidecar.address("admin")).await.unwrap();
    watching.write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    assert_eq!(watching.read_u8().await.unwrap(), b'H');
    assert_eq!(get(sidecar.address("outbound"), "app", "/").await.0, 200);
    sidecar.signal("TERM");
    assert!(sidecar.wait().await.success());
    let said = sidecar.stderr();
    assert!(said.contains("drained") && !said.contains("not written to its end"), "{said}");
    assert_eq!(std::fs::read_to_string(&log).unwrap().lines().count(), 1);
    drop(watching);
}

#[tokio::test]
async fn a_file_behind_a_link_is_followed() {
    let app = Echo::start("app").await;
    let (dir, elsewhere) = (ConfigDir::new(), ConfigDir::new());
    elsewhere.write("mesh.yaml", &generation(app.addr, 0));
    symlink(elsewhere.path().join("mesh.yaml"), dir.path().join("mesh.yaml")).unwrap();
    let config = dir.path().to_str().unwrap();
    let sidecar = Process::start(SIDECAR, &["--config", config, "--outbound", ANY, "--admin", ANY]);
    elsewhere.replace("mesh.yaml", &generation(app.addr, 1));
    let outbound = sidecar.address("outbound");
    until("what the link leads to", async || in_force(outbound).await == "g1").await;
}

#[tokio::test]
async fn an_empty_file_keeps_the_last_good_configuration() {
    let app = Echo::start("app").await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &generation(app.addr, 1));
    let config = dir.file("mesh.yaml");
    let sidecar = Process::start(SIDECAR, &["--config", &config, "--outbound", ANY, "--admin", ANY]);
    let (outbound, admin) = (sidecar.address("outbound"), sidecar.address("admin"));
    let emptied = tokio::time::Instant::now();
    dir.write("mesh.yaml", "");
    let mut asked = 0;
    loop {
        let (generation, said) = (counter(admin, "generation").await, in_force_or_none(outbound).await);
        // Looked at after the answers came, so that an answer of this moment is judged by this moment.
        if emptied.elapsed() < Duration::from_secs(5) {
            assert_eq!((generation, said.as_deref()), (1, Some("g1")));
            asked += 1;
        } else if generation == 2 {
            break;
        }
        assert!(emptied.elapsed() < mesh_testkit::PATIENCE, "the empty file was never loaded");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(asked > 10, "{asked}");
    assert_eq!(in_force_or_none(outbound).await, None);
}
