//! The same intent, given to Envoy and to the sidecar: do they do the same?
//!
//! Each case starts both in front of upstreams that follow the same script, sends both the same requests, and compares
//! what the client sees (status, body, the headers of overload) and how often the upstreams were asked. Where the two
//! differ on purpose, the case says why, and a difference that is not expected is as wrong as one that is.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mesh_testkit::process::ConfigDir;
use mesh_testkit::raw::{exchange, get_json};
use mesh_testkit::scripted::{Reply, Scripted, Seen};
use serde_json::{Value, json};

use crate::proxy::start;

type Script = fn(&Seen) -> Reply;

/// One intent in both languages.
struct Case {
    name: &'static str,
    /// What each upstream does.
    upstreams: &'static [Script],
    /// Another endpoint, where nobody listens.
    closed: bool,
    /// The rest of the rule of the VirtualService.
    rule: &'static str,
    /// The traffic policy of the DestinationRule.
    policy: &'static str,
    /// What is merged into Envoy's route, cluster and fault filter.
    route: fn() -> Value,
    cluster: fn() -> Value,
    fault: fn() -> Value,
    traffic: Traffic,
    /// What each request asks for, by its number, and headers that end with a line break each.
    target: fn(usize) -> String,
    headers: fn(usize) -> String,
    /// The weight, the locality and Envoy's priority of each upstream; empty is 1, none and 0.
    weights: &'static [u32],
    localities: &'static [&'static str],
    priorities: &'static [u32],
    /// The localities of the clients' own service; the proxy is one of those in the first. Empty is no such service.
    clients: &'static [&'static str],
    /// Both proxies have the same upstreams, one after the other: which of them answers is compared.
    shared: bool,
    /// How many connections the upstreams saw is compared.
    connections: bool,
    /// Why the two may differ.
    differs: Option<&'static str>,
}

#[derive(Clone, Copy)]
enum Traffic {
    /// So many requests, one after the other.
    Sequence(usize),
    /// So many at once.
    AtOnce(usize),
    /// So many, of which the share by status is compared.
    Shares(usize),
}

/// What a proxy made of a case.
#[derive(Debug, PartialEq)]
struct Observed {
    answers: Vec<String>,
    tries: Vec<usize>,
    /// Empty where they are not compared.
    connections: Vec<usize>,
}

/// What stands behind a proxy, and what it had seen before.
struct Upstreams {
    scripted: Vec<Scripted>,
    addresses: Vec<SocketAddr>,
    seen: Vec<(usize, usize)>,
}

impl Upstreams {
    async fn start(case: &Case) -> Self {
        let mut scripted = Vec::new();
        for script in case.upstreams {
            scripted.push(Scripted::start("up", *script).await);
        }
        let mut addresses: Vec<_> = scripted.iter().map(|upstream| upstream.addr).collect();
        if case.closed {
            let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            addresses.push(closed.local_addr().expect("an address"));
        }
        let seen = vec![(0, 0); scripted.len()];
        Self { scripted, addresses, seen }
    }

    fn observed(&mut self, case: &Case, answers: Vec<String>) -> Observed {
        let now: Vec<_> = self.scripted.iter().map(|one| (one.requests(), one.connections())).collect();
        let before = std::mem::replace(&mut self.seen, now.clone());
        let new = || now.iter().zip(&before).map(|(now, before)| (now.0 - before.0, now.1 - before.1));
        let connections =
            if case.connections { new().map(|(_, connections)| connections).collect() } else { Vec::new() };
        Observed { answers, tries: new().map(|(requests, _)| requests).collect(), connections }
    }
}

fn none() -> Value {
    json!({})
}

/// What istiod makes of a route that says nothing of retries.
fn default_retries() -> Value {
    retries("connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes", 2)
}

fn retries(on: &str, attempts: u32) -> Value {
    json!({"retry_policy": {
        "retry_on": on,
        "num_retries": attempts,
        "retry_host_predicate": [{
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
        }],
        "host_selection_retry_max_attempts": 5,
    }})
}

fn with(mut base: Value, more: Value) -> Value {
    merge(&mut base, more);
    base
}

