//! Connections that are not HTTP: VS-04, VS-05, VS-L01 … VS-L03, and what else decides where they go.

use std::collections::BTreeMap;
use std::future::pending;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mesh_core::config::{Compile as _, CompileContext, Role};
use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use mesh_core::server::Expect;
use mesh_core::{ConnInfo, Direction, Slot, UpstreamTls};
use mesh_route::{Clusters, Discovery, Shard, TcpDispatch, TcpReport, TcpRouteTable};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::TcpListener;

use crate::support::{accepted, in_namespace, mesh, refused, resource, sidecar, until, warned};

/// A compiled configuration, as connections see it.
struct It {
    set: ResourceSet,
    table: Arc<TcpRouteTable>,
    diags: Diagnostics,
}

fn compile_for(cx: &CompileContext, yaml: &str) -> It {
    let (set, mut diags) = ResourceSet::load(&[SourceFile::new("<test>", yaml)], &LoadOptions::default());
    assert!(!diags.has_errors(), "{diags}\n{yaml}");
    let table = TcpRouteTable::compile(&set, cx, &mut diags).unwrap();
    assert!(!diags.has_errors(), "{diags}\n{yaml}");
    It { set, table: Arc::new(table), diags }
}

fn compile(yaml: &str) -> It {
    compile_for(&CompileContext::new(Role::Sidecar), yaml)
}

fn compile_gateway(yaml: &str) -> It {
    let mut cx = CompileContext::new(Role::Gateway);
    cx.workload.labels = [("istio".to_owned(), "ingressgateway".to_owned())].into();
    compile_for(&cx, yaml)
}

/// A connection that was going to this address.
fn to(address: &str) -> ConnInfo {
    let original = Some(address.parse::<SocketAddr>().unwrap());
    ConnInfo { original_dst: original, ..ConnInfo::unknown(Direction::Outbound) }
}

/// A connection to this port of a gateway.
fn at(port: u16) -> ConnInfo {
    ConnInfo { port, ..ConnInfo::unknown(Direction::Gateway) }
}

impl It {
    /// The clusters that a connection may go to, with their weights where there are several.
    fn clusters(&self, conn: &ConnInfo, sni: Option<&str>) -> Option<String> {
        let route = self.table.select(conn, sni)?;
        let all: Vec<_> = route
            .destinations()
            .iter()
            .map(|(weight, to)| match route.destinations().iter().len() {
                1 => to.name.to_string(),
                _ => format!("{weight} {}", to.name),
            })
            .collect();
        Some(all.join(", "))
    }

    fn warns(&self, path: &str, reason: &str) {
        assert!(
            self.diags
                .iter()
                .any(|d| d.severity == Severity::Warning && d.path == path && d.message.contains(reason)),
            "no warning at {path} about {reason:?} in {}",
            self.diags
        );
    }

    fn unenforced(&self) -> Vec<String> {
        let left = self.set.unhonoured(&self.diags, Severity::Error).into_iter().map(|d| d.path);
        left.filter(|path| path.starts_with("spec.t") || path.contains(".tls")).collect()
    }

    fn dispatch(&self) -> TcpDispatch {
        Clusters::new().reconcile(self.table.clusters());
        TcpDispatch::new(Slot::fixed_shared(Arc::clone(&self.table)), Shard::seeded(1))
    }
}

/// A service outside of the cluster, with one port.
fn entry(host: &str, port: &str, more: &str) -> String {
    let name = host.trim_start_matches("*.").replace('.', "-");
    let spec = format!("{{hosts: ['{host}'], ports: [{{{port}}}], {more}}}");
    resource("ServiceEntry", &name, &spec)
}

const TLS: &str = "number: 443, name: tls, protocol: TLS";
const TCP: &str = "number: 9000, name: tcp, protocol: TCP";
const DNS: &str = "resolution: DNS";

/// A service at 10.0.0.1 with this port, and the rules of a virtual service for it.
fn with_rules(port: &str, rules: &str) -> String {
    let service = "addresses: [10.0.0.1], resolution: STATIC, endpoints: [{address: 127.0.0.1}], location: MESH_INTERNAL";
    entry("a.example.com", port, service)
        + &entry("b.example.com", port, DNS)
        + &resource("VirtualService", "v", &format!("{{hosts: [a.example.com], {rules}}}"))
}

fn rule(matches: &str, host: &str) -> String {
    let matches = if matches.is_empty() { String::new() } else { format!("match: [{matches}], ") };
    format!("{{{matches}route: [{{destination: {{host: {host}}}}}]}}")
}

