//! Injected faults: VS-F01 … VS-F05.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt as _;
use mesh_core::{Body, Direction, Error, LocalReplyLayer, RequestContext, Slot};
use mesh_route::{Fault, FaultLayer, FaultScope, SelectRouteLayer};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tower::util::BoxCloneSyncService;
use tower::{ServiceBuilder, ServiceExt as _};

use crate::support::{
    Compiled, compile, ended, fail, get, one_version, refused, resource, reviews, rules, send, until, warned,
};

/// A rule for everything with this fault.
fn with_fault(fault: &str) -> String {
    rules(&format!("  - {{fault: {fault}, route: [{{destination: {{host: reviews}}}}]}}\n"))
}

fn compile_fault(fault: &str) -> Compiled {
    compile(&(reviews(&[1]) + &with_fault(fault)))
}

/// The fault of the route that takes everything.
fn fault_of(it: &Compiled) -> Option<Fault> {
    it.ask("http://reviews/").route.unwrap().action().fault
}

type Stack = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// The layer by itself, below what makes replies, over an application that counts its requests.
fn stack(it: &Compiled, layer: FaultLayer) -> (Stack, Arc<AtomicU32>) {
    let reached = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&reached);
    let stack = ServiceBuilder::new()
        .layer(LocalReplyLayer::new(Direction::Outbound))
        .layer(SelectRouteLayer::new(Slot::fixed_shared(Arc::clone(&it.table))))
        .layer(layer)
        .service_fn(move |_: Request<Body>| {
            count.fetch_add(1, Ordering::Relaxed);
            async { Ok::<_, Error>(Response::new(Body::from("reached"))) }
        });
    (BoxCloneSyncService::new(stack), reached)
}

/// A request whose context is kept.
fn noted(mut request: Request<Body>) -> (Request<Body>, RequestContext) {
    let context = RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
    (request, context)
}

fn grpc() -> Request<Body> {
    Request::post("http://reviews/").header("content-type", "application/grpc").body(Body::empty()).unwrap()
}

/// `status body` of an exchange, and how long it took.
async fn ask(stack: &Stack, request: Request<Body>) -> (String, Duration) {
    let before = tokio::time::Instant::now();
    let response = stack.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    (format!("{} {text}", parts.status.as_u16()), before.elapsed())
}

/// The shares of delayed and of aborted in 10⁶ draws, in percent, and the share that is both.
fn shares(fault: &Fault, seed: u64) -> (f64, f64, f64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut delayed, mut aborted, mut both) = (0_u32, 0_u32, 0_u32);
    for _ in 0..1_000_000 {
        let injected = fault.draw(&mut rng);
        delayed += u32::from(injected.delay.is_some());
        aborted += u32::from(injected.abort.is_some());
        both += u32::from(injected.delay.is_some() && injected.abort.is_some());
    }
    let percent = |count| f64::from(count) / 10_000.0;
    (percent(delayed), percent(aborted), percent(both))
}

fn about(seen: f64, expected: f64) {
    assert!((seen - expected).abs() <= 0.25, "{seen} for {expected}");
}

#[tokio::test(start_paused = true)]
async fn vs_f01_a_fixed_delay_for_a_share_of_the_requests() {
    let it = compile_fault("{delay: {fixedDelay: 2.5s, percentage: {value: 100}}}");
    assert_eq!(it.unenforced(), [""; 0]);
    let (stack, reached) = stack(&it, FaultLayer::seeded(1));
    let (request, context) = noted(get("http://reviews/"));
    assert_eq!(ask(&stack, request).await, ("200 reached".to_owned(), Duration::from_millis(2500)));
    assert_eq!((context.flags().to_string().as_str(), reached.load(Ordering::Relaxed)), ("DI", 1));

    // Istio's rule for each way to say a share: percentage, else whole percent, else never.
    for (share, millionths) in [
        ("percentage: {value: 12.5}", 125_000),
        ("percentage: {value: 0.0001}", 1),
        ("percentage: {value: 99.99999}", 999_999),
        ("percentage: {value: 0}", 0),
        ("percentage: {}", 0),
        ("percent: 30", 300_000),
        ("percent: 30, percentage: {value: 2}", 20_000),
        ("percent: 30, percentage: {value: 0}", 0),
    ] {
        let it = compile_fault(&format!("{{delay: {{fixedDelay: 1s, {share}}}}}"));
        let delay = fault_of(&it).unwrap().delay.unwrap();
        assert_eq!(delay.percentage.millionths(), millionths, "{share}");
    }
    let never = fault_of(&compile_fault("{delay: {fixedDelay: 1s}}")).unwrap();
    assert_eq!(shares(&never, 1), (0.0, 0.0, 0.0));

    let fault = |text: &str| reviews(&[1]) + &with_fault(text);
    let path = "spec.http[0].fault.delay";
    let at = |field: &str| format!("{path}.{field}");
    refused(
        &fault("{delay: {fixedDelay: 1s, percentage: {value: 0.00009}}}"),
        &at("percentage.value"),
        "0.0001",
    );
    refused(&fault("{delay: {fixedDelay: 1s, percentage: {value: 101}}}"), &at("percentage.value"), "0..100");
    refused(&fault("{delay: {fixedDelay: 0.5ms, percentage: {value: 1}}}"), &at("fixedDelay"), "1ms");
    refused(&fault("{delay: {exponentialDelay: 1s}}"), &at("exponentialDelay"), "not supported");
    warned(&fault("{delay: {fixedDelay: 1s, percent: 30}}"), &at("percent"), "deprecated");
}

