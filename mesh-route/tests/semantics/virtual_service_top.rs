//! A virtual service as a whole: VS-01 … VS-09.

use crate::support::*;

const EDGE: &str = "{selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}";

fn virtual_service(name: &str, hosts: &str, more: &str) -> String {
    resource(
        "VirtualService",
        name,
        &format!(
            "{{hosts: {hosts}, {more}http: [{{name: {name}, route: [{{destination: {{host: reviews}}}}]}}]}}"
        ),
    )
}

#[test]
fn vs_01_hosts() {
    let it = compile(
        &(reviews(&[1])
            + &virtual_service("exact", "[exact.example.com]", "")
            + &virtual_service("wild", "['*.wild.example.com']", "")),
    );
    assert_eq!(it.route("http://exact.example.com/").as_deref(), Some("exact"));
    assert_eq!(it.route("http://a.wild.example.com/").as_deref(), Some("wild"));
    assert_eq!(it.route("http://wild.example.com/").as_deref(), Some("allow_any"));
    for bad in ["a.*.com", "a*.com", "'*.*.com'"] {
        refused(&virtual_service("v", &format!("[{bad}]"), ""), "spec.hosts[0]", "");
    }
    refused(&virtual_service("v", "['*']", ""), "spec.hosts[0]", "not allowed for the mesh gateway");
    refused(&virtual_service("v", "['*']", "gateways: [mesh, edge], "), "spec.hosts[0]", "mesh gateway");
    accepted(&virtual_service("v", "['*']", "gateways: [edge], "));
    // An address is a host only at a gateway.
    let addressed = virtual_service("v", "[10.1.2.3]", "gateways: [edge], ");
    accepted(&addressed);
    let gateway = compile_gateway(&(reviews(&[1]) + &resource("Gateway", "edge", EDGE) + &addressed));
    assert_eq!(gateway.route("http://10.1.2.3/").as_deref(), Some("v"));
    warned(&virtual_service("v", "[10.1.2.3]", ""), "spec.hosts[0]", "gateway");
    // What overlaps within one.
    refused(&virtual_service("v", "[a.com, A.com]", ""), "spec.hosts[1]", "overlap");
    refused(&virtual_service("v", "['*.com', a.com]", ""), "spec.hosts[1]", "overlap");
    refused(&virtual_service("v", "['*.a.com', '*.com']", ""), "spec.hosts[1]", "overlap");
    // What has hosts is no delegate.
    let root = resource(
        "VirtualService",
        "root",
        "{hosts: [reviews], http: [{match: [{uri: {prefix: /}}], delegate: {name: inner}}]}",
    );
    let it = compile(&(reviews(&[1]) + &root + &virtual_service("inner", "[inner.example.com]", "")));
    it.warns("spec.http[0].delegate", "no delegate default/inner");
    assert_eq!(it.route("http://reviews/").as_deref(), Some("default"), "as if there were no rule");
}

#[test]
fn vs_01_a_host_without_a_service_answers_at_the_ports_of_the_services_beside_it() {
    let service = |port: u32| {
        resource(
            "ServiceEntry",
            "backend",
            &format!(
                "{{hosts: [backend.example.com], resolution: STATIC, ports: [{{number: {port}, name: http, protocol: HTTP}}], endpoints: [{{address: 127.0.0.1}}]}}"
            ),
        )
    };
    let route = "http: [{name: v, route: [{destination: {host: backend.example.com}}]}]";
    let takes = |hosts: &str, url: &str| {
        let rule = resource("VirtualService", "v", &format!("{{hosts: [{hosts}], {route}}}"));
        compile(&(service(8080) + &rule)).route(url).as_deref() == Some("v")
    };
    let both = "backend.example.com, alias.example.com";
    assert!(takes(both, "http://alias.example.com:8080/"));
    assert!(!takes(both, "http://alias.example.com:80/"));
    assert!(takes("alias.example.com", "http://alias.example.com:80/"));
    assert!(!takes("alias.example.com", "http://alias.example.com:8080/"));
    assert!(takes("'*.example.com', alias.example.org", "http://alias.example.org:8080/"));
    // Without a port in the authority it is as for a service.
    assert!(
        takes(both, "http://alias.example.com/") && takes("alias.example.com", "http://alias.example.com/")
    );
}

