//! A copy on its way to its mirror.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use mesh_core::{Body, Error, RequestContext, sanitize};

use super::count::{InFlight, MirrorOutcome, Mirroring};
use super::tee::{Lost, Tee, UNREAD};
use super::unsampled::unsample;
use super::{Mirror, copy_of};
use crate::attempt::{self, Attempt, Limits};
use crate::cluster::{Cluster, Discovery};
use crate::hash_policy::RequestKey;
use crate::request_view::RequestView;
use crate::retry::RetryPolicy;
use crate::route::Forward;
use crate::runtime::ClusterRuntime;
use crate::shard::Shard;
use crate::timeout::{self, Deadline, Timeouts};

/// How long a copy may take after the whole request was received, where its route has no timeout.
pub(super) const LONGEST: Duration = Duration::from_secs(60);

/// How much of an answer is read so that its connection can be kept.
pub(super) const DISCARDED: u64 = 1024 * 1024;

/// Starts the copies of a request. Its body tells them what passes.
pub(crate) fn start(
    shard: &Arc<Shard>,
    forward: &Forward,
    cx: &RequestContext,
    process: &Mirroring,
    timeouts: &Timeouts,
    request: &mut Request<Body>,
) {
    if process.id().declines(request.headers()) || sanitize::is_upgrade(request.version(), request.headers())
    {
        return;
    }
    let chosen = choose(shard, forward, cx, process, request);
    if chosen.is_empty() {
        return;
    }
    let (body, copies) = Tee::split(std::mem::take(request.body_mut()), chosen.len(), UNREAD);
    *request.body_mut() = body;
    let copies: Vec<_> =
        chosen.into_iter().zip(copies).map(|(chosen, copy)| (chosen, copy_of(request), copy)).collect();
    for (Chosen { mirror, cluster, runtime, slot }, head, (body, tee)) in copies {
        let mut copy = head.map(|()| body);
        let cx = cx.of_mirror();
        mirror.authority.apply(&mut copy);
        if !mirror.request_headers.is_empty() {
            mirror.request_headers.apply_to_request(&mut copy, &cx);
        }
        unsample(copy.headers_mut());
        process.id().mark(copy.headers_mut());
        timeouts.announce(copy.headers_mut(), cx.is_grpc());
        let sending = Sending {
            shard: Arc::clone(shard),
            cx,
            cluster: Arc::clone(cluster),
            runtime: Arc::clone(runtime),
            timeout: timeouts.route.unwrap_or(LONGEST),
            idle: timeouts.idle,
        };
        tokio::spawn(sending.run(copy, tee, slot));
    }
}

/// A mirror that gets a copy, and the copy's place among those in flight.
struct Chosen<'f> {
    mirror: &'f Mirror,
    cluster: &'f Arc<Cluster>,
    runtime: &'f Arc<ClusterRuntime>,
    slot: InFlight,
}

fn choose<'f>(
    shard: &Shard,
    forward: &'f Forward,
    cx: &RequestContext,
    process: &Mirroring,
    request: &Request<Body>,
) -> Vec<Chosen<'f>> {
    let view = RequestView::new(request, cx.conn());
    let mut chosen = Vec::new();
    for mirror in &forward.mirrors {
        let Some(cluster) = &mirror.cluster else { continue };
        let Some(runtime) = cluster.runtime().filter(|_| cluster.spec().discovery != Discovery::BlackHole)
        else {
            continue;
        };
        if !mirror.draw(&view, cx.conn(), &mut shard.lock().rng) {
            continue;
        }
        match process.admit() {
            Some(slot) => chosen.push(Chosen { mirror, cluster, runtime, slot }),
            None => runtime.mirrors().count(MirrorOutcome::Dropped),
        }
    }
    chosen
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
    async fn run(self, request: Request<Body>, tee: Option<Tee>, _slot: InFlight) {
        let outcome = tokio::select! {
            // A copy that was lost ends before its body fails, so that nobody blames the mirror.
            biased;
            lost = lost(tee.as_ref()) => lost.into(),
            answered = self.answered(request) => match answered {
                Ok(()) => MirrorOutcome::Answered,
                Err(error) => {
                    tracing::debug!(cluster = %self.cluster.name(), %error, "a mirrored request failed");
                    MirrorOutcome::Failed
                }
            },
        };
        self.runtime.mirrors().count(outcome);
    }

    async fn answered(&self, request: Request<Body>) -> Result<(), Error> {
        let response = self.exchange(request).await?;
        discard(response.into_body(), DISCARDED).await
    }

    /// One try, bounded in time with the body of its response.
    async fn exchange(&self, mut request: Request<Body>) -> Result<Response<Body>, Error> {
        let (deadline, body) = Deadline::new(self.timeout, std::mem::take(request.body_mut()));
        *request.body_mut() = body;
        let version = request.version();
        let attempt = Attempt::new(&self.shard, &self.cx, &self.cluster, &self.runtime, version, false, None)
            .choosing(self.key(&request), &RetryPolicy::never());
        attempt::prepare(&mut request, attempt.speaks_http2(), &self.cx)?;
        let limits = Limits { per_try: None, idle: self.idle };
        let once = async {
            let answer = attempt.once(&mut request, limits, &[]).await.map_err(|failure| failure.error)?;
            attempt.observe(&answer);
            attempt.respond(answer, self.idle, None)
        };
        deadline.bound(once).await.unwrap_or_else(|| {
            attempt.timed_out();
            Err(timeout::route())
        })
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
pub(super) async fn discard<B>(body: B, most: u64) -> Result<(), B::Error>
where
    B: http_body::Body<Data = bytes::Bytes>,
{
    let mut body = std::pin::pin!(body);
    let mut read = 0_u64;
    while read <= most {
        match poll_fn(|cx| Pin::as_mut(&mut body).poll_frame(cx)).await {
            None => break,
            Some(frame) => read += frame?.data_ref().map_or(0, bytes::Bytes::len) as u64,
        }
    }
    Ok(())
}