#[tokio::test]
async fn vs_f01_shares_are_within_a_quarter_of_a_point() {
    for percent in [0.5, 10.0, 50.0, 99.9] {
        let it = compile_fault(&format!(
            "{{delay: {{fixedDelay: 1s, percentage: {{value: {percent}}}}}, abort: {{httpStatus: 500, percentage: {{value: {percent}}}}}}}"
        ));
        let fault = fault_of(&it).unwrap();
        let (delayed, aborted, _) = shares(&fault, 1);
        about(delayed, percent);
        about(aborted, percent);
    }
    // And through the layer, where every request has a generator of its own.
    let it = compile_fault("{abort: {httpStatus: 500, percentage: {value: 10}}}");
    let (stack, reached) = stack(&it, FaultLayer::seeded(1));
    for _ in 0..100_000 {
        stack.clone().oneshot(get("http://reviews/")).await.unwrap();
    }
    about(100.0 - f64::from(reached.load(Ordering::Relaxed)) / 1_000.0, 10.0);
}

#[tokio::test]
async fn vs_f01_never_is_never_and_always_is_always() {
    for (percent, hits) in [("0", 0), ("100", 10_000)] {
        let it = compile_fault(&format!("{{abort: {{httpStatus: 500, percentage: {{value: {percent}}}}}}}"));
        let (stack, reached) = stack(&it, FaultLayer::new());
        for _ in 0..10_000 {
            stack.clone().oneshot(get("http://reviews/")).await.unwrap();
        }
        assert_eq!(10_000 - reached.load(Ordering::Relaxed), hits);
    }
}

#[tokio::test]
async fn vs_f02_an_abort_by_http_status() {
    for status in [200, 418, 503, 599] {
        let it = compile_fault(&format!("{{abort: {{httpStatus: {status}, percentage: {{value: 100}}}}}}"));
        let (stack, reached) = stack(&it, FaultLayer::new());
        let (request, context) = noted(get("http://reviews/"));
        assert_eq!(ask(&stack, request).await.0, format!("{status} fault filter abort"));
        assert_eq!(
            (context.flags().to_string().as_str(), context.details().as_deref()),
            ("FI", Some("fault_filter_abort"))
        );
        assert_eq!(reached.load(Ordering::Relaxed), 0);
    }
    assert_eq!(fault_of(&compile_fault("{abort: {httpStatus: 500}}")).map(|f| shares(&f, 1).1), Some(0.0));
    let path = "spec.http[0].fault.abort";
    let fault = |text: &str| reviews(&[1]) + &with_fault(&format!("{{abort: {text}}}"));
    for status in [199, 600] {
        refused(&fault(&format!("{{httpStatus: {status}}}")), &format!("{path}.httpStatus"), "200..599");
    }
    refused(&fault("{http2Error: REFUSED_STREAM}"), &format!("{path}.http2Error"), "not supported");
    refused(&fault("{httpStatus: 500, grpcStatus: UNAVAILABLE}"), path, "only one of");
    refused(&fault("{grpcStatus: '14'}"), &format!("{path}.grpcStatus"), "not the name");
}