#[test]
fn vs_01_a_host_in_full_comes_before_a_short_name() {
    // `reviews.default` is not the host of the service, which merely answers to it.
    let rule = resource(
        "VirtualService",
        "v",
        "{hosts: [reviews.default], http: [{name: v, route: [{destination: {host: reviews}}]}]}",
    );
    let it = compile(&(reviews(&[1]) + &rule));
    assert_eq!(it.route("http://reviews.default/").as_deref(), Some("v"));
    for other in ["reviews", "reviews.default.svc", "reviews.default.svc.cluster.local"] {
        assert_eq!(it.route(&format!("http://{other}/")).as_deref(), Some("default"), "{other}");
    }
    let entry = resource(
        "ServiceEntry",
        "short",
        "{hosts: [reviews.default], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}], endpoints: [{address: 127.0.0.1}]}",
    );
    let it = compile(&(reviews(&[1]) + &entry));
    assert_eq!(it.clusters("http://reviews.default/"), ["outbound|80||reviews.default"]);
    assert_eq!(it.clusters("http://reviews/"), ["outbound|80||reviews.default.svc.cluster.local"]);
}

#[test]
fn vs_01_instances_of_a_headless_service_answer_to_their_own_names() {
    let service = |ip: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: db, namespace: default}}\nspec: {{clusterIP: {ip}, ports: [{{name: http, port: 80}}]}}\n"
        )
    };
    let rule = resource(
        "VirtualService",
        "v",
        "{hosts: [db], http: [{name: v, route: [{destination: {host: db}}]}]}",
    );
    let it = compile(&(service("None") + &rule));
    let local = compile(&(service("10.0.0.1") + &rule));
    for name in ["db", "db.default", "db.default.svc", "db.default.svc.cluster.local"] {
        assert_eq!(it.route(&format!("http://{name}/")).as_deref(), Some("v"), "{name}");
        assert_eq!(it.route(&format!("http://db-0.{name}/")).as_deref(), Some("v"), "{name}");
        assert_eq!(it.route(&format!("http://db-0.{name}:80/")).as_deref(), Some("v"), "{name}");
        assert_eq!(local.route(&format!("http://db-0.{name}/")).as_deref(), Some("allow_any"), "{name}");
    }
}

#[test]
fn vs_02_gateways() {
    let yaml = reviews(&[1])
        + &resource("Gateway", "edge", EDGE)
        + &in_namespace("infra", "Gateway", "edge", EDGE)
        + &virtual_service("default", "[default.example.com]", "")
        + &virtual_service("edge", "[edge.example.com]", "gateways: [edge], ")
        + &virtual_service("both", "[both.example.com]", "gateways: [mesh, edge], ")
        + &virtual_service("named", "[named.example.com]", "gateways: [infra/edge], ")
        + &virtual_service("elsewhere", "[elsewhere.example.com]", "gateways: [nowhere/edge], ");
    let (mesh, gateway) = (compile(&yaml), compile_gateway(&yaml));
    for (name, in_mesh, at_gateway) in [
        ("default", true, false),
        ("edge", false, true),
        ("both", true, true),
        ("named", false, true),
        ("elsewhere", false, false),
    ] {
        let url = format!("http://{name}.example.com/");
        assert_eq!(mesh.route(&url).as_deref() == Some(name), in_mesh, "{name} in the mesh");
        assert_eq!(gateway.route(&url).as_deref() == Some(name), at_gateway, "{name} at the gateway");
    }
}

#[test]
fn vs_03_the_first_match_wins_and_nothing_follows_a_catch_all() {
    let it = compile(
        &(reviews(&[1])
            + &rules(
                "  - {name: a, match: [{uri: {prefix: /a}}], route: [{destination: {host: reviews}}]}\n  \
                 - {name: ab, match: [{uri: {exact: /ab}}], route: [{destination: {host: reviews}}]}\n  \
                 - {name: all, route: [{destination: {host: reviews}}]}\n  \
                 - {name: never, match: [{uri: {prefix: /z}}], route: [{destination: {host: reviews}}]}\n",
            )),
    );
    assert_eq!(it.route("http://reviews/ab").as_deref(), Some("a"), "not the closest, the first");
    assert_eq!(it.route("http://reviews/z").as_deref(), Some("all"));
    let names: Vec<_> = it
        .table
        .iter()
        .flat_map(|(_, _, host)| host.routes())
        .map(|route| route.name().to_owned())
        .filter(|name| name == "all" || name == "never")
        .collect();
    assert!(!names.is_empty() && names.iter().all(|name| name == "all"), "what follows is not there");
}

