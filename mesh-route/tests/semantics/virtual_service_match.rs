//! `http[].match[]`: VS-M01 … VS-M15.

use http::Request;
use mesh_core::Body;
use mesh_core::config::{CompileContext, Role};

use crate::support::*;

/// `yes` takes what the match takes, `no` the rest.
fn matching(matched: &str) -> Compiled {
    compile(&with_match(matched))
}

fn with_match(matched: &str) -> String {
    reviews(&[1, 2])
        + &rules(&format!(
            "  - {{name: yes, match: [{matched}], route: [{{destination: {{host: reviews, subset: v1}}}}]}}\n  \
             - {{name: no, route: [{{destination: {{host: reviews}}}}]}}\n"
        ))
}

impl Compiled {
    fn takes(&self, target: &str) -> bool {
        self.takes_request(&get(&format!("http://reviews{target}")))
    }

    fn takes_request(&self, request: &Request<Body>) -> bool {
        self.route_of(request).as_deref() == Some("yes")
    }

    /// With headers, in order.
    fn takes_headers(&self, headers: &[(&str, &str)]) -> bool {
        let mut request = Request::get("http://reviews/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.takes_request(&request.body(Body::empty()).unwrap())
    }
}

#[test]
fn vs_m01_uri_exact_is_the_whole_path() {
    let it = matching("{uri: {exact: /a/b}}");
    assert!(it.takes("/a/b") && it.takes("/a/b?q=1"), "the query is no part of it");
    assert!(it.takes("/a/b#part"), "nor is the fragment");
    for other in ["/a", "/a/b/", "/a/b/c", "/A/b", "/"] {
        assert!(!it.takes(other), "{other}");
    }
}

#[test]
fn vs_m02_uri_prefix_is_a_raw_prefix() {
    let it = matching("{uri: {prefix: /foo}}");
    assert!(it.takes("/foo") && it.takes("/foobar") && it.takes("/foo/bar"));
    assert!(!it.takes("/fo") && !it.takes("/Foo") && !it.takes("/a/foo"));
    // The empty prefix is accepted here, and takes every path.
    accepted(&with_match("{uri: {prefix: ''}}"));
    assert!(matching("{uri: {prefix: ''}}").takes("/anything"));
}

#[test]
fn vs_m03_regex_is_full_match() {
    let it = matching(r"{uri: {regex: '/\d+$'}}");
    assert!(it.takes("/123") && it.takes("/123?q") && !it.takes("/a123") && !it.takes("/123a"));
    assert!(!matching(r"{uri: {regex: '\d+$'}}").takes("/a123"), "a match at the end is none of the whole");
    assert!(matching("{uri: {regex: '(?i)/abc'}}").takes("/aBC"));
    assert!(matching("{uri: {regex: '/a|/b'}}").takes("/b"), "anchors hold for every alternative");
    assert!(!matching("{uri: {regex: '/a|/b'}}").takes("/bc"));
    accepted(&with_match(&format!("{{uri: {{regex: '{}'}}}}", "a".repeat(1024))));
    let long = with_match(&format!("{{uri: {{regex: '{}'}}}}", "a".repeat(1025)));
    refused(&long, "spec.http[0].match[0].uri.regex", "1024");
    // RE2 has no look-around.
    refused(&with_match("{uri: {regex: '/(?=a).*'}}"), "spec.http[0].match[0].uri.regex", "");
}

#[test]
fn vs_m04_ignore_uri_case_is_for_exact_and_prefix() {
    let exact = matching("{uri: {exact: /Foo}, ignoreUriCase: true}");
    assert!(exact.takes("/foo") && exact.takes("/FOO") && !exact.takes("/foos"));
    let prefix = matching("{uri: {prefix: /Foo}, ignoreUriCase: true}");
    assert!(prefix.takes("/fOOs") && !prefix.takes("/fo"));
    let regex = matching("{uri: {regex: /Foo.*}, ignoreUriCase: true}");
    assert!(regex.takes("/Foos") && !regex.takes("/foos"), "never for a regular expression");
}

#[test]
fn vs_m05_scheme_method_and_authority() {
    let ask = |matched: &str, method: &str, url: &str| {
        let request = Request::builder().method(method).uri(url).body(Body::empty()).unwrap();
        matching(matched).takes_request(&request)
    };
    for (matched, method, url, takes) in [
        ("{method: {exact: GET}}", "GET", "http://reviews/", true),
        ("{method: {exact: GET}}", "POST", "http://reviews/", false),
        ("{method: {exact: get}}", "GET", "http://reviews/", false),
        ("{method: {prefix: P}}", "PUT", "http://reviews/", true),
        ("{method: {prefix: P}}", "GET", "http://reviews/", false),
        ("{method: {regex: 'GET|PUT'}}", "PUT", "http://reviews/", true),
        ("{method: {regex: 'GE'}}", "GET", "http://reviews/", false),
        ("{scheme: {exact: http}}", "GET", "http://reviews/", true),
        ("{scheme: {exact: https}}", "GET", "http://reviews/", false),
        ("{scheme: {exact: HTTP}}", "GET", "http://reviews/", false),
        ("{scheme: {prefix: htt}}", "GET", "http://reviews/", true),
        ("{scheme: {regex: 'https?'}}", "GET", "http://reviews/", true),
        ("{authority: {exact: reviews}}", "GET", "http://reviews/", true),
        ("{authority: {exact: reviews}}", "GET", "http://reviews.default/", false),
        ("{authority: {exact: Reviews}}", "GET", "http://reviews/", false),
        ("{authority: {prefix: reviews.}}", "GET", "http://reviews.default/", true),
        ("{authority: {regex: 'reviews(:80)?'}}", "GET", "http://reviews:80/", true),
        ("{authority: {regex: 'rev'}}", "GET", "http://reviews/", false),
    ] {
        assert_eq!(ask(matched, method, url), takes, "{matched} {method} {url}");
    }
    for field in ["scheme", "method", "authority"] {
        let empty = with_match(&format!("{{{field}: {{prefix: ''}}}}"));
        refused(&empty, &format!("spec.http[0].match[0].{field}.prefix"), "empty");
    }
}

#[test]
fn vs_m06_headers() {
    let exact = matching("{headers: {end-user: {exact: jason}}}");
    assert!(exact.takes_headers(&[("End-User", "jason")]), "the names of headers have no case");
    assert!(!exact.takes_headers(&[("end-user", "Jason")]) && !exact.takes_headers(&[]));
    let prefix = matching("{headers: {x: {prefix: ab}}}");
    assert!(prefix.takes_headers(&[("x", "abc")]) && !prefix.takes_headers(&[("x", "cab")]));
    let regex = matching("{headers: {x: {regex: 'a.c'}}}");
    assert!(regex.takes_headers(&[("x", "abc")]) && !regex.takes_headers(&[("x", "abcd")]));
    for presence in ["{}", "{regex: '*'}"] {
        let present = matching(&format!("{{headers: {{x: {presence}}}}}"));
        assert!(present.takes_headers(&[("x", "any")]) && present.takes_headers(&[("x", "")]), "{presence}");
        assert!(!present.takes_headers(&[("y", "any")]), "{presence}");
    }
    // Repeated values are one value.
    let joined = matching("{headers: {x: {exact: 'a,b'}}}");
    assert!(joined.takes_headers(&[("x", "a"), ("x", "b")]) && !joined.takes_headers(&[("x", "a")]));
    assert!(!matching("{headers: {x: {exact: a}}}").takes_headers(&[("x", "a"), ("x", "b")]));
    // All of one match have to hold, any of the matches is enough.
    let both = matching("{headers: {x: {exact: a}, y: {exact: b}}}");
    assert!(both.takes_headers(&[("x", "a"), ("y", "b")]) && !both.takes_headers(&[("x", "a")]));
    let either = matching("{headers: {x: {exact: a}}}, {headers: {y: {exact: b}}}");
    assert!(either.takes_headers(&[("x", "a")]) && either.takes_headers(&[("y", "b")]));
    // These keys are ignored: there are fields of that name.
    for ignored in ["uri", "scheme", "method", "authority"] {
        let it = matching(&format!("{{headers: {{{ignored}: {{exact: nonsense}}, x: {{exact: a}}}}}}"));
        assert!(it.takes_headers(&[("x", "a")]) && !it.takes_headers(&[("x", "b")]), "{ignored}");
    }
}

#[test]
fn vs_m07_claims_are_validated_and_take_nobody() {
    let gateway = |matched: &str| {
        format!(
            "{}{}{}",
            reviews(&[1, 2]),
            resource(
                "Gateway",
                "edge",
                "{selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}"
            ),
            resource(
                "VirtualService",
                "edge",
                &format!(
                    "  hosts: [edge.example.com]\n  gateways: [edge]\n  http:\n  - {{name: yes, match: [{matched}], route: \
                     [{{destination: {{host: reviews}}}}]}}\n  - {{name: no, route: [{{destination: {{host: reviews}}}}]}}\n"
                )
            )
        )
    };
    for claim in ["'@request.auth.claims.group'", "'@request.auth.claims[group][sub]'"] {
        let it = compile_gateway(&gateway(&format!(
            "{{uri: {{prefix: /}}, headers: {{{claim}: {{exact: admin}}}}}}"
        )));
        assert_eq!(it.unenforced(), ["spec.http[0].match[0].headers"], "{claim}");
        // Whatever headers a client makes up.
        let mut request = get("http://edge.example.com/");
        for name in ["x-mesh-unverified-claim", "group", "x-request-auth-claims-group"] {
            request.headers_mut().insert(name, "admin".parse().unwrap());
        }
        assert_eq!(it.route_of(&request).as_deref(), Some("no"), "{claim}");
    }
    let without = "{uri: {prefix: /}, withoutHeaders: {'@request.auth.claims.group': {exact: admin}}}";
    let it = compile_gateway(&gateway(without));
    assert_eq!(it.unenforced(), ["spec.http[0].match[0].withoutHeaders"]);
    let mut request = get("http://edge.example.com/");
    request.headers_mut().insert("x-mesh-unverified-claim", "admin".parse().unwrap());
    assert_eq!(
        it.route_of(&request),
        it.route("http://edge.example.com/"),
        "no header can stand for a claim"
    );
    // Only gateways verify tokens before they route.
    for field in ["headers", "withoutHeaders"] {
        let claim = with_match(&format!("{{{field}: {{'@request.auth.claims.group': {{exact: admin}}}}}}"));
        refused(
            &claim,
            &format!("spec.http[0].match[0].{field}[\"@request.auth.claims.group\"]"),
            "only possible on gateways",
        );
    }
}

#[test]
fn vs_m08_without_headers() {
    let absent: &[(&str, &str)] = &[];
    for (matcher, headers, takes) in [
        ("{exact: a}", absent, true),
        ("{exact: a}", &[("x", "b")], true),
        ("{exact: a}", &[("x", "a")], false),
        ("{prefix: a}", absent, true),
        ("{prefix: a}", &[("x", "ab")], false),
        // An absent header is the empty string, which these accept.
        ("{regex: '.*'}", absent, false),
        ("{regex: '.*'}", &[("x", "a")], false),
        ("{regex: 'a+'}", absent, true),
        ("{regex: 'a+'}", &[("x", "aa")], false),
        ("{}", absent, true),
        ("{}", &[("x", "")], false),
        ("{regex: '*'}", absent, true),
        ("{regex: '*'}", &[("x", "a")], false),
    ] {
        let it = matching(&format!("{{withoutHeaders: {{x: {matcher}}}}}"));
        assert_eq!(it.takes_headers(headers), takes, "{matcher} {headers:?}");
    }
}

#[test]
fn vs_m09_query_params() {
    for (matcher, target, takes) in [
        ("{exact: a}", "/?k=a", true),
        ("{exact: a}", "/?x=1&k=a", true),
        ("{exact: a}", "/?k=A", false),
        ("{exact: a}", "/?k=ab", false),
        ("{exact: a}", "/", false),
        ("{prefix: a}", "/?k=ab", true),
        ("{prefix: a}", "/?k=ba", false),
        (r"{regex: '\d+'}", "/?k=12", true),
        (r"{regex: '\d+'}", "/?k=12a", false),
        ("{}", "/?k", true),
        ("{}", "/?k=any", true),
        ("{}", "/?kk=any", false),
        ("{regex: '*'}", "/?k=any", true),
        ("{regex: '*'}", "/?j=any", false),
        ("{exact: ''}", "/?k", true),
        ("{exact: ''}", "/?k=", true),
        ("{exact: ''}", "/?k=a", false),
        // The first of several.
        ("{exact: a}", "/?k=a&k=b", true),
        ("{exact: b}", "/?k=a&k=b", false),
    ] {
        let it = matching(&format!("{{queryParams: {{k: {matcher}}}}}"));
        assert_eq!(it.takes(target), takes, "{matcher} {target}");
    }
}

/// `two` has the ports 8081 and 8082.
const TWO: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: two, namespace: default}\nspec: {clusterIP: \
    10.0.0.2, ports: [{name: http-a, port: 8081}, {name: http-b, port: 8082}]}\n";

