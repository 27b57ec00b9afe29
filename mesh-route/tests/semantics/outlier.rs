//! `outlierDetection`: DR-OD01 to DR-OD08, and what does not feed it.

use std::time::Duration;

use mesh_route::OutlierDetection;
use mesh_testkit::scripted::{Reply, Scripted};
use tower::ServiceExt as _;

use crate::support::*;

const REVIEWS: &str = "outbound|80||reviews.default.svc.cluster.local";

fn yaml(upstreams: &[u16], policy: &str) -> String {
    service_in("default", "reviews", upstreams)
        + &resource("DestinationRule", "policy", &format!("{{host: reviews, trafficPolicy: {policy}}}"))
}

fn settings(detection: &str) -> OutlierDetection {
    let it = compile(&yaml(&[1], &format!("{{outlierDetection: {detection}}}")));
    assert_eq!(it.unenforced(), [] as [&str; 0], "{detection}");
    it.spec(REVIEWS).outlier_detection.map(|boxed| *boxed).unwrap()
}

async fn status(client: &Client) -> u16 {
    match client.clone().oneshot(get("http://reviews/")).await {
        Ok(response) => response.status().as_u16(),
        Err(error) => error.status().as_u16(),
    }
}

impl Compiled {
    /// Whether the endpoint at this port is left out.
    fn is_ejected(&self, port: u16) -> bool {
        let cluster = self.cluster(REVIEWS);
        cluster.runtime().unwrap().with_outliers(|_| ());
        let endpoints = cluster.endpoints();
        endpoints.iter().find(|endpoint| endpoint.addr().port() == port).unwrap().is_ejected()
    }

    fn events(&self) -> Vec<String> {
        self.cluster(REVIEWS)
            .runtime()
            .unwrap()
            .with_outliers(|detector| detector.events().map(|event| event.kind.to_string()).collect())
    }
}

#[test]
fn dr_od01_to_od06_defaults_and_fields() {
    let it = compile(&service_in("default", "reviews", &[1]));
    assert_eq!(it.spec(REVIEWS).outlier_detection, None, "absent is off");
    assert_eq!(settings("{interval: 10s}"), OutlierDetection::default());
    assert_eq!(
        settings(
            "{consecutive5xxErrors: 7, consecutiveGatewayErrors: 3, interval: 1s, baseEjectionTime: 2s, maxEjectionPercent: 50}"
        ),
        OutlierDetection {
            consecutive_5xx: 7,
            consecutive_gateway: 3,
            interval: Duration::from_secs(1),
            base_ejection_time: Duration::from_secs(2),
            max_ejection_percent: 50,
            ..OutlierDetection::default()
        }
    );
    assert_eq!(settings("{consecutive5xxErrors: 0}").consecutive_5xx, 0, "0 is off");
    let legacy = settings("{consecutiveErrors: 3}");
    assert_eq!((legacy.consecutive_5xx, legacy.consecutive_gateway), (0, 3));
    let split = settings("{splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 2}");
    assert!(split.split_local_origin && split.consecutive_local_origin == 2);
    assert_eq!(settings("{outlierDetectionHttpErrorCodes: [429]}").error_codes, [429]);
}

#[tokio::test(start_paused = true)]
async fn dr_od02_an_endpoint_that_fails_is_left_out_and_comes_back_in_time() {
    let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
    let good = Scripted::start("good", |_| Reply::Status(200)).await;
    let detection = "{outlierDetection: {consecutive5xxErrors: 3, maxEjectionPercent: 100, baseEjectionTime: 30s}, loadBalancer: {simple: ROUND_ROBIN}}";
    let it = compile(&yaml(&[bad.addr.port(), good.addr.port()], detection));
    let client = it.client();
    let mut failed = 0;
    while !it.is_ejected(bad.addr.port()) {
        failed += u32::from(status(&client).await == 500);
        assert!(failed <= 3);
    }
    assert_eq!(failed, 3, "A6: as many failures as the threshold, no more");
    let ejected_at = tokio::time::Instant::now();
    for _ in 0..20 {
        assert_eq!(status(&client).await, 200);
    }
    tokio::time::sleep_until(ejected_at + Duration::from_millis(29_999)).await;
    assert!(it.is_ejected(bad.addr.port()));
    tokio::time::sleep_until(ejected_at + Duration::from_millis(30_001)).await;
    assert!(!it.is_ejected(bad.addr.port()), "exactly the base time");
    assert_eq!(it.events().len(), 2, "{:?}", it.events());
    while !it.is_ejected(bad.addr.port()) {
        status(&client).await;
    }
    assert!(it.events()[2].contains("60s (time 2 in a row)"), "{:?}", it.events());
}

#[tokio::test(start_paused = true)]
async fn dr_od03_no_more_than_the_share_is_left_out() {
    let one = Scripted::start("one", |_| Reply::Status(500)).await;
    let two = Scripted::start("two", |_| Reply::Status(500)).await;
    let ports = [one.addr.port(), two.addr.port()];
    let it = compile(&yaml(&ports, "{outlierDetection: {consecutive5xxErrors: 1, maxEjectionPercent: 50}}"));
    let client = it.client();
    for _ in 0..20 {
        assert_eq!(status(&client).await, 500);
    }
    assert_eq!(ports.iter().filter(|port| it.is_ejected(**port)).count(), 1);
    assert!(it.events().iter().any(|event| event.starts_with("not ejected")), "{:?}", it.events());
}

