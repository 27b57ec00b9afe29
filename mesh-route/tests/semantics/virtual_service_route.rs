//! `http[].route[]` and which actions go together: VS-R01 … VS-R06.

use http::Request;
use mesh_core::Body;
use mesh_route::{ActionKind, ChosenBy, Decision, HashPolicy};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;

use crate::support::*;

const TO_REVIEWS: &str = "route: [{destination: {host: reviews}}]";

#[test]
fn vs_r01_actions_that_conflict_are_refused() {
    let redirect = "redirect: {uri: /x}";
    let direct = "directResponse: {status: 200}";
    let fault = "fault: {abort: {httpStatus: 500, percentage: {value: 1}}}";
    let rewrite = "rewrite: {uri: /y}";
    for (action, other, field) in [
        (redirect, TO_REVIEWS, "route"),
        (redirect, fault, "fault"),
        (redirect, rewrite, "rewrite"),
        (redirect, direct, "directResponse"),
        (direct, TO_REVIEWS, "route"),
        (direct, fault, "fault"),
        (direct, rewrite, "rewrite"),
    ] {
        let yaml = rules(&format!("  - {{{action}, {other}}}\n"));
        refused(&yaml, &format!("spec.http[0].{field}"), "must not stand beside");
    }
    let mirrors = "mirror: {host: reviews}, mirrors: [{destination: {host: reviews}}]";
    refused(
        &rules(&format!("  - {{{TO_REVIEWS}, {mirrors}}}\n")),
        "spec.http[0].mirrors",
        "must not stand beside mirror",
    );
    for nothing in ["{name: a}", "{route: []}", "{timeout: 1s}"] {
        refused(&rules(&format!("  - {nothing}\n")), "spec.http[0]", "is required");
    }
    for single in [TO_REVIEWS, redirect, direct] {
        accepted(&rules(&format!("  - {{{single}}}\n")));
    }
}

/// A split by these weights over as many subsets.
fn split(weights: &[i64]) -> String {
    let routes: Vec<_> = (1..)
        .zip(weights)
        .map(|(at, weight)| format!("{{destination: {{host: reviews, subset: v{at}}}, weight: {weight}}}"))
        .collect();
    let subsets: Vec<_> =
        (1..=weights.len()).map(|at| format!("{{name: v{at}, labels: {{version: v{at}}}}}")).collect();
    let ports: Vec<u16> = (1..).take(weights.len()).collect();
    service_in("default", "reviews", &ports)
        + &resource(
            "DestinationRule",
            "reviews",
            &format!("{{host: reviews, subsets: [{}]}}", subsets.join(", ")),
        )
        + &rules(&format!("  - {{route: [{}]}}\n", routes.join(", ")))
}

/// The share of each destination in percent, of `draws` with this seed.
fn shares(weights: &[i64], seed: u64, draws: u32) -> Vec<f64> {
    let route = compile(&split(weights)).ask("http://reviews/").route.unwrap();
    let ActionKind::Forward(forward) = &route.action().kind else { panic!("{route:?}") };
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut counts = vec![0_u32; weights.len()];
    for _ in 0..draws {
        let subset = forward.destinations.pick(&mut rng).name.subset();
        counts[subset.unwrap()[1..].parse::<usize>().unwrap() - 1] += 1;
    }
    counts.iter().map(|count| f64::from(*count) * 100.0 / f64::from(draws)).collect()
}

