//! Whole policies in virtual time: what a simulation says of them, that it always says the same, and what it says of
//! scenarios that are none.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::config::{CompileContext, Role};
use mesh_core::istio::{LoadOptions, SourceFile};
use mesh_route::simulate::{EventKind, Input, Interval, Report, Simulation};

/// `reviews` at port 80 with this many endpoints, 10.0.0.1 and so on; the first half is v1, the rest v2.
fn service(endpoints: usize) -> String {
    let endpoint = |nth: usize| {
        let version = if nth * 2 <= endpoints + 1 { "v1" } else { "v2" };
        format!("  - {{address: 10.0.0.{nth}, ports: {{http: 9080}}, labels: {{version: {version}}}}}\n")
    };
    let endpoints: String = (1..=endpoints).map(endpoint).collect();
    resource(
        "ServiceEntry",
        &format!(
            "  hosts: [reviews.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
             ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints:\n{endpoints}"
        ),
    )
}

fn resource(kind: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {{name: reviews}}\nspec:\n{spec}"
    )
}

/// The only rule for `reviews`, beside its route.
fn rule(fields: &str) -> String {
    resource(
        "VirtualService",
        &format!(
            "  hosts: [reviews]\n  http:\n  - route: [{{destination: {{host: reviews}}}}]\n    {fields}\n"
        ),
    )
}

fn policy(policy: &str) -> String {
    resource("DestinationRule", &format!("  host: reviews\n  trafficPolicy: {policy}\n"))
}

fn scenario(spec: &str) -> String {
    format!("apiVersion: mesh.rs/v1alpha1\nkind: Scenario\nmetadata: {{name: test}}\nspec:\n{spec}\n")
}

/// Files that a scenario names.
type Files<'f> = &'f [(&'f str, &'f str)];

fn load(text: &str, files: Files<'_>) -> (Option<Simulation>, String) {
    let read = |path: &str| match files.iter().find(|(name, _)| *name == path) {
        Some((name, text)) => Ok(vec![SourceFile::new(*name, *text)]),
        None => Err(std::io::Error::new(std::io::ErrorKind::NotFound, format!("{path}: not found"))),
    };
    let (simulation, found) = Simulation::load(Input {
        scenario: SourceFile::new("scenario.yaml", text),
        config: Vec::new(),
        mesh_config: None,
        context: CompileContext::new(Role::Sidecar),
        options: LoadOptions::default(),
        read: &read,
    });
    (simulation, found.iter().map(|found| format!("{found}\n")).collect())
}

fn run(parts: &[&str]) -> Report {
    let (simulation, found) = load(&parts.concat(), &[]);
    assert_eq!(found, "", "{}", parts.concat());
    simulation.unwrap().run().unwrap()
}

fn endpoint(nth: u8) -> SocketAddr {
    ([10, 0, 0, nth], 9080).into()
}

fn tries(interval: &Interval, nth: u8) -> u64 {
    interval.tries_by_endpoint.get(&endpoint(nth)).copied().unwrap_or(0)
}

fn failed(interval: &Interval) -> Vec<(&str, u64)> {
    interval.failed.iter().map(|(cause, count)| (cause.as_str(), *count)).collect()
}

fn millis(latency: Option<[Duration; 3]>) -> [u128; 3] {
    latency.unwrap().map(|time| time.as_millis())
}

const TWO_OF_FIVE: &str = "  duration: 120s
  interval: 10s
  load: [{rate: 100, host: reviews}]
  endpoints:
  - latency: {fixed: 10ms}
  - {addresses: [10.0.0.1, 10.0.0.2], script: [{from: 20s, to: 60s, answers: [{status: 503}]}]}";

fn two_of_five(outlier_detection: &str) -> Report {
    run(&[
        &scenario(TWO_OF_FIVE),
        &service(5),
        &rule("retries: {attempts: 0}"),
        &policy(&format!("{{outlierDetection: {{consecutive5xxErrors: 5, {outlier_detection}}}}}")),
    ])
}

