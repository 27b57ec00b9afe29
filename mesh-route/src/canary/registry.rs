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
                    biased;
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_core::ClusterName;

    use super::*;
    use crate::builder::RouteBuilder;
    use crate::canary::CanaryPolicy;
    use crate::cluster::{Cluster, ClusterSpec, Discovery};
    use crate::route::Route;

    fn rule(name: &str, interval: u64, steps: &[u8]) -> Route {
        let cluster = |name: &str| {
            Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom(name), Discovery::BlackHole)))
        };
        let policy = CanaryPolicy { steps: steps.to_vec(), ..CanaryPolicy::default() };
        let route = RouteBuilder::new(name).canary(Duration::from_secs(interval), policy);
        route.split([(1, cluster("v1")), (1, cluster("v2"))]).unwrap()
    }

    fn table(routes: impl IntoIterator<Item = Route>) -> RouteTable {
        RouteTable::builder().host("*", routes).build().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn each_canary_is_looked_at_in_its_own_time() {
        let canaries = Canaries::new();
        let start = mesh_core::clock::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(canaries.tick(start), None, "there is none");
        canaries.reconcile(&table([rule("a", 2, &[5, 100]), rule("b", 3, &[5, 100])]));
        assert_eq!(canaries.tick(start), Some(after(2)));
        assert_eq!(canaries.tick(after(2)), Some(after(3)));
        assert_eq!(canaries.tick(after(3)), Some(after(4)));
        assert_eq!(canaries.tick(after(100)), Some(after(102)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_rule_at_many_places_is_one_rollout() {
        let canaries = Canaries::new();
        let route = || rule("a", 1, &[5, 100]);
        let first = RouteTable::builder().host("a", [route(), route()]).host("b", [route()]).build().unwrap();
        canaries.reconcile(&first);
        assert_eq!(canaries.status().len(), 1);
        let rollouts = |table: &RouteTable| -> Vec<_> {
            table.canaries().map(|split| Arc::as_ptr(split.rollout().unwrap())).collect()
        };
        let [one, two, three] = rollouts(&first)[..] else { panic!("three places") };
        assert!(one == two && two == three);
        // What differs goes by itself, though it is called alike, and what is gone is forgotten.
        let second = table([route(), rule("a", 1, &[10, 100])]);
        canaries.reconcile(&second);
        let [kept, other] = rollouts(&second)[..] else { panic!("two places") };
        assert!(kept == one && other != one);
        let third = table([rule("a", 1, &[10, 100])]);
        canaries.reconcile(&third);
        assert_eq!(rollouts(&third), [other]);
        let fourth = table([route()]);
        canaries.reconcile(&fourth);
        assert_ne!(rollouts(&fourth), [one], "begun anew, though requests of the first generation may live");
    }
}