#[test]
fn vs_04_tls_is_routed_by_its_server_name() {
    let service = entry("*.example.com", TLS, "resolution: NONE") + &entry("b.example.org", TLS, DNS);
    let rules = |rules: &str| {
        service.clone()
            + &resource("VirtualService", "v", &format!("{{hosts: ['*.example.com'], tls: [{rules}]}}"))
    };
    let yaml = rules(&rule("{sniHosts: [a.example.com, c.example.com]}", "b.example.org"));
    accepted(&yaml);
    let it = compile(&yaml);
    assert_eq!(it.unenforced(), [] as [&str; 0]);
    let destination = to("192.0.2.1:443");
    for (sni, expected) in [
        (Some("a.example.com"), "outbound|443||b.example.org"),
        (Some("c.example.com"), "outbound|443||b.example.org"),
        // Nobody's: as for any destination that is not known.
        (Some("d.example.com"), "PassthroughCluster"),
        (None, "PassthroughCluster"),
        // A service that no rule is for, by its own name.
        (Some("b.example.org"), "outbound|443||b.example.org"),
    ] {
        assert_eq!(it.clusters(&destination, sni).as_deref(), Some(expected), "{sni:?}");
    }
    assert_eq!(it.table.expect(&destination), Expect::Tls { patience: None });
    // TLS that names no destination is looked up where HTTPS is.
    let unredirected = ConnInfo::unknown(Direction::Outbound);
    assert_eq!(it.table.expect(&unredirected), Expect::HttpOrTls);
    assert_eq!(
        it.clusters(&unredirected, Some("a.example.com")).as_deref(),
        Some("outbound|443||b.example.org")
    );
    // The match is required.
    refused(&rules(&rule("", "b.example.org")), "spec.tls[0].match", "needs a match");
    // The rules are for ports that speak TLS; elsewhere they have no effect, and that is said.
    for port in [TCP, "number: 80, name: http, protocol: HTTP"] {
        let it = compile(&with_rules(
            port,
            &format!("tls: [{}]", rule("{sniHosts: [a.example.com]}", "b.example.com")),
        ));
        it.warns("spec.tls", "no service of these hosts has a port for TLS");
    }
}

#[test]
fn vs_05_tcp_is_routed_by_the_first_rule() {
    let destination = to("10.0.0.1:9000");
    // A match is optional, a route is not.
    let yaml = with_rules(TCP, &format!("tcp: [{}]", rule("", "b.example.com")));
    accepted(&yaml);
    let it = compile(&yaml);
    assert_eq!(it.unenforced(), [] as [&str; 0]);
    assert_eq!(it.clusters(&destination, None).as_deref(), Some("outbound|9000||b.example.com"));
    assert_eq!(it.table.expect(&destination), Expect::Tcp);
    refused(&with_rules(TCP, "tcp: [{match: [{port: 9000}]}]"), "spec.tcp[0].route", "needs a destination");
    // The first rule that applies takes everything; without one it is the service itself.
    let it = compile(&with_rules(
        TCP,
        &format!(
            "tcp: [{}, {}, {}]",
            rule("{port: 9001}", "c.example.com"),
            rule("{port: 9000}", "b.example.com"),
            rule("", "d.example.com")
        ),
    ));
    assert_eq!(it.clusters(&destination, None).as_deref(), Some("outbound|9000||b.example.com"));
    let it = compile(&with_rules(TCP, &format!("tcp: [{}]", rule("{port: 9001}", "b.example.com"))));
    assert_eq!(it.clusters(&destination, None).as_deref(), Some("outbound|9000||a.example.com"));
    // HTTP rules of the same host in another resource do not matter, nor the other way round.
    let http = resource(
        "VirtualService",
        "w",
        "{hosts: [a.example.com], http: [{route: [{destination: {host: b.example.com}}]}]}",
    );
    let both = with_rules(TCP, &format!("tcp: [{}]", rule("", "b.example.com"))) + &http;
    assert_eq!(compile(&both).clusters(&destination, None).as_deref(), Some("outbound|9000||b.example.com"));
    assert!(
        !crate::support::compile(&both).diags.iter().any(|d| d.code == Some("IST0109")),
        "neither takes the host from the other"
    );
    // A destination that is not known is said, and known to be none.
    let it = compile(&with_rules(TCP, &format!("tcp: [{}]", rule("", "nobody.example.com"))));
    it.warns("spec.tcp[0].route[0].destination.host", "no service has the host");
    assert_eq!(it.clusters(&destination, None).as_deref(), Some("outbound|9000||nobody.example.com"));
    // A rule behind one that takes everything.
    warned(
        &with_rules(TCP, &format!("tcp: [{}, {}]", rule("", "b.example.com"), rule("", "a.example.com"))),
        "spec.tcp[1]",
        "",
    );
}

