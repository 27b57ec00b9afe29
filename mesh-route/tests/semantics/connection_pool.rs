//! `connectionPool`: DR-CP01 … DR-CP06 (DR-CP04 is in `outlier.rs`).

use std::sync::Arc;
use std::time::Duration;

use http::Version;
use mesh_core::{Connect, ConnectTarget, Connecting, Slot};
use mesh_route::{PoolSettings, SelectRouteLayer, Shard, TcpKeepalive, dispatch};
use mesh_testkit::scripted::{Reply, Scripted};
use tokio::io::AsyncWriteExt as _;
use tower::ServiceBuilder;
use tower::util::BoxCloneSyncService;

use crate::support::*;

const REVIEWS: &str = "outbound|80||reviews.default.svc.cluster.local";

fn with_pool(services: &str, pool: &str) -> String {
    let rule = format!("{{host: reviews, trafficPolicy: {{connectionPool: {pool}}}}}");
    format!("{services}{}", resource("DestinationRule", "pool", &rule))
}

fn settings(pool: &str) -> PoolSettings {
    let it = compile(&with_pool(&service_in("default", "reviews", &[1]), pool));
    assert_eq!(it.unenforced(), [] as [&str; 0], "{pool}");
    it.spec(REVIEWS).pool
}

fn default_settings() -> PoolSettings {
    compile(&service_in("default", "reviews", &[1])).spec(REVIEWS).pool
}

