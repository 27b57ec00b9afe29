//! Mirroring: VS-P01 … VS-P04.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::BodyExt as _;
use http_body_util::channel::Channel;
use mesh_core::config::{CompileContext, Role};
use mesh_core::mirrored::MARK;
use mesh_core::{Body, Compat, Direction, Error, ErrorKind, RequestContext, ResponseFlags, Slot};
use mesh_route::{
    ActionKind, ClusterRuntime, Clusters, Forward, HashPolicy, HeadersLayer, Mirror, MirrorAuthority,
    MirrorOutcome, Percentage, RequestView, SelectRouteLayer, Shard, dispatch,
};
use mesh_testkit::scripted::{Reply, Scripted};
use mesh_testkit::upstream::Echo;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tower::util::BoxCloneSyncService;
use tower::{ServiceBuilder, ServiceExt as _};

use crate::support::*;

const TO_REVIEWS: &str = "route: [{destination: {host: reviews}}]";

/// `reviews`, and services `a`, `b` … with an endpoint each.
pub(crate) fn services(reviews: u16, mirrors: &[u16]) -> String {
    let named = ["a", "b", "c"].into_iter().zip(mirrors);
    let mirrors: String = named.map(|(name, port)| service_in("default", name, &[*port])).collect();
    self::reviews(&[reviews]) + &mirrors
}

/// Everything to `reviews`, with this for mirrors.
pub(crate) fn mirroring(mirror: &str) -> String {
    rules(&format!("  - {{{TO_REVIEWS}, {mirror}}}\n"))
}

/// The same with the annotation.
fn annotated(mirror: &str, annotation: &str) -> String {
    mirroring(mirror).replace(
        "namespace: default}\nspec:",
        &format!("namespace: default, annotations: {{mesh.rs/mirror: '{annotation}'}}}}\nspec:"),
    )
}

fn forward_of(it: &Compiled) -> Forward {
    match &it.ask("http://reviews/").route.unwrap().action().kind {
        ActionKind::Forward(forward) => forward.clone(),
        other => panic!("not forwarded: {other:?}"),
    }
}

/// `cluster share` of each mirror.
fn mirrors_of(it: &Compiled) -> Vec<String> {
    forward_of(it).mirrors.iter().map(|mirror| format!("{} {}", mirror.name, mirror.percentage)).collect()
}

/// The stack with a registry that is kept.
pub(crate) fn stack(it: &Compiled, clusters: &Clusters) -> Client {
    clusters.reconcile(it.table.clusters());
    let stack = ServiceBuilder::new()
        .layer(SelectRouteLayer::new(Slot::fixed_shared(Arc::clone(&it.table))))
        .layer(HeadersLayer::new())
        .service(dispatch(Shard::seeded(1)));
    BoxCloneSyncService::new(stack)
}

fn runtime(it: &Compiled, host: &str) -> Arc<ClusterRuntime> {
    let name = format!("outbound|80||{host}.default.svc.cluster.local");
    Arc::clone(it.cluster(&name).runtime().expect("the registry knows it"))
}

fn counted(runtime: &ClusterRuntime) -> Vec<(&'static str, u64)> {
    let all = MirrorOutcome::ALL.map(|outcome| (outcome.as_str(), runtime.mirrors().get(outcome)));
    all.into_iter().filter(|(_, count)| *count > 0).collect()
}

/// A request with a body that is fed by hand.
fn fed(path: &str) -> (http_body_util::channel::Sender<Bytes, Error>, Request<Body>) {
    let (feed, body) = Channel::new(1);
    let request = Request::post(format!("http://reviews{path}")).body(Body::new(body)).unwrap();
    (feed, request)
}

fn gone() -> Error {
    let flags = ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION;
    Error::new(ErrorKind::DownstreamReset, http::StatusCode::BAD_REQUEST, flags, "gone")
}