#[test]
fn vs_l01_tls_matches() {
    let taken = |matched: &str, sni: &str| {
        let rules = format!("tls: [{}]", rule(matched, "b.example.com"));
        let yaml = with_rules(TLS, &rules).replace("hosts: [a.example.com], tls", "hosts: ['*.com'], tls");
        let labelled = sidecar("default", &[("app", "web")]);
        let it = compile_for(&labelled, &yaml);
        it.clusters(&to("10.0.0.1:443"), Some(sni)).as_deref() == Some("outbound|443||b.example.com")
    };
    for (matched, sni, expected) in [
        ("{sniHosts: [a.example.com]}", "a.example.com", true),
        ("{sniHosts: [a.example.com]}", "c.example.com", false),
        // A wildcard matches any number of labels, and not its parent.
        ("{sniHosts: ['*.com']}", "foo.example.com", true),
        ("{sniHosts: ['*.example.com']}", "foo.example.com", true),
        ("{sniHosts: ['*.example.com']}", "example.com", false),
        ("{sniHosts: [A.Example.com]}", "a.example.com", true),
        ("{sniHosts: ['*.com'], port: 443}", "a.com", true),
        ("{sniHosts: ['*.com'], port: 444}", "a.com", false),
        ("{sniHosts: ['*.com'], destinationSubnets: [10.0.0.0/8]}", "a.com", true),
        ("{sniHosts: ['*.com'], destinationSubnets: [10.0.0.1]}", "a.com", true),
        ("{sniHosts: ['*.com'], destinationSubnets: [10.1.0.0/16]}", "a.com", false),
        ("{sniHosts: ['*.com'], sourceLabels: {app: web}}", "a.com", true),
        ("{sniHosts: ['*.com'], sourceLabels: {app: db}}", "a.com", false),
        ("{sniHosts: ['*.com'], sourceNamespace: default}", "a.com", true),
        ("{sniHosts: ['*.com'], sourceNamespace: other}", "a.com", false),
        ("{sniHosts: ['*.com'], gateways: [mesh]}", "a.com", true),
        ("{sniHosts: ['*.com'], gateways: [edge]}", "a.com", false),
    ] {
        assert_eq!(taken(matched, sni), expected, "{matched} {sni}");
    }
    let refuse = |matched: &str, field: &str, reason: &str| {
        let yaml = with_rules(TLS, &format!("tls: [{}]", rule(matched, "b.example.com")));
        refused(&yaml, &format!("spec.tls[0].match[0].{field}"), reason);
    };
    refuse("{port: 443}", "sniHosts", "needs a server name");
    refuse("{sniHosts: [b.example.com]}", "sniHosts[0]", "not within the hosts");
    refuse("{sniHosts: ['*.example.com']}", "sniHosts[0]", "not within the hosts");
    refuse("{sniHosts: [a.example.com], destinationSubnets: [x]}", "destinationSubnets[0]", "");

    // The exact name before the longest wildcard before a shorter one, in whatever order they are written.
    let it = compile(
        &(entry("*.com", TLS, "resolution: NONE")
            + &["a", "b", "c"].map(|name| entry(&format!("{name}.example.org"), TLS, DNS)).concat()
            + &resource(
                "VirtualService",
                "v",
                &format!(
                    "{{hosts: ['*.com'], tls: [{}, {}, {}]}}",
                    rule("{sniHosts: ['*.com']}", "a.example.org"),
                    rule("{sniHosts: ['*.foo.com']}", "b.example.org"),
                    rule("{sniHosts: [bar.foo.com]}", "c.example.org")
                ),
            )),
    );
    for (sni, host) in [("x.com", "a"), ("x.foo.com", "b"), ("x.y.foo.com", "b"), ("bar.foo.com", "c")] {
        assert_eq!(
            it.clusters(&to("192.0.2.1:443"), Some(sni)).unwrap(),
            format!("outbound|443||{host}.example.org"),
            "{sni}"
        );
    }
}

#[test]
fn vs_l02_tcp_matches() {
    let clusters = |matched: &str, cx: &CompileContext| {
        let it = compile_for(cx, &with_rules(TCP, &format!("tcp: [{}]", rule(matched, "b.example.com"))));
        it.clusters(&to("10.0.0.1:9000"), None).unwrap()
    };
    let labelled = sidecar("default", &[("app", "web")]);
    for (matched, expected) in [
        ("{port: 9000}", true),
        ("{port: 9001}", false),
        ("{destinationSubnets: [10.0.0.0/8]}", true),
        ("{destinationSubnets: [10.1.0.0/16, 10.0.0.1]}", true),
        ("{destinationSubnets: [10.1.0.0/16]}", false),
        ("{sourceLabels: {app: web}}", true),
        ("{sourceLabels: {app: db}}", false),
        ("{sourceNamespace: default}", true),
        ("{sourceNamespace: other}", false),
        ("{gateways: [mesh]}", true),
        ("{gateways: [edge]}", false),
        // All of a match, any of several.
        ("{port: 9000, sourceNamespace: other}", false),
        ("{port: 9001}, {port: 9000}", true),
    ] {
        let host = if expected { "b" } else { "a" };
        assert_eq!(clusters(matched, &labelled), format!("outbound|9000||{host}.example.com"), "{matched}");
    }
    // Where the service has no address of its own the subnets are those of the client's choice.
    let yaml = entry("a.example.com", TCP, "resolution: NONE")
        + &entry("b.example.com", "number: 9001, name: tcp, protocol: TCP", DNS)
        + &resource(
            "VirtualService",
            "v",
            &format!(
                "{{hosts: [a.example.com], tcp: [{}]}}",
                rule("{destinationSubnets: [10.7.0.0/16, 10.8.0.1]}", "b.example.com")
            ),
        );
    let it = compile(&yaml);
    for (address, cluster) in [
        ("10.7.1.1:9000", "outbound|9001||b.example.com"),
        ("10.8.0.1:9000", "outbound|9001||b.example.com"),
        ("10.8.0.2:9000", "outbound|9000||a.example.com"),
        ("10.7.1.1:9999", "PassthroughCluster"),
    ] {
        assert_eq!(it.clusters(&to(address), None).as_deref(), Some(cluster), "{address}");
    }
    // Subnets in which the service is not.
    let it = compile(&with_rules(
        TCP,
        &format!("tcp: [{}]", rule("{destinationSubnets: [10.1.0.0/16]}", "b.example.com")),
    ));
    it.warns("spec.tcp[0].match[0].destinationSubnets", "no effect");
    // Of the client's address nothing is asked: the field is hidden in Istio, and reported here.
    let it = compile(&with_rules(
        TCP,
        &format!("tcp: [{}]", rule("{port: 9000, sourceSubnet: 10.0.0.0/8}", "b.example.com")),
    ));
    assert_eq!(it.unenforced(), ["spec.tcp[0].match[0].sourceSubnet"]);
}

