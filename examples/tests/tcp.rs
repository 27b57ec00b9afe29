//! Connections that are not HTTP through the binaries: TLS by its server name without terminating it, bytes by weight.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod tls;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use mesh_testkit::process::{ConfigDir, Process};
use mesh_testkit::raw::{get, get_json};
use mesh_testkit::until;
use mesh_testkit::upstream::Echo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use tls::TlsUpstream;

const SIDECAR: &str = env!("CARGO_BIN_EXE_sidecar");
const GATEWAY: &str = env!("CARGO_BIN_EXE_gateway");
const ANY: &str = "127.0.0.1:0";

fn resource(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    )
}

/// A service outside of the cluster at these endpoints; its instances are labelled v1, v2 and so on.
fn entry(host: &str, port: &str, endpoints: &[SocketAddr]) -> String {
    let endpoints: Vec<_> = (1..)
        .zip(endpoints)
        .map(|(at, addr)| {
            format!("{{address: {}, ports: {{p: {}}}, labels: {{version: v{at}}}}}", addr.ip(), addr.port())
        })
        .collect();
    let spec = format!(
        "{{hosts: [{host}], location: MESH_INTERNAL, resolution: STATIC, ports: [{{{port}, name: p}}], endpoints: [{}]}}",
        endpoints.join(", ")
    );
    resource("ServiceEntry", &host.replace('.', "-"), &spec)
}

const TLS: &str = "number: 443, protocol: TLS";
const TCP: &str = "number: 9000, protocol: TCP";

/// An upstream that reads to the end and then says its name and how much it was.
async fn counting(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut all = Vec::new();
                if stream.read_to_end(&mut all).await.is_ok() {
                    let _ = stream.write_all(format!("{name} {}", all.len()).as_bytes()).await;
                }
            });
        }
    });
    addr
}

/// An upstream that gives back what it gets.
async fn echoing() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    addr
}

