//! Every rollout of the process, and the loop that drives them.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::controller::{Event, Phase};
use super::rollout::{CanaryStatus, Rollout};
use crate::table::RouteTable;

/// The rollouts of the table in force; cloning shares them.
///
/// ```
/// use mesh_route::canary::Canaries;
/// use mesh_route::RouteTable;
///
/// # fn example(table: RouteTable) {
/// let canaries = Canaries::new();
/// canaries.reconcile(&table); // before the table is published, each time
/// tokio::spawn(canaries.clone().run());
/// for canary in canaries.status() {
///     println!("{}: {} %", canary.spec.name, canary.share);
/// }
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Canaries(Arc<Registry>);

#[derive(Debug, Default)]
struct Registry {
    rollouts: Mutex<Vec<Arc<Rollout>>>,
    changed: Notify,
    passed: AtomicU64,
    promoted: AtomicU64,
    rolled_back: AtomicU64,
}

impl Canaries {
    /// A registry without canaries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Attaches each rule that has a canary to its rollout. Called before the table is published, and for one table:
    /// rollouts that it does not define end here. One that is defined as before goes on; any other begins now, at its
    /// first step.
    pub fn reconcile(&self, table: &RouteTable) {
        let now = mesh_core::clock::now();
        let mut rollouts = self.rollouts();
        let mut kept: Vec<Arc<Rollout>> = Vec::new();
        for split in table.canaries() {
            let is = |rollout: &&Arc<Rollout>| rollout.spec() == split.spec();
            let rollout = kept.iter().find(is).or_else(|| rollouts.iter().find(is)).cloned();
            let rollout = rollout.unwrap_or_else(|| {
                let spec = split.spec();
                tracing::info!(canary = &*spec.name, share = spec.policy.steps.first(), "a rollout begins");
                Arc::new(Rollout::new(Arc::clone(spec), now))
            });
            if !kept.iter().any(|known| Arc::ptr_eq(known, &rollout)) {
                kept.push(Arc::clone(&rollout));
            }
            split.attach(rollout);
        }
        kept.sort_by(|left, right| left.spec().name.cmp(&right.spec().name));
        *rollouts = kept;
        drop(rollouts);
        self.0.changed.notify_one();
    }

    /// Looks at every canary whenever it is time to, for ever. Meant for a task beside those that serve requests.
    pub async fn run(self) -> Infallible {
        loop {
            match self.tick(mesh_core::clock::now()) {
                None => self.0.changed.notified().await,
                Some(next) => tokio::select! {
                    () = tokio::time::sleep_until(next.into()) => {}
                    () = self.0.changed.notified() => {}
                },
            }
        }
    }

    /// Looks at the canaries for which it is time, and says when the next one wants it; `None` when none does. For
    /// whoever does not [`run`](Self::run) them.
    pub fn tick(&self, now: Instant) -> Option<Instant> {
        let rollouts = self.rollouts().clone();
        let mut next: Option<Instant> = None;
        for rollout in rollouts {
            let (event, due) = rollout.tick(now);
            if let Some(event) = event {
                self.say(&rollout, &event);
            }
            next = next.into_iter().chain(due).min();
        }
        next
    }

    /// Where every rollout stands, in order of name.
    #[must_use]
    pub fn status(&self) -> Vec<CanaryStatus> {
        self.rollouts().iter().map(|rollout| rollout.status()).collect()
    }

    /// Steps that were passed so far, but the last of each rollout.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.0.passed.load(Ordering::Relaxed)
    }

    /// Canaries that were promoted so far.
    #[must_use]
    pub fn promoted(&self) -> u64 {
        self.0.promoted.load(Ordering::Relaxed)
    }

    /// Canaries that were rolled back so far.
    #[must_use]
    pub fn rolled_back(&self) -> u64 {
        self.0.rolled_back.load(Ordering::Relaxed)
    }

    fn say(&self, rollout: &Rollout, event: &Event) {
        let name = &*rollout.spec().name;
        let counter = match event.phase {
            Phase::Running => &self.0.passed,
            Phase::Promoted => &self.0.promoted,
            Phase::RolledBack => &self.0.rolled_back,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if event.phase == Phase::RolledBack {
            tracing::warn!(canary = name, share = event.share, "{event}");
        } else {
            tracing::info!(canary = name, share = event.share, "{event}");
        }
    }

    fn rollouts(&self) -> MutexGuard<'_, Vec<Arc<Rollout>>> {
        self.0.rollouts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
