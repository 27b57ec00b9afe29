//! B9: many proxies start at once, before the services that they all need.
//!
//! Each proxy is a stack of its own, in this process: its own clusters, pools and random numbers. At first nobody
//! listens at the services; then all of them do. Once all proxies send their first request at the same moment, and once
//! within half a second of each other, as those of pods that are started together do.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::{Body, ClusterName, Connect, ConnectTarget, Connecting, Io, Slot};
use mesh_route::{
    Cluster, ClusterSpec, Clusters, Discovery, EndpointSpec, RetryPolicy, RouteBuilder, RouteTable,
    SelectRouteLayer, Shard, UpstreamProtocol, dispatch,
};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tower::{ServiceBuilder, ServiceExt as _};

const SERVICES: usize = 6;

/// Requests that each proxy sends to each service at once.
const AT_ONCE: usize = 3;

/// How long nobody listens.
const DOWN: Duration = Duration::from_secs(1);

/// Over how long the first requests are spread.
const SPREAD: Duration = Duration::from_millis(500);

/// An outage that is too long.
const GOAL: Duration = Duration::from_secs(2);

pub(crate) async fn run(proxies: usize, time: Duration) -> bool {
    let mut good = true;
    for spread in [Duration::ZERO, SPREAD] {
        good &= start(proxies, time, spread).await;
    }
    good
}

async fn start(proxies: usize, time: Duration, spread: Duration) -> bool {
    let mut services = Vec::new();
    for at in 0..SERVICES {
        // The port is free again when this listener is gone.
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let protocol = if at % 2 == 0 { UpstreamProtocol::Http1 } else { UpstreamProtocol::Http2 };
        services.push((listener.local_addr().expect("an address"), protocol));
    }
    let began = Instant::now();
    let dials = Dials::default();
    let mut clients = JoinSet::new();
    for proxy in 0..proxies {
        for (addr, protocol) in &services {
            let dialler = Dialler { proxy, dials: dials.clone() };
            clients.spawn(proxied(proxy, *addr, *protocol, dialler, spread, began + DOWN + time));
        }
    }
    tokio::time::sleep_until((began + DOWN).into()).await;
    let down = dials.counts();
    let up = Instant::now();
    for (addr, protocol) in services {
        let listener = TcpListener::bind(addr).await.expect("the port again");
        tokio::spawn(serve(listener, protocol == UpstreamProtocol::Http2));
    }
    let outcomes: Vec<Seen> = clients.join_all().await;
    let mut first: Vec<Duration> = outcomes
        .iter()
        .map(|seen| seen.first.map_or(Duration::MAX, |at| at.saturating_duration_since(up)))
        .collect();
    first.sort_unstable();
    let longest = first.last().copied().unwrap_or_default();
    let late = outcomes.iter().filter_map(|seen| seen.last_failure).filter(|at| *at > up + GOAL).count();
    let stuck = first.iter().filter(|time| **time > GOAL).count();
    let answered: u64 = outcomes.iter().map(|seen| seen.answered).sum();
    let failed: u64 = outcomes.iter().map(|seen| seen.failed).sum();
    let all = dials.counts();
    println!(
        "b9: {proxies} proxies, {SERVICES} services, first connects within {spread:?}; {failed} requests failed while nobody listened, {answered} were answered then; first answer after {:?} (median), {:?} (p99), {longest:?} (longest; goal {GOAL:?})",
        first.get(first.len() / 2).copied().unwrap_or_default(),
        first.get(first.len() * 99 / 100).copied().unwrap_or_default(),
    );
    println!(
        "b9: at most {} connections were being made by a proxy to an endpoint that was not there (goal 1), {} in all; {} after it was",
        down.most,
        down.made,
        all.made - down.made
    );
    println!("b9: {stuck} of {} never recovered in time, {late} failed again later (goal 0)", outcomes.len());
    stuck == 0 && late == 0 && down.most == 1
}

/// What a proxy saw of a service.
#[derive(Default)]
struct Seen {
    first: Option<Instant>,
    last_failure: Option<Instant>,
    answered: u64,
    failed: u64,
}

async fn proxied(
    proxy: usize,
    addr: SocketAddr,
    protocol: UpstreamProtocol,
    dialler: Dialler,
    spread: Duration,
    end: Instant,
) -> Seen {
    let mut spec =
        ClusterSpec::new(ClusterName::custom("up"), Discovery::Static(vec![EndpointSpec::new(addr)]));
    spec.protocol = protocol;
    let cluster = Arc::new(Cluster::new(spec));
    Clusters::new().reconcile(std::slice::from_ref(&cluster));
    let route =
        RouteBuilder::new("all").retry(RetryPolicy::istio_default()).forward(cluster).expect("a route");
    let table = RouteTable::builder().host("*", [route]).build().expect("a table");
    let seed = (proxy * 1000) as u64 + u64::from(addr.port());
    let client = ServiceBuilder::new()
        .layer(SelectRouteLayer::new(Slot::fixed(table)))
        .service(dispatch(Shard::connecting_by(seed, Arc::new(dialler))));
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut seen = Seen::default();
    tokio::time::sleep(spread.mul_f64(rng.random())).await;
    while Instant::now() < end {
        let mut requests = JoinSet::new();
        for _ in 0..AT_ONCE {
            let client = client.clone();
            requests.spawn(async move {
                let request = Request::get("http://up/").body(Body::empty()).expect("a request");
                match client.oneshot(request).await {
                    Ok(response) => response.into_body().collect().await.is_ok(),
                    Err(_) => false,
                }
            });
        }
        for good in requests.join_all().await {
            if good {
                seen.first.get_or_insert_with(Instant::now);
                seen.answered += 1;
            } else {
                seen.last_failure = Some(Instant::now());
                seen.failed += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..250))).await;
    }
    seen
}

async fn serve(listener: TcpListener, http2: bool) {
    let service = service_fn(async |_| {
        Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from_static(b"ok"))))
    });
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let io = TokioIo::new(stream);
            // A proxy that goes away is no event.
            if http2 {
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(io, service)
                    .await;
            } else {
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
            }
        });
    }
}

/// Connections that are made, by proxy and endpoint.
#[derive(Clone, Default)]
struct Dials(Arc<Mutex<Counts>>);

#[derive(Clone, Default)]
struct Counts {
    now: HashMap<(usize, SocketAddr), usize>,
    most: usize,
    made: usize,
}

impl Dials {
    fn counts(&self) -> Counts {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Connects by TCP, and counts.
#[derive(Clone)]
struct Dialler {
    proxy: usize,
    dials: Dials,
}

impl fmt::Debug for Dialler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialler").field("proxy", &self.proxy).finish_non_exhaustive()
    }
}

impl Connect for Dialler {
    fn connect(&self, target: &ConnectTarget) -> Connecting {
        let (dials, key) = (self.dials.clone(), (self.proxy, target.addr));
        Box::pin(async move {
            let change =
                |by: &dyn Fn(&mut Counts)| by(&mut dials.0.lock().unwrap_or_else(PoisonError::into_inner));
            change(&|counts| {
                let now = counts.now.entry(key).or_default();
                *now += 1;
                counts.most = counts.most.max(*now);
                counts.made += 1;
            });
            let connected = TcpStream::connect(key.1).await;
            change(&|counts| *counts.now.entry(key).or_default() -= 1);
            connected.map(|stream| Box::new(stream) as Box<dyn Io>)
        })
    }
}
