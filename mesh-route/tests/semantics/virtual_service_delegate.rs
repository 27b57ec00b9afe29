//! Virtual services that continue others: VS-G01.

use crate::support::*;

fn root(http: &str) -> String {
    resource("VirtualService", "root", &format!("  hosts: [reviews]\n  http:\n{http}"))
}

fn inner(http: &str) -> String {
    resource("VirtualService", "inner", &format!("  http:\n{http}"))
}

fn pair(root_http: &str, inner_http: &str) -> Compiled {
    compile(&(reviews(&[1, 2]) + &root(root_http) + &inner(inner_http)))
}

const UNDER_A: &str = "  - {name: root, match: [{uri: {prefix: /a}}], delegate: {name: inner}}\n";

#[test]
fn vs_g01_a_delegate_takes_a_part_of_what_the_root_takes() {
    let it = pair(
        UNDER_A,
        "  - {name: deep, match: [{uri: {prefix: /a/b}}], route: [{destination: {host: reviews, subset: v1}}]}\n  \
         - {name: out, match: [{uri: {prefix: /c}}], route: [{destination: {host: reviews, subset: v2}}]}\n  \
         - {name: rest, route: [{destination: {host: reviews}}]}\n",
    );
    let name = |path: &str| it.route(&format!("http://reviews{path}"));
    assert_eq!(name("/a/b/c").as_deref(), Some("root-deep"));
    assert_eq!(name("/a").as_deref(), Some("root-rest"));
    assert_eq!(name("/c"), None, "no part of the root's: dropped");
    it.warns("spec.http[1].match", "takes nothing");
    // One match outside takes the others of its rule with it.
    let it = pair(
        UNDER_A,
        "  - {name: some, match: [{uri: {prefix: /a/b}}, {uri: {prefix: /c}}], route: [{destination: {host: reviews}}]}\n  \
         - {name: rest, route: [{destination: {host: reviews}}]}\n",
    );
    assert_eq!(it.route("http://reviews/a/b").as_deref(), Some("root-rest"));
    it.warns("spec.http[0].match", "takes nothing");
}

#[test]
fn vs_g01_what_lies_within_a_match_of_the_root() {
    for (outer, inner, within) in [
        ("uri: {prefix: /a}", "uri: {exact: /a/b}", true),
        ("uri: {prefix: /a}", "uri: {exact: /b}", false),
        ("uri: {exact: /a}", "uri: {exact: /a}", true),
        ("uri: {exact: /a}", "uri: {prefix: /a}", false),
        ("uri: {prefix: /a}", "uri: {regex: '/a.*'}", false),
        ("uri: {regex: '/a.*'}", "uri: {exact: /a}", false),
        ("method: {exact: GET}", "uri: {prefix: /a}", true),
        ("method: {exact: GET}", "method: {exact: PUT}", false),
        ("headers: {x: {}}", "uri: {prefix: /a}", true),
        ("headers: {x: {}}", "headers: {x: {exact: a}}", false),
        ("headers: {x: {prefix: a}}", "headers: {x: {exact: ab}}", true),
        ("withoutHeaders: {x: {prefix: a}}", "withoutHeaders: {x: {exact: b}}", false),
        ("queryParams: {q: {exact: a}}", "queryParams: {q: {exact: b}}", false),
        ("uri: {prefix: /a}, ignoreUriCase: true", "uri: {prefix: /a/b}, ignoreUriCase: true", true),
        ("uri: {prefix: /a}, ignoreUriCase: true", "uri: {prefix: /a/b}", false),
        ("uri: {prefix: /a}", "uri: {prefix: /a/b}, ignoreUriCase: true", false),
        ("port: 80", "uri: {prefix: /a}", true),
        ("port: 80", "port: 81", false),
        ("sourceNamespace: default", "sourceNamespace: default", true),
        ("sourceNamespace: default", "uri: {prefix: /a}", false),
        ("sourceLabels: {app: a}", "sourceLabels: {zone: b}", true),
        ("sourceLabels: {app: a}", "sourceLabels: {app: b}", false),
        ("gateways: [mesh]", "gateways: [mesh]", true),
        ("gateways: [mesh]", "gateways: [edge]", false),
    ] {
        let it = pair(
            &format!("  - {{match: [{{{outer}}}], delegate: {{name: inner}}}}\n"),
            &format!("  - {{match: [{{{inner}}}], route: [{{destination: {{host: reviews}}}}]}}\n"),
        );
        let dropped =
            it.diags.iter().any(|d| d.message.contains("takes nothing that spec.http[0] of root takes"));
        assert_eq!(!dropped, within, "{inner} within {outer}");
    }
}

