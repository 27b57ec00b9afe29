//! The canary controller: steps the share of a new version by what is measured of it, and takes it back by itself.
//!
//! Pure: measurements and time are arguments, and what is decided is an [`Event`] with its evidence. Who counts the
//! requests and who sets the weights is the caller's matter.
//!
//! **The tests** are sequential: they may be looked at after every measurement, for as long as one likes.
//! *Rollback*: given how many requests of a measurement failed, how many of those are the canary's has Fisher's
//! hypergeometric distribution, whatever the rate at which the stable version fails. The likelihood ratio of worse odds
//! (a mixture of 2, 4 and 16) against equal odds is a martingale under equal odds, so by Ville's inequality it ever
//! reaches `1 / alpha` with a probability of at most `alpha`, over the whole rollout. *Forward*: a step ends when the
//! canary fails less than is tolerated, by the likelihood ratio of a quarter of that rate, or when its odds are not
//! twice those of the stable version; a canary for which neither is true passes a step with a probability of at most
//! `2 * beta`. All of it supposes that requests fail independently of each other. *Latency* is a plain bound on the
//! mean of a step and no test.
//!
//! Nothing in this crate drives a controller yet: whoever embeds it gives it counts, and applies its share.

use std::time::{Duration, Instant};

/// The odds that a rollback looks for, against those of the stable version.
const ODDS: [f64; 3] = [2.0, 4.0, 16.0];

/// How a canary is rolled out.
#[derive(Clone, Debug, PartialEq)]
pub struct CanaryPolicy {
    /// The shares of the canary, in percent, one step after the other. Default 5, 20, 50, 100.
    pub steps: Vec<u8>,
    /// The probability with which a canary that is as good is taken back. Default 0.01.
    pub alpha: f64,
    /// The probability with which a worse one passes a step, by each of two tests. Default 0.01.
    pub beta: f64,
    /// The share of failures that is good enough, whatever the stable version does; what is not between a millionth
    /// and a half counts as the nearer of the two. Default 0.01.
    pub tolerated: f64,
    /// The fewest requests of the canary in a step. Default 100.
    pub min_requests: u64,
    /// The shortest time of a step. Default a minute.
    pub min_duration: Duration,
    /// How many times as long the canary may take, in the mean of a step. Default 1.5.
    pub latency_factor: f64,
}

impl Default for CanaryPolicy {
    fn default() -> Self {
        Self {
            steps: vec![5, 20, 50, 100],
            alpha: 0.01,
            beta: 0.01,
            tolerated: 0.01,
            min_requests: 100,
            min_duration: Duration::from_secs(60),
            latency_factor: 1.5,
        }
    }
}

/// What was counted of one version since the last measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Requests that succeeded.
    pub successes: u64,
    /// Requests that failed.
    pub failures: u64,
    /// The sum of their latencies.
    pub latency: Duration,
}

/// What a rollout has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// A step is under way.
    Running,
    /// The last step was passed.
    Promoted,
    /// The canary was taken back.
    RolledBack,
}

/// A decision with what it rests on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    /// When.
    pub at: Instant,
    /// The share of the canary from now on, in percent.
    pub share: u8,
    /// What the rollout has come to.
    pub phase: Phase,
    /// What decided it.
    pub cause: Cause,
    /// Everything that was counted of the canary in the step.
    pub canary: Measured,
    /// Everything that was counted of the stable version in the step.
    pub stable: Measured,
}

/// What decided.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Cause {
    /// The canary fails more; the evidence is the likelihood ratio.
    Failures(f64),
    /// The canary takes so many times as long.
    Latency(f64),
    /// The step was passed.
    Passed,
}

/// The state of one rollout.
#[derive(Clone, Debug)]
pub struct Controller {
    policy: CanaryPolicy,
    step: usize,
    since: Instant,
    phase: Phase,
    /// Logarithms of the likelihood ratios for each of the odds, over the whole rollout.
    worse: [f64; ODDS.len()],
    no_worse: f64,
    tolerable: f64,
    canary: Measured,
    stable: Measured,
}