#[test]
fn vs_p01_a_mirror_that_says_no_share_gets_everything() {
    let a = "outbound|80||a.default.svc.cluster.local";
    let b = "outbound|80||b.default.svc.cluster.local";
    for (mirror, expected) in [
        ("mirror: {host: a}", vec![format!("{a} 100 %")]),
        ("mirror: {host: a}, mirrorPercentage: {value: 12.5}", vec![format!("{a} 12.5 %")]),
        ("mirror: {host: a}, mirrorPercentage: {value: 0.0001}", vec![format!("{a} 0.0001 %")]),
        ("mirror: {host: a}, mirrorPercentage: {value: 0}", vec![]),
        ("mirror: {host: a}, mirrorPercentage: {}", vec![]),
        ("mirror: {host: a}, mirrorPercent: 7", vec![format!("{a} 7 %")]),
        ("mirror: {host: a}, mirrorPercent: 0", vec![]),
        ("mirror: {host: a}, mirrorPercent: 7, mirrorPercentage: {value: 9}", vec![format!("{a} 9 %")]),
        (
            "mirrors: [{destination: {host: a}}, {destination: {host: b}, percentage: {value: 5}}]",
            vec![format!("{a} 100 %"), format!("{b} 5 %")],
        ),
        (
            "mirrors: [{destination: {host: a}, percentage: {value: 0}}, {destination: {host: b}}]",
            vec![format!("{b} 100 %")],
        ),
    ] {
        let it = compile(&(services(1, &[2, 3]) + &mirroring(mirror)));
        assert_eq!(mirrors_of(&it), expected, "{mirror}");
        assert_eq!(it.unenforced(), [""; 0], "{mirror}");
        let warned: Vec<_> = it.diags.iter().map(|found| found.path.as_str()).collect();
        let deprecated: &[&str] =
            if mirror.contains("mirrorPercent:") { &["spec.http[0].mirrorPercent"] } else { &[] };
        assert_eq!(warned, deprecated, "{mirror}");
    }
}

#[test]
fn vs_p01_what_istio_refuses_is_refused() {
    for (mirror, path, reason) in [
        ("mirror: {host: a}, mirrors: [{destination: {host: b}}]", "mirrors", "must not stand beside mirror"),
        ("mirrors: [{percentage: {value: 5}}]", "mirrors[0].destination", "is required"),
        ("mirror: {host: a}, mirrorPercentage: {value: 101}", "mirrorPercentage.value", "0..100"),
        (
            "mirrors: [{destination: {host: a}, percentage: {value: -1}}]",
            "mirrors[0].percentage.value",
            "0..100",
        ),
    ] {
        refused(&mirroring(mirror), &format!("spec.http[0].{path}"), reason);
    }
    let it = compile(&rules("  - {directResponse: {status: 200}, mirror: {host: reviews}}\n"));
    it.warns("spec.http[0].mirror", "what is not forwarded is not mirrored");
}

#[test]
fn vs_p01_shares_are_exact_and_each_mirror_is_drawn_by_itself() {
    const DRAWS: u32 = 400_000;
    let request = get("http://reviews/");
    for (first, second, seed) in [(0.1, 99.9, 1), (10.0, 50.0, 2), (50.0, 50.0, 3), (100.0, 33.3, 4)] {
        let it = compile(
            &(services(1, &[2, 3])
                + &mirroring(&format!(
                    "mirrors: [{{destination: {{host: a}}, percentage: {{value: {first}}}}}, {{destination: {{host: b}}, percentage: {{value: {second}}}}}]"
                ))),
        );
        let forward = forward_of(&it);
        let conn = it.conn(80);
        let view = RequestView::new(&request, &conn);
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut seen = [0_u32; 3];
        for _ in 0..DRAWS {
            let drawn: Vec<_> =
                forward.mirrors.iter().map(|mirror| mirror.draw(&view, &conn, &mut rng)).collect();
            seen[0] += u32::from(drawn[0]);
            seen[1] += u32::from(drawn[1]);
            seen[2] += u32::from(drawn[0] && drawn[1]);
        }
        let percent = seen.map(|count| f64::from(count) * 100.0 / f64::from(DRAWS));
        for (seen, expected) in percent.into_iter().zip([first, second, first * second / 100.0]) {
            assert!((seen - expected).abs() <= 0.25, "{seen} % for {expected} %");
        }
        assert!(first < 100.0 || seen[0] == DRAWS);
    }
}

#[test]
fn vs_g01_a_delegate_inherits_the_mirrors_of_its_root() {
    let root = |mirror: &str| {
        resource(
            "VirtualService",
            "root",
            &format!("{{hosts: [reviews], http: [{{delegate: {{name: leaf}}, {mirror}}}]}}"),
        )
    };
    let leaf = |mirror: &str| {
        let mirror = if mirror.is_empty() { String::new() } else { format!(", {mirror}") };
        resource("VirtualService", "leaf", &format!("{{http: [{{{TO_REVIEWS}{mirror}}}]}}"))
    };
    let a = "outbound|80||a.default.svc.cluster.local";
    let b = "outbound|80||b.default.svc.cluster.local";
    for (of_root, of_leaf, expected) in [
        ("mirror: {host: a}, mirrorPercentage: {value: 5}", "", vec![format!("{a} 5 %")]),
        ("mirrors: [{destination: {host: a}}]", "", vec![format!("{a} 100 %")]),
        ("mirror: {host: a}, mirrorPercentage: {value: 5}", "mirror: {host: b}", vec![format!("{b} 5 %")]),
        (
            "mirrors: [{destination: {host: a}}]",
            "mirrors: [{destination: {host: b}}]",
            vec![format!("{b} 100 %")],
        ),
    ] {
        let it = compile(&(services(1, &[2, 3]) + &root(of_root) + &leaf(of_leaf)));
        assert_eq!(mirrors_of(&it), expected, "{of_root} and {of_leaf}");
    }
}