#[tokio::test(start_paused = true)]
async fn dr_od04_without_panic_threshold_nobody_is_503_uh() {
    let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
    let detection = "{consecutive5xxErrors: 1, maxEjectionPercent: 100}";
    let it = compile(&yaml(&[bad.addr.port()], &format!("{{outlierDetection: {detection}}}")));
    let client = it.client();
    assert_eq!(status(&client).await, 500);
    assert_eq!(fail(&client, get("http://reviews/")).await, "503 UH no_healthy_upstream");
    let detection = "{consecutive5xxErrors: 1, maxEjectionPercent: 100, minHealthPercent: 50}";
    let it = compile(&yaml(&[bad.addr.port()], &format!("{{outlierDetection: {detection}}}")));
    let client = it.client();
    for _ in 0..3 {
        assert_eq!(status(&client).await, 500, "below the threshold everybody is used");
    }
}

#[tokio::test(start_paused = true)]
async fn dr_od05_what_cannot_be_reached_counts() {
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let detection = "{outlierDetection: {splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 2, maxEjectionPercent: 100}}";
    let it = compile(&yaml(&[closed], detection));
    // Istio's default retries connect failures, so one request is enough.
    assert_eq!(status(&it.client()).await, 503);
    assert!(it.is_ejected(closed));
    assert!(it.events()[0].contains("2 consecutiveLocalOriginFailures"), "{:?}", it.events());
}

#[tokio::test(start_paused = true)]
async fn dr_od05_a_timeout_of_the_route_counts() {
    let silent = Scripted::start("silent", |_| Reply::Hang).await;
    let policy = "{outlierDetection: {consecutive5xxErrors: 2, maxEjectionPercent: 100}}";
    let it = compile(
        &(yaml(&[silent.addr.port()], policy)
            + &rules("  - {route: [{destination: {host: reviews}}], timeout: 1s}")),
    );
    let client = it.client();
    for _ in 0..2 {
        assert_eq!(status(&client).await, 504);
    }
    assert!(it.is_ejected(silent.addr.port()), "{:?}", it.events());
}

#[tokio::test(start_paused = true)]
async fn dr_od07_a_grpc_status_in_the_headers_counts() {
    let bad = Scripted::start("bad", |_| Reply::TrailersOnly(14)).await;
    let policy = "{connectionPool: {http: {h2UpgradePolicy: UPGRADE}}, outlierDetection: {consecutiveGatewayErrors: 2, maxEjectionPercent: 100}}";
    let once = rules("  - {route: [{destination: {host: reviews}}], retries: {attempts: 0}}");
    let it = compile(&(yaml(&[bad.addr.port()], policy) + &once));
    let client = it.client();
    for _ in 0..2 {
        assert_eq!(status(&client).await, 200);
    }
    assert!(it.is_ejected(bad.addr.port()), "{:?}", it.events());
}

#[tokio::test(start_paused = true)]
async fn dr_cp04_what_a_limit_refuses_is_no_failure_of_an_endpoint() {
    let up = Scripted::start("up", |_| Reply::Hang).await;
    let policy = "{connectionPool: {http: {http2MaxRequests: 1}}, outlierDetection: {consecutive5xxErrors: 1, maxEjectionPercent: 100}}";
    let it = compile(&yaml(&[up.addr.port()], policy));
    let client = it.client();
    let held = tokio::spawn(client.clone().oneshot(get("http://reviews/")));
    mesh_testkit::until("the first request", async || up.requests() == 1).await;
    for _ in 0..10 {
        let error = client.clone().oneshot(get("http://reviews/")).await.unwrap_err();
        assert_eq!((error.status().as_u16(), error.flags().to_string().as_str()), (503, "UO"));
        assert_eq!(error.headers()["x-envoy-overloaded"], "true");
    }
    held.abort();
    assert!(held.await.unwrap_err().is_cancelled());
    assert!(!it.is_ejected(up.addr.port()), "and what a client cancelled is none either");
    assert_eq!(it.cluster(REVIEWS).runtime().unwrap().overflows(), 10);
}