fn selected(cx: &CompileContext, matched: &str, url: &str) -> Option<String> {
    let rules = format!(
        "  hosts: [two]\n  http:\n  - {{name: yes, match: [{matched}], route: [{{destination: {{host: reviews}}}}]}}\n"
    );
    compile_for(cx, &(reviews(&[1, 2]) + TWO + &resource("VirtualService", "two", &rules))).route(url)
}

#[test]
fn vs_m10_port_binds_a_rule_to_a_listener() {
    let cx = CompileContext::new(Role::Sidecar);
    assert_eq!(selected(&cx, "{port: 8081}", "http://two:8081/").as_deref(), Some("yes"));
    assert_eq!(
        selected(&cx, "{port: 8081}", "http://two:8082/").as_deref(),
        Some("default"),
        "where there is no rule it is as if there were no virtual service"
    );
    assert_eq!(selected(&cx, "{uri: {prefix: /}}", "http://two:8082/").as_deref(), Some("yes"));
}

#[test]
fn vs_m11_source_labels_are_a_part_of_ours() {
    let cx = sidecar("default", &[("app", "web"), ("version", "v1")]);
    let ask = |labels: &str| {
        selected(&cx, &format!("{{sourceLabels: {labels}}}"), "http://two:8081/").as_deref() == Some("yes")
    };
    assert!(ask("{app: web}") && ask("{app: web, version: v1}"));
    assert!(!ask("{app: other}") && !ask("{app: web, version: v2}") && !ask("{app: web, zone: a}"));
}