#[tokio::test]
async fn vs_p02_a_mirror_gets_the_request_and_the_client_the_answer_of_the_primary() {
    let (primary, mirror) =
        (Echo::start("primary").await, Scripted::start("mirror", |_| Reply::Status(500)).await);
    let http = format!(
        "  - {{match: [{{uri: {{prefix: /old}}}}], rewrite: {{uri: /new}}, headers: {{request: {{set: {{x-route: r}}}}}}, \
         route: [{{destination: {{host: reviews}}, headers: {{request: {{set: {{x-to: d}}}}}}}}], mirror: {{host: a}}}}\n  \
         - {{{TO_REVIEWS}}}\n"
    );
    let it = compile(&(services(primary.addr.port(), &[mirror.addr.port()]) + &rules(&http)));
    let (clusters, request) = (
        Clusters::new(),
        Request::put("http://reviews/old/a?q=1")
            .header("x-mine", "1")
            .header("traceparent", "00-80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-01")
            .body(Body::from("hello"))
            .unwrap(),
    );
    let client = stack(&it, &clusters);
    let answer = send(&client, request).await;
    assert_eq!((answer.status, answer.by().as_str()), (200, "primary"));
    assert_eq!(answer.saw_header(MARK.as_str()), None, "only copies are marked");
    let (of_mirror, of_primary) = (runtime(&it, "a"), runtime(&it, "reviews"));
    until(|| counted(&of_mirror) == [("answered", 1)]).await;
    let seen = mirror.seen();
    let [copy] = seen.as_slice() else { panic!("{seen:?}") };
    assert_eq!(
        (copy.method.as_str(), copy.path.as_str(), &copy.body[..]),
        ("PUT", "/new/a?q=1", &b"hello"[..])
    );
    assert_eq!(copy.header("host"), Some("reviews"), "the suffix is off by default");
    assert_eq!(
        (copy.header("x-mine"), copy.header("x-route"), copy.header("x-to")),
        (Some("1"), Some("r"), Some("d"))
    );
    assert_eq!(copy.header("content-length"), Some("5"));
    assert_eq!(
        copy.header("traceparent"),
        Some("00-80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-00"),
        "sampled by no trace"
    );
    assert!(answer.saw_header("traceparent").unwrap().ends_with("-01"));
    assert_eq!(counted(&of_primary), []);
    assert_eq!((of_primary.requests(), of_mirror.requests(), clusters.mirroring().in_flight()), (0, 0, 0));
    send(&client, get("http://reviews/other")).await;
    assert_eq!(mirror.requests(), 1, "another rule");
}

#[tokio::test]
async fn vs_p02_a_mirror_that_fails_is_neither_tried_again_nor_noticed() {
    let primary = Echo::start("primary").await;
    let mirror = Scripted::start("mirror", |_| Reply::Reset).await;
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let yaml = services(primary.addr.port(), &[mirror.addr.port(), refusing.port()])
        + &mirroring(
            "retries: {attempts: 3, retryOn: '5xx,reset,connect-failure'}, mirrors: [{destination: {host: a}}, {destination: {host: b}}, {destination: {host: nobody}}]",
        );
    let it = compile(&yaml);
    it.warns("spec.http[0].mirrors[2].destination.host", "nothing is mirrored there");
    let client = stack(&it, &Clusters::new());
    for _ in 0..3 {
        let mut request = get("http://reviews/");
        let cx = RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
        assert_eq!(send(&client, request).await.by(), "primary");
        assert_eq!((cx.attempts(), cx.flags()), (1, ResponseFlags::NONE));
        let upstream = cx.upstream().unwrap();
        assert_eq!(upstream.endpoint, Some(primary.addr), "the copies write elsewhere");
    }
    let (a, b) = (runtime(&it, "a"), runtime(&it, "b"));
    until(|| counted(&a) == [("failed", 3)] && counted(&b) == [("failed", 3)]).await;
    assert_eq!((mirror.requests(), primary.requests()), (3, 3));
    assert_eq!((a.retried(), b.retried()), (0, 0));
}

