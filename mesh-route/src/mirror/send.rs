//! A copy on its way to its mirror.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use mesh_core::{Body, Error, RequestContext, sanitize};
use tokio::sync::oneshot;

use super::count::{InFlight, MirrorOutcome};
use super::tee::{Lost, Tee, UNREAD};
use super::unsampled::unsample;
use super::{Mirror, copy_of};
use crate::attempt::{self, Attempt};
use crate::cluster::{Cluster, Discovery};
use crate::diff::{Answer, DiffPolicy, Trial, Watch, keep};
use crate::hash_policy::RequestKey;
use crate::request_view::RequestView;
use crate::retry::RetryPolicy;
use crate::route::Forward;
use crate::runtime::ClusterRuntime;
use crate::shard::Shard;
use crate::timeout::{self, Deadline, Limits, Timeouts};

/// How long a copy may take after the whole request was received, where its route has no timeout.
pub(super) const LONGEST: Duration = Duration::from_secs(60);

/// How much of an answer is read so that its connection can be kept.
pub(super) const DISCARDED: u64 = 1024 * 1024;

/// Starts the copies of a request, whose body tells them what passes. What is returned waits for the answer of the
/// primary, at `to`, when it is compared.
pub(crate) fn start(
    shard: &Arc<Shard>,
    forward: &Forward,
    to: (&Arc<Cluster>, &Arc<ClusterRuntime>),
    cx: &RequestContext,
    timeouts: Timeouts,
    request: &mut Request<Body>,
) -> Option<Box<Watch>> {
    let process = to.1.mirroring();
    if process.id().declines(request.headers()) || sanitize::is_upgrade(request.version(), request.headers())
    {
        return None;
    }
    let chosen = choose(shard, forward, to, cx, request);
    if chosen.is_empty() {
        return None;
    }
    let (body, copies) = Tee::split(std::mem::take(request.body_mut()), chosen.len(), UNREAD);
    *request.body_mut() = body;
    let mut watch = None;
    let mut second = None;
    for (Chosen { mirror, cluster, runtime, slot, compared }, (body, tee)) in chosen.into_iter().zip(copies) {
        let mut copy = copy_of(request).map(|()| body);
        let cx = cx.of_mirror();
        if let Some(mirror) = mirror {
            mirror.authority.apply(&mut copy);
            if !mirror.request_headers.is_empty() {
                mirror.request_headers.apply_to_request(&mut copy, &cx);
            }
        }
        unsample(copy.headers_mut());
        let end = match (compared, mirror.and_then(|mirror| mirror.diff.as_ref().zip(Some(mirror)))) {
            (Compared::No, _) => End::Discard,
            // It follows the copy that it is compared with.
            (Compared::WithItself, _) => second.take().unwrap_or(End::Discard),
            (_, None) => End::Discard,
            (compared, Some((policy, mirror))) => {
                let watch = watch.get_or_insert_with(Box::<Watch>::default);
                let (diffs, name) = (process.diffs(), mirror.name.as_str());
                let mut trial = Trial::new(diffs, policy, name, &mut copy, &cx, watch);
                if compared == Compared::Twice {
                    second = Some(End::Baseline(trial.expect_baseline(), Arc::clone(trial.policy())));
                }
                End::Compare(Box::new(trial))
            }
        };
        process.id().mark(copy.headers_mut());
        timeouts.announce(copy.headers_mut(), cx.is_grpc(), |millis| shard.lock().millis(millis));
        let sending = Sending {
            shard: Arc::clone(shard),
            cx,
            cluster: Arc::clone(cluster),
            runtime: Arc::clone(runtime),
            timeout: timeouts.route.unwrap_or(LONGEST),
            idle: timeouts.idle,
        };
        tokio::spawn(sending.run(copy, tee, slot, end));
    }
    watch
}

/// Who gets a copy, and the copy's place among those in flight.
struct Chosen<'f> {
    /// `None` for a copy that goes to the primary.
    mirror: Option<&'f Mirror>,
    cluster: &'f Arc<Cluster>,
    runtime: &'f Arc<ClusterRuntime>,
    slot: InFlight,
    compared: Compared,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compared {
    No,
    /// With the primary.
    Once,
    /// And the primary with itself, by the copy that follows.
    Twice,
    /// It is that copy.
    WithItself,
}

fn choose<'f>(
    shard: &Shard,
    forward: &'f Forward,
    to: (&'f Arc<Cluster>, &'f Arc<ClusterRuntime>),
    cx: &RequestContext,
    request: &Request<Body>,
) -> Vec<Chosen<'f>> {
    let process = to.1.mirroring();
    let view = RequestView::new(request, cx.conn());
    let mut chosen = Vec::new();
    for mirror in &forward.mirrors {
        let Some(cluster) = &mirror.cluster else { continue };
        let Some(runtime) = cluster.runtime().filter(|_| cluster.spec().discovery != Discovery::BlackHole)
        else {
            continue;
        };
        let (drawn, mut compared) = {
            let rng = &mut shard.lock().rng;
            let drawn = mirror.draw(&view, cx.conn(), rng);
            let compared = match mirror.diff.as_ref().filter(|policy| drawn && policy.percentage.draw(rng)) {
                None => Compared::No,
                Some(policy) if policy.may_ask_twice(request.method()) && policy.baseline.draw(rng) => {
                    Compared::Twice
                }
                Some(_) => Compared::Once,
            };
            (drawn, compared)
        };
        if !drawn {
            continue;
        }
        let Some(slot) = process.admit() else {
            runtime.mirrors().count(MirrorOutcome::Dropped);
            continue;
        };
        let again = (compared == Compared::Twice).then(|| process.admit()).flatten();
        if again.is_none() && compared == Compared::Twice {
            compared = Compared::Once;
        }
        chosen.push(Chosen { mirror: Some(mirror), cluster, runtime, slot, compared });
        if let Some(slot) = again {
            let (cluster, runtime) = to;
            chosen.push(Chosen { mirror: None, cluster, runtime, slot, compared: Compared::WithItself });
        }
    }
    chosen
}