#[test]
fn vs_r02_a_share_is_weight_by_sum() {
    // The sum need not be 100; nothing is said when it is.
    for weights in [&[90, 10][..], &[9, 1], &[1, 2, 4], &[5], &[0], &[100, 0]] {
        accepted(&split(weights));
    }
    for (share, expected) in shares(&[9, 1], 1, 100_000).into_iter().zip([90.0, 10.0]) {
        assert!((share - expected).abs() < 0.5, "{share} for {expected}");
    }
    assert_eq!(shares(&[0], 1, 1_000), [100.0], "a single destination gets everything, even by 0");
    assert_eq!(shares(&[7], 1, 1_000), [100.0]);
    let among = shares(&[0, 1, 0], 1, 100_000);
    assert_eq!(among, [0.0, 100.0, 0.0], "among several, 0 is nothing");
    refused(&split(&[1, -1]), "spec.http[0].route[1].weight", "must not be negative");
    refused(&split(&[0, 0]), "spec.http[0].route", "0 in sum");
    // A weight that is not written is 0.
    let unwritten = "  - {route: [{destination: {host: reviews, subset: v1}, weight: 1}, {destination: {host: reviews, subset: v2}}]}\n";
    let it = compile(&(reviews(&[1, 2]) + &rules(unwritten)));
    let Decision::Forward { destinations, .. } = it.ask("http://reviews/").decision else { panic!() };
    assert_eq!(destinations.iter().map(|(weight, ..)| *weight).collect::<Vec<_>>(), [1, 0]);
}

#[test]
fn vs_r03_destinations() {
    refused(
        &rules("  - {route: [{destination: {host: '*'}}]}\n"),
        "spec.http[0].route[0].destination.host",
        "",
    );
    refused(&rules("  - {route: [{weight: 1}]}\n"), "spec.http[0].route[0].destination", "is required");
    let port = "  - {route: [{destination: {host: reviews, port: {number: 70000}}}]}\n";
    refused(&rules(port), "spec.http[0].route[0].destination.port.number", "70000");
    let services = reviews(&[1, 2])
        + "---\napiVersion: v1\nkind: Service\nmetadata: {name: two, namespace: default}\nspec: {clusterIP: \
           10.0.0.2, ports: [{name: http-a, port: 80}, {name: http-b, port: 8082}]}\n\
           ---\napiVersion: v1\nkind: Service\nmetadata: {name: alias, namespace: default}\nspec: {type: \
           ExternalName, externalName: reviews.default.svc.cluster.local, ports: [{name: http, port: 80}]}\n";
    let to = |destination: &str, url: &str| {
        let rule = format!("  - {{route: [{{destination: {{{destination}}}}}]}}\n");
        let any =
            resource("VirtualService", "any", &format!("  hosts: [any.example.com, two]\n  http:\n{rule}"));
        compile(&(services.clone() + &any)).clusters(url).remove(0)
    };
    let any = "http://any.example.com/";
    assert_eq!(to("host: reviews, subset: v2", any), "outbound|80|v2|reviews.default.svc.cluster.local");
    assert_eq!(
        to("host: two, port: {number: 8082}", any),
        "outbound|8082||two.default.svc.cluster.local",
        "the port that is named"
    );
    assert_eq!(
        to("host: reviews", "http://two:8082/"),
        "outbound|80||reviews.default.svc.cluster.local",
        "the only port of the service"
    );
    assert_eq!(
        to("host: two", "http://two:8082/"),
        "outbound|8082||two.default.svc.cluster.local",
        "else that of the listener"
    );
    assert_eq!(
        to("host: alias", any),
        "outbound|80||reviews.default.svc.cluster.local",
        "an ExternalName is its target"
    );
}

#[test]
fn vs_r03_an_external_name_answers_at_the_ports_of_its_target() {
    let alias = |name: &str, of: &str, ports: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec: {{type: \
             ExternalName, externalName: {of}{ports}}}\n"
        )
    };
    let it = compile(
        &(reviews(&[1, 2])
            + &alias("second", "first.default.svc.cluster.local", "")
            + &alias("first", "reviews.default.svc.cluster.local", ", ports: [{name: http, port: 9999}]")
            + &alias("round", "about.default.svc.cluster.local", "")
            + &alias("about", "round.default.svc.cluster.local", "")),
    );
    for name in ["first", "second", "second.default"] {
        let to = it.clusters(&format!("http://{name}/"));
        assert_eq!(to, ["outbound|80||reviews.default.svc.cluster.local"], "{name}");
    }
    assert_eq!(it.clusters("http://round/"), ["PassthroughCluster"], "a circle stands for nobody");
}

