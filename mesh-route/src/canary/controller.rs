//! The controller: steps the share of a new version by what is measured of it, and takes it back by itself.
//!
//! Pure: measurements and time are arguments, and what is decided is an [`Event`] with its evidence.
//!
//! **Failures.** The tests are sequential: they may be looked at after every measurement, for as long as one likes.
//! *Rollback*: given how many requests of a measurement failed, how many of those are the canary's has Fisher's
//! hypergeometric distribution, whatever the rate at which the stable version fails. The likelihood ratio of worse odds
//! (a mixture of 2, 4 and 16) against equal odds is a martingale under equal odds, so by Ville's inequality it ever
//! reaches `1 / alpha` with a probability of at most `alpha`, over the whole rollout. *Forward*: a step ends when the
//! canary fails less than is tolerated, by the likelihood ratio of a quarter of that rate, or when its odds are not
//! twice those of the stable version; a canary for which neither is true passes a step with a probability of at most
//! `2 * beta`. All of it supposes that requests fail independently of each other.
//!
//! **At 100 %** there is nobody to compare with. The canary is then held against the rate at which the stable version
//! fails at the most, after all that was seen of it (Chernoff's bound at `alpha`), or against what is tolerated, if that
//! is more. A rollback without reason is there as unlikely once more.
//!
//! **Latency** is the mean of the requests that succeeded. A canary above the bound does not pass its step, nor does one
//! of which too little is known while there is a stable version to compare with. It is
//! rolled back when it is above for sure: by more than chance explains, at whatever moment one looks. The margin is that
//! of an asymptotic confidence sequence (Waudby-Smith and others, *Time-uniform central limit theory*), at `alpha` in
//! each step, tightest near `min_requests`.
//!
//! **Few requests** decide nothing: no step passes without `min_requests`, and a rollback needs evidence, not requests.
//! A canary that nobody asks stays where it is.

use std::fmt;
use std::time::{Duration, Instant};

/// The odds that a rollback looks for, against those of the stable version.
const ODDS: [f64; 3] = [2.0, 4.0, 16.0];

