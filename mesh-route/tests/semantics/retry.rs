//! `retries`: VS-Y01 to VS-Y10, and what limits them: VS-T02, DR-CP02, DR-RB01.

use std::time::Duration;

use http::Request;
use mesh_core::{Body, Direction, RequestContext};
use mesh_route::RetryPolicy;
use mesh_testkit::scripted::{Reply, Scripted, Seen};

use crate::support::*;

/// `reviews` at these upstreams, HTTP/1.1, with this in its only rule and this traffic policy.
fn yaml(upstreams: &[&Scripted], rule: &str, policy: &str) -> String {
    let ports: Vec<_> = upstreams.iter().map(|upstream| upstream.addr.port()).collect();
    let mut yaml = service_in("default", "reviews", &ports);
    let separator = if rule.is_empty() { "" } else { ", " };
    yaml += &rules(&format!("  - {{route: [{{destination: {{host: reviews}}}}]{separator}{rule}}}"));
    if !policy.is_empty() {
        yaml +=
            &resource("DestinationRule", "policy", &format!("{{host: reviews, trafficPolicy: {policy}}}"));
    }
    yaml
}

/// The same over HTTP/2.
fn yaml_http2(upstreams: &[&Scripted], rule: &str) -> String {
    yaml(upstreams, rule, "{connectionPool: {http: {h2UpgradePolicy: UPGRADE}}}")
}

/// The policy that a rule compiles to.
fn policy(rule: &str) -> RetryPolicy {
    policy_in(
        &(service_in("default", "reviews", &[1])
            + &rules(&format!("  - {{route: [{{destination: {{host: reviews}}}}]{rule}}}"))),
    )
}

fn policy_in(yaml: &str) -> RetryPolicy {
    let it = compile(yaml);
    assert_eq!(it.unenforced(), [] as [&str; 0], "{yaml}");
    let route = it.ask("http://reviews/").route.unwrap();
    match &route.action().kind {
        mesh_route::ActionKind::Forward(forward) => forward.retry.clone(),
        other => panic!("{other:?}"),
    }
}

async fn status(client: &Client, request: Request<Body>) -> u16 {
    match tower::ServiceExt::oneshot(client.clone(), request).await {
        Ok(response) => response.status().as_u16(),
        Err(error) => error.status().as_u16(),
    }
}

fn post(body: impl Into<Body>) -> Request<Body> {
    Request::post("http://reviews/").body(body.into()).unwrap()
}

fn grpc() -> Request<Body> {
    let call = Request::post("http://reviews/pkg.Service/Call").header("content-type", "application/grpc");
    call.body(Body::full("call")).unwrap()
}

/// A request with its context, to look at what the request came to.
fn watched(mut request: Request<Body>) -> (Request<Body>, RequestContext) {
    let cx = RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
    (request, cx)
}

/// Fails the first `times` requests.
fn failing(times: usize, reply: Reply) -> impl Fn(&Seen) -> Reply + Send + Sync + 'static {
    move |seen| if seen.nth <= times { reply.clone() } else { Reply::Status(200) }
}

