//! A request on its way to one of a route's clusters: the destination, the mirrors, the time it may take, the tries.
//!
//! In this order: the weighted destination (chosen once), its header operations, the rewrite, the mirrors, the timeout
//! of the route around everything that follows, then tries until one is good or a limit says stop.

use std::pin::Pin;
use std::sync::Arc;

use http::header::{CONNECTION, HOST, SET_COOKIE, UPGRADE};
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use hyper::upgrade::OnUpgrade;
use mesh_core::{Body, Error, RequestContext, ResponseFlags, UpstreamInfo};

use crate::attempt::{self, Answer, Attempt, Failure};
use crate::cluster::{ClusterSpec, Discovery};
use crate::diff::Watch;
use crate::fault::{AbortKind, Fault};
use crate::grpc;
use crate::hash_policy::{HashPolicy, RequestKey};
use crate::headers::{FormatContext, OwnedHead};
use crate::headers_layer::AfterRoute;
use crate::mirror;
use crate::overrides::Overrides;
use crate::permit::Permit;
use crate::request_view::RequestView;
use crate::retry::{Outcome, Replay, RetryClass, RetryPolicy, after_retries, is_idempotent};
use crate::route::{Destination, Forward, Route};
use crate::runtime::ClusterRuntime;
use crate::shard::Shard;
use crate::timeout::{self, Deadline, Limits, Timeouts};

/// The request stays where it is and is passed by reference until it is sent: what an async function takes by value
/// lies in its future once more, and futures are copied.
pub(crate) async fn forward(
    shard: &Arc<Shard>,
    forward: &Forward,
    fault: Option<&Fault>,
    cx: &RequestContext,
    request: &mut Request<Body>,
) -> Result<Response<Body>, Error> {
    let key = match forward.sticky {
        None => None,
        Some(_) => forward.sticks_by(&RequestView::new(request, cx.conn()), cx.conn()),
    };
    let destination = forward.choose(key, &mut shard.lock().rng);
    cx.set_upstream(UpstreamInfo::new(destination.name.shared()));
    let known = destination.cluster.as_ref().and_then(|cluster| Some((cluster, cluster.runtime()?)));
    let Some((cluster, runtime)) = known else {
        let error = Error::local_reply(
            StatusCode::SERVICE_UNAVAILABLE,
            ResponseFlags::NO_CLUSTER_FOUND,
            "cluster_not_found",
        );
        let mut answer = Err(error);
        forward.count(destination, cx, &mut answer);
        return answer;
    };
    if cluster.spec().discovery == Discovery::BlackHole {
        return Err(Error::local_reply(StatusCode::BAD_GATEWAY, ResponseFlags::NONE, "direct_response"));
    }
    let version = request.version();
    let on_upgrade = take_upgrade(request);
    // By the request as the route saw it, before the destination changes it.
    let key = match &cluster.spec().hash_policy {
        None => RequestKey::default(),
        Some(policy) => {
            let view = RequestView::new(request, cx.conn());
            policy.hash_or_issue(&view, cx.conn(), &mut shard.lock().rng)
        }
    };
    edit(request, forward, destination, cx)?;
    let head = OwnedHead::for_response(&destination.response_headers, request);
    let overrides = forward.client_overrides.then(|| Overrides::take(request.headers_mut()));
    let overrides = overrides.flatten();
    let grpc = grpc::is_grpc(request.headers());
    let timeouts = Timeouts::of(forward, overrides.as_deref(), request.headers(), grpc, cx);
    let watch = if forward.mirrors.is_empty() || on_upgrade.is_some() {
        None
    } else {
        mirror::start(shard, forward, (cluster, runtime), cx, timeouts, request)
    };
    let after = After::of(head, watch);
    let mut deadline = timeouts
        .route
        .map(|timeout| Deadline::new(shard.timers(), timeout, request.body_mut(), timeout::route));
    let attempt = Attempt::new(shard, cx, cluster, runtime, version, on_upgrade.is_some(), fault)
        .choosing(key, &forward.retry);
    let mut response = {
        let overridden = overrides.map(|overrides| Box::new(overrides.retry(&forward.retry)));
        let policy = overridden.as_deref().unwrap_or(&forward.retry);
        let tries = Tries { attempt: &attempt, policy, timeouts, grpc };
        let exchange = std::pin::pin!(tries.run(request, on_upgrade));
        timeout::bound(&mut deadline, exchange).await.unwrap_or_else(|late| {
            attempt.timed_out();
            Err(late)
        })
    };
    if let (Some(deadline), Ok(response)) = (deadline, &mut response) {
        attempt::bound(response.body_mut(), deadline);
    }
    forward.count(destination, cx, &mut response);
    if let (RequestKey::Issued(issued), Ok(response)) = (attempt.key, &mut response) {
        give_cookie(cluster.spec(), issued, response);
    }
    let head = after.and_then(|after| after.met_by(&mut response));
    apply_response_headers(destination, head, cx, version, &mut response);
    response
}

