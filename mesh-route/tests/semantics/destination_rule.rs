//! Which destination rule holds and how endpoints are picked: DR-01 … DR-06, DR-LB01, DR-LB09.

use std::time::Duration;

use mesh_core::Compat;
use mesh_core::config::{CompileContext, Role};
use mesh_route::{BalancerKind, Discovery};
use mesh_testkit::upstream::Echo;

use crate::support::*;

/// A policy that can be told by its connect timeout.
fn marked(seconds: u32) -> String {
    format!("connectionPool: {{tcp: {{connectTimeout: {seconds}s}}}}")
}

fn rule(namespace: &str, name: &str, host: &str, seconds: u32, more: &str) -> String {
    let policy = marked(seconds);
    in_namespace(
        namespace,
        "DestinationRule",
        name,
        &format!("{{host: '{host}', trafficPolicy: {{{policy}}}{more}}}"),
    )
}

impl Compiled {
    /// The connect timeout of a cluster, in seconds.
    fn mark(&self, cluster: &str) -> u64 {
        self.spec(cluster).pool.connect_timeout.as_secs()
    }

    fn addresses(&self, cluster: &str) -> Vec<u16> {
        match self.spec(cluster).discovery {
            Discovery::Static(endpoints) => endpoints.iter().map(|endpoint| endpoint.addr.port()).collect(),
            other => panic!("{other:?}"),
        }
    }
}

const REMOTE: &str = "outbound|80||reviews.svc.svc.cluster.local";
const REVIEWS: &str = "outbound|80||reviews.default.svc.cluster.local";

/// The mark of `reviews.svc` as a client in `default` sees it.
fn remote(rules: &[String]) -> u64 {
    compile(&(service_in("svc", "reviews", &[1]) + &rules.concat())).mark(REMOTE)
}

#[test]
fn dr_01_client_namespace_then_service_namespace_then_root() {
    let host = "reviews.svc.svc.cluster.local";
    let client = || rule("default", "a", host, 1, "");
    let service = || rule("svc", "b", host, 2, "");
    let root = || rule("istio-system", "c", host, 3, "");
    assert_eq!(remote(&[]), 10, "the default");
    assert_eq!(remote(&[root()]), 3);
    assert_eq!(remote(&[root(), service()]), 2);
    assert_eq!(remote(&[root(), service(), client()]), 1);
    assert_eq!(remote(&[rule("other", "d", host, 4, "")]), 10, "a third namespace has no say");
    let hidden = rule("svc", "b", host, 2, ", exportTo: ['.']");
    assert_eq!(remote(&[root(), hidden]), 3, "only what is exported");
}

#[test]
fn dr_01_the_most_specific_host_alone() {
    let exact = || rule("default", "exact", "reviews.svc.svc.cluster.local", 1, "");
    let near = || rule("default", "near", "*.svc.svc.cluster.local", 2, "");
    let far = || rule("default", "far", "*.cluster.local", 3, "");
    assert_eq!(remote(&[far(), near(), exact()]), 1);
    assert_eq!(remote(&[far(), near()]), 2);
    assert_eq!(remote(&[far()]), 3);
    // A less specific host of the client's namespace comes before the exact one of the service's.
    assert_eq!(remote(&[far(), rule("svc", "e", "reviews", 4, "")]), 3);
    // Nothing is inherited from the wider host.
    let balancer = "{host: reviews.svc.svc.cluster.local, trafficPolicy: {loadBalancer: {simple: RANDOM}}}";
    let it =
        compile(&(service_in("svc", "reviews", &[1]) + &far() + &resource("DestinationRule", "b", balancer)));
    assert_eq!((it.mark(REMOTE), it.spec(REMOTE).balancer), (10, BalancerKind::Random));
}

fn dated(name: &str, month: u32, spec: &str) -> String {
    aged("default", "DestinationRule", name, Some(&format!("2026-{month:02}-01T00:00:00Z")), spec)
}

