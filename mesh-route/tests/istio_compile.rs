//! Istio YAML compiled and asked: which route takes a request, and where it goes.
#![cfg(feature = "istio")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use mesh_core::config::{Compile as _, CompileContext, Role};
use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
use mesh_core::{ConnInfo, Direction};
use mesh_route::{Decision, Explanation, RequestView, RouteTable, explain};

const SERVICES: &str = r#"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews.default.svc.cluster.local]
  location: MESH_INTERNAL
  resolution: STATIC
  addresses: [10.9.8.7]
  ports: [{number: 9080, name: http, protocol: HTTP}]
  endpoints:
  - {address: 127.0.0.1, ports: {http: 1001}, labels: {version: v1}}
  - {address: 127.0.0.1, ports: {http: 1003}, labels: {version: v3}, weight: 3}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: other}
spec:
  clusterIP: 10.0.0.9
  ports: [{name: http, port: 80, targetPort: 8080}, {name: http-admin, port: 81}]
---
apiVersion: v1
kind: Service
metadata: {name: two, namespace: default}
spec:
  ports: [{name: http-a, port: 8081}, {name: http-b, port: 8082}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: default}
spec:
  host: reviews
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v3, labels: {version: v3}}
"#;

fn compile_for(role: Role, yaml: &str) -> (RouteTable, Diagnostics) {
    let file = SourceFile::new("<test>", format!("{SERVICES}\n---\n{yaml}"));
    let (set, mut diags) = ResourceSet::load(&[file], &LoadOptions::default());
    assert!(!diags.has_errors(), "{diags}");
    let mut cx = CompileContext::new(role);
    cx.workload.labels = [("istio".to_owned(), "ingressgateway".to_owned())].into();
    let table = RouteTable::compile(&set, &cx, &mut diags).unwrap();
    (table, diags)
}

fn compile(yaml: &str) -> RouteTable {
    compile_for(Role::Sidecar, yaml).0
}

fn ask(table: &RouteTable, url: &str) -> Explanation {
    ask_on(table, url, &ConnInfo::unknown(Direction::Outbound))
}

fn ask_on(table: &RouteTable, url: &str, conn: &ConnInfo) -> Explanation {
    let request = http::Request::get(url).body(()).unwrap();
    explain(table, &RequestView::new(&request, conn), conn, 7)
}

fn clusters(explanation: &Explanation) -> Vec<(u32, String)> {
    match &explanation.decision {
        Decision::Forward { destinations, .. } => {
            destinations.iter().map(|(weight, name, _)| (*weight, name.to_string())).collect()
        }
        other => panic!("not forwarded: {other:?}\n{explanation}"),
    }
}

#[test]
fn every_name_of_a_service_leads_to_it() {
    let table = compile("");
    for authority in [
        "reviews",
        "Reviews:9080",
        "reviews.default",
        "reviews.default.svc",
        "reviews.default.svc.cluster.local",
        "reviews.default.svc.cluster.local.",
        "reviews.default.svc.cluster.local:9080",
        "10.9.8.7",
        "10.9.8.7:9080",
    ] {
        let explanation = ask(&table, &format!("http://{authority}/"));
        assert_eq!(
            clusters(&explanation),
            [(0, "outbound|9080||reviews.default.svc.cluster.local".to_owned())],
            "{authority}"
        );
    }
    assert_eq!(
        clusters(&ask(&table, "http://web.other/")),
        [(0, "outbound|80||web.other.svc.cluster.local".to_owned())]
    );
    assert_eq!(
        clusters(&ask(&table, "http://web.other:81/")),
        [(0, "outbound|81||web.other.svc.cluster.local".to_owned())]
    );
    // A client of another namespace does not know it by its first name.
    assert_eq!(clusters(&ask(&table, "http://web/")), [(0, "PassthroughCluster".to_owned())]);
    // Several HTTP ports, none of them 80, and none named.
    assert!(matches!(ask(&table, "http://two/").decision, Decision::NotFound));
    assert_eq!(
        clusters(&ask(&table, "http://two:8082/")),
        [(0, "outbound|8082||two.default.svc.cluster.local".to_owned())]
    );
    // A port that the service does not have.
    assert_eq!(clusters(&ask(&table, "http://reviews:1/")), [(0, "PassthroughCluster".to_owned())]);
}

#[test]
fn a_split_is_explained_rule_by_rule() {
    let table = compile(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews]
  http:
  - match: [{headers: {end-user: {exact: jason}}}]
    route: [{destination: {host: reviews, subset: v3}}]
  - name: canary
    route:
    - {destination: {host: reviews, subset: v1}, weight: 90}
    - {destination: {host: reviews, subset: v3}, weight: 10}
",
    );
    let explanation = ask(&table, "http://reviews/");
    assert_eq!(
        clusters(&explanation),
        [
            (90, "outbound|9080|v1|reviews.default.svc.cluster.local".to_owned()),
            (10, "outbound|9080|v3|reviews.default.svc.cluster.local".to_owned())
        ]
    );
    assert_eq!(explanation.route.as_ref().unwrap().name(), "canary");
    assert_eq!(explanation.passed_over.len(), 1);
    assert_eq!(explanation.passed_over[0].unmet.predicate, r#"header end-user exact "jason""#);
    assert_eq!(explanation.passed_over[0].unmet.seen, None);
}

#[test]
fn what_is_not_enforced_is_reported() {
    let file = SourceFile::new(
        "<test>",
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: v, namespace: default}
spec:
  hosts: [v]
  http: [{match: [{uri: {prefix: /}, statPrefix: v}], route: [{destination: {host: v}}]}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: d, namespace: default}
spec: {host: v, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}, loadBalancer: {simple: RANDOM}}}
",
    );
    let (set, mut diags) = ResourceSet::load(&[file], &LoadOptions::default());
    RouteTable::compile(&set, &CompileContext::new(Role::Sidecar), &mut diags).unwrap();
    let left: Vec<_> =
        set.unhonoured(&diags, Severity::Error).into_iter().map(|d| (d.severity, d.path)).collect();
    assert_eq!(
        left,
        [
            (Severity::Warning, "spec.http[0].match[0].statPrefix".to_owned()),
            (Severity::Error, "spec.trafficPolicy.tls".to_owned())
        ]
    );
}

#[test]
fn bug_pseudo_headers_are_headers_too() {
    let table = compile(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews]
  http:
  - {name: by-method, match: [{headers: {':method': {exact: POST}}}], route: [{destination: {host: reviews}}]}
  - {name: by-path, match: [{headers: {':path': {exact: '/a?b'}}}], route: [{destination: {host: reviews}}]}
  - {name: not-a, match: [{withoutHeaders: {':path': {prefix: '/a'}}}], route: [{destination: {host: reviews}}]}
",
    );
    let name = |url: &str| ask(&table, url).route.map(|route| route.name().to_owned());
    assert_eq!(name("http://reviews/a?b").as_deref(), Some("by-path"));
    assert_eq!(name("http://reviews/a"), None);
    assert_eq!(name("http://reviews/b").as_deref(), Some("not-a"));
}