#[tokio::test]
async fn vs_p02_a_mirror_that_hangs_delays_nobody_and_is_let_go() {
    let primary = Echo::start("primary").await;
    let mirror = Scripted::start("mirror", |_| Reply::Hang).await;
    for (timeout, after) in [("", 60_000), ("timeout: 3s, ", 3_000)] {
        let yaml = services(primary.addr.port(), &[mirror.addr.port()])
            + &mirroring(&format!("{timeout}mirror: {{host: a}}"));
        let it = compile(&yaml);
        let clusters = Clusters::new();
        let client = stack(&it, &clusters);
        let before = mirror.requests();
        assert_eq!(send(&client, get("http://reviews/")).await.by(), "primary");
        until(|| mirror.requests() == before + 1).await;
        let a = runtime(&it, "a");
        assert_eq!((a.requests(), clusters.mirroring().in_flight()), (1, 1), "it counts where it is");
        tokio::time::pause();
        tokio::time::advance(Duration::from_millis(after - 500)).await;
        tokio::task::yield_now().await;
        assert_eq!(counted(&a), []);
        tokio::time::advance(Duration::from_millis(1_000)).await;
        tokio::time::resume();
        until(|| counted(&a) == [("failed", 1)]).await;
        assert_eq!((a.requests(), clusters.mirroring().in_flight()), (0, 0));
    }
}

#[tokio::test]
async fn vs_p02_copies_in_flight_are_bounded_per_process() {
    let primary = Echo::start("primary").await;
    let mirror = Scripted::start("mirror", |_| Reply::Hang).await;
    let yaml = services(primary.addr.port(), &[mirror.addr.port()]) + &mirroring("mirror: {host: a}");
    let it = compile(&yaml);
    let clusters = Clusters::new();
    clusters.mirroring().set_most_in_flight(2);
    // Two workers.
    let workers = [stack(&it, &clusters), stack(&it, &clusters)];
    for at in 0..6 {
        assert_eq!(send(&workers[at % 2], get("http://reviews/")).await.by(), "primary");
    }
    let a = runtime(&it, "a");
    assert_eq!((counted(&a), clusters.mirroring().in_flight()), (vec![("dropped", 4)], 2));
    until(|| mirror.requests() == 2).await;
}

#[tokio::test]
async fn vs_p02_a_mirror_has_the_limits_and_the_outlier_detection_of_its_own_cluster() {
    let primary = Echo::start("primary").await;
    let mirror =
        Scripted::start("mirror", |seen| if seen.path == "/held" { Reply::Hang } else { Reply::Status(503) })
            .await;
    let policy = resource(
        "DestinationRule",
        "a",
        "{host: a, trafficPolicy: {connectionPool: {http: {http2MaxRequests: 1}}, outlierDetection: {consecutive5xxErrors: 2, interval: 10s, baseEjectionTime: 30s, maxEjectionPercent: 100}}}",
    );
    let yaml =
        services(primary.addr.port(), &[mirror.addr.port()]) + &policy + &mirroring("mirror: {host: a}");
    let it = compile(&yaml);
    let client = stack(&it, &Clusters::new());
    let (a, of_primary) = (runtime(&it, "a"), runtime(&it, "reviews"));
    for at in 1..=2 {
        assert_eq!(send(&client, get("http://reviews/")).await.by(), "primary");
        until(|| counted(&a) == [("answered", at)]).await;
    }
    assert_eq!(a.with_outliers(|detector| detector.ejected()), 1);
    assert_eq!(send(&client, get("http://reviews/")).await.by(), "primary");
    until(|| counted(&a) == [("answered", 2), ("failed", 1)]).await;
    assert_eq!(mirror.requests(), 2, "nobody is left to mirror to");

    let it = compile(&yaml.replace("outlierDetection", "nobodyKnows").replace(", nobodyKnows: {consecutive5xxErrors: 2, interval: 10s, baseEjectionTime: 30s, maxEjectionPercent: 100}", ""));
    let client = stack(&it, &Clusters::new());
    let a = runtime(&it, "a");
    assert_eq!(send(&client, get("http://reviews/held")).await.by(), "primary");
    until(|| mirror.requests() == 3).await;
    assert_eq!(send(&client, get("http://reviews/")).await.by(), "primary");
    until(|| counted(&a) == [("failed", 1)]).await;
    assert_eq!((a.overflows(), of_primary.overflows()), (1, 0));
}

#[tokio::test]
async fn vs_p02_a_request_that_finds_no_cluster_is_not_mirrored() {
    let mirror = Scripted::start("mirror", |_| Reply::Status(200)).await;
    let yaml = services(1, &[mirror.addr.port()])
        + &rules("  - {route: [{destination: {host: nobody}}], mirror: {host: a}}\n");
    let it = compile(&yaml);
    let client = stack(&it, &Clusters::new());
    assert_eq!(fail(&client, get("http://reviews/")).await, "503 NC cluster_not_found");
    assert_eq!((mirror.requests(), counted(&runtime(&it, "a"))), (0, vec![]));
}

