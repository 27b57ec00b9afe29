//! What a gateway exposes: GW-01 … GW-04.

use mesh_core::config::{CompileContext, Role};
use mesh_core::diagnostics::Severity;

use crate::support::*;

fn server(port: &str, more: &str) -> String {
    format!("{{port: {{{port}}}, {more}}}")
}

fn gateway_in(namespace: &str, selector: &str, servers: &str) -> String {
    in_namespace(namespace, "Gateway", "edge", &format!("{{{selector}servers: [{servers}]}}"))
}

fn gateway(servers: &str) -> String {
    gateway_in("default", "selector: {istio: ingressgateway}, ", servers)
}

fn virtual_service(namespace: &str, hosts: &str, more: &str) -> String {
    in_namespace(
        namespace,
        "VirtualService",
        "v",
        &format!(
            "{{hosts: {hosts}, {more}http: [{{name: v, route: [{{destination: {{host: reviews.default.svc.cluster.local}}}}]}}]}}"
        ),
    )
}

const HTTP: &str = "number: 80, name: http, protocol: HTTP";

impl Compiled {
    fn at(&self, port: u16, url: &str) -> Option<String> {
        let mut request = get(url);
        request.extensions_mut().insert(ListenerPort(port));
        self.route_of(&request)
    }
}

#[test]
fn gw_01_servers_and_ports() {
    refused(&gateway(""), "spec.servers", "at least one server");
    let hosts = "hosts: ['*']";
    for protocol in ["HTTP", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "TCP"] {
        accepted(&gateway(&server(&format!("number: 80, name: a, protocol: {protocol}"), hosts)));
    }
    for protocol in ["HTTPS", "TLS"] {
        let tls = format!("{hosts}, tls: {{mode: PASSTHROUGH}}");
        accepted(&gateway(&server(&format!("number: 443, name: a, protocol: {protocol}"), &tls)));
    }
    let path = "spec.servers[0].port";
    let refuse = |port: &str, field: &str, reason: &str| {
        refused(&gateway(&server(port, hosts)), &format!("{path}.{field}"), reason);
    };
    refuse("number: 80, name: a, protocol: SCTP", "protocol", "invalid protocol");
    refuse("number: 80, protocol: HTTP", "name", "must be set");
    refuse("number: 0, name: a, protocol: HTTP", "number", "1..65535");
    refuse("number: 80, name: a, protocol: HTTP, targetPort: 81", "targetPort", "no effect");
    refused(&gateway(&format!("{{{hosts}}}")), path, "must have a port");
    let twice = server(HTTP, hosts) + ", " + &server("number: 81, name: http, protocol: HTTP", hosts);
    refused(&gateway(&twice), "spec.servers[1].port.name", "not unique");
    // What is plain HTTP is served, each at its port.
    for (port, protocol) in (80..).zip(["HTTP", "HTTP2", "GRPC", "GRPC-WEB"]) {
        let server = server(&format!("number: {port}, name: a, protocol: {protocol}"), hosts);
        let rule = virtual_service("default", "[a.example.com]", "gateways: [edge], ");
        let it = compile_gateway(&(reviews(&[1]) + &gateway(&server) + &rule));
        assert_eq!(it.at(port, "http://a.example.com/").as_deref(), Some("v"), "{protocol}");
        assert_eq!(it.at(port + 1, "http://a.example.com/"), None, "{protocol}");
    }
}