/// What waits for the response of a request. In one box, as what most requests do not have.
struct After {
    head: Option<Box<OwnedHead>>,
    watch: Option<Box<Watch>>,
}

impl After {
    fn of(head: Option<Box<OwnedHead>>, watch: Option<Box<Watch>>) -> Option<Box<Self>> {
        (head.is_some() || watch.is_some()).then(|| Box::new(Self { head, watch }))
    }

    /// Compared is what the upstream said; what a policy replied is not.
    fn met_by(self, response: &mut Result<Response<Body>, Error>) -> Option<Box<OwnedHead>> {
        if let (Some(watch), Ok(response)) = (self.watch, response) {
            watch.look(response);
        }
        self.head
    }
}

/// The tries of one request.
struct Tries<'a> {
    attempt: &'a Attempt<'a>,
    policy: &'a RetryPolicy,
    timeouts: Timeouts,
    grpc: bool,
}

/// What is known of a request between its tries.
struct Progress {
    class: RetryClass,
    idempotent: bool,
    retries: u32,
    replay: Option<Box<Replay>>,
    again: Option<Box<Again>>,
}

/// What a request has once it is tried again.
#[derive(Default)]
struct Again {
    tried: Vec<u64>,
    /// Counts the retry in its cluster, from the decision to the head of its answer.
    permit: Option<Permit<ClusterRuntime>>,
}

