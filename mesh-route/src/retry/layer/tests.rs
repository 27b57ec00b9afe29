use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt as _;
use mesh_core::{Direction, ErrorKind};
use tokio::time::{Instant, sleep};
use tower::{ServiceBuilder, ServiceExt as _, service_fn};

use super::super::{Backoff, RetryBudget, RetryOn};
use super::*;

fn policy(attempts: u32, on: &str) -> RetryPolicy {
    RetryPolicy::new(attempts, RetryOn::parse(on).unwrap())
}

fn failure(kind: ErrorKind) -> Error {
    let body = "upstream connect error or disconnect/reset before headers. reset reason: connection failure";
    Error::new(kind, StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UPSTREAM_CONNECTION_FAILURE, "x")
        .with_body(body)
}

/// What one try does.
#[derive(Clone)]
enum Act {
    /// Reads the request and answers.
    Answer(u16),
    /// Reads the request and answers gRPC with a status in trailers.
    Grpc(&'static str),
    /// Fails without reading anything.
    Fail(ErrorKind),
    /// Reads the request, then fails.
    ReadThenFail(ErrorKind),
    /// Never answers.
    Hang,
}

/// Plays its acts in order, the last one again and again, and writes down what it was sent.
#[derive(Clone, Default)]
struct Scripted {
    acts: Arc<Vec<Act>>,
    seen: Arc<Mutex<Vec<(HeaderMap, Bytes, bool)>>>,
    calls: Arc<AtomicU32>,
}

impl Scripted {
    fn new(acts: impl IntoIterator<Item = Act>) -> Self {
        Self { acts: Arc::new(acts.into_iter().collect()), ..Self::default() }
    }

    fn service(
        &self,
    ) -> impl Service<Request<Body>, Response = Response<Body>, Error = Error, Future: Send> + Clone + use<>
    {
        let this = self.clone();
        service_fn(move |request| this.clone().act(request))
    }

    async fn act(self, request: Request<Body>) -> Result<Response<Body>, Error> {
        let at = self.calls.fetch_add(1, Ordering::Relaxed) as usize;
        let act = self.acts.get(at).or(self.acts.last()).cloned().unwrap();
        if let Act::Fail(kind) = act {
            return Err(failure(kind));
        }
        let has_context = request.extensions().get::<RequestContext>().is_some();
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        self.seen.lock().unwrap().push((head.headers, body, has_context));
        match act {
            Act::Answer(status) => Ok(Response::builder().status(status).body(Body::from("answer")).unwrap()),
            Act::Grpc(status) => {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", status.parse().unwrap());
                let body = http_body_util::Empty::<Bytes>::new().with_trailers(async { Some(Ok(trailers)) });
                Ok(Response::new(Body::new(body)))
            }
            Act::ReadThenFail(kind) | Act::Fail(kind) => Err(failure(kind)),
            Act::Hang => std::future::pending().await,
        }
    }

    fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }

    fn bodies(&self) -> Vec<Bytes> {
        self.seen.lock().unwrap().iter().map(|(_, body, _)| body.clone()).collect()
    }
}

fn request(body: impl Into<Body>) -> (Request<Body>, RequestContext) {
    let mut request = Request::put("/x").body(body.into()).unwrap();
    let context = RequestContext::ensure(request.extensions_mut(), Direction::Outbound);
    (request, context)
}

