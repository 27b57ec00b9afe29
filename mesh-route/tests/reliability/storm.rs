//! Upstreams that always fail, and clients who all try again (B1, B2).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::{Body, Side};
use mesh_route::{Cluster, RetryBudget, RetryOn, RetryPolicy, UpstreamProtocol};
use mesh_testkit::scripted::{Reply, Script};
use tokio::task::JoinSet;
use tower::ServiceExt as _;

use crate::support::{
    BOTH, Client, Host, Network, Tasks, client_on, cluster_of, get, nothing_is_left, outcome,
};

const REQUESTS: u32 = 1000;

/// How long the upstream takes to fail.
const WORK: Duration = Duration::from_millis(100);

fn three_more() -> RetryPolicy {
    RetryPolicy::new(3, RetryOn::parse("5xx").unwrap())
}

fn budget() -> RetryBudget {
    RetryBudget { percent: 20.0, min_retry_concurrency: 3, ..RetryBudget::default() }
}

/// A request each millisecond, all of which must fail; the most retries at once beyond a fifth of what was active.
async fn storm(client: &Client, cluster: &Cluster, count: u32) -> f64 {
    let runtime = cluster.runtime().unwrap();
    let mut requests = JoinSet::new();
    let mut most = 0_f64;
    for _ in 0..count {
        let client = client.clone();
        requests.spawn(async move { outcome(&client, get()).await });
        tokio::time::sleep(Duration::from_millis(1)).await;
        // Those that wait for a connection are among them.
        let active = f64::from(runtime.requests());
        most = most.max(f64::from(runtime.retries()) - active * 0.2);
    }
    for outcome in requests.join_all().await {
        assert_eq!(outcome, "503 - leaf", "the answer of the upstream");
    }
    most
}

#[tokio::test(start_paused = true)]
async fn b1_a_budget_holds_back_a_storm() {
    for protocol in BOTH {
        let tasks = Tasks::now();
        let (network, leaf) = (Network::default(), Script::new("leaf", |_| Reply::After(WORK, 503)));
        let addr = network.host(Host::script(&leaf, protocol));
        let cluster = cluster_of(&[addr], |spec| {
            spec.protocol = protocol;
            spec.retry_budget = Some(budget());
        });
        let client = network.client(&cluster, |route| route.retry(three_more()));
        let most = storm(&client, &cluster, REQUESTS).await;
        println!("b1 {protocol:?}: {} tries for {REQUESTS} requests (goal 1253)", leaf.requests());
        assert!(most <= 3.0, "{most} more than a fifth at once");
        assert!(leaf.requests() <= 1253 && leaf.requests() > 1100, "{}", leaf.requests());
        nothing_is_left(&cluster, || leaf.open()).await;
        drop((client, cluster));
        tasks.are_back().await;
    }
}

#[tokio::test(start_paused = true)]
async fn b1_without_a_budget_it_is_exactly_four_tries() {
    for protocol in BOTH {
        let (network, leaf) = (Network::default(), Script::new("leaf", |_| Reply::After(WORK, 503)));
        let addr = network.host(Host::script(&leaf, protocol));
        let cluster = cluster_of(&[addr], |spec| spec.protocol = protocol);
        let client = network.client(&cluster, |route| route.retry(three_more()));
        storm(&client, &cluster, REQUESTS).await;
        assert_eq!(leaf.requests(), 4 * REQUESTS as usize, "{protocol:?}: that is Istio");
        nothing_is_left(&cluster, || leaf.open()).await;
    }
}

/// A proxy between its clients and `upstream`.
fn hop(network: &Network, upstream: &Arc<Cluster>, protocol: UpstreamProtocol, seed: u64) -> Host {
    let client = client_on(network.shard(seed), upstream, |route| route.retry(three_more()));
    Host::Serves(Arc::new(move |stream| {
        let client = client.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let client = client.clone();
            async move {
                let request = request.map(|body| Body::from_incoming(body, Side::Downstream));
                Ok::<_, Infallible>(client.oneshot(request).await.unwrap_or_else(|error| {
                    Response::builder().status(error.status()).body(Body::empty()).unwrap()
                }))
            }
        });
        tokio::spawn(async move {
            let io = TokioIo::new(stream);
            // A client that goes away is no event.
            if protocol == UpstreamProtocol::Http2 {
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(io, service)
                    .await;
            } else {
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
            }
        });
    }))
}

/// What requests through three proxies, all of which try again, come to at the last upstream.
async fn through_three_hops(count: u32, protocol: UpstreamProtocol, budget: Option<RetryBudget>) -> Script {
    let tasks = Tasks::now();
    let (network, leaf) = (Network::default(), Script::new("leaf", |_| Reply::After(WORK, 503)));
    let mut addr = network.host(Host::script(&leaf, protocol));
    let mut clusters = Vec::new();
    for seed in [3, 2] {
        let cluster = cluster_of(&[addr], |spec| (spec.protocol, spec.retry_budget) = (protocol, budget));
        addr = network.host(hop(&network, &cluster, protocol, seed));
        clusters.push(cluster);
    }
    let cluster = cluster_of(&[addr], |spec| (spec.protocol, spec.retry_budget) = (protocol, budget));
    let client = network.client(&cluster, |route| route.retry(three_more()));
    storm(&client, &cluster, count).await;
    nothing_is_left(&clusters[0], || leaf.open()).await;
    for cluster in clusters.iter().chain([&cluster]) {
        let runtime = cluster.runtime().unwrap();
        assert_eq!((runtime.requests(), runtime.pending(), runtime.retries()), (0, 0, 0));
    }
    // Each hop holds the network, and the network the hops.
    network.clear();
    drop((client, cluster, clusters, network));
    tasks.are_back().await;
    leaf
}

#[tokio::test(start_paused = true)]
async fn b2_three_proxies_with_a_budget_do_not_multiply() {
    for protocol in BOTH {
        let leaf = through_three_hops(REQUESTS, protocol, Some(budget())).await;
        let amplification = leaf.requests() as f64 / f64::from(REQUESTS);
        println!("b2 {protocol:?}: {amplification}× at the leaf (goal 1.25³ = 1.953)");
        assert!(amplification <= 1.25_f64.powi(3), "{amplification}");
        let counts: Vec<u32> = leaf
            .seen()
            .iter()
            .map(|seen| {
                seen.header("x-envoy-attempt-count").expect("each try says which it is").parse().unwrap()
            })
            .collect();
        assert!(counts.iter().all(|count| (1..=4).contains(count)));
        let retries = counts.iter().filter(|count| **count > 1).count();
        assert!(retries > 0 && retries * 5 <= counts.len() + 5 * 3, "{retries} of {}", counts.len());
    }
}

#[tokio::test(start_paused = true)]
async fn b2_without_a_budget_each_of_three_proxies_multiplies_by_four() {
    for protocol in BOTH {
        let leaf = through_three_hops(50, protocol, None).await;
        assert_eq!(leaf.requests(), 64 * 50, "{protocol:?}");
    }
}