#[test]
fn vs_g01_names_in_a_delegate_are_those_of_its_namespace() {
    let inner = in_namespace(
        "other",
        "VirtualService",
        "inner",
        "{http: [{route: [{destination: {host: reviews}}], mirror: {host: reviews}}]}",
    );
    let root = root("  - {delegate: {name: inner, namespace: other}}\n");
    let it = compile(&(reviews(&[1]) + &service_in("other", "reviews", &[2]) + &root + &inner));
    assert_eq!(it.clusters("http://reviews/"), ["outbound|80||reviews.other.svc.cluster.local"]);
}

#[test]
fn vs_g01_a_delegate_is_exported_to_the_root() {
    let takes = |settings: &str, export_to: &str| {
        let inner = in_namespace(
            "other",
            "VirtualService",
            "inner",
            &format!("{{{export_to}http: [{{name: inner, route: [{{destination: {{host: reviews}}}}]}}]}}"),
        );
        let root = root("  - {delegate: {name: inner, namespace: other}}\n");
        let services = reviews(&[1]) + &service_in("other", "reviews", &[2]);
        let it = compile(&(mesh(settings) + &services + &root + &inner));
        it.route("http://reviews/").as_deref() == Some("inner")
    };
    let private = "defaultVirtualServiceExportTo: ['.']";
    assert!(takes("enableTracing: true", ""));
    assert!(!takes("enableTracing: true", "exportTo: ['.'], "));
    assert!(takes("enableTracing: true", "exportTo: [default], "));
    assert!(!takes(private, ""), "without a list it is that of the mesh");
    assert!(takes(private, "exportTo: ['*'], "));
}

#[test]
fn vs_g01_the_namespace_of_a_delegate() {
    let other = in_namespace(
        "other",
        "VirtualService",
        "inner",
        "{http: [{name: other, route: [{destination: {host: reviews.default.svc.cluster.local}}]}]}",
    );
    let ask = |delegate: &str| {
        let root = root(&format!("  - {{delegate: {delegate}}}\n"));
        compile(&(reviews(&[1]) + &root + &other)).route("http://reviews/")
    };
    assert_eq!(ask("{name: inner, namespace: other}").as_deref(), Some("other"));
    assert_eq!(ask("{name: inner}").as_deref(), Some("default"), "without one it is that of the root");
}

#[test]
fn vs_g01_what_root_and_delegate_may_hold() {
    let good = "  - {route: [{destination: {host: reviews}}]}\n";
    for (field, value) in [("route", "[{destination: {host: reviews}}]"), ("redirect", "{uri: /x}")] {
        let both = root(&format!("  - {{delegate: {{name: inner}}, {field}: {value}}}\n"));
        refused(&both, &format!("spec.http[0].{field}"), "beside delegate");
    }
    refused(&inner("  - {delegate: {name: deeper}}\n"), "spec.http[0].delegate", "must not delegate further");
    for (field, value) in [
        ("gateways", "[edge]"),
        ("tls", "[{match: [{sniHosts: [a]}], route: [{destination: {host: reviews}}]}]"),
        ("tcp", "[{route: [{destination: {host: reviews}}]}]"),
    ] {
        let yaml = resource("VirtualService", "inner", &format!("  {field}: {value}\n  http:\n{good}"));
        refused(&yaml, &format!("spec.{field}"), "a delegate");
    }
    accepted(&(root(UNDER_A) + &inner(good)));
}

