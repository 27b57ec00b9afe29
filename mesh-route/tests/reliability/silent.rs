//! Upstreams that never answer, or stop in the middle (A3, A4).

use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt as _;
use mesh_route::{Cluster, ClusterSpec, UpstreamProtocol};
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::until;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt as _;

use crate::support::{BOTH, client, cluster_of, get, nothing_is_left};

fn cluster(upstream: &Scripted, change: impl FnOnce(&mut ClusterSpec)) -> Arc<Cluster> {
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
