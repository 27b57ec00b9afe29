//! Looks at the state of the proxies from time to time, by what every admin endpoint can see.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::{Slot, Snapshot};

use super::endpoint::World;
use super::ledger::{Book, Sample};
use super::report::{Event, EventKind};
use crate::canary::Canaries;
use crate::outlier;
use crate::runtime::{ClusterRuntime, Clusters};
use crate::table::RouteTable;

/// How often it looks at least: outlier detection remembers the last decisions only.
const STEP: Duration = Duration::from_millis(100);

pub(super) struct Sampler {
    clusters: Clusters,
    canaries: Canaries,
    routes: Slot<RouteTable>,
    world: Arc<World>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    snapshot: Option<Arc<Snapshot>>,
    /// What was counted of each cluster when it was looked at last.
    known: BTreeMap<u64, Counted>,
    /// When the last decision on each canary was made that is written down.
    decided: BTreeMap<Arc<str>, Instant>,
}

#[derive(Clone, Copy, Default)]
struct Counted {
    overflows: u64,
    retry_overflows: u64,
    noted: u64,
}

impl Sampler {
    pub(super) fn new(
        clusters: Clusters,
        canaries: Canaries,
        routes: Slot<RouteTable>,
        world: Arc<World>,
    ) -> Self {
        Self { clusters, canaries, routes, world, state: Mutex::default() }
    }

    /// Looks at the clusters of this generation from now on. The one before is let go.
    pub(super) fn watch(&self, snapshot: Arc<Snapshot>) {
        let before = self.state.lock().unwrap_or_else(PoisonError::into_inner).snapshot.replace(snapshot);
        drop(before);
    }

    pub(super) fn reloaded(&self, generation: u64, files: &str) {
        let files = if files.is_empty() { "documents of the scenario" } else { files };
        self.world.ledger.lock().events.push(Event {
            at: self.world.elapsed(),
            kind: EventKind::Reloaded,
            cluster: None,
            endpoint: None,
            what: format!("configuration {generation} in force: {files}"),
            times: 1,
        });
    }

    /// Looks at the end of every row, and in between.
    pub(super) async fn run(&self, row: Duration) -> Infallible {
        let steps = u32::try_from(row.as_nanos().div_ceil(STEP.as_nanos())).unwrap_or(u32::MAX);
        for nth in 0_u32.. {
            for step in 1..=steps {
                let at = row * nth + row * step / steps;
                tokio::time::sleep_until(self.world.origin + at).await;
                self.sample();
            }
        }
        std::future::pending().await
    }

    pub(super) fn sample(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut book = self.world.ledger.lock();
        let mut sample = Sample { at: self.world.elapsed(), ..Sample::default() };
        for runtime in self.clusters.runtimes() {
            let known = state.known.entry(runtime.id()).or_default();
            self.read(&runtime, known, &mut sample, &mut book);
        }
        if let Some(table) = state.snapshot.as_ref().and_then(|snapshot| snapshot.get(&self.routes)) {
            let mut ejected = BTreeSet::new();
            for cluster in table.clusters() {
                let endpoints = cluster.endpoints();
                ejected.extend(endpoints.iter().filter(|one| one.is_ejected()).map(|one| one.addr()));
                let panics =
                    |balancer: Arc<crate::Balancer>| balancer.priorities().any(|(_, load, _)| load.panic);
                if cluster.balancer().is_some_and(panics) {
                    sample.panic.push(cluster.name().to_string());
                }
            }
            sample.ejected = ejected.into_iter().collect();
        }
        for canary in self.canaries.status() {
            let name = &canary.spec.name;
            let last = state.decided.get(name).copied();
            for event in canary.events.iter().filter(|event| last.is_none_or(|last| event.at > last)) {
                state.decided.insert(Arc::clone(name), event.at);
                book.events.push(Event {
                    at: event.at.saturating_duration_since(self.world.origin.into_std()),
                    kind: EventKind::Canary,
                    cluster: None,
                    endpoint: None,
                    what: format!("canary {name}: {event}"),
                    times: 1,
                });
            }
            sample.canaries.insert(name.to_string(), canary.share);
        }
        book.samples.push(sample);
    }

    fn read(&self, runtime: &ClusterRuntime, known: &mut Counted, sample: &mut Sample, book: &mut Book) {
        let (overflows, retry_overflows) = (runtime.overflows(), runtime.retry_overflows());
        sample.overflows += overflows - std::mem::replace(&mut known.overflows, overflows);
        sample.retry_overflows +=
            retry_overflows - std::mem::replace(&mut known.retry_overflows, retry_overflows);
        runtime.with_outliers(|detector| {
            // A cluster that lost its outlier detection on the way has a detector that begins again.
            let new = detector.noted().checked_sub(known.noted).unwrap_or(detector.noted());
            known.noted = detector.noted();
            let skipped = detector.events().len().saturating_sub(usize::try_from(new).unwrap_or(usize::MAX));
            for event in detector.events().skip(skipped) {
                self.note(runtime, event, book);
            }
        });
    }

    fn note(&self, runtime: &ClusterRuntime, event: &outlier::Event, book: &mut Book) {
        let kind = match event.kind {
            outlier::EventKind::Ejected { .. } => EventKind::Ejected,
            outlier::EventKind::NotEjected { .. } => EventKind::NotEjected,
            outlier::EventKind::Returned { .. } => EventKind::Returned,
        };
        let cluster = runtime.name().to_string();
        if kind == EventKind::NotEjected
            && let Some(before) = last_of(book, &cluster, event.endpoint)
            && before.kind == kind
        {
            before.times += 1;
            return;
        }
        book.events.push(Event {
            at: event.at.saturating_duration_since(self.world.origin.into_std()),
            kind,
            cluster: Some(cluster),
            endpoint: Some(event.endpoint),
            what: event.kind.to_string(),
            times: 1,
        });
    }
}

/// The last that was said of an endpoint.
fn last_of<'b>(book: &'b mut Book, cluster: &str, endpoint: SocketAddr) -> Option<&'b mut Event> {
    let is_it =
        |event: &&mut Event| event.endpoint == Some(endpoint) && event.cluster.as_deref() == Some(cluster);
    book.events.iter_mut().rev().find(is_it)
}