const CASES: &[Case] = &[
    Case {
        name: "default retries, 503",
        upstreams: &[|_| Reply::Status(503)],
        traffic: Traffic::Sequence(5),
        ..PLAIN
    },
    Case {
        name: "default retries, reset",
        upstreams: &[|_| Reply::Reset],
        traffic: Traffic::Sequence(5),
        ..PLAIN
    },
    Case { name: "default retries, nobody listens", closed: true, upstreams: &[], ..PLAIN },
    Case {
        name: "one of two refuses connections",
        closed: true,
        upstreams: &[|_| Reply::Status(200)],
        traffic: Traffic::Sequence(40),
        ..PLAIN
    },
    Case {
        name: "5xx, always 500",
        rule: "retries: {attempts: 3, retryOn: 5xx}",
        route: || retries("5xx", 3),
        upstreams: &[|_| Reply::Status(500)],
        traffic: Traffic::Sequence(3),
        ..PLAIN
    },
    Case {
        name: "5xx, 500 once",
        rule: "retries: {attempts: 3, retryOn: 5xx}",
        route: || retries("5xx", 3),
        upstreams: &[|seen| Reply::Status(if seen.nth % 2 == 1 { 500 } else { 200 })],
        traffic: Traffic::Sequence(6),
        ..PLAIN
    },
    Case {
        name: "5xx, reset",
        rule: "retries: {attempts: 1, retryOn: 5xx}",
        route: || retries("5xx", 1),
        upstreams: &[|_| Reply::Reset],
        ..PLAIN
    },
    Case {
        name: "gateway-error, 500 and 502",
        rule: "retries: {attempts: 1, retryOn: gateway-error}",
        route: || retries("gateway-error", 1),
        upstreams: &[|seen| Reply::Status(if seen.path == "/1" { 500 } else { 502 })],
        traffic: Traffic::Sequence(3),
        ..PLAIN
    },
    Case {
        name: "retriable-4xx, 409 and 429",
        rule: "retries: {attempts: 1, retryOn: retriable-4xx}",
        route: || retries("retriable-4xx", 1),
        upstreams: &[|seen| Reply::Status(if seen.path == "/1" { 429 } else { 409 })],
        traffic: Traffic::Sequence(3),
        ..PLAIN
    },
    Case {
        name: "503 only, reset is none",
        rule: "retries: {attempts: 2, retryOn: '503'}",
        route: || {
            with(
                retries("retriable-status-codes", 2),
                json!({"retry_policy": {"retriable_status_codes": [503]}}),
            )
        },
        upstreams: &[|_| Reply::Reset],
        ..PLAIN
    },
    Case {
        name: "503 only, 503",
        rule: "retries: {attempts: 2, retryOn: '503'}",
        route: || {
            with(
                retries("retriable-status-codes", 2),
                json!({"retry_policy": {"retriable_status_codes": [503]}}),
            )
        },
        upstreams: &[|_| Reply::Status(503)],
        ..PLAIN
    },
    Case {
        name: "envoy-ratelimited",
        rule: "retries: {attempts: 1, retryOn: '5xx,envoy-ratelimited'}",
        route: || retries("5xx,envoy-ratelimited", 1),
        upstreams: &[|_| Reply::Headers(429, vec![("x-envoy-ratelimited", "true")])],
        ..PLAIN
    },
    Case {
        name: "a rate limit is no 5xx",
        rule: "retries: {attempts: 1, retryOn: 5xx}",
        route: || retries("5xx", 1),
        upstreams: &[|_| Reply::Headers(503, vec![("x-envoy-ratelimited", "true")])],
        ..PLAIN
    },
    Case {
        name: "timeout of the route",
        rule: "timeout: 0.3s",
        route: || with(default_retries(), json!({"timeout": "0.3s"})),
        upstreams: &[|_| Reply::Hang],
        ..PLAIN
    },
    Case {
        name: "timeout of a try",
        rule: "retries: {attempts: 2, perTryTimeout: 0.1s, retryOn: 5xx}",
        route: || with(retries("5xx", 2), json!({"retry_policy": {"per_try_timeout": "0.1s"}})),
        upstreams: &[|_| Reply::Hang],
        ..PLAIN
    },
    Case {
        name: "timeout of a try that is no condition",
        rule: "retries: {attempts: 2, perTryTimeout: 0.1s}",
        route: || with(default_retries(), json!({"retry_policy": {"per_try_timeout": "0.1s"}})),
        upstreams: &[|_| Reply::Hang],
        ..PLAIN
    },
    Case {
        name: "both timeouts",
        // So that the third try begins a tenth of a second before the end, whatever is drawn between tries.
        rule: "timeout: 0.5s, retries: {attempts: 9, perTryTimeout: 0.2s, retryOn: reset, backoff: 0.001s}",
        route: || {
            with(
                retries("reset", 9),
                json!({"timeout": "0.5s", "retry_policy": {"per_try_timeout": "0.2s", "retry_back_off": {"base_interval": "0.001s"}}}),
            )
        },
        upstreams: &[|_| Reply::Hang],
        ..PLAIN
    },
    Case {
        name: "abort of a third",
        rule: "fault: {abort: {httpStatus: 418, percentage: {value: 33.3}}}",
        fault: || json!({"abort": {"http_status": 418, "percentage": {"numerator": 333_000, "denominator": "MILLION"}}}),
        traffic: Traffic::Shares(100_000),
        ..PLAIN
    },
    Case {
        name: "abort of all, no retry",
        rule: "retries: {attempts: 3, retryOn: 5xx}, fault: {abort: {httpStatus: 503, percentage: {value: 100}}}",
        route: || retries("5xx", 3),
        fault: || json!({"abort": {"http_status": 503, "percentage": {"numerator": 100}}}),
        ..PLAIN
    },
    Case {
        name: "two of three eject the failing one",
        policy: "{loadBalancer: {simple: ROUND_ROBIN}, outlierDetection: {consecutive5xxErrors: 3, interval: 0.1s, baseEjectionTime: 600s, maxEjectionPercent: 100}}",
        upstreams: &[|_| Reply::Status(500), |_| Reply::Status(200), |_| Reply::Status(201)],
        cluster: || json!({"outlier_detection": {"consecutive_5xx": 3, "interval": "0.1s", "base_ejection_time": "600s", "max_ejection_percent": 100, "enforcing_consecutive_5xx": 100, "enforcing_success_rate": 0, "consecutive_gateway_failure": 1000}}),
        traffic: Traffic::Shares(300),
        ..PLAIN
    },
    Case {
        name: "a tenth of three is nobody",
        policy: "{loadBalancer: {simple: ROUND_ROBIN}, outlierDetection: {consecutive5xxErrors: 3, interval: 0.1s, baseEjectionTime: 600s}}",
        upstreams: &[|_| Reply::Status(500), |_| Reply::Status(200), |_| Reply::Status(201)],
        cluster: || json!({"outlier_detection": {"consecutive_5xx": 3, "interval": "0.1s", "base_ejection_time": "600s", "max_ejection_percent": 10, "enforcing_consecutive_5xx": 100, "enforcing_success_rate": 0, "consecutive_gateway_failure": 1000}}),
        traffic: Traffic::Shares(300),
        ..PLAIN
    },
    Case {
        name: "all are ejected, no panic",
        rule: "retries: {attempts: 0}",
        policy: "{outlierDetection: {consecutive5xxErrors: 2, interval: 0.1s, baseEjectionTime: 600s, maxEjectionPercent: 100}}",
        upstreams: &[|_| Reply::Status(500)],
        route: none,
        cluster: || json!({"common_lb_config": {"healthy_panic_threshold": {"value": 0}}, "outlier_detection": {"consecutive_5xx": 2, "interval": "0.1s", "base_ejection_time": "600s", "max_ejection_percent": 100, "enforcing_consecutive_5xx": 100, "enforcing_success_rate": 0, "consecutive_gateway_failure": 1000}}),
        traffic: Traffic::Sequence(5),
        ..PLAIN
    },
    Case {
        name: "more requests than the limit",
        policy: "{connectionPool: {http: {http2MaxRequests: 2}}}",
        upstreams: &[|_| Reply::After(Duration::from_millis(700), 200)],
        cluster: || json!({"circuit_breakers": {"thresholds": [{"max_requests": 2}]}}),
        traffic: Traffic::AtOnce(5),
        ..PLAIN
    },
    Case {
        name: "more waiting requests than the limit",
        policy: "{connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}}",
        upstreams: &[|_| Reply::After(Duration::from_millis(500), 200)],
        cluster: || json!({"circuit_breakers": {"thresholds": [{"max_connections": 1, "max_pending_requests": 1}]}}),
        traffic: Traffic::AtOnce(5),
        ..PLAIN
    },
    Case {
        name: "more retries than the limit",
        rule: "retries: {attempts: 3, retryOn: 5xx, backoff: 0.001s}",
        policy: "{retryBudget: {percent: {value: 0.0001}, minRetryConcurrency: 1}}",
        upstreams: &[|_| Reply::After(Duration::from_millis(300), 500)],
        route: || {
            with(retries("5xx", 3), json!({"retry_policy": {"retry_back_off": {"base_interval": "0.001s"}}}))
        },
        cluster: || json!({"circuit_breakers": {"thresholds": [{"retry_budget": {"budget_percent": {"value": 0.0001}, "min_retry_concurrency": 1}}]}}),
        traffic: Traffic::AtOnce(4),
        ..PLAIN
    },
    Case {
        name: "gateway errors eject, a 500 does not",
        rule: "retries: {attempts: 0}",
        policy: "{outlierDetection: {consecutiveGatewayErrors: 2, consecutive5xxErrors: 0, interval: 0.1s, baseEjectionTime: 600s, maxEjectionPercent: 100}}",
        upstreams: &[|seen| Reply::Status(if seen.nth < 5 { 500 } else { 502 })],
        route: none,
        cluster: || {
            outliers(
                json!({"consecutive_gateway_failure": 2, "enforcing_consecutive_gateway_failure": 100, "enforcing_consecutive_5xx": 0}),
            )
        },
        traffic: Traffic::Sequence(9),
        ..PLAIN
    },
    Case {
        name: "panic: half is fewer than three fifths",
        rule: "retries: {attempts: 0}",
        policy: "{loadBalancer: {simple: ROUND_ROBIN}, outlierDetection: {consecutive5xxErrors: 2, interval: 0.1s, baseEjectionTime: 600s, maxEjectionPercent: 50, minHealthPercent: 60}}",
        upstreams: &[|_| Reply::Status(500), |_| Reply::Status(200)],
        route: none,
        cluster: || {
            with(
                outliers(json!({"consecutive_5xx": 2, "max_ejection_percent": 50})),
                json!({"common_lb_config": {"healthy_panic_threshold": {"value": 60}}}),
            )
        },
        traffic: Traffic::Shares(300),
        ..PLAIN
    },
    Case {
        name: "failover to the next region",
        rule: "retries: {attempts: 0}",
        policy: "{loadBalancer: {localityLbSetting: {failover: [{from: us, to: eu}]}}, outlierDetection: {consecutive5xxErrors: 3, interval: 0.1s, baseEjectionTime: 600s, maxEjectionPercent: 100}}",
        upstreams: &[|_| Reply::Status(500), |_| Reply::Status(201), |_| Reply::Status(202)],
        localities: &["us/east", "asia/x", "eu/x"],
        priorities: &[0, 2, 1],
        route: none,
        cluster: || outliers(json!({"consecutive_5xx": 3})),
        traffic: Traffic::Sequence(12),
        ..PLAIN
    },
    Case {
        name: "half of a zone spills over",
        rule: "retries: {attempts: 0}",
        policy: "{loadBalancer: {simple: RANDOM, localityLbSetting: {enabled: true}}, outlierDetection: {consecutive5xxErrors: 1, interval: 0.1s, baseEjectionTime: 600s, maxEjectionPercent: 100}}",
        upstreams: &[|_| Reply::Status(500), |_| Reply::Status(200), |_| Reply::Status(202)],
        localities: &["us/east", "us/east", "eu/x"],
        priorities: &[0, 0, 1],
        route: none,
        cluster: || with(outliers(json!({"consecutive_5xx": 1})), json!({"lb_policy": "RANDOM"})),
        traffic: Traffic::Shares(10_000),
        ..PLAIN
    },
    Case {
        name: "four fifths stay, whatever the endpoints",
        policy: "{loadBalancer: {simple: RANDOM, localityLbSetting: {distribute: [{from: us/east/*, to: {us/east/*: 80, us/west/*: 20}}]}}}",
        upstreams: &[|_| Reply::Status(200), |_| Reply::Status(201), |_| Reply::Status(201)],
        localities: &["us/east", "us/west", "us/west"],
        cluster: || {
            json!({
                "lb_policy": "RANDOM",
                "common_lb_config": {"locality_weighted_lb_config": {}},
                "load_assignment": {"endpoints": [{"load_balancing_weight": 80}, {"load_balancing_weight": 20}]},
            })
        },
        traffic: Traffic::Shares(20_000),
        ..PLAIN
    },
    Case {
        name: "zone aware: a third of the endpoints for half of the clients",
        policy: "{loadBalancer: {simple: RANDOM, zoneAwareLbSetting: {minClusterSize: 1}}}",
        upstreams: &[|_| Reply::Status(200), |_| Reply::Status(201), |_| Reply::Status(201)],
        localities: &["us/east", "us/west", "us/west"],
        clients: &["us/east", "us/west"],
        cluster: || zone_aware(1),
        traffic: Traffic::Shares(20_000),
        ..PLAIN
    },
    Case {
        name: "zone aware: three zones, overflow by what is left",
        policy: "{loadBalancer: {simple: RANDOM, zoneAwareLbSetting: {minClusterSize: 1}}}",
        upstreams: &[
            |_| Reply::Status(200),
            |_| Reply::Status(201),
            |_| Reply::Status(202),
            |_| Reply::Status(202),
            |_| Reply::Status(202),
        ],
        localities: &["us/east", "us/west", "us/north", "us/north", "us/north"],
        clients: &["us/east", "us/east", "us/west", "us/north"],
        cluster: || zone_aware(1),
        traffic: Traffic::Shares(20_000),
        ..PLAIN
    },
    Case {
        name: "zone aware: too few endpoints",
        policy: "{loadBalancer: {simple: RANDOM, zoneAwareLbSetting: {}}}",
        upstreams: &[|_| Reply::Status(200), |_| Reply::Status(201)],
        localities: &["us/east", "us/west"],
        clients: &["us/east", "us/west"],
        cluster: || zone_aware(6),
        traffic: Traffic::Shares(10_000),
        ..PLAIN
    },
    Case {
        name: "random by weight",
        policy: "{loadBalancer: {simple: RANDOM}}",
        upstreams: &[|_| Reply::Status(200), |_| Reply::Status(201)],
        weights: &[3, 1],
        cluster: || json!({"lb_policy": "RANDOM"}),
        traffic: Traffic::Shares(20_000),
        differs: Some("Envoy's RANDOM knows no weights; ours has them, as DR-LB09 wants"),
        ..PLAIN
    },
    Case {
        name: "turns by weight",
        policy: "{loadBalancer: {simple: ROUND_ROBIN}}",
        upstreams: &[|_| Reply::Status(200), |_| Reply::Status(201)],
        weights: &[3, 1],
        traffic: Traffic::Shares(400),
        ..PLAIN
    },
    Case {
        name: "least request by weight",
        policy: "{loadBalancer: {simple: LEAST_REQUEST}}",
        upstreams: &[|_| Reply::Status(200), |_| Reply::Status(201)],
        weights: &[3, 1],
        traffic: Traffic::Shares(20_000),
        differs: Some(
            "where weights differ Envoy goes in turn by weight/(active + 1), so that under load a heavy endpoint gets less than its weight; ours picks the less loaded for its weight of two",
        ),
        ..PLAIN
    },
    Case {
        name: "a ring by header: the same endpoint for each key",
        policy: "{loadBalancer: {consistentHash: {httpHeaderName: x-user}}}",
        upstreams: THREE,
        shared: true,
        headers: |at| format!("x-user: user-{at}\r\n"),
        route: || with(default_retries(), json!({"hash_policy": [{"header": {"header_name": "x-user"}}]})),
        cluster: || json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 1024}}),
        traffic: Traffic::Sequence(100),
        ..PLAIN
    },
    Case {
        name: "a ring by weight",
        policy: "{loadBalancer: {consistentHash: {httpHeaderName: x-user, ringHash: {minimumRingSize: 100}}}}",
        upstreams: THREE,
        weights: &[5, 1, 2],
        shared: true,
        headers: |at| format!("x-user: user-{at}\r\n"),
        route: || with(default_retries(), json!({"hash_policy": [{"header": {"header_name": "x-user"}}]})),
        cluster: || json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 100}}),
        traffic: Traffic::Sequence(100),
        ..PLAIN
    },
    Case {
        name: "Maglev by query",
        policy: "{loadBalancer: {consistentHash: {httpQueryParameterName: user, maglev: {tableSize: 65537}}}}",
        upstreams: THREE,
        shared: true,
        target: |at| format!("/?a=b&user={at}"),
        route: || with(default_retries(), json!({"hash_policy": [{"query_parameter": {"name": "user"}}]})),
        cluster: || json!({"lb_policy": "MAGLEV"}),
        traffic: Traffic::Sequence(100),
        ..PLAIN
    },
    Case {
        name: "Maglev by weight",
        policy: "{loadBalancer: {consistentHash: {httpHeaderName: x-user, maglev: {tableSize: 1021}}}}",
        upstreams: THREE,
        weights: &[5, 1, 2],
        shared: true,
        headers: |at| format!("x-user: user-{at}\r\n"),
        route: || with(default_retries(), json!({"hash_policy": [{"header": {"header_name": "x-user"}}]})),
        cluster: || json!({"lb_policy": "MAGLEV", "maglev_lb_config": {"table_size": 1021}}),
        traffic: Traffic::Sequence(100),
        ..PLAIN
    },
    Case {
        name: "a ring by the client's address",
        policy: "{loadBalancer: {consistentHash: {useSourceIp: true}}}",
        upstreams: THREE,
        shared: true,
        route: || {
            with(default_retries(), json!({"hash_policy": [{"connection_properties": {"source_ip": true}}]}))
        },
        cluster: || json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 1024}}),
        traffic: Traffic::Sequence(5),
        ..PLAIN
    },
    Case {
        name: "a cookie as the client sends it",
        policy: "{loadBalancer: {consistentHash: {httpCookie: {name: user}}}}",
        upstreams: THREE,
        shared: true,
        headers: |at| format!("cookie: a=b; user=\"user-{at}\"\r\n"),
        route: || with(default_retries(), json!({"hash_policy": [{"cookie": {"name": "user"}}]})),
        cluster: || json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 1024}}),
        traffic: Traffic::Sequence(40),
        ..PLAIN
    },
    Case {
        name: "a cookie that is made",
        policy: "{loadBalancer: {consistentHash: {httpCookie: {name: user, path: /shop, ttl: 60s, attributes: [{name: SameSite, value: Lax}, {name: Secure}]}}}}",
        route: || {
            cookie(
                json!({"name": "user", "path": "/shop", "ttl": "60s", "attributes": [{"name": "SameSite", "value": "Lax"}, {"name": "Secure"}]}),
            )
        },
        cluster: || json!({"lb_policy": "RING_HASH"}),
        ..PLAIN
    },
    Case {
        name: "a cookie for the session",
        policy: "{loadBalancer: {consistentHash: {httpCookie: {name: user, ttl: 0s}}}}",
        route: || cookie(json!({"name": "user", "ttl": "0s"})),
        cluster: || json!({"lb_policy": "RING_HASH"}),
        ..PLAIN
    },
    Case {
        name: "a cookie that is not made",
        policy: "{loadBalancer: {consistentHash: {httpCookie: {name: user}}}}",
        route: || cookie(json!({"name": "user"})),
        cluster: || json!({"lb_policy": "RING_HASH"}),
        ..PLAIN
    },
    Case {
        name: "two requests on a connection",
        policy: "{connectionPool: {http: {maxRequestsPerConnection: 2}}}",
        cluster: || json!({"max_requests_per_connection": 2}),
        traffic: Traffic::Sequence(7),
        connections: true,
        ..PLAIN
    },
    Case {
        name: "no keep-alive",
        policy: "{connectionPool: {http: {maxRequestsPerConnection: 1}}}",
        cluster: || json!({"max_requests_per_connection": 1}),
        traffic: Traffic::Sequence(5),
        connections: true,
        ..PLAIN
    },
    Case {
        name: "unavailable, status in the headers",
        rule: "retries: {attempts: 2, retryOn: unavailable}",
        route: || retries("unavailable", 2),
        upstreams: &[|seen| Reply::TrailersOnly(if seen.nth % 3 == 0 { 0 } else { 14 })],
        headers: |_| GRPC.to_owned(),
        traffic: Traffic::Sequence(3),
        ..PLAIN
    },
    Case {
        name: "gRPC statuses that are no condition",
        rule: "retries: {attempts: 2, retryOn: 'cancelled,deadline-exceeded,internal,resource-exhausted'}",
        route: || retries("cancelled,deadline-exceeded,internal,resource-exhausted", 2),
        upstreams: &[|seen| {
            Reply::TrailersOnly(match seen.path.as_str() {
                "/1" => 1,
                "/2" => 4,
                "/3" => 13,
                "/4" => 8,
                "/5" => 14,
                _ => 3,
            })
        }],
        headers: |_| GRPC.to_owned(),
        traffic: Traffic::Sequence(6),
        ..PLAIN
    },
    Case {
        name: "a timeout of gRPC",
        rule: "timeout: 0.2s",
        route: || with(default_retries(), json!({"timeout": "0.2s"})),
        upstreams: &[|_| Reply::Hang],
        headers: |_| GRPC.to_owned(),
        ..PLAIN
    },
    Case {
        name: "nobody is in, for gRPC",
        rule: "retries: {attempts: 0}",
        policy: "{outlierDetection: {consecutive5xxErrors: 1, interval: 0.1s, baseEjectionTime: 600s, maxEjectionPercent: 100}}",
        upstreams: &[|_| Reply::Status(500)],
        route: none,
        cluster: || outliers(json!({"consecutive_5xx": 1})),
        headers: |_| GRPC.to_owned(),
        traffic: Traffic::Sequence(2),
        ..PLAIN
    },
];

