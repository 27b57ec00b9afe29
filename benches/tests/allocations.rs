//! Heap allocations per request, by layer, held to the table in `README.md`.
//!
//! Counts are exact: a request is sent until everything that is kept has been made, then a hundred more are counted
//! and divided. A layer costs what a stack with it allocates more than one without it. Of the dispatch the exchange
//! with the upstream is measured twice, by hand over hyper's client and through [`dispatch`]; the difference is ours.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use mesh_benches::stack::{ALL, ALL_ANSWERS, EACH, Idle, NONE, RETRY_ANSWERS, RETRY_CONNECT};
use mesh_core::{
    Body, CatchPanicLayer, ClusterName, Direction, EdgeSettings, Error, LocalReplyLayer, NormalizeLayer,
    Panics, RequestContext, Slot,
};
use mesh_route::select::reselect;
use mesh_route::{
    Balance, CircuitBreakerLayer, Cluster, ClusterSpec, Clusters, CorsLayer, Discovery, EndpointSpec,
    FaultLayer, HeadersLayer, OutlierDetection, OutlierGroup, RetryLayer, RetryOn, RetryPolicy, RouteBuilder,
    RouteTable, SelectRouteLayer, Shard, TimeoutLayer, dispatch,
};
use mesh_telemetry::access_log::{AccessLogLayer, AccessLogSink};
use tower::{Layer, Service, ServiceExt as _};

/// Requests that are counted.
const COUNTED: u64 = 100;

/// Requests before, after which everything that is kept has been made.
const WARM: u64 = 50;

/// Allocations of one request, the work of making and dropping it left out.
async fn per_request<S>(mut service: S) -> f64
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Error: std::fmt::Debug,
{
    let mut total = 0;
    for at in 0..WARM + COUNTED {
        let mut request = Request::get("/api/v1/items").header("host", "a").body(Body::empty()).unwrap();
        RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
        request.headers_mut().reserve(16);
        let before = allocation_counter_now();
        let response = service.ready().await.unwrap().call(request).await.unwrap();
        response.into_body().collect().await.unwrap();
        let after = allocation_counter_now();
        if at >= WARM {
            total += after - before;
        }
    }
    total as f64 / COUNTED as f64
}

/// Allocations of this thread so far.
fn allocation_counter_now() -> u64 {
    counter::count()
}

/// The global allocator, counted by thread.
mod counter {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        static COUNT: Cell<u64> = const { Cell::new(0) };
    }

    struct Counting;

    // SAFETY: every call is passed on to the system's allocator as it came.
    #[allow(unsafe_code)]
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            COUNT.set(COUNT.get() + 1);
            // SAFETY: as above.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: as above.
            unsafe { System.dealloc(pointer, layout) }
        }

        unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            COUNT.set(COUNT.get() + 1);
            // SAFETY: as above.
            unsafe { System.realloc(pointer, layout, size) }
        }
    }

    #[global_allocator]
    static COUNTING: Counting = Counting;

    pub(super) fn count() -> u64 {
        COUNT.get()
    }
}

/// What a layer adds over a service that answers at once.
async fn of_layer<L>(layer: L) -> f64
where
    L: Layer<Ready>,
    L::Service: Service<Request<Body>, Response = Response<Body>>,
    <L::Service as Service<Request<Body>>>::Error: std::fmt::Debug,
{
    per_request(layer.layer(Ready)).await - per_request(Ready).await
}

/// What a layer adds below a selected route that has no policy for it.
async fn of_policy_layer<L>(layer: L) -> f64
where
    L: Layer<Ready>,
    L::Service: Service<Request<Body>, Response = Response<Body>, Error = Error>,
{
    let select = SelectRouteLayer::new(table(None));
    per_request(select.layer(layer.layer(Ready))).await - per_request(select.layer(Ready)).await
}

/// Answers at once, with a body, as guards live in bodies.
#[derive(Clone)]
struct Ready;

impl Service<Request<Body>> for Ready {
    type Response = Response<Body>;
    type Error = Error;
    type Future = std::future::Ready<Result<Response<Body>, Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        std::future::ready(Ok(Response::new(Body::from("ok"))))
    }
}