#[tokio::test(start_paused = true)]
async fn vs_y01_a_request_is_sent_at_most_once_more_than_the_attempts_layer() {
    let upstream = Scripted::new([Act::Answer(503)]);
    let service = RetryLayer::new(policy(3, "5xx")).seeded(1).layer(upstream.service());
    let (request, context) = request("abc");
    let response = service.oneshot(request).await.unwrap();
    assert_eq!(response.status(), 503, "the last answer");
    assert_eq!(upstream.calls(), 4);
    assert_eq!(upstream.bodies(), ["abc"; 4]);
    assert_eq!(context.flags(), ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
    assert_eq!(context.attempts(), 4);
    let seen = upstream.seen.lock().unwrap();
    let counts: Vec<_> = seen.iter().map(|(headers, ..)| headers["x-envoy-attempt-count"].clone()).collect();
    assert_eq!(counts, ["1", "2", "3", "4"]);
    assert!(seen.iter().all(|(.., has_context)| *has_context), "extensions are sent again");
}

#[tokio::test(start_paused = true)]
async fn vs_y02_a_try_that_takes_too_long_is_one_that_failed_layer() {
    let upstream = Scripted::new([Act::Hang, Act::Answer(200)]);
    let policy =
        policy(1, "5xx").per_try_timeout(Duration::from_secs(2)).backoff(Backoff::new(Duration::ZERO));
    let service = RetryLayer::new(policy.clone()).layer(upstream.service());
    let started = Instant::now();
    let response = service.oneshot(request("abc").0).await.unwrap();
    assert_eq!((response.status().as_u16(), upstream.calls()), (200, 2));
    assert_eq!(started.elapsed(), Duration::from_secs(2));
    // Without retries too.
    let once = RetryPolicy { attempts: 0, ..policy };
    let service = RetryLayer::new(once).layer(Scripted::new([Act::Hang]).service());
    let error = service.oneshot(request("abc").0).await.unwrap_err();
    assert_eq!((error.status(), error.details()), (StatusCode::GATEWAY_TIMEOUT, "upstream_per_try_timeout"));
}

#[tokio::test(start_paused = true)]
async fn vs_y02_bug_a_try_that_hangs_and_leaves_the_body_unread_was_not_given_up_layer() {
    let streamed = || Body::new(Body::full(vec![7; 70_000]).map_frame(|frame| frame));
    for on in ["connect-failure,retriable-4xx,5xx", "connect-failure,reset"] {
        for (body, length) in
            [(Body::from("abc"), 3), (Body::full(vec![7; 70_000]), 70_000), (streamed(), 70_000)]
        {
            let calls = Arc::new(AtomicU32::new(0));
            let counted = Arc::clone(&calls);
            let service = service_fn(move |request: Request<Body>| {
                let first = counted.fetch_add(1, Ordering::Relaxed) == 0;
                async move {
                    if first {
                        let _unread = request;
                        std::future::pending::<()>().await;
                        unreachable!();
                    }
                    let body = request.into_body().collect().await?.to_bytes();
                    Ok::<_, Error>(Response::new(Body::from(body)))
                }
            });
            let policy =
                policy(1, on).per_try_timeout(Duration::from_secs(2)).backoff(Backoff::new(Duration::ZERO));
            let (request, context) = request(body);
            let started = Instant::now();
            let answered = RetryLayer::new(policy).layer(service).oneshot(request);
            let answered = tokio::time::timeout(Duration::from_secs(60), answered).await.unwrap();
            let sent = answered.unwrap().into_body().collect().await.unwrap().to_bytes();
            assert_eq!(sent.len(), length, "{on}");
            assert_eq!((calls.load(Ordering::Relaxed), context.flags()), (2, ResponseFlags::NONE), "{on}");
            assert_eq!(started.elapsed(), Duration::from_secs(2));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn vs_y02_bug_a_try_without_an_end_panicked_layer() {
    let policy = policy(1, "5xx").per_try_timeout(Duration::MAX);
    for body in [Body::empty(), Body::from("abc")] {
        let service = RetryLayer::new(policy.clone()).layer(Scripted::new([Act::Answer(200)]).service());
        assert_eq!(service.oneshot(request(body).0).await.unwrap().status(), 200);
    }
}

#[tokio::test(start_paused = true)]
async fn vs_y05_what_is_ours_is_no_answer_layer() {
    let upstream = Scripted::new([Act::ReadThenFail(ErrorKind::UpstreamReset)]);
    let service = RetryLayer::new(policy(3, "503")).layer(upstream.service());
    assert!(service.oneshot(request("").0).await.is_err());
    assert_eq!(upstream.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn vs_y06_the_time_between_tries_is_that_of_the_seed_layer() {
    let took = |seed| async move {
        let upstream = Scripted::new([Act::Answer(503)]);
        let service = RetryLayer::new(policy(3, "503")).seeded(seed).layer(upstream.service());
        let started = Instant::now();
        service.oneshot(request("").0).await.unwrap();
        started.elapsed()
    };
    let (first, again, other) = (took(1).await, took(1).await, took(99).await);
    assert_eq!(first, again);
    assert_ne!(first, other);
    // Timers count whole milliseconds.
    assert!(first < Duration::from_millis(25 + 75 + 175 + 3) && !first.is_zero());
}

#[tokio::test(start_paused = true)]
async fn vs_y08_a_body_is_sent_again_if_it_was_not_read_or_was_kept_whole_layer() {
    let large = || Body::full(vec![7; 70_000]);
    // Not read: it comes back, however large and whatever the class.
    for on in ["connect-failure", "5xx"] {
        let upstream = Scripted::new([Act::Fail(ErrorKind::ConnectFailure), Act::Answer(200)]);
        let service = RetryLayer::new(policy(1, on)).layer(upstream.service());
        assert_eq!(service.oneshot(request(large()).0).await.unwrap().status(), 200);
        assert_eq!(upstream.bodies(), [vec![7; 70_000]]);
    }
    // Read: what is small was kept, where an answer can cause a retry.
    let fate = |on, body: Body, act| async move {
        let upstream = Scripted::new([act, Act::Answer(200)]);
        let (request, context) = request(body);
        let ended = RetryLayer::new(policy(1, on)).layer(upstream.service()).oneshot(request).await;
        (ended.map_or(0, |response| response.status().as_u16()), upstream.calls(), context.flags())
    };
    let none = ResponseFlags::NONE;
    let limit = ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED;
    assert_eq!(fate("5xx", Body::from("abc"), Act::Answer(500)).await, (200, 2, none));
    assert_eq!(fate("5xx", large(), Act::Answer(500)).await, (500, 1, limit));
    let after_reading = || Act::ReadThenFail(ErrorKind::ConnectFailure);
    assert_eq!(fate("connect-failure", Body::from("abc"), after_reading()).await, (0, 1, limit));
    assert_eq!(fate("connect-failure", Body::empty(), after_reading()).await, (200, 2, none));
}

#[tokio::test(start_paused = true)]
async fn vs_y04_a_grpc_status_is_seen_in_trailers_that_follow_at_once_layer() {
    let upstream = Scripted::new([Act::Grpc("14"), Act::Grpc("0")]);
    let service = RetryLayer::new(policy(2, "unavailable")).layer(upstream.service());
    let (mut request, _) = request("abc");
    *request.method_mut() = Method::POST;
    request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let response = service.oneshot(request).await.unwrap();
    let collected = response.into_body().collect().await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "0", "what was looked at is passed on");
    assert_eq!(upstream.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn vs_y09_limits_stack_layer() {
    // All fail at once, and all wait for their retry at once.
    let run = |state: RetryState| async move {
        let upstream = Scripted::new([Act::Answer(503)]);
        let policy = policy(1, "503").backoff(Backoff::new(Duration::from_secs(1)));
        let service = RetryLayer::new(policy).state(&state).seeded(3).layer(upstream.service());
        let tries = (0..50).map(|_| {
            let service = service.clone();
            tokio::spawn(async move {
                let (request, context) = request("");
                let response = service.oneshot(request).await.unwrap();
                assert_eq!(response.status(), 503, "the answer is left as it was");
                context.flags()
            })
        });
        let tries: Vec<_> = tries.collect();
        let mut refused = 0;
        for one in tries {
            refused += u64::from(one.await.unwrap() == ResponseFlags::UPSTREAM_OVERFLOW);
        }
        assert_eq!((refused, state.retries()), (state.overflows(), 0));
        (upstream.calls(), state.retried())
    };
    assert_eq!(run(RetryState::default()).await, (100, 50));
    assert_eq!(run(RetryState::new(7, None)).await, (57, 7));
    let budget = RetryBudget { percent: 20.0, min_retry_concurrency: 3, interval: Duration::ZERO };
    let (_, retried) = run(RetryState::new(u32::MAX, Some(budget))).await;
    assert!((3..=10).contains(&retried), "DR-RB01: at most a fifth of those that are active: {retried}");
    let (_, retried) = run(RetryState::new(2, Some(budget))).await;
    assert_eq!(retried, 2);
}

#[tokio::test(start_paused = true)]
async fn vs_y10_what_is_not_idempotent_is_sent_again_only_if_unseen_layer() {
    for (method, act, calls) in [
        (Method::POST, Act::ReadThenFail(ErrorKind::UpstreamReset), 1),
        (Method::PUT, Act::ReadThenFail(ErrorKind::UpstreamReset), 3),
        (Method::POST, Act::Fail(ErrorKind::ConnectFailure), 3),
    ] {
        let upstream = Scripted::new([act]);
        let service = RetryLayer::new(policy(2, "5xx").idempotent_only()).layer(upstream.service());
        let (mut request, _) = request("abc");
        *request.method_mut() = method;
        let error = service.oneshot(request).await.unwrap_err();
        assert_eq!(upstream.calls(), calls);
        let again = std::str::from_utf8(error.body()).unwrap().contains("retried and the latest");
        assert_eq!(again, calls > 1);
    }
}

#[tokio::test(start_paused = true)]
async fn vs_y01_every_try_waits_until_the_service_is_ready_layer() {
    // One at a time: a clone that was not ready would panic when it is called.
    let upstream = Scripted::new([Act::Answer(503), Act::Answer(503), Act::Answer(200)]);
    let service = ServiceBuilder::new()
        .layer(RetryLayer::new(policy(2, "503")).seeded(1))
        .layer(tower::limit::ConcurrencyLimitLayer::new(1))
        .service(upstream.service());
    assert_eq!(service.oneshot(request("").0).await.unwrap().status(), 200);
    assert_eq!(upstream.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn vs_y01_what_is_cancelled_leaves_no_count_layer() {
    let state = RetryState::new(5, Some(RetryBudget::default()));
    let policy = policy(1, "503").backoff(Backoff::new(Duration::from_secs(100)));
    let service = RetryLayer::new(policy).state(&state).seeded(1);
    let service = service.layer(Scripted::new([Act::Answer(503)]).service());
    let tried = tokio::spawn(service.oneshot(request("").0));
    sleep(Duration::from_millis(1)).await;
    assert_eq!(state.retries(), 1);
    tried.abort();
    assert!(tried.await.unwrap_err().is_cancelled());
    assert_eq!(state.retries(), 0);
}
