use std::collections::{BTreeMap, BTreeSet};

use http::StatusCode;
use mesh_core::ClusterName;
use tower::{Layer as _, ServiceExt as _, service_fn};

use super::*;
use crate::{HashCookie, HashPolicy, OutlierDetection, RetryLayer, RetryOn, RetryPolicy};

type Answer = Result<Response<Body>, Error>;

fn endpoint(host: u8) -> EndpointSpec {
    EndpointSpec::new(([10, 0, 0, host], 80).into())
}

fn spec(endpoints: Vec<EndpointSpec>) -> ClusterSpec {
    ClusterSpec::new(ClusterName::custom("a"), Discovery::Static(endpoints))
}

/// A balance whose services answer with the status that `status` has for their host, which they also name.
fn balance(
    spec: ClusterSpec,
    status: fn(u8) -> u16,
) -> Balance<impl Service<Request<Body>, Response = Response<Body>, Error = Error, Future: Send> + Clone> {
    let made = Balance::new(spec, &Clusters::new(), move |endpoint| {
        let std::net::IpAddr::V4(ip) = endpoint.addr.ip() else { panic!("{}", endpoint.addr) };
        let host = ip.octets()[3];
        service_fn(move |_: Request<Body>| async move {
            let response = Response::builder().status(status(host)).header("host-is", u16::from(host));
            Answer::Ok(response.body(Body::from("answer")).unwrap())
        })
    });
    made.unwrap().seeded(7)
}

fn host(response: &Response<Body>) -> u8 {
    response.headers()["host-is"].to_str().unwrap().parse().unwrap()
}

async fn ask<S>(service: &S, request: Request<Body>) -> Answer
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Error> + Clone,
{
    service.clone().oneshot(request).await
}

fn request() -> Request<Body> {
    Request::new(Body::empty())
}

/// How many of `requests` each host got.
async fn shares<S>(service: &S, requests: u32) -> BTreeMap<u8, u32>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Error> + Clone,
{
    let mut shares = BTreeMap::new();
    for _ in 0..requests {
        *shares.entry(host(&ask(service, request()).await.unwrap())).or_default() += 1;
    }
    shares
}

#[tokio::test]
async fn dr_lb01_round_robin_goes_by_weight_layer() {
    let endpoints = vec![
        EndpointSpec { weight: 3, ..endpoint(1) },
        endpoint(2),
        EndpointSpec { weight: 0, ..endpoint(3) },
    ];
    let balance = balance(spec(endpoints).with_balancer(BalancerKind::RoundRobin), |_| 200);
    assert_eq!(shares(&balance, 400).await, BTreeMap::from([(1, 300), (2, 100)]));
}

#[tokio::test]
async fn dr_lb01_least_request_counts_until_the_response_has_ended_layer() {
    let balance = balance(spec(vec![endpoint(1), endpoint(2)]), |_| 200);
    let busy = ask(&balance, request()).await.unwrap();
    let other = shares(&balance, 50).await;
    let free = 3 - host(&busy);
    // Both are drawn, or one of them twice.
    assert!(other[&free] > 30, "{other:?}");
    let in_flight = || {
        let endpoints = balance.group.cluster.endpoints();
        endpoints.iter().map(|endpoint| endpoint.in_flight()).sum::<u32>()
    };
    assert_eq!(in_flight(), 1);
    drop(busy);
    assert_eq!(in_flight(), 0);
}

#[tokio::test]
async fn dr_lb02_a_key_stays_and_none_is_by_chance_layer() {
    let endpoints = (1..=5).map(endpoint).collect();
    let policy = HashPolicy::Header(http::HeaderName::from_static("x-user"));
    let balance = balance(spec(endpoints).with_hash_policy(BalancerKind::ring_hash(), policy), |_| 200);
    let mut hosts = BTreeSet::new();
    for user in 0..20 {
        let ask = || {
            let request =
                Request::get("/").header("x-user", format!("user {user}")).body(Body::empty()).unwrap();
            ask(&balance, request)
        };
        let first = host(&ask().await.unwrap());
        for _ in 0..5 {
            assert_eq!(host(&ask().await.unwrap()), first);
        }
        hosts.insert(first);
    }
    assert!(hosts.len() > 2);
    assert!(shares(&balance, 100).await.len() > 2);
}

