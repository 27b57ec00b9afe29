//! Clients who leave at any moment (B4).

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt as _;
use mesh_core::Body;
use mesh_route::{Backoff, OutlierDetection, RetryBudget, RetryOn, RetryPolicy};
use mesh_testkit::scripted::{Reply, Script};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinSet;
use tower::ServiceExt as _;

use crate::support::{BOTH, Host, Network, Tasks, cluster_of, nothing_is_left};

const REQUESTS: u32 = 10_000;

/// A future that is given up after so many polls: at one of the points where it waits, whichever these are.
struct Polls<F> {
    inner: Pin<Box<F>>,
    left: u32,
}

impl<F: Future> Future for Polls<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.left -= 1;
        self.inner.as_mut().poll(cx).map(Some)
    }
}

#[tokio::test(start_paused = true)]
async fn b4_whoever_leaves_at_any_moment_leaves_every_count_exact() {
    for protocol in BOTH {
        let tasks = Tasks::now();
        let network = Network::default();
        let scripts = [1, 2, 3].map(|shift| {
            Script::new("up", move |seen| match (seen.nth + shift) % 8 {
                0 => Reply::Hang,
                1 => Reply::Status(200),
                2 => Reply::Reset,
                3 => Reply::After(Duration::from_millis(15), 503),
                4 => Reply::Stall,
                5 => Reply::After(Duration::from_millis(5), 200),
                6 => Reply::Cut,
                _ => Reply::Status(500),
            })
        });
        let mut addrs: Vec<_> =
            scripts.iter().map(|script| network.host(Host::script(script, protocol))).collect();
        addrs.push(network.host(Host::Silent));
        addrs.push(network.host(Host::Fails(std::io::ErrorKind::ConnectionRefused)));
        let cluster = cluster_of(&addrs, |spec| {
            spec.protocol = protocol;
            spec.pool.connect_timeout = Duration::from_millis(20);
            spec.pool.max_connections = 100;
            spec.pool.max_pending_requests = 200;
            spec.pool.max_requests = 400;
            spec.retry_budget = Some(RetryBudget { percent: 50.0, ..RetryBudget::default() });
            spec.outlier_detection = Some(Box::new(OutlierDetection {
                base_ejection_time: Duration::from_millis(1),
                ..OutlierDetection::default()
            }));
        });
        let policy = RetryPolicy::new(3, RetryOn::parse("5xx").unwrap())
            .per_try_timeout(Duration::from_millis(12))
            .backoff(Backoff::new(Duration::from_millis(2)));
        let client = network.client(&cluster, |route| {
            route.retry(policy).timeout(Duration::from_millis(40)).idle_timeout(Duration::from_millis(30))
        });
        let mut rng = SmallRng::seed_from_u64(4);
        let mut requests = JoinSet::new();
        for number in 0..REQUESTS {
            let client = client.clone();
            let body = if number % 2 == 0 { Body::empty() } else { Body::full("some body") };
            let exchange = async move {
                let request = Request::put("http://up/").body(body).unwrap();
                if let Ok(response) = client.oneshot(request).await {
                    // A body that breaks off is one of the ways to end.
                    let _ = response.into_body().collect().await;
                }
            };
            // Half of them leave by the clock, and half at a point where they wait.
            let stay = Duration::from_micros(rng.random_range(0..50_000));
            let left = rng.random_range(0..12);
            if number % 4 < 2 {
                requests.spawn(async move { tokio::time::timeout(stay, exchange).await.is_ok() });
            } else {
                let exchange = Polls { inner: Box::pin(exchange), left };
                requests.spawn(async move { exchange.await.is_some() });
            }
            if number % 10 == 9 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let ended = requests.join_all().await.into_iter().filter(|ended| *ended).count();
        let tries: usize = scripts.iter().map(Script::requests).sum();
        println!("b4 {protocol:?}: {ended} of {REQUESTS} stayed to the end, {tries} tries");
        assert!(ended > 500 && ended < 9500, "{ended}");
        nothing_is_left(&cluster, || scripts.iter().map(Script::open).sum()).await;
        drop((client, cluster));
        tasks.are_back().await;
    }
}