/// What becomes of the answer to a copy.
enum End {
    /// It is thrown away.
    Discard,
    /// It is compared.
    Compare(Box<Trial>),
    /// It is what the primary is compared with.
    Baseline(oneshot::Sender<Answer>, Arc<DiffPolicy>),
}

/// What a copy needs on its way.
struct Sending {
    shard: Arc<Shard>,
    cx: RequestContext,
    cluster: Arc<Cluster>,
    runtime: Arc<ClusterRuntime>,
    timeout: Duration,
    idle: Option<Duration>,
}

impl Sending {
    async fn run(self, request: Request<Body>, tee: Option<Tee>, _slot: InFlight, end: End) {
        let policy = match &end {
            End::Discard => None,
            End::Compare(trial) => Some(Arc::clone(trial.policy())),
            End::Baseline(_, policy) => Some(Arc::clone(policy)),
        };
        let (outcome, answer) = tokio::select! {
            // A copy that was lost ends before its body fails, so that nobody blames the mirror.
            biased;
            lost = lost(tee.as_ref()) => (lost.into(), None),
            answered = self.answered(request, policy.as_deref()) => match answered {
                Ok(answer) => (MirrorOutcome::Answered, answer),
                Err(error) => {
                    tracing::debug!(cluster = %self.cluster.name(), %error, "a mirrored request failed");
                    (MirrorOutcome::Failed, None)
                }
            },
        };
        self.runtime.mirrors().count(outcome);
        match end {
            End::Discard => {}
            End::Compare(trial) => trial.finish(answer, self.timeout.max(LONGEST)).await,
            End::Baseline(tell, _) => {
                if let Some(answer) = answer {
                    // Whoever has stopped to wait was counted there.
                    let _ = tell.send(answer);
                }
            }
        }
    }

    /// The answer, as much of it as is compared.
    async fn answered(
        &self,
        request: Request<Body>,
        policy: Option<&DiffPolicy>,
    ) -> Result<Option<Answer>, Error> {
        let response = self.exchange(request).await?;
        match policy {
            None => discard(response.into_body(), DISCARDED, |_| {}).await.map(|()| None),
            Some(policy) => keep(response, policy, DISCARDED).await.map(Some),
        }
    }

    /// One try, bounded in time with the body of its response.
    async fn exchange(&self, mut request: Request<Body>) -> Result<Response<Body>, Error> {
        let timers = self.shard.timers();
        let mut deadline = Some(Deadline::new(timers, self.timeout, request.body_mut(), timeout::route));
        let version = request.version();
        let attempt = Attempt::new(&self.shard, &self.cx, &self.cluster, &self.runtime, version, false, None)
            .choosing(self.key(&request), &RetryPolicy::never());
        attempt::prepare(&mut request, attempt.speaks_http2(), &self.cx)?;
        let limits = Limits { per_try: None, idle: self.idle };
        let once = async {
            let answer = attempt.once(&mut request, &limits, &[]).await.map_err(|failure| failure.error)?;
            attempt.observe(&answer);
            attempt.respond(answer, self.idle, None)
        };
        let mut response = timeout::bound(&mut deadline, std::pin::pin!(once)).await.unwrap_or_else(|late| {
            attempt.timed_out();
            Err(late)
        });
        if let (Some(deadline), Ok(response)) = (deadline, &mut response) {
            attempt::bound(response.body_mut(), deadline);
        }
        response
    }

    fn key(&self, request: &Request<Body>) -> RequestKey {
        let view = RequestView::new(request, self.cx.conn());
        let policy = self.cluster.spec().hash_policy.as_ref();
        policy
            .and_then(|policy| policy.hash(&view, self.cx.conn()))
            .map_or(RequestKey::Missing, RequestKey::Hash)
    }
}

impl From<Lost> for MirrorOutcome {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Overflow => Self::Overflowed,
            Lost::Cancelled => Self::Cancelled,
        }
    }
}

/// Completes when the copy is lost, which one without a body never is.
pub(super) async fn lost(tee: Option<&Tee>) -> Lost {
    match tee {
        Some(tee) => tee.lost().await,
        None => std::future::pending().await,
    }
}

/// Reads a body to its end, or `most` bytes of it.
pub(crate) async fn discard<B>(
    body: B,
    most: u64,
    mut look: impl FnMut(&bytes::Bytes),
) -> Result<(), B::Error>
where
    B: http_body::Body<Data = bytes::Bytes>,
{
    let mut body = std::pin::pin!(body);
    let mut read = 0_u64;
    while read <= most {
        let Some(frame) = poll_fn(|cx| Pin::as_mut(&mut body).poll_frame(cx)).await else { break };
        if let Some(data) = frame?.data_ref() {
            read += data.len() as u64;
            look(data);
        }
    }
    Ok(())
}