#[test]
fn dr_od02_two_of_five_fail_for_40_s_and_are_ejected_for_30_and_then_60() {
    let report = two_of_five("maxEjectionPercent: 40, baseEjectionTime: 30s");
    let ejected: Vec<_> = report.intervals.iter().map(|row| row.ejected.len()).collect();
    assert_eq!(ejected, [0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0]);
    for nth in [1, 2] {
        let seen: Vec<_> = report.intervals[2..11].iter().map(|row| tries(row, nth)).collect();
        let asked: Vec<_> = seen.iter().map(|tries| (5..=6).contains(tries)).collect();
        let expected = [true, false, false, true, false, false, false, false, false];
        assert_eq!(
            asked, expected,
            "five and what was in flight, 30 s without, five, 60 s without: {seen:?}"
        );
        assert_eq!(seen.iter().filter(|tries| **tries == 0).count(), 7);
        assert!(tries(&report.intervals[11], nth) > 100, "it is back");
    }
    assert!((20..=24).contains(&report.total.failures()), "{:?}", report.total.failed);
    let ejections: Vec<_> = report.events.iter().filter(|event| event.kind == EventKind::Ejected).collect();
    assert_eq!(ejections.len(), 4);
    assert!(ejections.iter().all(|event| event.what.contains("5 consecutive5xxErrors reached")));
    assert_eq!(report.total.amplification(), Some(1.0));
}

#[test]
fn dr_od03_the_ejection_percentage_leaves_one_of_them_in() {
    let report = two_of_five("maxEjectionPercent: 20, baseEjectionTime: 30s");
    assert!(report.intervals.iter().all(|row| row.ejected.len() <= 1));
    let row = &report.intervals[3];
    let (one, two) = (tries(row, 1), tries(row, 2));
    assert!((one == 0) != (two == 0), "one is ejected, and the other goes on: {one} and {two}");
    assert_eq!(failed(row), [("503", one + two)]);
    let prevented = report.events.iter().find(|event| event.kind == EventKind::NotEjected).unwrap();
    assert!(prevented.what.contains("1 of 5 are"), "{}", prevented.what);
    assert!(prevented.times > 10, "what goes on is one event: {}", prevented.times);
}

#[test]
fn dr_od04_below_the_least_health_everybody_is_used_again() {
    let report = two_of_five("maxEjectionPercent: 100, baseEjectionTime: 30s, minHealthPercent: 70");
    let row = &report.intervals[3];
    assert_eq!(row.panic, ["outbound|80||reviews.default.svc.cluster.local"]);
    assert_eq!(row.ejected.len(), 2);
    assert!(tries(row, 1) > 100 && tries(row, 2) > 100, "three of five are less than 70 %");
    assert!(report.intervals[0].panic.is_empty());
}

const STORM: &str = "  duration: 5s
  load: [{rate: 1000, host: reviews}]
  endpoints: [{latency: {fixed: 100ms}, script: [{answers: [{status: 503}]}]}]";

const THREE: &str = "retries: {attempts: 3, retryOn: 5xx}";

#[test]
fn vs_y01_a_storm_without_a_budget_is_four_tries_for_each_request() {
    let report = run(&[&scenario(STORM), &service(1), &rule(THREE)]);
    assert_eq!(report.total.requests, 5_000);
    assert!(report.intervals.iter().all(|row| row.requests == 0 || row.amplification() == Some(4.0)));
    assert_eq!(tries(&report.total, 1), 20_000, "and the endpoint bears them");
    assert_eq!(failed(&report.total), [("URX", 5_000)]);
}

#[test]
fn dr_rb01_a_budget_keeps_a_storm_within_a_fifth_and_three() {
    let budget = policy("{retryBudget: {percent: {value: 20}, minRetryConcurrency: 3}}");
    for (rate, more) in [(1000, 0.15), (10, 1.0)] {
        let storm = STORM.replace("1000", &rate.to_string());
        let report = run(&[&scenario(&storm), &service(1), &rule(THREE), &budget]);
        let concurrent = 3.0 * report.end.as_secs_f64() / 0.1;
        let requests = report.total.requests as f64;
        assert!(report.total.tries as f64 <= 1.25 * requests + concurrent, "{}", report.total.tries);
        assert!(
            report.total.tries as f64 >= (1.0 + more) * requests,
            "the budget is used: {}",
            report.total.tries
        );
        let refused = report.total.retry_overflows;
        assert!(report.total.overflows == 0 && refused > 0, "{refused}");
    }
}