/// Three upstreams that say which they are.
const THREE: &[Script] = &[|_| Reply::Status(200), |_| Reply::Status(201), |_| Reply::Status(202)];

const GRPC: &str = "content-type: application/grpc\r\n";

/// Outlier detection as istiod makes it, with this of its own.
fn outliers(own: Value) -> Value {
    let base = json!({
        "interval": "0.1s",
        "base_ejection_time": "600s",
        "max_ejection_percent": 100,
        "enforcing_consecutive_5xx": 100,
        "enforcing_success_rate": 0,
        "consecutive_gateway_failure": 1000,
    });
    json!({"outlier_detection": with(base, own)})
}

fn zone_aware(min_cluster_size: u32) -> Value {
    json!({"lb_policy": "RANDOM", "common_lb_config": {"zone_aware_lb_config": {"min_cluster_size": min_cluster_size}}})
}

fn cookie(of: Value) -> Value {
    with(default_retries(), json!({"hash_policy": [{"cookie": of}]}))
}

const PLAIN: Case = Case {
    name: "",
    upstreams: &[|_| Reply::Status(200)],
    closed: false,
    rule: "",
    policy: "",
    route: default_retries,
    cluster: none,
    fault: none,
    traffic: Traffic::Sequence(1),
    target: |at| format!("/{at}"),
    headers: |_| String::new(),
    weights: &[],
    localities: &[],
    priorities: &[],
    clients: &[],
    shared: false,
    connections: false,
    differs: None,
};