/// An upstream that says its name and gives back what it gets, and counts its connections.
struct Upstream {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Upstream {
    async fn start(name: &'static str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (addr, connections) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = write.write_all(name.as_bytes()).await;
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        Self { addr, connections }
    }
}

/// `db.example.com` at 10.0.0.2:9000, with these versions, and rules for it.
fn database(versions: &[SocketAddr], policy: &str, rules: &str) -> String {
    let endpoints: Vec<_> = (1..)
        .zip(versions)
        .map(|(at, addr)| {
            format!("{{address: {}, ports: {{tcp: {}}}, labels: {{version: v{at}}}}}", addr.ip(), addr.port())
        })
        .collect();
    let service = format!(
        "{{hosts: [db.example.com], addresses: [10.0.0.2], location: MESH_INTERNAL, resolution: STATIC, ports: [{{{TCP}}}], endpoints: [{}]}}",
        endpoints.join(", ")
    );
    let subsets = format!(
        "{{host: db.example.com, {policy}subsets: [{{name: v1, labels: {{version: v1}}}}, {{name: v2, labels: {{version: v2}}}}]}}"
    );
    let rules = match rules {
        "" => String::new(),
        rules => resource("VirtualService", "db", &format!("{{hosts: [db.example.com], tcp: [{rules}]}}")),
    };
    resource("ServiceEntry", "db", &service) + &resource("DestinationRule", "db", &subsets) + &rules
}

type Ended = tokio::task::JoinHandle<TcpReport>;

/// Our end of a connection to the database, and what becomes of it.
fn connect(dispatch: &TcpDispatch, address: &str) -> (DuplexStream, Ended) {
    let (ours, theirs) = tokio::io::duplex(1 << 10);
    let (dispatch, conn) = (dispatch.clone(), to(address));
    (ours, tokio::spawn(async move { dispatch.forward(&conn, None, None, theirs, pending()).await }))
}

async fn exchange(dispatch: &TcpDispatch, address: &str) -> (String, TcpReport) {
    let (mut ours, ended) = connect(dispatch, address);
    ours.write_all(b"!").await.ok();
    ours.shutdown().await.ok();
    let mut answer = String::new();
    ours.read_to_string(&mut answer).await.unwrap();
    (answer, ended.await.unwrap())
}

const DB: &str = "10.0.0.2:9000";

#[tokio::test]
async fn vs_l03_weights() {
    let (one, two) = (Upstream::start("v1").await, Upstream::start("v2").await);
    let split = |weights: &[(&str, &str)]| {
        let destinations: Vec<_> = weights
            .iter()
            .map(|(subset, weight)| {
                format!("{{destination: {{host: db.example.com, subset: {subset}}}{weight}}}")
            })
            .collect();
        database(&[one.addr, two.addr], "", &format!("{{route: [{}]}}", destinations.join(", ")))
    };
    let count = |yaml: String, connections: usize| {
        let dispatch = compile(&yaml).dispatch();
        async move {
            let mut counts = BTreeMap::new();
            for _ in 0..connections {
                *counts.entry(exchange(&dispatch, DB).await.0).or_insert(0) += 1;
            }
            counts
        }
    };
    let counts = count(split(&[("v1", ", weight: 75"), ("v2", ", weight: 25")]), 400).await;
    let share = counts["v1!"];
    assert!((270..330).contains(&share) && share + counts["v2!"] == 400, "{counts:?}");
    // A share is of the sum; one alone has everything, whatever its weight; zero among several has nothing.
    for (weights, expected) in [
        (&[("v1", ", weight: 0")][..], "v1!"),
        (&[("v2", "")], "v2!"),
        (&[("v1", ", weight: 0"), ("v2", ", weight: 7")], "v2!"),
    ] {
        assert_eq!(count(split(weights), 20).await, BTreeMap::from([(expected.to_owned(), 20)]));
    }
    refused(&split(&[("v1", ", weight: 0"), ("v2", ", weight: 0")]), "spec.tcp[0].route", "");
    refused(&split(&[("v1", ", weight: -1")]), "spec.tcp[0].route[0].weight", "");
    let it = compile(&split(&[("v1", ", weight: 75"), ("v2", ", weight: 25")]));
    assert_eq!(
        it.clusters(&to(DB), None).unwrap(),
        "75 outbound|9000|v1|db.example.com, 25 outbound|9000|v2|db.example.com"
    );
}

#[tokio::test]
async fn vs_05_what_becomes_of_a_connection_is_reported() {
    let one = Upstream::start("v1").await;
    let yaml = database(&[one.addr], "", "");
    let (answer, report) = exchange(&compile(&yaml).dispatch(), DB).await;
    assert_eq!(answer, "v1!");
    assert_eq!((report.flags.to_string(), report.received_bytes, report.sent_bytes), ("-".to_owned(), 1, 3));
    assert_eq!(report.upstream, Some(one.addr));
    assert!(report.upstream_local.is_some());
    assert_eq!(
        (report.route.as_deref(), report.cluster.as_deref()),
        (Some("default"), Some("outbound|9000||db.example.com"))
    );

    // UF: nobody listens; and a destination rule that demands TLS is never served in plain text.
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    let (answer, report) = exchange(&compile(&database(&[closed], "", "")).dispatch(), DB).await;
    assert_eq!((answer.as_str(), report.flags.to_string().as_str()), ("", "UF"));
    assert!(report.transport_failure.unwrap().contains("refused"));
    let before = one.connections.load(Ordering::Relaxed);
    let demanding = database(&[one.addr], "trafficPolicy: {tls: {mode: SIMPLE}}, ", "");
    let (_, report) = exchange(&compile(&demanding).dispatch(), DB).await;
    assert_eq!(report.flags.to_string(), "UF");
    assert_eq!(one.connections.load(Ordering::Relaxed), before);

    // UH: no endpoint; NC: no such destination; NR: no route.
    let (_, report) = exchange(&compile(&database(&[], "", "")).dispatch(), DB).await;
    assert_eq!(report.flags.to_string(), "UH");
    let unknown = database(&[one.addr], "", &rule("", "nobody.example.com"));
    let (_, report) = exchange(&compile(&unknown).dispatch(), DB).await;
    assert_eq!(report.flags.to_string(), "NC");
    let nothing = compile_gateway(&database(&[one.addr], "", ""));
    let (_, report) = exchange(&nothing.dispatch(), DB).await;
    assert_eq!((report.flags.to_string().as_str(), report.route), ("NR", None));
}

#[tokio::test]
async fn dr_cp01_connections_are_limited_exactly() {
    let one = Upstream::start("v1").await;
    let policy = "trafficPolicy: {connectionPool: {tcp: {maxConnections: 2}}}, ";
    let it = compile(&database(&[one.addr], policy, ""));
    let dispatch = it.dispatch();
    let cluster =
        it.table.clusters().iter().find(|c| c.name().as_str().ends_with("||db.example.com")).unwrap();
    let runtime = cluster.runtime().unwrap();
    let mut held = Vec::new();
    for _ in 0..2 {
        let (mut ours, ended) = connect(&dispatch, DB);
        let mut name = [0; 2];
        ours.read_exact(&mut name).await.unwrap();
        held.push((ours, ended));
    }
    assert_eq!((runtime.connections(), cluster.endpoints().iter().next().unwrap().connections()), (2, 2));
    let (answer, report) = exchange(&dispatch, DB).await;
    assert_eq!((answer.as_str(), report.flags.to_string().as_str()), ("", "UO"));
    assert_eq!((runtime.connections(), runtime.overflows()), (2, 1));
    let (ours, ended) = held.remove(0);
    drop(ours);
    ended.await.unwrap();
    assert_eq!(exchange(&dispatch, DB).await.0, "v1!");
    drop(held);
    until(|| runtime.connections() == 0).await;
    assert_eq!(cluster.endpoints().iter().next().unwrap().in_flight(), 0);
}

#[tokio::test]
async fn dr_od05_connections_that_cannot_be_made_eject() {
    let sound = Upstream::start("v1").await;
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    for (detection, why) in [
        ("consecutive5xxErrors: 2", "2 consecutive5xxErrors reached, last Unreachable"),
        (
            "splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 2",
            "2 consecutiveLocalOriginFailures reached, last Unreachable",
        ),
    ] {
        let policy = format!(
            "trafficPolicy: {{outlierDetection: {{{detection}, maxEjectionPercent: 50}}, loadBalancer: {{simple: ROUND_ROBIN}}}}, "
        );
        let it = compile(&database(&[closed, sound.addr], &policy, ""));
        let dispatch = it.dispatch();
        let mut failed = 0;
        for _ in 0..12 {
            let (answer, report) = exchange(&dispatch, DB).await;
            match report.flags.to_string().as_str() {
                "UF" => failed += 1,
                _ => assert_eq!(answer, "v1!"),
            }
        }
        assert_eq!(failed, 2, "{detection}");
        let cluster =
            it.table.clusters().iter().find(|c| c.name().as_str().ends_with("||db.example.com")).unwrap();
        let ejection = cluster.runtime().unwrap().with_outliers(|detector| detector.ejection(&closed));
        assert_eq!(ejection.unwrap().evidence.to_string(), why);
    }
}

#[tokio::test]
async fn dr_lb02_a_connection_is_kept_by_its_address() {
    let all = [Upstream::start("a").await, Upstream::start("b").await, Upstream::start("c").await];
    let policy = "trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true}}}, ";
    let addresses: Vec<_> = all.iter().map(|upstream| upstream.addr).collect();
    let dispatch = compile(&database(&addresses, policy, "")).dispatch();
    let answer = async |peer: String| {
        let (mut ours, theirs) = tokio::io::duplex(1 << 10);
        let conn = ConnInfo { peer: peer.parse().unwrap(), ..to(DB) };
        let dispatch = dispatch.clone();
        tokio::spawn(async move { dispatch.forward(&conn, None, None, theirs, pending()).await });
        let mut name = [0; 1];
        ours.read_exact(&mut name).await.unwrap();
        name[0]
    };
    let mut seen = std::collections::BTreeSet::new();
    for host in 1..20 {
        let first = answer(format!("10.0.0.{host}:1000")).await;
        assert_eq!(answer(format!("10.0.0.{host}:2000")).await, first);
        seen.insert(first);
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
}

#[test]
fn dr_cp01_idle_timeout_of_tcp() {
    let idle = |tcp: &str| {
        let policy =
            format!("trafficPolicy: {{connectionPool: {{tcp: {{{tcp}}}, http: {{idleTimeout: 7s}}}}}}, ");
        let it = compile(&database(&[], &policy, ""));
        let found = it.table.clusters().iter().find(|c| c.name().as_str().ends_with("||db.example.com"));
        found.unwrap().spec().pool.tcp_idle_timeout
    };
    assert_eq!(idle("maxConnections: 1"), Some(Duration::from_secs(3600)));
    assert_eq!(idle("idleTimeout: 30s"), Some(Duration::from_secs(30)));
    assert_eq!(idle("idleTimeout: 0s"), None);
}

#[tokio::test]
async fn sc_02_destinations_that_nobody_knows() {
    let one = Upstream::start("anywhere").await;
    let address = one.addr.to_string();
    let dispatch = compile("").dispatch();
    let (answer, report) = exchange(&dispatch, &address).await;
    assert_eq!(answer, "anywhere!");
    assert_eq!(report.cluster.as_deref(), Some("PassthroughCluster"));
    let only = mesh("outboundTrafficPolicy: {mode: REGISTRY_ONLY}");
    let (answer, report) = exchange(&compile(&only).dispatch(), &address).await;
    assert_eq!((answer.as_str(), report.flags.to_string().as_str()), ("", "UH"));
    assert_eq!(report.cluster.as_deref(), Some("BlackHoleCluster"));
    assert_eq!(one.connections.load(Ordering::Relaxed), 1);
    let of_sidecar = resource("Sidecar", "s", "{outboundTrafficPolicy: {mode: REGISTRY_ONLY}}");
    let (_, report) = exchange(&compile(&of_sidecar).dispatch(), &address).await;
    assert_eq!(report.cluster.as_deref(), Some("BlackHoleCluster"));
}

#[test]
fn pt_04_what_is_expected_at_a_destination() {
    let kubernetes = |name: &str, ip: &str, port: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec: {{clusterIP: {ip}, ports: [{{{port}}}]}}\n"
        )
    };
    let yaml = kubernetes("web", "10.0.0.1", "port: 80, name: http")
        + &kubernetes("db", "10.0.0.2", "port: 3306, name: db")
        + &kubernetes("any", "10.0.0.3", "port: 7000, name: any")
        + &kubernetes("tcp", "10.0.0.4", "port: 80, name: tcp")
        + &kubernetes("secure", "10.0.0.5", "port: 443, name: https")
        + &entry("x.example.com", "number: 8443, name: tls, protocol: TLS", DNS)
        + &mesh("protocolDetectionTimeout: 5s");
    let it = compile(&yaml);
    let patience = Some(Duration::from_secs(5));
    assert!(it.diags.is_mesh_honoured("protocolDetectionTimeout"));
    for (address, expected) in [
        ("10.0.0.1:80", Expect::Http),
        ("192.0.2.1:80", Expect::Http),
        ("10.0.0.2:3306", Expect::Tcp),
        ("10.0.0.3:7000", Expect::Sniff { patience }),
        // Another address and another protocol at the same port.
        ("10.0.0.4:80", Expect::Tcp),
        // The address says it all.
        ("10.0.0.5:443", Expect::Tcp),
        ("192.0.2.1:8443", Expect::Tls { patience }),
        // Nobody knows it: its server may speak first.
        ("192.0.2.1:22", Expect::Tcp),
    ] {
        assert_eq!(it.table.expect(&to(address)), expected, "{address}");
    }
    // Bytes at a port that may be HTTP go to the service too.
    assert_eq!(
        it.clusters(&to("10.0.0.3:7000"), None).unwrap(),
        "outbound|7000||any.default.svc.cluster.local"
    );
    assert_eq!(
        it.clusters(&to("10.0.0.5:443"), Some("whatever")).unwrap(),
        "outbound|443||secure.default.svc.cluster.local"
    );
    // Without the setting a client is waited for without end, as in Istio.
    let silent = kubernetes("any", "10.0.0.3", "port: 7000, name: any");
    for settings in ["", "protocolDetectionTimeout: 0s"] {
        let yaml = if settings.is_empty() { silent.clone() } else { silent.clone() + &mesh(settings) };
        assert_eq!(compile(&yaml).table.expect(&to("10.0.0.3:7000")), Expect::Sniff { patience: None });
    }
}