#[test]
fn dr_cp04_a_breaker_refuses_what_is_too_much_and_ejects_nobody() {
    let report = run(&[
        &scenario(
            "  duration: 10s\n  interval: 1s\n  workers: 3\n  load: [{rate: 10, host: reviews}]\n  \
             endpoints: [{latency: {fixed: 950ms}}]",
        ),
        &service(1),
        &rule("retries: {attempts: 0}"),
        &policy(
            "{connectionPool: {http: {http2MaxRequests: 4}}, outlierDetection: {consecutive5xxErrors: 1, maxEjectionPercent: 100}}",
        ),
    ]);
    for row in &report.intervals[..10] {
        assert_eq!((row.requests, row.succeeded, failed(row)), (10, 4, vec![("UO", 6)]), "at {:?}", row.from);
    }
    assert_eq!((report.total.overflows, report.total.tries), (60, 40));
    assert!(report.events.is_empty());
}

#[test]
fn vs_t01_timeouts_take_as_long_as_they_say() {
    let slow = scenario(
        "  duration: 5s\n  load: [{rate: 10, host: reviews}]\n  endpoints: [{latency: {fixed: 2s}}]",
    );
    let route = run(&[
        &slow,
        &service(1),
        &rule("{timeout: 500ms, retries: {attempts: 0}}").replace(
            "    {timeout: 500ms, retries: {attempts: 0}}",
            "    timeout: 500ms\n    retries: {attempts: 0}",
        ),
    ]);
    assert_eq!(failed(&route.total), [("UT", 50)]);
    assert_eq!(millis(route.total.latency), [500; 3]);
    let per_try = run(&[
        &slow,
        &service(1),
        &rule("retries: {attempts: 2, perTryTimeout: 200ms, retryOn: 5xx, backoff: 1ms}"),
    ]);
    assert_eq!(failed(&per_try.total), [("UT,URX", 50)]);
    assert_eq!(per_try.total.amplification(), Some(3.0));
    let [p50, ..] = millis(per_try.total.latency);
    assert!((600..=610).contains(&p50), "three tries and two pauses: {p50}");
    let hanging = slow.replace("latency: {fixed: 2s}", "script: [{answers: [{hang: true}]}]");
    let hung = run(&[&hanging, &service(1), &rule("retries: {attempts: 0}")]);
    assert_eq!((hung.total.unfinished, hung.total.latency), (50, None));
    assert_eq!(hung.end, Duration::from_secs(5 + 15), "given up after the drain");
}

#[test]
fn vs_f05_faults_of_a_try_are_retried() {
    let faulty =
        rule(&format!("fault: {{abort: {{httpStatus: 503, percentage: {{value: 50}}}}}}\n    {THREE}"));
    let load = scenario("  duration: 20s\n  load: [{rate: 100, host: reviews}]");
    let per_try =
        faulty.replace("{name: reviews}", "{name: reviews, annotations: {mesh.rs/fault-scope: per-try}}");
    let report = run(&[&load, &service(2), &per_try]);
    let amplification = report.total.amplification().unwrap();
    assert!((1.78..1.97).contains(&amplification), "1 + 1/2 + 1/4 + 1/8, not {amplification}");
    let lost = report.total.failures();
    assert!((80..170).contains(&lost), "one of sixteen, not {lost} of 2000");
    assert_eq!(tries(&report.total, 1) + tries(&report.total, 2), report.total.succeeded);
    let report = run(&[&load, &service(2), &faulty]);
    assert_eq!(report.total.retries, 0, "Istio's faults are not retried");
    assert!(report.total.failed.keys().all(|cause| cause == "FI"), "{:?}", report.total.failed);
}

