//! Services as Kubernetes knows them: REG-01.

use std::net::SocketAddr;

use mesh_core::registry::{Registry as _, Resolution};
use mesh_route::Discovery;

use crate::support::*;

const SERVICE: &str = "outbound|80||a.default.svc.cluster.local";

/// A service `a` with what else its spec says.
fn service(spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: default}}\nspec: {{{spec}}}\n"
    )
}

const HTTP: &str =
    "clusterIP: 10.0.0.1, ports: [{name: http, port: 80, targetPort: web}], selector: {app: a}";

/// A slice of the service `a`.
fn slice(name: &str, ports: &str, endpoints: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: default, labels: {{kubernetes.io/service-name: a}}}}\naddressType: IPv4\nports: [{ports}]\nendpoints: [{endpoints}]\n"
    )
}

fn endpoints(subsets: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Endpoints\nmetadata: {{name: a, namespace: default}}\nsubsets: [{subsets}]\n"
    )
}

fn addresses(yaml: &str) -> Vec<SocketAddr> {
    match compile(yaml).spec(SERVICE).discovery {
        Discovery::Static(endpoints) => endpoints.into_iter().map(|endpoint| endpoint.addr).collect(),
        other => panic!("{other:?}"),
    }
}

fn at(addresses: &[&str]) -> Vec<SocketAddr> {
    addresses.iter().map(|address| address.parse().unwrap()).collect()
}

#[test]
fn reg_01_endpoint_slices() {
    let two = slice("a-1", "{name: http, port: 8080}", "{addresses: [10.1.0.1]}, {addresses: [10.1.0.2]}")
        + &slice("a-2", "{name: http, port: 9090}", "{addresses: [10.1.0.3]}");
    assert_eq!(
        addresses(&(service(HTTP) + &two)),
        at(&["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:9090"]),
        "each slice has its own ports, by the name of the service's"
    );
    let ports = "{name: admin, port: 9000}, {name: http, port: 8080}";
    assert_eq!(
        addresses(&(service(HTTP) + &slice("a-1", ports, "{addresses: [10.1.0.1]}"))),
        at(&["10.1.0.1:8080"])
    );
    // Another service's, or another namespace's, is none of it.
    let other = two.replace("service-name: a}", "service-name: b}");
    assert!(addresses(&(service(HTTP) + &other)).is_empty());
    assert!(addresses(&(service(HTTP) + &two.replace("namespace: default", "namespace: other"))).is_empty());
}

#[test]
fn reg_01_only_what_is_ready_takes_requests() {
    let ready = |conditions: &str| {
        let endpoint = format!("{{addresses: [10.1.0.1]{conditions}}}");
        !addresses(&(service(HTTP) + &slice("a-1", "{name: http, port: 8080}", &endpoint))).is_empty()
    };
    assert!(ready(""), "what is not said counts as ready");
    assert!(ready(", conditions: {}"));
    assert!(ready(", conditions: {ready: true}"));
    assert!(!ready(", conditions: {ready: false}"));
    assert!(!ready(", conditions: {ready: false, serving: true, terminating: true}"));
    let yaml = endpoints(
        "{addresses: [{ip: 10.1.0.1}], notReadyAddresses: [{ip: 10.1.0.2}], ports: [{name: http, port: 8080}]}",
    );
    assert_eq!(addresses(&(service(HTTP) + &yaml)), at(&["10.1.0.1:8080"]));
}

#[test]
fn reg_01_endpoints_where_there_are_no_slices() {
    let old = endpoints("{addresses: [{ip: 10.1.0.1}, {ip: 10.1.0.2}], ports: [{name: http, port: 8080}]}");
    assert_eq!(addresses(&(service(HTTP) + &old)), at(&["10.1.0.1:8080", "10.1.0.2:8080"]));
    let new = slice("a-1", "{name: http, port: 8080}", "{addresses: [10.1.0.1]}");
    assert_eq!(addresses(&(service(HTTP) + &old + &new)), at(&["10.1.0.1:8080"]), "slices say the same anew");
}