#[test]
fn dr_02_rules_of_one_host_are_taken_together() {
    let services = || service_in("default", "reviews", &[1, 2]);
    let it = compile(
        &(services()
            + &dated(
                "young",
                2,
                &format!(
                    "{{host: reviews, trafficPolicy: {{{}}}, subsets: [{{name: a, labels: {{version: v2}}}}, {{name: b, labels: {{version: v2}}}}]}}",
                    marked(2)
                ),
            )
            + &dated(
                "old",
                1,
                &format!(
                    "{{host: reviews, trafficPolicy: {{{}}}, subsets: [{{name: a, labels: {{version: v1}}}}]}}",
                    marked(1)
                ),
            )),
    );
    assert_eq!(it.mark(REVIEWS), 1, "the policy of the first");
    assert_eq!(it.addresses("outbound|80|a|reviews.default.svc.cluster.local"), [1], "of one name the first");
    assert_eq!(it.addresses("outbound|80|b|reviews.default.svc.cluster.local"), [2]);
    // A rule for some clients is another rule.
    let selecting = format!(
        "{{host: reviews, exportTo: ['.'], workloadSelector: {{matchLabels: {{app: web}}}}, trafficPolicy: {{{}}}}}",
        marked(3)
    );
    let yaml = services()
        + &dated("all", 1, "{host: reviews, trafficPolicy: {loadBalancer: {simple: RANDOM}}}")
        + &dated("some", 2, &selecting);
    let web = compile_for(&sidecar("default", &[("app", "web")]), &yaml);
    assert_eq!((web.mark(REVIEWS), web.spec(REVIEWS).balancer), (3, BalancerKind::LeastRequest));
    let other = compile_for(&sidecar("default", &[("app", "other")]), &yaml);
    assert_eq!((other.mark(REVIEWS), other.spec(REVIEWS).balancer), (10, BalancerKind::Random));
}

#[test]
fn dr_03_subsets() {
    let with = |subset: &str| {
        service_in("default", "reviews", &[1, 2])
            + &resource(
                "DestinationRule",
                "reviews",
                &format!(
                    "{{host: reviews, trafficPolicy: {{loadBalancer: {{simple: RANDOM}}, connectionPool: {{tcp: {{connectTimeout: 1s, maxConnections: 7}}}}}}, subsets: [{subset}]}}"
                ),
            )
    };
    let v2 = "outbound|80|v2|reviews.default.svc.cluster.local";
    let it = compile(&with("{name: v2, labels: {version: v2}}"));
    assert_eq!((it.addresses(REVIEWS), it.addresses(v2)), (vec![1, 2], vec![2]), "labels filter endpoints");
    assert_eq!(it.spec(v2).balancer, BalancerKind::Random, "what the subset does not say is the rule's");
    assert_eq!(it.mark(v2), 1);
    let it = compile(&with(
        "{name: v2, labels: {version: v2}, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 2s}}}}",
    ));
    assert_eq!(it.spec(v2).balancer, BalancerKind::Random, "block by block");
    assert_eq!((it.mark(v2), it.spec(v2).pool.max_connections), (2, u32::MAX), "a block is replaced whole");
    // Until a route names the subset, requests go by the rule.
    assert_eq!(it.clusters("http://reviews/"), [REVIEWS]);
    assert_eq!((it.mark(REVIEWS), it.spec(REVIEWS).pool.max_connections), (1, 7));
    let named = rules("  - {route: [{destination: {host: reviews, subset: v2}}]}\n");
    let it = compile(&(with("{name: v2, labels: {version: v2}}") + &named));
    assert_eq!(it.clusters("http://reviews/"), [v2]);
    for name in ["a_b", "-a", "'a b'", "a.b"] {
        refused(&with(&format!("{{name: {name}, labels: {{a: b}}}}")), "spec.subsets[0].name", "");
    }
    refused(&with("{labels: {a: b}}"), "spec.subsets[0].name", "needs a name");
}

#[test]
fn dr_04_port_level_settings_replace_all_blocks() {
    let service = resource(
        "ServiceEntry",
        "reviews",
        "{hosts: [reviews.default.svc.cluster.local], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}, {number: 81, name: http-b, protocol: HTTP}], endpoints: [{address: 127.0.0.1}]}",
    );
    let it = compile(
        &(service.clone()
            + &resource(
                "DestinationRule",
                "reviews",
                "{host: reviews, trafficPolicy: {loadBalancer: {simple: RANDOM}, connectionPool: {tcp: {connectTimeout: 1s}}, portLevelSettings: [{port: {number: 81}, loadBalancer: {simple: ROUND_ROBIN}}]}}",
            )),
    );
    let at_81 = "outbound|81||reviews.default.svc.cluster.local";
    assert_eq!((it.mark(REVIEWS), it.spec(REVIEWS).balancer), (1, BalancerKind::Random));
    assert_eq!(it.spec(at_81).balancer, BalancerKind::RoundRobin);
    assert_eq!(it.mark(at_81), 10, "what is left out is the default, not the rule's");
    let settings = |count: u32| {
        let ports: Vec<_> = (1..=count)
            .map(|port| format!("{{port: {{number: {port}}}, loadBalancer: {{simple: RANDOM}}}}"))
            .collect();
        let spec = format!("{{host: reviews, trafficPolicy: {{portLevelSettings: [{}]}}}}", ports.join(", "));
        service.clone() + &resource("DestinationRule", "reviews", &spec)
    };
    accepted(&settings(4096));
    refused(&settings(4097), "spec.trafficPolicy.portLevelSettings", "4096");
}