pub(crate) async fn run(envoy: &Path, only: Option<&str>) -> bool {
    let (mut same, mut wrong) = (0, 0);
    for case in CASES.iter().filter(|case| only.is_none_or(|only| case.name.contains(only))) {
        let mut upstreams = Upstreams::start(case).await;
        let theirs = by_envoy(case, envoy, &mut upstreams).await;
        if !case.shared {
            upstreams = Upstreams::start(case).await;
        }
        let ours = by_sidecar(case, &mut upstreams).await;
        let agree = agree(case, &theirs, &ours);
        match (agree, case.differs) {
            (true, None) => {
                same += 1;
                println!("same     {}: {:?}, tries {:?}", case.name, summary(&ours), ours.tries);
            }
            (false, Some(why)) => println!("differs  {}: {why}", case.name),
            (true, Some(_)) => {
                wrong += 1;
                println!("WRONG    {}: no difference, though one is expected", case.name);
            }
            (false, None) => {
                wrong += 1;
                println!(
                    "WRONG    {}:\n  envoy {:?}, tries {:?}\n  ours  {:?}, tries {:?}",
                    case.name,
                    summary(&theirs),
                    theirs.tries,
                    summary(&ours),
                    ours.tries
                );
            }
        }
    }
    println!("envoy: {same} cases alike, {wrong} not as expected");
    wrong == 0
}

