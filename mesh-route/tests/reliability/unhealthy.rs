//! Endpoints that answer with errors: who is left out, for how long, and what is left when all are (A6, A7).

use std::time::Duration;

use mesh_route::outlier::{Event, EventKind};
use mesh_route::{BalancerKind, Cluster, OutlierDetection, RetryOn, RetryPolicy};
use mesh_testkit::scripted::{Reply, Script};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::support::{BOTH, Host, Network, Tasks, cluster_of, get, nothing_is_left, outcome};

const THRESHOLD: u32 = 5;
const CLIENTS: usize = 10;
const BASE: Duration = Duration::from_secs(30);

/// How long an answer takes.
const WORK: Duration = Duration::from_millis(50);

fn detection() -> OutlierDetection {
    OutlierDetection {
        consecutive_5xx: THRESHOLD,
        base_ejection_time: BASE,
        max_ejection_percent: 34,
        ..OutlierDetection::default()
    }
}

fn events(cluster: &Cluster) -> Vec<Event> {
    cluster.runtime().unwrap().with_outliers(|detector| detector.events().cloned().collect())
}

/// An endpoint that fails for this long.
fn failing_for(name: &'static str, time: Duration) -> Script {
    let since = Instant::now();
    Script::new(name, move |seen| Reply::After(WORK, if seen.at < since + time { 500 } else { 200 }))
}