#[tokio::test]
async fn se_03_a_client_that_chose_an_instance_keeps_it() {
    let (one, two) = (Upstream::start("one").await, Upstream::start("two").await);
    // Without resolution it is the address that the client connected to.
    let port = format!("number: {}, name: tcp, protocol: TCP", one.addr.port());
    let it = compile(&entry("db.example.com", &port, "resolution: NONE"));
    let (answer, report) = exchange(&it.dispatch(), &one.addr.to_string()).await;
    assert_eq!(answer, "one!");
    assert!(report.cluster.unwrap().ends_with("||db.example.com"));
    // A headless service has no address of its own; its clients find the instances by DNS.
    let headless = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: db, namespace: default}}\nspec: {{clusterIP: None, ports: [{{port: {port}, name: tcp}}]}}\n---\napiVersion: v1\nkind: Endpoints\nmetadata: {{name: db, namespace: default}}\nsubsets: [{{addresses: [{{ip: 127.0.0.1}}, {{ip: 127.0.0.9}}], ports: [{{name: tcp, port: {port}}}]}}]\n",
        port = two.addr.port()
    );
    let it = compile(&headless);
    for _ in 0..10 {
        let (answer, report) = exchange(&it.dispatch(), &two.addr.to_string()).await;
        assert_eq!((answer.as_str(), report.upstream), ("two!", Some(two.addr)));
        assert_eq!(report.route.as_deref(), Some("default"));
    }
}