#[tokio::test]
async fn vs_f02_an_abort_by_grpc_status() {
    for (name, code) in [("OK", "0"), ("NOT_FOUND", "5"), ("UNAVAILABLE", "14"), ("UNAUTHENTICATED", "16")] {
        let it = compile_fault(&format!("{{abort: {{grpcStatus: {name}, percentage: {{value: 100}}}}}}"));
        let (stack, reached) = stack(&it, FaultLayer::new());
        let response = stack.clone().oneshot(grpc()).await.unwrap();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["grpc-status"]),
            (200, &code.parse().unwrap())
        );
        assert_eq!(response.headers()["grpc-message"], "fault filter abort");
        // Who does not speak gRPC gets what Envoy gives: 200 and the text.
        let response = stack.clone().oneshot(get("http://reviews/")).await.unwrap();
        assert_eq!((response.status().as_u16(), response.headers().get("grpc-status")), (200, None));
        assert_eq!(reached.load(Ordering::Relaxed), 0);
    }
    // an HTTP status for a gRPC request.
    let it = compile_fault("{abort: {httpStatus: 503, percentage: {value: 100}}}");
    let response = stack(&it, FaultLayer::new()).0.oneshot(grpc()).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["grpc-status"]),
        (200, &"14".parse().unwrap())
    );
}

#[tokio::test(start_paused = true)]
async fn vs_f03_delay_and_abort_are_independent() {
    let it = compile_fault(
        "{delay: {fixedDelay: 1s, percentage: {value: 50}}, abort: {httpStatus: 500, percentage: {value: 20}}}",
    );
    let (delayed, aborted, both) = shares(&fault_of(&it).unwrap(), 1);
    about(delayed, 50.0);
    about(aborted, 20.0);
    about(both, 10.0);
}

#[tokio::test(start_paused = true)]
async fn vs_f03_the_delay_comes_before_the_abort() {
    let it = compile_fault(
        "{delay: {fixedDelay: 3s, percentage: {value: 100}}, abort: {httpStatus: 503, percentage: {value: 100}}}",
    );
    let (stack, reached) = stack(&it, FaultLayer::new());
    let (request, context) = noted(get("http://reviews/"));
    assert_eq!(ask(&stack, request).await, ("503 fault filter abort".to_owned(), Duration::from_secs(3)));
    assert_eq!((context.flags().to_string().as_str(), reached.load(Ordering::Relaxed)), ("DI,FI", 0));
}

#[tokio::test]
async fn vs_f04_timeouts_and_retries_do_not_apply_to_an_injected_fault() {
    let (echo, services) = one_version().await;
    let it = compile(
        &(services
            + &rules(
                "  - {match: [{uri: {exact: /late}}], timeout: 1s, fault: {delay: {fixedDelay: 5s, percentage: {value: 100}}}, \
                 route: [{destination: {host: reviews}}]}\n  \
                 - {timeout: 1s, retries: {attempts: 3, retryOn: '5xx,503'}, fault: {abort: {httpStatus: 503, percentage: {value: 100}}}, \
                 route: [{destination: {host: reviews}}]}\n",
            )),
    );
    let client = it.client();
    let (request, context) = noted(get("http://reviews/"));
    assert_eq!(fail(&client, request).await, "503 FI fault_filter_abort");
    assert_eq!((context.attempts(), echo.requests()), (0, 0));

    let (request, context) = noted(get("http://reviews/late"));
    tokio::time::pause();
    let sent = tokio::spawn(async move { send(&client, request).await.status });
    until(|| context.flags().to_string() == "DI").await;
    tokio::time::advance(Duration::from_millis(4999)).await;
    assert!(!sent.is_finished() && echo.requests() == 0);
    tokio::time::advance(Duration::from_millis(1)).await;
    tokio::time::resume();
    assert_eq!(ended(sent).await, 200);
    assert_eq!(context.attempts(), 1);
}

#[tokio::test]
async fn vs_f04_a_fault_per_try_is_left_to_the_dispatch() {
    let annotated = |scope: &str| {
        let fault = "  hosts: [reviews]\n  http:\n  - {fault: {abort: {httpStatus: 503, percentage: {value: 100}}}, route: [{destination: {host: reviews}}]}\n";
        reviews(&[1])
            + &resource("VirtualService", "reviews", fault).replace(
                "namespace: default}\nspec:\n  hosts: [reviews]",
                &format!("namespace: default, annotations: {{mesh.rs/fault-scope: {scope}}}}}\nspec:\n  hosts: [reviews]"),
            )
    };
    let it = compile(&annotated("per-try"));
    assert_eq!(fault_of(&it).unwrap().scope, FaultScope::PerTry);
    let (per_try, reached) = stack(&it, FaultLayer::new());
    assert_eq!(ask(&per_try, get("http://reviews/")).await.0, "200 reached");
    assert_eq!(reached.load(Ordering::Relaxed), 1);

    let it = compile(&annotated("per-request"));
    assert_eq!(fault_of(&it).unwrap().scope, FaultScope::PerRequest);
    assert_eq!(
        ask(&stack(&it, FaultLayer::new()).0, get("http://reviews/")).await.0,
        "503 fault filter abort"
    );
}