#[test]
fn dr_cp01_tcp() {
    let default = default_settings();
    assert_eq!(default.max_connections, u32::MAX);
    assert_eq!(default.connect_timeout, Duration::from_secs(10));
    assert_eq!(default.max_connection_duration, None);
    assert_eq!(default.idle_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(default.tcp_keepalive, None);
    let set = settings(
        "{tcp: {maxConnections: 5, connectTimeout: 30ms, maxConnectionDuration: 1h, idleTimeout: 5s, tcpKeepalive: {probes: 3, time: 7200s, interval: 75s}}}",
    );
    assert_eq!(set.max_connections, 5);
    assert_eq!(set.connect_timeout, Duration::from_millis(30));
    assert_eq!(set.max_connection_duration, Some(Duration::from_secs(3600)));
    assert_eq!(set.idle_timeout, Some(Duration::from_secs(5)));
    assert_eq!(
        set.tcp_keepalive,
        Some(TcpKeepalive {
            probes: Some(3),
            time: Some(Duration::from_secs(7200)),
            interval: Some(Duration::from_secs(75))
        })
    );
    // What a keepalive leaves out is the operating system's.
    assert_eq!(settings("{tcp: {tcpKeepalive: {}}}").tcp_keepalive, Some(TcpKeepalive::default()));
    assert_eq!(settings("{tcp: {idleTimeout: 0s}}").idle_timeout, None, "0 is off");
    assert_eq!(settings("{tcp: {maxConnections: 0, connectTimeout: 1s}}").max_connections, u32::MAX);
    let path = "spec.trafficPolicy.connectionPool.tcp";
    refused(&with_pool("", "{tcp: {maxConnections: -1}}"), &format!("{path}.maxConnections"), "negative");
    refused(&with_pool("", "{tcp: {connectTimeout: 0.5ms}}"), &format!("{path}.connectTimeout"), "1ms");
    refused(&with_pool("", "{}"), "spec.trafficPolicy.connectionPool", "needs tcp or http");
}

#[test]
fn dr_cp02_http() {
    let default = default_settings();
    assert_eq!((default.max_pending_requests, default.max_requests), (u32::MAX, u32::MAX));
    assert_eq!(default.max_requests_per_connection, None);
    assert_eq!(default.max_concurrent_streams, (1 << 31) - 1);
    let set = settings(
        "{http: {http1MaxPendingRequests: 4, http2MaxRequests: 6, maxRequestsPerConnection: 1, maxConcurrentStreams: 8, idleTimeout: 7s}, tcp: {idleTimeout: 9s}}",
    );
    assert_eq!((set.max_pending_requests, set.max_requests), (4, 6));
    assert_eq!(set.max_requests_per_connection, Some(1));
    assert_eq!(set.max_concurrent_streams, 8);
    assert_eq!(set.idle_timeout, Some(Duration::from_secs(7)), "that of http comes before that of tcp");
    assert_eq!(settings("{http: {idleTimeout: 0s}, tcp: {idleTimeout: 9s}}").idle_timeout, None);
    // 0 cannot be told from what is not written.
    let zero =
        settings("{http: {http1MaxPendingRequests: 0, http2MaxRequests: 0, maxRequestsPerConnection: 0}}");
    assert_eq!(zero, default);
    for field in ["http1MaxPendingRequests", "http2MaxRequests", "maxRequestsPerConnection", "maxRetries"] {
        let path = format!("spec.trafficPolicy.connectionPool.http.{field}");
        refused(&with_pool("", &format!("{{http: {{{field}: -1}}}}")), &path, "negative");
    }
}

/// Sends requests that the upstream holds until each `limit` is taken, then one more, which must overflow.
async fn overflows_at(pool: &str, in_flight: usize, queued: u32) {
    let (echo, services) = one_version().await;
    let it = compile(&with_pool(&services, pool));
    let client = it.client();
    let runtime = Arc::clone(it.cluster(REVIEWS).runtime().unwrap());
    let hold = || {
        let client = client.clone();
        tokio::spawn(async move { send(&client, get("http://reviews/gate")).await.status })
    };
    let mut held = Vec::new();
    for count in 1..=in_flight {
        held.push(hold());
        until(|| echo.requests() == count).await;
    }
    for count in 1..=queued {
        held.push(hold());
        until(|| runtime.pending() == count).await;
    }
    assert_eq!(runtime.overflows(), 0, "{pool}: at the limit nothing is refused");
    let refused = fail(&client, get("http://reviews/one-more")).await;
    assert!(refused.starts_with("503 UO "), "{pool}: {refused}");
    assert_eq!(runtime.overflows(), 1);
    echo.gate.add_permits(held.len());
    for held in held {
        assert_eq!(ended(held).await, 200, "{pool}");
    }
    assert_eq!(send(&client, get("http://reviews/")).await.status, 200, "{pool}: and then there is room");
}

#[tokio::test]
async fn dr_cp01_max_connections_is_enforced_at_one_more() {
    overflows_at("{tcp: {maxConnections: 2}, http: {http1MaxPendingRequests: 1}}", 2, 1).await;
}

#[tokio::test]
async fn dr_cp02_pending_and_requests_are_enforced_at_one_more() {
    overflows_at("{tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 3}}", 1, 3).await;
    overflows_at("{http: {http2MaxRequests: 2}}", 2, 0).await;
    // Also over HTTP/2, where one connection carries all.
    overflows_at("{http: {http2MaxRequests: 3, h2UpgradePolicy: UPGRADE}}", 3, 0).await;
    overflows_at(
        "{tcp: {maxConnections: 1}, http: {maxConcurrentStreams: 2, http1MaxPendingRequests: 1, h2UpgradePolicy: UPGRADE}}",
        2,
        1,
    )
    .await;
}

/// Which protocol the application of `reviews` sees of a request of this version.
async fn spoken(pool: &str, settings: &str, version: Version) -> String {
    let (_echo, services) = one_version().await;
    let yaml = if settings.is_empty() { services } else { services + &mesh(settings) };
    let client = compile(&with_pool(&yaml, pool)).client();
    let mut request = get("http://reviews/");
    *request.version_mut() = version;
    send(&client, request).await.saw()["protocol"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn dr_cp03_which_protocol_is_spoken() {
    let (one, two) = (Version::HTTP_11, Version::HTTP_2);
    let policy = |name: &str| format!("{{http: {{h2UpgradePolicy: {name}}}}}");
    for (pool, settings, version, expected) in [
        (policy("UPGRADE"), "", one, "HTTP/2.0"),
        (policy("DO_NOT_UPGRADE"), "", two, "HTTP/1.1"),
        (policy("DEFAULT"), "", one, "HTTP/1.1"),
        (policy("DEFAULT"), "h2UpgradePolicy: UPGRADE", one, "HTTP/2.0"),
        (policy("DO_NOT_UPGRADE"), "h2UpgradePolicy: UPGRADE", one, "HTTP/1.1"),
        ("{http: {useClientProtocol: true}}".into(), "", one, "HTTP/1.1"),
        ("{http: {useClientProtocol: true}}".into(), "", two, "HTTP/2.0"),
        // What a rule says of its own comes before what the mesh says of upgrades.
        ("{http: {useClientProtocol: true}}".into(), "h2UpgradePolicy: UPGRADE", one, "HTTP/1.1"),
    ] {
        assert_eq!(spoken(&pool, settings, version).await, expected, "{pool} {settings} {version:?}");
    }
    let both = with_pool("", "{http: {useClientProtocol: true, h2UpgradePolicy: UPGRADE}}");
    refused(&both, "spec.trafficPolicy.connectionPool.http.useClientProtocol", "UPGRADE");
}

#[tokio::test]
async fn dr_cp03_so_many_streams_on_a_connection() {
    for (most, connections) in [(1, 4), (2, 2), (100, 1)] {
        let (echo, services) = one_version().await;
        let pool = format!("{{http: {{h2UpgradePolicy: UPGRADE, maxConcurrentStreams: {most}}}}}");
        let it = compile(&with_pool(&services, &pool));
        let client = it.client();
        let mut held = Vec::new();
        for count in 1..=4 {
            let client = client.clone();
            held.push(tokio::spawn(async move { send(&client, get("http://reviews/gate")).await.status }));
            until(|| echo.requests() == count).await;
        }
        assert_eq!(it.cluster(REVIEWS).runtime().unwrap().connections(), connections, "{most}");
        echo.gate.add_permits(4);
        for held in held {
            assert_eq!(ended(held).await, 200);
        }
    }
}

const KEEPALIVE: &str = "{http: {h2UpgradePolicy: UPGRADE, http2KeepAlive: {interval: 20s, timeout: 5s}}}";

/// A peer that says that it speaks HTTP/2, and then nothing any more.
async fn mute() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            // An empty SETTINGS frame.
            stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            open.push(stream);
        }
    });
    port
}