/// Each answer with how often it came.
fn summary(seen: &Observed) -> std::collections::BTreeMap<&str, usize> {
    let mut counts = std::collections::BTreeMap::new();
    for answer in &seen.answers {
        *counts.entry(answer.as_str()).or_default() += 1;
    }
    counts
}

fn agree(case: &Case, theirs: &Observed, ours: &Observed) -> bool {
    if theirs.connections != ours.connections {
        return false;
    }
    match case.traffic {
        // Which endpoint is asked first is drawn.
        Traffic::Sequence(_) if !case.shared && case.upstreams.len() + usize::from(case.closed) > 1 => {
            summary(theirs) == summary(ours)
        }
        Traffic::Sequence(_) => theirs == ours,
        Traffic::AtOnce(_) => summary(theirs) == summary(ours) && theirs.tries == ours.tries,
        Traffic::Shares(requests) => {
            let (theirs, ours) = (summary(theirs), summary(ours));
            // Four standard deviations of the difference of two draws, and for short runs what rounding does.
            let slack = |count: usize| {
                let share = count as f64 / requests as f64;
                4.0 * (2.0 * requests as f64 * share * (1.0 - share)).sqrt()
            };
            let few = if requests < 1000 { 4.0 } else { 0.0 };
            theirs.keys().eq(ours.keys())
                && theirs.iter().all(|(answer, count)| {
                    count.abs_diff(ours[answer]) as f64 <= if requests < 1000 { few } else { slack(*count) }
                })
        }
    }
}

