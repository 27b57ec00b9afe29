//! The end of a request to one of the versions: counted once, or not at all.

use std::sync::Arc;
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, Response};
use http_body::Body as _;
use mesh_core::{Body, BodyHook, EndOfBody, Error, ErrorKind, ResponseFlags};

use super::rollout::{Rollout, Version};
use crate::outlier::Observation;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// A request whose response has begun, or will not. It rides on the body of the response; with a request that is dropped
/// before, which was cancelled, there is none.
pub(super) struct Ending {
    rollout: Arc<Rollout>,
    version: Version,
    took: Duration,
    outcome: Outcome,
    grpc: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Success,
    Failure,
    /// It says nothing of the version.
    Neither,
}

impl Ending {
    /// Of a request to this version, so long after it arrived.
    pub(super) fn new(rollout: Arc<Rollout>, version: Version, took: Duration) -> Self {
        Self { rollout, version, took, outcome: Outcome::Neither, grpc: false }
    }

    /// There is a response, whose body may still be to come, or none.
    pub(super) fn answered(mut self, answer: &mut Result<Response<Body>, Error>) {
        let response = match answer {
            Ok(response) => response,
            Err(error) => return self.count(of_error(error)),
        };
        self.outcome = of_head(response);
        // What has failed needs no end; of a gRPC call the trailers say whether it has.
        if self.outcome != Outcome::Success || response.body().is_end_stream() {
            return self.count(self.outcome);
        }
        self.grpc = is_grpc(response.headers());
        let body = std::mem::take(response.body_mut());
        *response.body_mut() = body.with_hook(self);
    }

    fn count(&self, outcome: Outcome) {
        match outcome {
            Outcome::Success => self.rollout.count(self.version, Some(self.took)),
            Outcome::Failure => self.rollout.count(self.version, None),
            Outcome::Neither => {}
        }
    }
}

impl BodyHook for Ending {
    fn on_trailers(&mut self, trailers: &mut HeaderMap) {
        if self.grpc {
            self.outcome = of_grpc(trailers).unwrap_or(self.outcome);
        }
    }

    fn on_end(&mut self, end: EndOfBody<'_>) {
        let outcome = match end {
            EndOfBody::Complete => self.outcome,
            EndOfBody::Failed(error) => of_error(error),
            _ => Outcome::Neither,
        };
        self.count(outcome);
    }
}

fn of_head(response: &Response<Body>) -> Outcome {
    if response.status().is_server_error() {
        return Outcome::Failure;
    }
    of_grpc(response.headers()).unwrap_or(Outcome::Success)
}

/// By the gRPC status, where there is one.
fn of_grpc(headers: &HeaderMap) -> Option<Outcome> {
    let status = headers.get(GRPC_STATUS)?.to_str().ok()?.parse().unwrap_or(2);
    Some(match status {
        2 | 4 | 12 | 13 | 14 | 15 => Outcome::Failure,
        1 => Outcome::Neither,
        _ => Outcome::Success,
    })
}

fn of_error(error: &Error) -> Outcome {
    let kind = error.kind();
    let is_failure = Observation::of_failure(kind).is_some()
        || kind == ErrorKind::NoHealthyUpstream
        || error.flags().contains(ResponseFlags::NO_CLUSTER_FOUND);
    if is_failure { Outcome::Failure } else { Outcome::Neither }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}