#[tokio::test]
async fn dr_lb03_a_client_is_given_its_cookie_layer() {
    let cookie = HashCookie { ttl: Some(Duration::ZERO), ..HashCookie::passive("who") };
    let endpoints = (1..=5).map(endpoint).collect();
    let spec = spec(endpoints).with_hash_policy(BalancerKind::ring_hash(), HashPolicy::Cookie(cookie));
    let balance = balance(spec, |_| 200);
    for _ in 0..10 {
        let first = ask(&balance, request()).await.unwrap();
        let cookie = first.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
        let request = Request::get("/").header("cookie", cookie).body(Body::empty()).unwrap();
        let second = ask(&balance, request).await.unwrap();
        assert_eq!(host(&first), host(&second));
        assert!(!second.headers().contains_key("set-cookie"));
    }
}

#[tokio::test(start_paused = true)]
async fn dr_lb06_the_next_priority_takes_what_an_ejected_one_cannot_layer() {
    let endpoints = vec![endpoint(1), EndpointSpec { priority: 1, ..endpoint(2) }];
    let mut spec = spec(endpoints);
    spec.outlier_detection =
        Some(Box::new(OutlierDetection { max_ejection_percent: 100, ..OutlierDetection::default() }));
    let balance = balance(spec, |host| if host == 1 { 500 } else { 200 });
    assert_eq!(shares(&balance, 5).await, BTreeMap::from([(1, 5)]));
    assert_eq!(shares(&balance, 50).await, BTreeMap::from([(2, 50)]), "DR-OD01: five in a row");
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(shares(&balance, 5).await, BTreeMap::from([(1, 5)]), "DR-OD02: its time is over");
}

#[tokio::test(start_paused = true)]
async fn dr_od04_without_anybody_left_it_answers_by_itself_layer() {
    let mut spec = spec(vec![endpoint(1)]);
    spec.outlier_detection =
        Some(Box::new(OutlierDetection { max_ejection_percent: 100, ..OutlierDetection::default() }));
    let balance = balance(spec, |_| 500);
    shares(&balance, 5).await;
    let error = ask(&balance, request()).await.unwrap_err();
    assert_eq!((error.status(), error.details()), (StatusCode::SERVICE_UNAVAILABLE, "no_healthy_upstream"));
    let none = self::balance(self::spec(Vec::new()), |_| 200);
    assert_eq!(ask(&none, request()).await.unwrap_err().details(), "no_healthy_upstream");
}

#[tokio::test(start_paused = true)]
async fn vs_y07_a_retry_above_goes_elsewhere_layer() {
    let balance = balance(spec((1..=4).map(endpoint).collect()), |host| if host == 1 { 503 } else { 200 });
    let policy = RetryPolicy::new(1, RetryOn::parse("503").unwrap());
    let service = RetryLayer::new(policy).seeded(1).layer(balance.clone());
    let mut failed = 0;
    for _ in 0..200 {
        let mut request = request();
        RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
        failed += u32::from(ask(&service, request).await.unwrap().status() == 503);
    }
    // Of five draws each would have to be the one that was tried.
    assert_eq!(failed, 0);
    let endpoints = balance.group.cluster.endpoints();
    assert!(
        endpoints
            .iter()
            .any(|endpoint| endpoint.addr().ip().to_string() == "10.0.0.1" && endpoint.requests() > 20)
    );
}

#[test]
fn a_balance_is_over_a_fixed_list() {
    let spec = ClusterSpec::new(ClusterName::custom("a"), Discovery::OriginalDst);
    assert_eq!(Balance::new(spec, &Clusters::new(), |_| ()).unwrap_err(), NotStatic);
}
