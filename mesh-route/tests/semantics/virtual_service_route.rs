//! `http[].route[]` and which actions go together: VS-R01 … VS-R06.

use mesh_route::ActionKind;
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
    let mesh_route::Decision::Forward { destinations, .. } = it.ask("http://reviews/").decision else {
        panic!()
    };
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