/// How a canary is rolled out.
#[derive(Clone, Debug, PartialEq)]
pub struct CanaryPolicy {
    /// The shares of the canary, in percent, one step after the other. Default 5, 20, 50, 100.
    pub steps: Vec<u8>,
    /// The probability with which a canary that is as good is taken back, by each of the tests. Default 0.01.
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
    /// How many times as long what succeeds may take, in the mean of a step. Default 1.5.
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
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Requests that succeeded.
    pub successes: u64,
    /// Requests that failed.
    pub failures: u64,
    /// The sum of the latencies of those that succeeded.
    pub latency: Duration,
    /// The sum of the squares of these latencies, in seconds by seconds.
    pub latency_squares: f64,
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

/// `running`, `promoted` or `rolled_back`.
impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Promoted => "promoted",
            Self::RolledBack => "rolled_back",
        })
    }
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
    /// Everything that was counted of the stable version in the steps before.
    before: Measured,
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
            before: Measured::default(),
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

    /// The step that is under way or was the last, from 0.
    #[must_use]
    pub fn step(&self) -> usize {
        self.step
    }

    /// When the step began, or when the rollout ended.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// What was counted in the step, of the canary and of the stable version.
    #[must_use]
    pub fn measured(&self) -> (Measured, Measured) {
        (self.canary, self.stable)
    }

    /// The likelihood ratio of a canary that fails more against one that does not, over the whole rollout. It is rolled
    /// back at `1 / alpha`.
    #[must_use]
    pub fn evidence(&self) -> f64 {
        // As large as can be said, but a number.
        self.worse.iter().map(|log| log.min(700.0).exp()).sum::<f64>() / ODDS.len() as f64
    }

    /// Takes what was counted since the last time, and decides.
    pub fn observe(&mut self, canary: Measured, stable: Measured, now: Instant) -> Option<Event> {
        if self.phase != Phase::Running {
            return None;
        }
        self.canary.add(canary);
        self.stable.add(stable);
        self.weigh(canary, stable);
        let evidence = self.evidence();
        if evidence >= 1.0 / self.policy.alpha {
            return Some(self.decide(Phase::RolledBack, Cause::Failures(evidence), now));
        }
        if self.canary.requests() < self.policy.min_requests {
            return None;
        }
        let latency = self.compare_latency();
        if let Latency::Slower { factor, certain: true } = latency {
            return Some(self.decide(Phase::RolledBack, Cause::Latency(factor), now));
        }
        let enough = -self.policy.beta.ln();
        let late = now.saturating_duration_since(self.since) >= self.policy.min_duration;
        let good = self.no_worse >= enough || self.tolerable >= enough;
        (late && good && matches!(latency, Latency::Fine)).then(|| {
            let last = self.step + 1 >= self.policy.steps.len();
            self.step += usize::from(!last);
            self.decide(if last { Phase::Promoted } else { Phase::Running }, Cause::Passed, now)
        })
    }

    /// Adds to the likelihood ratios what a measurement says of failures.
    fn weigh(&mut self, canary: Measured, stable: Measured) {
        let tolerated = self.policy.tolerated.clamp(1e-6, 0.5);
        let alone = (self.share() == 100).then(|| match self.before.requests() {
            0 => tolerated,
            _ => highest_rate(self.before, self.policy.alpha).max(tolerated),
        });
        let logs = ODDS.map(|odds| match alone {
            None => log_odds_ratio(canary, stable, odds),
            Some(rate) => log_odds_ratio_at(rate, canary, odds),
        });
        for (worse, log) in self.worse.iter_mut().zip(logs) {
            *worse += log;
        }
        self.no_worse -= logs[0];
        let good = tolerated / 4.0;
        self.tolerable += canary.failures as f64 * (good / tolerated).ln()
            + canary.successes as f64 * ((1.0 - good) / (1.0 - tolerated)).ln();
    }

    /// Whether the canary takes longer than it may. Of a stable version that has few requests in a step, those of the
    /// steps before count too; one that never had any is nothing to compare with.
    fn compare_latency(&self) -> Latency {
        let CanaryPolicy { alpha, min_requests, latency_factor: most, .. } = self.policy;
        let (canary, mut stable) = (self.canary, self.stable);
        if stable.successes < min_requests.max(1) {
            stable.add(self.before);
        }
        if stable.requests() == 0 {
            return Latency::Fine;
        }
        if canary.successes.min(stable.successes) < min_requests.max(1) {
            return Latency::Unknown;
        }
        let ((ours, our_error), (theirs, their_error)) = (canary.mean(), stable.mean());
        let above = ours - most * theirs;
        if theirs <= 0.0 || above <= 0.0 {
            return Latency::Fine;
        }
        let scaled = 12.0 * canary.successes as f64 / min_requests.max(1) as f64;
        let margin = (2.0 * (1.0 + 1.0 / scaled) * ((1.0 + scaled).sqrt() / alpha).ln()).sqrt();
        let certain = above > margin * (our_error + most * most * their_error).sqrt();
        Latency::Slower { factor: ours / theirs, certain }
    }

    fn decide(&mut self, phase: Phase, cause: Cause, now: Instant) -> Event {
        self.phase = phase;
        let (canary, stable) = (std::mem::take(&mut self.canary), std::mem::take(&mut self.stable));
        self.before.add(stable);
        (self.no_worse, self.tolerable, self.since) = (0.0, 0.0, now);
        Event { at: now, share: self.share(), phase, cause, canary, stable }
    }
}

/// How long the canary takes.
#[derive(Clone, Copy, Debug)]
enum Latency {
    /// No longer than it may, or there is nothing to compare with.
    Fine,
    /// Too little is known of one of the two.
    Unknown,
    /// So many times as long as the stable version, which is more than it may.
    Slower {
        factor: f64,
        /// By more than chance explains.
        certain: bool,
    },
}

impl Measured {
    fn add(&mut self, other: Self) {
        self.successes += other.successes;
        self.failures += other.failures;
        self.latency += other.latency;
        self.latency_squares += other.latency_squares;
    }

    /// Requests that succeeded or failed.
    #[must_use]
    pub fn requests(self) -> u64 {
        self.successes + self.failures
    }

    /// The mean latency of what succeeded; `None` when nothing did.
    #[must_use]
    pub fn mean_latency(self) -> Option<Duration> {
        (self.successes > 0).then(|| self.latency.div_f64(self.successes as f64))
    }

    /// The mean latency in seconds, and the square of its standard error.
    fn mean(self) -> (f64, f64) {
        let count = self.successes.max(1) as f64;
        let mean = self.latency.as_secs_f64() / count;
        (mean, (self.latency_squares / count - mean * mean).max(0.0) / count)
    }
}

