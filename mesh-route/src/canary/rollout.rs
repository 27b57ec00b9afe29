//! What the process knows of one canary.
//!
//! Workers touch three atomics for a request: the share when its destination is chosen, and at its end two or three
//! counters of its version. The lock is the driver's and the reader's; no worker takes it. Counters only grow, and who
//! looks at them remembers what it saw, so that nothing is lost between two looks.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::controller::{Controller, Event, Measured, Phase};
use super::spec::CanarySpec;

/// Events that are remembered of one rollout.
const EVENTS: usize = 64;

/// Squares of latencies are kept in units of 64 µs by 64 µs, so that a sum of them has room for millions of requests
/// that took a minute.
const SQUARE_SHIFT: u32 = 12;

/// The longest latency that is told from longer ones.
const LONGEST: Duration = Duration::from_secs(67);

/// The share of a canary, what was counted of both versions, and what was decided.
#[derive(Debug)]
pub struct Rollout {
    spec: Arc<CanarySpec>,
    share: AtomicU8,
    stable: Counters,
    canary: Counters,
    state: Mutex<State>,
}

/// One of the two destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Stable,
    Canary,
}

/// Where a rollout stands.
#[derive(Clone, Debug)]
pub struct CanaryStatus {
    /// What defines it.
    pub spec: Arc<CanarySpec>,
    /// The share of the canary, in percent.
    pub share: u8,
    /// What the rollout has come to.
    pub phase: Phase,
    /// The step that is under way or was the last, from 0.
    pub step: usize,
    /// When the step began, or when the rollout ended.
    pub since: Instant,
    /// How many times likelier it is that the canary fails more than that it does not, by what was seen in the whole
    /// rollout; it is rolled back at `1 / alpha`.
    pub evidence: f64,
    /// What was looked at of the canary in this step.
    pub canary: Measured,
    /// What was looked at of the stable version in this step.
    pub stable: Measured,
    /// Everything that was counted of the canary.
    pub canary_total: Totals,
    /// Everything that was counted of the stable version.
    pub stable_total: Totals,
    /// What was decided, the oldest first; of very many the last.
    pub events: Vec<Event>,
}

/// Requests of one version since its rollout began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// That succeeded.
    pub successes: u64,
    /// That failed.
    pub failures: u64,
}

#[derive(Debug)]
struct State {
    controller: Controller,
    /// What was read of the counters last, of the stable version and of the canary.
    seen: [Sums; 2],
    due: Instant,
    events: VecDeque<Event>,
}

/// Padded, so that the versions and the share do not share a cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counters {
    successes: AtomicU64,
    failures: AtomicU64,
    micros: AtomicU64,
    squares: AtomicU64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    successes: u64,
    failures: u64,
    micros: u64,
    squares: u64,
}

impl Rollout {
    pub(super) fn new(spec: Arc<CanarySpec>, now: Instant) -> Self {
        let controller = Controller::new(spec.policy.clone(), now);
        let due = mesh_core::clock::after(now, spec.interval);
        Self {
            share: AtomicU8::new(controller.share()),
            stable: Counters::default(),
            canary: Counters::default(),
            state: Mutex::new(State { controller, seen: [Sums::default(); 2], due, events: VecDeque::new() }),
            spec,
        }
    }

    /// What defines it.
    #[must_use]
    pub fn spec(&self) -> &Arc<CanarySpec> {
        &self.spec
    }

    /// The share of the canary, in percent.
    #[must_use]
    pub fn share(&self) -> u8 {
        self.share.load(Ordering::Relaxed)
    }

    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> CanaryStatus {
        let state = self.lock();
        let (canary, stable) = state.controller.measured();
        CanaryStatus {
            spec: Arc::clone(&self.spec),
            share: self.share(),
            phase: state.controller.phase(),
            step: state.controller.step(),
            since: state.controller.since(),
            evidence: state.controller.evidence(),
            canary,
            stable,
            canary_total: self.canary.totals(),
            stable_total: self.stable.totals(),
            events: state.events.iter().copied().collect(),
        }
    }

    /// Counts the end of a request: the latency of a success, `None` for a failure.
    pub(super) fn count(&self, version: Version, latency: Option<Duration>) {
        let counters = match version {
            Version::Stable => &self.stable,
            Version::Canary => &self.canary,
        };
        counters.count(latency);
    }

