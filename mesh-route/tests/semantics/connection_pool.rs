//! `connectionPool`: DR-CP01, DR-CP02.

use std::sync::Arc;
use std::time::Duration;

use mesh_route::{PoolSettings, TcpKeepalive};

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
