//! What a Sidecar lets in and what becomes of the rest: SC-01, SC-02.

use mesh_testkit::upstream::Echo;

use crate::support::*;

fn services() -> String {
    service_in("default", "reviews", &[1])
        + &service_in("other", "ratings", &[2])
        + &service_in("third", "details", &[3])
}

fn egress(listeners: &str) -> String {
    resource("Sidecar", "s", &format!("{{egress: {listeners}}}"))
}

/// Which of reviews, ratings and details are known.
fn known(yaml: &str) -> String {
    let it = compile(&(services() + yaml));
    ["reviews.default", "ratings.other", "details.third"]
        .into_iter()
        .filter(|name| it.route(&format!("http://{name}.svc.cluster.local/")).as_deref() == Some("default"))
        .map(|name| name.split_once('.').unwrap().0)
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn sc_01_egress_hosts_say_what_is_known() {
    assert_eq!(known(""), "reviews ratings details");
    for (hosts, expected) in [
        ("['*/*']", "reviews ratings details"),
        ("['./*']", "reviews"),
        ("['other/*']", "ratings"),
        ("['./*', other/ratings.other.svc.cluster.local]", "reviews ratings"),
        ("['other/reviews.other.svc.cluster.local']", ""),
        ("['*/*.third.svc.cluster.local']", "details"),
        ("['~/*']", ""),
        ("['*/*', '~other/*']", "reviews details"),
    ] {
        assert_eq!(known(&egress(&format!("[{{hosts: {hosts}}}]"))), expected, "{hosts}");
    }
    // What is not let in has no cluster either: that is what it saves.
    let it = compile(&(services() + &egress("[{hosts: ['./*']}]")));
    let names: Vec<_> = it.table.clusters().iter().map(|cluster| cluster.name().to_string()).collect();
    assert_eq!(names, ["outbound|80||reviews.default.svc.cluster.local", "PassthroughCluster"]);
}

#[test]
fn sc_01_a_rule_for_more_than_what_is_let_in_counts_for_that() {
    let rule = resource(
        "VirtualService",
        "v",
        "{hosts: ['*.default.svc.cluster.local'], http: [{name: v, route: [{destination: {host: reviews}}]}]}",
    );
    let route = |hosts: &str| {
        compile(&(services() + &rule + &egress(&format!("[{{hosts: [{hosts}]}}]")))).route("http://reviews/")
    };
    assert_eq!(route("./*").as_deref(), Some("v"));
    assert_eq!(route("./reviews.default.svc.cluster.local").as_deref(), Some("v"));
    assert_eq!(route("other/*").as_deref(), Some("allow_any"));
}

#[test]
fn sc_01_what_is_refused_and_warned_of() {
    let port = "port: {number: 9080, protocol: HTTP, name: egress}";
    refused(
        &egress(&format!("[{{hosts: ['./*']}}, {{{port}, hosts: ['./*']}}]")),
        "spec.egress[0].port",
        "must be the last",
    );
    refused(&egress("[{hosts: ['./*']}, {hosts: ['a/*']}]"), "spec.egress[0].port", "only one listener");
    accepted(&egress(&format!("[{{{port}, hosts: ['./*']}}, {{hosts: ['a/*']}}]")));
    warned(&egress("[{hosts: ['*/*', a/b.c]}]"), "spec.egress[0].hosts", "selects all");
    refused(&egress("[{hosts: []}]"), "spec.egress[0].hosts", "at least one host");
    for bad in ["'a'", "'/a.b'", "'a/b/c'", "'a/'"] {
        let findings = findings(&egress(&format!("[{{hosts: [{bad}]}}]")));
        assert!(findings.iter().any(|d| d.path == "spec.egress[0].hosts[0]"), "{bad}: {findings:?}");
    }
}

#[tokio::test]
async fn sc_02_unknown_destinations() {
    let policy = |policy: &str| resource("Sidecar", "s", &format!("{{outboundTrafficPolicy: {policy}}}"));
    let echo = Echo::start("anywhere").await;
    let unknown = || to_original(get("http://nobody.example.com/"), echo.addr);
    for allowed in [String::new(), policy("{mode: ALLOW_ANY}")] {
        let it = compile(&(services() + &allowed));
        assert_eq!(it.clusters("http://nobody.example.com/"), ["PassthroughCluster"]);
        assert_eq!(send(&it.client(), unknown()).await.by(), "anywhere");
    }
    for blocked in [policy("{mode: REGISTRY_ONLY}"), policy("{}")] {
        let it = compile(&(services() + &blocked));
        assert_eq!(it.clusters("http://nobody.example.com/"), ["BlackHoleCluster"], "{blocked}");
        let failed = fail(&it.client(), unknown()).await;
        assert!(failed.starts_with("502 "), "{failed}");
        assert_eq!(it.clusters("http://reviews/"), ["outbound|80||reviews.default.svc.cluster.local"]);
    }
    assert_eq!(echo.requests(), 2);
}