/// `4 of 120 failed, 12.5 ms in the mean`.
impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} failed", self.failures, self.requests())?;
        match self.mean_latency() {
            None => Ok(()),
            Some(mean) => write!(f, ", {:.1} ms in the mean", mean.as_secs_f64() * 1e3),
        }
    }
}

/// What was decided, why, and what both versions did in the step.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.phase {
            Phase::Running => "step passed",
            Phase::Promoted => "promoted",
            Phase::RolledBack => "rolled back",
        };
        write!(f, "{what}, now {} %: ", self.share)?;
        match self.cause {
            Cause::Failures(ratio) => write!(f, "it is {ratio:.3e} times likelier that it fails more")?,
            Cause::Latency(factor) => write!(f, "it takes {factor:.2} times as long")?,
            Cause::Passed => f.write_str("as good as the stable version")?,
        }
        write!(f, "; canary: {}; stable: {}", self.canary, self.stable)
    }
}

/// The highest rate of failures that does not make what was counted unlikelier than `alpha`, by Chernoff's bound.
fn highest_rate(counted: Measured, alpha: f64) -> f64 {
    let all = counted.requests() as f64;
    let rate = counted.failures as f64 / all;
    let divergence = |other: f64| {
        let part = |ours: f64, theirs: f64| if ours > 0.0 { ours * (ours / theirs).ln() } else { 0.0 };
        part(rate, other) + part(1.0 - rate, 1.0 - other)
    };
    let (mut low, mut high) = (rate, 1.0 - 1e-9);
    for _ in 0..50 {
        let middle = f64::midpoint(low, high);
        if all * divergence(middle) < -alpha.ln() { low = middle } else { high = middle }
    }
    high
}