#[test]
fn gw_02_hosts() {
    refused(&gateway(&server(HTTP, "hosts: []")), "spec.servers[0].hosts", "at least one host");
    for bad in ["'a.*.com'", "'a/b/c.com'", "''"] {
        let yaml = gateway(&server(HTTP, &format!("hosts: [{bad}]")));
        refused(&yaml, "spec.servers[0].hosts[0]", "");
    }
    let serves = |hosts: &str, namespace: &str, host: &str, url: &str| {
        let rule = virtual_service(namespace, &format!("['{host}']"), "gateways: [default/edge], ");
        let servers = server(HTTP, &format!("hosts: [{hosts}]"));
        compile_gateway(&(reviews(&[1]) + &gateway(&servers) + &rule)).at(80, url).is_some()
    };
    let a = "http://a.example.com/";
    for (hosts, namespace, host, url, expected) in [
        ("a.example.com", "default", "a.example.com", a, true),
        ("b.example.com", "default", "a.example.com", a, false),
        ("'*.example.com'", "default", "a.example.com", a, true),
        ("'*.example.com'", "default", "example.com", "http://example.com/", false),
        ("'*'", "default", "a.example.com", a, true),
        // The gateway exposes no more than both say.
        ("'*.example.com'", "default", "*", a, true),
        ("'*.example.com'", "default", "*", "http://a.other.com/", false),
        ("a.example.com", "default", "*.example.com", a, true),
        ("a.example.com", "default", "*.example.com", "http://b.example.com/", false),
        // Which namespaces may bind.
        ("other/a.example.com", "other", "a.example.com", a, true),
        ("other/a.example.com", "default", "a.example.com", a, false),
        ("'./a.example.com'", "default", "a.example.com", a, true),
        ("'./a.example.com'", "other", "a.example.com", a, false),
        ("'*/a.example.com'", "other", "a.example.com", a, true),
    ] {
        assert_eq!(serves(hosts, namespace, host, url), expected, "{hosts} {namespace} {host} {url}");
    }
    // The virtual service has to name the gateway and to be exported to it.
    let servers = gateway(&server(HTTP, "hosts: ['*']"));
    let with = |more: &str| {
        let rule = virtual_service("other", "[a.example.com]", more);
        compile_gateway(&(reviews(&[1]) + &servers + &rule)).at(80, a).is_some()
    };
    assert!(with("gateways: [default/edge], "));
    assert!(!with("gateways: [edge], "), "without a namespace it is one of its own");
    assert!(!with(""));
    assert!(!with("gateways: [default/edge], exportTo: ['.'], "));
    assert!(with("gateways: [default/edge], exportTo: [default], "));
}

#[test]
fn gw_03_selector_and_bind() {
    let servers = server(HTTP, "hosts: ['*']");
    let selects = |namespace: &str, selector: &str| {
        let rule = virtual_service("default", "[a.example.com]", &format!("gateways: [{namespace}/edge], "));
        let yaml = reviews(&[1]) + &gateway_in(namespace, selector, &servers) + &rule;
        compile_gateway(&yaml).at(80, "http://a.example.com/").is_some()
    };
    assert!(selects("default", "selector: {istio: ingressgateway}, "));
    assert!(selects("far", "selector: {istio: ingressgateway}, "), "in every namespace");
    assert!(selects("far", ""), "none is every gateway");
    assert!(!selects("default", "selector: {istio: egressgateway}, "));
    assert!(!selects("default", "selector: {istio: ingressgateway, zone: a}, "));
    let bound = |bind: &str, port: u32| {
        gateway(&server(
            &format!("number: {port}, name: http, protocol: HTTP"),
            &format!("hosts: ['*'], bind: '{bind}'"),
        ))
    };
    accepted(&bound("10.0.0.1", 80));
    accepted(&bound("unix:///run/edge.sock", 0));
    refused(&bound("edge.example.com", 80), "spec.servers[0].bind", "");
    refused(&bound("unix:///run/edge.sock", 80), "spec.servers[0].port.number", "must be 0");
    refused(&bound("unix://edge.sock", 0), "spec.servers[0].bind", "");
    let endpoint = gateway(&server(HTTP, "hosts: ['*'], defaultEndpoint: '127.0.0.1:80'"));
    assert_eq!(compile_gateway(&endpoint).unenforced(), ["spec.servers[0].defaultEndpoint"]);
}

#[tokio::test]
async fn gw_04_https_redirect_and_tls() {
    let redirecting = server(HTTP, "hosts: ['*'], tls: {httpsRedirect: true}");
    let rule = virtual_service("default", "[a.example.com]", "gateways: [edge], ");
    let yaml = reviews(&[1]) + &gateway(&redirecting) + &rule;
    accepted(&yaml);
    let it = compile_gateway(&yaml);
    assert_eq!(it.unenforced(), [] as [&str; 0]);
    for (url, location) in [
        ("http://a.example.com/x?q", "https://a.example.com/x?q"),
        ("http://a.example.com:80/", "https://a.example.com/"),
        ("http://nobody.example.com/", "https://nobody.example.com/"),
    ] {
        assert_eq!(it.redirect(url), format!("301 {location}"), "whether a rule is there or not");
    }
    // What came over TLS to a proxy in front is where it should be.
    let mut request = get("http://a.example.com/x");
    request.headers_mut().insert("x-forwarded-proto", "https".parse().unwrap());
    assert_eq!(it.route_of(&request).as_deref(), Some("v"));

    for protocol in ["HTTPS", "TLS"] {
        let bare = server(&format!("number: 443, name: a, protocol: {protocol}"), "hosts: ['*']");
        refused(&gateway(&bare), "spec.servers[0].tls", "must have TLS settings");
    }
    let plain = server(HTTP, "hosts: ['*'], tls: {mode: SIMPLE, credentialName: a}");
    refused(&gateway(&plain), "spec.servers[0].tls", "plain text");
    for (mode, more) in [
        ("PASSTHROUGH", ""),
        ("SIMPLE", ", credentialName: a"),
        ("MUTUAL", ", credentialName: a"),
        ("AUTO_PASSTHROUGH", ""),
        ("ISTIO_MUTUAL", ""),
        ("OPTIONAL_MUTUAL", ", credentialName: a"),
    ] {
        let tls = format!("hosts: ['*'], tls: {{mode: {mode}{more}}}");
        let yaml = gateway(&server("number: 443, name: a, protocol: HTTPS", &tls));
        accepted(&yaml);
        // Where nothing terminates TLS, no rule is served there in plain text, and that is said as an error.
        let it = compile_gateway(&(reviews(&[1]) + &yaml + &rule));
        assert_eq!(it.at(443, "http://a.example.com/"), None, "{mode}");
        let left = it.set.unhonoured(&it.diags, Severity::Error);
        assert!(
            left.iter().any(|d| d.severity == Severity::Error && d.path == "spec.servers[0].tls"),
            "{mode}: {left:?}"
        );
    }
    let unknown =
        gateway(&server("number: 443, name: a, protocol: HTTPS", "hosts: ['*'], tls: {mode: NONE}"));
    refused(&unknown, "spec.servers[0].tls.mode", "");
}