async fn by_sidecar(case: &Case, upstreams: &mut Upstreams) -> Observed {
    let separator = if case.rule.is_empty() { "" } else { ", " };
    let mut yaml = service(case, &upstreams.addresses);
    yaml += &format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: app}}\nspec: {{hosts: [app], http: [{{route: [{{destination: {{host: app}}}}]{separator}{}}}]}}\n---\n",
        case.rule
    );
    if !case.policy.is_empty() {
        yaml += &format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: app}}\nspec: {{host: app, trafficPolicy: {}}}\n",
            case.policy
        );
    }
    let dir = ConfigDir::new();
    dir.write("mesh.yaml", &yaml);
    let config = dir.file("mesh.yaml");
    let any = "127.0.0.1:0";
    let args = ["--config", &config, "--outbound", any, "--admin", any, "--workers", "1", "--log", "error"];
    let labels = format!("app=web,istio-locality={}", case.home().replace('/', "."));
    let sidecar = start("sidecar", &[&args[..], &["--labels", &labels]].concat());
    let answers = traffic(case, sidecar.address("outbound")).await;
    upstreams.observed(case, answers)
}

/// A service `app` of these endpoints, and the clients' own.
fn service(case: &Case, addresses: &[SocketAddr]) -> String {
    let endpoints: Vec<_> = addresses
        .iter()
        .enumerate()
        .map(|(at, addr)| {
            let locality =
                case.localities.get(at).map_or_else(String::new, |place| format!(", locality: {place}"));
            let weight = case.weights.get(at).copied().unwrap_or(1);
            format!(
                "{{address: {}, ports: {{http: {}}}, weight: {weight}{locality}}}",
                addr.ip(),
                addr.port()
            )
        })
        .collect();
    let entry = |name: &str, more: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec: {{hosts: [{name}.default.svc.cluster.local], location: MESH_INTERNAL, resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], {more}}}\n---\n"
        )
    };
    let mut yaml = entry("app", &format!("endpoints: [{}]", endpoints.join(", ")));
    if !case.clients.is_empty() {
        yaml += &entry("web", "workloadSelector: {labels: {app: web}}");
        yaml += "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |-\n    defaultConfig: {proxyMetadata: {ISTIO_META_ENABLE_SELF_DISCOVERY: \"true\"}}\n---\n";
    }
    for (at, locality) in case.clients.iter().enumerate() {
        yaml += &format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: web-{at}}}\nspec: {{address: 127.0.1.{at}, locality: {locality}, labels: {{app: web}}}}\n---\n"
        );
    }
    yaml
}