impl Controller {
    /// A rollout that begins now, at its first step.
    #[must_use]
    pub fn new(policy: CanaryPolicy, now: Instant) -> Self {
        Self {
            policy,
            step: 0,
            since: now,
            phase: Phase::Running,
            worse: [0.0; ODDS.len()],
            no_worse: 0.0,
            tolerable: 0.0,
            canary: Measured::default(),
            stable: Measured::default(),
        }
    }

    /// The share of the canary, in percent.
    #[must_use]
    pub fn share(&self) -> u8 {
        match self.phase {
            Phase::RolledBack => 0,
            Phase::Running | Phase::Promoted => {
                let last = self.policy.steps.len().saturating_sub(1);
                self.policy.steps.get(self.step.min(last)).copied().unwrap_or(0).min(100)
            }
        }
    }

    /// What the rollout has come to.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Takes what was counted since the last time, and decides.
    pub fn observe(&mut self, canary: Measured, stable: Measured, now: Instant) -> Option<Event> {
        if self.phase != Phase::Running {
            return None;
        }
        self.canary.add(canary);
        self.stable.add(stable);
        for (worse, odds) in self.worse.iter_mut().zip(ODDS) {
            *worse += log_odds_ratio(canary, stable, odds);
        }
        self.no_worse -= log_odds_ratio(canary, stable, 2.0);
        let tolerated = self.policy.tolerated.clamp(1e-6, 0.5);
        let good = tolerated / 4.0;
        self.tolerable += canary.failures as f64 * (good / tolerated).ln()
            + canary.successes as f64 * ((1.0 - good) / (1.0 - tolerated)).ln();

        let evidence = self.worse.iter().map(|log| log.exp()).sum::<f64>() / ODDS.len() as f64;
        if evidence >= 1.0 / self.policy.alpha {
            return Some(self.decide(Phase::RolledBack, Cause::Failures(evidence), now));
        }
        if self.canary.requests() < self.policy.min_requests {
            return None;
        }
        if let (Some(ours), Some(theirs)) = (self.canary.mean(), self.stable.mean())
            && self.stable.requests() >= self.policy.min_requests
            && ours > theirs * self.policy.latency_factor
        {
            return Some(self.decide(Phase::RolledBack, Cause::Latency(ours / theirs), now));
        }
        let enough = -self.policy.beta.ln();
        let late = now.saturating_duration_since(self.since) >= self.policy.min_duration;
        (late && (self.no_worse >= enough || self.tolerable >= enough)).then(|| {
            let last = self.step + 1 >= self.policy.steps.len();
            self.step += usize::from(!last);
            self.decide(if last { Phase::Promoted } else { Phase::Running }, Cause::Passed, now)
        })
    }

    fn decide(&mut self, phase: Phase, cause: Cause, now: Instant) -> Event {
        self.phase = phase;
        let (canary, stable) = (std::mem::take(&mut self.canary), std::mem::take(&mut self.stable));
        (self.no_worse, self.tolerable, self.since) = (0.0, 0.0, now);
        Event { at: now, share: self.share(), phase, cause, canary, stable }
    }
}

impl Measured {
    fn add(&mut self, other: Self) {
        self.successes += other.successes;
        self.failures += other.failures;
        self.latency += other.latency;
    }

    fn requests(self) -> u64 {
        self.successes + self.failures
    }

    fn mean(self) -> Option<f64> {
        let requests = self.requests();
        (requests > 0 && !self.latency.is_zero()).then(|| self.latency.as_secs_f64() / requests as f64)
    }
}

