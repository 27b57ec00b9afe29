//! Names, visibility, selection and age, wherever they decide: X-03 … X-07.

use std::time::Duration;

use serde_json::json;

use crate::support::*;

fn reviews_in(namespace: &str) -> String {
    format!("outbound|80||reviews.{namespace}.svc.cluster.local")
}

#[test]
fn x_03_short_names_take_the_namespace_of_the_rule() {
    let services = service_in("default", "reviews", &[1]) + &service_in("other", "reviews", &[2]);
    let rule = |namespace: &str| {
        in_namespace(
            namespace,
            "VirtualService",
            "v",
            "{hosts: [reviews], http: [{name: v, route: [{destination: {host: reviews}}]}]}",
        )
    };
    let it = compile(&(services.clone() + &rule("other")));
    let (own, other) =
        ("http://reviews.default.svc.cluster.local/", "http://reviews.other.svc.cluster.local/");
    assert_eq!((it.route(own).as_deref(), it.route(other).as_deref()), (Some("default"), Some("v")));
    assert_eq!(it.clusters(other), [reviews_in("other")], "and its destination");
    let it = compile(&(services.clone() + &rule("default")));
    assert_eq!((it.route(own).as_deref(), it.route(other).as_deref()), (Some("v"), Some("default")));
    // A destination rule of the client's namespace names the client's service.
    let policy = "{host: reviews, trafficPolicy: {connectionPool: {tcp: {connectTimeout: 1s}}}}";
    for (namespace, touched, untouched) in [("default", "default", "other"), ("other", "other", "default")] {
        let it = compile(&(services.clone() + &in_namespace(namespace, "DestinationRule", "d", policy)));
        assert_eq!(it.spec(&reviews_in(touched)).pool.connect_timeout, Duration::from_secs(1));
        assert_eq!(it.spec(&reviews_in(untouched)).pool.connect_timeout, Duration::from_secs(10));
    }
}

#[test]
fn x_04_export_to() {
    for (kind, spec) in [
        ("VirtualService", "hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]"),
        ("DestinationRule", "host: reviews"),
        ("ServiceEntry", "hosts: [a.b], ports: [{number: 80, name: http, protocol: HTTP}], resolution: DNS"),
    ] {
        let with = |export_to: &str| resource(kind, "r", &format!("{{{spec}, exportTo: {export_to}}}"));
        for good in ["[]", "['*']", "['.']", "[a]", "[a, b]", "['.', a]"] {
            accepted(&with(good));
        }
        refused(&with("['*', a]"), "spec.exportTo", "must stand alone");
        refused(&with("['*', '.']"), "spec.exportTo", "must stand alone");
        refused(&with("['.', default]"), "spec.exportTo[1]", "duplicate");
        refused(&with("[a, a]"), "spec.exportTo[1]", "duplicate");
        refused(&with("['a b']"), "spec.exportTo[0]", "not allowed");
        if kind == "ServiceEntry" {
            accepted(&with("['~']"));
            refused(&with("['~', a]"), "spec.exportTo", "must stand alone");
        } else {
            refused(&with("['~']"), "spec.exportTo", "only allowed for a ServiceEntry");
        }
    }
    // A Kubernetes service says it in an annotation.
    let annotated = |export_to: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: a, namespace: default, annotations: {{networking.istio.io/exportTo: '{export_to}'}}}}\nspec: {{clusterIP: 10.0.0.1, ports: [{{name: http, port: 80}}]}}\n"
        )
    };
    for (export_to, own, other) in [
        ("*", true, true),
        (".", true, false),
        ("~", false, false),
        ("other", false, true),
        ("., other", true, true),
    ] {
        for (namespace, sees) in [("default", own), ("other", other)] {
            let it = compile_for(&sidecar(namespace, &[]), &annotated(export_to));
            let route = it.route("http://a.default.svc.cluster.local/");
            assert_eq!(route.as_deref() == Some("default"), sees, "{export_to} {namespace}");
        }
    }
}

