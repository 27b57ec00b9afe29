//! `loadBalancer` through the real dispatch: keys and cookies, precedence, localities, zones, warm-up, peak EWMA
//! (DR-LB02 … DR-LB10). The simple algorithms and weights are in `destination_rule.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use mesh_core::config::CompileContext;
use mesh_core::{Body, ConnInfo, Direction, RequestContext};
use mesh_route::{BalancerKind, HashPolicy, WarmUp};
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::upstream::Echo;
use tower::ServiceExt as _;

use crate::support::*;

const REVIEWS: &str = "outbound|80||reviews.default.svc.cluster.local";

/// `reviews` with an endpoint for each of these: its port and further fields in flow style.
fn endpoints(of: &[(u16, &str)]) -> String {
    let endpoints: Vec<_> = of
        .iter()
        .map(|(port, more)| format!("{{address: 127.0.0.1, ports: {{http: {port}}}, {more}}}"))
        .collect();
    resource(
        "ServiceEntry",
        "reviews",
        &format!(
            "{{hosts: [reviews.default.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, ports: \
             [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{}]}}",
            endpoints.join(", ")
        ),
    )
}

fn rule(policy: &str) -> String {
    resource("DestinationRule", "policy", &format!("{{host: reviews, trafficPolicy: {policy}}}"))
}

fn hashing(hash: &str) -> String {
    rule(&format!("{{loadBalancer: {{consistentHash: {hash}}}}}"))
}