#[test]
fn vs_f04_an_annotation_that_means_nothing_is_reported() {
    use mesh_core::config::{Compile as _, CompileContext, Role};
    use mesh_core::istio::{LoadOptions, ResourceSet, SourceFile};
    use mesh_route::RouteTable;

    let said = |scope: &str, spec: &str| {
        let yaml = format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: v\n  annotations:\n    mesh.rs/fault-scope: {scope}\nspec: {spec}\n"
        );
        let (set, mut diags) = ResourceSet::load(&[SourceFile::new("v.yaml", yaml)], &LoadOptions::default());
        RouteTable::compile(&set, &CompileContext::new(Role::Sidecar), &mut diags).unwrap();
        diags.iter().filter(|d| d.path.contains("fault-scope")).map(ToString::to_string).collect::<Vec<_>>()
    };
    let faulty = "{hosts: [a.example], http: [{fault: {delay: {fixedDelay: 1s}}, route: [{destination: {host: a.example}}]}]}";
    let path = "v.yaml:6:26: VirtualService default/v: metadata.annotations[\"mesh.rs/fault-scope\"]";
    assert_eq!(said("per-try", faulty), [""; 0]);
    assert_eq!(said("per-request", faulty), [""; 0]);
    assert_eq!(
        said("per_try", faulty),
        [format!("error: {path}: \"per_try\" is neither per-request nor per-try")]
    );
    let without = faulty.replace("fault: {delay: {fixedDelay: 1s}}, ", "");
    assert_eq!(
        said("per-try", &without),
        [format!("warning: {path}: has no effect: no rule injects a fault")]
    );
    let delegate = faulty.replace("hosts: [a.example], ", "");
    assert_eq!(said("per-try", &delegate).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn vs_f05_a_trusted_caller_orders_a_fault_by_header() {
    let it = compile_fault(
        "{delay: {fixedDelay: 1s, percentage: {value: 100}}, abort: {httpStatus: 500, percentage: {value: 0}}}",
    );
    let plain = compile(&(reviews(&[1]) + &rules("  - {route: [{destination: {host: reviews}}]}\n")));
    let ordered = |headers: &[(&str, &str)]| {
        let mut request = Request::get("http://reviews/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::empty()).unwrap()
    };
    let both: &[(&str, &str)] =
        &[("x-envoy-fault-delay-request", "250"), ("x-envoy-fault-abort-request", "418")];
    // Nobody is trusted unless it was said.
    assert_eq!(
        ask(&stack(&plain, FaultLayer::new()).0, ordered(both)).await,
        ("200 reached".to_owned(), Duration::ZERO)
    );
    let trusting = FaultLayer::new().trust_headers(true);
    for (it, headers, answer, after) in [
        (&plain, both, "418 fault filter abort", 250),
        (&plain, &[("x-envoy-fault-abort-grpc-request", "14")][..], "200 fault filter abort", 0),
        (&plain, &[("x-envoy-fault-delay-request", "soon")], "200 reached", 0),
        (&plain, &[], "200 reached", 0),
        // What is ordered takes the place of what the route says, each by itself.
        (&it, both, "418 fault filter abort", 250),
        (&it, &[("x-envoy-fault-abort-request", "418")], "418 fault filter abort", 1000),
        (
            &it,
            &[("x-envoy-fault-delay-request", "250"), ("x-envoy-fault-delay-request-percentage", "0")],
            "200 reached",
            0,
        ),
    ] {
        let (stack, _) = stack(it, trusting);
        assert_eq!(
            ask(&stack, ordered(headers)).await,
            (answer.to_owned(), Duration::from_millis(after)),
            "{headers:?}"
        );
    }
    let (stack, reached) = stack(&plain, FaultLayer::seeded(1).trust_headers(true));
    for _ in 0..10_000 {
        let some = [("x-envoy-fault-abort-request", "500"), ("x-envoy-fault-abort-request-percentage", "25")];
        stack.clone().oneshot(ordered(&some)).await.unwrap();
    }
    let aborted = 10_000 - reached.load(Ordering::Relaxed);
    assert!((2_300..2_700).contains(&aborted), "{aborted}");
}
