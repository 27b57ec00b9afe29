//! What belongs to the process and not to a worker: each worker is a thread with a runtime and a shard of its own, and
//! all share the cluster.

use std::future::Future;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use mesh_route::{
    Backoff, Cluster, OutlierDetection, PoolSettings, RetryBudget, RetryOn, RetryPolicy, RouteBuilder, Shard,
};
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::until;
use tokio::task::JoinSet;

use crate::support::{BOTH, Client, client_on, cluster_of, get, nothing_is_left, outcome};

/// Runs `work` on so many workers at once, and returns what each came to.
async fn on_workers<T: Send + 'static, F: Future<Output = T> + 'static>(
    workers: usize,
    cluster: &Arc<Cluster>,
    route: fn(RouteBuilder) -> RouteBuilder,
    work: impl Fn(Client, Arc<Barrier>) -> F + Clone + Send + 'static,
) -> Vec<T> {
    let together = Arc::new(Barrier::new(workers));
    let threads: Vec<_> = (0..workers)
        .map(|seed| {
            let (cluster, together, work) = (Arc::clone(cluster), Arc::clone(&together), work.clone());
            tokio::task::spawn_blocking(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async move {
                    let client = client_on(Shard::seeded(seed as u64), &cluster, route);
                    together.wait();
                    work(client, together).await
                })
            })
        })
        .collect();
    let mut all = Vec::new();
    for thread in threads {
        all.push(thread.await.unwrap());
    }
    all
}

/// Until the endpoint is left out.
async fn until_unhealthy(client: Client, _: Arc<Barrier>) -> usize {
    let mut failed = 0;
    loop {
        match outcome(&client, get()).await.as_str() {
            "500 - bad" => failed += 1,
            "503 UH no_healthy_upstream" => return failed,
            other => panic!("{other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_that_two_workers_see_at_once_make_one_ejection() {
    const THRESHOLD: usize = 10;
    for protocol in BOTH {
        let bad = Scripted::start("bad", |_| Reply::Status(500)).await;
        for _ in 0..50 {
            let before = bad.requests();
            let cluster = cluster_of(&[bad.addr], |spec| {
                spec.protocol = protocol;
                spec.outlier_detection = Some(Box::new(OutlierDetection {
                    consecutive_5xx: THRESHOLD as u32,
                    max_ejection_percent: 100,
                    base_ejection_time: Duration::from_secs(3600),
                    ..OutlierDetection::default()
                }));
            });
            let failed = on_workers(2, &cluster, |route| route, until_unhealthy).await;
            let runtime = cluster.runtime().unwrap();
            let (ejections, events) = runtime.with_outliers(|d| (d.ejections(), d.events().len()));
            assert_eq!((ejections, events), (1, 1), "{failed:?}");
            let all: usize = failed.iter().sum();
            assert_eq!(bad.requests() - before, all);
            // The threshold, and what the other worker sends until the one that has reached it has said so: it would
            // say so itself at the next.
            assert!((THRESHOLD..2 * THRESHOLD).contains(&all), "{failed:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_pending_request_is_one_with_four_workers() {
    for _ in 0..20 {
        let up = Scripted::start("up", |_| Reply::Hang).await;
        let cluster = cluster_of(&[up.addr], |spec| {
            spec.pool =
                PoolSettings { max_connections: 1, max_pending_requests: 1, ..PoolSettings::default() };
        });
        let runtime = Arc::clone(cluster.runtime().unwrap());
        let work = {
            let runtime = Arc::clone(&runtime);
            move |client: Client, together: Arc<Barrier>| {
                let runtime = Arc::clone(&runtime);
                async move {
                    // A worker without a connection may always have one, but only one may wait for it.
                    let mut held = JoinSet::new();
                    let mine = client.clone();
                    held.spawn(async move {
                        while outcome(&mine, get()).await.starts_with("503 UO ") {
                            tokio::task::yield_now().await;
                        }
                    });
                    until("a connection of each", async || runtime.connections() == 4).await;
                    let mut more = JoinSet::new();
                    for _ in 0..10 {
                        let client = client.clone();
                        more.spawn(async move { outcome(&client, get()).await });
                    }
                    let mut refused = 0;
                    // Of those of all workers one waits, and all others are refused.
                    until("all others to be refused", async || {
                        while let Some(ended) = more.try_join_next() {
                            assert!(ended.unwrap().starts_with("503 UO "));
                            refused += 1;
                        }
                        more.is_empty() || (more.len() == 1 && runtime.pending() == 1)
                    })
                    .await;
                    let pending = runtime.pending();
                    // What is held is held until every worker has seen it.
                    together.wait();
                    (refused, pending)
                }
            }
        };
        let seen = on_workers(4, &cluster, |route| route, work).await;
        let refused: usize = seen.iter().map(|(refused, _)| refused).sum();
        assert_eq!(refused, 39, "all but the one that waits: {seen:?}");
        assert!(seen.iter().any(|(refused, pending)| (*refused, *pending) == (9, 1)), "{seen:?}");
        nothing_is_left(&cluster, || up.open()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_retries_at_once_are_three_with_four_workers() {
    for protocol in BOTH {
        for _ in 0..10 {
            // A retry never ends, so that it is counted for ever.
            let up = Scripted::start("up", |seen| match seen.header("x-envoy-attempt-count") {
                Some("1") => Reply::Status(503),
                _ => Reply::Hang,
            })
            .await;
            let cluster = cluster_of(&[up.addr], |spec| {
                spec.protocol = protocol;
                spec.retry_budget =
                    Some(RetryBudget { percent: 0.0, min_retry_concurrency: 3, ..RetryBudget::default() });
            });
            let runtime = Arc::clone(cluster.runtime().unwrap());
            let retrying = |route: RouteBuilder| {
                let policy = RetryPolicy::new(3, RetryOn::parse("5xx").unwrap());
                route.retry(policy.backoff(Backoff::new(Duration::ZERO)))
            };
            let work = {
                let runtime = Arc::clone(&runtime);
                move |client: Client, _: Arc<Barrier>| {
                    let runtime = Arc::clone(&runtime);
                    async move {
                        let mut requests = JoinSet::new();
                        for _ in 0..25 {
                            let client = client.clone();
                            requests.spawn(async move { outcome(&client, get()).await });
                        }
                        until("all but three to end", async || runtime.retry_overflows() == 97).await;
                        runtime.retries()
                    }
                }
            };
            let seen = on_workers(4, &cluster, retrying, work).await;
            assert!(seen.iter().all(|retries| *retries <= 3), "{seen:?}");
            assert_eq!(runtime.retried(), 3, "exactly");
            nothing_is_left(&cluster, || up.open()).await;
        }
    }
}