/// Everything that an endpoint can do to a connection or an exchange.
#[test]
fn an_endpoint_breaks_what_its_script_says() {
    let with = |script: &str, load: &str| {
        let spec = format!(
            "  duration: 4s\n  interval: 2s\n  load: [{{rate: 10, host: reviews, {load}}}]\n  endpoints: [{{script: [{script}]}}]"
        );
        let pool =
            policy("{connectionPool: {tcp: {connectTimeout: 300ms}, http: {useClientProtocol: true}}}");
        run(&[&scenario(&spec), &service(1), &rule("retries: {attempts: 0}"), &pool])
    };
    for protocol in ["http2: false", "http2: true"] {
        let report = with("{from: 2s, connect: REFUSE}", protocol);
        assert_eq!(
            (report.intervals[0].succeeded, failed(&report.intervals[1])),
            (20, vec![("UF", 20)]),
            "{protocol}"
        );
        assert_eq!(tries(&report.intervals[1], 1), 20, "who is refused has tried");
        let report = with("{to: 2s, connect: HANG}", protocol);
        let (hanging, after) = (&report.intervals[0], &report.intervals[1]);
        assert_eq!(failed(hanging), [("UF", 20)], "{protocol}");
        // Over HTTP/2 a request may wait for a connection that was begun before.
        assert!((19..=20).contains(&after.succeeded), "{protocol}");
        assert_eq!(millis(hanging.latency)[2], 300, "connectTimeout");
        let report = with("{answers: [{reset: HEAD}]}", protocol);
        let flag = if protocol == "http2: true" { "UR" } else { "UC" };
        assert_eq!(failed(&report.total), [(flag, 40)], "{protocol}");
        let report = with("{answers: [{reset: BODY}]}", protocol);
        assert_eq!((report.total.succeeded, report.total.failures()), (0, 40), "{protocol}");
        let report = with(
            "{answers: [{grpcStatus: 14}]}",
            &format!("{protocol}, headers: {{content-type: application/grpc}}"),
        );
        assert_eq!(failed(&report.total), [("grpc 14", 40)], "{protocol}");
        let report = with("{}", &format!("{protocol}, headers: {{content-type: application/grpc}}"));
        assert_eq!(report.total.succeeded, 40, "{protocol}");
    }
}

#[test]
fn answers_have_their_probabilities() {
    let spec = "  duration: 100s\n  load: [{rate: 100, host: reviews, arrivals: POISSON}]\n  endpoints: \
                [{latency: {uniform: {min: 10ms, max: 30ms}}, script: [{answers: [{percent: 10, status: 500}, {percent: 5, status: 503}]}]}]";
    let report = run(&[&scenario(spec), &service(3), &rule("retries: {attempts: 0}")]);
    let requests = report.total.requests;
    assert!((9600..10_400).contains(&requests), "{requests}");
    let [(first, many), (second, few)] = failed(&report.total)[..] else {
        panic!("{:?}", report.total.failed)
    };
    assert_eq!((first, second), ("500", "503"));
    // Within four standard deviations.
    assert!((880..1120).contains(&many) && (413..588).contains(&few), "{many} and {few}");
    let [p50, _, p99] = millis(report.total.latency);
    assert!((19..=21).contains(&p50) && (29..=30).contains(&p99), "{p50} and {p99}");
}

#[test]
fn se_03_names_resolve_as_the_scenario_says() {
    let named = service(1).replace("STATIC", "DNS").replace("10.0.0.1,", "pods.example,");
    let mesh = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |-\n    dnsRefreshRate: 5s\n";
    let spec = "  duration: 20s\n  interval: 5s\n  load: [{rate: 10, host: reviews}]\n  dns:\n  - {name: pods.example, from: 12s, addresses: []}\n  \
                - {name: pods.example, addresses: [10.0.0.1]}\n  - {name: pods.example, from: 8s, addresses: [10.0.0.2]}";
    let report = run(&[&scenario(spec), &named, mesh]);
    let seen = |nth| report.intervals.iter().map(|row| tries(row, nth)).collect::<Vec<_>>();
    assert_eq!(
        (seen(1), seen(2)),
        (vec![50, 50, 0, 0], vec![0, 0, 50, 50]),
        "at the refresh, and never emptied"
    );
    assert_eq!(report.total.succeeded, 200);
}

const SUBSETS: &str = "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: reviews}\nspec:\n  host: reviews\n  \
                       subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]\n";

fn to_version(version: &str) -> String {
    rule("name: only").replace("{host: reviews}", &format!("{{host: reviews, subset: {version}}}"))
}

#[test]
fn a_reload_moves_the_load() {
    let spec = "  duration: 10s\n  interval: 5s\n  config: [v1.yaml]\n  load: [{rate: 100, host: reviews}]\n  \
                endpoints: [{latency: {fixed: 200ms}}]\n  reload: [{at: 5s, config: [v2.yaml]}]";
    let text = [scenario(spec).as_str(), &service(2), SUBSETS].concat();
    let (v1, v2) = (to_version("v1"), to_version("v2"));
    let (simulation, found) = load(&text, &[("v1.yaml", &v1), ("v2.yaml", &v2)]);
    assert_eq!(found, "");
    let report = simulation.unwrap().run().unwrap();
    let seen = |nth| report.intervals.iter().map(|row| tries(row, nth)).collect::<Vec<_>>();
    assert_eq!((seen(1), seen(2)), (vec![500, 0], vec![0, 500]));
    assert_eq!(report.total.succeeded, 1000, "what was in flight ends");
    let reloaded: Vec<_> =
        report.events.iter().map(|event| (event.at.as_secs(), event.what.as_str())).collect();
    assert_eq!(reloaded, [(5, "configuration 2 in force: v2.yaml")]);
}