#[tokio::test(start_paused = true)]
async fn a6_an_endpoint_that_fails_for_a_minute_is_left_out_in_time_and_comes_back_in_time() {
    for protocol in BOTH {
        let tasks = Tasks::now();
        let network = Network::default();
        let scripts = [
            failing_for("bad", Duration::from_secs(60)),
            failing_for("good", Duration::ZERO),
            failing_for("good", Duration::ZERO),
        ];
        let addrs = scripts.each_ref().map(|script| network.host(Host::script(script, protocol)));
        let cluster = cluster_of(&addrs, |spec| {
            spec.protocol = protocol;
            spec.balancer = BalancerKind::RoundRobin;
            spec.outlier_detection = Some(Box::new(detection()));
        });
        let client = network.client(&cluster, |route| route);
        let end = Instant::now() + Duration::from_secs(130);
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let client = client.clone();
            clients.spawn(async move {
                let mut failed = 0;
                while Instant::now() < end {
                    match outcome(&client, get()).await.as_str() {
                        "200 - good" | "200 - bad" => {}
                        "500 - bad" => failed += 1,
                        other => panic!("{other}"),
                    }
                }
                failed
            });
        }
        let failed: u32 = clients.join_all().await.into_iter().sum();
        let events = events(&cluster);
        let [first, back, second, healed] = events.as_slice() else { panic!("{events:#?}") };
        for (event, times) in [(first, 1), (second, 2)] {
            let EventKind::Ejected { evidence, duration, times: seen } = event.kind else {
                panic!("{event:?}")
            };
            assert_eq!(event.endpoint, addrs[0]);
            assert_eq!((evidence.failures, duration, seen), (THRESHOLD, BASE * times, times));
        }
        // The first who picks after the time ends it.
        let most_late = WORK;
        for (ejected, returned, times) in [(first, back, 1), (second, healed, 2)] {
            let time = returned.at - ejected.at;
            assert!(time >= BASE * times && time <= BASE * times + most_late, "{time:?}");
            let meanwhile = |at: std::time::Instant| at > ejected.at && at < ejected.at + BASE * times;
            let seen = scripts[0].seen();
            assert!(!seen.iter().any(|seen| meanwhile(seen.at.into_std())), "nothing is sent meanwhile");
        }
        // Each of the two ejections cost its threshold and what was in flight then; the third time it has healed.
        let most = 2 * (THRESHOLD + CLIENTS as u32);
        println!(
            "a6 {protocol:?}: {failed} failed of {} (goal {most})",
            failed as usize + scripts[1].requests()
        );
        assert!(failed <= most && failed >= 2 * THRESHOLD, "{failed}");
        nothing_is_left(&cluster, || scripts.iter().map(Script::open).sum()).await;
        drop((client, cluster));
        tasks.are_back().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a6_never_more_than_the_share_is_left_out() {
    for protocol in BOTH {
        for (percent, most) in [(0, 0), (33, 0), (34, 1), (66, 1), (67, 2), (100, 3)] {
            let network = Network::default();
            let scripts = [(); 3].map(|()| Script::new("bad", |_| Reply::Status(500)));
            let addrs = scripts.each_ref().map(|script| network.host(Host::script(script, protocol)));
            let cluster = cluster_of(&addrs, |spec| {
                spec.protocol = protocol;
                spec.outlier_detection =
                    Some(Box::new(OutlierDetection { max_ejection_percent: percent, ..detection() }));
            });
            let client = network.client(&cluster, |route| route);
            for _ in 0..200 {
                outcome(&client, get()).await;
                let ejected = cluster.endpoints().iter().filter(|endpoint| endpoint.is_ejected()).count();
                assert!(ejected <= most, "{percent} % of three");
            }
            let ejected = cluster.endpoints().iter().filter(|endpoint| endpoint.is_ejected()).count();
            assert_eq!(ejected, most, "{percent} % of three");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a7_without_a_panic_threshold_it_is_uh_at_once() {
    for protocol in BOTH {
        let network = Network::default();
        let scripts = [(); 3].map(|()| Script::new("bad", |_| Reply::Status(500)));
        let addrs = scripts.each_ref().map(|script| network.host(Host::script(script, protocol)));
        let cluster = cluster_of(&addrs, |spec| {
            spec.protocol = protocol;
            spec.outlier_detection = Some(Box::new(OutlierDetection {
                max_ejection_percent: 100,
                consecutive_5xx: 1,
                ..detection()
            }));
        });
        // A retry finds nobody either, and waits for nobody.
        let retry = RetryPolicy::new(3, RetryOn::parse("connect-failure,refused-stream").unwrap());
        let client = network.client(&cluster, |route| route.retry(retry).timeout(Duration::from_secs(15)));
        for _ in 0..3 {
            assert_eq!(outcome(&client, get()).await, "500 - bad");
        }
        let started = Instant::now();
        for _ in 0..1000 {
            assert_eq!(outcome(&client, get()).await, "503 UH no_healthy_upstream", "{protocol:?}");
        }
        assert_eq!(started.elapsed(), Duration::ZERO, "nobody waits for anything");
        assert_eq!(scripts.iter().map(Script::requests).sum::<usize>(), 3);
        nothing_is_left(&cluster, || scripts.iter().map(Script::open).sum()).await;
        // And they are asked again when their time is over.
        tokio::time::advance(BASE).await;
        assert_eq!(outcome(&client, get()).await, "500 - bad");
    }
}

#[tokio::test(start_paused = true)]
async fn a7_below_the_panic_threshold_everybody_is_asked() {
    for protocol in BOTH {
        let network = Network::default();
        let scripts = [(); 4].map(|()| Script::new("bad", |_| Reply::Status(500)));
        let addrs = scripts.each_ref().map(|script| network.host(Host::script(script, protocol)));
        let cluster = cluster_of(&addrs, |spec| {
            spec.protocol = protocol;
            spec.balancer = BalancerKind::RoundRobin;
            spec.outlier_detection = Some(Box::new(OutlierDetection {
                max_ejection_percent: 100,
                min_health_percent: 50,
                consecutive_5xx: 1,
                ..detection()
            }));
        });
        let client = network.client(&cluster, |route| route);
        let started = Instant::now();
        for _ in 0..1000 {
            assert_eq!(outcome(&client, get()).await, "500 - bad", "{protocol:?}");
        }
        assert!(cluster.endpoints().iter().filter(|endpoint| endpoint.is_ejected()).count() > 2);
        assert!(scripts.iter().all(|script| script.requests() > 200), "each of them");
        assert_eq!(started.elapsed(), Duration::ZERO);
        nothing_is_left(&cluster, || scripts.iter().map(Script::open).sum()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a7_a_cluster_without_endpoints_is_uh_at_once() {
    let cluster = cluster_of(&[], |_| {});
    let client = Network::default().client(&cluster, |route| route.timeout(Duration::from_secs(15)));
    let started = Instant::now();
    assert_eq!(outcome(&client, get()).await, "503 UH no_healthy_upstream");
    assert_eq!(started.elapsed(), Duration::ZERO);
    nothing_is_left(&cluster, || 0).await;
}