#[test]
fn dr_05_workload_selector() {
    let selecting = |namespace: &str, more: &str| {
        let more = format!(", workloadSelector: {{matchLabels: {{app: web}}}}{more}");
        rule(namespace, "some", "reviews.default.svc.cluster.local", 3, &more)
    };
    let mark = |namespace: &str, labels: &[(&str, &str)], rule: &str| {
        let yaml = service_in("default", "reviews", &[1]) + rule;
        compile_for(&sidecar(namespace, labels), &yaml).mark(REVIEWS)
    };
    let own = selecting("default", ", exportTo: ['.']");
    accepted(&own);
    assert_eq!(mark("default", &[("app", "web"), ("more", "x")], &own), 3);
    assert_eq!(mark("default", &[("app", "other")], &own), 10);
    assert_eq!(mark("other", &[("app", "web")], &own), 10, "only its own namespace");
    for export_to in ["['*']", "[other]"] {
        let yaml = selecting("default", &format!(", exportTo: {export_to}"));
        refused(&yaml, "spec.exportTo", "only be exported to \".\"");
    }
}

#[test]
fn dr_06_policies_that_are_refused() {
    let with = |policy: &str| {
        resource("DestinationRule", "d", &format!("{{host: reviews, trafficPolicy: {policy}}}"))
    };
    refused(&with("{}"), "spec.trafficPolicy", "at least one field");
    refused(
        &with("{tunnel: {protocol: CONNECT, targetHost: a.b, targetPort: 1}, proxyProtocol: {version: V1}}"),
        "spec.trafficPolicy.proxyProtocol",
        "tunnel and proxyProtocol",
    );
    let subset = "{host: reviews, subsets: [{name: a, labels: {a: b}, trafficPolicy: {}}]}";
    let subset = resource("DestinationRule", "d", subset);
    refused(&subset, "spec.subsets[0].trafficPolicy", "at least one field");
    let port = with("{portLevelSettings: [{port: {number: 1}}]}");
    refused(&port, "spec.trafficPolicy.portLevelSettings[0]", "at least one field");
}

#[test]
fn dr_lb01_simple_balancers() {
    let balancer = |cx: &CompileContext, policy: &str| {
        let rule = resource("DestinationRule", "d", &format!("{{host: reviews{policy}}}"));
        let it = compile_for(cx, &(service_in("default", "reviews", &[1]) + &rule));
        assert_eq!(it.unenforced(), [] as [&str; 0]);
        it.spec(REVIEWS).balancer
    };
    let current = CompileContext::new(Role::Sidecar);
    let simple =
        |kind: &str| balancer(&current, &format!(", trafficPolicy: {{loadBalancer: {{simple: {kind}}}}}"));
    assert_eq!(simple("UNSPECIFIED"), BalancerKind::LeastRequest);
    assert_eq!(simple("LEAST_REQUEST"), BalancerKind::LeastRequest);
    assert_eq!(simple("LEAST_CONN"), BalancerKind::LeastRequest, "a deprecated alias");
    assert_eq!(simple("ROUND_ROBIN"), BalancerKind::RoundRobin);
    assert_eq!(simple("RANDOM"), BalancerKind::Random);
    assert_eq!(simple("PASSTHROUGH"), BalancerKind::Passthrough);
    assert_eq!(balancer(&current, ""), BalancerKind::LeastRequest);
    let mut old = CompileContext::new(Role::Sidecar);
    old.compat = Compat::V1_1;
    assert_eq!(balancer(&old, ""), BalancerKind::RoundRobin, "the default of Istio 1.1");
}

