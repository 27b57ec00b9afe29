//! Limits that are exceeded by one (B6); those on connections and on what waits for one are `connectionPool`'s tests.

use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::until;
use tokio::task::JoinSet;
use tower::ServiceExt as _;

use crate::support::{BOTH, client, cluster_of, get, nothing_is_left};

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