#[tokio::test]
async fn vs_r04_headers_of_a_destination_come_after_those_of_the_route() {
    let (_one, _two, services) = two_versions().await;
    let ops = |by: &str| {
        format!(
            "headers: {{request: {{set: {{x-set: {by}}}, add: {{x-add: {by}}}}}, response: {{set: {{y-set: {by}}}, add: {{y-add: {by}}}}}}}"
        )
    };
    let it = compile(
        &(services
            + &rules(&format!(
                "  - {{match: [{{uri: {{exact: /one}}}}], {}, route: [{{destination: {{host: reviews, subset: v1}}, {}}}]}}\n  \
                 - {{{}, route: [{{destination: {{host: reviews, subset: v1}}, weight: 1, {}}}, {{destination: {{host: reviews, subset: v2}}, weight: 1, headers: {{request: {{remove: [x-add]}}}}}}]}}\n",
                ops("route"),
                ops("destination"),
                ops("route"),
                ops("destination"),
            ))),
    );
    let client = it.client();
    let one = send(&client, get("http://reviews/one")).await;
    assert_eq!(one.saw_header("x-set").as_deref(), Some("destination"));
    assert_eq!(one.saw_header("x-add").as_deref(), Some("route,destination"));
    assert_eq!(one.header("y-set"), Some("destination"));
    let added: Vec<_> = one.headers.get_all("y-add").iter().collect();
    assert_eq!(added, ["route", "destination"]);
    // Each destination of a split has its own.
    let mut seen = [false, false];
    while seen != [true, true] {
        let answer = send(&client, get("http://reviews/split")).await;
        if answer.by() == "v1" {
            seen[0] = true;
            assert_eq!(answer.saw_header("x-set").as_deref(), Some("destination"));
            assert_eq!(answer.saw_header("x-add").as_deref(), Some("route,destination"));
            assert_eq!(answer.header("y-set"), Some("destination"));
        } else {
            seen[1] = true;
            assert_eq!(answer.saw_header("x-set").as_deref(), Some("route"));
            assert_eq!(answer.saw_header("x-add"), None);
            assert_eq!(answer.header("y-set"), Some("route"));
        }
    }
}

/// A split of so many percent to v2, with the annotation that makes it stick.
fn sticky(key: &str, services: &str, canary: u32) -> Compiled {
    let rule = format!(
        "  - {{route: [{{destination: {{host: reviews, subset: v1}}, weight: {}}}, {{destination: {{host: reviews, subset: v2}}, weight: {canary}}}]}}\n",
        100 - canary
    );
    let annotated = format!("namespace: default, annotations: {{mesh.rs/sticky-split: '{key}'}}}}\n");
    compile(&(services.to_owned() + &rules(&rule).replace("namespace: default}\n", &annotated)))
}

fn ask_as(user: &str) -> Request<Body> {
    let mut request = get("http://reviews/");
    request.headers_mut().insert("x-user", user.parse().unwrap());
    request
}