fn table(to: Option<SocketAddr>) -> Slot<RouteTable> {
    let route = match to {
        None => RouteBuilder::new("r").path_prefix("/api/").respond(200, "").unwrap(),
        Some(addr) => {
            let endpoints = Discovery::Static(vec![EndpointSpec::new(addr)]);
            let cluster = Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom("c"), endpoints)));
            Clusters::new().reconcile(std::slice::from_ref(&cluster));
            RouteBuilder::new("r").path_prefix("/api/").forward(cluster).unwrap()
        }
    };
    Slot::fixed(RouteTable::builder().host("*", [route]).build().unwrap())
}

/// An upstream on a thread of its own, so that what it allocates is not counted.
fn upstream() -> SocketAddr {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let answer = hyper::service::service_fn(|_| async {
                    Ok::<_, Infallible>(Response::new(http_body_util::Full::new(bytes::Bytes::from_static(
                        b"ok",
                    ))))
                });
                let serve =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                tokio::spawn(serve);
            }
        });
    });
    told.recv().unwrap()
}

async fn of_dispatch() -> f64 {
    let addr = upstream();
    let stream = tokio::net::TcpStream::connect(addr).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let sender = Arc::new(tokio::sync::Mutex::new(sender));
    let by_hand = per_request(tower::service_fn(move |request: Request<Body>| {
        let sender = Arc::clone(&sender);
        async move {
            let mut sender = sender.lock().await;
            sender.ready().await?;
            let response = sender.send_request(request).await?;
            Ok::<_, hyper::Error>(response.map(|body| Body::from_incoming(body, mesh_core::Side::Upstream)))
        }
    }))
    .await;
    let slot = table(Some(addr));
    let (shard, pinning) = (Shard::seeded(1), slot.clone());
    let dispatch = dispatch(shard);
    let through = tower::service_fn(move |request: Request<Body>| {
        reselect(&pinning, &request).unwrap();
        dispatch.clone().oneshot(request)
    });
    per_request(through).await - by_hand
}

async fn measured() -> BTreeMap<&'static str, f64> {
    let (sink, writer) = AccessLogSink::new();
    std::thread::spawn(move || writer.run(std::io::sink()));
    let edge = Slot::fixed(EdgeSettings::default());
    let retry = |on| RetryLayer::new(RetryPolicy::new(2, RetryOn::parse(on).unwrap()));
    let outliers = OutlierGroup::new("a", OutlierDetection::default());
    let addr = ([127, 0, 0, 1], 1).into();
    let spec = ClusterSpec::new(ClusterName::custom("a"), Discovery::Static(vec![EndpointSpec::new(addr)]));
    let balance = Balance::new(spec, &Clusters::new(), |_| Ready).unwrap();
    BTreeMap::from([
        ("AccessLogLayer (off)", of_layer(AccessLogLayer::off()).await),
        ("AccessLogLayer", of_layer(AccessLogLayer::new(sink)).await),
        ("LocalReplyLayer", of_layer(LocalReplyLayer::new(Direction::Outbound)).await),
        ("CatchPanicLayer", of_layer(CatchPanicLayer::new(Panics::default())).await),
        ("NormalizeLayer", of_layer(NormalizeLayer::new(edge, Direction::Outbound).seed(1)).await),
        ("SelectRouteLayer", of_layer(SelectRouteLayer::new(table(None))).await),
        ("FaultLayer", of_policy_layer(FaultLayer::new()).await),
        ("CorsLayer", of_policy_layer(CorsLayer::new()).await),
        ("HeadersLayer", of_layer(HeadersLayer::new()).await),
        ("dispatch", of_dispatch().await),
        ("TimeoutLayer", of_layer(TimeoutLayer::new(Duration::from_secs(15))).await),
        ("RetryLayer (never)", of_layer(RetryLayer::new(RetryPolicy::never())).await),
        ("RetryLayer (Connect)", of_layer(retry("connect-failure")).await),
        ("RetryLayer (Head)", of_layer(retry("5xx")).await),
        ("CircuitBreakerLayer", of_layer(CircuitBreakerLayer::new().max_requests(10)).await),
        ("OutlierDetectionLayer", of_layer(outliers.endpoint(addr)).await),
        ("Balance", per_request(balance).await - per_request(Ready).await),
        ("RequestContext", of_context()),
    ])
}

/// The one insert into the extensions of a request.
fn of_context() -> f64 {
    let mut request = Request::new(());
    let before = allocation_counter_now();
    RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
    (allocation_counter_now() - before) as f64
}