/// A canary of `reviews` whose answers fail with this probability.
fn canary(percent: u8) -> Report {
    let spec = format!(
        "  duration: 200s\n  interval: 20s\n  workers: 2\n  load: [{{rate: 100, host: reviews}}]\n  endpoints:\n  \
         - {{latency: {{uniform: {{min: 5ms, max: 15ms}}}}}}\n  \
         - {{labels: {{version: v2}}, script: [{{answers: [{{percent: {percent}, status: 500}}]}}]}}"
    );
    let both = rule("retries: {attempts: 0}")
        .replace(
            "[{destination: {host: reviews}}]",
            "[{destination: {host: reviews, subset: v1}, weight: 100}, {destination: {host: reviews, subset: v2}, weight: 0}]",
        )
        .replace("{name: reviews}", "{name: reviews, annotations: {mesh.rs/canary: 'canary=v2; interval=5s; min-duration=20s'}}");
    run(&[&scenario(&spec), &service(2), &both, SUBSETS])
}

#[test]
fn vs_r05_a_canary_is_rolled_out_or_back_by_what_its_endpoints_do() {
    let shares = |report: &Report| {
        report.intervals.iter().map(|row| row.canaries["default/reviews"]).collect::<Vec<_>>()
    };
    let good = canary(0);
    assert_eq!(good.total.canaries["default/reviews"], 100, "{good}");
    assert!(shares(&good).is_sorted() && shares(&good)[0] < 50, "{good}");
    assert_eq!(tries(good.intervals.last().unwrap(), 1), 0, "nothing goes to the old version any more");
    let bad = canary(20);
    assert_eq!(bad.total.canaries["default/reviews"], 0, "{bad}");
    assert!(bad.total.failures() < 60, "{bad}");
    assert_eq!(tries(bad.intervals.last().unwrap(), 2), 0);
    let decided: Vec<_> = bad.events.iter().filter(|event| event.kind == EventKind::Canary).collect();
    assert!(decided.last().unwrap().what.starts_with("canary default/reviews: "), "{bad}");
    assert_eq!(canary(20), bad, "the same again");
}

#[test]
fn dr_lb03_users_keep_their_endpoint() {
    let by_header = policy("{loadBalancer: {consistentHash: {httpHeaderName: x-user}}}");
    let spec = |users| {
        scenario(&format!(
            "  duration: 10s\n  load: [{{rate: 100, host: reviews, users: {users}, headers: {{x-user: 'u{{user}}'}}}}]"
        ))
    };
    let one = run(&[&spec(1), &service(5), &by_header]);
    assert_eq!(one.total.tries_by_endpoint.len(), 1);
    let many = run(&[&spec(1000), &service(5), &by_header]);
    assert_eq!(many.total.tries_by_endpoint.len(), 5);
}

/// All at once: what is random, what waits, what is left and comes again.
const RICH: &str = "  seed: 7
  duration: 15s
  interval: 2s
  workers: 3
  config: [split.yaml]
  load:
  - {name: one, rate: 80, host: reviews, arrivals: POISSON, users: 50, headers: {x-user: '{user}'}}
  - {name: two, rate: 30, host: reviews, http2: true, method: POST, body: hello, headers: {content-type: application/grpc}}
  endpoints:
  - {latency: {exponential: {mean: 30ms}}}
  - addresses: [10.0.0.1, 10.0.0.2]
    script:
    - {from: 2s, to: 6s, answers: [{percent: 40, status: 503}, {percent: 5, reset: BODY}, {percent: 5, reset: HEAD}, {percent: 3, hang: true}]}
    - {from: 7s, to: 9s, connect: REFUSE}
    - {from: 9s, to: 10s, connect: HANG}
  - {subset: v2, script: [{from: 4s, to: 5s, latency: {uniform: {min: 100ms, max: 400ms}}}]}
  reload: [{at: 5s, config: [v1.yaml]}, {at: 10s, config: [split.yaml]}]";