#[test]
fn vs_04_tls_is_validated_and_reported_where_only_http_is_routed() {
    let with = |tls: &str| {
        reviews(&[1]) + &resource("VirtualService", "v", &format!("{{hosts: [a.example.com], tls: [{tls}]}}"))
    };
    let route = "route: [{destination: {host: reviews}}]";
    let good = with(&format!("{{match: [{{sniHosts: [a.example.com], port: 443}}], {route}}}"));
    accepted(&good);
    assert_eq!(compile(&good).unenforced(), ["spec.tls"]);
    refused(&with(&format!("{{{route}}}")), "spec.tls[0].match", "needs a match");
    refused(&with(&format!("{{match: [{{port: 443}}], {route}}}")), "spec.tls[0].match[0].sniHosts", "");
    refused(
        &with(&format!("{{match: [{{sniHosts: [b.example.com]}}], {route}}}")),
        "spec.tls[0].match[0].sniHosts[0]",
        "not within the hosts",
    );
    refused(&with("{match: [{sniHosts: [a.example.com]}]}"), "spec.tls[0].route", "needs a destination");
}

#[test]
fn vs_05_tcp_is_validated_and_reported_where_only_http_is_routed() {
    let with = |tcp: &str| {
        reviews(&[1]) + &resource("VirtualService", "v", &format!("{{hosts: [a.example.com], tcp: [{tcp}]}}"))
    };
    let route = "route: [{destination: {host: reviews}}]";
    // A match is not needed.
    let good = with(&format!("{{{route}}}"));
    accepted(&good);
    assert_eq!(compile(&good).unenforced(), ["spec.tcp"]);
    accepted(&with(&format!("{{match: [{{port: 27017, destinationSubnets: [10.0.0.0/8]}}], {route}}}")));
    refused(&with("{match: [{port: 27017}]}"), "spec.tcp[0].route", "needs a destination");
    refused(&with(&format!("{{match: [{{port: 70000}}], {route}}}")), "spec.tcp[0].match[0].port", "70000");
}

#[test]
fn vs_06_export_to_says_who_sees_a_virtual_service() {
    for (export_to, own, other, third) in [
        ("", true, true, true),
        ("exportTo: ['*'], ", true, true, true),
        ("exportTo: ['.'], ", true, false, false),
        ("exportTo: [other], ", false, true, false),
        ("exportTo: ['.', third], ", true, false, true),
    ] {
        let yaml = service_in("default", "reviews", &[1]) + &virtual_service("v", "[reviews]", export_to);
        for (namespace, sees) in [("default", own), ("other", other), ("third", third)] {
            let it = compile_for(&sidecar(namespace, &[]), &yaml);
            let route = it.route("http://reviews.default.svc.cluster.local/");
            assert_eq!(route.as_deref() == Some("v"), sees, "{export_to} {namespace}");
        }
    }
    refused(&virtual_service("v", "[reviews]", "exportTo: ['*', other], "), "spec.exportTo", "alone");
}

fn dated(name: &str, month: u32, gateways: &str, http: &str) -> String {
    let created = format!("2026-{month:02}-01T00:00:00Z");
    aged(
        "default",
        "VirtualService",
        name,
        Some(&created),
        &format!("{{hosts: [reviews.default.svc.cluster.local], gateways: [{gateways}], http: [{http}]}}"),
    )
}

#[test]
fn vs_07_the_oldest_owns_a_host_in_the_mesh() {
    let rule = |name: &str, path: &str| {
        format!(
            "{{name: {name}, match: [{{uri: {{prefix: {path}}}}}], route: [{{destination: {{host: reviews}}}}]}}"
        )
    };
    let it = compile(
        &(reviews(&[1])
            + &dated("young", 2, "mesh", &rule("young", "/young"))
            + &dated("old", 1, "mesh", &rule("old", "/old"))),
    );
    assert_eq!(it.route("http://reviews/old").as_deref(), Some("old"));
    assert_eq!(it.route("http://reviews/young"), None);
    it.warns("spec.hosts[0]", "default/old");
    assert!(it.diags.iter().any(|d| d.code == Some("IST0109")), "{}", it.diags);
}