fn gateway(servers: &str) -> String {
    resource("Gateway", "edge", &format!("{{selector: {{istio: ingressgateway}}, servers: [{servers}]}}"))
}

#[test]
fn gw_04_passthrough_and_tcp_servers() {
    let services = ["a", "b"].map(|name| entry(&format!("{name}.example.com"), TLS, DNS)).concat();
    let servers = "{port: {number: 443, name: tls, protocol: TLS}, hosts: ['*.example.com'], tls: {mode: PASSTHROUGH}}, \
                   {port: {number: 8443, name: https, protocol: HTTPS}, hosts: ['default/*'], tls: {mode: PASSTHROUGH}}, \
                   {port: {number: 9000, name: tcp, protocol: TCP}, hosts: ['*']}, \
                   {port: {number: 27017, name: mongo, protocol: MONGO}, hosts: ['*']}";
    let rules = format!(
        "{{hosts: ['*.example.com'], gateways: [edge], tls: [{}, {}], tcp: [{}, {}]}}",
        rule("{sniHosts: [a.example.com]}", "a.example.com"),
        rule("{port: 8443, sniHosts: ['*.example.com']}", "b.example.com"),
        rule("{port: 9000, gateways: [edge]}", "b.example.com"),
        rule("{port: 27017, gateways: [other]}", "b.example.com"),
    );
    let yaml = services.clone() + &gateway(servers) + &resource("VirtualService", "v", &rules);
    accepted(&yaml);
    let it = compile_gateway(&yaml);
    assert_eq!(it.unenforced(), [] as [&str; 0]);
    let (a, b) = (Some("outbound|443||a.example.com"), Some("outbound|443||b.example.com"));
    for (port, sni, expected) in [
        (443, Some("a.example.com"), a),
        (443, Some("c.example.com"), None),
        (443, None, None),
        (8443, Some("a.example.com"), a),
        (8443, Some("c.example.com"), b),
        (9000, None, b),
        (27017, None, None),
        (9999, None, None),
    ] {
        assert_eq!(it.clusters(&at(port), sni).as_deref(), expected, "{port} {sni:?}");
    }
    // A sidecar has none of it.
    assert_eq!(compile(&yaml).clusters(&at(9000), None), None);
    // The rules have to share a host with the server, name the gateway, and be exported to it.
    let with = |namespace: &str, spec: &str| {
        let rules = format!("{{{spec}, tcp: [{}]}}", rule("", "b.example.com"));
        let yaml =
            services.clone() + &gateway(servers) + &in_namespace(namespace, "VirtualService", "v", &rules);
        compile_gateway(&yaml).clusters(&at(9000), None).is_some()
    };
    assert!(with("default", "hosts: ['*'], gateways: [edge]"));
    assert!(with("other", "hosts: ['*'], gateways: [default/edge]"));
    assert!(!with("other", "hosts: ['*'], gateways: [edge]"));
    assert!(!with("other", "hosts: ['*'], gateways: [default/edge], exportTo: ['.']"));
    assert!(!with("default", "hosts: [a.example.com]"));
    // Two virtual services for the same connections: the older has them, and it is said.
    let twice = ["v", "w"].map(|name| {
        let rules = rule("{sniHosts: [a.example.com]}", "b.example.com");
        resource(
            "VirtualService",
            name,
            &format!("{{hosts: ['*.example.com'], gateways: [edge], tls: [{rules}]}}"),
        )
    });
    let it = compile_gateway(&(services + &gateway(servers) + &twice.concat()));
    it.warns("spec.tls[0].match", "taken by the route \"v.default.tls[0]\"");
}

