//! Canaries by annotation: whole rollouts in virtual time, through the real dispatch, against upstreams in memory.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use mesh_core::config::{Compile as _, CompileContext, Role};
use mesh_core::{Body, ClusterName, Connect, ConnectTarget, Connecting, Slot};
use mesh_route::canary::{Canaries, CanaryPolicy, CanaryStatus, Cause, Phase, Totals};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, FaultLayer, RouteBuilder, RouteTable,
    SelectRouteLayer, Shard, UpstreamProtocol, dispatch, dump,
};
use mesh_testkit::scripted::{Reply, Scripted};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use tower::util::BoxCloneSyncService;
use tower::{ServiceBuilder, ServiceExt as _};

use super::support::{Client, Compiled, compile, get, reviews, rules, until};

const SPLIT: &str = "  - {route: [{destination: {host: reviews, subset: v1}, weight: 100}, {destination: {host: reviews, subset: v2}}]}\n";
const ROLLOUT: &str = "canary=v2; steps=20,50,100; interval=5s; min-duration=10s";

/// A virtual service with these annotations.
fn annotated(http: &str, annotations: &[(&str, &str)]) -> String {
    let text: Vec<_> = annotations.iter().map(|(name, value)| format!("mesh.rs/{name}: '{value}'")).collect();
    let written = format!("namespace: default, annotations: {{{}}}}}\n", text.join(", "));
    rules(http).replace("namespace: default}\n", &written)
}

/// `reviews` with `v1` and `v2` at the ports 1 and 2, and a canary by this annotation.
fn rollout(annotation: &str) -> Compiled {
    compile(&(reviews(&[1, 2]) + &annotated(SPLIT, &[("canary", annotation)])))
}

/// How a version answers: the share of failures, and its latency.
#[derive(Clone, Copy, Debug)]
struct Behaviour {
    failing: f64,
    latency: Duration,
}

const GOOD: Behaviour = Behaviour { failing: 0.0, latency: Duration::from_millis(10) };

/// Upstreams in memory by port: each answers with its name, after its latency, by a seed.
#[derive(Clone, Debug)]
struct Versions {
    of_port: [Behaviour; 2],
    rng: Arc<Mutex<SmallRng>>,
}

impl Versions {
    fn new(v1: Behaviour, v2: Behaviour, seed: u64) -> Self {
        Self { of_port: [v1, v2], rng: Arc::new(Mutex::new(SmallRng::seed_from_u64(seed))) }
    }
}

impl Connect for Versions {
    fn connect(&self, target: &ConnectTarget) -> Connecting {
        let port = target.addr.port();
        let Behaviour { failing, latency } = self.of_port[usize::from(port) - 1];
        let rng = Arc::clone(&self.rng);
        let (client, server) = tokio::io::duplex(64 * 1024);
        let answer = service_fn(move |_| {
            let (fails, jitter) = {
                let mut rng = rng.lock().unwrap();
                (rng.random::<f64>() < failing, rng.random_range(0.5..1.5))
            };
            async move {
                tokio::time::sleep(latency.mul_f64(jitter)).await;
                let mut response = Response::new(Full::new(bytes::Bytes::from(format!("v{port}"))));
                *response.status_mut() = if fails { 500 } else { 200 }.try_into().unwrap();
                Ok::<_, Infallible>(response)
            }
        });
        tokio::spawn(async move {
            // It ends with the client.
            let http1 = hyper::server::conn::http1::Builder::new();
            let _ = http1.serve_connection(TokioIo::new(server), answer).await;
        });
        Box::pin(async { io::Result::Ok(Box::new(client) as _) })
    }
}

/// A process: its state, and a worker for each client.
struct Mesh {
    clusters: Clusters,
    canaries: Canaries,
    versions: Versions,
}

impl Mesh {
    /// Its canaries are driven in the background.
    fn start(v1: Behaviour, v2: Behaviour, seed: u64) -> Self {
        let canaries = Canaries::new();
        tokio::spawn(canaries.clone().run());
        Self { clusters: Clusters::new(), canaries, versions: Versions::new(v1, v2, seed) }
    }