#[test]
fn vs_07_a_gateway_merges_by_age_and_moves_catch_alls_to_the_end() {
    let rule = |name: &str, matched: &str| {
        format!("{{name: {name}, {matched}route: [{{destination: {{host: reviews}}}}]}}")
    };
    let prefix = |path: &str| format!("match: [{{uri: {{prefix: {path}}}}}], ");
    let it = compile_gateway(
        &(reviews(&[1])
            + &resource("Gateway", "edge", EDGE)
            + &dated("third", 3, "edge", &(rule("c", &prefix("/c")) + ", " + &rule("c-all", "")))
            + &dated("second", 2, "edge", &(rule("b", &prefix("/b")) + ", " + &rule("b-c", &prefix("/c"))))
            + &dated("first", 1, "edge", &(rule("a", &prefix("/a")) + ", " + &rule("a-all", "")))),
    );
    let (_, _, host) = it.table.iter().next().unwrap();
    let names: Vec<_> = host.routes().iter().map(|route| route.name().to_owned()).collect();
    assert_eq!(names, ["a", "b", "b-c", "c", "a-all", "c-all"]);
    let at = |path: &str| it.route(&format!("http://reviews.default.svc.cluster.local{path}"));
    assert_eq!(at("/c").as_deref(), Some("b-c"));
    assert_eq!(at("/x").as_deref(), Some("a-all"));
}

#[test]
fn vs_08_a_virtual_service_without_rules_is_refused() {
    refused(&resource("VirtualService", "v", "{hosts: [reviews]}"), "spec", "http, tls or tcp is required");
    let empty = resource("VirtualService", "v", "{hosts: [reviews], http: [], tcp: [], tls: []}");
    refused(&empty, "spec", "http, tls or tcp is required");
}

#[tokio::test]
async fn vs_09_no_route_no_cluster_no_endpoint() {
    let it = compile(
        &(reviews(&[])
            + &rules(
                "  - {match: [{uri: {exact: /host}}], route: [{destination: {host: nobody}}]}\n  \
                 - {match: [{uri: {exact: /subset}}], route: [{destination: {host: reviews, subset: v9}}]}\n  \
                 - {match: [{uri: {exact: /port}}], route: [{destination: {host: reviews, port: {number: 1}}}]}\n  \
                 - {match: [{uri: {exact: /empty}}], route: [{destination: {host: reviews}}]}\n",
            )),
    );
    it.warns("spec.http[0].route[0].destination.host", "503 NC");
    it.warns("spec.http[1].route[0].destination.subset", "503 NC");
    it.warns("spec.http[2].route[0].destination.port", "503 NC");
    let client = it.client();
    for (path, expected) in [
        ("/", "404 NR route_not_found"),
        ("/host", "503 NC cluster_not_found"),
        ("/subset", "503 NC cluster_not_found"),
        ("/port", "503 NC cluster_not_found"),
        ("/empty", "503 UH no_healthy_upstream"),
    ] {
        assert_eq!(fail(&client, get(&format!("http://reviews{path}"))).await, expected, "{path}");
    }
}

#[test]
fn vs_02_a_gateway_that_is_not_there_is_said() {
    let yaml = |named: &str| {
        reviews(&[1])
            + &resource("Gateway", "edge", EDGE)
            + &virtual_service("v", "[a.com]", &format!("gateways: [{named}], "))
    };
    let said = |it: &Compiled| -> Vec<_> {
        let there = it.diags.iter().filter(|d| d.message.contains("is there: nothing is attached"));
        there.map(|d| (d.path.clone(), d.code, d.message.clone())).collect()
    };
    for there in ["edge", "default/edge", "mesh"] {
        for compiled in [compile(&yaml(there)), compile_gateway(&yaml(there))] {
            assert_eq!(said(&compiled), [], "{there}");
        }
    }
    for compiled in [compile(&yaml("edge, other/edge")), compile_gateway(&yaml("edge, other/edge"))] {
        let message = "no gateway other/edge is there: nothing is attached to it".to_owned();
        assert_eq!(said(&compiled), [("spec.gateways[1]".to_owned(), Some("IST0101"), message)]);
    }
}