/// Compiles for a gateway whose stack ends TLS, with an identity of its own or without.
fn terminating(yaml: &str, has_identity: bool) -> Compiled {
    let mut cx = CompileContext::new(Role::Gateway);
    cx.workload.labels = [("istio".to_owned(), "ingressgateway".to_owned())].into();
    cx.transport.terminates_servers = true;
    cx.transport.has_identity = has_identity;
    compile_for(&cx, yaml)
}

fn https(hosts: &str, tls: &str) -> String {
    server("number: 443, name: https, protocol: HTTPS", &format!("hosts: {hosts}, tls: {{{tls}}}"))
}

#[test]
fn gw_04_servers_that_end_tls_have_the_routes_of_their_port() {
    let rule = virtual_service("default", "[a.example.com]", "gateways: [edge], ");
    for (mode, has_identity, served) in [
        ("mode: SIMPLE, credentialName: a", false, true),
        ("mode: MUTUAL, credentialName: a, subjectAltNames: [b]", false, true),
        ("mode: OPTIONAL_MUTUAL, credentialNames: [a, b]", false, true),
        ("mode: ISTIO_MUTUAL", true, true),
        ("mode: ISTIO_MUTUAL", false, false),
        ("mode: AUTO_PASSTHROUGH", true, false),
    ] {
        let yaml = reviews(&[1]) + &gateway(&https("['*']", mode)) + &rule;
        let it = terminating(&yaml, has_identity);
        assert_eq!(it.at(443, "https://a.example.com/").is_some(), served, "{mode}");
        assert_eq!(it.at(80, "http://a.example.com/"), None, "{mode}");
        let left = it.unenforced();
        assert_eq!(left.is_empty(), served, "{mode}: {left:?}");
    }
    // The mesh knows its workloads by identity; a pin on their certificates is not looked at.
    let pinned = format!("mode: ISTIO_MUTUAL, verifyCertificateHash: ['{}']", "ab".repeat(32));
    let it = terminating(&(reviews(&[1]) + &gateway(&https("['*']", &pinned)) + &rule), true);
    assert_eq!(it.unenforced(), ["spec.servers[0].tls.verifyCertificateHash"]);
}