/// What is done after a try. Everything that a retry awaits is in a box, so that nothing of it lies in the future of a
/// request that is sent once.
enum Next<'a> {
    Done(Result<Response<Body>, Error>),
    /// Looks whether the trailers tell more than the head.
    Look(Pin<Box<dyn Future<Output = Box<Answer>> + Send + 'a>>),
    /// Waits for the next try.
    Pause(Pin<Box<dyn Future<Output = ()> + Send + 'a>>),
}

/// Why there is no other try.
enum Last {
    /// It is good, or nothing that is worth another.
    Good,
    /// A limit says stop, and this flag says which.
    Limit(ResponseFlags),
}

impl Tries<'_> {
    async fn run(
        &self,
        request: &mut Request<Body>,
        mut on_upgrade: Option<OnUpgrade>,
    ) -> Result<Response<Body>, Error> {
        let mut progress = self.begin(request)?;
        let limits = Limits { per_try: self.timeouts.per_try, idle: self.timeouts.idle };
        loop {
            let millis = |millis| self.attempt.shard.lock().millis(millis);
            self.timeouts.announce(request.headers_mut(), self.grpc, millis);
            let tried = progress.again.as_ref().map_or(&[][..], |again| again.tried.as_slice());
            let outcome = self.attempt.once(request, &limits, tried).await;
            let mut next = self.after(outcome, request, &mut progress, &mut on_upgrade);
            if let Next::Look(look) = next {
                next = self.decide(Ok(*look.await), request, &mut progress, &mut on_upgrade);
            }
            match next {
                Next::Done(response) => return response,
                Next::Pause(pause) => pause.await,
                Next::Look(_) => {}
            }
        }
    }

    /// Puts the request in its form, and keeps of it what its policy needs.
    fn begin(&self, request: &mut Request<Body>) -> Result<Progress, Error> {
        let http2 = self.attempt.speaks_http2();
        attempt::prepare(request, http2, self.attempt.cx)?;
        let idempotent = !self.policy.only_idempotent || is_idempotent(request.method(), request.headers());
        let has_body = !request.body().is_end_stream();
        let class = match self.policy.class(self.grpc, http2, idempotent, has_body) {
            // What was upgraded is not repeated.
            RetryClass::Head | RetryClass::Replay if self.attempt.upgrade => RetryClass::Connect,
            class => class,
        };
        self.attempt.runtime.count_request(self.attempt.cluster.spec());
        let keeps = matches!(class, RetryClass::Head | RetryClass::Replay);
        let replay = keeps.then(|| Box::new(Replay::of(request)));
        Ok(Progress { class, idempotent, retries: 0, replay, again: None })
    }

    fn after(
        &self,
        outcome: Result<Answer, Failure>,
        request: &mut Request<Body>,
        progress: &mut Progress,
        on_upgrade: &mut Option<OnUpgrade>,
    ) -> Next<'_> {
        match outcome {
            Ok(answer)
                if self.grpc
                    && progress.replay.is_some()
                    && progress.retries < self.policy.attempts
                    && answer.may_have_trailers() =>
            {
                Next::Look(Box::pin(Box::new(answer).peek_trailers()))
            }
            outcome => self.decide(outcome, request, progress, on_upgrade),
        }
    }

    /// Tells outlier detection, and decides whether there is another try.
    fn decide(
        &self,
        outcome: Result<Answer, Failure>,
        request: &mut Request<Body>,
        progress: &mut Progress,
        on_upgrade: &mut Option<OnUpgrade>,
    ) -> Next<'_> {
        if let Ok(answer) = &outcome {
            self.attempt.observe(answer);
        }
        let wanted =
            progress.class != RetryClass::Never && self.policy.wants(&seen(&outcome), progress.idempotent);
        let next = if wanted { self.next(&outcome, progress) } else { Err(Last::Good) };
        let (next, permit) = match next {
            Ok(next) => next,
            Err(last) => {
                if let Last::Limit(flag) = last {
                    self.attempt.cx.add_flags(flag);
                }
                return Next::Done(match outcome {
                    Ok(answer) => self.attempt.respond(answer, self.timeouts.idle, on_upgrade.take()),
                    Err(failure) if progress.retries > 0 => Err(after_retries(failure.error)),
                    Err(failure) => Err(failure.error),
                });
            }
        };
        progress.retries += 1;
        let again = progress.again.get_or_insert_default();
        again.permit = Some(permit);
        again.tried.extend(match &outcome {
            Ok(answer) => Some(answer.endpoint()),
            Err(failure) => failure.endpoint,
        });
        if let Some(next) = next {
            *request = next;
        }
        Next::Pause(Box::pin(self.pause(outcome, progress.retries)))
    }

    /// The request for another try, where it is not in its place already, and a place among the retries of the cluster.
    fn next(
        &self,
        outcome: &Result<Answer, Failure>,
        progress: &mut Progress,
    ) -> Result<(Option<Request<Body>>, Permit<ClusterRuntime>), Last> {
        // The retry that has just ended is none any more.
        if let Some(again) = &mut progress.again {
            again.permit = None;
        }
        if progress.retries >= self.policy.attempts {
            return Err(Last::Limit(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED));
        }
        let request = match outcome {
            Err(Failure { unsent: true, .. }) => None,
            _ => match progress.replay.as_deref().and_then(Replay::request) {
                Some(request) => Some(request),
                None => return Err(Last::Limit(ResponseFlags::UPSTREAM_RETRY_LIMIT_EXCEEDED)),
            },
        };
        match self.attempt.runtime.admit_retry(self.attempt.cluster.spec()) {
            Some(permit) => Ok((request, permit)),
            None => Err(Last::Limit(ResponseFlags::UPSTREAM_OVERFLOW)),
        }
    }

    /// Lets go of what failed, and waits.
    async fn pause(&self, outcome: Result<Answer, Failure>, retry: u32) {
        if let Ok(answer) = outcome {
            answer.discard().await;
        }
        let pause = self.policy.backoff.before(retry, &mut self.attempt.shard.lock().rng);
        tokio::time::sleep(pause).await;
    }
}