/// So many applications, and what they are called.
async fn apps(names: &[&'static str]) -> Vec<Echo> {
    let mut apps = Vec::new();
    for name in names {
        apps.push(Echo::start(name).await);
    }
    apps
}

fn plain(apps: &[Echo]) -> String {
    endpoints(&apps.iter().map(|app| (app.addr.port(), "weight: 1")).collect::<Vec<_>>())
}

/// Who answers a request with these headers.
async fn by(client: &Client, url: &str, headers: &[(&str, &str)]) -> String {
    let mut request = Request::get(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(client, request.body(Body::empty()).unwrap()).await.by()
}

/// A request on a connection from this address.
fn from(peer: &str) -> Request<Body> {
    let mut request = get("http://reviews/");
    let conn = ConnInfo { peer: peer.parse().unwrap(), ..ConnInfo::unknown(Direction::Outbound) };
    request.extensions_mut().insert(RequestContext::new(Arc::new(conn), None, mesh_core::clock::now()));
    request
}

/// How many of `count` requests each application answers.
async fn shares(client: &Client, count: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..count {
        *shares.entry(send(client, get("http://reviews/")).await.by()).or_default() += 1;
    }
    shares
}

fn named(shares: &[(&str, usize)]) -> BTreeMap<String, usize> {
    shares.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

#[tokio::test]
async fn dr_lb02_each_key_keeps_its_endpoint_and_without_one_it_is_chance() {
    let apps = apps(&["a", "b", "c", "d"]).await;
    for (hash, algorithm) in [("ringHash: {}", "ring"), ("maglev: {tableSize: 65537}", "maglev")] {
        for (key, of) in [
            ("httpHeaderName: x-user", "header"),
            ("httpCookie: {name: user}", "cookie"),
            ("httpQueryParameterName: user", "query"),
        ] {
            let it = compile(&(plain(&apps) + &hashing(&format!("{{{key}, {hash}}}"))));
            assert_eq!(it.unenforced(), [] as [&str; 0]);
            // Two workers: what a key is kept by is no state of either.
            let (one, other) = (it.client_seeded(1), it.client_seeded(2));
            let mut seen = std::collections::BTreeSet::new();
            for user in 0..24 {
                let value = format!("user-{user}");
                let cookie = format!("a=b; user={value}");
                let (url, headers): (String, Vec<(&str, &str)>) = match of {
                    "header" => ("http://reviews/".into(), vec![("x-user", &value)]),
                    "cookie" => ("http://reviews/".into(), vec![("cookie", &cookie)]),
                    _ => (format!("http://reviews/?a=b&user={value}"), Vec::new()),
                };
                let first = by(&one, &url, &headers).await;
                assert_eq!(by(&other, &url, &headers).await, first, "{algorithm} by {of}");
                seen.insert(first);
            }
            assert!(seen.len() >= 3, "{algorithm} by {of}: {seen:?}");
            let without = shares(&one, 40).await;
            assert!(without.len() >= 3, "{algorithm}: without {of} by chance: {without:?}");
        }
    }
    let it = compile(&(plain(&apps) + &hashing("{useSourceIp: true}")));
    let client = it.client();
    let mut seen = std::collections::BTreeSet::new();
    for host in 1..24 {
        let first = send(&client, from(&format!("10.0.0.{host}:1000"))).await.by();
        assert_eq!(
            send(&client, from(&format!("10.0.0.{host}:2000"))).await.by(),
            first,
            "whatever its port"
        );
        seen.insert(first);
    }
    assert!(seen.len() >= 3, "{seen:?}");
}

#[tokio::test]
async fn dr_lb03_a_missing_cookie_is_made_and_leads_back_to_the_same_endpoint() {
    let apps = apps(&["a", "b", "c"]).await;
    let with =
        |cookie: &str| compile(&(plain(&apps) + &hashing(&format!("{{httpCookie: {{{cookie}}}}}")))).client();
    let all = "name: user, path: /shop, ttl: 60s, attributes: [{name: SameSite, value: Lax}, {name: Secure}]";
    for (cookie, after) in [
        (all, "; Max-Age=60; Path=/shop; SameSite=Lax; Secure; HttpOnly"),
        ("name: user, ttl: 0s", "; HttpOnly"),
    ] {
        let client = with(cookie);
        let mut seen = std::collections::BTreeSet::new();
        for connection in 0..12 {
            let request = || from(&format!("10.0.0.1:{}", 1000 + connection));
            let first = send(&client, request()).await;
            let made = first.header("set-cookie").unwrap().to_owned();
            let (pair, attributes) = made.split_at(made.find(';').unwrap());
            assert_eq!(attributes, after, "{cookie}");
            let value = pair.strip_prefix("user=\"").unwrap().strip_suffix('"').unwrap();
            assert!(value.len() == 16 && value.bytes().all(|byte| byte.is_ascii_hexdigit()), "{pair}");
            let by_cookie =
                Request::get("http://reviews/").header("cookie", pair).body(Body::empty()).unwrap();
            let back = send(&client, by_cookie).await;
            assert_eq!((back.by(), back.header("set-cookie")), (first.by(), None), "it is made once");
            assert_eq!(
                send(&client, request()).await.header("set-cookie"),
                Some(made.as_str()),
                "requests of one connection that have none yet get the same"
            );
            seen.insert(first.by());
        }
        assert!(seen.len() > 1, "{seen:?}");
    }
    let passive = with("name: user");
    for _ in 0..5 {
        assert_eq!(send(&passive, from("10.0.0.1:1")).await.header("set-cookie"), None, "without ttl never");
    }
}

#[test]
fn dr_lb03_and_lb04_what_is_refused() {
    let refuse = |hash: &str, field: &str, reason: &str| {
        let path = format!("spec.trafficPolicy.loadBalancer.consistentHash{field}");
        refused(&hashing(hash), &path, reason);
    };
    refuse("{httpCookie: {ttl: 1s}}", ".httpCookie.name", "");
    let twice = "[{name: A, value: b}, {name: A}]";
    refuse(
        &format!("{{httpCookie: {{name: a, ttl: 1s, attributes: {twice}}}}}"),
        ".httpCookie.attributes[1].name",
        "",
    );
    refuse(
        "{httpCookie: {name: a, ttl: 1s, attributes: [{value: b}]}}",
        ".httpCookie.attributes[0].name",
        "",
    );
    refuse("{httpHeaderName: a, httpQueryParameterName: b}", "", "only one");
    for size in ["0", "65536", "5000011"] {
        refuse(&format!("{{httpHeaderName: a, maglev: {{tableSize: {size}}}}}"), ".maglev.tableSize", "");
    }
    refuse("{httpHeaderName: a, minimumRingSize: 9, maglev: {tableSize: 251}}", ".minimumRingSize", "");
    // What can be said but not sent is found when it is compiled.
    let (set, mut diags) = mesh_core::istio::ResourceSet::load(
        &[mesh_core::istio::SourceFile::new("<test>", plain_reviews() + &hashing("{httpHeaderName: 'a b'}"))],
        &mesh_core::istio::LoadOptions::default(),
    );
    use mesh_core::config::Compile as _;
    let cx = CompileContext::new(mesh_core::config::Role::Sidecar);
    mesh_route::RouteTable::compile(&set, &cx, &mut diags).unwrap();
    assert!(diags.has_errors() && diags.to_string().contains("consistentHash.httpHeaderName"), "{diags}");
}

fn plain_reviews() -> String {
    endpoints(&[(1, "weight: 1"), (2, "weight: 1")])
}

#[test]
fn dr_lb04_sizes_and_defaults() {
    let kind = |hash: &str| compile(&(plain_reviews() + &hashing(hash))).spec(REVIEWS).balancer;
    let header = "httpHeaderName: x-user";
    assert_eq!(kind(&format!("{{{header}}}")), BalancerKind::RingHash { minimum_size: 1024 });
    assert_eq!(kind(&format!("{{{header}, ringHash: {{}}}}")), BalancerKind::RingHash { minimum_size: 1024 });
    let small = BalancerKind::RingHash { minimum_size: 64 };
    assert_eq!(kind(&format!("{{{header}, ringHash: {{minimumRingSize: 64}}}}")), small);
    assert_eq!(kind(&format!("{{{header}, minimumRingSize: 64}}")), small, "the deprecated form");
    assert_eq!(BalancerKind::maglev(), BalancerKind::Maglev { table_size: 65_537 });
    let table = BalancerKind::Maglev { table_size: 251 };
    assert_eq!(kind(&format!("{{{header}, maglev: {{tableSize: 251}}}}")), table);
}

#[tokio::test]
async fn dr_lb04_while_an_endpoint_is_out_only_its_keys_move() {
    let bad =
        Scripted::start("bad", |seen| Reply::Status(if seen.header("x-fail").is_some() { 500 } else { 200 }))
            .await;
    let good = apps(&["a", "b", "c"]).await;
    let mut all: Vec<_> = good.iter().map(|app| (app.addr.port(), "weight: 1")).collect();
    all.push((bad.addr.port(), "weight: 1"));
    for algorithm in ["ringHash: {}", "maglev: {tableSize: 65537}"] {
        let policy = format!(
            "{{loadBalancer: {{consistentHash: {{httpHeaderName: x-user, {algorithm}}}}}, outlierDetection: \
             {{consecutive5xxErrors: 1, maxEjectionPercent: 100}}}}"
        );
        let it = compile(&(endpoints(&all) + &rule(&policy)));
        let client = it.client();
        let ask = async |user: usize, fail: bool| {
            let mut request = Request::get("http://reviews/").header("x-user", user);
            if fail {
                request = request.header("x-fail", "1");
            }
            let answer = send(&client, request.body(Body::empty()).unwrap()).await;
            if answer.text.starts_with('{') { answer.by() } else { "bad".to_owned() }
        };
        let mut before = Vec::new();
        for user in 0..60 {
            before.push(ask(user, false).await);
        }
        let its = before.iter().position(|by| by == "bad").unwrap();
        ask(its, true).await;
        for (user, before) in before.iter().enumerate() {
            let after = ask(user, false).await;
            assert_ne!(after, "bad");
            assert!(before == "bad" || after == *before, "{algorithm}: {user} moved");
        }
    }
}

#[test]
fn dr_lb05_precedence_subset_and_port_then_subset_then_port_then_top() {
    let service = resource(
        "ServiceEntry",
        "reviews",
        "{hosts: [reviews.default.svc.cluster.local], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}, {number: 81, name: http-b, protocol: HTTP}], endpoints: [{address: 127.0.0.1, labels: {version: v1}}]}",
    );
    let by = |name: &str| format!("loadBalancer: {{consistentHash: {{httpHeaderName: {name}}}}}");
    let port = |name: &str| format!("portLevelSettings: [{{port: {{number: 81}}, {}}}]", by(name));
    let key = |top: &str, subset: &str, cluster: &str| {
        let yaml = service.clone()
            + &resource(
                "DestinationRule",
                "policy",
                &format!(
                    "{{host: reviews, trafficPolicy: {{{top}}}, subsets: [{{name: v1, labels: {{version: v1}}{subset}}}]}}"
                ),
            );
        let policy = compile(&yaml).spec(cluster).hash_policy.unwrap();
        match *policy {
            HashPolicy::Header(name) => name.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let (at_80, at_81) = (
        "outbound|80|v1|reviews.default.svc.cluster.local",
        "outbound|81|v1|reviews.default.svc.cluster.local",
    );
    let top = format!("{}, {}", by("x-top"), port("x-port"));
    let own = format!(", trafficPolicy: {{{}, {}}}", by("x-subset"), port("x-subset-port"));
    assert_eq!(key(&top, &own, at_81), "x-subset-port");
    assert_eq!(key(&top, &own, at_80), "x-subset");
    assert_eq!(key(&top, &format!(", trafficPolicy: {{{}}}", by("x-subset")), at_81), "x-subset");
    assert_eq!(key(&top, "", at_81), "x-port");
    assert_eq!(key(&top, "", at_80), "x-top");
    assert_eq!(key(&top, &own, "outbound|81||reviews.default.svc.cluster.local"), "x-port");
}

/// A client in `us/east/1`.
fn in_us_east() -> CompileContext {
    let labels = [
        ("topology.kubernetes.io/region", "us"),
        ("topology.kubernetes.io/zone", "east"),
        ("topology.istio.io/subzone", "1"),
    ];
    sidecar("default", &labels)
}

#[test]
fn dr_lb05_consistent_hash_is_kept_from_localities_or_warned_of() {
    let places = endpoints(&[(1, "locality: us/east/1"), (2, "locality: eu/west/1")]);
    let priorities = |policy: &str| {
        let it = compile_for(&in_us_east(), &(places.clone() + &rule(policy)));
        let warned =
            it.diags.iter().any(|found| found.message.contains("a key is kept only within the endpoints"));
        (it.cluster(REVIEWS).spec().endpoint_priorities(), warned)
    };
    let outlier = "outlierDetection: {interval: 1s}";
    // istio/istio#41674: there outlier detection turns locality load balancing on, and keys break.
    let hash = "consistentHash: {httpHeaderName: x-user}";
    assert_eq!(priorities(&format!("{{{outlier}, loadBalancer: {{{hash}}}}}")), (vec![0, 0], false));
    assert_eq!(priorities(&format!("{{{outlier}, loadBalancer: {{simple: RANDOM}}}}")), (vec![0, 1], false));
    let asked = format!("{{{outlier}, loadBalancer: {{{hash}, localityLbSetting: {{enabled: true}}}}}}");
    assert_eq!(priorities(&asked), (vec![0, 1], true));
}

trait Priorities {
    fn endpoint_priorities(&self) -> Vec<u32>;
}

impl Priorities for mesh_route::ClusterSpec {
    fn endpoint_priorities(&self) -> Vec<u32> {
        match &self.discovery {
            mesh_route::Discovery::Static(endpoints) => endpoints.iter().map(|one| one.priority).collect(),
            other => panic!("{other:?}"),
        }
    }
}

const OUTLIERS: &str =
    "outlierDetection: {consecutive5xxErrors: 1, maxEjectionPercent: 100, baseEjectionTime: 300s}";

#[tokio::test]
async fn dr_lb06_near_endpoints_come_first_and_failover_needs_outlier_detection() {
    let apps = apps(&["same-subzone", "same-zone", "same-region", "elsewhere"]).await;
    let localities = ["us/east/1", "us/east/2", "us/west/1", "eu/x/1"];
    let mut all: Vec<_> = Vec::new();
    let places: Vec<_> = localities.iter().map(|locality| format!("locality: {locality}")).collect();
    for (app, place) in apps.iter().zip(&places) {
        all.push((app.addr.port(), place.as_str()));
    }
    let with = |services: &[(u16, &str)], policy: &str, cx: &CompileContext| {
        let it = compile_for(cx, &(endpoints(services) + &rule(policy)));
        assert_eq!(it.unenforced(), [] as [&str; 0], "{policy}");
        it
    };
    let defaults = format!("{{{OUTLIERS}}}");
    for nearest in 0..4 {
        let it = with(&all[nearest..], &defaults, &in_us_east());
        let name = ["same-subzone", "same-zone", "same-region", "elsewhere"][nearest];
        assert_eq!(shares(&it.client(), 10).await, named(&[(name, 10)]));
    }
    // Without outlier detection nobody would ever be left, so nobody is preferred.
    let it = with(&all, "{loadBalancer: {simple: ROUND_ROBIN}}", &in_us_east());
    assert_eq!(shares(&it.client(), 40).await.len(), 4);
    // A client that does not know where it is prefers nobody either.
    let it = with(&all, &defaults, &sidecar("default", &[]));
    assert_eq!(shares(&it.client(), 80).await.len(), 4);
    // Off for this rule, or for the mesh.
    let off = format!("{{{OUTLIERS}, loadBalancer: {{localityLbSetting: {{enabled: false}}}}}}");
    assert_eq!(shares(&with(&all, &off, &in_us_east()).client(), 80).await.len(), 4);
    let yaml = endpoints(&all) + &rule(&defaults) + &mesh("localityLbSetting: {enabled: false}");
    assert_eq!(shares(&compile_for(&in_us_east(), &yaml).client(), 80).await.len(), 4);
    // The rule's own word counts before the mesh's.
    let on = format!("{{{OUTLIERS}, loadBalancer: {{localityLbSetting: {{enabled: true}}}}}}");
    let yaml = endpoints(&all) + &rule(&on) + &mesh("localityLbSetting: {enabled: false}");
    assert_eq!(shares(&compile_for(&in_us_east(), &yaml).client(), 10).await, named(&[("same-subzone", 10)]));
}

#[tokio::test]
async fn dr_lb06_where_a_workload_is_its_labels_say() {
    let apps = apps(&["near", "far"]).await;
    let all = [
        (apps[0].addr.port(), "locality: us/east"),
        (apps[1].addr.port(), "labels: {istio-locality: eu.west}"),
    ];
    let yaml = endpoints(&all) + &rule(&format!("{{{OUTLIERS}}}"));
    for (labels, expected) in [
        (&[("topology.kubernetes.io/region", "us"), ("topology.kubernetes.io/zone", "east")][..], "near"),
        (&[("istio-locality", "us.east")], "near"),
        (&[("istio-locality", "eu.west")], "far"),
        // The newer label counts before the older one.
        (&[("istio-locality", "us.east"), ("topology.istio.io/locality", "eu.west")], "far"),
    ] {
        let it = compile_for(&sidecar("default", labels), &yaml);
        assert_eq!(shares(&it.client(), 10).await, named(&[(expected, 10)]), "{labels:?}");
    }
}

#[test]
fn dr_lb06_a_zone_of_kubernetes_is_in_the_region_of_the_client() {
    let slice = |name: &str, zone: &str| {
        format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: reviews-{name}, namespace: \
             default, labels: {{kubernetes.io/service-name: reviews}}}}\naddressType: IPv4\nendpoints: [{{addresses: \
             [10.0.0.{name}], zone: {zone}}}]\nports: [{{name: http, port: 80}}]\n"
        )
    };
    let yaml =
        "apiVersion: v1\nkind: Service\nmetadata: {name: reviews, namespace: default}\nspec: {ports: [{name: \
                http, port: 80}]}\n"
            .to_owned()
            + &slice("1", "east")
            + &slice("2", "west") + &rule(&format!("{{{OUTLIERS}}}"));
    let of = |cx: &CompileContext| match compile_for(cx, &yaml).spec(REVIEWS).discovery {
        mesh_route::Discovery::Static(all) => {
            all.iter().map(|one| (one.locality.to_string(), one.priority)).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let named =
        |all: &[(&str, u32)]| all.iter().map(|(name, at)| ((*name).to_owned(), *at)).collect::<Vec<_>>();
    assert_eq!(of(&web()), named(&[("us/east", 0), ("us/west", 1)]));
    assert_eq!(of(&sidecar("default", &[])), named(&[("/east", 0), ("/west", 0)]));
}

#[tokio::test(start_paused = true)]
async fn dr_lb06_failover_goes_to_the_next_locality_when_the_nearest_fails() {
    let failing = Scripted::start("failing", |seen| {
        Reply::Status(if seen.header("x-fail").is_some() { 500 } else { 200 })
    })
    .await;
    let apps = apps(&["asia", "eu"]).await;
    let all = [
        (failing.addr.port(), "locality: us/east/1"),
        (apps[0].addr.port(), "locality: asia/x/1"),
        (apps[1].addr.port(), "locality: eu/x/1"),
    ];
    let policy =
        format!("{{{OUTLIERS}, loadBalancer: {{localityLbSetting: {{failover: [{{from: us, to: eu}}]}}}}}}");
    let it = compile_for(&in_us_east(), &(endpoints(&all) + &rule(&policy)));
    assert_eq!(it.spec(REVIEWS).endpoint_priorities(), [0, 2, 1]);
    let client = it.client();
    let fails = Request::get("http://reviews/").header("x-fail", "1").body(Body::empty()).unwrap();
    assert_eq!(send(&client, get("http://reviews/")).await.text, "failing");
    assert_eq!(send(&client, fails).await.status, 500);
    assert_eq!(shares(&client, 10).await, named(&[("eu", 10)]));
    tokio::time::advance(Duration::from_secs(301)).await;
    assert_eq!(send(&client, get("http://reviews/")).await.text, "failing", "and back when it has returned");
    let without = "{loadBalancer: {localityLbSetting: {failover: [{from: us, to: eu}]}}}";
    warned(&rule(without), "spec.trafficPolicy.loadBalancer.localityLbSetting", "outlierDetection");
}

#[tokio::test]
async fn dr_lb06_failover_priority_by_labels() {
    let apps = apps(&["all", "first", "none"]).await;
    let all = [
        (apps[0].addr.port(), "labels: {rack: '7', version: v2}"),
        (apps[1].addr.port(), "labels: {rack: '7', version: v1}"),
        // The second label agrees, but counts only where the first does.
        (apps[2].addr.port(), "labels: {rack: '8', version: v2}"),
    ];
    let policy = format!(
        "{{{OUTLIERS}, loadBalancer: {{localityLbSetting: {{failoverPriority: [rack, 'version=v2']}}}}}}"
    );
    let it = compile_for(&sidecar("default", &[("rack", "7")]), &(endpoints(&all) + &rule(&policy)));
    assert_eq!(it.spec(REVIEWS).endpoint_priorities(), [0, 1, 2]);
    assert_eq!(shares(&it.client(), 10).await, named(&[("all", 10)]));
}

#[tokio::test]
async fn dr_lb06_distribute_by_weight() {
    let apps = apps(&["here", "near", "far"]).await;
    let all = [
        (apps[0].addr.port(), "locality: us/east/1"),
        (apps[1].addr.port(), "locality: us/west/1"),
        (apps[2].addr.port(), "locality: eu/x/1"),
    ];
    // No outlier detection is needed for it.
    let policy = "{loadBalancer: {simple: ROUND_ROBIN, localityLbSetting: {distribute: [{from: us/east/*, to: {us/east/*: 80, us/west/*: 20}}]}}}";
    let it = compile_for(&in_us_east(), &(endpoints(&all) + &rule(policy)));
    let seen = shares(&it.client(), 500).await;
    // Four standard deviations of a draw of 500 with a fifth are 36.
    assert!(seen.len() == 2 && seen["near"].abs_diff(100) < 36, "{seen:?}");
    // Of a client elsewhere it says nothing.
    let elsewhere = sidecar("default", &[("istio-locality", "eu.x.1")]);
    let it = compile_for(&elsewhere, &(endpoints(&all) + &rule(policy)));
    assert_eq!(shares(&it.client(), 30).await, named(&[("far", 10), ("here", 10), ("near", 10)]));
    for (to, path, reason) in
        [("{us/east/*: 80, us/west/*: 10}", "to", "100 in sum"), ("{us/*/1: 100}", "to[\"us/*/1\"]", "last")]
    {
        let policy = format!(
            "{{loadBalancer: {{localityLbSetting: {{distribute: [{{from: us/east/*, to: {to}}}]}}}}}}"
        );
        let path = format!("spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].{path}");
        refused(&rule(&policy), &path, reason);
    }
}

/// A service that the client belongs to, with a client in each of these localities.
fn clients(localities: &[&str]) -> String {
    let workloads: String = localities
        .iter()
        .enumerate()
        .map(|(at, locality)| {
            let spec = format!("{{address: 10.0.0.{at}, locality: {locality}, labels: {{app: web}}}}");
            resource("WorkloadEntry", &format!("web-{at}"), &spec)
        })
        .collect();
    workloads
        + &resource(
            "ServiceEntry",
            "web",
            "{hosts: [web.example.com], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}], workloadSelector: {labels: {app: web}}}",
        )
        + &mesh("defaultConfig: {proxyMetadata: {ISTIO_META_ENABLE_SELF_DISCOVERY: 'true'}}")
}

fn web() -> CompileContext {
    sidecar("default", &[("app", "web"), ("istio-locality", "us.east")])
}

#[tokio::test]
async fn dr_lb07_zones_as_istios_own_test_has_them() {
    let apps = apps(&["b", "c"]).await;
    let policy = "{loadBalancer: {simple: RANDOM, zoneAwareLbSetting: {enabled: true, minClusterSize: 1}}}";
    for (what, of_clients, of_endpoints, expected) in [
        ("one endpoint, here", &["us/east"][..], &["us/east"][..], [100, 0]),
        ("all clients here, half of the endpoints", &["us/east"], &["us/east", "us/west"], [50, 50]),
        ("clients as endpoints", &["us/east", "us/west"], &["us/east", "us/west"], [100, 0]),
        ("none here", &["us/east", "us/west"], &["us/north", "us/south"], [50, 50]),
        ("another region waits", &["us/east"], &["us/east", "eu/x"], [100, 0]),
        ("another region waits for the whole region", &["us/east"], &["us/west", "eu/x"], [100, 0]),
        ("nobody in the region", &["us/east"], &["eu/x"], [100, 0]),
    ] {
        let places: Vec<_> = of_endpoints.iter().map(|locality| format!("locality: {locality}")).collect();
        let all: Vec<_> =
            apps.iter().zip(&places).map(|(app, place)| (app.addr.port(), place.as_str())).collect();
        let it = compile_for(&web(), &(endpoints(&all) + &clients(of_clients) + &rule(policy)));
        assert_eq!(it.unenforced(), [] as [&str; 0]);
        assert!(!it.diags.iter().any(|found| found.path.contains("zoneAware")), "{}", it.diags);
        let seen = shares(&it.client(), 100).await;
        let to_b = seen.get("b").copied().unwrap_or(0);
        // Four standard deviations of a hundred coins are 20.
        let slack = if expected[0] == 50 { 20 } else { 0 };
        assert!(to_b.abs_diff(expected[0]) <= slack, "{what}: {seen:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn dr_lb07_another_region_comes_when_the_own_is_ejected() {
    let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
    let apps = apps(&["eu", "asia"]).await;
    let all = [
        (bad.addr.port(), "locality: us/east"),
        (apps[1].addr.port(), "locality: asia/x"),
        (apps[0].addr.port(), "locality: eu/x"),
    ];
    let policy = format!(
        "{{{OUTLIERS}, loadBalancer: {{zoneAwareLbSetting: {{failover: [{{from: us, to: eu}}], minClusterSize: 1}}}}}}"
    );
    let it = compile_for(&web(), &(endpoints(&all) + &clients(&["us/east"]) + &rule(&policy)));
    let client = it.client();
    assert_eq!(send(&client, get("http://reviews/")).await.status, 500);
    assert_eq!(shares(&client, 10).await, named(&[("eu", 10)]));
}

#[tokio::test]
async fn dr_lb07_below_the_least_size_and_without_self_discovery_zones_do_not_count() {
    let apps = apps(&["here", "near"]).await;
    let all = [(apps[0].addr.port(), "locality: us/east"), (apps[1].addr.port(), "locality: us/west")];
    let with = |setting: &str| rule(&format!("{{loadBalancer: {{zoneAwareLbSetting: {setting}}}}}"));
    let even = clients(&["us/east", "us/west"]);
    // Two endpoints are fewer than the six that are wanted by default.
    let it = compile_for(&web(), &(endpoints(&all) + &even + &with("{enabled: true}")));
    assert_eq!(shares(&it.client(), 40).await.len(), 2);
    let least = "{minClusterSize: 2}";
    let it = compile_for(&web(), &(endpoints(&all) + &even + &with(least)));
    assert_eq!(shares(&it.client(), 40).await, named(&[("here", 40)]));
    let unknown = even.replace("'true'", "'false'");
    let it = compile_for(&web(), &(endpoints(&all) + &unknown + &with(least)));
    assert_eq!(shares(&it.client(), 40).await.len(), 2);
    let path = "spec.trafficPolicy.loadBalancer.zoneAwareLbSetting";
    it.warns(path, "ISTIO_META_ENABLE_SELF_DISCOVERY");
    let off = compile_for(&web(), &(endpoints(&all) + &unknown + &with("{enabled: false}")));
    assert!(!off.diags.iter().any(|found| found.path == path));
    // For the whole mesh; a rule that says something of localities goes by that.
    let of_mesh = format!("{}    zoneAwareLbSetting: {{minClusterSize: 2}}\n", even);
    let it = compile_for(&web(), &(endpoints(&all) + &of_mesh));
    assert_eq!(shares(&it.client(), 40).await, named(&[("here", 40)]));
    let own = rule("{loadBalancer: {localityLbSetting: {enabled: false}}}");
    let it = compile_for(&web(), &(endpoints(&all) + &of_mesh + &own));
    assert_eq!(shares(&it.client(), 40).await.len(), 2);
    // By a key zones never count.
    let hash = rule(
        "{loadBalancer: {consistentHash: {httpHeaderName: x-user}, zoneAwareLbSetting: {minClusterSize: 1}}}",
    );
    let it = compile_for(&web(), &(endpoints(&all) + &even + &hash));
    it.warns(path, "consistentHash");
    assert!(it.spec(REVIEWS).zone_aware.is_none());
    refused(
        &with("{failoverPriority: [topology.kubernetes.io/zone]}"),
        &format!("{path}.failoverPriority[0]"),
        "zones",
    );
    let both = "{loadBalancer: {zoneAwareLbSetting: {}, localityLbSetting: {}}}";
    refused(&rule(both), path, "only one");
}

#[tokio::test]
async fn dr_lb08_warmup_from_yaml() {
    let warm_up = |balancer: &str| {
        compile(&(plain_reviews() + &rule(&format!("{{loadBalancer: {balancer}}}")))).spec(REVIEWS).warm_up
    };
    let minute = WarmUp::new(Duration::from_secs(60));
    assert_eq!(warm_up("{warmup: {duration: 60s}}"), Some(minute));
    assert_eq!(
        warm_up("{simple: ROUND_ROBIN, warmup: {duration: 60s, minimumPercent: 25, aggression: 2}}"),
        Some(WarmUp { minimum_percent: 25.0, aggression: 2.0, ..minute })
    );
    assert_eq!(warm_up("{warmupDurationSecs: 60s}"), Some(minute), "the deprecated form");
    assert_eq!(warm_up("{simple: RANDOM, warmup: {duration: 60s}}"), None);
    let path = "spec.trafficPolicy.loadBalancer.warmup";
    warned(
        &rule("{loadBalancer: {simple: RANDOM, warmup: {duration: 60s}}}"),
        path,
        "ROUND_ROBIN and LEAST_REQUEST",
    );
    refused(&rule("{loadBalancer: {warmup: {minimumPercent: 5}}}"), &format!("{path}.duration"), "required");
    refused(
        &rule("{loadBalancer: {warmup: {duration: 1s, aggression: 0.5}}}"),
        &format!("{path}.aggression"),
        "1",
    );

    // An endpoint that a reload adds begins with a tenth of its share.
    let apps = apps(&["old", "older", "new"]).await;
    let yaml = |apps: &[Echo]| {
        plain(apps) + &rule("{loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 3600s}}}")
    };
    tokio::time::pause();
    let clusters = mesh_route::Clusters::new();
    let before = compile(&yaml(&apps[..2]));
    clusters.reconcile(before.table.clusters());
    tokio::time::advance(Duration::from_secs(3600)).await;
    let after = compile(&yaml(&apps));
    clusters.reconcile(after.table.clusters());
    let client = after.client_on(&clusters);
    tokio::time::resume();
    let seen = shares(&client, 420).await;
    let new = seen.get("new").copied().unwrap_or(0);
    // A tenth of one of 2.1; four standard deviations of 420 draws are 18.
    assert!(new.abs_diff(20) < 18, "{seen:?}");
}

#[tokio::test]
async fn dr_lb10_peak_ewma_is_asked_for_by_annotation_and_prefers_who_answers_sooner() {
    let slow = Scripted::start("slow", |_| Reply::After(Duration::from_millis(200), 200)).await;
    let fast = Scripted::start("fast", |_| Reply::Status(200)).await;
    let services = endpoints(&[(slow.addr.port(), "weight: 1"), (fast.addr.port(), "weight: 1")]);
    let annotated = |policy: &str| {
        rule(policy).replace(
            "namespace: default}",
            "namespace: default, annotations: {mesh.rs/load-balancer: PEAK_EWMA}}",
        )
    };
    let pool = "{connectionPool: {tcp: {connectTimeout: 1s}}}";
    let it = compile(&(services.clone() + &annotated(pool)));
    assert_eq!(it.spec(REVIEWS).balancer, BalancerKind::PeakEwma);
    let explicit = compile(&(services + &annotated("{loadBalancer: {simple: ROUND_ROBIN}}")));
    assert_eq!(explicit.spec(REVIEWS).balancer, BalancerKind::RoundRobin, "Istio's own word counts");
    let client = it.client();
    // Until the slow one was asked it is thought to be as fast as the other.
    while slow.requests() == 0 {
        send(&client, get("http://reviews/")).await;
    }
    let (before, asked) = (slow.requests(), 40);
    for _ in 0..asked {
        send(&client, get("http://reviews/")).await;
    }
    let to_slow = slow.requests() - before;
    // Both draws fall on the slow one in a quarter of the cases: 10, and four standard deviations are 11.
    assert!(to_slow <= 21, "{to_slow} of {asked}");
    assert!(client.oneshot(get("http://reviews/")).await.is_ok());
}

fn shown(it: &Compiled) -> serde_json::Value {
    let all = mesh_route::dump::clusters(it.table.clusters());
    let mut all = all["clusters"].as_array().unwrap().iter();
    all.find(|cluster| cluster["name"] == REVIEWS).unwrap().clone()
}

#[tokio::test(start_paused = true)]
async fn clusters_show_who_takes_what_and_why() {
    let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
    let apps = apps(&["near", "far"]).await;
    let all = [
        (bad.addr.port(), "locality: us/east/1, weight: 1"),
        (apps[0].addr.port(), "locality: us/east/1, weight: 3"),
        (apps[1].addr.port(), "locality: eu/x/1, weight: 1"),
    ];
    let policy = "{loadBalancer: {warmup: {duration: 100s}}, outlierDetection: {consecutive5xxErrors: 1, maxEjectionPercent: 100, minHealthPercent: 40}}";
    let it = compile_for(&in_us_east(), &(endpoints(&all) + &rule(policy)));
    let client = it.client();
    tokio::time::advance(Duration::from_secs(50)).await;
    let before = shown(&it);
    assert_eq!(before["balancer"], "LeastRequest");
    assert_eq!(before["balancing"]["panic_threshold_percent"], 40);
    assert_eq!(before["priorities"][0]["percent"], 100);
    assert_eq!(before["endpoints"][1]["warm_up_percent"], 50.0);
    while send(&client, get("http://reviews/")).await.status != 500 {}
    let after = shown(&it);
    let takes = |at: usize| {
        let one = &after["priorities"][at];
        [&one["priority"], &one["percent"], &one["available"], &one["endpoints"]].map(|n| n.as_u64().unwrap())
    };
    // Half of the first, times 1.4, are 70 %.
    assert_eq!((takes(0), takes(1)), ([0, 70, 1, 2], [1, 30, 1, 1]));
    let ejected = &after["endpoints"][0];
    assert_eq!((&ejected["ejected"], &ejected["weight"]), (&true.into(), &1.into()));
    let why = ejected["ejection"]["why"].as_str().unwrap();
    assert_eq!(why, "1 consecutive5xxErrors reached, last Status(500)");
    assert_eq!(ejected["ejection"]["seconds_left"], 30.0);
    assert!(after["endpoints"][1]["ejection"].is_null());

    let panicking = endpoints(&all[..1]) + &rule(&policy.replace("40", "100"));
    let it = compile(&panicking);
    send(&it.client(), get("http://reviews/")).await;
    assert_eq!(shown(&it)["priorities"][0]["panic"], true);

    let distribute =
        "{loadBalancer: {localityLbSetting: {distribute: [{from: us/*, to: {us/*: 75, eu/*: 25}}]}}}";
    let it = compile_for(&in_us_east(), &(endpoints(&all) + &rule(distribute)));
    it.client();
    let localities = &shown(&it)["priorities"][0]["localities"];
    assert_eq!(localities[0], serde_json::json!({"locality": "eu/x/1", "percent": 25.0}));
    assert_eq!(localities[1], serde_json::json!({"locality": "us/east/1", "percent": 75.0}));
}

#[tokio::test]
async fn explain_says_the_key_and_the_endpoint_that_it_picks() {
    let apps = apps(&["a", "b", "c"]).await;
    let it = compile(&(plain(&apps) + &hashing("{httpHeaderName: x-user}")));
    let client = it.client();
    for user in 0..10 {
        let request = || Request::get("http://reviews/").header("x-user", user).body(Body::empty()).unwrap();
        let explained = it.explain(&request());
        let by = send(&client, request()).await.by();
        let app = apps.iter().zip(["a", "b", "c"]).find(|(_, name)| *name == by).unwrap().0;
        assert_eq!(explained.endpoint_key.as_ref().unwrap().endpoint, Some(app.addr));
        let json = explained.to_json();
        let key = &json["decision"]["endpoint_key"];
        assert_eq!((&key["key"], &key["present"]), (&"header:x-user".into(), &true.into()));
        assert_eq!(key["endpoint"], app.addr.to_string());
        assert!(explained.to_string().contains(&format!("at {} by its key header:x-user", app.addr)));
    }
    let without = it.ask("http://reviews/");
    assert_eq!(without.to_json()["decision"]["endpoint_key"]["present"], false);
    assert!(without.to_string().contains("by chance, for want of the key"), "{without}");
}