#[tokio::test(start_paused = true)]
async fn vs_y01_the_default_is_two_more_tries_of_what_was_not_processed() {
    assert_eq!(policy(""), RetryPolicy::istio_default());
    assert_eq!(
        policy_in(&service_in("default", "reviews", &[1])),
        RetryPolicy::istio_default(),
        "without a rule too"
    );
    assert_eq!(policy(", retries: {attempts: 0}").attempts, 0);
    assert_eq!(
        policy(", retries: {attempts: 3}"),
        RetryPolicy { attempts: 3, ..RetryPolicy::istio_default() }
    );
    refused(
        &rules("  - {route: [{destination: {host: reviews}}], retries: {attempts: 0, perTryTimeout: 1s}}"),
        "spec.http[0].retries.attempts",
        "0 turns retries off",
    );
    let of_mesh =
        mesh("defaultHttpRetryPolicy: {attempts: 5, retryOn: 5xx}") + &service_in("default", "reviews", &[1]);
    assert_eq!((policy_in(&of_mesh).attempts, policy_in(&of_mesh).on.to_string()), (5, "5xx".to_owned()));
    // What a rule leaves open is Istio's, not the mesh's.
    for of_mesh in ["{attempts: 5, retryOn: 5xx, perTryTimeout: 1s}", "{attempts: 0}"] {
        let of_mesh = mesh(&format!("defaultHttpRetryPolicy: {of_mesh}"));
        let rule = rules("  - {route: [{destination: {host: reviews}}], retries: {attempts: 3}}\n");
        assert_eq!(
            policy_in(&(of_mesh + &service_in("default", "reviews", &[1]) + &rule)),
            RetryPolicy { attempts: 3, ..RetryPolicy::istio_default() }
        );
    }
    // A 503 of the upstream is an answer, and is not asked for again.
    let up = Scripted::start("up", |_| Reply::Status(503)).await;
    let client = compile(&yaml(&[&up], "", "")).client();
    assert_eq!(status(&client, get("http://reviews/")).await, 503);
    assert_eq!(up.requests(), 1);
}

#[tokio::test(start_paused = true)]
async fn vs_y01_at_most_one_more_request_than_attempts() {
    let up = Scripted::start("up", |_| Reply::Status(500)).await;
    let client = compile(&yaml(&[&up], "retries: {attempts: 3, retryOn: 5xx}", "")).client();
    let (request, cx) = watched(get("http://reviews/"));
    assert_eq!(status(&client, request).await, 500);
    assert_eq!(up.requests(), 4);
    assert_eq!((cx.attempts(), cx.flags().to_string()), (4, "URX".to_owned()));
    let counts: Vec<_> =
        up.seen().iter().map(|seen| seen.header("x-envoy-attempt-count").unwrap().to_owned()).collect();
    assert_eq!(counts, ["1", "2", "3", "4"], "VS-X01");
}

#[tokio::test(start_paused = true)]
async fn vs_y02_a_try_that_is_late_is_given_up() {
    let up = Scripted::start("up", failing(1, Reply::Hang)).await;
    let client =
        compile(&yaml(&[&up], "retries: {attempts: 2, perTryTimeout: 2s, retryOn: 5xx}", "")).client();
    let started = tokio::time::Instant::now();
    assert_eq!(status(&client, get("http://reviews/")).await, 200);
    let took = started.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_millis(2030)).contains(&took), "{took:?}");
    let always = Scripted::start("up", |_| Reply::Hang).await;
    let client =
        compile(&yaml(&[&always], "retries: {attempts: 1, perTryTimeout: 1s, retryOn: reset}", "")).client();
    let (request, cx) = watched(get("http://reviews/"));
    assert_eq!(fail(&client, request).await, "504 UT upstream_per_try_timeout");
    assert_eq!((always.requests(), cx.flags().to_string()), (2, "URX".to_owned()));
    // Istio's default conditions do not hold for it.
    let client = compile(&yaml(&[&always], "retries: {attempts: 1, perTryTimeout: 1s}", "")).client();
    assert_eq!(fail(&client, get("http://reviews/")).await, "504 UT upstream_per_try_timeout");
    assert_eq!(always.requests(), 3);
}

#[tokio::test(start_paused = true)]
async fn vs_y02_one_that_is_not_shorter_than_the_whole_has_no_effect() {
    let up = Scripted::start("up", |_| Reply::Hang).await;
    let rule = "timeout: 1s, retries: {attempts: 5, perTryTimeout: 1s, retryOn: 5xx}";
    let client = compile(&yaml(&[&up], rule, "")).client();
    assert_eq!(fail(&client, get("http://reviews/")).await, "504 UT response_timeout");
    assert_eq!(up.requests(), 1);
}