fn rich() -> Simulation {
    let split = rule("timeout: 1s\n    retries: {attempts: 2, retryOn: '5xx,reset,connect-failure', perTryTimeout: 300ms}\n    fault: {delay: {fixedDelay: 50ms, percentage: {value: 5}}}")
        .replace(
            "[{destination: {host: reviews}}]",
            "[{destination: {host: reviews, subset: v1}, weight: 60}, {destination: {host: reviews, subset: v2}, weight: 40}]",
        );
    let subsets = SUBSETS.to_owned()
        + "  trafficPolicy:\n    loadBalancer: {simple: LEAST_REQUEST}\n    \
           connectionPool: {tcp: {maxConnections: 2, connectTimeout: 500ms}, http: {useClientProtocol: true, idleTimeout: 2s, http1MaxPendingRequests: 4, maxRequestsPerConnection: 20}}\n    \
           outlierDetection: {consecutive5xxErrors: 3, baseEjectionTime: 3s, maxEjectionPercent: 60, minHealthPercent: 30}\n    \
           retryBudget: {percent: {value: 20}, minRetryConcurrency: 3}\n";
    let text = [scenario(RICH).as_str(), &service(6), &subsets].concat();
    let (simulation, found) = load(&text, &[("split.yaml", &split), ("v1.yaml", &to_version("v1"))]);
    assert_eq!(found, "");
    simulation.unwrap()
}

#[test]
fn the_same_seed_gives_the_same_report() {
    let simulation = rich();
    let first = simulation.run().unwrap();
    let total = &first.total;
    assert!(total.failures() > 50 && total.retries > 50 && total.overflows > 0, "{first}");
    assert!(total.retry_overflows > 0 && first.events.len() > 5, "{first}");
    for _ in 1..20 {
        let again = simulation.run().unwrap();
        assert_eq!(again.to_string(), first.to_string());
        assert_eq!(again.to_json(), first.to_json());
    }
    assert_eq!(rich().run().unwrap(), first, "whoever loads it");
    let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(|| rich().run().unwrap())).collect();
    threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), first, "beside others"));
    assert_ne!(simulation.with_seed(8).run().unwrap().to_string(), first.to_string());
}

#[tokio::test]
async fn it_runs_on_a_runtime_too() {
    let report = run(&[&scenario("  duration: 1s\n  load: [{rate: 10, host: reviews}]"), &service(1)]);
    assert_eq!(report.total.succeeded, 10);
}

#[test]
fn what_is_expected_is_judged() {
    let spec = "  duration: 10s
  load: [{name: all, rate: 10, host: reviews}]
  endpoints: [{latency: {fixed: 20ms}, script: [{from: 5s, answers: [{status: 500}]}]}]
  expect:
  - {to: 5s, success: '== 100%', p99: '<= 20ms'}
  - {name: it stays so, load: all, success: '>= 99.5%', failed: '< 50', amplification: '<= 1', retries: '== 0', refused: '== 0'}
  - {from: 20s, success: '> 0%', ejections: '== 0'}";
    let report = run(&[&scenario(spec), &service(1)]);
    let said: Vec<_> = report
        .expected
        .iter()
        .map(|one| format!("{} {} {} {:?}", one.met, one.path, one.condition, one.was.as_deref()))
        .collect();
    assert_eq!(
        said,
        [
            "true spec.expect[0].success == 100% Some(\"100.00%\")",
            "true spec.expect[0].p99 <= 20ms Some(\"20ms\")",
            "false spec.expect[1].success >= 99.5% Some(\"50.00%\")",
            "false spec.expect[1].failed < 50 Some(\"50\")",
            "true spec.expect[1].amplification <= 1 Some(\"1.00\")",
            "true spec.expect[1].retries == 0 Some(\"0\")",
            "true spec.expect[1].refused == 0 Some(\"0\")",
            "false spec.expect[2].success > 0% None",
            "true spec.expect[2].ejections == 0 Some(\"0\")",
        ]
    );
    assert_eq!(report.unmet().count(), 3);
    assert_eq!(report.unmet().next().unwrap().position.to_string(), "scenario.yaml:10:45");
}