#[tokio::test(start_paused = true)]
async fn failures_that_two_workers_see_make_one_ejection() {
    let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
    let policy = "{outlierDetection: {consecutive5xxErrors: 6, maxEjectionPercent: 100}}";
    let it = compile(&yaml(&[bad.addr.port()], policy));
    let workers = [it.client_seeded(1), it.client_seeded(2)];
    for at in 0..6 {
        assert!(!it.is_ejected(bad.addr.port()));
        status(&workers[at % 2]).await;
    }
    assert!(it.is_ejected(bad.addr.port()));
    assert_eq!(it.events().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn one_pending_request_is_one_with_any_number_of_workers() {
    let up = Scripted::start("up", |_| Reply::Hang).await;
    let policy = "{connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}}";
    let it = compile(&yaml(&[up.addr.port()], policy));
    let runtime = it.cluster(REVIEWS);
    // A worker without a connection to the endpoint may always open one, so each has one first.
    let workers: Vec<_> = (0..3).map(|seed| it.client_seeded(seed)).collect();
    let mut held = tokio::task::JoinSet::new();
    for (at, worker) in workers.iter().enumerate() {
        held.spawn(worker.clone().oneshot(get("http://reviews/")));
        mesh_testkit::until("a request of each worker", async || up.requests() == at + 1).await;
    }
    let runtime = runtime.runtime().unwrap();
    held.spawn(workers[0].clone().oneshot(get("http://reviews/")));
    mesh_testkit::until("one that waits", async || runtime.pending() == 1).await;
    for worker in &workers {
        let error = worker.clone().oneshot(get("http://reviews/")).await.unwrap_err();
        assert_eq!(error.flags().to_string(), "UO");
    }
}

/// Sends requests until the endpoint is ejected; how many that took, `None` when more than ten.
async fn until_ejected(detection: &str, script: fn(usize) -> u16) -> Option<usize> {
    let up = Scripted::start("up", move |seen| Reply::Status(script(seen.nth))).await;
    let policy = format!("{{outlierDetection: {{{detection}, maxEjectionPercent: 100}}}}");
    let it = compile(&yaml(&[up.addr.port()], &policy));
    let client = it.client();
    for count in 1..=10 {
        status(&client).await;
        if it.is_ejected(up.addr.port()) {
            return Some(count);
        }
    }
    None
}

#[tokio::test(start_paused = true)]
async fn dr_od01_which_answers_in_a_row_eject() {
    for (detection, script, expected) in [
        ("interval: 10s", (|_| 500) as fn(usize) -> u16, Some(5)),
        ("consecutive5xxErrors: 3", |_| 500, Some(3)),
        ("consecutive5xxErrors: 0", |_| 500, None),
        ("consecutive5xxErrors: 3", |nth| if nth % 3 == 0 { 200 } else { 500 }, None),
        ("consecutiveGatewayErrors: 2", |_| 502, Some(2)),
        ("consecutiveGatewayErrors: 2, consecutive5xxErrors: 0", |_| 500, None),
        // What is a gateway's error is a 5xx too: the greater number of the two has no effect.
        ("consecutiveGatewayErrors: 4, consecutive5xxErrors: 3", |_| 503, Some(3)),
    ] {
        assert_eq!(until_ejected(detection, script).await, expected, "{detection}");
    }
}

#[tokio::test(start_paused = true)]
async fn dr_od06_what_an_error_is_can_be_said() {
    let codes = "consecutive5xxErrors: 2, outlierDetectionHttpErrorCodes: [429]";
    assert_eq!(until_ejected(codes, |_| 429).await, Some(2));
    assert_eq!(until_ejected(codes, |_| 500).await, None, "and then nothing else is one");
}

#[tokio::test(start_paused = true)]
async fn dr_od08_every_ejection_has_its_evidence() {
    let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
    let policy =
        "{outlierDetection: {consecutive5xxErrors: 2, maxEjectionPercent: 100, minHealthPercent: 50}}";
    let it = compile(&yaml(&[bad.addr.port()], policy));
    let client = it.client();
    status(&client).await;
    status(&client).await;
    let shown = mesh_route::dump::clusters(it.table.clusters());
    let cluster = shown["clusters"].as_array().unwrap().iter().find(|one| one["name"] == REVIEWS).unwrap();
    let outliers = &cluster["outlier_detection"];
    assert_eq!((&outliers["ejected"], &outliers["ejections"]), (&1.into(), &1.into()), "{outliers}");
    let event = &outliers["events"][0];
    assert_eq!(event["endpoint"], bad.addr.to_string());
    let what = event["what"].as_str().unwrap();
    assert!(what.contains("2 consecutive5xxErrors") && what.contains("30s"), "{what}");
}

#[tokio::test(start_paused = true)]
async fn bug_who_was_gone_still_counted_among_the_ejected() {
    let gone = Scripted::start("gone", |_| Reply::Status(500)).await;
    let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
    let good = Scripted::start("good", |_| Reply::Status(200)).await;
    let policy = "{outlierDetection: {consecutive5xxErrors: 1, maxEjectionPercent: 50}}";
    let process = mesh_route::Clusters::new();
    let before = compile(&yaml(&[gone.addr.port(), good.addr.port()], policy));
    let client = before.client_on(&process);
    while !before.is_ejected(gone.addr.port()) {
        status(&client).await;
    }
    let after = compile(&yaml(&[bad.addr.port(), good.addr.port()], policy));
    let client = after.client_on(&process);
    while bad.requests() == 0 {
        status(&client).await;
    }
    assert!(after.is_ejected(bad.addr.port()), "{:?}", after.events());
    // Who comes back comes as a new one.
    let again = compile(&yaml(&[gone.addr.port()], policy));
    let client = again.client_on(&process);
    assert!(!again.is_ejected(gone.addr.port()));
    assert_eq!(status(&client).await, 500);
    drop(before);
}