#[test]
fn x_05_the_scope_of_a_selector() {
    let policy = |namespace: &str, name: &str, selector: &str, mode: &str| {
        let spec = format!("{{{selector}outboundTrafficPolicy: {{mode: {mode}}}}}");
        in_namespace(namespace, "Sidecar", name, &spec)
    };
    let unknown = |namespace: &str, labels: &[(&str, &str)], yaml: &str| {
        let it = compile_for(&sidecar(namespace, labels), yaml);
        it.clusters("http://nobody.example.com/").remove(0) == "BlackHoleCluster"
    };
    let web: &[(&str, &str)] = &[("app", "web")];
    let mesh = policy("istio-system", "mesh", "", "REGISTRY_ONLY");
    assert!(unknown("default", &[], &mesh) && unknown("other", web, &mesh), "the mesh");
    let own = mesh.clone() + &policy("default", "all", "", "ALLOW_ANY");
    assert!(!unknown("default", web, &own) && unknown("other", web, &own), "the namespace");
    let selecting =
        own + &policy("default", "web", "workloadSelector: {labels: {app: web}}, ", "REGISTRY_ONLY");
    assert!(unknown("default", web, &selecting) && !unknown("default", &[], &selecting), "the workload");
    // The selector of a Gateway is for all namespaces (GW-03); those of the networking kinds are refused alike.
    let with = |labels: &str| {
        policy("default", "s", &format!("workloadSelector: {{labels: {labels}}}, "), "ALLOW_ANY")
    };
    for (labels, key) in [("{'': a}", "[\"\"]"), ("{app: '*'}", ".app"), ("{'a*': b}", "[\"a*\"]")] {
        refused(&with(labels), &format!("spec.workloadSelector.labels{key}"), "");
    }
    warned(&with("{}"), "spec.workloadSelector.labels", "no labels");
}

#[test]
fn x_06_hosts() {
    let rule = |name: &str, host: &str| {
        resource(
            "VirtualService",
            name,
            &format!(
                "{{hosts: ['{host}'], gateways: [mesh, edge], http: [{{name: {name}, route: [{{destination: {{host: reviews}}}}]}}]}}"
            ),
        )
    };
    let edge = resource(
        "Gateway",
        "edge",
        "{selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}",
    );
    let any = resource(
        "VirtualService",
        "any",
        "{hosts: ['*'], gateways: [edge], http: [{name: any, route: [{destination: {host: reviews}}]}]}",
    );
    let yaml = service_in("default", "reviews", &[1])
        + &edge
        + &rule("short", "*.foo.com")
        + &rule("long", "*.bar.foo.com")
        + &rule("exact", "a.bar.foo.com")
        + &any;
    for (it, otherwise) in [(compile(&yaml), "allow_any"), (compile_gateway(&yaml), "any")] {
        for (authority, expected) in [
            ("a.bar.foo.com", "exact"),
            ("A.Bar.FOO.com", "exact"),
            ("a.bar.foo.com:80", "exact"),
            ("b.bar.foo.com", "long"),
            ("c.b.bar.foo.com", "long"),
            ("bar.foo.com", "short"),
            ("x.foo.com", "short"),
            ("foo.com", otherwise),
            ("xfoo.com", otherwise),
            ("elsewhere.example.com", otherwise),
        ] {
            let route = it.route(&format!("http://{authority}/"));
            assert_eq!(route.as_deref(), Some(expected), "{authority}");
        }
    }
    let it = compile_gateway(&yaml);
    assert_eq!(it.route("http://a.bar.foo.com:12345/").as_deref(), Some("exact"), "the port says nothing");
}

#[test]
fn x_06_wildcards_of_rules_and_services() {
    let rule = |name: &str, host: &str| {
        resource(
            "VirtualService",
            name,
            &format!(
                "{{hosts: ['{host}'], http: [{{name: {name}, route: [{{destination: {{host: reviews}}}}]}}]}}"
            ),
        )
    };
    let service = |name: &str, host: &str| {
        resource(
            "ServiceEntry",
            name,
            &format!("{{hosts: ['{host}'], ports: [{{number: 80, name: http, protocol: HTTP}}]}}"),
        )
    };
    let it = compile(
        &(service_in("default", "reviews", &[1])
            + &service_in("other", "ratings", &[2])
            + &service("wide", "*.example.com")
            + &service("narrow", "*.narrow.example.com")
            + &service("api", "api.narrow.example.com")
            + &rule("all", "*.cluster.local")
            + &rule("own", "*.default.svc.cluster.local")
            + &rule("far", "*.narrow.example.com")),
    );
    for (authority, expected) in [
        ("reviews.default.svc.cluster.local", "own"),
        ("reviews", "own"),
        ("ratings.other.svc.cluster.local", "all"),
        ("api.narrow.example.com", "far"),
        ("x.narrow.example.com", "far"),
        ("narrow.example.com", "default"),
        ("a.b.example.com", "default"),
        ("example.com", "allow_any"),
    ] {
        assert_eq!(it.route(&format!("http://{authority}/")).as_deref(), Some(expected), "{authority}");
    }
    assert_eq!(it.clusters("http://a.b.example.com/"), ["outbound|80||*.example.com"]);
}