#[test]
fn reg_01_workload_entries_that_a_service_selects() {
    let workload = |name: &str, labels: &str, more: &str| {
        resource("WorkloadEntry", name, &format!("{{address: 10.1.0.9, labels: {{{labels}}}{more}}}"))
    };
    let numbered =
        service("clusterIP: 10.0.0.1, ports: [{name: http, port: 80, targetPort: 8080}], selector: {app: a}");
    assert_eq!(addresses(&(numbered.clone() + &workload("w", "app: a", ""))), at(&["10.1.0.9:8080"]));
    assert_eq!(
        addresses(&(numbered.clone() + &workload("w", "app: a", ", ports: {http: 7}"))),
        at(&["10.1.0.9:7"])
    );
    assert!(addresses(&(numbered + &workload("w", "app: b", ""))).is_empty());
    let without = service("clusterIP: 10.0.0.1, ports: [{name: http, port: 80}]");
    assert!(addresses(&(without + &workload("w", "app: a", ""))).is_empty(), "no selector selects nobody");
}

#[test]
fn reg_01_names_addresses_and_aliases() {
    let it = compile(&service(
        "clusterIP: 10.0.0.1, clusterIPs: [10.0.0.1, 'fd00::1'], ports: [{name: http, port: 80}]",
    ));
    for authority in [
        "a",
        "a.default",
        "a.default.svc",
        "a.default.svc.cluster.local",
        "10.0.0.1",
        "[fd00::1]",
        "10.0.0.1:80",
    ] {
        assert_eq!(it.clusters(&format!("http://{authority}/")), [SERVICE], "{authority}");
    }
    // Headless without endpoints: wherever the client was going.
    let headless = compile(&service("clusterIP: None, ports: [{name: http, port: 80}]"));
    assert_eq!(headless.spec(SERVICE).discovery, Discovery::OriginalDst);
    // Another name of a service: its destination is the service's.
    let yaml = service_in("default", "reviews", &[1])
        + &service(
            "type: ExternalName, externalName: reviews.default.svc.cluster.local, ports: [{name: http, port: 80}]",
        );
    let it = compile(&yaml);
    assert_eq!(it.clusters("http://a/"), ["outbound|80||reviews.default.svc.cluster.local"]);
    let services = it.set.registry("cluster.local").services();
    assert_eq!(services.iter().filter(|service| service.alias_of.is_some()).count(), 1);
}

#[test]
fn reg_01_the_domain_is_the_clusters_own() {
    let it = compile(&service(HTTP));
    let services = it.set.registry("example.org").services();
    assert_eq!(
        (&*services[0].host, services[0].resolution),
        ("a.default.svc.example.org", Resolution::Static)
    );
    let mut cx = sidecar("default", &[]);
    cx.cluster_domain = "example.org".to_owned();
    let it = compile_for(&cx, &service(HTTP));
    assert_eq!(it.clusters("http://a.default.svc.example.org/"), ["outbound|80||a.default.svc.example.org"]);
    assert_eq!(it.clusters("http://a.default.svc.cluster.local/"), ["PassthroughCluster"]);
}

#[test]
fn reg_01_a_subset_that_nobody_is_in_is_said() {
    let subset = resource("DestinationRule", "a", "{host: a, subsets: [{name: v1, labels: {version: v1}}]}");
    let rule = resource(
        "VirtualService",
        "a",
        "{hosts: [a], http: [{route: [{destination: {host: a, subset: v1}}]}]}",
    );
    let labelled = slice("a-1", "{name: http, port: 8080}", "{addresses: [10.1.0.1]}");
    let yaml = service(HTTP) + &labelled + &subset + &rule;
    compile(&yaml).warns("spec.http[0].route[0].destination.subset", "503 UH");
    // Labels of the slice are those of its endpoints, and a service without any has nobody to be in it.
    let version = yaml.replace("service-name: a}", "service-name: a, version: v1}");
    for quiet in [version, service(HTTP) + &subset + &rule] {
        let it = compile(&quiet);
        assert!(it.diags.is_empty(), "{}", it.diags);
    }
}