/// For a gateway whose stack ends TLS.
fn compile_terminating(yaml: &str) -> It {
    let mut cx = CompileContext::new(Role::Gateway);
    cx.workload.labels = [("istio".to_owned(), "ingressgateway".to_owned())].into();
    cx.transport.terminates_servers = true;
    compile_for(&cx, yaml)
}

impl It {
    /// Where the bytes go whose TLS was ended under this name.
    fn within(&self, sni: Option<&str>) -> Option<String> {
        let route = self.table.select_within(&at(443), sni)?;
        route.destinations().iter().next().map(|(_, to)| to.name.to_string())
    }
}

fn tls(hosts: &str, tls: &str) -> String {
    format!(
        "{{port: {{number: 443, name: tls{}, protocol: TLS}}, hosts: {hosts}, tls: {{{tls}}}}}",
        hosts.len()
    )
}

#[test]
fn gw_04_what_is_behind_a_server_is_had_by_its_own_handshake_alone() {
    let gateway = |name: &str, servers: &str| {
        resource("Gateway", name, &format!("{{selector: {{istio: ingressgateway}}, servers: [{servers}]}}"))
    };
    let rules = resource(
        "VirtualService",
        "v",
        &format!("{{hosts: ['*'], gateways: [guarded], tcp: [{}]}}", rule("", "db.example.com")),
    );
    let db = Some("outbound|9000||db.example.com");
    for wide in ["['*.example.com']", "['*']"] {
        let others = [
            tls("[p.example.com]", "mode: PASSTHROUGH"),
            tls("[so.example.com]", "mode: SIMPLE, credentialName: own"),
            "{port: {number: 443, name: https, protocol: HTTPS}, hosts: [h.example.com], tls: {mode: SIMPLE, credentialName: own}}".to_owned(),
            tls("['*.example.net']", "mode: AUTO_PASSTHROUGH"),
        ];
        let guarded = gateway("guarded", &tls(wide, "mode: MUTUAL, credentialName: own"));
        for yaml in [
            guarded.clone() + &gateway("open", &others.join(", ")),
            gateway("open", &others.join(", ")) + &guarded,
        ] {
            let it = compile_terminating(&(entry("db.example.com", TCP, DNS) + &yaml + &rules));
            assert_eq!(it.unenforced(), [] as [&str; 0]);
            assert_eq!(it.within(Some("a.example.com")).as_deref(), db);
            assert_eq!(it.within(Some("A.example.com")).as_deref(), db);
            // Their handshakes asked for no certificate, or were none of ours.
            for foreign in ["p.example.com", "so.example.com", "h.example.com", "a.example.net"] {
                assert_eq!(it.within(Some(foreign)), None, "{foreign}");
            }
            // Whoever asks for no name shook hands with the server that answers to any.
            assert_eq!(it.within(None).as_deref(), db.filter(|_| wide == "['*']"));
            assert_eq!(it.within(Some("example.org")).as_deref(), db.filter(|_| wide == "['*']"));
            // What is passed on has no handshake at all.
            for name in [Some("p.example.com"), Some("a.example.com"), None] {
                assert_eq!(it.clusters(&at(443), name), None, "{name:?}");
            }
        }
    }
    // A server of TLS that cannot be ended here is an error, and there is nothing behind it.
    let yaml = entry("db.example.com", TCP, DNS)
        + &gateway("guarded", &tls("['*']", "mode: MUTUAL, credentialName: own"))
        + &rules;
    let it = compile_gateway(&yaml);
    assert_eq!((it.within(Some("a.example.com")), it.clusters(&at(443), None)), (None, None));
    let left = it.set.unhonoured(&it.diags, Severity::Error);
    assert!(left.iter().any(|left| left.severity == Severity::Error), "{left:?}");
}

