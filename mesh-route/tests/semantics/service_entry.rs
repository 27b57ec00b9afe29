//! Services that are written down: SE-01 … SE-04, WE-01.

use std::net::SocketAddr;

use mesh_core::registry::Registry as _;
use mesh_route::{Discovery, DnsEndpoint, EndpointSpec};

use crate::support::*;

const CLUSTER: &str = "outbound|80||a.example.com";
const PORTS: &str = "ports: [{number: 80, name: http, protocol: HTTP}]";

fn entry(spec: &str) -> String {
    resource("ServiceEntry", "a", &format!("{{{spec}}}"))
}

fn discovery(yaml: &str) -> Discovery {
    compile(yaml).spec(CLUSTER).discovery
}

fn listed(yaml: &str) -> Vec<EndpointSpec> {
    match discovery(yaml) {
        Discovery::Static(endpoints) => endpoints,
        other => panic!("{other:?}"),
    }
}

fn addresses(yaml: &str) -> Vec<SocketAddr> {
    listed(yaml).into_iter().map(|endpoint| endpoint.addr).collect()
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn se_01_hosts_addresses_and_ports() {
    refused(&entry(&format!("hosts: [], {PORTS}")), "spec.hosts", "at least one host");
    refused(&entry(PORTS), "spec.hosts", "at least one host");
    let it = compile(&entry(&format!(
        "hosts: [a.example.com, b.example.com], addresses: [10.0.0.1, 10.1.0.0/16], resolution: STATIC, {PORTS}, endpoints: [{{address: 127.0.0.1}}]"
    )));
    assert_eq!(it.clusters("http://a.example.com/"), ["outbound|80||a.example.com"]);
    assert_eq!(it.clusters("http://b.example.com/"), ["outbound|80||b.example.com"]);
    assert_eq!(it.clusters("http://10.0.0.1/"), ["outbound|80||a.example.com"], "its virtual address");
    let addressed = |resolution: &str, more: &str| {
        entry(&format!(
            "hosts: [a.example.com], addresses: [10.1.0.0/16], resolution: {resolution}, {PORTS}{more}"
        ))
    };
    accepted(&addressed("NONE", ""));
    accepted(&addressed("STATIC", ", endpoints: [{address: 127.0.0.1}]"));
    for resolution in ["DNS", "DNS_ROUND_ROBIN"] {
        refused(&addressed(resolution, ""), "spec.addresses[0]", "NONE/STATIC");
    }
    let ports = |ports: &str| entry(&format!("hosts: [a.example.com], ports: [{ports}]"));
    refused(
        &ports("{number: 80, name: http, protocol: HTTP}, {number: 81, name: http, protocol: HTTP}"),
        "spec.ports[1].name",
        "already defined",
    );
    refused(
        &ports("{number: 80, name: http, protocol: HTTP}, {number: 80, name: http-b, protocol: HTTP}"),
        "spec.ports[1].number",
        "already defined",
    );
    // The target is the number, unless another is written.
    let target = |port: &str| {
        addresses(&entry(&format!(
            "hosts: [a.example.com], resolution: STATIC, ports: [{port}], endpoints: [{{address: 127.0.0.1}}]"
        )))
    };
    assert_eq!(target("{number: 80, name: http, protocol: HTTP}"), [addr("127.0.0.1:80")]);
    assert_eq!(
        target("{number: 80, name: http, protocol: HTTP, targetPort: 8080}"),
        [addr("127.0.0.1:8080")]
    );
}

#[test]
fn se_02_location() {
    for (location, external) in
        [("", true), ("location: MESH_EXTERNAL, ", true), ("location: MESH_INTERNAL, ", false)]
    {
        let it = compile(&entry(&format!("hosts: [a.example.com], {location}{PORTS}, resolution: DNS")));
        assert_eq!(it.set.registry("cluster.local").services()[0].external, external, "{location}");
        assert_eq!(it.unenforced(), [] as [&str; 0]);
    }
}

#[test]
fn se_03_resolution() {
    let with = |resolution: &str, more: &str| {
        entry(&format!("hosts: [a.example.com], {PORTS}, resolution: {resolution}{more}"))
    };
    let endpoints = ", endpoints: [{address: 127.0.0.1}, {address: 127.0.0.2}]";
    assert_eq!(discovery(&entry(&format!("hosts: [a.example.com], {PORTS}"))), Discovery::OriginalDst);
    assert_eq!(discovery(&with("NONE", "")), Discovery::OriginalDst);
    refused(&with("NONE", endpoints), "spec.endpoints", "no endpoints");
    assert_eq!(addresses(&with("STATIC", endpoints)), [addr("127.0.0.1:80"), addr("127.0.0.2:80")]);
    let dns = |host: &str| DnsEndpoint::new(host, 80);
    let names = ", endpoints: [{address: b.example.com}, {address: c.example.com}]";
    assert_eq!(
        discovery(&with("DNS", names)),
        Discovery::StrictDns(vec![dns("b.example.com"), dns("c.example.com")])
    );
    assert_eq!(
        discovery(&with("DNS_ROUND_ROBIN", ", endpoints: [{address: b.example.com}]")),
        Discovery::LogicalDns(dns("b.example.com"))
    );
    refused(&with("DNS_ROUND_ROBIN", names), "spec.endpoints", "0 or 1 endpoint");
    let dynamic = |host: &str, protocol: &str, more: &str| {
        entry(&format!(
            "hosts: ['{host}'], ports: [{{number: 80, name: a, protocol: {protocol}}}], resolution: DYNAMIC_DNS{more}"
        ))
    };
    for protocol in ["HTTP", "TLS", "GRPC", "HTTP2"] {
        accepted(&dynamic("*.example.com", protocol, ""));
    }
    refused(&dynamic("*.example.com", "TCP", ""), "spec.ports[0].protocol", "HTTP, HTTP2, GRPC and TLS");
    refused(&dynamic("a.example.com", "HTTP", ""), "spec.hosts[0]", "wildcard");
    refused(&dynamic("*.example.com", "HTTP", endpoints), "spec.endpoints", "no endpoints");
    let addressed = dynamic("*.example.com", "HTTP", ", addresses: [10.0.0.1]");
    refused(&addressed, "spec.addresses", "no addresses");
    assert_eq!(compile(&dynamic("*.example.com", "HTTP", "")).unenforced(), ["spec.resolution"]);
}

#[test]
fn se_04_endpoints_selectors_and_who_sees_them() {
    let both = format!(
        "hosts: [a.example.com], {PORTS}, resolution: STATIC, endpoints: [{{address: 127.0.0.1}}], workloadSelector: {{labels: {{app: a}}}}"
    );
    refused(&entry(&both), "spec", "only one of workloadSelector and endpoints");
    let selecting = entry(&format!(
        "hosts: [a.example.com], {PORTS}, resolution: STATIC, workloadSelector: {{labels: {{app: a}}}}"
    ));
    let workload = |namespace: &str, name: &str, app: &str, address: &str| {
        let spec = format!("{{address: {address}, labels: {{app: {app}}}}}");
        in_namespace(namespace, "WorkloadEntry", name, &spec)
    };
    let workloads = workload("default", "a", "a", "10.0.0.1")
        + &workload("default", "b", "b", "10.0.0.2")
        + &workload("other", "c", "a", "10.0.0.3");
    assert_eq!(addresses(&(selecting + &workloads)), [addr("10.0.0.1:80")], "of its namespace, by labels");
    // Without endpoints the hosts are what is resolved.
    assert_eq!(
        discovery(&entry(&format!("hosts: [a.example.com], {PORTS}, resolution: DNS"))),
        Discovery::StrictDns(vec![DnsEndpoint::new("a.example.com", 80)])
    );
    refused(
        &entry(&format!("hosts: ['*.example.com'], {PORTS}, resolution: DNS")),
        "spec.hosts[0]",
        "must be an FQDN",
    );
    let names = entry(&format!("hosts: [a.example.com], {PORTS}, resolution: DNS, subjectAltNames: [a]"));
    assert_eq!(compile(&names).unenforced(), ["spec.subjectAltNames"], "nothing verifies a certificate yet");
    for (export_to, own, other) in
        [("['*']", true, true), ("['.']", true, false), ("[other]", false, true), ("['~']", false, false)]
    {
        let yaml = entry(&format!("hosts: [a.example.com], {PORTS}, resolution: DNS, exportTo: {export_to}"));
        for (namespace, sees) in [("default", own), ("other", other)] {
            let route = compile_for(&sidecar(namespace, &[]), &yaml).route("http://a.example.com/");
            assert_eq!(route.as_deref() == Some("default"), sees, "{export_to} {namespace}");
        }
    }
}

#[test]
fn we_01_workload_entry() {
    let with = |endpoint: &str| {
        entry(&format!(
            "hosts: [a.example.com], ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}], resolution: STATIC, endpoints: [{endpoint}]"
        ))
    };
    let one = |endpoint: &str| listed(&with(endpoint)).remove(0);
    assert_eq!(one("{address: 10.0.0.1}").addr, addr("10.0.0.1:8080"));
    assert_eq!(one("{address: '2001:db8::1'}").addr, addr("[2001:db8::1]:8080"));
    assert_eq!(one("{address: 10.0.0.1, ports: {http: 9}}").addr, addr("10.0.0.1:9"), "before targetPort");
    let full = one("{address: 10.0.0.1, weight: 7, locality: region/zone/sub}");
    assert_eq!((full.weight, &*full.locality), (7, "region/zone/sub"));
    assert_eq!((one("{address: 10.0.0.1}").weight, &*one("{address: 10.0.0.1}").locality), (1, ""));
    // Labels: what subsets select by.
    let subset = resource(
        "DestinationRule",
        "a",
        "{host: a.example.com, subsets: [{name: v2, labels: {version: v2}}]}",
    );
    let labelled =
        with("{address: 10.0.0.1, labels: {version: v1}}, {address: 10.0.0.2, labels: {version: v2}}");
    let Discovery::Static(v2) = compile(&(labelled + &subset)).spec("outbound|80|v2|a.example.com").discovery
    else {
        panic!()
    };
    assert_eq!(v2.iter().map(|endpoint| endpoint.addr).collect::<Vec<_>>(), [addr("10.0.0.2:8080")]);
    // A name is for DNS alone, where it may have a port of its own too.
    refused(&with("{address: b.example.com}"), "spec.endpoints[0].address", "not a valid IP address");
    let named = entry(
        "hosts: [a.example.com], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS, endpoints: [{address: b.example.com, ports: {http: 81}, weight: 2}]",
    );
    assert_eq!(
        discovery(&named),
        Discovery::StrictDns(vec![DnsEndpoint { weight: 2, ..DnsEndpoint::new("b.example.com", 81) }])
    );
    refused(&with("{address: 10.0.0.1, ports: {other: 81}}"), "spec.endpoints[0].ports.other", "no port");
    // A socket: an absolute path, and no ports. Nothing connects to it yet, and that is said.
    let socket = with("{address: 'unix:///run/a.sock', labels: {a: b}}");
    accepted(&socket);
    assert_eq!(compile(&socket).unenforced(), ["spec.endpoints[0].address"]);
    refused(&with("{address: 'unix://a.sock'}"), "spec.endpoints[0].address", "");
    refused(&with("{address: 'unix:///a', ports: {http: 1}}"), "spec.endpoints[0].ports", "no ports");
    let alone = resource("WorkloadEntry", "w", "{address: 'unix:///run/a.sock', labels: {a: b}}");
    assert_eq!(compile(&alone).unenforced(), ["spec.address"]);
    // Networks are not crossed; the account is kept for what will verify it.
    let remote = compile(&with("{address: 10.0.0.1, network: far, serviceAccount: sa}"));
    assert_eq!(remote.unenforced(), ["spec.endpoints[0].network"]);
    let services = remote.set.registry("cluster.local").services();
    assert_eq!(&*services[0].instances[0].service_account, "sa");
}