/// Where a request goes, whatever the seed.
fn version(it: &Compiled, request: &Request<Body>) -> (String, ChosenBy) {
    match it.explain(request).decision {
        Decision::Forward { destinations, chosen, by, .. } => {
            (destinations[chosen].1.subset().unwrap().to_owned(), by)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn vs_r05_a_user_stays_while_weights_move() {
    let services = reviews(&[1, 2]);
    let users: Vec<_> = (0..2_000).map(|user| ask_as(&format!("user-{user}"))).collect();
    let mut before: Option<(u32, Vec<String>)> = None;
    for canary in [0, 5, 20, 50, 100, 40, 0] {
        let it = sticky("header:x-user", &services, canary);
        let now: Vec<_> = users.iter().map(|user| version(&it, user).0).collect();
        let share = now.iter().filter(|version| *version == "v2").count() as f64 / 20.0;
        assert!((share - f64::from(canary)).abs() < 3.0, "{share} for {canary}");
        if let Some((then, before)) = before {
            let moved = before.iter().zip(&now).filter(|(before, now)| before != now).count() as f64 / 20.0;
            assert!((moved - f64::from(canary.abs_diff(then))).abs() < 3.0, "{then} to {canary}: {moved}");
            let to = if canary > then { "v2" } else { "v1" };
            let back = before.iter().zip(&now).filter(|(before, now)| before != now && *now != to);
            assert_eq!(back.count(), 0, "{then} to {canary}: nobody moves against the change");
        }
        before = Some((canary, now));
    }
}

#[test]
fn vs_r05_the_order_of_destinations_means_nothing() {
    let services = reviews(&[1, 2]);
    let annotated = |route: &str| {
        let yaml = rules(&format!("  - {{route: [{route}]}}\n"));
        let annotations = "namespace: default, annotations: {mesh.rs/sticky-split: 'header:x-user'}}\n";
        compile(&(services.clone() + &yaml.replace("namespace: default}\n", annotations)))
    };
    let (v1, v2) = (
        "{destination: {host: reviews, subset: v1}, weight: 70}",
        "{destination: {host: reviews, subset: v2}, weight: 30}",
    );
    let (one, other) = (annotated(&format!("{v1}, {v2}")), annotated(&format!("{v2}, {v1}")));
    for user in 0..500 {
        let request = ask_as(&format!("user-{user}"));
        assert_eq!(version(&one, &request), version(&other, &request));
    }
}

#[test]
fn vs_r05_every_kind_of_key_and_none() {
    let services = reviews(&[1, 2]);
    for key in ["header:x-user", "cookie:user", "query:user"] {
        let it = sticky(key, &services, 50);
        let policy: HashPolicy = key.parse().unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for user in 0..50 {
            let request = Request::get(format!("http://reviews/?user={user}"))
                .header("x-user", user)
                .header("cookie", format!("a=b; user={user}"))
                .body(Body::empty())
                .unwrap();
            let (version, by) = version(&it, &request);
            assert_eq!(by, ChosenBy::Key(policy.clone()));
            seen.insert(version);
        }
        assert_eq!(seen.len(), 2, "{key}");
        assert_eq!(version(&it, &get("http://reviews/")).1, ChosenBy::DrawWithout(policy));
    }
    // The address of the client, whatever its port.
    let it = sticky("source-ip", &services, 50);
    let from = |peer: String| {
        let request = get("http://reviews/");
        let conn = mesh_core::ConnInfo { peer: peer.parse().unwrap(), ..it.conn(80) };
        let view = mesh_route::RequestView::new(&request, &conn);
        match mesh_route::explain(&it.table, &view, &conn, 1).decision {
            Decision::Forward { chosen, by: ChosenBy::Key(HashPolicy::SourceIp), .. } => chosen,
            other => panic!("{other:?}"),
        }
    };
    let mut seen = [0; 2];
    for host in 1..100 {
        let chosen = from(format!("10.0.0.{host}:1000"));
        assert_eq!(chosen, from(format!("10.0.0.{host}:2000")));
        seen[chosen] += 1;
    }
    assert!(seen.iter().all(|count| *count > 30), "{seen:?}");
    let shown = it.ask("http://reviews/").to_json();
    assert_eq!(shown["decision"]["sticky"], serde_json::json!({"key": "source-ip", "present": false}));
    // What names no key is refused, and then nothing sticks.
    let (set, mut diags) = mesh_core::istio::ResourceSet::load(
        &[mesh_core::istio::SourceFile::new(
            "<test>",
            rules(&format!("  - {{{TO_REVIEWS}}}\n")).replace(
                "namespace: default}\n",
                "namespace: default, annotations: {mesh.rs/sticky-split: user}}\n",
            ),
        )],
        &mesh_core::istio::LoadOptions::default(),
    );
    let cx = mesh_core::config::CompileContext::new(mesh_core::config::Role::Sidecar);
    let compiled: Result<mesh_route::RouteTable, _> =
        mesh_core::config::Compile::compile(&set, &cx, &mut diags);
    assert!(compiled.is_ok());
    let said = "metadata.annotations.mesh.rs/sticky-split: \"user\": expected header:NAME, cookie:NAME, source-ip or query:NAME";
    assert!(diags.to_string().contains(said), "{diags}");
}

#[tokio::test]
async fn vs_r05_requests_go_where_explain_says() {
    let (_one, _two, services) = two_versions().await;
    let it = sticky("header:x-user", &services, 30);
    // Workers draw by themselves, and agree on users.
    let workers = [it.client_seeded(1), it.client_seeded(2)];
    for user in 0..40 {
        let user = format!("user-{user}");
        let expected = version(&it, &ask_as(&user)).0;
        for worker in &workers {
            assert_eq!(send(worker, ask_as(&user)).await.by(), expected, "{user}");
        }
    }
    // Who has no key is drawn.
    let mut canary = 0;
    for _ in 0..300 {
        canary += u32::from(send(&workers[0], get("http://reviews/")).await.by() == "v2");
    }
    assert!((60..120).contains(&canary), "{canary}");
}

#[tokio::test]
async fn vs_r05_only_those_who_must_move_do_when_the_weights_of_a_process_change() {
    let (_one, _two, services) = two_versions().await;
    let process = mesh_route::Clusters::new();
    let mut before: Option<(u32, Vec<String>)> = None;
    for canary in [10, 30, 25] {
        let client = sticky("header:x-user", &services, canary).client_on(&process);
        let mut now = Vec::new();
        for user in 0..400 {
            now.push(send(&client, ask_as(&format!("user-{user}"))).await.by());
        }
        if let Some((then, before)) = before {
            let moved: Vec<_> = before.iter().zip(&now).filter(|(before, now)| before != now).collect();
            let must = canary.abs_diff(then) as usize * 4;
            // Of 400 keys the share that moves deviates by sqrt(400 p (1 - p)); four of these are allowed.
            let share = must as f64 / 400.0;
            let most = must as f64 + 4.0 * (400.0 * share * (1.0 - share)).sqrt();
            assert!(moved.len() as f64 <= most && !moved.is_empty(), "{then} to {canary}: {}", moved.len());
            let to = if canary > then { "v2" } else { "v1" };
            assert!(moved.iter().all(|(_, now)| *now == to), "{then} to {canary}");
        }
        before = Some((canary, now));
    }
}

#[test]
fn vs_r06_a_million_draws_are_within_a_quarter_of_a_point() {
    for seed in [1, 42, 2026] {
        for weights in [&[50, 50][..], &[1, 99], &[1, 1, 1], &[5, 15, 80], &[0, 1, 3], &[1000, 1]] {
            let sum: i64 = weights.iter().sum();
            for (share, weight) in shares(weights, seed, 1_000_000).into_iter().zip(weights) {
                let expected = *weight as f64 * 100.0 / sum as f64;
                let bound = if *weight == 0 { 0.0 } else { 0.25 };
                assert!((share - expected).abs() <= bound, "{weights:?} {seed}: {share} for {expected}");
            }
        }
    }
}

#[test]
fn c7_90_to_10_is_within_a_tenth_of_a_point_and_0_and_100_are_exact() {
    for seed in [1, 42, 2026] {
        let share = shares(&[90, 10], seed, 1_000_000)[0];
        assert!((share - 90.0).abs() <= 0.1, "seed {seed}: {share}");
        println!("c7: 90/10, seed {seed}: {share:.4} %");
        assert_eq!(shares(&[100, 0], seed, 1_000_000), [100.0, 0.0]);
        assert_eq!(shares(&[0, 100], seed, 1_000_000), [0.0, 100.0]);
    }
}

#[tokio::test]
async fn vs_r06_a_seed_replays_the_same_sequence() {
    let (_one, _two, services) = two_versions().await;
    let yaml = services
        + &rules(
            "  - {route: [{destination: {host: reviews, subset: v1}, weight: 70}, {destination: {host: reviews, subset: v2}, weight: 30}]}\n",
        );
    let mut runs = Vec::new();
    for seed in [7, 7, 8] {
        let client = compile(&yaml).client_seeded(seed);
        let mut run = String::new();
        for _ in 0..100 {
            run.push_str(&send(&client, get("http://reviews/")).await.by());
        }
        runs.push(run);
    }
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0], runs[2]);
}
