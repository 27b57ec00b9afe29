//! Limits that are exceeded by one (B6); those on connections and on what waits for one are `connectionPool`'s tests.
//! What waits in our own queue says nothing of an endpoint.

use std::time::Duration;

use mesh_route::{OutlierDetection, UpstreamProtocol};
use mesh_testkit::scripted::{Reply, Script, Scripted};
use mesh_testkit::until;
use tokio::task::JoinSet;
use tower::ServiceExt as _;

use crate::support::{BOTH, Host, Network, client, client_on, cluster_of, get, nothing_is_left, outcome};

#[tokio::test(start_paused = true)]
async fn b6_exactly_the_one_too_many_is_refused() {
    for protocol in BOTH {
        let up = Scripted::start("up", |_| Reply::Hang).await;
        let cluster = cluster_of(&[up.addr], |spec| {
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

#[tokio::test(start_paused = true)]
async fn dr_cp04_a_timeout_in_our_own_queue_ejects_nobody() {
    let network = Network::default();
    let up = Script::new("up", |_| Reply::After(Duration::from_secs(30), 200));
    let addr = network.host(Host::script(&up, UpstreamProtocol::Http1));
    let cluster = cluster_of(&[addr], |spec| {
        spec.pool.max_connections = 1;
        spec.outlier_detection =
            Some(Box::new(OutlierDetection { max_ejection_percent: 100, ..OutlierDetection::default() }));
    });
    let shard = network.shard(1);
    let patient = client_on(shard.clone(), &cluster, |route| route);
    let hasty = client_on(shard, &cluster, |route| route.timeout(Duration::from_millis(100)));
    let ejected = || cluster.runtime().unwrap().with_outliers(|outliers| outliers.ejected());
    let long = tokio::spawn({
        let patient = patient.clone();
        async move { outcome(&patient, get()).await }
    });
    until("the only connection to be taken", async || up.requests() == 1).await;
    for _ in 0..10 {
        assert!(outcome(&hasty, get()).await.starts_with("504 UT"));
    }
    assert_eq!((up.requests(), ejected()), (1, 0), "the endpoint has not seen what timed out");
    assert_eq!(long.await.unwrap(), "200 - up");
    // The same timeouts of requests that it has seen are its own.
    for _ in 0..5 {
        assert!(outcome(&hasty, get()).await.starts_with("504 UT"));
    }
    assert_eq!((up.requests(), ejected()), (6, 1));
}