#[tokio::test]
async fn vs_p03_the_suffix_belongs_to_istio_1_1() {
    let primary = Echo::start("primary").await;
    let mirror = Scripted::start("mirror", |_| Reply::Status(200)).await;
    let yaml = services(primary.addr.port(), &[mirror.addr.port()]) + &mirroring("mirror: {host: a}");
    for (compat, host) in [(Compat::Current, "reviews:80"), (Compat::V1_1, "reviews-shadow:80")] {
        let mut cx = CompileContext::new(Role::Sidecar);
        cx.compat = compat;
        let it = compile_for(&cx, &yaml);
        let client = stack(&it, &Clusters::new());
        let answer = send(&client, get("http://reviews:80/")).await;
        assert_eq!(answer.saw()["host"], "reviews:80", "never that of the primary");
        let a = runtime(&it, "a");
        until(|| counted(&a) == [("answered", 1)]).await;
        assert_eq!(mirror.seen().last().unwrap().header("host"), Some(host), "{compat}");
    }
}

/// What an upstream has received of bodies so far.
#[derive(Clone, Default)]
struct Received(Arc<Mutex<(Vec<u8>, Option<HeaderMap>)>>);

impl Received {
    fn bytes(&self) -> usize {
        self.0.lock().unwrap().0.len()
    }
}

/// An upstream over HTTP/2 that keeps what it receives as it comes.
async fn receiver() -> (u16, Received) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, received) = (listener.local_addr().unwrap().port(), Received::default());
    let log = received.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let log = log.clone();
            let answer = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let log = log.clone();
                async move {
                    let mut body = request.into_body();
                    while let Some(frame) = body.frame().await {
                        let mut log = log.0.lock().unwrap();
                        match frame.unwrap().into_data() {
                            Ok(data) => log.0.extend_from_slice(&data),
                            Err(frame) => log.1 = frame.into_trailers().ok(),
                        }
                    }
                    Ok::<_, std::convert::Infallible>(http::Response::new(
                        http_body_util::Empty::<Bytes>::new(),
                    ))
                }
            });
            let executor = hyper_util::rt::TokioExecutor::new();
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http2::Builder::new(executor).serve_connection(io, answer));
        }
    });
    (port, received)
}

#[tokio::test]
async fn vs_p03_the_body_is_teed_with_its_trailers_while_the_primary_streams() {
    const PIECES: usize = 64;
    let ((primary, of_primary), (mirror, of_mirror)) = (receiver().await, receiver().await);
    let yaml = (services(primary, &[mirror]) + &mirroring("mirror: {host: a}"))
        .replace("name: http, protocol: HTTP}", "name: grpc, protocol: GRPC}")
        .replace("ports: {http:", "ports: {grpc:");
    let it = compile(&yaml);
    let client = stack(&it, &Clusters::new());
    let (mut feed, request) = fed("/call");
    let call = tokio::spawn(async move { send(&client, request).await.status });
    // Far more than is kept: the mirror reads along, before the request has ended.
    for at in 1..=PIECES {
        let piece = Bytes::from(vec![u8::try_from(at).unwrap(); 16 * 1024]);
        feed.send_data(piece).await.unwrap();
        until(|| of_primary.bytes() == at * 16 * 1024 && of_mirror.bytes() == at * 16 * 1024).await;
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "64".parse().unwrap());
    feed.send_trailers(trailers.clone()).await.unwrap();
    drop(feed);
    assert_eq!(ended(call).await, 200);
    let a = runtime(&it, "a");
    until(|| !counted(&a).is_empty()).await;
    assert_eq!(counted(&a), [("answered", 1)]);
    let (of_primary, of_mirror) = (of_primary.0.lock().unwrap(), of_mirror.0.lock().unwrap());
    assert!(of_primary.0 == of_mirror.0, "the same bytes");
    assert_eq!((of_primary.1.as_ref(), of_mirror.1.as_ref()), (Some(&trailers), Some(&trailers)));
}

/// Takes a connection and what comes on it until it ends, reading only when told.
async fn slow_reader() -> (u16, tokio::sync::oneshot::Sender<()>, tokio::task::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, told) = tokio::sync::oneshot::channel();
    let reading = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = told.await;
        let mut all = Vec::new();
        // A reset is an end too.
        let _ = stream.read_to_end(&mut all).await;
        all
    });
    (port, tell, reading)
}

#[tokio::test]
async fn vs_p03_a_mirror_that_reads_too_slowly_loses_its_copy_and_the_primary_never_waits() {
    let primary = Scripted::start("primary", |_| Reply::Status(200)).await;
    let (port, read, received) = slow_reader().await;
    let it = compile(&(services(primary.addr.port(), &[port]) + &mirroring("mirror: {host: a}")));
    let clusters = Clusters::new();
    let client = stack(&it, &clusters);
    let (mut feed, request) = fed("/upload");
    let upload = tokio::spawn(async move { send(&client, request).await.status });
    let piece = Bytes::from(vec![b'x'; 64 * 1024]);
    // More than the sockets of a loopback take.
    for _ in 0..512 {
        feed.send_data(piece.clone()).await.unwrap();
    }
    drop(feed);
    assert_eq!(ended(upload).await, 200);
    assert_eq!(primary.seen()[0].body.len(), 512 * piece.len());
    let a = runtime(&it, "a");
    until(|| counted(&a) == [("overflowed", 1)]).await;
    assert_eq!((a.requests(), clusters.mirroring().in_flight()), (0, 0));
    read.send(()).unwrap();
    let received = ended(received).await;
    assert!(!received.ends_with(b"0\r\n\r\n"), "it must not pass for whole");
    assert!(received.len() < 512 * piece.len());
}

