//! One compared request, from its copies to its comparison.

use std::sync::Arc;
use std::time::Duration;

use http::header::HOST;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, Request, Response};
use http_body::Body as _;
use mesh_core::{Body, RequestContext};
use tokio::sync::oneshot;

use super::DiffPolicy;
use super::capture::{Capture, Keeping, Kept};
use super::captured::{Captured, is_secret, kept};
use super::compare::Answer;
use super::store::{Comparison, Diffs};

/// Waits for the answer of the primary, to tell it to those who compare. In a box, as what most requests do not have.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    headers: Vec<HeaderName>,
    most: usize,
    tell: Vec<oneshot::Sender<Answer>>,
}

/// The comparison that a mirror's copy ends in.
#[derive(Debug)]
pub(crate) struct Trial {
    diffs: Diffs,
    policy: Arc<DiffPolicy>,
    captured: Captured,
    /// The body of the request; `None` when it has none, or it is not captured.
    body: Option<oneshot::Receiver<Kept>>,
    primary: oneshot::Receiver<Answer>,
    baseline: Option<oneshot::Receiver<Answer>>,
}

impl Watch {
    /// Keeps what is compared of the primary's answer while that passes.
    pub(crate) fn look(self, response: &mut Response<Body>) {
        let Self { headers, most, tell } = self;
        let (status, headers) = (response.status(), only(response.headers(), &headers));
        let said = move |Kept { body, cut }: Kept| {
            for waiting in tell {
                // Whoever has stopped to wait was counted there.
                let _ = waiting.send(Answer { status, headers: headers.clone(), body: body.clone(), cut });
            }
        };
        if response.body().is_end_stream() {
            return said(Kept::default());
        }
        let body = std::mem::take(response.body_mut());
        *response.body_mut() = body.with_hook(Capture::new(most, said));
    }

    fn listen(&mut self, policy: &DiffPolicy) -> oneshot::Receiver<Answer> {
        let (tell, told) = oneshot::channel();
        self.tell.push(tell);
        self.most = self.most.max(policy.body_bytes);
        self.headers.extend(
            policy.headers.iter().filter(|name| !self.headers.contains(name)).cloned().collect::<Vec<_>>(),
        );
        told
    }
}

impl Trial {
    /// A comparison of what this copy of a request is answered. Its body is kept while it passes.
    pub(crate) fn new(
        diffs: &Diffs,
        policy: &Arc<DiffPolicy>,
        mirror: &str,
        copy: &mut Request<Body>,
        cx: &RequestContext,
        watch: &mut Watch,
    ) -> Self {
        let authority = match copy.uri().authority() {
            Some(authority) => authority.to_string(),
            None => copy
                .headers()
                .get(HOST)
                .map_or_else(String::new, |host| String::from_utf8_lossy(host.as_bytes()).into_owned()),
        };
        let headers = match policy.capture {
            true => kept(copy.headers(), &policy.headers),
            false => HeaderMap::new(),
        };
        let captured = Captured {
            route: cx.with_route_name(|name| name.unwrap_or("").to_owned()),
            mirror: mirror.to_owned(),
            method: copy.method().clone(),
            authority,
            path: copy.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")),
            headers,
            body: bytes::Bytes::new(),
            compare: policy.headers.iter().filter(|name| !is_secret(name)).cloned().collect(),
            response: Answer::default(),
        };
        let body = (policy.capture && !copy.body().is_end_stream()).then(|| {
            let (tell, told) = oneshot::channel();
            let body = std::mem::take(copy.body_mut());
            // Whoever has stopped to wait was counted there.
            *copy.body_mut() =
                body.with_hook(Capture::new(policy.body_bytes, move |kept| drop(tell.send(kept))));
            told
        });
        let primary = watch.listen(policy);
        Self { diffs: diffs.clone(), policy: Arc::clone(policy), captured, body, primary, baseline: None }
    }

    /// Expects a second answer of the primary.
    pub(crate) fn expect_baseline(&mut self) -> oneshot::Sender<Answer> {
        let (tell, told) = oneshot::channel();
        self.baseline = Some(told);
        tell
    }

    /// What is kept of answers.
    pub(crate) fn policy(&self) -> &Arc<DiffPolicy> {
        &self.policy
    }

    /// Compares the answer with that of the primary, once that is there too.
    pub(crate) async fn finish(self, other: Option<Answer>, longest: Duration) {
        let Self { diffs, policy, captured, body, primary, baseline } = self;
        let (route, mirror) = (captured.route.clone(), captured.mirror.clone());
        let both = async {
            let other = other?;
            let primary = primary.await.ok()?;
            let request = match body {
                None => Kept::default(),
                Some(body) => body.await.ok()?,
            };
            // Without the second answer there is still the first.
            let baseline = match baseline {
                None => None,
                Some(baseline) => baseline.await.ok(),
            };
            let captured = Captured { response: primary, body: request.body, ..captured };
            Some(Comparison { captured, request_cut: request.cut, other, baseline })
        };
        match tokio::time::timeout(longest, both).await.ok().flatten() {
            // A large body takes a while, and requests would wait for the worker.
            Some(comparison) => {
                let compared = tokio::task::spawn_blocking(move || diffs.record(&policy, comparison)).await;
                if let Err(error) = compared {
                    tracing::error!(%error, "answers could not be compared");
                }
            }
            None => diffs.uncompared(route, mirror).await,
        }
    }
}

/// What is compared of an answer, which is read to its end, or for `most_read` bytes.
pub(crate) async fn keep(
    response: Response<Body>,
    policy: &DiffPolicy,
    most_read: u64,
) -> Result<Answer, mesh_core::Error> {
    let (status, headers) = (response.status(), only(response.headers(), &policy.headers));
    let mut keeping = Keeping::new(policy.body_bytes);
    crate::mirror::discard(response.into_body(), most_read, |data| keeping.push(data)).await?;
    let Kept { body, cut } = keeping.finish();
    Ok(Answer { status, headers, body, cut })
}

fn only(headers: &HeaderMap, names: &[HeaderName]) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for name in names {
        for value in headers.get_all(name) {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}
