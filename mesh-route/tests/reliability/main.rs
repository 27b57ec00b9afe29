//! Faults of upstreams and of clients, by the numbers of their goals: nothing hangs, nothing leaks, every count is exact.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt as _;
use mesh_core::Body;
use mesh_route::{OutlierDetection, RetryBudget, RetryOn, RetryPolicy, UpstreamProtocol};
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::until;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt as _;

use support::{BOTH, client, cluster_of, get, nothing_is_left};

mod connect;
mod http2;
mod races;
mod storm;
mod support;
mod unhealthy;
mod workers;

fn cluster(
    upstream: &Scripted,
    change: impl FnOnce(&mut mesh_route::ClusterSpec),
) -> Arc<mesh_route::Cluster> {
    cluster_of(&[upstream.addr], change)
}

/// More connections at once than a listener keeps waiting are the kernel's business, in real time.
const AT_ONCE: usize = 100;

#[tokio::test(start_paused = true)]
async fn a3_an_upstream_that_never_answers_is_given_up_in_time() {
    for protocol in BOTH {
        let up = Scripted::start("up", |_| Reply::Hang).await;
        let cluster = cluster(&up, |spec| spec.protocol = protocol);
        let client = client(&cluster, |route| route.timeout(Duration::from_secs(3)));
        for _ in 0..1000 / AT_ONCE {
            let mut requests = JoinSet::new();
            for _ in 0..AT_ONCE {
                let client = client.clone();
                requests.spawn(async move {
                    let started = Instant::now();
                    let error = client.oneshot(get()).await.unwrap_err();
                    (error.status().as_u16(), error.flags().to_string(), started.elapsed())
                });
            }
            for (status, flags, took) in requests.join_all().await {
                assert_eq!((status, flags.as_str()), (504, "UT"));
                assert!((Duration::from_secs(3)..=Duration::from_millis(3010)).contains(&took), "{took:?}");
            }
        }
        nothing_is_left(&cluster, || up.open()).await;
        if protocol == UpstreamProtocol::Http1 {
            let runtime = cluster.runtime().unwrap();
            until("the connections to close", async || runtime.connections() == 0).await;
        }
    }
}

/// In real time: with paused time the clock runs ahead whenever a socket is waited for.
#[tokio::test]
async fn a4_a_response_that_stalls_is_reset_when_it_has_been_idle() {
    for protocol in BOTH {
        let up = Scripted::start("up", |_| Reply::Stall).await;
        let cluster = cluster(&up, |spec| spec.protocol = protocol);
        let client = client(&cluster, |route| route.idle_timeout(Duration::from_millis(100)));
        let mut stalled = 0;
        for _ in 0..1000 / AT_ONCE {
            let mut requests = JoinSet::new();
            for _ in 0..AT_ONCE {
                let client = client.clone();
                requests.spawn(async move {
                    match client.oneshot(get()).await {
                        Ok(response) => (true, response.into_body().collect().await.map(|_| ()).unwrap_err()),
                        // On a machine that is slow enough the head is late already.
                        Err(error) => (false, error),
                    }
                });
            }
            for (began, error) in requests.join_all().await {
                assert_eq!(error.flags().to_string(), "SI", "never a clean end: {error}");
                stalled += usize::from(began);
            }
        }
        assert!(stalled > 0);
        nothing_is_left(&cluster, || up.open()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a4_an_upstream_without_an_answer_is_idle_too() {
    let up = Scripted::start("up", |_| Reply::Hang).await;
    let cluster = cluster(&up, |_| {});
    let client = client(&cluster, |route| route.idle_timeout(Duration::from_secs(5)));
    let error = client.oneshot(get()).await.unwrap_err();
    assert_eq!((error.status().as_u16(), error.flags().to_string().as_str()), (504, "SI"));
    assert_eq!(error.details(), "stream_idle_timeout");
    nothing_is_left(&cluster, || up.open()).await;
}

#[tokio::test(start_paused = true)]
async fn b4_whoever_leaves_at_any_moment_leaves_every_count_exact() {
    for protocol in BOTH {
        let up = Scripted::start("up", |seen| match seen.nth % 7 {
            0 => Reply::Hang,
            1 => Reply::Status(200),
            2 => Reply::Reset,
            3 => Reply::After(Duration::from_millis(15), 503),
            4 => Reply::Stall,
            5 => Reply::After(Duration::from_millis(5), 200),
            _ => Reply::Status(500),
        })
        .await;
        let cluster = cluster(&up, |spec| {
            spec.protocol = protocol;
            spec.pool.max_connections = 100;
            spec.pool.max_pending_requests = 200;
            spec.pool.max_requests = 400;
            spec.retry_budget = Some(RetryBudget { percent: 50.0, ..RetryBudget::default() });
            spec.outlier_detection = Some(OutlierDetection {
                base_ejection_time: Duration::from_millis(1),
                ..OutlierDetection::default()
            });
        });
        let policy = RetryPolicy::new(3, RetryOn::parse("5xx").unwrap())
            .per_try_timeout(Duration::from_millis(12))
            .backoff(mesh_route::Backoff::new(Duration::from_millis(2)));
        let client = client(&cluster, |route| {
            route.retry(policy).timeout(Duration::from_millis(40)).idle_timeout(Duration::from_millis(30))
        });
        let mut rng = SmallRng::seed_from_u64(4);
        let mut requests = JoinSet::new();
        for number in 0..5000_u32 {
            let client = client.clone();
            let stay = Duration::from_micros(rng.random_range(0..50_000));
            let body = if number % 2 == 0 { Body::empty() } else { Body::full("some body") };
            requests.spawn(async move {
                let exchange = async {
                    let request = Request::put("http://up/").body(body).unwrap();
                    if let Ok(response) = client.oneshot(request).await {
                        // A body that breaks off is one of the ways to end.
                        let _ = response.into_body().collect().await;
                    }
                };
                // Whoever has waited for so long goes.
                tokio::time::timeout(stay, exchange).await.is_ok()
            });
            if number % 10 == 9 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let ended = requests.join_all().await.into_iter().filter(|ended| *ended).count();
        println!("b4: {ended} of 5000 stayed to the end, {} tries", up.requests());
        assert!(ended > 100 && ended < 4900, "{ended}");
        nothing_is_left(&cluster, || up.open()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn b6_exactly_the_one_too_many_is_refused() {
    for protocol in BOTH {
        let up = Scripted::start("up", |_| Reply::Hang).await;
        let cluster = cluster(&up, |spec| {
            spec.protocol = protocol;
            spec.pool.max_requests = 5;
        });
        let client = client(&cluster, |route| route);
        let mut held = JoinSet::new();
        for at in 1..=5 {
            held.spawn(client.clone().oneshot(get()));
            until("a request in flight", async || up.requests() == at).await;
        }
        for _ in 0..3 {
            let error = client.clone().oneshot(get()).await.unwrap_err();
            assert_eq!((error.status().as_u16(), error.flags().to_string().as_str()), (503, "UO"));
        }
        held.abort_all();
        while held.join_next().await.is_some() {}
        nothing_is_left(&cluster, || up.open()).await;
        held.spawn(client.clone().oneshot(get()));
        until("a place again", async || up.requests() == 6).await;
    }
}