#[test]
fn gw_04_auto_passthrough_opens_the_workloads_of_the_mesh_that_its_hosts_cover() {
    let service = |name: &str, location: &str, endpoints: &str, more: &str| {
        entry(
            &format!("{name}.ns.svc.cluster.local"),
            "number: 80, name: http, protocol: HTTP",
            &format!("location: {location}, resolution: STATIC, endpoints: [{endpoints}]{more}"),
        )
    };
    let (known, plain) = ("{address: 10.0.0.1, serviceAccount: sa}", "{address: 10.0.0.2}");
    let rule = |name: &str, spec: &str| {
        resource("DestinationRule", name, &format!("{{host: {name}.ns.svc.cluster.local, {spec}}}"))
    };
    let services = service("app", "MESH_INTERNAL", &format!("{known}, {plain}"), "")
        + &service("outside", "MESH_EXTERNAL", known, "")
        + &service("plain", "MESH_INTERNAL", plain, "")
        + &service("off", "MESH_INTERNAL", known, "")
        + &service("simple", "MESH_INTERNAL", known, "")
        + &service("on", "MESH_INTERNAL", plain, "")
        + &service("secret", "MESH_INTERNAL", known, ", exportTo: [elsewhere]")
        + &rule("app", "subsets: [{name: v1, labels: {}}]")
        + &rule("off", "trafficPolicy: {tls: {mode: DISABLE}}")
        + &rule("simple", "trafficPolicy: {tls: {mode: SIMPLE}}")
        + &rule("on", "trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}");
    let auto =
        |hosts: &str| compile_gateway(&(services.clone() + &gateway(&tls(hosts, "mode: AUTO_PASSTHROUGH"))));
    let reached = |it: &It, name: &str| it.clusters(&at(443), Some(name)).is_some();
    let name =
        |subset: &str, service: &str| format!("outbound_.80_.{subset}_.{service}.ns.svc.cluster.local");
    let it = auto("['*.local']");
    assert_eq!(it.unenforced(), [] as [&str; 0]);
    for (subset, service, expected) in [
        ("", "app", true),
        ("v1", "app", true),
        ("v2", "app", false),
        ("", "on", true),
        // Nothing at the gateway looks at what is passed on: those that do not judge their clients are not there.
        ("", "plain", false),
        ("", "off", false),
        ("", "simple", false),
        ("", "outside", false),
        ("", "secret", false),
        ("", "nobody", false),
    ] {
        assert_eq!(reached(&it, &name(subset, service)), expected, "{subset:?} of {service}");
    }
    for foreign in [
        "app.ns.svc.cluster.local",
        "outbound_.81_._.app.ns.svc.cluster.local",
        "outbound|80||app.ns.svc.cluster.local",
        "inbound_.80_._.app.ns.svc.cluster.local",
        "x.outbound_.80_._.app.ns.svc.cluster.local",
    ] {
        assert!(!reached(&it, foreign), "{foreign}");
    }
    assert_eq!(it.clusters(&at(443), None), None);
    assert_eq!(it.clusters(&at(8443), Some(&name("", "app"))), None);
    // Of its endpoints those without an identity are left out, and it is passed on as it is.
    let clusters = it.table.clusters();
    let app = clusters.iter().find(|cluster| cluster.name().to_string() == name("", "app")).unwrap();
    assert_eq!(app.spec().tls, UpstreamTls::Disable);
    let Discovery::Static(endpoints) = &app.spec().discovery else { panic!("{:?}", app.spec().discovery) };
    assert_eq!(endpoints.iter().map(|it| it.addr.to_string()).collect::<Vec<_>>(), ["10.0.0.1:80"]);
    // No more than the hosts of the server.
    for (hosts, of_app, of_on) in [
        ("['*']", true, true),
        ("[app.ns.svc.cluster.local]", true, false),
        ("['default/*']", true, true),
        ("['other/*']", false, false),
        ("['*.example.com']", false, false),
    ] {
        let it = auto(hosts);
        assert_eq!(
            (reached(&it, &name("", "app")), reached(&it, &name("", "on"))),
            (of_app, of_on),
            "{hosts}"
        );
    }
}