#[tokio::test]
async fn vs_p03_a_primary_that_breaks_off_resets_its_copy() {
    let primary = Scripted::start("primary", |_| Reply::Status(200)).await;
    let (port, read, received) = slow_reader().await;
    let it = compile(&(services(primary.addr.port(), &[port]) + &mirroring("mirror: {host: a}")));
    let client = stack(&it, &Clusters::new());
    let (mut feed, request) = fed("/upload");
    let upload = tokio::spawn(async move { client.oneshot(request).await.map(|response| response.status()) });
    feed.send_data(Bytes::from_static(b"half of it")).await.unwrap();
    let a = runtime(&it, "a");
    until(|| a.requests() == 1).await;
    feed.abort(gone());
    assert!(ended(upload).await.is_err());
    until(|| counted(&a) == [("cancelled", 1)]).await;
    read.send(()).unwrap();
    let received = ended(received).await;
    assert!(!received.ends_with(b"0\r\n\r\n"), "{}", String::from_utf8_lossy(&received));
    assert_eq!(primary.requests(), 0);
}

#[tokio::test]
async fn vs_p03_an_upgrade_is_not_mirrored() {
    let primary = Echo::start("primary").await;
    let mirror = Scripted::start("mirror", |_| Reply::Status(200)).await;
    let it =
        compile(&(services(primary.addr.port(), &[mirror.addr.port()]) + &mirroring("mirror: {host: a}")));
    let client = stack(&it, &Clusters::new());
    let upgrade = Request::get("http://reviews/")
        .header("connection", "upgrade")
        .header("upgrade", "echo")
        .body(Body::empty())
        .unwrap();
    let _ = client.clone().oneshot(upgrade).await;
    assert_eq!(send(&client, get("http://reviews/plain")).await.by(), "primary");
    let a = runtime(&it, "a");
    until(|| counted(&a) == [("answered", 1)]).await;
    let paths: Vec<_> = mirror.seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths, ["/plain"]);
}

#[tokio::test]
async fn vs_p04_each_mirror_has_its_own_authority_and_headers() {
    let primary = Echo::start("primary").await;
    let (a, b) = (
        Scripted::start("a", |_| Reply::Status(200)).await,
        Scripted::start("b", |_| Reply::Status(200)).await,
    );
    let annotation = r#"{"a": {"authority": "a.example:81", "set": {"x-mirror": "of %REQ(:path)%"}, "remove": ["cookie"]}, "*": {"add": {"x-mine": "2"}}}"#;
    let yaml = services(primary.addr.port(), &[a.addr.port(), b.addr.port()])
        + &annotated("mirrors: [{destination: {host: a}}, {destination: {host: b}}]", annotation);
    let it = compile(&yaml);
    assert_eq!(it.diags.iter().count(), 0, "{}", it.diags);
    let client = stack(&it, &Clusters::new());
    let request = Request::get("http://reviews/items").header("cookie", "secret=1").header("x-mine", "1");
    let answer = send(&client, request.body(Body::empty()).unwrap()).await;
    assert_eq!(answer.saw()["host"], "reviews");
    assert_eq!(
        (answer.saw_header("cookie").as_deref(), answer.saw_header("x-mirror")),
        (Some("secret=1"), None)
    );
    until(|| a.requests() == 1 && b.requests() == 1).await;
    let (a, b) = (a.seen().remove(0), b.seen().remove(0));
    assert_eq!(
        (a.header("host"), a.header("x-mirror"), a.header("cookie")),
        (Some("a.example:81"), Some("of /items"), None)
    );
    assert_eq!(
        (b.header("host"), b.header("x-mirror"), b.header("cookie")),
        (Some("reviews"), None, Some("secret=1"))
    );
    let mine: Vec<_> = b.headers.get_all("x-mine").iter().map(|value| value.to_str().unwrap()).collect();
    assert_eq!((mine, a.headers.get_all("x-mine").iter().count()), (vec!["1", "2"], 1));
}