/// What comes back of bytes after which the client has no more; `Err` for a reset.
async fn exchange(peer: SocketAddr, bytes: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(peer).await?;
    stream.write_all(bytes).await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

fn gateway(dir: &ConfigDir, more: &[&str]) -> Process {
    let config = dir.file("mesh.yaml");
    let mut args = vec!["--config", &config, "--bind", "127.0.0.1", "--admin", ANY, "--log", "info"];
    args.extend(["--map-port", "443=0", "--map-port", "9000=0", "--map-port", "9001=0"]);
    args.extend(more);
    Process::start(GATEWAY, &args)
}

const EDGE: &str = "{servers: [\
    {port: {number: 443, name: tls, protocol: TLS}, hosts: ['*.example.com'], tls: {mode: PASSTHROUGH}}, \
    {port: {number: 9000, name: tcp, protocol: TCP}, hosts: ['*']}]}";

#[tokio::test]
async fn vs_04_tls_goes_by_its_server_name_and_is_not_terminated() {
    let one = TlsUpstream::start(&["a.example.com"]).await;
    let two = TlsUpstream::start(&["b.example.com", "x.b.example.com"]).await;
    let dir = ConfigDir::new();
    dir.write(
        "mesh.yaml",
        &[
            entry("a.example.com", TLS, &[one.addr]),
            entry("b.example.com", TLS, &[two.addr]),
            resource("Gateway", "edge", EDGE),
            resource(
                "VirtualService",
                "tls",
                "{hosts: ['*.example.com'], gateways: [edge], tls: [\
                 {match: [{sniHosts: [a.example.com]}], route: [{destination: {host: a.example.com}}]}, \
                 {match: [{sniHosts: [b.example.com, '*.b.example.com']}], route: [{destination: {host: b.example.com}}]}]}",
            ),
        ]
        .concat(),
    );
    let log = dir.file("access.log");
    let process = gateway(&dir, &["--access-log", &log]);
    let (peer, admin) = (process.address("tls"), process.address("admin"));
    let bytes = vec![7; 100_000];
    for (upstream, name) in [(&one, "a.example.com"), (&two, "b.example.com"), (&two, "x.b.example.com")] {
        // A hello of many records takes the same way.
        for fragment in [None, Some(64)] {
            let (said, back) = upstream.exchange(peer, name, fragment, &bytes).await.unwrap();
            let expected = if name == "a.example.com" { "a.example.com" } else { "b.example.com" };
            assert_eq!(said, expected);
            assert!(back == bytes, "{name}: {} bytes came back", back.len());
        }
    }
    // No rule is for this name, and none for a client that names none or speaks no TLS.
    for name in ["c.example.com", "127.0.0.1"] {
        assert!(one.exchange(peer, name, None, b"").await.is_err(), "{name}");
    }
    assert!(exchange(peer, b"GET / HTTP/1.1\r\n\r\n").await.is_err());
    let listeners = get_json(admin, "/listeners").await;
    let listener =
        &listeners["listeners"].as_array().unwrap().iter().find(|l| l["name"] == "tls").unwrap().clone();
    assert_eq!((listener["protocol"].as_str(), listener["accepted"].as_u64()), (Some("tls"), Some(9)));
    let dump = get_json(admin, "/config_dump").await;
    assert_eq!(dump["tcp_routes"]["routes"][0]["destinations"][0]["cluster"], "outbound|443||a.example.com");
    let clusters = get_json(admin, "/clusters").await;
    assert!(
        clusters["clusters"].as_array().unwrap().iter().any(|c| c["name"] == "outbound|443||b.example.com")
    );
    until("nine lines", async || std::fs::read_to_string(&log).is_ok_and(|log| log.lines().count() == 9))
        .await;
    let log = std::fs::read_to_string(&log).unwrap();
    assert_eq!(log.lines().filter(|line| line.contains("\"- - -\" 0 NR ")).count(), 3, "{log}");
    let of_one = log.lines().filter(|line| line.contains(" a.example.com tls.default.tls[0]"));
    assert_eq!(of_one.filter(|line| line.contains(&format!("\"{}\"", one.addr))).count(), 2, "{log}");
}

#[tokio::test]
async fn vs_04_a_sidecar_tells_tls_from_http_on_its_one_listener() {
    let (upstream, app) = (TlsUpstream::start(&["a.example.com"]).await, Echo::start("app").await);
    let dir = ConfigDir::new();
    let http = entry("app.example.com", "number: 80, protocol: HTTP", &[app.addr]);
    dir.write("mesh.yaml", &(http + &entry("a.example.com", TLS, &[upstream.addr])));
    let config = dir.file("mesh.yaml");
    let sidecar = Process::start(SIDECAR, &["--config", &config, "--outbound", ANY, "--admin", ANY]);
    let outbound = sidecar.address("outbound");
    assert_eq!(get(outbound, "app.example.com", "/").await.0, 200);
    let (said, back) = upstream.exchange(outbound, "a.example.com", None, b"through").await.unwrap();
    assert_eq!((said.as_str(), back.as_slice()), ("a.example.com", &b"through"[..]));
    assert_eq!(get(outbound, "app.example.com", "/").await.0, 200);
    let listeners = get_json(sidecar.address("admin"), "/listeners").await;
    assert_eq!(listeners["listeners"][0]["protocol"], "sniff");
}

/// `tcp.example.com` with a version for each upstream, behind the TCP server, and these weights.
fn split(upstreams: &[SocketAddr], weights: &[u32]) -> String {
    let subsets: Vec<_> =
        (1..=upstreams.len()).map(|at| format!("{{name: v{at}, labels: {{version: v{at}}}}}")).collect();
    let route: Vec<_> = (1..)
        .zip(weights)
        .map(|(at, weight)| {
            format!("{{destination: {{host: tcp.example.com, subset: v{at}}}, weight: {weight}}}")
        })
        .collect();
    [
        entry("tcp.example.com", TCP, upstreams),
        resource(
            "DestinationRule",
            "tcp",
            &format!("{{host: tcp.example.com, subsets: [{}]}}", subsets.join(", ")),
        ),
        resource("Gateway", "edge", EDGE),
        resource(
            "VirtualService",
            "tcp",
            &format!(
                "{{hosts: ['*'], gateways: [edge], tcp: [{{match: [{{port: 9000}}], route: [{}]}}]}}",
                route.join(", ")
            ),
        ),
    ]
    .concat()
}

#[tokio::test]
async fn vs_l03_bytes_go_by_weight_and_a_half_may_close() {
    let upstreams = [counting("v1").await, counting("v2").await];
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &split(&upstreams, &[75, 25]));
    let process = gateway(&dir, &[]);
    let peer = process.address("tcp");
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..400 {
        // The answer comes after the client's half has closed, and counts all of it.
        *counts.entry(exchange(peer, b"bytes").await.unwrap()).or_default() += 1;
    }
    println!("vs_l03: {counts:?}");
    assert_eq!(counts["v1 5"] + counts["v2 5"], 400);
    assert!((265..335).contains(&counts["v1 5"]), "{counts:?}");
    // More than any buffer on the way holds.
    let much = vec![1; 8 << 20];
    assert!(exchange(peer, &much).await.unwrap().ends_with(&format!(" {}", much.len())));
    // Weights that change hold for the next connection; the listener stays.
    dir.replace("mesh.yaml", &split(&upstreams, &[0, 1]));
    process.signal("HUP");
    let admin = process.address("admin");
    until("the new weights", async || get_json(admin, "/ready").await["generation"] == 2).await;
    for _ in 0..20 {
        assert_eq!(exchange(peer, b"").await.unwrap(), "v2 0");
    }
}