#[tokio::test(start_paused = true)]
async fn vs_y02_it_ends_with_the_head() {
    let up = Scripted::start("up", |_| Reply::Stall).await;
    let client =
        compile(&yaml(&[&up], "retries: {attempts: 2, perTryTimeout: 1s, retryOn: 5xx}", "")).client();
    let response = tower::ServiceExt::oneshot(client, get("http://reviews/")).await.unwrap();
    let body = http_body_util::BodyExt::collect(response.into_body());
    assert!(tokio::time::timeout(Duration::from_secs(60), body).await.is_err(), "the body may take its time");
}

#[test]
fn vs_y03_the_exact_set_of_tokens() {
    for list in [
        "5xx,gateway-error,reset,reset-before-request,connect-failure,retriable-4xx,refused-stream",
        "retriable-status-codes,retriable-headers,envoy-ratelimited,http3-post-connect-failure",
        "cancelled,deadline-exceeded,internal,resource-exhausted,unavailable",
    ] {
        assert_eq!(policy(&format!(", retries: {{attempts: 1, retryOn: '{list}'}}")).on.to_string(), list);
    }
    assert_eq!(
        policy(", retries: {attempts: 1, retryOn: '503,5xx,418'}").on.to_string(),
        "5xx,retriable-status-codes,503,418"
    );
    refused(
        &rules("  - {route: [{destination: {host: reviews}}], retries: {attempts: 1, retryOn: oops}}"),
        "spec.http[0].retries.retryOn",
        "oops",
    );
}