impl Case {
    /// Where the proxy is.
    fn home(&self) -> &'static str {
        self.clients.first().or(self.localities.first()).copied().unwrap_or("us/east")
    }
}

/// An Envoy, killed when it is dropped.
struct Envoy(Child);

impl Drop for Envoy {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn by_envoy(case: &Case, envoy: &Path, upstreams: &mut Upstreams) -> Observed {
    let dir = ConfigDir::new();
    dir.write("envoy.json", &configuration(case, &upstreams.addresses).to_string());
    let admin_file = dir.file("admin");
    let child = Command::new(envoy)
        .args(["-c", &dir.file("envoy.json"), "--admin-address-path", &admin_file])
        .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "critical"])
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", envoy.display()));
    let _envoy = Envoy(child);
    let mut listener = None;
    mesh_testkit::until("Envoy to listen", async || {
        let Some(admin) = std::fs::read_to_string(&admin_file).ok().and_then(|text| text.trim().parse().ok())
        else {
            return false;
        };
        if tokio::net::TcpStream::connect::<SocketAddr>(admin).await.is_err() {
            return false;
        }
        let listeners = get_json(admin, "/listeners?format=json").await;
        let port = &listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"];
        listener = port.as_u64().and_then(|port| u16::try_from(port).ok());
        listener.is_some()
    })
    .await;
    let port = listener.expect("a listener");
    let answers = traffic(case, SocketAddr::from(([127, 0, 0, 1], port))).await;
    upstreams.observed(case, answers)
}

fn configuration(case: &Case, addresses: &[SocketAddr]) -> Value {
    let address = |port: u16| json!({"socket_address": {"address": "127.0.0.1", "port_value": port}});
    // One group for each locality and priority, in order of their first endpoints.
    let mut groups: Vec<(&str, u32, Vec<Value>)> = Vec::new();
    for (at, addr) in addresses.iter().enumerate() {
        let endpoint = json!({
            "endpoint": {"address": address(addr.port())},
            "load_balancing_weight": case.weights.get(at).copied().unwrap_or(1),
        });
        let place = case.localities.get(at).copied().unwrap_or("");
        let priority = case.priorities.get(at).copied().unwrap_or(0);
        match groups.iter_mut().find(|(known, level, _)| *known == place && *level == priority) {
            Some((.., endpoints)) => endpoints.push(endpoint),
            None => groups.push((place, priority, vec![endpoint])),
        }
    }
    let endpoints: Vec<_> = groups
        .into_iter()
        .map(|(place, priority, endpoints)| {
            json!({"locality": locality(place), "priority": priority, "lb_endpoints": endpoints})
        })
        .collect();
    // As istiod does: limits that nobody set are none.
    let most = u32::MAX;
    let mut cluster = json!({
        "name": "app",
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": if case.policy.contains("ROUND_ROBIN") { "ROUND_ROBIN" } else { "LEAST_REQUEST" },
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "load_assignment": {"cluster_name": "app", "endpoints": endpoints},
        "circuit_breakers": {"thresholds": [{"max_connections": most, "max_pending_requests": most, "max_requests": most, "max_retries": most}]},
    });
    merge(&mut cluster, (case.cluster)());
    let mut route = json!({"cluster": "app", "timeout": "0s"});
    merge(&mut route, (case.route)());
    let typed = |kind: &str| format!("type.googleapis.com/envoy.extensions.filters.{kind}");
    let mut fault = json!({"@type": typed("http.fault.v3.HTTPFault")});
    merge(&mut fault, (case.fault)());
    let clients: Vec<_> = case
        .clients
        .iter()
        .map(|place| json!({"locality": locality(place), "lb_endpoints": [{"endpoint": {"address": address(1)}}]}))
        .collect();
    let web = json!({"name": "web", "type": "STATIC", "load_assignment": {"cluster_name": "web", "endpoints": clients}});
    let mut all = json!({
        "node": {"id": "web", "cluster": "web", "locality": locality(case.home())},
        "admin": {"address": address(0)},
        "static_resources": {
            "listeners": [{
                "name": "outbound",
                "address": address(0),
                "filter_chains": [{"filters": [{
                    "name": "envoy.filters.network.http_connection_manager",
                    "typed_config": {
                        "@type": typed("network.http_connection_manager.v3.HttpConnectionManager"),
                        "stat_prefix": "outbound",
                        "http_filters": [
                            {"name": "envoy.filters.http.fault", "typed_config": fault},
                            {"name": "envoy.filters.http.router", "typed_config": {"@type": typed("http.router.v3.Router")}},
                        ],
                        "route_config": {"virtual_hosts": [{"name": "app", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}]},
                    },
                }]}],
            }],
            "clusters": [cluster, web],
        },
    });
    if !case.clients.is_empty() {
        merge(&mut all, json!({"cluster_manager": {"local_cluster_name": "web"}}));
    }
    all
}

