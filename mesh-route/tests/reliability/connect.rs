//! Endpoints that cannot be connected to (A5).

use std::convert::Infallible;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::channel::Channel;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use mesh_core::Body;
use mesh_route::{Http2Keepalive, OutlierDetection, PoolSettings, RetryOn, RetryPolicy, UpstreamProtocol};
use mesh_testkit::scripted::{Reply, Script};
use mesh_testkit::until;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::support::{BOTH, Host, Network, Tasks, client_on, cluster_of, get, nothing_is_left, outcome};

/// Too many open files, in this process and in the system.
const EMFILE: i32 = 24;
const ENFILE: i32 = 23;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

fn unreachable() -> [(&'static str, Host); 4] {
    [
        ("refused", Host::Fails(ErrorKind::ConnectionRefused)),
        ("black hole", Host::Silent),
        ("EMFILE", Host::FailsWith(EMFILE)),
        ("ENFILE", Host::FailsWith(ENFILE)),
    ]
}

fn pool() -> PoolSettings {
    PoolSettings { connect_timeout: CONNECT_TIMEOUT, ..PoolSettings::default() }
}

fn connect_failures(attempts: u32) -> RetryPolicy {
    RetryPolicy::new(attempts, RetryOn::parse("connect-failure").unwrap())
}

#[tokio::test(start_paused = true)]
async fn a5_one_healthy_endpoint_answers_for_those_that_cannot_be_reached() {
    for protocol in BOTH {
        for (name, host) in unreachable() {
            let tasks = Tasks::now();
            let (network, up) = (Network::default(), Script::new("up", |_| Reply::Status(200)));
            let addrs = [
                network.host(host.clone()),
                network.host(Host::script(&up, protocol)),
                network.host(host.clone()),
            ];
            let cluster = cluster_of(&addrs, |spec| (spec.protocol, spec.pool) = (protocol, pool()));
            let client = network.client(&cluster, |route| route.retry(connect_failures(2)));
            for _ in 0..10 {
                let mut requests = JoinSet::new();
                for _ in 0..100 {
                    let client = client.clone();
                    requests.spawn(async move {
                        let started = Instant::now();
                        (outcome(&client, get()).await, started.elapsed())
                    });
                }
                for (outcome, took) in requests.join_all().await {
                    assert_eq!(outcome, "200 - up", "{name} {protocol:?}");
                    // Two connect timeouts, and two pauses that are drawn below 25 and 75 ms.
                    let most = CONNECT_TIMEOUT * 2 + Duration::from_millis(100);
                    assert!(took <= most, "{name} {protocol:?} {took:?}");
                }
            }
            assert_eq!(up.requests(), 1000, "each request came once");
            assert!(network.dialled(addrs[0]) > 0 && network.dialled(addrs[2]) > 0, "{name} was tried");
            nothing_is_left(&cluster, || up.open()).await;
            drop((client, cluster));
            tasks.are_back().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a5_without_a_healthy_endpoint_it_is_uf_after_as_many_tries_as_there_may_be() {
    for protocol in BOTH {
        for (name, host) in unreachable() {
            let network = Network::default();
            let addrs = [network.host(host.clone()), network.host(host.clone())];
            let cluster = cluster_of(&addrs, |spec| (spec.protocol, spec.pool) = (protocol, pool()));
            let client = network.client(&cluster, |route| route.retry(connect_failures(3)));
            let started = Instant::now();
            let reason =
                if name == "black hole" { "connection_timeout" } else { "remote_connection_failure" };
            assert_eq!(
                outcome(&client, get()).await,
                format!("503 UF upstream_reset_before_response_started{{{reason}}}"),
                "{name} {protocol:?}"
            );
            let dialled = network.dialled(addrs[0]) + network.dialled(addrs[1]);
            assert_eq!(dialled, 4, "{name} {protocol:?}: the first try and three more");
            let waited = if name == "black hole" { CONNECT_TIMEOUT * 4 } else { Duration::ZERO };
            let took = started.elapsed();
            assert!(took >= waited && took <= waited + Duration::from_millis(25 + 75 + 175), "{took:?}");
            nothing_is_left(&cluster, || 0).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a5_an_endpoint_that_comes_back_is_used_by_the_next_request() {
    for protocol in BOTH {
        let (network, up) = (Network::default(), Script::new("up", |_| Reply::Status(200)));
        let addr = network.host(Host::Fails(ErrorKind::ConnectionRefused));
        let cluster = cluster_of(&[addr], |spec| spec.protocol = protocol);
        let client = network.client(&cluster, |route| route);
        for _ in 0..100 {
            assert!(outcome(&client, get()).await.starts_with("503 UF "), "{protocol:?}");
        }
        network.replace(addr, Host::script(&up, protocol));
        assert_eq!(outcome(&client, get()).await, "200 - up", "{protocol:?}: nobody remembers failures");
        nothing_is_left(&cluster, || up.open()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a5_a_crowd_at_a_dead_endpoint_makes_one_connection_at_a_time() {
    for protocol in BOTH {
        for (name, host) in unreachable() {
            let network = Network::default();
            let addr = network.host(host);
            let cluster = cluster_of(&[addr], |spec| (spec.protocol, spec.pool) = (protocol, pool()));
            let client = network.client(&cluster, |route| route);
            let started = Instant::now();
            let mut requests = JoinSet::new();
            for _ in 0..100 {
                let client = client.clone();
                requests.spawn(async move { outcome(&client, get()).await });
            }
            for outcome in requests.join_all().await {
                assert!(outcome.starts_with("503 UF "), "{name} {protocol:?} {outcome}");
            }
            assert_eq!((network.most_dialling(), network.dialled(addr)), (1, 1), "{name} {protocol:?}");
            assert!(started.elapsed() <= CONNECT_TIMEOUT, "they fail together, not one after the other");
            nothing_is_left(&cluster, || 0).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a5_whoever_connects_and_leaves_hands_it_to_the_next() {
    for protocol in BOTH {
        let (network, up) = (Network::default(), Script::new("up", |_| Reply::Status(200)));
        let late = Host::Late(Duration::from_secs(1), Arc::new(Host::script(&up, protocol)));
        let addr = network.host(late);
        let cluster = cluster_of(&[addr], |spec| spec.protocol = protocol);
        let client = network.client(&cluster, |route| route);
        let first = tokio::spawn({
            let client = client.clone();
            async move { outcome(&client, get()).await }
        });
        until("the first to connect", async || network.dialled(addr) == 1).await;
        let others: Vec<_> = (0..10)
            .map(|_| {
                let client = client.clone();
                tokio::spawn(async move { outcome(&client, get()).await })
            })
            .collect();
        until("the others to wait", async || cluster.runtime().unwrap().pending() == 11).await;
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        for other in others {
            assert_eq!(other.await.unwrap(), "200 - up", "{protocol:?}");
        }
        if protocol == UpstreamProtocol::Http2 {
            assert_eq!(network.dialled(addr), 1, "it is the connection that the first began");
        }
        nothing_is_left(&cluster, || up.open()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn bug_a_look_through_idle_connections_made_those_who_waited_try_one_after_the_other() {
    for protocol in BOTH {
        let (network, up) = (Network::default(), Script::new("up", |_| Reply::Status(200)));
        let addrs = [network.host(Host::script(&up, protocol)), network.host(Host::Silent)];
        let cluster_at = |addr| cluster_of(&[addr], |spec| (spec.protocol, spec.pool) = (protocol, pool()));
        let shard = network.shard(1);
        let (good, dead) = (cluster_at(addrs[0]), cluster_at(addrs[1]));
        // With the first connection the shard begins to look through its idle ones each second.
        assert_eq!(outcome(&client_on(Arc::clone(&shard), &good, |route| route), get()).await, "200 - up");
        let client = client_on(shard, &dead, |route| route);
        let started = Instant::now();
        let mut requests = JoinSet::new();
        for _ in 0..50 {
            let client = client.clone();
            requests.spawn(async move { outcome(&client, get()).await });
        }
        for outcome in requests.join_all().await {
            assert!(outcome.starts_with("503 UF "), "{outcome}");
        }
        assert_eq!((started.elapsed(), network.dialled(addrs[1])), (CONNECT_TIMEOUT, 1), "{protocol:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn bug_who_waited_for_another_to_connect_did_not_see_connections_that_became_free() {
    let network = Network::default();
    let up = Script::new("up", |_| Reply::After(Duration::from_secs(1), 200));
    let addr = network.host(Host::script(&up, UpstreamProtocol::Http1));
    let cluster = cluster_of(&[addr], |spec| spec.pool.connect_timeout = Duration::from_secs(60));
    let client = network.client(&cluster, |route| route);
    let ask = || {
        let client = client.clone();
        tokio::spawn(async move { outcome(&client, get()).await })
    };
    let started = Instant::now();
    let served = ask();
    until("a request at the upstream", async || up.requests() == 1).await;
    // The next cannot connect, and those after it wait, or they connect in vain.
    network.replace(addr, Host::Silent);
    let waiting = [ask(), ask(), ask()];
    assert_eq!(served.await.unwrap(), "200 - up");
    for asked in waiting {
        assert_eq!(asked.await.unwrap(), "200 - up");
    }
    assert_eq!(started.elapsed().as_secs(), 4, "one after the other on the connection that there is");
}

#[tokio::test(start_paused = true)]
async fn bug_a_connection_that_failed_made_those_wait_who_had_others_open() {
    let network = Network::default();
    let up = Script::new("up", |_| Reply::After(Duration::from_secs(1), 200));
    let addr = network.host(Host::script(&up, UpstreamProtocol::Http1));
    let cluster = cluster_of(&[addr], |spec| spec.pool.connect_timeout = Duration::from_secs(60));
    let client = network.client(&cluster, |route| route);
    let ask = || {
        let client = client.clone();
        tokio::spawn(async move { outcome(&client, get()).await })
    };
    let served = ask();
    until("a request at the upstream", async || up.requests() == 1).await;
    network.replace(addr, Host::Fails(ErrorKind::ConnectionRefused));
    assert!(ask().await.unwrap().starts_with("503 UF"));
    // One connection fails in no time, the endpoint is there all the same: the next two connect side by side.
    network.replace(addr, Host::Silent);
    let dialled = network.dialled(addr);
    let waiting = [ask(), ask()];
    until("two connections to be made at once", async || network.dialled(addr) == dialled + 2).await;
    assert_eq!(served.await.unwrap(), "200 - up");
    for asked in waiting {
        assert_eq!(asked.await.unwrap(), "200 - up");
    }
}

#[tokio::test(start_paused = true)]
async fn bug_a_connection_died_with_the_request_that_made_it() {
    for protocol in BOTH {
        let tasks = Tasks::now();
        let up = Script::new("up", |_| Reply::Status(200));
        let network = Network::default();
        let late = Host::Late(Duration::from_millis(600), Arc::new(Host::script(&up, protocol)));
        let addr = network.host(late);
        let cluster = cluster_of(&[addr], |spec| spec.protocol = protocol);
        let client = network.client(&cluster, |route| route.timeout(Duration::from_millis(500)));
        let mut requests = JoinSet::new();
        for at in 0..1000 {
            let client = client.clone();
            requests.spawn(async move {
                tokio::time::sleep(Duration::from_millis(10 * at)).await;
                outcome(&client, get()).await
            });
        }
        let outcomes = requests.join_all().await;
        let late = outcomes.iter().filter(|outcome| outcome.starts_with("504 UT")).count();
        let served = outcomes.iter().filter(|outcome| *outcome == "200 - up").count();
        // Who comes in the first 100 ms is gone before the connection is made.
        assert!(late <= 11 && served == 1000 - late, "{protocol:?}: {served} served, {late} late");
        // One finds out whether the endpoint is there; then who waits connects, over HTTP/1.1 each for itself.
        let most = if protocol == UpstreamProtocol::Http2 { 1 } else { 50 };
        assert!(network.dialled(addr) <= most, "{protocol:?}: {} connections", network.dialled(addr));
        nothing_is_left(&cluster, || up.open()).await;
        drop((client, cluster));
        tasks.are_back().await;
    }
}

#[tokio::test(start_paused = true)]
async fn bug_a_connection_that_may_live_longer_than_a_clock_can_tell_panicked() {
    for protocol in BOTH {
        let (network, up) = (Network::default(), Script::new("up", |_| Reply::Status(200)));
        let addr = network.host(Host::script(&up, protocol));
        let cluster = cluster_of(&[addr], |spec| {
            spec.protocol = protocol;
            spec.pool = PoolSettings {
                connect_timeout: Duration::MAX,
                idle_timeout: Some(Duration::MAX),
                max_connection_duration: Some(Duration::MAX),
                http2_keepalive: Some(Http2Keepalive { interval: Duration::MAX, timeout: Duration::MAX }),
                ..PoolSettings::default()
            };
        });
        let client = network.client(&cluster, |route| route);
        for _ in 0..3 {
            assert_eq!(outcome(&client, get()).await, "200 - up", "{protocol:?}");
            tokio::time::sleep(Duration::from_secs(86_400)).await;
        }
        assert_eq!(network.dialled(addr), 1, "{protocol:?}: it lives");
    }
}

#[tokio::test(start_paused = true)]
async fn bug_a_black_hole_behind_a_shorter_timeout_was_never_ejected() {
    for protocol in BOTH {
        let network = Network::default();
        let addrs = [network.host(Host::Silent), network.host(Host::Silent)];
        let cluster = cluster_of(&addrs, |spec| {
            (spec.protocol, spec.pool) = (protocol, pool());
            let three = OutlierDetection { consecutive_5xx: 3, ..OutlierDetection::default() };
            spec.outlier_detection = Some(Box::new(OutlierDetection { max_ejection_percent: 100, ..three }));
        });
        let client = network.client(&cluster, |route| route.timeout(CONNECT_TIMEOUT / 4));
        let runtime = cluster.runtime().unwrap();
        let ejected = || runtime.with_outliers(|outliers| outliers.ejected());
        let dialled = || addrs.map(|addr| network.dialled(addr)).iter().sum::<usize>();
        for _ in 0..6 {
            assert!(outcome(&client, get()).await.starts_with("504 UT "), "{protocol:?}");
            // Nobody waits any more when the connection fails.
            tokio::time::sleep(CONNECT_TIMEOUT).await;
        }
        assert_eq!((dialled(), ejected()), (6, 2), "{protocol:?}: three of each");
        assert!(outcome(&client, get()).await.starts_with("503 UH "), "{protocol:?}");
        nothing_is_left(&cluster, || 0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn bug_a_connection_for_one_request_was_lost_when_the_one_that_made_it_had_left() {
    for protocol in BOTH {
        let (network, up) = (Network::default(), Script::new("up", |_| Reply::Status(200)));
        let late = Host::Late(Duration::from_millis(600), Arc::new(Host::script(&up, protocol)));
        let addr = network.host(late);
        let cluster = cluster_of(&[addr], |spec| {
            spec.protocol = protocol;
            spec.pool.max_requests_per_connection = Some(1);
        });
        let client = network.client(&cluster, |route| route.timeout(Duration::from_millis(500)));
        for at in 1..=3 {
            assert!(outcome(&client, get()).await.starts_with("504 UT "), "{protocol:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert_eq!(
                outcome(&client, get()).await,
                "200 - up",
                "{protocol:?}: on the connection that was made"
            );
            assert_eq!((network.dialled(addr), up.requests()), (at, at), "{protocol:?}");
        }
        nothing_is_left(&cluster, || up.open()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn bug_connections_for_one_request_each_were_made_one_after_the_other() {
    for protocol in BOTH {
        let (network, up) = (Network::default(), Script::new("up", |_| Reply::Status(200)));
        let addr = network.host(Host::script(&up, protocol));
        let cluster = cluster_of(&[addr], |spec| {
            spec.protocol = protocol;
            spec.pool.max_requests_per_connection = Some(1);
        });
        let client = network.client(&cluster, |route| route);
        assert_eq!(outcome(&client, get()).await, "200 - up", "{protocol:?}");
        let second = Duration::from_secs(1);
        network.replace(addr, Host::Late(second, Arc::new(Host::script(&up, protocol))));
        let started = Instant::now();
        let mut requests = JoinSet::new();
        for _ in 0..100 {
            let client = client.clone();
            requests.spawn(async move { outcome(&client, get()).await });
        }
        for outcome in requests.join_all().await {
            assert_eq!(outcome, "200 - up", "{protocol:?}");
        }
        assert_eq!(started.elapsed(), second, "{protocol:?}");
        assert_eq!((network.most_dialling(), network.dialled(addr)), (100, 101), "{protocol:?}");
        nothing_is_left(&cluster, || up.open()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn bug_who_made_a_connection_did_not_see_what_became_free_meanwhile() {
    for protocol in BOTH {
        let second = Duration::from_secs(1);
        let (network, up) = (Network::default(), Script::new("up", move |_| Reply::After(second, 200)));
        let addr = network.host(Host::script(&up, protocol));
        let cluster = cluster_of(&[addr], |spec| {
            spec.protocol = protocol;
            spec.pool.max_concurrent_streams = 1;
        });
        let client = network.client(&cluster, |route| route);
        let started = Instant::now();
        let first = tokio::spawn({
            let client = client.clone();
            async move { outcome(&client, get()).await }
        });
        until("the first to be sent", async || up.requests() == 1).await;
        network.replace(addr, Host::Silent);
        assert_eq!(outcome(&client, get()).await, "200 - up", "{protocol:?}");
        assert_eq!(first.await.unwrap(), "200 - up", "{protocol:?}");
        assert_eq!((started.elapsed(), network.dialled(addr)), (second * 2, 2), "{protocol:?}");
    }
}

/// Answers at once, whether the request is whole or not; `GET` after a second.
fn early(open: &Arc<AtomicUsize>) -> Host {
    let open = Arc::clone(open);
    Host::Serves(Arc::new(move |stream| {
        let service = service_fn(|request: Request<Incoming>| async move {
            if request.method() == Method::GET {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            tokio::spawn(request.into_body().collect());
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"ok"))))
        });
        let open = Arc::clone(&open);
        open.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move {
            // How it ends is the client's business.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            open.fetch_sub(1, Ordering::SeqCst);
        });
    }))
}

#[tokio::test(start_paused = true)]
async fn bug_who_waited_for_the_end_of_an_upload_did_not_see_connections_that_became_free() {
    let (network, open) = (Network::default(), Arc::default());
    let addr = network.host(early(&open));
    let cluster = cluster_of(&[addr], |spec| spec.pool.max_connections = 2);
    let client = network.client(&cluster, |route| route);
    let ask = || {
        let client = client.clone();
        tokio::spawn(async move { outcome(&client, get()).await })
    };
    let started = Instant::now();
    let (mut feed, body) = Channel::<Bytes, mesh_core::Error>::new(1);
    let upload = Request::post("http://up/").body(Body::new(body)).unwrap();
    assert_eq!(outcome(&client, upload).await, "200 - ok", "before the request is whole");
    let held = ask();
    until("the other connection to be taken", async || network.dialled(addr) == 2).await;
    let [first, second] = [ask(), ask()];
    assert_eq!(held.await.unwrap(), "200 - ok");
    assert_eq!(first.await.unwrap(), "200 - ok");
    assert_eq!(second.await.unwrap(), "200 - ok");
    assert_eq!(started.elapsed(), Duration::from_secs(3), "one after the other, on the one that is free");
    // The upload goes on, and its connection is there when it has ended.
    feed.send_data(Bytes::from_static(b"x")).await.unwrap();
    drop(feed);
    let both = [ask(), ask()];
    for asked in both {
        assert_eq!(asked.await.unwrap(), "200 - ok");
    }
    assert_eq!((started.elapsed(), network.dialled(addr)), (Duration::from_secs(4), 2));
    nothing_is_left(&cluster, || open.load(Ordering::SeqCst)).await;
}