#[tokio::test(start_paused = true)]
async fn vs_y04_answers_and_failures_by_token() {
    for (token, reply, tries) in [
        ("5xx", Reply::Status(500), 2),
        ("5xx", Reply::Reset, 2),
        ("5xx", Reply::Status(404), 1),
        ("gateway-error", Reply::Status(502), 2),
        ("gateway-error", Reply::Status(500), 1),
        ("reset", Reply::Reset, 2),
        ("reset", Reply::Status(500), 1),
        ("connect-failure", Reply::Reset, 1),
        ("reset-before-request", Reply::Reset, 1),
        ("retriable-4xx", Reply::Status(409), 2),
        ("retriable-4xx", Reply::Status(429), 1),
        ("418", Reply::Status(418), 2),
        ("envoy-ratelimited", Reply::Headers(429, vec![("x-envoy-ratelimited", "true")]), 2),
        ("429", Reply::Headers(429, vec![("x-envoy-ratelimited", "true")]), 1),
    ] {
        let up = Scripted::start("up", failing(1, reply.clone())).await;
        let client =
            compile(&yaml(&[&up], &format!("retries: {{attempts: 1, retryOn: '{token}'}}"), "")).client();
        status(&client, get("http://reviews/")).await;
        assert_eq!(up.requests(), tries, "{token} {reply:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn vs_y04_a_refused_stream_is_sent_again() {
    let up = Scripted::start("up", failing(2, Reply::Refuse)).await;
    let client = compile(&yaml_http2(&[&up], "")).client();
    assert_eq!(status(&client, post("body")).await, 200);
    assert_eq!(up.requests(), 3, "Istio's default holds for it");
    assert!(up.seen().iter().all(|seen| seen.body == "body"));
}

#[tokio::test(start_paused = true)]
async fn vs_y04_grpc_statuses_in_headers_and_in_the_first_trailers() {
    for reply in [Reply::TrailersOnly(14), Reply::LateStatus(14)] {
        let up = Scripted::start("up", failing(1, reply.clone())).await;
        let client = compile(&yaml_http2(&[&up], "")).client();
        assert_eq!(status(&client, grpc()).await, 200);
        assert_eq!(up.requests(), 2, "{reply:?}");
        let not = Scripted::start("up", failing(1, Reply::TrailersOnly(13))).await;
        let client = compile(&yaml_http2(&[&not], "")).client();
        status(&client, grpc()).await;
        assert_eq!(not.requests(), 1, "internal is no condition of the default");
    }
    // What was looked at is still there.
    let up = Scripted::start("up", |_| Reply::LateStatus(5)).await;
    let client = compile(&yaml_http2(&[&up], "")).client();
    let response = tower::ServiceExt::oneshot(client, grpc()).await.unwrap();
    let collected = http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "5");
}

#[tokio::test(start_paused = true)]
async fn vs_y05_a_503_of_ours_is_no_503() {
    let up = Scripted::start("up", failing(1, Reply::Reset)).await;
    let client = compile(&yaml(&[&up], "retries: {attempts: 3, retryOn: '503'}", "")).client();
    assert_eq!(status(&client, get("http://reviews/")).await, 503);
    assert_eq!(up.requests(), 1);
    let up = Scripted::start("up", failing(1, Reply::Status(503))).await;
    let client = compile(&yaml(&[&up], "retries: {attempts: 3, retryOn: '503'}", "")).client();
    assert_eq!(status(&client, get("http://reviews/")).await, 200);
}

#[tokio::test(start_paused = true)]
async fn vs_y06_tries_wait_longer_and_longer() {
    assert_eq!(
        policy(", retries: {attempts: 1, retryOn: 5xx, backoff: 1s}").backoff,
        mesh_route::Backoff::new(Duration::from_secs(1))
    );
    let up = Scripted::start("up", |_| Reply::Status(500)).await;
    let rule = "retries: {attempts: 6, retryOn: 5xx, backoff: 1s}";
    let client = compile(&yaml(&[&up], rule, "")).client();
    status(&client, get("http://reviews/")).await;
    let seen = up.seen();
    let waits: Vec<_> = seen.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
    for (wait, most) in waits.iter().zip([1, 3, 7, 10, 10, 10]) {
        assert!(*wait <= Duration::from_millis(most * 1000 + 5), "{waits:?}");
    }
    assert!(waits.iter().sum::<Duration>() > Duration::from_secs(5), "{waits:?}");
}

#[tokio::test(start_paused = true)]
async fn vs_y07_another_endpoint_is_tried_while_there_is_one() {
    let bad = Scripted::start("bad", |_| Reply::Status(503)).await;
    let good = Scripted::start("good", |_| Reply::Status(200)).await;
    let rule = "retries: {attempts: 1, retryOn: '503'}";
    let client = compile(&yaml(&[&bad, &good], rule, "")).client();
    let mut failed = 0;
    for _ in 0..200 {
        failed += u32::from(status(&client, get("http://reviews/")).await != 200);
    }
    // Five draws among two endpoints find the other one but for one time in sixteen.
    assert!(bad.requests() > 50 && failed < 25, "{failed} of {}", bad.requests());
    // When there is no other, the last pick is used.
    let client = compile(&yaml(&[&bad], rule, "")).client();
    let before = bad.requests();
    assert_eq!(status(&client, get("http://reviews/")).await, 503);
    assert_eq!(bad.requests() - before, 2);
    let rule = "retries: {attempts: 1, retryOn: '503', retryIgnorePreviousHosts: false}";
    let client = compile(&yaml(&[&bad, &good], rule, "")).client();
    let mut failed = 0;
    for _ in 0..200 {
        failed += u32::from(status(&client, get("http://reviews/")).await != 200);
    }
    assert!(failed > 25, "without it the same one is picked again: {failed}");
}

#[tokio::test(start_paused = true)]
async fn vs_y08_a_body_is_replayed_up_to_64_kib() {
    let rule = "retries: {attempts: 2, retryOn: 5xx}";
    for (bytes, tries) in [(0, 2), (1, 2), (64 * 1024, 2), (64 * 1024 + 1, 1), (1 << 20, 1)] {
        for http2 in [false, true] {
            let up = Scripted::start("up", failing(1, Reply::Status(500))).await;
            let yaml = if http2 { yaml_http2(&[&up], rule) } else { yaml(&[&up], rule, "") };
            let client = compile(&yaml).client();
            let (request, cx) = watched(post("x".repeat(bytes)));
            let status = status(&client, request).await;
            assert_eq!(
                (up.requests(), status),
                (tries, if tries == 1 { 500 } else { 200 }),
                "{bytes} {http2}"
            );
            assert_eq!(
                cx.flags().to_string(),
                if tries == 1 { "URX" } else { "-" },
                "sent once, and flagged"
            );
            assert!(up.seen().iter().all(|seen| seen.body.len() == bytes), "B3: never a part of it");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn b3_a_body_that_still_streams_is_not_sent_again() {
    // The upstream answers before it has the body, which has not ended.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let mut head = [0; 4096];
            assert!(stream.read(&mut head).await.unwrap() > 0);
            stream.write_all(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            // Open until the other side closes.
            while stream.read(&mut head).await.is_ok_and(|read| read > 0) {}
        }
    });
    let yaml = service_in("default", "reviews", &[addr.port()])
        + &rules("  - {route: [{destination: {host: reviews}}], retries: {attempts: 3, retryOn: 5xx}}");
    let client = compile(&yaml).client();
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    sender.send(bytes::Bytes::from_static(b"a part")).await.unwrap();
    let (request, cx) = watched(post(Body::new(Streaming(receiver))));
    assert_eq!(status(&client, request).await, 500);
    assert_eq!((cx.attempts(), cx.flags().to_string()), (1, "URX".to_owned()));
    drop(sender);
}

/// A body that ends when its sender is dropped.
struct Streaming(tokio::sync::mpsc::Receiver<bytes::Bytes>);

impl http_body::Body for Streaming {
    type Data = bytes::Bytes;
    type Error = mesh_core::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<bytes::Bytes>, mesh_core::Error>>> {
        self.0.poll_recv(cx).map(|data| data.map(|data| Ok(http_body::Frame::data(data))))
    }
}

#[tokio::test(start_paused = true)]
async fn vs_y09_the_timeout_of_the_route_covers_all_tries() {
    let up = Scripted::start("up", |_| Reply::After(Duration::from_millis(400), 500)).await;
    let rule = "timeout: 1s, retries: {attempts: 10, retryOn: 5xx}";
    let client = compile(&yaml(&[&up], rule, "")).client();
    let started = tokio::time::Instant::now();
    assert_eq!(fail(&client, get("http://reviews/")).await, "504 UT response_timeout");
    assert_eq!((started.elapsed(), up.requests()), (Duration::from_secs(1), 3));
}

#[tokio::test(start_paused = true)]
async fn vs_y09_max_retries_is_a_limit_of_the_cluster() {
    let up = Scripted::start("up", |seen| {
        if seen.header("x-slow").is_some() && seen.header("x-envoy-attempt-count") == Some("2") {
            Reply::Hang
        } else {
            Reply::Status(500)
        }
    })
    .await;
    let policy = "{connectionPool: {http: {maxRetries: 1}}}";
    let it = compile(&yaml(&[&up], "retries: {attempts: 3, retryOn: 5xx}", policy));
    let client = it.client();
    let slow = Request::get("http://reviews/").header("x-slow", "1").body(Body::empty()).unwrap();
    let held = tokio::spawn(tower::ServiceExt::oneshot(client.clone(), slow));
    let runtime = it.cluster("outbound|80||reviews.default.svc.cluster.local");
    let runtime = runtime.runtime().unwrap();
    mesh_testkit::until("the second try", async || runtime.retries() == 1 && up.requests() == 2).await;
    let (request, cx) = watched(get("http://reviews/"));
    assert_eq!(status(&client, request).await, 500, "the answer is the first one");
    assert_eq!((cx.attempts(), cx.flags().to_string()), (1, "UO".to_owned()));
    assert_eq!(runtime.retry_overflows(), 1);
    held.abort();
    assert!(held.await.unwrap_err().is_cancelled());
    mesh_testkit::until("the retry is given back", async || runtime.retries() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn bug_a_retry_counted_beside_the_one_that_it_followed() {
    let up = Scripted::start("up", |_| Reply::Status(500)).await;
    let policy = "{connectionPool: {http: {maxRetries: 1}}}";
    let client = compile(&yaml(&[&up], "retries: {attempts: 3, retryOn: 5xx}", policy)).client();
    let (request, cx) = watched(get("http://reviews/"));
    assert_eq!(status(&client, request).await, 500);
    assert_eq!(
        (cx.attempts(), cx.flags().to_string()),
        (4, "URX".to_owned()),
        "one after the other is one at a time"
    );
}

#[tokio::test(start_paused = true)]
async fn vs_y10_what_is_not_idempotent_is_not_repeated_when_asked_for() {
    let annotated = |up: &Scripted| {
        yaml(&[up], "retries: {attempts: 1, retryOn: 5xx}", "")
            .replace("{name: reviews, namespace: default}\nspec:\n  hosts", "{name: reviews, namespace: default, annotations: {mesh.rs/retry: idempotent-only}}\nspec:\n  hosts")
    };
    let keyed =
        |name: &str| Request::post("http://reviews/").header(name, "7").body(Body::full("pay")).unwrap();
    for (request, tries) in [
        (get("http://reviews/"), 2),
        (post("pay"), 1),
        (keyed("idempotency-key"), 2),
        (keyed("x-idempotency-key"), 2),
        (Request::put("http://reviews/").body(Body::full("x")).unwrap(), 2),
        (Request::patch("http://reviews/").body(Body::full("x")).unwrap(), 1),
    ] {
        let up = Scripted::start("up", failing(1, Reply::Reset)).await;
        let yaml = annotated(&up);
        assert!(yaml.contains("annotations"), "{yaml}");
        let client = compile(&yaml).client();
        let what = request.method().clone();
        status(&client, request).await;
        assert_eq!(up.requests(), tries, "{what}");
    }
    let nowhere = rules("  - {route: [{destination: {host: reviews}}]}").replace(
        "namespace: default}",
        "namespace: default, annotations: {mesh.rs/retry: yes, mesh.rs/other: a}}",
    );
    let (set, mut diags) = mesh_core::istio::ResourceSet::load(
        &[mesh_core::istio::SourceFile::new("<test>", nowhere)],
        &mesh_core::istio::LoadOptions::default(),
    );
    let cx = mesh_core::config::CompileContext::new(mesh_core::config::Role::Sidecar);
    let compiled: Result<mesh_route::RouteTable, _> =
        mesh_core::config::Compile::compile(&set, &cx, &mut diags);
    assert!(compiled.is_ok());
    let said = diags.to_string();
    assert!(
        said.contains("metadata.annotations.mesh.rs/retry: \"yes\": known are idempotent-only"),
        "{said}"
    );
    assert!(said.contains("metadata.annotations.mesh.rs/other"), "{said}");
}

#[tokio::test(start_paused = true)]
async fn vs_t02_clients_decide_only_where_they_are_trusted() {
    let request = || {
        Request::get("http://reviews/")
            .header("x-envoy-max-retries", "3")
            .header("x-envoy-retry-on", "5xx")
            .header("x-envoy-upstream-rq-timeout-ms", "60000")
            .body(Body::empty())
            .unwrap()
    };
    let up = Scripted::start("up", |_| Reply::Status(500)).await;
    let untrusted = yaml(&[&up], "", "");
    status(&compile(&untrusted).client(), request()).await;
    assert_eq!(up.requests(), 1);
    let trusted = untrusted.replace("{name: reviews, namespace: default}\nspec:\n  hosts", "{name: reviews, namespace: default, annotations: {mesh.rs/client-overrides: 'true'}}\nspec:\n  hosts");
    status(&compile(&trusted).client(), request()).await;
    assert_eq!(up.requests(), 5);
    let last = up.seen().pop().unwrap();
    assert_eq!(last.header("x-envoy-max-retries"), None);
    let expected: u64 = last.header("x-envoy-expected-rq-timeout-ms").unwrap().parse().unwrap();
    assert!((59_000..60_000).contains(&expected), "{expected}");
}

#[tokio::test(start_paused = true)]
async fn dr_rb01_a_budget_limits_the_retries_of_a_cluster() {
    let it = compile(&yaml(
        &[&Scripted::start("up", |_| Reply::Status(500)).await],
        "",
        "{retryBudget: {percent: {value: 50}, minRetryConcurrency: 7, budgetInterval: 10s}}",
    ));
    assert_eq!(it.unenforced(), [] as [&str; 0]);
    let budget = it.spec("outbound|80||reviews.default.svc.cluster.local").retry_budget.unwrap();
    assert_eq!(
        (budget.percent, budget.min_retry_concurrency, budget.interval),
        (50.0, 7, Duration::from_secs(10))
    );
    // Many requests that all fail: the retries at one time stay below the budget.
    let up = Scripted::start("up", |_| Reply::After(Duration::from_millis(100), 500)).await;
    let it = compile(&yaml(
        &[&up],
        "retries: {attempts: 3, retryOn: 5xx}",
        "{retryBudget: {percent: {value: 20}, minRetryConcurrency: 3}}",
    ));
    let client = it.client();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        for _ in 0..10 {
            let client = client.clone();
            tasks.spawn(async move { status(&client, get("http://reviews/")).await });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    while let Some(status) = tasks.join_next().await {
        assert_eq!(status.unwrap(), 500);
    }
    let requests = up.requests();
    assert!((201..=250 + 12).contains(&requests), "{requests} for 200");
}

#[tokio::test(start_paused = true)]
async fn vs_f04_a_fault_of_the_scope_per_try_meets_retries_and_timeouts() {
    let up = Scripted::start("up", |_| Reply::Status(200)).await;
    let per_try = |fault: &str, rest: &str| {
        yaml(&[&up], &format!("fault: {fault}, {rest}"), "").replace(
            "{name: reviews, namespace: default}\nspec:\n  hosts",
            "{name: reviews, namespace: default, annotations: {mesh.rs/fault-scope: per-try}}\nspec:\n  hosts",
        )
    };
    let half = "{abort: {httpStatus: 503, percentage: {value: 50}}}";
    let client = compile(&per_try(half, "retries: {attempts: 9, retryOn: '503', backoff: 1ms}")).client();
    for _ in 0..100 {
        assert_eq!(status(&client, get("http://reviews/")).await, 200);
    }
    let always = "{abort: {httpStatus: 503, percentage: {value: 100}}}";
    let client = compile(&per_try(always, "retries: {attempts: 2, retryOn: 5xx}")).client();
    let (request, cx) = watched(get("http://reviews/"));
    assert_eq!(fail(&client, request).await, "503 FI fault_filter_abort");
    assert_eq!((cx.attempts(), cx.flags().to_string()), (3, "URX".to_owned()));
    let late = "{delay: {fixedDelay: 5s, percentage: {value: 100}}}";
    let client =
        compile(&per_try(late, "retries: {attempts: 1, perTryTimeout: 1s, retryOn: reset}")).client();
    let (request, cx) = watched(get("http://reviews/"));
    assert_eq!(fail(&client, request).await, "504 UT upstream_per_try_timeout");
    assert_eq!((cx.attempts(), cx.flags().to_string()), (2, "DI,URX".to_owned()));
    let client = compile(&per_try(late, "timeout: 2s")).client();
    assert_eq!(fail(&client, get("http://reviews/")).await, "504 UT response_timeout");
    assert_eq!(up.requests(), 100, "what was injected never reached the upstream");
}