/// The logarithm of how much likelier the failures of the canary are by these odds against those of a rate that is
/// known.
fn log_odds_ratio_at(rate: f64, canary: Measured, odds: f64) -> f64 {
    canary.failures as f64 * odds.ln() - canary.requests() as f64 * ((odds - 1.0) * rate).ln_1p()
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
        let successes = u64::from(requests) - failures;
        // Sums of exponential latencies, as of the time in a queue: all but normal, with a deviation of one mean each.
        let normal = (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
        let (mean, count) = (each.as_secs_f64(), successes as f64);
        let latency = Duration::from_secs_f64((mean * (count + count.sqrt() * normal)).max(0.0));
        let latency_squares = 2.0 * mean * mean * count;
        Measured { successes, failures, latency, latency_squares }
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
        assert!(matches!(events[..], [Event { cause: Cause::Latency(factor), .. }] if factor > 1.5));
    }

    #[test]
    fn one_that_is_as_fast_is_rarely_taken_back_however_its_latency_is_spread() {
        let slow = |event: &Event| matches!(event.cause, Cause::Latency(_));
        let taken =
            |slower| (0..300).filter(|seed| rollout(0.001, 0.001, slower, *seed).1.iter().any(slow)).count();
        // At the bound itself, each of the four steps has its chance of 1 %; below it, none that is seen here.
        assert!(taken(1.5) <= 24, "{}", taken(1.5));
        assert_eq!(taken(1.2), 0);
    }

    #[test]
    fn one_above_the_bound_does_not_pass_before_it_is_sure() {
        let now = mesh_core::clock::now();
        let mut controller = Controller::new(CanaryPolicy::default(), now);
        let spread = |successes: u64, mean: f64| Measured {
            successes,
            failures: 0,
            latency: Duration::from_secs_f64(mean * successes as f64),
            latency_squares: 20.0 * mean * mean * successes as f64,
        };
        for seconds in 1..100 {
            let at = now + Duration::from_secs(seconds * 10);
            assert_eq!(controller.observe(spread(10, 0.016), spread(190, 0.010), at), None, "{seconds}");
        }
    }

    /// A canary that is as good as the stable version until it is alone, for at most two hours.
    fn at_100(stable: f64, canary: f64, slower: f64, seed: u64) -> (Controller, Vec<Event>) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut now = mesh_core::clock::now();
        let mut controller = Controller::new(CanaryPolicy::default(), now);
        let mut events = Vec::new();
        let each = Duration::from_millis(10);
        for _ in 0..720 {
            now += Duration::from_secs(10);
            let ours = 500 * u32::from(controller.share()) / 100;
            let alone = controller.share() == 100;
            let (rate, takes) = if alone { (canary, each.mul_f64(slower)) } else { (stable, each) };
            let one = measured(ours, rate, takes, &mut rng);
            let other = measured(500 - ours, stable, each, &mut rng);
            events.extend(controller.observe(one, other, now));
        }
        (controller, events)
    }

    #[test]
    fn at_100_percent_it_is_held_against_what_was_seen_of_the_stable_version() {
        let mut alone = 0;
        for seed in 0..50 {
            for (canary, slower) in [(0.06, 1.0), (0.5, 1.0), (0.001, 2.0)] {
                let (controller, events) = at_100(0.001, canary, slower, seed);
                alone += u32::from(events.iter().any(|event| event.share == 100));
                let end = (controller.phase(), controller.share());
                assert_eq!(end, (Phase::RolledBack, 0), "{seed} {canary} {slower}: {events:?}");
            }
        }
        assert!(alone >= 140, "{alone} of 150 were taken back at 100 %");
        // A version that fails as often as the one before is promoted, though that is more than is tolerated.
        let promoted = (0..100).filter(|seed| at_100(0.03, 0.03, 1.0, *seed).0.phase() == Phase::Promoted);
        let promoted = promoted.count();
        assert!(promoted >= 97, "{promoted} of 100");
    }

    #[test]
    fn a_single_step_of_100_percent_is_held_against_what_is_tolerated() {
        let now = mesh_core::clock::now();
        let policy = CanaryPolicy { steps: vec![100], ..CanaryPolicy::default() };
        let mut controller = Controller::new(policy, now);
        let failing = Measured { successes: 50, failures: 50, ..Measured::default() };
        let event = controller.observe(failing, Measured::default(), now).unwrap();
        assert_eq!((event.phase, event.share), (Phase::RolledBack, 0));
    }

    #[test]
    fn evidence_is_a_number_whatever_happens() {
        let now = mesh_core::clock::now();
        let mut controller = Controller::new(CanaryPolicy::default(), now);
        let dead = Measured { failures: 100_000, ..Measured::default() };
        let fine = Measured { successes: 100_000, ..Measured::default() };
        let event = controller.observe(dead, fine, now).unwrap();
        assert!(matches!(event.cause, Cause::Failures(ratio) if ratio.is_finite() && ratio > 1e100));
        assert!(event.to_string().starts_with("rolled back, now 0 %: it is "), "{event}");
    }

    #[test]
    fn the_highest_rate_covers_the_true_one() {
        let of = |failures, all: u64| {
            highest_rate(Measured { successes: all - failures, failures, ..Measured::default() }, 0.01)
        };
        // Without a failure the bound is 1 - alpha^(1/n).
        assert!((of(0, 100) - (1.0 - 0.01_f64.powf(0.01))).abs() < 1e-6);
        assert!(of(10, 1000) > 0.0175 && of(10, 1000) < 0.025, "{}", of(10, 1000));
        assert!(of(5, 5) > 0.999);
    }

    #[test]
    fn bug_a_slow_canary_was_promoted_while_too_little_was_known_of_the_stable_version() {
        let policy = CanaryPolicy { steps: vec![90, 100], ..CanaryPolicy::default() };
        let mut now = mesh_core::clock::now();
        let mut controller = Controller::new(policy, now);
        let each = |requests: u64, millis: u64| {
            let latency = Duration::from_millis(millis);
            let mut measured = Measured { successes: requests, ..Measured::default() };
            measured.latency = latency * u32::try_from(requests).unwrap();
            measured.latency_squares = requests as f64 * latency.as_secs_f64() * latency.as_secs_f64();
            measured
        };
        // In ten minutes the stable version has sixty requests, fewer than decide anything.
        for _ in 0..60 {
            now += Duration::from_secs(10);
            assert_eq!(controller.observe(each(90, 1000), each(1, 10), now), None);
        }
        let mut last = None;
        for _ in 0..60 {
            now += Duration::from_secs(10);
            last = last.or(controller.observe(each(90, 1000), each(1, 10), now));
        }
        assert!(
            matches!(last, Some(Event { cause: Cause::Latency(factor), .. }) if factor > 50.0),
            "{last:?}"
        );
        assert_eq!((controller.phase(), controller.share()), (Phase::RolledBack, 0));
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