/// The logarithm of how much likelier the failures of the canary are by these odds than by equal odds, given how many
/// failed of both.
fn log_odds_ratio(canary: Measured, stable: Measured, odds: f64) -> f64 {
    let failed = canary.failures + stable.failures;
    let (ours, theirs) = (canary.requests(), stable.requests());
    let (least, most) = (failed.saturating_sub(theirs), failed.min(ours));
    let (mut log, mut equal, mut worse) = (0.0_f64, f64::NEG_INFINITY, f64::NEG_INFINITY);
    for count in least..=most {
        equal = log_add(equal, log);
        worse = log_add(worse, log + (count - least) as f64 * odds.ln());
        let up = (ours - count) as f64 * (failed - count) as f64;
        let down = (count + 1) as f64 * (theirs + count + 1 - failed) as f64;
        log += (up / down).ln();
    }
    (canary.failures - least) as f64 * odds.ln() - (worse - equal)
}

fn log_add(one: f64, other: f64) -> f64 {
    let most = one.max(other);
    if most == f64::NEG_INFINITY { most } else { most + ((one - most).exp() + (other - most).exp()).ln() }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    fn measured(requests: u32, rate: f64, each: Duration, rng: &mut SmallRng) -> Measured {
        let failures = (0..requests).filter(|_| rng.random::<f64>() < rate).count() as u64;
        Measured { successes: u64::from(requests) - failures, failures, latency: each * requests }
    }

    /// A rollout of ten seconds per measurement and 500 requests in each, for at most an hour.
    fn rollout(stable: f64, canary: f64, slower: f64, seed: u64) -> (Controller, Vec<Event>) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut now = mesh_core::clock::now();
        let mut controller = Controller::new(CanaryPolicy::default(), now);
        let mut events = Vec::new();
        let each = Duration::from_millis(10);
        for _ in 0..360 {
            now += Duration::from_secs(10);
            let ours = 500 * u32::from(controller.share()) / 100;
            let one = measured(ours, canary, each.mul_f64(slower), &mut rng);
            let other = measured(500 - ours, stable, each, &mut rng);
            events.extend(controller.observe(one, other, now));
        }
        (controller, events)
    }

    fn rolled_back(stable: f64, canary: f64, seeds: u64) -> u64 {
        let is = |seed| rollout(stable, canary, 1.0, seed).0.phase() == Phase::RolledBack;
        (0..seeds).filter(|seed| is(*seed)).count() as u64
    }

    #[test]
    fn a_canary_that_is_as_good_is_rarely_taken_back() {
        for rate in [0.001, 0.02, 0.2] {
            let alarms = rolled_back(rate, rate, 500);
            // Five are expected at the most; three standard deviations above.
            assert!(alarms <= 12, "{rate}: {alarms} of 500");
        }
    }

    #[test]
    fn one_that_fails_in_5_percent_is_taken_back_and_never_promoted() {
        for seed in 0..200 {
            let (controller, events) = rollout(0.001, 0.05, 1.0, seed);
            assert_eq!(controller.phase(), Phase::RolledBack, "{seed}: {events:?}");
            assert_eq!(controller.share(), 0);
            let Some(Event { cause: Cause::Failures(ratio), .. }) = events.last() else {
                panic!("{events:?}")
            };
            assert!(*ratio >= 100.0);
        }
    }

    #[test]
    fn a_good_one_is_promoted_step_by_step() {
        let (controller, events) = rollout(0.001, 0.001, 1.0, 7);
        assert_eq!((controller.phase(), controller.share()), (Phase::Promoted, 100));
        assert_eq!(events.iter().map(|event| event.share).collect::<Vec<_>>(), [20, 50, 100, 100]);
        assert!(events.iter().all(|event| event.canary.requests() >= 100));
    }

    #[test]
    fn a_slow_one_is_taken_back() {
        let (controller, events) = rollout(0.001, 0.001, 2.0, 7);
        assert_eq!(controller.phase(), Phase::RolledBack);
        assert!(matches!(events[..], [Event { cause: Cause::Latency(factor), .. }] if factor > 1.9));
    }

    #[test]
    fn without_requests_nothing_is_decided() {
        let now = mesh_core::clock::now();
        let mut controller = Controller::new(CanaryPolicy::default(), now);
        let later = now + Duration::from_secs(3600);
        assert_eq!(controller.observe(Measured::default(), Measured::default(), later), None);
        assert_eq!(controller.share(), 5);
    }
}