/// Who answers `count` requests under a balancer: how many v1, how many v2.
async fn answers(policy: &str, weights: [u32; 2], count: usize) -> (Vec<usize>, String) {
    let (one, two) = (Echo::start("v1").await, Echo::start("v2").await);
    let endpoints: Vec<_> = [&one, &two]
        .into_iter()
        .zip(weights)
        .map(|(echo, weight)| {
            format!("{{address: 127.0.0.1, ports: {{http: {}}}, weight: {weight}}}", echo.addr.port())
        })
        .collect();
    let service = resource(
        "ServiceEntry",
        "reviews",
        &format!(
            "{{hosts: [reviews.default.svc.cluster.local], resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{}]}}",
            endpoints.join(", ")
        ),
    );
    let rule = resource(
        "DestinationRule",
        "reviews",
        &format!("{{host: reviews, trafficPolicy: {{loadBalancer: {{simple: {policy}}}}}}}"),
    );
    let client = compile(&(service + &rule)).client();
    let mut order = String::new();
    for _ in 0..count {
        order.push_str(&send(&client, get("http://reviews/")).await.by());
    }
    (vec![one.requests(), two.requests()], order)
}

#[tokio::test]
async fn dr_lb01_round_robin_is_in_turn_and_passthrough_goes_where_the_request_went() {
    let (counts, order) = answers("ROUND_ROBIN", [1, 1], 40).await;
    assert_eq!(counts, [20, 20]);
    assert!(!order.contains("v1v1") && !order.contains("v2v2"), "{order}");
    let (counts, _) = answers("RANDOM", [1, 1], 200).await;
    assert!(counts.iter().all(|count| (60..=140).contains(count)), "{counts:?}");

    let (one, two) = (Echo::start("v1").await, Echo::start("v2").await);
    let rule = "{host: reviews, trafficPolicy: {loadBalancer: {simple: PASSTHROUGH}}}";
    let service = resource(
        "ServiceEntry",
        "reviews",
        &format!(
            "{{hosts: [reviews.default.svc.cluster.local], resolution: STATIC, ports: [{{number: {}, name: http, protocol: HTTP}}], endpoints: [{{address: 127.0.0.1, ports: {{http: {}}}}}]}}",
            two.addr.port(),
            one.addr.port()
        ),
    );
    let client = compile(&(service + &resource("DestinationRule", "reviews", rule))).client();
    let answer = send(&client, to_original(get("http://reviews/"), two.addr)).await;
    assert_eq!(answer.by(), "v2");
    assert_eq!(one.requests(), 0);
}

#[tokio::test]
async fn dr_lb01_least_request_prefers_the_idle_endpoint() {
    let (one, two, services) = two_versions().await;
    let client = compile(&services).client();
    // A request that does not end loads one of the two.
    let held = tokio::spawn({
        let client = client.clone();
        async move { send(&client, get("http://reviews/gate")).await.by() }
    });
    until(|| one.requests() + two.requests() == 1).await;
    let loaded = if one.requests() == 1 { "v1" } else { "v2" };
    let mut to_loaded = 0;
    for _ in 0..40 {
        to_loaded += usize::from(send(&client, get("http://reviews/")).await.by() == loaded);
    }
    // Both draws of a pick fall on the loaded one in a quarter of the cases; the idle one takes all others.
    assert!(to_loaded <= 16, "{to_loaded} of 40 went to the loaded endpoint");
    one.gate.add_permits(1);
    two.gate.add_permits(1);
    assert_eq!(ended(held).await, loaded);
}

#[tokio::test]
async fn dr_lb09_weights_of_endpoints() {
    let (counts, _) = answers("ROUND_ROBIN", [3, 1], 40).await;
    assert_eq!(counts, [30, 10]);
    let (counts, _) = answers("RANDOM", [9, 1], 300).await;
    assert!((250..=290).contains(&counts[0]), "{counts:?}");
    // A weight that is not written is 1.
    let Discovery::Static(endpoints) =
        compile(&service_in("default", "reviews", &[1])).spec(REVIEWS).discovery
    else {
        panic!()
    };
    assert_eq!(endpoints[0].weight, 1);
    assert_eq!(
        Duration::from_secs(10),
        compile(&service_in("default", "reviews", &[1])).spec(REVIEWS).pool.connect_timeout
    );
}
