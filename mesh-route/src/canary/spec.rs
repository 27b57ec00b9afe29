//! What configuration says of a canary, and what is wrong with it.

use std::sync::Arc;
use std::time::Duration;

use super::controller::CanaryPolicy;

/// The definition of one rollout. An equal one goes on over reloads, any other begins anew.
#[derive(Clone, Debug, PartialEq)]
pub struct CanarySpec {
    /// What the rollout is called in events, statuses and metrics.
    pub name: Arc<str>,
    /// What the version is called that serves everybody else.
    pub stable: Arc<str>,
    /// What the new version is called.
    pub canary: Arc<str>,
    /// Any text. It means nothing but that another one begins anew.
    pub run: Arc<str>,
    /// How often what was counted is looked at. Default 10 s.
    pub interval: Duration,
    /// How it is rolled out.
    pub policy: CanaryPolicy,
}

impl CanarySpec {
    /// A rollout with these versions, looked at every ten seconds.
    #[must_use]
    pub fn new(
        name: impl Into<Arc<str>>,
        stable: impl Into<Arc<str>>,
        canary: impl Into<Arc<str>>,
        policy: CanaryPolicy,
    ) -> Self {
        Self {
            name: name.into(),
            stable: stable.into(),
            canary: canary.into(),
            run: Arc::from(""),
            interval: Duration::from_secs(10),
            policy,
        }
    }

    /// Whether it can be rolled out so.
    ///
    /// # Errors
    /// The first value that is out of its bounds.
    pub fn validate(&self) -> Result<(), InvalidCanary> {
        let policy = &self.policy;
        let is_probability = |value: f64| value > 0.0 && value <= 0.5;
        let grows = policy.steps.windows(2).all(|two| two[0] < two[1]);
        if policy.steps.first().is_none_or(|first| *first == 0) || policy.steps.last() != Some(&100) || !grows
        {
            return Err(InvalidCanary::Steps);
        }
        if self.interval.is_zero() {
            return Err(InvalidCanary::Interval);
        }
        if policy.min_requests == 0 {
            return Err(InvalidCanary::MinRequests);
        }
        if !(1e-6..=0.5).contains(&policy.tolerated) {
            return Err(InvalidCanary::Tolerated);
        }
        if !(is_probability(policy.alpha) && is_probability(policy.beta)) {
            return Err(InvalidCanary::Probability);
        }
        if !(policy.latency_factor > 1.0 && policy.latency_factor.is_finite()) {
            return Err(InvalidCanary::LatencyFactor);
        }
        Ok(())
    }
}

/// Why a canary cannot be rolled out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidCanary {
    /// A rule does not have two destinations.
    #[error("a canary wants a rule with exactly two destinations, not {0}")]
    Destinations(usize),
    /// The shares do not grow from above 0 to 100.
    #[error("steps: the shares grow from at least 1 to 100, the last")]
    Steps,
    /// It is looked at without a pause.
    #[error("interval: a time above zero is wanted")]
    Interval,
    /// A step may end without a request.
    #[error("min-requests: at least 1 is wanted")]
    MinRequests,
    /// The share of failures that is good enough is none.
    #[error("tolerated: between 0.0001% and 50% is wanted")]
    Tolerated,
    /// A probability of error is none.
    #[error("alpha, beta: a probability above 0 and up to 0.5 is wanted")]
    Probability,
    /// A canary may not even take as long as the stable version.
    #[error("latency-factor: a number above 1 is wanted")]
    LatencyFactor,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_its_bounds() {
        let judge = |change: fn(&mut CanarySpec)| {
            let mut spec = CanarySpec::new("reviews", "v1", "v2", CanaryPolicy::default());
            change(&mut spec);
            spec.validate()
        };
        assert_eq!(judge(|_| {}), Ok(()));
        assert_eq!(judge(|spec| spec.policy.steps = vec![100]), Ok(()));
        for steps in [&[][..], &[0, 100], &[5, 5, 100], &[20, 10, 100], &[5, 50], &[5, 101]] {
            let mut spec = CanarySpec::new("reviews", "v1", "v2", CanaryPolicy::default());
            spec.policy.steps = steps.to_vec();
            assert_eq!(spec.validate(), Err(InvalidCanary::Steps), "{steps:?}");
        }
        assert_eq!(judge(|spec| spec.interval = Duration::ZERO), Err(InvalidCanary::Interval));
        assert_eq!(judge(|spec| spec.policy.min_requests = 0), Err(InvalidCanary::MinRequests));
        assert_eq!(judge(|spec| spec.policy.tolerated = 0.0), Err(InvalidCanary::Tolerated));
        assert_eq!(judge(|spec| spec.policy.tolerated = f64::NAN), Err(InvalidCanary::Tolerated));
        assert_eq!(judge(|spec| spec.policy.alpha = 1.0), Err(InvalidCanary::Probability));
        assert_eq!(judge(|spec| spec.policy.beta = 0.0), Err(InvalidCanary::Probability));
        assert_eq!(judge(|spec| spec.policy.latency_factor = 1.0), Err(InvalidCanary::LatencyFactor));
        assert_eq!(
            judge(|spec| spec.policy.latency_factor = f64::INFINITY),
            Err(InvalidCanary::LatencyFactor)
        );
    }
}