/// The rows `| name | number |` below the heading.
fn budget() -> BTreeMap<String, f64> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let table = text.split("## Allocations").nth(1).expect("a heading");
    table
        .lines()
        .filter_map(|line| {
            let mut cells = line.trim().trim_matches('|').split('|').map(str::trim);
            Some((cells.next()?.trim_matches('`').to_owned(), cells.next()?.parse().ok()?))
        })
        .collect()
}

fn on_one_thread<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[test]
fn a_request_allocates_what_the_table_says() {
    let measured = on_one_thread(measured());
    let budget = budget();
    println!("{measured:#?}");
    for (layer, allocations) in &measured {
        let allowed =
            budget.get(*layer).unwrap_or_else(|| panic!("{layer} is not in the table of README.md"));
        assert!(
            (allocations - allowed).abs() < 0.05,
            "{layer}: {allocations} allocations per request, the table of README.md says {allowed}"
        );
    }
    assert_eq!(measured.len(), budget.len(), "the table has rows that nobody measures: {budget:?}");
}

/// The future of a request is moved when its stream is spawned, so its size is part of its cost.
#[test]
fn the_future_of_a_request_is_small() {
    let (slot, edge) = (table(None), Slot::fixed(EdgeSettings::default()));
    let mut stack = tower::ServiceBuilder::new()
        .layer(AccessLogLayer::off())
        .layer(LocalReplyLayer::new(Direction::Outbound))
        .layer(CatchPanicLayer::new(Panics::default()))
        .layer(NormalizeLayer::new(edge, Direction::Outbound).seed(1))
        .layer(SelectRouteLayer::new(slot))
        .layer(FaultLayer::new())
        .layer(CorsLayer::new())
        .layer(HeadersLayer::new())
        .service(dispatch(Shard::seeded(1)));
    let bytes = size_of_val(&stack.call(Request::new(Body::empty())));
    println!("the future of the outbound stack: {bytes} bytes");
    // A lease carries what the security of its connection stands on: 24 bytes more than 2304.
    assert!(bytes <= 2176, "{bytes} bytes");
}

/// Allocations of one exchange through the stack with a policy.
async fn of_stack(idle: Idle, body: fn() -> Body) -> f64 {
    let mut stack = mesh_benches::stack::to(idle, upstream(), Shard::seeded(1));
    let mut total = 0;
    for at in 0..WARM + COUNTED {
        let mut request = mesh_benches::stack::request(body());
        request.headers_mut().reserve(16);
        let before = allocation_counter_now();
        let response = stack.ready().await.unwrap().call(request).await.unwrap();
        response.into_body().collect().await.unwrap();
        if at >= WARM {
            total += allocation_counter_now() - before;
        }
    }
    total as f64 / COUNTED as f64
}

/// What a policy that is there and has nothing to do allocates: nothing. What is kept of a request for a retry that an
/// answer can cause is three: the box of what is kept, and the two of a map of headers.
#[test]
fn policies_that_are_idle_allocate_nothing() {
    on_one_thread(async {
        let without = of_stack(NONE, Body::empty).await;
        let nothing = EACH.iter().chain([&ALL]).map(|idle| (idle, 0.0));
        let a_head = [&RETRY_ANSWERS, &ALL_ANSWERS].map(|idle| (idle, 3.0));
        for (idle, allowed) in nothing.chain(a_head) {
            let added = of_stack(*idle, Body::empty).await - without;
            assert!((added - allowed).abs() < 0.05, "{}: {added}, not {allowed}", idle.name);
        }
    });
}

/// Whatever the body: a route whose retries are of class *Connect* clones, buffers and boxes nothing. Recording a body
/// of one piece is two more than its head.
#[test]
fn vs_y08_each_class_of_retries_allocates_what_it_keeps() {
    on_one_thread(async {
        for (body, of_answers) in [(Body::empty as fn() -> Body, 3.0), (|| Body::full("abc"), 5.0)] {
            let without = of_stack(NONE, body).await;
            for (idle, allowed) in [(RETRY_CONNECT, 0.0), (RETRY_ANSWERS, of_answers)] {
                let added = of_stack(idle, body).await - without;
                assert!((added - allowed).abs() < 0.05, "{}: {added}, not {allowed}", idle.name);
            }
        }
    });
}