#[tokio::test(start_paused = true)]
async fn dr_cp03_pings_find_out_that_a_peer_is_gone() {
    let services = |port| service_in("default", "reviews", &[port]);
    let once = rules("  - {route: [{destination: {host: reviews}}], retries: {attempts: 0}}");
    let it = compile(&with_pool(&(services(mute().await) + &once), KEEPALIVE));
    assert_eq!(it.unenforced(), [] as [&str; 0]);
    let started = tokio::time::Instant::now();
    let failed = fail(&it.client(), get("http://reviews/")).await;
    assert!(failed.starts_with("503 UC "), "{failed}");
    assert_eq!(started.elapsed().as_secs(), 25, "the interval and then the timeout");
    // One that answers pings may take its time.
    let slow = Scripted::start("slow", |_| Reply::After(Duration::from_secs(1000), 200)).await;
    let it = compile(&with_pool(&(services(slow.addr.port()) + &once), KEEPALIVE));
    assert_eq!(send(&it.client(), get("http://reviews/")).await.status, 200);
    let path = "spec.trafficPolicy.connectionPool.http.http2KeepAlive.timeout";
    refused(&with_pool("", "{http: {http2KeepAlive: {interval: 5s}}}"), path, "required");
}

#[tokio::test]
async fn dr_cp05_limits_are_of_a_process_and_a_cluster() {
    let (one, two, services) = two_versions().await;
    let to = |subset: &str| {
        format!(
            "  - {{match: [{{uri: {{regex: '.*-{subset}'}}}}], route: [{{destination: {{host: reviews, subset: {subset}}}}}]}}\n"
        )
    };
    let routes = rules(&(to("v1") + &to("v2")));
    let yaml = with_pool(&(services + &routes), "{http: {http2MaxRequests: 1}}");
    let it = compile(&yaml);
    let (worker, other) = (it.client_seeded(1), it.client_seeded(2));
    let held = tokio::spawn({
        let worker = worker.clone();
        async move { send(&worker, get("http://reviews/gate-v1")).await.status }
    });
    until(|| one.requests() == 1).await;
    assert!(fail(&worker, get("http://reviews/a-v1")).await.starts_with("503 UO "));
    assert!(fail(&other, get("http://reviews/a-v1")).await.starts_with("503 UO "), "of all workers together");
    assert_eq!(send(&worker, get("http://reviews/a-v2")).await.status, 200, "another cluster has its own");
    let elsewhere = compile(&yaml).client();
    assert_eq!(send(&elsewhere, get("http://reviews/a-v1")).await.status, 200, "and so has another proxy");
    assert_eq!((one.requests(), two.requests()), (2, 1));
    one.gate.add_permits(1);
    assert_eq!(ended(held).await, 200);
}

