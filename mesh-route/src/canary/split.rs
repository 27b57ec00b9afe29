//! The choice between the two destinations of a rule with a canary, by the share that its rollout has now.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use http::Response;
use mesh_core::{Body, Error};
use rand::{Rng, RngExt as _};

use super::ending::Ending;
use super::rollout::{Rollout, Version};
use super::spec::{CanarySpec, InvalidCanary};
use crate::route::Destination;
use crate::weighted::Weighted;

/// What a rule with a canary has beside its destinations.
#[derive(Clone, Debug)]
pub(crate) struct Split {
    spec: Arc<CanarySpec>,
    /// The place of the canary, 0 or 1.
    at: usize,
    /// Attached before the rule is published. Until then the weights of the rule hold.
    rollout: OnceLock<Arc<Rollout>>,
}

impl Split {
    /// Of these destinations the one at this place is the canary.
    pub(crate) fn new(
        spec: Arc<CanarySpec>,
        destinations: &Weighted<Destination>,
        at: usize,
    ) -> Result<Self, InvalidCanary> {
        spec.validate()?;
        match destinations.iter().len() {
            2 if at < 2 => Ok(Self { spec, at, rollout: OnceLock::new() }),
            other => Err(InvalidCanary::Destinations(other)),
        }
    }

    pub(crate) fn spec(&self) -> &Arc<CanarySpec> {
        &self.spec
    }

    /// A rule belongs to one registry; the first keeps it.
    pub(super) fn attach(&self, rollout: Arc<Rollout>) {
        let _ = self.rollout.set(rollout);
    }

    pub(crate) fn rollout(&self) -> Option<&Arc<Rollout>> {
        self.rollout.get()
    }

    /// The weight of the destination at a place, now; `None` when the weights of the rule hold.
    pub(crate) fn weight(&self, at: usize) -> Option<u32> {
        let share = u32::from(self.rollout()?.share());
        Some(if at == self.at { share } else { 100 - share })
    }

    /// The place of a destination; `None` when the weights of the rule hold.
    pub(crate) fn choose(
        &self,
        destinations: &Weighted<Destination>,
        key: Option<u64>,
        rng: &mut impl Rng,
    ) -> Option<usize> {
        let share = self.rollout()?.share();
        let weigh = |at: usize, _: u32| u64::from(if at == self.at { share } else { 100 - share });
        Some(match key {
            Some(key) => destinations.index_by(key, weigh),
            None if rng.random_range(0..100) < share => self.at,
            None => 1 - self.at,
        })
    }

    /// Counts the end of a request to one of the destinations, now or when its body has ended.
    pub(crate) fn count(
        &self,
        destinations: &Weighted<Destination>,
        chosen: &Destination,
        received_at: Instant,
        answer: &mut Result<Response<Body>, Error>,
    ) {
        let Some(rollout) = self.rollout() else { return };
        let is_canary = destinations.get(self.at).is_some_and(|canary| std::ptr::eq(canary, chosen));
        let version = if is_canary { Version::Canary } else { Version::Stable };
        let took = mesh_core::clock::now().saturating_duration_since(received_at);
        Ending::new(Arc::clone(rollout), version, took).answered(answer);
    }
}
