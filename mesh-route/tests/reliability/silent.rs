//! Upstreams that never answer, or stop in the middle (A3, A4).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt as _;
use http_body_util::channel::Channel;
use mesh_core::{Body, ClusterName, Error};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, Mirror, RetryOn, RetryPolicy, UpstreamProtocol,
};
use mesh_testkit::scripted::{Reply, Script, Scripted};
use mesh_testkit::until;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower::ServiceExt as _;

use crate::support::{BOTH, Host, Network, client, client_on, cluster_of, get, nothing_is_left, outcome};

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

/// A body of one piece, and one that streams.
fn posts() -> [Request<Body>; 2] {
    let streamed = Body::new(Body::from("hello").map_frame(|frame| frame));
    [Body::from("hello"), streamed].map(|body| Request::post("http://up/").body(body).unwrap())
}

#[tokio::test(start_paused = true)]
async fn vs_t01_bug_a_request_with_a_body_waited_for_a_connection_without_an_end() {
    let half = Duration::from_millis(500);
    for protocol in BOTH {
        let network = Network::default();
        let silent = network.host(Host::Silent);
        let connecting = cluster_of(&[silent], |spec| {
            spec.protocol = protocol;
            spec.pool.connect_timeout = Duration::from_secs(10);
        });
        let client = network.client(&connecting, |route| route.timeout(half));
        for request in posts() {
            let started = Instant::now();
            assert_eq!(outcome(&client, request).await, "504 UT response_timeout");
            assert_eq!(started.elapsed(), half);
        }
        nothing_is_left(&connecting, || 0).await;
    }
    // In the queue for the one connection.
    let network = Network::default();
    let up = Script::new("up", |_| Reply::After(Duration::from_secs(1800), 200));
    let busy = network.host(Host::script(&up, UpstreamProtocol::Http1));
    let queued = cluster_of(&[busy], |spec| spec.pool.max_connections = 1);
    let shard = network.shard(1);
    let first = client_on(Arc::clone(&shard), &queued, |route| route);
    let first = tokio::spawn(async move { outcome(&first, get()).await });
    until("the connection to be taken", async || up.requests() == 1).await;
    let client = client_on(shard, &queued, |route| route.timeout(half));
    for request in posts() {
        let started = Instant::now();
        assert_eq!(outcome(&client, request).await, "504 UT response_timeout");
        assert_eq!(started.elapsed(), half);
    }
    first.abort();
}

#[tokio::test(start_paused = true)]
async fn vs_t01_bug_a_copy_with_a_body_was_in_flight_without_an_end() {
    let network = Network::default();
    let up = Script::new("up", |_| Reply::Status(200));
    let addr = network.host(Host::script(&up, UpstreamProtocol::Http1));
    let hung = Script::new("hung", |_| Reply::Hang);
    let mirror = network.host(Host::script(&hung, UpstreamProtocol::Http1));
    let named = |name: &str, addr, most| {
        let endpoints = Discovery::Static(vec![EndpointSpec::new(addr)]);
        let mut spec = ClusterSpec::new(ClusterName::custom(name), endpoints);
        spec.pool.max_connections = most;
        Arc::new(Cluster::new(spec))
    };
    let (primary, mirror) = (named("up", addr, 100), named("hung", mirror, 1));
    let clusters = Clusters::new();
    clusters.reconcile(&[Arc::clone(&primary), Arc::clone(&mirror)]);
    let client = network.client(&primary, |route| {
        route.timeout(Duration::from_secs(5)).mirror(Mirror::new(Arc::clone(&mirror)))
    });
    let started = Instant::now();
    for _ in 0..10 {
        for request in posts() {
            assert!(outcome(&client, request).await.starts_with("200"));
        }
    }
    // One is sent, the others wait for its connection; each has the time of the route.
    assert_eq!(clusters.mirroring().in_flight(), 20);
    until("the copies to be given up", async || clusters.mirroring().in_flight() == 0).await;
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

/// Answers at once, and says how much it received when it has received all.
fn counts(protocol: UpstreamProtocol) -> Host {
    use hyper::server::conn::{http1, http2};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    Host::Serves(Arc::new(move |stream| {
        let service = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async move {
            let (mut tell, body) = Channel::<Bytes, Error>::new(1);
            tokio::spawn(async move {
                if let Ok(all) = request.into_body().collect().await {
                    let _ = tell.send_data(all.to_bytes().len().to_string().into()).await;
                }
            });
            Ok::<_, Infallible>(http::Response::new(body))
        });
        let stream = TokioIo::new(stream);
        tokio::spawn(async move {
            let _ = match protocol {
                UpstreamProtocol::Http2 => {
                    http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await
                }
                _ => http1::Builder::new().serve_connection(stream, service).await,
            };
        });
    }))
}

#[tokio::test(start_paused = true)]
async fn vs_t01_bug_an_upload_that_went_on_after_the_head_was_cut_as_idle() {
    for protocol in BOTH {
        let network = Network::default();
        let cluster = cluster_of(&[network.host(counts(protocol))], |spec| spec.protocol = protocol);
        let client = network.client(&cluster, |route| route.idle_timeout(Duration::from_secs(5)));
        let upload = |pause: u64| {
            let (mut feed, body) = Channel::<Bytes, Error>::new(1);
            tokio::spawn(async move {
                for _ in 0..5 {
                    tokio::time::sleep(Duration::from_secs(pause)).await;
                    if feed.send_data(Bytes::from_static(b"x")).await.is_err() {
                        return;
                    }
                }
            });
            outcome(&client, Request::post("http://up/").body(Body::new(body)).unwrap())
        };
        assert_eq!(upload(4).await, "200 - 5", "{protocol:?}");
        assert_eq!(upload(6).await, "200 cut SI", "{protocol:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn vs_t01_bug_a_limit_that_no_clock_can_tell_panicked() {
    let network = Network::default();
    let up = Script::new("up", |_| Reply::After(Duration::from_secs(1), 200));
    let cluster = cluster_of(&[network.host(Host::script(&up, UpstreamProtocol::Http1))], |_| {});
    let client = network.client(&cluster, |route| {
        let policy = RetryPolicy::new(1, RetryOn::parse("5xx").unwrap()).per_try_timeout(Duration::MAX);
        route.idle_timeout(Duration::MAX).retry(policy)
    });
    let bounded = network.client(&cluster, |route| route.timeout(Duration::MAX).idle_timeout(Duration::MAX));
    for client in [client, bounded] {
        for request in posts().into_iter().chain([get()]) {
            assert!(outcome(&client, request).await.starts_with("200"));
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