fn locality(place: &str) -> Value {
    let (region, zone) = place.split_once('/').unwrap_or((place, ""));
    json!({"region": region, "zone": zone})
}

/// Puts `more` into `base`; lists are joined item by item.
fn merge(base: &mut Value, more: Value) {
    match (base, more) {
        (Value::Object(base), Value::Object(more)) => {
            for (key, value) in more {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(base), Value::Array(more)) if base.len() == more.len() => {
            base.iter_mut().zip(more).for_each(|(base, more)| merge(base, more));
        }
        (base, more) => *base = more,
    }
}

async fn traffic(case: &Case, to: SocketAddr) -> Vec<String> {
    match case.traffic {
        Traffic::Sequence(requests) => {
            let mut answers = Vec::new();
            for at in 1..=requests {
                answers.push(ask(to, request(case, at)).await);
                // Envoy ejects on its main thread, which is a little later.
                if case.policy.contains("outlierDetection") {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            answers
        }
        Traffic::AtOnce(requests) => {
            let mut tasks = tokio::task::JoinSet::new();
            for at in 1..=requests {
                tasks.spawn(ask(to, request(case, at)));
                // One after the other into the proxy, all of them in flight together.
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
            tasks.join_all().await
        }
        Traffic::Shares(requests) => {
            let mut tasks = tokio::task::JoinSet::new();
            let lanes = if requests < 1000 { 1 } else { 8 };
            for _ in 0..lanes {
                tasks.spawn(statuses(to, requests / lanes));
            }
            tasks.join_all().await.into_iter().flatten().collect()
        }
    }
}

fn request(case: &Case, at: usize) -> String {
    let (target, headers) = ((case.target)(at), (case.headers)(at));
    let method = if headers.contains("application/grpc") { "POST" } else { "GET" };
    let length = if method == "POST" { "content-length: 0\r\n" } else { "" };
    format!("{method} {target} HTTP/1.1\r\nhost: app\r\n{headers}{length}connection: close\r\n\r\n")
}

/// `STATUS [overloaded] [cookie] [grpc-status] body` of a request on a connection of its own.
async fn ask(to: SocketAddr, request: String) -> String {
    let exchanged = exchange(to, request.as_bytes(), Duration::from_secs(20)).await;
    let text = String::from_utf8_lossy(&exchanged.bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.get(9..12).unwrap_or("none");
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (known, value) = line.split_once(": ")?;
            known.eq_ignore_ascii_case(name).then_some(value)
        })
    };
    let overloaded = if header("x-envoy-overloaded") == Some("true") { " overloaded" } else { "" };
    let cookie = header("set-cookie").map_or_else(String::new, |cookie| format!(" {}", masked(cookie)));
    let grpc = header("grpc-status").map_or_else(String::new, |status| format!(" grpc {status}"));
    // What Envoy adds of the errno is the kernel's.
    let body = body.split(", transport failure reason").next().unwrap_or(body);
    format!("{status}{overloaded}{cookie}{grpc} {body}")
}

/// A cookie with a star for each digit of its value, which is each proxy's own.
fn masked(cookie: &str) -> String {
    match cookie.split_once('"').and_then(|(name, rest)| Some((name, rest.split_once('"')?))) {
        Some((name, (value, attributes))) => {
            let stars = value.chars().map(|digit| if digit.is_ascii_hexdigit() { '*' } else { digit });
            format!("{name}\"{}\"{attributes}", stars.collect::<String>())
        }
        None => cookie.to_owned(),
    }
}

/// The statuses of requests on one connection.
async fn statuses(to: SocketAddr, requests: usize) -> Vec<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(to).await.expect("a connection");
    let mut answers = Vec::with_capacity(requests);
    let mut received = Vec::new();
    for _ in 0..requests {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: app\r\n\r\n").await.expect("a request");
        received.clear();
        loop {
            stream.read_buf(&mut received).await.expect("an answer");
            let text = String::from_utf8_lossy(&received);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| {
                line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok()
            });
            if body.len() >= length.unwrap_or(0) {
                answers.push(head[9..12].to_owned());
                break;
            }
        }
    }
    answers
}