fn seen(outcome: &Result<Answer, Failure>) -> Outcome<'_> {
    match outcome {
        Ok(answer) => Outcome::Response {
            status: answer.response.status(),
            headers: answer.response.headers(),
            grpc_status: answer.grpc_status,
        },
        // An injected answer is an answer.
        Err(Failure { error, injected: Some(abort), .. }) => Outcome::Response {
            status: error.status(),
            headers: error.headers(),
            grpc_status: match abort {
                AbortKind::Grpc(code) => u16::try_from(*code).ok(),
                AbortKind::Http(_) => None,
            },
        },
        Err(failure) => Outcome::Failed(failure.error.kind()),
    }
}

/// The destination's header operations, then the rewrite.
fn edit(
    request: &mut Request<Body>,
    forward: &Forward,
    destination: &Destination,
    cx: &RequestContext,
) -> Result<(), Error> {
    if !destination.request_headers.is_empty() {
        destination.request_headers.apply_to_request(request, cx);
    }
    forward.rewrite.apply_path(request)?;
    if let Some(authority) = forward.rewrite.authority.as_ref().or(destination.authority.as_ref()) {
        set_authority(request, authority.clone());
    }
    Ok(())
}

/// The downstream's upgrade, when the request asks for one over HTTP/1.1.
fn take_upgrade(request: &mut Request<Body>) -> Option<OnUpgrade> {
    let on_upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let headers = request.headers();
    let asked = request.version() == Version::HTTP_11
        && headers.contains_key(UPGRADE)
        && headers.get_all(CONNECTION).iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|value| value.split(',').any(|token| token.trim().eq_ignore_ascii_case("upgrade")))
        });
    on_upgrade.filter(|_| asked)
}

/// Replaces the authority where the request has it.
pub(crate) fn set_authority<B>(request: &mut Request<B>, authority: HeaderValue) {
    if request.uri().authority().is_some() {
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    }
    request.headers_mut().insert(HOST, authority);
}

/// Gives the client the cookie by which it will be known (DR-LB03).
pub(crate) fn give_cookie<B>(spec: &ClusterSpec, issued: u64, response: &mut Response<B>) {
    if let Some(HashPolicy::Cookie(cookie)) = spec.hash_policy.as_deref()
        && let Some(value) = cookie.set_cookie(issued)
    {
        response.headers_mut().append(SET_COOKIE, value);
    }
}

fn apply_response_headers(
    destination: &Destination,
    head: Option<Box<OwnedHead>>,
    cx: &RequestContext,
    version: Version,
    response: &mut Result<Response<Body>, Error>,
) {
    if destination.response_headers.is_empty() {
        return;
    }
    let format = FormatContext { request: head.as_deref().map(OwnedHead::borrowed), context: cx, version };
    // Those of the route come first (VS-R04), so the layer that applies them goes on with these.
    let after_route = || cx.route::<Route>().is_some_and(|route| !route.action().response_headers.is_empty());
    match response {
        Ok(response) if after_route() => {
            response.extensions_mut().insert(AfterRoute(destination.response_headers.clone(), head));
        }
        Ok(response) => destination.response_headers.apply(response.headers_mut(), &format),
        Err(error) => destination.response_headers.apply(error.headers_mut(), &format),
    }
}