#[test]
fn gw_04_a_name_has_the_routes_of_the_server_that_it_belongs_to() {
    let servers = |name: &str, servers: &str| {
        in_namespace("default", "Gateway", name, &format!("{{servers: [{servers}]}}"))
    };
    let rule = |name: &str, hosts: &str, gateway: &str| {
        in_namespace(
            "default",
            "VirtualService",
            name,
            &format!(
                "{{hosts: {hosts}, gateways: [{gateway}], http: [{{name: {name}, route: [{{destination: {{host: reviews.default.svc.cluster.local}}}}]}}]}}"
            ),
        )
    };
    // Whoever asks for the narrow name shook hands with the open server: what is behind the other is not there.
    let wide = servers("wide", &https("['*.example.com']", "mode: MUTUAL, credentialName: a"));
    let narrow = servers("narrow", &https("[a.example.com]", "mode: SIMPLE, credentialName: a"));
    let guarded = rule("guarded", "['*.example.com']", "wide");
    let it = terminating(&(reviews(&[1]) + &wide + &narrow + &guarded), false);
    assert_eq!(it.at(443, "https://a.example.com/"), None);
    assert_eq!(it.at(443, "https://b.example.com/").as_deref(), Some("guarded"));
    // Nor what is attached by its exact name to the other.
    let exact = rule("exact", "[a.example.com]", "wide");
    let it = terminating(&(reviews(&[1]) + &wide + &narrow + &exact), false);
    assert_eq!(it.at(443, "https://a.example.com/"), None);
    let open = rule("open", "[a.example.com]", "narrow");
    let it = terminating(&(reviews(&[1]) + &wide + &narrow + &guarded + &exact + &open), false);
    assert_eq!(it.at(443, "https://a.example.com/").as_deref(), Some("open"));
    // Nor what belongs to a server that nothing can serve.
    let any = servers("wide", &https("['*']", "mode: SIMPLE, credentialName: a"));
    let unserved = servers("narrow", &https("[a.example.com]", "mode: ISTIO_MUTUAL"));
    let it = terminating(&(reviews(&[1]) + &any + &unserved + &exact), false);
    assert_eq!(it.at(443, "https://a.example.com/"), None);
    // Two that shake hands alike are one.
    let alike = servers("alike", &https("[a.example.com]", "mode: MUTUAL, credentialName: a"));
    let it = terminating(&(reviews(&[1]) + &wide + &alike + &exact), false);
    assert_eq!(it.at(443, "https://a.example.com/").as_deref(), Some("exact"));
}

#[test]
fn gw_04_a_port_is_never_both_plain_and_secure() {
    let plain = |hosts: &str| server("number: 443, name: http, protocol: HTTP", &format!("hosts: {hosts}"));
    let secure = https("[a.example.com]", "mode: SIMPLE, credentialName: a");
    let rule = virtual_service("default", "['*']", "gateways: [edge], ");
    let yaml = |servers: &str| reviews(&[1]) + &gateway(servers) + &rule;
    let first = terminating(&yaml(&format!("{}, {secure}", plain("[b.example.com]"))), false);
    assert_eq!(first.at(443, "http://a.example.com/"), None);
    assert_eq!(first.at(443, "http://b.example.com/").as_deref(), Some("v"));
    let last = terminating(&yaml(&format!("{secure}, {}", plain("[b.example.com]"))), false);
    assert_eq!(last.at(443, "https://a.example.com/").as_deref(), Some("v"));
    assert_eq!(last.at(443, "http://b.example.com/"), None);
}

#[test]
fn gw_02_a_rule_for_one_gateway_is_under_the_names_of_that_gateway() {
    let named = |name: &str, host: &str| {
        in_namespace(
            "default",
            "Gateway",
            name,
            &format!(
                "{{selector: {{istio: ingressgateway}}, servers: [{}]}}",
                server(HTTP, &format!("hosts: [{host}]"))
            ),
        )
    };
    let rule = resource(
        "VirtualService",
        "v",
        "{hosts: [a.example.com, b.example.com, c.example.com], gateways: [one, two], http: [\
         {name: two, match: [{uri: {prefix: /x}, gateways: [two]}], route: [{destination: {host: reviews}}]}, \
         {name: both, route: [{destination: {host: reviews}}]}]}",
    );
    let gateways =
        named("one", "a.example.com, c.example.com") + &named("two", "b.example.com, c.example.com");
    let it = compile_gateway(&(reviews(&[1]) + &gateways + &rule));
    for (host, route) in [("a", "both"), ("b", "two"), ("c", "two")] {
        let url = format!("http://{host}.example.com/x");
        assert_eq!(it.at(80, &url).as_deref(), Some(route), "{host}");
    }
}

#[test]
fn gw_04_only_the_names_of_the_redirecting_server_are_redirected() {
    let open = in_namespace(
        "default",
        "Gateway",
        "open",
        &format!(
            "{{selector: {{istio: ingressgateway}}, servers: [{}]}}",
            server(HTTP, "hosts: [a.example.com]")
        ),
    );
    let redirecting = gateway(&server(HTTP, "hosts: ['*.example.com'], tls: {httpsRedirect: true}"));
    let rule = virtual_service("default", "[a.example.com]", "gateways: [open], ");
    let it = compile_gateway(&(reviews(&[1]) + &open + &redirecting + &rule));
    assert_eq!(it.at(80, "http://a.example.com/").as_deref(), Some("v"));
    assert_eq!(it.redirect("http://b.example.com/"), "301 https://b.example.com/");
    let both = virtual_service("default", "[a.example.com]", "gateways: [open, edge], ");
    let it = compile_gateway(&(reviews(&[1]) + &open + &redirecting + &both));
    assert_eq!(it.redirect("http://a.example.com/"), "301 https://a.example.com/");
}