#[test]
fn a_report_fits_in_a_hundred_columns() {
    let report = rich().run().unwrap();
    let long: Vec<_> =
        report.to_string().lines().filter(|line| line.chars().count() > 100).map(str::to_owned).collect();
    assert!(long.is_empty(), "{long:#?}");
    let spec = "  duration: 4s
  load: [{rate: 10, host: reviews}]
  endpoints: [{latency: {fixed: 20ms}, script: [{from: 2s, to: 3s, answers: [{status: 500}]}, {from: 3s, answers: [{hang: true}]}]}]
  interval: 1s
  expect: [{success: '>= 99%', name: nothing fails}]";
    let outliers = policy("{outlierDetection: {consecutive5xxErrors: 10, maxEjectionPercent: 0}}");
    let report = run(&[&scenario(spec), &service(1), &rule("retries: {attempts: 0}"), &outliers]);
    insta::assert_snapshot!("report", report);
}

#[test]
fn a_bad_scenario_says_where() {
    let everything = scenario(
        "  duration: 0s
  interval: 1us
  workers: 0
  colour: red
  load:
  - {rate: 0, host: '', path: x, method: 'a b', headers: {'a b': c}, from: 2s, to: 1s, port: 0, users: 0}
  - {name: a, rate: 1, host: reviews, to: 1h}
  - {name: a, rate: 1, host: 'a b'}
  endpoints:
  - addresses: [10.0.0.256]
    host: '*'
    labels: {'-': a}
    latency: {fixed: 1s, exponential: {mean: 1s}}
    script:
    - {from: 5s, to: 5s, connect: REFUSE, answers: [{status: 503}]}
    - answers: [{percent: 60, status: 100}, {percent: 50, grpcStatus: 17}, {hang: true, reset: HEAD}, {}]
    - latency: {uniform: {min: 2s, max: 1s}}
  dns: [{name: '', addresses: [a]}]
  reload: [{config: [a.yaml]}]
  expect:
  - {load: nobody, success: '> 5', p99: '99'}
  - {}",
    );
    let types = scenario(
        "  duration: 5\n  seed: -1\n  load: [{rate: fast, host: a, arrivals: SOMETIMES}]\n  endpoints: {}",
    );
    let files = scenario(
        "  duration: 5s\n  load: [{rate: 1, host: reviews}]\n  config: [missing.yaml]\n  reload: [{at: 1s, config: [bad.yaml]}]",
    );
    let twice = scenario("  duration: 5s\n  load: [{rate: 1, host: reviews}]")
        + "---\n"
        + &scenario("  duration: 5s\n  load: [{rate: 1, host: reviews}]").replace("test", "other");
    let effects = scenario(
        "  duration: 5s\n  load: [{rate: 1, host: reviews}]\n  endpoints: [{addresses: [10.9.9.9]}]\n  reload: [{at: 9s}]",
    ) + &service(1).replace("STATIC", "DNS").replace("10.0.0.1,", "pods.example,");
    let bad_config =
        scenario("  duration: 5s\n  load: [{rate: 1, host: reviews}]") + &rule("retries: {attempts: -1}");
    let nobody =
        scenario("  duration: 5s\n  load: [{rate: 1, host: reviews}, {rate: 1, host: 'reveiws:80'}]")
            + &service(1);
    let many =
        scenario("  duration: 100s\n  interval: 1ms\n  load: [{rate: 2e4, host: a}, {rate: 1, host: b}]");
    let mut said = String::new();
    let none = service(1);
    for (what, text) in [
        ("values", &everything),
        ("types", &types),
        ("too many", &many),
        ("files", &files),
        ("two scenarios", &twice),
        ("no scenario", &none),
        ("configuration", &bad_config),
        ("nobody answers", &nobody),
        ("without effect", &effects),
    ] {
        let (simulation, found) = load(text, &[]);
        assert_eq!(simulation.is_some(), what == "without effect", "{what}");
        said.push_str(&format!("{what}\n{found}\n"));
    }
    insta::assert_snapshot!("errors", said);
}

#[test]
fn a_host_that_comes_with_a_reload_is_known() {
    let text = scenario(
        "  duration: 2s\n  load: [{rate: 10, host: reviews}]\n  config: [a.yaml]\n  reload: [{at: 1s, config: [b.yaml]}]",
    );
    let (simulation, found) = load(&text, &[("a.yaml", ""), ("b.yaml", &service(1))]);
    assert_eq!(found, "");
    let report = simulation.unwrap().run().unwrap();
    assert_eq!((report.total.requests, failed(&report.total)), (20, vec![("UH", 10)]));
}