#[test]
fn x_07_the_oldest_wins_and_without_age_the_first() {
    let rule = |name: &str, created: Option<&str>| {
        aged(
            "default",
            "VirtualService",
            name,
            created,
            &format!(
                "{{hosts: [reviews], http: [{{name: {name}, route: [{{destination: {{host: reviews}}}}]}}]}}"
            ),
        )
    };
    let (old, young) = (Some("2026-01-01T00:00:00Z"), Some("2026-02-01T00:00:00Z"));
    for (rules, winner) in [
        (rule("a", young) + &rule("b", old), "b"),
        (rule("a", old) + &rule("b", young), "a"),
        (rule("b", None) + &rule("a", None), "b"),
        (rule("b", old) + &rule("a", old), "b"),
    ] {
        let it = compile(&(service_in("default", "reviews", &[1]) + &rules));
        assert_eq!(it.route("http://reviews/").as_deref(), Some(winner), "{rules}");
    }
    let policy = |name: &str, created: Option<&str>, seconds: u32| {
        let spec = format!(
            "{{host: reviews, trafficPolicy: {{connectionPool: {{tcp: {{connectTimeout: {seconds}s}}}}}}}}"
        );
        aged("default", "DestinationRule", name, created, &spec)
    };
    for (rules, winner) in
        [(policy("a", young, 1) + &policy("b", old, 2), 2), (policy("b", None, 1) + &policy("a", None, 2), 1)]
    {
        let it = compile(&(service_in("default", "reviews", &[1]) + &rules));
        let timeout = it.spec(&reviews_in("default")).pool.connect_timeout;
        assert_eq!(timeout, Duration::from_secs(winner), "{rules}");
    }
}

#[test]
fn explain_shows_the_policies_of_the_rule_and_of_its_destinations() {
    let rules = rules(
        "  - match: [{uri: {prefix: /slow}}]
    timeout: 2s
    retries: {attempts: 3, perTryTimeout: 500ms, retryOn: 5xx}
    fault: {delay: {fixedDelay: 1s, percentage: {value: 50}}, abort: {httpStatus: 418, percentage: {value: 1}}}
    mirror: {host: shadow}
    mirrorPercentage: {value: 10}
    route: [{destination: {host: reviews, subset: v1}, weight: 90}, {destination: {host: reviews, subset: v2}, weight: 10}]
  - retries: {attempts: 0}
    route: [{destination: {host: shadow}}]
",
    );
    let policy = "{host: reviews, trafficPolicy: {connectionPool: {tcp: {maxConnections: 7}, http: {http1MaxPendingRequests: 3}}, outlierDetection: {consecutive5xxErrors: 4, interval: 3s, baseEjectionTime: 9s, maxEjectionPercent: 60}, tls: {mode: SIMPLE, sni: reviews.example}}, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}, trafficPolicy: {tls: {mode: DISABLE}}}]}";
    let it = compile(
        &(service_in("default", "reviews", &[1, 2])
            + &service_in("default", "shadow", &[3])
            + &resource("DestinationRule", "reviews", policy)
            + &rules),
    );
    let shown = it.ask("http://reviews/slow").to_json();
    assert_eq!(
        shown["route"]["policies"],
        json!({
            "timeout_ms": 2000,
            "idle_timeout_ms": null,
            "retry": {"attempts": 3, "on": "5xx", "per_try_timeout_ms": 500},
            "client_overrides": false,
            "fault": {"delay_ms": 1000, "delay_percentage": "50 %", "abort": "418", "abort_percentage": "1 %", "per_try": false},
            "mirrors": [{
                "cluster": "outbound|80||shadow.default.svc.cluster.local",
                "known": true,
                "percentage": "10 %",
                "sample_by": null,
                "compared": null,
                "authority": null,
            }],
        })
    );
    let of = |nth: usize| shown["decision"]["forward"][nth]["policies"].clone();
    assert_eq!(
        of(0),
        json!({
            "outlier_detection": {
                "consecutive_5xx": 4,
                "consecutive_gateway": null,
                "consecutive_local_origin": null,
                "interval_ms": 3000,
                "base_ejection_time_ms": 9000,
                "max_ejection_percent": 60,
                "min_health_percent": 0,
            },
            "circuit_breaker": {
                "connections": 7,
                "pending_requests": 3,
                "requests": null,
                "retries": null,
                "requests_per_connection": null,
                "connect_timeout_ms": 10000,
            },
            "retry_budget": null,
            "tls": {
                "mode": "SIMPLE",
                "sni": "reviews.example",
                "subject_alt_names": [],
                "insecure_skip_verify": false,
            },
        })
    );
    assert_eq!(of(1)["tls"], json!({"mode": "DISABLE"}), "a subset has its own");
    let shown = it.ask("http://reviews/").to_json();
    let none = json!({"timeout_ms": null, "idle_timeout_ms": null, "retry": null, "client_overrides": false, "fault": null, "mirrors": []});
    assert_eq!(shown["route"]["policies"], none, "what is off is said to be off");
    assert_eq!(shown["decision"]["forward"][0]["policies"]["outlier_detection"], json!(null));
}