#[tokio::test]
async fn vs_g01_the_value_of_the_delegate_wins_else_that_of_the_root() {
    let (echo, services) = one_version().await;
    let it = compile(
        &(services
            + &root(
                "  - {match: [{uri: {prefix: /a}}], delegate: {name: inner}, rewrite: {uri: /root}, timeout: 3600s, headers: {request: {set: {x-by: root}}}}\n  \
                 - {match: [{uri: {prefix: /d}}], delegate: {name: inner}, directResponse: {status: 418}}\n",
            )
            + &inner(
                "  - {match: [{uri: {prefix: /a/own}}], rewrite: {uri: /own}, timeout: 1s, headers: {request: {set: {x-by: delegate}}}, route: [{destination: {host: reviews}}]}\n  \
                 - {route: [{destination: {host: reviews}}]}\n",
            )),
    );
    let client = it.client();
    let own = send(&client, get("http://reviews/a/own/x")).await;
    assert_eq!(
        (own.saw()["url"].as_str(), own.saw_header("x-by").as_deref()),
        (Some("/own/x"), Some("delegate"))
    );
    let inherited = send(&client, get("http://reviews/a/x")).await;
    assert_eq!(
        (inherited.saw()["url"].as_str(), inherited.saw_header("x-by").as_deref()),
        (Some("/root/x"), Some("root"))
    );
    let timeout = |url: &str| match &it.ask(url).route.unwrap().action().kind {
        mesh_route::ActionKind::Forward(forward) => forward.timeout.unwrap().as_secs(),
        other => panic!("{other:?}"),
    };
    assert_eq!((timeout("http://reviews/a/own"), timeout("http://reviews/a")), (1, 3600));
    assert_eq!(
        send(&client, get("http://reviews/d")).await.status,
        418,
        "a direct response is inherited too"
    );
    assert_eq!(echo.requests(), 2);
}

#[test]
fn vs_g01_conditions_are_taken_together() {
    let it = pair(
        "  - {match: [{headers: {x: {exact: a}}, queryParams: {p: {exact: '1'}}, method: {exact: GET}}], delegate: {name: inner}}\n",
        "  - {name: both, match: [{headers: {y: {exact: b}}, queryParams: {q: {exact: '2'}}}], route: [{destination: {host: reviews}}]}\n",
    );
    let ask = |target: &str, headers: &[(&str, &str)]| {
        let mut request = http::Request::get(format!("http://reviews{target}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        it.route_of(&request.body(mesh_core::Body::empty()).unwrap()).is_some()
    };
    let all = [("x", "a"), ("y", "b")];
    assert!(ask("/?p=1&q=2", &all));
    assert!(!ask("/?p=1&q=2", &all[..1]) && !ask("/?p=1&q=2", &all[1..]));
    assert!(!ask("/?p=1", &all) && !ask("/?q=2", &all));
    // Labels of the source too, where a contradiction takes nobody.
    let labels = |root: &str, inner: &str| {
        let yaml = reviews(&[1])
            + &self::root(&format!(
                "  - {{match: [{{sourceLabels: {{{root}}}}}], delegate: {{name: inner}}}}\n"
            ))
            + &self::inner(&format!(
                "  - {{match: [{{sourceLabels: {{{inner}}}}}], route: [{{destination: {{host: reviews}}}}]}}\n"
            ));
        let it = compile_for(&sidecar("default", &[("app", "web"), ("zone", "a")]), &yaml);
        it.route("http://reviews/").as_deref() != Some("default")
    };
    assert!(labels("app: web", "zone: a"));
    assert!(!labels("app: web", "zone: b") && !labels("app: x", "zone: a") && !labels("app: x", "app: web"));
}

#[test]
fn vs_g01_two_regular_expressions_conflict() {
    let route = "name: inner, route: [{destination: {host: reviews}}]";
    for property in
        ["uri: {regex: '/a.*'}", "headers: {x: {regex: 'a.*'}}", "queryParams: {q: {regex: 'a.*'}}"]
    {
        let it = pair(
            &format!("  - {{match: [{{{property}}}], delegate: {{name: inner}}}}\n"),
            &format!("  - {{match: [{{{property}}}], {route}}}\n"),
        );
        it.warns("spec.http[0].match", "takes nothing");
        let mut request = get("http://reviews/abc?q=abc");
        request.headers_mut().insert("x", "abc".parse().unwrap());
        assert_eq!(it.route_of(&request).as_deref(), Some("default"), "{property}");
        let free = pair(
            &format!("  - {{match: [{{{property}}}], delegate: {{name: inner}}}}\n"),
            &format!("  - {{{route}}}\n"),
        );
        assert_eq!(free.route_of(&request).as_deref(), Some("inner"), "one alone is none: {property}");
    }
}