#[test]
fn vs_p04_the_annotation_is_judged() {
    use mesh_core::config::Compile as _;
    use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
    use mesh_route::RouteTable;

    let said = |annotation: &str| {
        let yaml = annotated("mirror: {host: a}", annotation);
        let (set, mut diags) = ResourceSet::load(&[SourceFile::new("v.yaml", yaml)], &LoadOptions::default());
        RouteTable::compile(&set, &CompileContext::new(Role::Sidecar), &mut diags).unwrap();
        let said = diags.iter().filter(|found| found.path.contains("mesh.rs/mirror"));
        said.map(|found| format!("{}: {}", found.severity, found.message)).collect::<Vec<_>>()
    };
    assert_eq!(said(r#"{"a": {}}"#), [""; 0]);
    assert_eq!(said(r#"{"b": {}}"#), ["warning: has no effect: no rule mirrors to \"b\""]);
    assert_eq!(said(r#"{"a/v1": {}}"#), ["warning: has no effect: no rule mirrors to \"a/v1\""]);
    let wrong = said(r#"{"a": {"authority": 1}}"#);
    assert_eq!(wrong, [r#"error: "{\"a\": {\"authority\": 1}}": a: authority: a text is wanted"#]);
}

#[test]
fn vs_p04_a_key_decides_for_all_its_requests() {
    const USERS: u32 = 100_000;
    let it = |share: u32, mirror: &str| {
        let annotation = r#"{"*": {"sampleBy": "header:x-user"}}"#;
        let mirror = format!("mirror: {{host: {mirror}}}, mirrorPercentage: {{value: {share}}}");
        compile(&(services(1, &[2, 3]) + &annotated(&mirror, annotation)))
    };
    let copied = |it: &Compiled, seed: u64| -> Vec<bool> {
        let mirror = forward_of(it).mirrors[0].clone();
        assert_eq!(mirror.sample_by, Some(HashPolicy::Header("x-user".parse().unwrap())));
        let (conn, mut rng) = (it.conn(80), SmallRng::seed_from_u64(seed));
        (0..USERS)
            .map(|user| {
                let request = Request::get("http://reviews/").header("x-user", format!("user-{user}"));
                let request = request.body(Body::empty()).unwrap();
                mirror.draw(&RequestView::new(&request, &conn), &conn, &mut rng)
            })
            .collect()
    };
    let share =
        |copied: &[bool]| copied.iter().filter(|copied| **copied).count() as f64 * 100.0 / f64::from(USERS);
    let ten = copied(&it(10, "a"), 1);
    assert!((share(&ten) - 10.0).abs() <= 0.25, "{}", share(&ten));
    assert_eq!(ten, copied(&it(10, "a"), 2), "a draw has no say");
    let thirty = copied(&it(30, "a"), 1);
    assert!((share(&thirty) - 30.0).abs() <= 0.25);
    assert!(ten.iter().zip(&thirty).all(|(ten, thirty)| !ten || *thirty), "who was copied still is");
    let other = copied(&it(10, "b"), 1);
    let both: Vec<_> = ten.iter().zip(&other).map(|(one, other)| *one && *other).collect();
    assert!((share(&both) - 1.0).abs() <= 0.25, "two mirrors do not copy the same users: {}", share(&both));
    let request = get("http://reviews/");
    let keyless = it(10, "a");
    let (mirror, conn) = (forward_of(&keyless).mirrors[0].clone(), keyless.conn(80));
    let mut rng = SmallRng::seed_from_u64(1);
    let drawn: Vec<_> =
        (0..USERS).map(|_| mirror.draw(&RequestView::new(&request, &conn), &conn, &mut rng)).collect();
    assert!((share(&drawn) - 10.0).abs() <= 0.25, "{}", share(&drawn));
}

#[tokio::test]
async fn vs_p04_a_copy_is_not_copied() {
    let primary = Echo::start("primary").await;
    let mirror = Scripted::start("mirror", |_| Reply::Status(200)).await;
    let it =
        compile(&(services(primary.addr.port(), &[mirror.addr.port()]) + &mirroring("mirror: {host: a}")));
    let client = stack(&it, &Clusters::new());
    send(&client, get("http://reviews/first")).await;
    until(|| mirror.requests() == 1).await;
    let mark = mirror.seen()[0].header(MARK.as_str()).unwrap().to_owned();
    // As the proxy of the mirror would receive it, whichever process that is.
    let other = stack(
        &compile(&(services(primary.addr.port(), &[mirror.addr.port()]) + &mirroring("mirror: {host: a}"))),
        &Clusters::new(),
    );
    for client in [&client, &other] {
        let request = Request::get("http://reviews/copy").header(MARK, &mark).body(Body::empty()).unwrap();
        assert_eq!(send(client, request).await.saw_header(MARK.as_str()), Some(mark.clone()), "it passes on");
    }
    // Behind a gateway only the process whose mark it is believes it.
    let distrusted = |path: &str| {
        let request = Request::get(format!("http://reviews/{path}")).header(MARK, format!("~{mark}"));
        request.body(Body::empty()).unwrap()
    };
    send(&client, distrusted("own")).await;
    send(&other, distrusted("others")).await;
    until(|| mirror.requests() == 2).await;
    assert_eq!(mirror.seen()[1].path, "/others");
    assert!(mirror.seen()[1].header(MARK.as_str()).unwrap().starts_with(&format!("~{mark},")));
}

#[tokio::test]
async fn vs_p04_the_builder_makes_the_same_mirrors() {
    let primary = Echo::start("primary").await;
    let mirror = Scripted::start("mirror", |_| Reply::Status(200)).await;
    let cluster = |name: &str, port: u16| {
        let endpoints = vec![mesh_route::EndpointSpec::new(([127, 0, 0, 1], port).into())];
        let spec = mesh_route::ClusterSpec::new(
            mesh_core::ClusterName::custom(name),
            mesh_route::Discovery::Static(endpoints),
        );
        Arc::new(mesh_route::Cluster::new(spec))
    };
    let (to, copies) = (cluster("primary", primary.addr.port()), cluster("mirror", mirror.addr.port()));
    let operations = mesh_route::HeaderOps::new(["cookie"], [("x-mirror", "yes")], []).unwrap();
    let route = mesh_route::RouteBuilder::new("all")
        .mirror(
            Mirror::new(copies)
                .percentage(Percentage::ALWAYS)
                .sample_by(HashPolicy::SourceIp)
                .authority(MirrorAuthority::Replace("next".parse().unwrap()))
                .request_headers(operations),
        )
        .forward(to)
        .unwrap();
    let table = mesh_route::RouteTable::builder().host("*", [route]).build().unwrap();
    assert_eq!(table.clusters().len(), 2, "the registry has to know the mirror");
    Clusters::new().reconcile(table.clusters());
    let client = ServiceBuilder::new()
        .layer(SelectRouteLayer::new(Slot::fixed(table)))
        .service(dispatch(Shard::seeded(1)));
    let request = Request::get("http://a/").header("cookie", "a=b").body(Body::empty()).unwrap();
    client.oneshot(request).await.unwrap().into_body().collect().await.unwrap();
    until(|| mirror.requests() == 1).await;
    let seen = mirror.seen().remove(0);
    assert_eq!(
        (seen.header("host"), seen.header("x-mirror"), seen.header("cookie")),
        (Some("next"), Some("yes"), None)
    );
}

#[tokio::test(start_paused = true)]
async fn vs_p04_the_layer_by_itself_waits_for_nobody() {
    use mesh_core::BoxError;
    use mesh_route::MirrorLayer;

    type Log = Arc<Mutex<Vec<(String, usize)>>>;
    let seen = Log::default();
    let log = Arc::clone(&seen);
    let target = tower::service_fn(move |request: Request<Body>| {
        let log = Arc::clone(&log);
        async move {
            assert!(request.extensions().get::<RequestContext>().unwrap().is_mirror());
            let path = request.uri().path().to_owned();
            match path.as_str() {
                "/hang" => std::future::pending().await,
                "/fail" => return Err(BoxError::from("no")),
                _ => {}
            }
            let body = request.into_body().collect().await?.to_bytes();
            log.lock().unwrap().push((path, body.len()));
            Ok(http::Response::new(Body::from("thrown away")))
        }
    });
    let layer = MirrorLayer::new(target).timeout(Duration::from_secs(5)).seed(7);
    let primary = |request: Request<Body>| async move {
        assert!(!request.headers().contains_key(MARK));
        let body = request.into_body().collect().await?;
        Ok::<_, Error>(http::Response::new(Body::from(body.to_bytes())))
    };
    let service = ServiceBuilder::new().layer(layer.clone()).service_fn(primary);
    // A foreign body, as in a server that is not ours.
    let post = |path: &str| {
        Request::post(path).body(http_body_util::Full::new(Bytes::from_static(b"hello"))).unwrap()
    };
    let started = tokio::time::Instant::now();
    for path in ["/a", "/hang", "/fail"] {
        let response = service.clone().oneshot(post(path)).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
    }
    assert_eq!(started.elapsed(), Duration::ZERO);
    tokio::time::sleep(Duration::from_secs(6)).await;
    let counters = layer.counters();
    assert_eq!((counters.get(MirrorOutcome::Answered), counters.get(MirrorOutcome::Failed)), (1, 2));
    assert_eq!(*seen.lock().unwrap(), [("/a".to_owned(), 5)]);

    let some =
        ServiceBuilder::new().layer(layer.percentage(Percentage::from_percent(25.0))).service_fn(primary);
    for _ in 0..4_000 {
        some.clone().oneshot(post("/a")).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let copied = seen.lock().unwrap().len() - 1;
    assert!((900..1_100).contains(&copied), "{copied} of 4000");
}