    /// Publishes a configuration; the client is that of one worker.
    fn publish(&self, it: &Compiled) -> impl Fn(u64) -> Client + use<> {
        self.clusters.reconcile(it.table.clusters());
        self.canaries.reconcile(&it.table);
        let (table, versions) = (Arc::clone(&it.table), self.versions.clone());
        move |seed| {
            let stack = ServiceBuilder::new()
                .layer(SelectRouteLayer::new(Slot::fixed_shared(Arc::clone(&table))))
                .layer(FaultLayer::seeded(seed))
                .service(dispatch(Shard::connecting_by(seed, Arc::new(versions.clone()))));
            BoxCloneSyncService::new(stack)
        }
    }

    fn status(&self) -> CanaryStatus {
        let [status] = &self.canaries.status()[..] else { panic!("{:?}", self.canaries.status()) };
        status.clone()
    }

    /// Sends a request every 10 ms until the rollout has ended.
    async fn until_the_end(&self, client: &Client) -> CanaryStatus {
        self.until(client, |status| status.phase != Phase::Running).await;
        self.status()
    }

    /// Sends a request every 10 ms until the canary has this share.
    async fn until_share(&self, client: &Client, share: u8) {
        self.until(client, |status| status.share >= share).await;
    }

    /// For at most five minutes.
    async fn until(&self, client: &Client, condition: impl Fn(&CanaryStatus) -> bool) {
        for _ in 0..30_000 {
            if condition(&self.status()) {
                return;
            }
            tokio::spawn(ask(client.clone(), get("http://reviews/")));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not within five minutes: {:?}", self.status());
    }
}

/// The version that answers.
async fn ask(client: Client, request: Request<Body>) -> String {
    let response = client.oneshot(request).await.unwrap();
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

async fn ask_often(client: &Client, times: u32) -> [u32; 2] {
    let mut seen = [0; 2];
    for _ in 0..times {
        seen[usize::from(ask(client.clone(), get("http://reviews/")).await == "v2")] += 1;
    }
    seen
}

fn shares(status: &CanaryStatus) -> Vec<u8> {
    status.events.iter().map(|event| event.share).collect()
}

#[tokio::test(start_paused = true)]
async fn vs_r05_a_good_canary_is_promoted_step_by_step() {
    let mesh = Mesh::start(GOOD, GOOD, 1);
    let client = mesh.publish(&rollout(ROLLOUT))(1);
    assert_eq!((mesh.status().share, mesh.status().phase), (20, Phase::Running), "the first step at once");
    let [_, canary] = ask_often(&client, 1000).await;
    assert!((160..240).contains(&canary), "{canary}");
    let end = mesh.until_the_end(&client).await;
    assert_eq!((end.phase, end.share), (Phase::Promoted, 100));
    assert_eq!(shares(&end), [50, 100, 100]);
    assert!(end.events.iter().all(|event| event.cause == Cause::Passed));
    let first = &end.events[0];
    assert!(first.canary.requests() >= 100 && first.stable.requests() > first.canary.requests());
    let mean = first.canary.mean_latency().unwrap();
    assert!((Duration::from_millis(9)..Duration::from_millis(12)).contains(&mean), "{mean:?}");
    assert!(end.events.is_sorted_by(|one, next| next.at - one.at >= Duration::from_secs(10)));
    assert_eq!(ask_often(&client, 1000).await, [0, 1000], "all of it, exactly");
    assert_eq!((mesh.canaries.passed(), mesh.canaries.promoted(), mesh.canaries.rolled_back()), (2, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn vs_r05_a_canary_that_fails_in_5_percent_is_rolled_back_and_never_promoted() {
    for seed in 0..5 {
        let mesh = Mesh::start(GOOD, Behaviour { failing: 0.05, ..GOOD }, seed);
        let client = mesh.publish(&rollout(ROLLOUT))(seed);
        let end = mesh.until_the_end(&client).await;
        assert_eq!((end.phase, end.share), (Phase::RolledBack, 0), "{seed}");
        let event = end.events.last().unwrap();
        assert!(matches!(event.cause, Cause::Failures(ratio) if ratio >= 100.0), "{event}");
        println!("seed {seed}: after {} of {} requests: {event}", end.canary_total.failures, {
            end.canary_total.successes + end.canary_total.failures
        });
        assert_eq!(ask_often(&client, 1000).await, [1000, 0], "nobody, exactly");
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(mesh.status().share, 0, "for good");
    }
}

#[tokio::test(start_paused = true)]
async fn vs_r05_a_slow_canary_is_rolled_back() {
    let slow = Behaviour { latency: Duration::from_millis(20), ..GOOD };
    let mesh = Mesh::start(GOOD, slow, 1);
    let client = mesh.publish(&rollout(ROLLOUT))(1);
    let end = mesh.until_the_end(&client).await;
    assert_eq!((end.phase, end.share), (Phase::RolledBack, 0));
    let event = end.events.last().unwrap();
    assert!(matches!(event.cause, Cause::Latency(factor) if (1.8..2.2).contains(&factor)), "{event}");
    // Where it may be so slow, it is good.
    let mesh = Mesh::start(GOOD, slow, 1);
    let client = mesh.publish(&rollout(&format!("{ROLLOUT}; latency-factor=3")))(1);
    assert_eq!(mesh.until_the_end(&client).await.phase, Phase::Promoted);
}

#[tokio::test(start_paused = true)]
async fn vs_r05_a_canary_that_does_not_answer_in_time_is_rolled_back() {
    let mesh = Mesh::start(GOOD, Behaviour { latency: Duration::from_secs(3600), ..GOOD }, 1);
    let http = SPLIT.replace("- {", "- {timeout: 1s, ");
    let client = mesh.publish(&compile(&(reviews(&[1, 2]) + &annotated(&http, &[("canary", ROLLOUT)]))))(1);
    for _ in 0..1000 {
        let client = client.clone();
        tokio::spawn(async move { whole(&client, "http://reviews/").await });
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let status = mesh.status();
    assert_eq!((status.phase, status.share), (Phase::RolledBack, 0));
    assert_eq!(status.canary_total.successes, 0);
}

#[tokio::test(start_paused = true)]
async fn vs_r05_a_canary_that_breaks_when_it_is_alone_is_rolled_back() {
    let mesh = Mesh::start(GOOD, GOOD, 1);
    let client = mesh.publish(&rollout(ROLLOUT))(1);
    mesh.until_share(&client, 100).await;
    let broken = Mesh { versions: Versions::new(GOOD, Behaviour { failing: 0.5, ..GOOD }, 1), ..mesh };
    let client = broken.publish(&rollout(ROLLOUT))(2);
    let end = broken.until_the_end(&client).await;
    assert_eq!((shares(&end), end.phase), (vec![50, 100, 0], Phase::RolledBack));
    assert_eq!(ask_often(&client, 500).await, [500, 0]);
}

#[tokio::test(start_paused = true)]
async fn vs_r05_few_requests_decide_nothing() {
    let mesh = Mesh::start(GOOD, Behaviour { failing: 1.0, ..GOOD }, 1);
    let client = mesh.publish(&rollout(ROLLOUT))(1);
    let [stable, canary] = ask_often(&client, 6).await;
    assert!(canary > 0);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let status = mesh.status();
    assert_eq!((status.phase, status.share, status.events.len()), (Phase::Running, 20, 0));
    let seen = (u64::from(canary), u64::from(stable));
    assert_eq!((status.canary.failures, status.stable.successes), seen);
    // But no more of them than it takes to be sure.
    ask_often(&client, 40).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(mesh.status().phase, Phase::RolledBack, "{:?}", mesh.status());
}

#[tokio::test(start_paused = true)]
async fn vs_r05_a_reload_keeps_the_share_and_another_definition_begins_anew() {
    let mesh = Mesh::start(GOOD, GOOD, 1);
    let before = mesh.publish(&rollout(ROLLOUT))(1);
    mesh.until_share(&before, 50).await;
    ask_often(&before, 100).await;
    let kept = mesh.status();
    // The same rollout, in a configuration that has changed elsewhere, and is written otherwise.
    let yaml = reviews(&[1, 2])
        + &annotated(
            &SPLIT.replace("weight: 100", "weight: 70").replace("- {", "- {timeout: 5s, "),
            &[("canary", "steps=20,50,100;interval=5s;min-duration=10s;canary=v2")],
        );
    let after = mesh.publish(&compile(&yaml))(2);
    let status = mesh.status();
    assert_eq!((status.share, status.step, status.since), (50, 1, kept.since));
    assert_eq!((status.canary_total, status.events.len()), (kept.canary_total, 1));
    // Requests of both generations count.
    let seen = [ask_often(&before, 200).await, ask_often(&after, 200).await];
    let counted = |totals: Totals| totals.successes + totals.failures;
    let counted = counted(mesh.status().canary_total) - counted(kept.canary_total);
    assert_eq!(counted, u64::from(seen[0][1] + seen[1][1]));
    assert!(seen.iter().all(|seen| (70..130).contains(&seen[1])), "{seen:?}");

    for other in [
        reviews(&[1, 2]) + &annotated(SPLIT, &[("canary", &format!("{ROLLOUT}; run=2"))]),
        reviews(&[1, 2]) + &annotated(SPLIT, &[("canary", "canary=v2; steps=20,100")]),
        reviews(&[1, 2]).replace("labels: {version: v2}}]}", "labels: {version: v2, build: a}}]}")
            + &annotated(SPLIT, &[("canary", ROLLOUT)]),
    ] {
        drop(mesh.publish(&compile(&other)));
        let status = mesh.status();
        let anew = (status.share, status.step, status.events.len(), status.canary_total);
        assert_eq!(anew, (20, 0, 0, Totals::default()), "{:?}", status.spec);
    }
    // Without the annotation there is no canary.
    drop(mesh.publish(&compile(&(reviews(&[1, 2]) + &rules(SPLIT)))));
    assert!(mesh.canaries.status().is_empty());
}

#[tokio::test(start_paused = true)]
async fn vs_r05_what_was_rolled_back_stays_so_until_it_is_defined_otherwise() {
    let mesh = Mesh::start(GOOD, Behaviour { failing: 0.5, ..GOOD }, 1);
    let client = mesh.publish(&rollout(ROLLOUT))(1);
    assert_eq!(mesh.until_the_end(&client).await.phase, Phase::RolledBack);
    let client = mesh.publish(&rollout(ROLLOUT))(2);
    assert_eq!((mesh.status().phase, mesh.status().share), (Phase::RolledBack, 0));
    assert_eq!(ask_often(&client, 500).await, [500, 0]);
    let mended = Mesh { versions: Versions::new(GOOD, GOOD, 1), ..mesh };
    let client = mended.publish(&rollout(&format!("{ROLLOUT}; run=2")))(3);
    assert_eq!(mended.until_the_end(&client).await.phase, Phase::Promoted);
}

#[tokio::test(start_paused = true)]
async fn vs_r05_workers_share_one_rollout() {
    let mesh = Mesh::start(GOOD, Behaviour { failing: 0.3, ..GOOD }, 1);
    let worker = mesh.publish(&rollout(ROLLOUT));
    let workers = [worker(1), worker(2)];
    let mut seen = [0; 2];
    for client in &workers {
        let [stable, canary] = ask_often(client, 300).await;
        assert!((35..85).contains(&canary), "{canary}");
        (seen[0], seen[1]) = (seen[0] + u64::from(stable), seen[1] + u64::from(canary));
    }
    let Totals { successes, failures } = mesh.status().canary_total;
    assert_eq!((mesh.status().stable_total.successes, successes + failures), (seen[0], seen[1]));
    assert!(failures > 0);
    // What one of them sees takes the canary back for both.
    mesh.until_the_end(&workers[0]).await;
    assert_eq!(mesh.status().phase, Phase::RolledBack);
    for client in &workers {
        assert_eq!(ask_often(client, 200).await, [200, 0]);
    }
}

#[tokio::test(start_paused = true)]
async fn vs_r05_only_those_who_must_move_do_as_the_share_moves() {
    let mesh = Mesh::start(GOOD, GOOD, 1);
    let annotations = [("canary", ROLLOUT), ("sticky-split", "header:x-user")];
    let it = compile(&(reviews(&[1, 2]) + &annotated(SPLIT, &annotations)));
    let client = mesh.publish(&it)(1);
    let ask_as =
        |user: u32| Request::get("http://reviews/").header("x-user", user).body(Body::empty()).unwrap();
    let on_canary = async || {
        let mut users = BTreeSet::new();
        for user in 0..400 {
            if ask(client.clone(), ask_as(user)).await == "v2" {
                users.insert(user);
            }
        }
        users
    };
    let mut before = BTreeSet::new();
    for (share, expected) in [(20, 50..110), (50, 160..240), (100, 400..401)] {
        mesh.until_share(&client, share).await;
        let after = on_canary().await;
        assert!(expected.contains(&after.len()), "{share} %: {}", after.len());
        assert!(after.is_superset(&before), "nobody leaves the canary while it grows");
        let explained = it.explain(&ask_as(7)).to_json();
        let chosen =
            explained["decision"]["forward"].as_array().unwrap().iter().find(|to| to["chosen"] == true);
        assert_eq!(chosen.unwrap()["subset"] == "v2", after.contains(&7));
        before = after;
    }
}

#[tokio::test(start_paused = true)]
async fn vs_r05_explain_and_dumps_show_the_share() {
    let mesh = Mesh::start(GOOD, Behaviour { failing: 1.0, ..GOOD }, 1);
    let it = rollout(ROLLOUT);
    let weights = |it: &Compiled| -> Vec<_> {
        let shown = it.ask("http://reviews/").to_json();
        shown["decision"]["forward"].as_array().unwrap().iter().map(|to| to["weight"].clone()).collect()
    };
    assert_eq!(weights(&it), [100, 0], "before a process has it, the weights of the rule hold");
    assert_eq!(it.ask("http://reviews/").to_json()["decision"]["canary"], json!(null));
    let client = mesh.publish(&it)(1);
    assert_eq!(weights(&it), [80, 20]);
    let shown = it.ask("http://reviews/").to_json();
    let canary = json!({"name": "default/reviews", "share": 20, "phase": "running"});
    assert_eq!(shown["decision"]["canary"], canary);
    assert!(it.ask("http://reviews/").to_string().contains("canary default/reviews: 20 %, running"));
    mesh.until_the_end(&client).await;
    assert_eq!(weights(&it), [100, 0]);
    let dump = dump::canaries(&mesh.canaries);
    let canary = &dump["canaries"][0];
    assert_eq!((&canary["share"], &canary["phase"]), (&json!(0), &json!("rolled_back")));
    assert_eq!(canary["canary"], "reviews.default.svc.cluster.local v2 version=v2");
    assert_eq!(canary["stable"], "reviews.default.svc.cluster.local v1 version=v1");
    assert!(canary["evidence"]["likelihood_ratio"].as_f64().unwrap() >= 100.0, "{canary}");
    let event = &canary["events"][0];
    assert!(event["what"].as_str().unwrap().starts_with("rolled back, now 0 %: it is "), "{event}");
    assert_eq!((&event["share"], &event["canary"]["successes"]), (&json!(0), &json!(0)));
    assert!(event["canary"]["failures"].as_u64().unwrap() > 1, "{event}");
    assert_eq!(
        dump::routes(&it.table)["virtual_hosts"][0]["routes"][0]["action"]["canary"],
        "default/reviews"
    );
}

/// Two upstreams that do what a script says, and a canary that gets everything; what was counted of it after each call.
async fn counted(
    protocol: UpstreamProtocol,
    script: impl Fn(&mesh_testkit::scripted::Seen) -> Reply + Send + Sync + 'static,
    change: impl Fn(&mut ClusterSpec),
    route: impl FnOnce(RouteBuilder) -> RouteBuilder,
) -> (Client, impl Fn() -> (u64, u64), Scripted) {
    let up = Scripted::start("v2", script).await;
    let cluster = |name: &str| {
        let endpoints = Discovery::Static(vec![EndpointSpec::new(up.addr)]);
        let mut spec = ClusterSpec::new(ClusterName::custom(name), endpoints);
        spec.protocol = protocol;
        change(&mut spec);
        Arc::new(Cluster::new(spec))
    };
    let policy = CanaryPolicy { steps: vec![100], ..CanaryPolicy::default() };
    let route = route(RouteBuilder::new("all").canary(Duration::from_secs(1), policy));
    let route = route.split([(1, cluster("v1")), (0, cluster("v2"))]).unwrap();
    let table = RouteTable::builder().host("*", [route]).build().unwrap();
    let canaries = Canaries::new();
    canaries.reconcile(&table);
    Clusters::new().reconcile(table.clusters());
    let stack = ServiceBuilder::new()
        .layer(SelectRouteLayer::new(Slot::fixed(table)))
        .layer(FaultLayer::seeded(1))
        .service(dispatch(Shard::seeded(1)));
    let totals = move || {
        let Totals { successes, failures } = canaries.status()[0].canary_total;
        (successes, failures)
    };
    (BoxCloneSyncService::new(stack), totals, up)
}

/// Sends one and reads what comes.
async fn whole(client: &Client, url: &str) {
    if let Ok(response) = client.clone().oneshot(get(url)).await {
        let _ = response.into_body().collect().await;
    }
}

#[tokio::test]
async fn vs_r05_what_counts_as_a_failure() {
    let replies = [
        (Reply::Status(200), (1, 0)),
        (Reply::Status(404), (2, 0)),
        (Reply::Status(500), (2, 1)),
        (Reply::Status(503), (2, 2)),
        (Reply::TrailersOnly(0), (3, 2)),
        (Reply::TrailersOnly(5), (4, 2)),
        (Reply::TrailersOnly(14), (4, 3)),
        (Reply::TrailersOnly(1), (4, 3)),
        (Reply::LateStatus(0), (5, 3)),
        (Reply::LateStatus(13), (5, 4)),
        (Reply::LateStatus(8), (6, 4)),
        (Reply::Reset, (6, 5)),
    ];
    let script = replies.clone();
    let script = move |seen: &mesh_testkit::scripted::Seen| script[seen.nth - 1].0.clone();
    let (client, totals, _up) = counted(UpstreamProtocol::Http2, script, |_| {}, |route| route).await;
    for (reply, expected) in replies {
        whole(&client, "http://up/").await;
        assert_eq!(totals(), expected, "{reply:?}");
    }
}

#[tokio::test]
async fn vs_r05_a_response_that_breaks_off_is_a_failure_and_one_that_is_dropped_is_nothing() {
    let (client, totals, _up) = counted(
        UpstreamProtocol::Http1,
        |_| Reply::Stall,
        |_| {},
        |route| route.idle_timeout(Duration::from_millis(100)),
    )
    .await;
    whole(&client, "http://up/").await;
    assert_eq!(totals(), (0, 1));
    let response = client.clone().oneshot(get("http://up/")).await.unwrap();
    drop(response);
    assert_eq!(totals(), (0, 1));
}

#[tokio::test]
async fn vs_r05_what_says_nothing_of_a_version_is_not_counted() {
    // A client that leaves, and a limit of ours.
    let (client, totals, up) =
        counted(UpstreamProtocol::Http1, |_| Reply::Hang, |spec| spec.pool.max_requests = 1, |r| r).await;
    let held = tokio::spawn(client.clone().oneshot(get("http://up/")));
    until(|| up.requests() == 1).await;
    let refused = client.clone().oneshot(get("http://up/")).await.unwrap_err();
    assert_eq!(refused.flags().to_string(), "UO");
    held.abort();
    let _ = held.await;
    assert_eq!(totals(), (0, 0));
    // Faults of ours, for a request and for a try.
    for scope in [mesh_route::FaultScope::PerRequest, mesh_route::FaultScope::PerTry] {
        let mut fault = mesh_route::Fault::new();
        fault = fault.abort_http(500, mesh_route::Percentage::from_percent(100.0)).unwrap();
        fault.scope = scope;
        let (client, totals, up) =
            counted(UpstreamProtocol::Http1, |_| Reply::Status(200), |_| {}, |r| r.fault(fault)).await;
        whole(&client, "http://up/").await;
        assert_eq!((totals(), up.requests()), ((0, 0), 0));
    }
    // But where there is nobody to answer, the version fails.
    let (client, totals, _up) = counted(
        UpstreamProtocol::Http1,
        |_| Reply::Status(200),
        |spec| spec.discovery = Discovery::Static(Vec::new()),
        |r| r,
    )
    .await;
    whole(&client, "http://up/").await;
    assert_eq!(totals(), (0, 1));
}

#[test]
fn vs_r05_what_is_wrong_with_a_canary_is_said_where_it_is() {
    let named = |name: &str| {
        SPLIT.replace("- {", &format!("- {{name: {name}, match: [{{uri: {{prefix: /{name}}}}}], "))
    };
    let both = named("a") + &named("b");
    let three = SPLIT.replace("]}\n", ", {destination: {host: reviews}}]}\n");
    let alike = SPLIT.replace("subset: v1", "subset: v2");
    let one = "  - {route: [{destination: {host: reviews}}]}\n";
    let at = "metadata.annotations[\"mesh.rs/canary\"]";
    for (http, canary, path, reason) in [
        (SPLIT, "v2", at, "v2: KEY=VALUE is wanted"),
        (SPLIT, "canary=v2; steps=50,20", at, "steps: the shares grow"),
        (SPLIT, "canary=v3", at, "canary=v3: no destination has this subset or host"),
        (SPLIT, "canary=reviews", at, "canary=reviews: both destinations"),
        (&alike, "canary=v2", at, "canary=v2: both destinations"),
        (SPLIT, "canary=v2; rule=other", at, "no HTTP rule is called \"other\""),
        (one, "canary=v2", at, "no HTTP rule has two destinations"),
        (&both, "canary=v2", at, "several HTTP rules have two destinations: add rule=NAME"),
        (&three, "canary=v2", "spec.http[0].route", "exactly two destinations, not 3"),
    ] {
        let yaml = reviews(&[1, 2]) + &annotated(http, &[("canary", canary)]);
        let file = mesh_core::istio::SourceFile::new("<test>", yaml.as_str());
        let (set, mut diags) = mesh_core::istio::ResourceSet::load(&[file], &Default::default());
        assert!(!diags.has_errors(), "{diags}");
        RouteTable::compile(&set, &CompileContext::new(Role::Sidecar), &mut diags).unwrap();
        let found: Vec<_> = diags.iter().filter(|d| d.path == path && d.message.contains(reason)).collect();
        assert_eq!(found.len(), 1, "{canary}: {diags}");
        assert!(found[0].position.is_some(), "{diags}");
    }
    // In a delegate it says nothing, but rules of a delegate are rolled out like any.
    let delegate = |annotation: &str| {
        let route = annotated(SPLIT, &[("canary", annotation)]).replace("  hosts: [reviews]\n", "");
        route.replace("name: reviews,", "name: inner,")
    };
    let root = |annotation: &str| {
        let rule = "  - {match: [{uri: {prefix: /a}}], delegate: {name: inner}}\n  - {route: [{destination: {host: reviews}}]}\n";
        annotated(rule, &[("canary", annotation)])
    };
    let services = reviews(&[1, 2]);
    let it = compile(&(services.clone() + &delegate("canary=v1") + &root("canary=v2")));
    it.warns(at, "has no effect in a delegate");
    Canaries::new().reconcile(&it.table);
    let of = |url: &str| it.ask(url).to_json()["decision"]["canary"]["share"].clone();
    assert_eq!((of("http://reviews/a"), of("http://reviews/b")), (json!(5), json!(null)));

    let it = compile(&(services + &annotated(&both, &[("canary", "canary=v2; rule=b")])));
    let canaries = Canaries::new();
    canaries.reconcile(&it.table);
    let names: Vec<_> = canaries.status().iter().map(|status| status.spec.name.to_string()).collect();
    assert_eq!(names, ["default/reviews/b"]);
    let of = |url: &str| it.ask(url).to_json()["decision"]["canary"]["name"].clone();
    assert_eq!((of("http://reviews/a"), of("http://reviews/b")), (json!(null), json!("default/reviews/b")));
}

#[test]
fn vs_r05_a_canary_may_be_another_host_and_stand_first() {
    let other = super::support::service_in("default", "reviews-next", &[3]);
    let http = "  - {route: [{destination: {host: reviews-next}}, {destination: {host: reviews, subset: v1}, weight: 100}]}\n";
    let it = compile(&(reviews(&[1, 2]) + &other + &annotated(http, &[("canary", "canary=reviews-next")])));
    let canaries = Canaries::new();
    canaries.reconcile(&it.table);
    let shown = it.ask("http://reviews/").to_json();
    let to = shown["decision"]["forward"].as_array().unwrap();
    assert_eq!((&to[0]["weight"], &to[1]["weight"]), (&json!(5), &json!(95)));
    assert_eq!(&*canaries.status()[0].spec.canary, "reviews-next.default.svc.cluster.local");
}