#[tokio::test]
async fn h9_bytes_outlive_reloads_and_a_drain_until_their_client_leaves() {
    let upstream = echoing().await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &split(&[upstream], &[1]));
    let mut process = gateway(&dir, &["--drain-time", "10ms"]);
    let (peer, admin) = (process.address("tcp"), process.address("admin"));
    let mut stream = TcpStream::connect(peer).await.unwrap();
    let echoes = async |stream: &mut TcpStream| {
        stream.write_all(b"echo").await.unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"echo");
    };
    echoes(&mut stream).await;
    let open = async || {
        let listeners = get_json(admin, "/listeners").await;
        let all = listeners["listeners"].as_array().unwrap().clone();
        all.iter().find(|listener| listener["name"] == "tcp").and_then(|listener| listener["open"].as_u64())
    };
    assert_eq!(open().await, Some(1));
    let cluster = async || {
        let clusters = get_json(admin, "/clusters").await;
        let all = clusters["clusters"].as_array().unwrap().clone();
        all.iter()
            .find(|cluster| cluster["name"] == "outbound|9000|v1|tcp.example.com")
            .and_then(|cluster| cluster["now"]["connections"].as_u64())
    };
    assert_eq!(cluster().await, Some(1));
    // The route goes, and then the listener; who is connected stays.
    dir.replace("mesh.yaml", &split(&[upstream], &[1]).replace("port: 9000}]", "port: 9001}]"));
    process.signal("HUP");
    until("a refusal", async || exchange(peer, b"echo").await.is_err()).await;
    echoes(&mut stream).await;
    let without = split(&[upstream], &[1]).replace("number: 9000, name: tcp", "number: 9001, name: other");
    dir.replace("mesh.yaml", &without);
    process.signal("HUP");
    until("the listener to go", async || open().await.is_none()).await;
    echoes(&mut stream).await;
    process.signal("TERM");
    until("the drain", async || process.stderr().contains("draining")).await;
    echoes(&mut stream).await;
    drop(stream);
    assert!(process.wait().await.success(), "and then it ends at once");
    assert!(process.stderr().contains("drained, nothing was in flight"), "{}", process.stderr());
}

#[tokio::test]
async fn h2_bytes_are_cut_at_the_drain_deadline_and_logged() {
    let upstream = echoing().await;
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &split(&[upstream], &[1]));
    let log = dir.file("access.log");
    let times = ["--drain-time", "10ms", "--drain-deadline", "200ms", "--access-log", &log];
    let mut process = gateway(&dir, &times);
    let mut stream = TcpStream::connect(process.address("tcp")).await.unwrap();
    stream.write_all(b"echo").await.unwrap();
    stream.read_exact(&mut [0; 4]).await.unwrap();
    process.signal("TERM");
    assert_eq!(stream.read(&mut [0; 4]).await.unwrap_or(0), 0);
    assert!(process.wait().await.success());
    let line = std::fs::read_to_string(&log).unwrap();
    assert!(line.contains("\"- - -\" 0 DC,SI - - \"-\" 4 4 "), "{line}");
}

#[test]
fn check_says_that_tcp_and_tls_routes_are_enforced() {
    let dir = ConfigDir::new();
    let config = |mode: &str| {
        split(&["127.0.0.1:9".parse().unwrap()], &[1]).replace("PASSTHROUGH", mode)
            + &entry("a.example.com", TLS, &["127.0.0.1:9".parse().unwrap()])
            + &resource(
                "VirtualService",
                "tls",
                "{hosts: [a.example.com], gateways: [edge], tls: [{match: [{sniHosts: [a.example.com]}], route: [{destination: {host: a.example.com}}]}]}",
            )
    };
    let check = |yaml: &str| {
        dir.write("mesh.yaml", yaml);
        let out =
            Command::new(GATEWAY).args(["--check", "--config", &dir.file("mesh.yaml")]).output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let (passed, said) = check(&config("PASSTHROUGH"));
    assert!(passed && said == "0 errors, 0 warnings\n", "{said}");
    // What nothing can serve is an error, and never served some other way: there is no identity here.
    let (passed, said) = check(&config("ISTIO_MUTUAL"));
    assert!(!passed && said.contains("spec.servers[0].tls"), "{said}");
}