    /// Looks at what was counted, if it is time to. When it is time again; `None` when nothing is to be decided any more.
    pub(super) fn tick(&self, now: Instant) -> (Option<Event>, Option<Instant>) {
        let mut state = self.lock();
        let state = &mut *state;
        if state.controller.phase() != Phase::Running {
            return (None, None);
        }
        if now < state.due {
            return (None, Some(state.due));
        }
        state.due = mesh_core::clock::after(now, self.spec.interval);
        let sums = [self.stable.sums(), self.canary.sums()];
        let [stable, canary] = [0, 1].map(|at| sums[at].since(state.seen[at]));
        state.seen = sums;
        let event = state.controller.observe(canary, stable, now);
        if let Some(event) = event {
            self.share.store(event.share, Ordering::Relaxed);
            if state.events.len() == EVENTS {
                state.events.pop_front();
            }
            state.events.push_back(event);
        }
        (event, (state.controller.phase() == Phase::Running).then_some(state.due))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counters {
    fn count(&self, latency: Option<Duration>) {
        let Some(latency) = latency else {
            self.failures.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let micros = latency.min(LONGEST).as_micros() as u64;
        self.micros.fetch_add(micros, Ordering::Relaxed);
        // Rounded up: a little more variance decides a little later.
        self.squares.fetch_add((micros * micros).div_ceil(1 << SQUARE_SHIFT), Ordering::Relaxed);
        self.successes.fetch_add(1, Ordering::Relaxed);
    }

    fn sums(&self) -> Sums {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Sums {
            successes: read(&self.successes),
            failures: read(&self.failures),
            micros: read(&self.micros),
            squares: read(&self.squares),
        }
    }

    fn totals(&self) -> Totals {
        let Sums { successes, failures, .. } = self.sums();
        Totals { successes, failures }
    }
}

impl Sums {
    fn since(self, before: Self) -> Measured {
        // The sums of latencies may wrap around; what was added since is right all the same.
        let squares = self.squares.wrapping_sub(before.squares) as f64 * f64::from(1 << SQUARE_SHIFT);
        Measured {
            successes: self.successes.wrapping_sub(before.successes),
            failures: self.failures.wrapping_sub(before.failures),
            latency: Duration::from_micros(self.micros.wrapping_sub(before.micros)),
            latency_squares: squares * 1e-12,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canary::{CanaryPolicy, Cause};

    fn rollout() -> Rollout {
        let spec =
            CanarySpec::new("a", "v1", "v2", CanaryPolicy { min_requests: 1, ..CanaryPolicy::default() });
        Rollout::new(Arc::new(spec), mesh_core::clock::now())
    }

    #[test]
    fn nothing_is_lost_between_looks_whoever_counts() {
        let rollout = rollout();
        let mut seen = Sums::default();
        let mut sum = (0, 0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for at in 0..10_000 {
                        rollout.count(Version::Canary, (at % 4 != 0).then_some(Duration::from_millis(1)));
                    }
                });
            }
            for _ in 0..100 {
                let sums = rollout.canary.sums();
                let since = sums.since(seen);
                (seen, sum) = (sums, (sum.0 + since.successes, sum.1 + since.failures));
            }
        });
        let rest = rollout.canary.sums().since(seen);
        assert_eq!((sum.0 + rest.successes, sum.1 + rest.failures), (30_000, 10_000));
        assert_eq!(rollout.status().canary_total, Totals { successes: 30_000, failures: 10_000 });
        assert_eq!(rollout.status().stable_total, Totals::default());
    }

    #[test]
    fn latencies_are_summed_with_their_squares() {
        let counters = Counters::default();
        for millis in [10, 20, 30] {
            counters.count(Some(Duration::from_millis(millis)));
        }
        counters.count(None);
        let measured = counters.sums().since(Sums::default());
        assert_eq!((measured.requests(), measured.mean_latency()), (4, Some(Duration::from_millis(20))));
        // 1,400 ms by ms, but for what is rounded up.
        assert!((measured.latency_squares - 1.4e-3).abs() < 2e-8, "{}", measured.latency_squares);
        counters.count(Some(Duration::from_secs(3600)));
        assert_eq!(counters.sums().since(Sums::default()).latency, LONGEST + Duration::from_millis(60));
        // What wraps around is subtracted all the same.
        let before = Sums { micros: u64::MAX - 9, squares: u64::MAX, ..Sums::default() };
        let after = Sums { micros: 10, squares: 0, ..Sums::default() };
        assert_eq!(after.since(before).latency, Duration::from_micros(20));
    }

    #[test]
    fn it_is_looked_at_when_it_is_time_and_stored_for_workers() {
        let rollout = rollout();
        let start = rollout.status().since;
        for _ in 0..20 {
            rollout.count(Version::Canary, None);
            rollout.count(Version::Stable, Some(Duration::from_millis(1)));
        }
        let due = start + Duration::from_secs(10);
        assert_eq!(rollout.tick(due - Duration::from_nanos(1)), (None, Some(due)));
        assert_eq!(rollout.share(), 5);
        let (event, next) = rollout.tick(due);
        assert!(matches!(event.unwrap().cause, Cause::Failures(_)));
        assert_eq!((rollout.share(), next), (0, None));
        assert_eq!(rollout.tick(due + Duration::from_secs(10)), (None, None), "it has ended");
        assert_eq!(rollout.status().events, [event.unwrap()]);
    }
}