#[tokio::test]
async fn dr_cp06_the_policy_of_the_mesh_lies_below_block_by_block() {
    let below = mesh(
        "defaultTrafficPolicy:\n  connectionPool: {tcp: {connectTimeout: 3s, maxConnections: 7}}\n  outlierDetection: {consecutive5xxErrors: 2}\n  loadBalancer: {simple: RANDOM}",
    );
    let it = compile(&(service_in("default", "reviews", &[1]) + &below));
    assert_eq!(it.unenforced(), [] as [&str; 0]);
    let alone = it.spec(REVIEWS);
    assert_eq!((alone.pool.max_connections, alone.pool.connect_timeout.as_secs()), (7, 3));
    assert_eq!(alone.outlier_detection.unwrap().consecutive_5xx, 2);
    assert_eq!(alone.balancer, mesh_route::BalancerKind::Random);
    let it =
        compile(&(with_pool(&service_in("default", "reviews", &[1]), "{tcp: {maxConnections: 9}}") + &below));
    let ruled = it.spec(REVIEWS);
    assert_eq!((ruled.pool.max_connections, ruled.pool.connect_timeout.as_secs()), (9, 10), "a block whole");
    assert_eq!(ruled.outlier_detection.unwrap().consecutive_5xx, 2, "and the others stay");
    // With a port's own settings nothing of the rule's stays, and nothing of the mesh's.
    let port = "{host: reviews, trafficPolicy: {portLevelSettings: [{port: {number: 80}, loadBalancer: {simple: ROUND_ROBIN}}]}}";
    let it =
        compile(&(service_in("default", "reviews", &[1]) + &resource("DestinationRule", "p", port) + &below));
    let of_port = it.spec(REVIEWS);
    assert_eq!((of_port.pool.max_connections, of_port.outlier_detection), (u32::MAX, None));
}

#[tokio::test(start_paused = true)]
async fn dr_cp01_connections_end_by_idleness_and_by_age() {
    for protocol in ["DO_NOT_UPGRADE", "UPGRADE"] {
        for (pool, pauses, connections) in [
            // How long each request is after the one before, and how many connections there have been by then.
            (
                format!("{{http: {{idleTimeout: 5s, h2UpgradePolicy: {protocol}}}}}"),
                [0, 4, 4, 7],
                [1, 1, 1, 2],
            ),
            (
                format!("{{tcp: {{maxConnectionDuration: 10s}}, http: {{h2UpgradePolicy: {protocol}}}}}"),
                [0, 4, 4, 4],
                [1, 1, 1, 2],
            ),
            (
                format!("{{http: {{maxRequestsPerConnection: 2, h2UpgradePolicy: {protocol}}}}}"),
                [0, 0, 0, 0],
                [1, 1, 2, 2],
            ),
            (
                format!("{{http: {{maxRequestsPerConnection: 1, h2UpgradePolicy: {protocol}}}}}"),
                [0, 0, 0, 0],
                [1, 2, 3, 4],
            ),
        ] {
            let up = Scripted::start("up", |_| Reply::Status(200)).await;
            let services = service_in("default", "reviews", &[up.addr.port()]);
            let client = compile(&with_pool(&services, &pool)).client();
            for (pause, connections) in pauses.into_iter().zip(connections) {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                assert_eq!(send(&client, get("http://reviews/")).await.status, 200);
                assert_eq!(up.connections(), connections, "{pool} after {pause} s");
            }
        }
    }
}

/// Connections that are never made.
#[derive(Debug)]
struct Never;

impl Connect for Never {
    fn connect(&self, _: &ConnectTarget) -> Connecting {
        Box::pin(std::future::pending())
    }
}

#[tokio::test(start_paused = true)]
async fn dr_cp01_connecting_takes_no_longer_than_it_may() {
    let once = rules("  - {route: [{destination: {host: reviews}}], retries: {attempts: 0}}");
    for (pool, millis) in
        [("{tcp: {connectTimeout: 250ms}}", 250), ("{http: {h2UpgradePolicy: UPGRADE}}", 10_000)]
    {
        let it = compile(&with_pool(&(service_in("default", "reviews", &[1]) + &once), pool));
        mesh_route::Clusters::new().reconcile(it.table.clusters());
        let stack = ServiceBuilder::new()
            .layer(SelectRouteLayer::new(Slot::fixed_shared(Arc::clone(&it.table))))
            .service(dispatch(Shard::connecting_by(1, Arc::new(Never))));
        let started = tokio::time::Instant::now();
        let failed = fail(&BoxCloneSyncService::new(stack), get("http://reviews/")).await;
        assert!(failed.starts_with("503 UF "), "{failed}");
        assert_eq!(started.elapsed().as_millis(), millis, "{pool}");
    }
}