#[test]
fn vs_m12_source_namespace_is_ours() {
    let web = sidecar("default", &[]);
    let ask = |cx, namespace: &str| {
        let matched = format!("{{sourceNamespace: {namespace}}}");
        selected(cx, &matched, "http://two.default:8081/").as_deref() == Some("yes")
    };
    assert!(ask(&web, "default") && !ask(&web, "other"));
    let other = sidecar("other", &[]);
    assert!(ask(&other, "other") && !ask(&other, "default"));
}

#[test]
fn vs_m13_gateways_of_a_match_override_and_the_source_is_not_looked_at() {
    let cx = sidecar("default", &[("app", "web")]);
    let rules = "  hosts: [two]\n  gateways: [mesh, edge]\n  http:\n  \
        - {name: mesh, match: [{uri: {prefix: /m}, gateways: [mesh], sourceLabels: {app: x}, sourceNamespace: y}], route: [{destination: {host: reviews}}]}\n  \
        - {name: edge, match: [{uri: {prefix: /e}, gateways: [edge]}], route: [{destination: {host: reviews}}]}\n  \
        - {name: far, match: [{uri: {prefix: /f}, gateways: [far]}], route: [{destination: {host: reviews}}]}\n";
    let edge = resource(
        "Gateway",
        "edge",
        "{servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}",
    );
    let yaml = reviews(&[1, 2]) + TWO + &edge + &resource("VirtualService", "two", rules);
    let mesh = compile_for(&cx, &yaml);
    assert_eq!(mesh.route("http://two:8081/m").as_deref(), Some("mesh"));
    assert_eq!(mesh.route("http://two:8081/e"), None, "the list of the match takes the mesh out");
    assert_eq!(mesh.route("http://two:8081/f"), None);
    // The list of a match attaches the virtual service nowhere.
    mesh.warns("spec.http[2].match[0].gateways", "takes nothing");
    let alone = rules.replace("[mesh, edge]", "[edge]");
    let it = compile_for(&cx, &(reviews(&[1, 2]) + TWO + &edge + &resource("VirtualService", "two", &alone)));
    assert_eq!(it.route("http://two:8081/m").as_deref(), Some("default"));
    it.warns("spec.http[0].match[0].gateways", "takes nothing");
    let gateway = compile_gateway(&yaml);
    let at = |path: &str| gateway.route(&format!("http://two.default.svc.cluster.local{path}"));
    assert_eq!(at("/e").as_deref(), Some("edge"));
    assert_eq!(at("/m"), None, "the list of the match takes the gateway out");
}

#[test]
fn vs_m14_names_of_rule_and_match_name_the_route() {
    let it = compile(
        &(reviews(&[1, 2])
            + &rules(
                "  - {name: rule, match: [{name: a, uri: {exact: /a}, statPrefix: a}, {uri: {exact: /b}}], route: [{destination: {host: reviews}}]}\n  \
                 - {match: [{name: c, uri: {exact: /c}}], route: [{destination: {host: reviews}}]}\n  \
                 - {route: [{destination: {host: reviews}}]}\n",
            )),
    );
    let name = |path: &str| it.route(&format!("http://reviews{path}")).unwrap();
    assert_eq!(name("/a"), "rule.a");
    assert_eq!(name("/b"), "rule");
    assert_eq!(name("/c"), "c");
    assert_eq!(name("/d"), "reviews.default.http[2]", "a line of a log leads to the rule");
    // Statistics by route are not kept, and that is said.
    assert_eq!(it.unenforced(), ["spec.http[0].match[0].statPrefix"]);
}

#[test]
fn vs_m15_an_empty_match_takes_all_with_a_warning() {
    warned(&with_match("{}"), "spec.http[0].match[0]", "empty match");
    let it = matching("{}");
    assert!(it.takes("/") && it.takes("/any?q"));
}
