//! What clusters are at run time: endpoints, and counters that survive a reload.
//!
//! [`Clusters`] is shared by the whole process, so that limits hold per process and not per worker. Runtimes are keyed
//! by cluster name. [`Clusters::reconcile`] attaches the clusters of a new generation before it is published: a name
//! that is known keeps its runtime, and within it an address that is secured alike keeps its endpoint. Runtimes go with their last holder.
//!
//! Endpoints from configuration belong to the generation that lists them, so that no request mixes generations. Those
//! of the resolver change by themselves.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use arc_swap::ArcSwap;
use mesh_core::{ClientTls, ClusterName, UpstreamTls};
use tokio::sync::Notify;

use crate::balance::Tables;
use crate::cluster::{Cluster, ClusterSpec, Discovery, EndpointSpec};
use crate::endpoint::{Endpoint, EndpointSet, Member};
use crate::lock_order::{ATTACHED, CLUSTERS, DETECTOR, FOUND, Guard, KNOWN, Ordered};
use crate::mirror::{MirrorCounters, Mirroring};
use crate::outlier::{Detector, Observation, OutlierDetection};
use crate::permit::Permit;
use crate::retry::Retries;

/// Every cluster of the process, by name.
#[derive(Clone, Debug, Default)]
pub struct Clusters {
    runtimes: Arc<Ordered<CLUSTERS, HashMap<ClusterName, Weak<ClusterRuntime>>>>,
    tables: Tables,
    mirroring: Mirroring,
}

/// The endpoints that somebody holds, by address and how it is secured.
type Known = HashMap<(SocketAddr, Option<Arc<ClientTls>>), Weak<Endpoint>>;

/// The state of one cluster that no configuration defines.
pub struct ClusterRuntime {
    id: u64,
    name: ClusterName,
    resolved: ArcSwap<EndpointSet>,
    known: Ordered<KNOWN, Known>,
    /// How endpoints are secured, and those that the resolver found last.
    found: Ordered<FOUND, (UpstreamTls, Vec<EndpointSpec>)>,
    /// The clusters of living generations, whose balancers follow what happens here.
    attached: Ordered<ATTACHED, Vec<Weak<Cluster>>>,
    tables: Tables,
    /// Clusters of living generations that are attached.
    holders: AtomicU32,
    pub(crate) connections: AtomicU32,
    pub(crate) pending: AtomicU32,
    pub(crate) requests: AtomicU32,
    pub(crate) overflows: AtomicU64,
    retries: Retries,
    mirroring: Mirroring,
    mirrors: MirrorCounters,
    detector: Ordered<DETECTOR, Detector>,
    /// When the next ejection ends, in nanoseconds since `origin`; the greatest number when nobody is ejected.
    next_return: AtomicU64,
    origin: Instant,
    /// Told when a connection slot or a connection may have become free.
    pub(crate) freed: Notify,
}

impl Clusters {
    /// A registry without clusters.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Attaches each cluster to its runtime. Called before the generation that holds them is published.
    pub fn reconcile(&self, clusters: &[Arc<Cluster>]) {
        let mut runtimes = self.runtimes.lock();
        for cluster in clusters {
            if cluster.runtime().is_some() {
                continue;
            }
            let known = runtimes.get(cluster.name()).and_then(Weak::upgrade);
            let runtime = known.unwrap_or_else(|| {
                let (tables, mirroring) = (self.tables.clone(), self.mirroring.clone());
                let runtime = Arc::new(ClusterRuntime::new(cluster.name().clone(), tables, mirroring));
                runtimes.insert(cluster.name().clone(), Arc::downgrade(&runtime));
                runtime
            });
            runtime.hold();
            if cluster.spec().outlier_detection.is_none() {
                runtime.end_outlier_detection();
            }
            let listed = match &cluster.spec().discovery {
                Discovery::Static(endpoints) => {
                    Some(Arc::new(runtime.endpoint_set(&cluster.spec().tls, endpoints.iter().cloned())))
                }
                _ => {
                    runtime.secure(&cluster.spec().tls);
                    None
                }
            };
            cluster.attach(Arc::clone(&runtime), listed, &self.tables);
            runtime.follow(cluster);
        }
        runtimes.retain(|_, runtime| runtime.strong_count() > 0);
    }

    /// What the copies of the process share.
    #[must_use]
    pub fn mirroring(&self) -> &Mirroring {
        &self.mirroring
    }

    /// The runtimes that some generation still holds, in order of name.
    #[must_use]
    pub fn runtimes(&self) -> Vec<Arc<ClusterRuntime>> {
        let runtimes = self.runtimes.lock();
        let mut all: Vec<_> = runtimes.values().filter_map(Weak::upgrade).collect();
        all.sort_by(|left, right| left.name.cmp(&right.name));
        all
    }
}

impl ClusterRuntime {
    fn new(name: ClusterName, tables: Tables, mirroring: Mirroring) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name,
            resolved: ArcSwap::default(),
            known: Ordered::default(),
            found: Ordered::default(),
            attached: Ordered::default(),
            tables,
            holders: AtomicU32::new(0),
            connections: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            overflows: AtomicU64::new(0),
            retries: Retries::default(),
            mirroring,
            mirrors: MirrorCounters::default(),
            detector: Ordered::default(),
            next_return: AtomicU64::new(u64::MAX),
            origin: mesh_core::clock::now(),
            freed: Notify::new(),
        }
    }

    /// One that belongs to no registry, for endpoints that are judged together.
    pub(crate) fn alone(name: ClusterName) -> Self {
        Self::new(name, Tables::default(), Mirroring::default())
    }

    /// Outlier detection forgets the endpoints that are gone.
    pub(crate) fn retain_outliers(&self, is_known: impl FnMut(&SocketAddr) -> bool) {
        let mut detector = self.detector();
        detector.retain(is_known);
        self.set_next_return(&detector);
    }

    /// A number that no other cluster of this process has or had.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The cluster's name.
    #[must_use]
    pub fn name(&self) -> &ClusterName {
        &self.name
    }

    /// The endpoints that the resolver found last.
    #[must_use]
    pub fn resolved(&self) -> Arc<EndpointSet> {
        self.resolved.load_full()
    }

    /// Replaces the endpoints that the resolver found. An address that stays keeps its endpoint.
    pub fn set_resolved(&self, endpoints: impl IntoIterator<Item = EndpointSpec>) {
        let mut found = self.found();
        found.1 = endpoints.into_iter().collect();
        self.resolved.store(Arc::new(self.endpoint_set(&found.0, found.1.iter().cloned())));
        drop(found);
        self.tell(|cluster| cluster.endpoints_changed(&self.tables));
    }

    /// Secures the endpoints that the resolver finds, and has found, like this.
    fn secure(&self, tls: &UpstreamTls) {
        let mut found = self.found();
        if found.0 == *tls {
            return;
        }
        found.0 = tls.clone();
        if !found.1.is_empty() {
            self.resolved.store(Arc::new(self.endpoint_set(&found.0, found.1.iter().cloned())));
            drop(found);
            self.tell(|cluster| cluster.endpoints_changed(&self.tables));
        }
    }

    fn found(&self) -> Guard<'_, (UpstreamTls, Vec<EndpointSpec>)> {
        self.found.lock()
    }

    /// Endpoints were ejected or have returned: who changed that has the clusters pick from others.
    pub(crate) fn availability_changed(&self) {
        self.tell(Cluster::availability_changed);
    }

    /// Has a cluster that was attached pick from what is available, now and when that changes.
    fn follow(&self, cluster: &Arc<Cluster>) {
        let mut attached = self.attached();
        attached.push(Arc::downgrade(cluster));
        // What changed since it was attached it has not been told.
        cluster.endpoints_changed(&self.tables);
        cluster.availability_changed();
    }

    /// One at a time, so that the last who tells has seen everything that was told before.
    fn tell(&self, what: impl Fn(&Cluster)) {
        // The last holder of a cluster must not go while the lock is held, so they are let go after it.
        let mut living = Vec::new();
        let mut attached = self.attached();
        attached.retain(|cluster| {
            let cluster = cluster.upgrade();
            let is_living = cluster.is_some();
            living.extend(cluster);
            is_living
        });
        living.iter().for_each(|cluster| what(cluster));
        drop(attached);
    }

    fn attached(&self) -> Guard<'_, Vec<Weak<Cluster>>> {
        self.attached.lock()
    }

    /// The endpoint of an address, for destinations that come with the request. Who it is nobody knows, so it is secured
    /// only where every endpoint is.
    #[must_use]
    pub fn endpoint(&self, addr: SocketAddr, tls: &UpstreamTls) -> Arc<Endpoint> {
        let mut known = self.known();
        // Addresses come with requests, so those that are gone are forgotten now and then.
        if known.len() >= 64 && known.len().is_power_of_two() {
            known.retain(|_, endpoint| endpoint.strong_count() > 0);
        }
        let endpoint = Self::keep(&mut known, addr, tls.for_endpoint(false));
        endpoint.set_retired(false);
        endpoint
    }

    /// Open connections.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Requests that wait for a connection.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    /// Requests whose response has not ended.
    #[must_use]
    pub fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Requests that a limit refused.
    #[must_use]
    pub fn overflows(&self) -> u64 {
        self.overflows.load(Ordering::Relaxed)
    }

    /// Retries in flight, the time before them included.
    #[must_use]
    pub fn retries(&self) -> u32 {
        self.retries.in_flight().load(Ordering::Relaxed)
    }

    /// Retries so far.
    #[must_use]
    pub fn retried(&self) -> u64 {
        self.retries.admitted()
    }

    /// Retries that a limit refused.
    #[must_use]
    pub fn retry_overflows(&self) -> u64 {
        self.retries.refused()
    }

    /// What became of the copies that this cluster was to get.
    #[must_use]
    pub fn mirrors(&self) -> &MirrorCounters {
        &self.mirrors
    }

    pub(crate) fn mirroring(&self) -> &Mirroring {
        &self.mirroring
    }

    /// Reads what outlier detection knows; ejections that are over have ended.
    pub fn with_outliers<T>(&self, read: impl FnOnce(&Detector) -> T) -> T {
        self.let_return(mesh_core::clock::now);
        read(&self.detector())
    }

    /// Counts a request that may be retried, where the budget counts over time.
    pub(crate) fn count_request(&self, spec: &ClusterSpec) {
        self.retries.count_request(spec.retry_budget.as_ref());
    }

    /// A place among the retries, if `maxRetries` and the budget have one.
    pub(crate) fn admit_retry(self: &Arc<Self>, spec: &ClusterSpec) -> Option<Permit<Self>> {
        // Those that wait for a connection hold their place among the requests already.
        let active = || u64::from(self.requests());
        let acquire = |most| Permit::acquire(self, |runtime| runtime.retries.in_flight(), most);
        self.retries.admit(spec.pool.max_retries, spec.retry_budget.as_ref(), active, acquire)
    }

    /// Tells outlier detection what a try came to; whether the endpoint is ejected by it.
    pub(crate) fn observe(
        &self,
        config: &OutlierDetection,
        endpoint: &Endpoint,
        seen: Observation,
        endpoints: impl FnOnce() -> usize,
    ) -> bool {
        let Some(evidence) = endpoint.failures().observe(config, seen) else { return false };
        // What a request that was under way says of an endpoint that is gone keeps nobody else from being ejected.
        if endpoint.is_retired() {
            return false;
        }
        // Before the detector is locked: who counts them may lock what another holds who waits for the detector.
        let endpoints = endpoints();
        let mut detector = self.detector();
        // It may have gone since: those that go do so under this lock.
        if endpoint.is_retired() {
            return false;
        }
        let now = mesh_core::clock::now();
        let noted = detector.noted();
        let is_ejected = detector.trip(config, endpoint.addr(), evidence, endpoints, now);
        if is_ejected {
            endpoint.set_ejected(true);
        }
        let event = detector.events().last().filter(|_| detector.noted() > noted).cloned();
        self.set_next_return(&detector);
        drop(detector);
        if is_ejected {
            self.availability_changed();
        }
        if let Some(event) = event {
            tracing::warn!(cluster = %self.name, endpoint = %event.endpoint, "outlier detection: {}", event.kind);
        }
        is_ejected
    }

    /// Ends the ejections whose time is over; whether there was one. Costs a look at one number while nobody is ejected.
    pub(crate) fn let_return(&self, now: impl FnOnce() -> Instant) -> bool {
        let next = self.next_return.load(Ordering::Acquire);
        if next == u64::MAX {
            return false;
        }
        let now = now();
        if nanos(self.origin, now) < next {
            return false;
        }
        let mut detector = self.detector();
        let returned = detector.sweep(now);
        returned.iter().for_each(|addr| self.returned(*addr));
        self.set_next_return(&detector);
        drop(detector);
        if returned.is_empty() {
            return false;
        }
        self.availability_changed();
        for addr in returned {
            tracing::info!(cluster = %self.name, endpoint = %addr, "outlier detection: returned");
        }
        true
    }

    /// Without outlier detection nobody is ejected.
    fn end_outlier_detection(&self) {
        let mut detector = self.detector();
        *detector = Detector::default();
        let known: Vec<_> = self.known().values().filter_map(Weak::upgrade).collect();
        known.iter().for_each(|endpoint| endpoint.set_ejected(false));
        self.set_next_return(&detector);
        drop(detector);
        self.availability_changed();
    }

    fn returned(&self, addr: SocketAddr) {
        let known: Vec<_> = self.known().values().filter_map(Weak::upgrade).collect();
        for endpoint in known.iter().filter(|endpoint| endpoint.addr() == addr) {
            endpoint.failures().clear();
            endpoint.set_ejected(false);
        }
    }

    fn set_next_return(&self, detector: &Detector) {
        let next = detector.next_return().map_or(u64::MAX, |at| nanos(self.origin, at));
        self.next_return.store(next, Ordering::Release);
    }

    fn detector(&self) -> Guard<'_, Detector> {
        self.detector.lock()
    }

    fn known(&self) -> Guard<'_, Known> {
        self.known.lock()
    }

    /// A cluster of a generation is attached.
    fn hold(&self) {
        if self.holders.fetch_add(1, Ordering::AcqRel) == 0 {
            self.resolved.load().iter().for_each(|endpoint| endpoint.set_retired(false));
        }
    }

    /// A cluster of a generation is gone. With the last one the endpoints retire, and their connections close.
    pub(crate) fn release(&self) {
        if self.holders.fetch_sub(1, Ordering::AcqRel) == 1 {
            let known = self.known();
            // A generation that came meanwhile has its endpoints back.
            if self.holders.load(Ordering::Acquire) == 0 {
                known.values().filter_map(Weak::upgrade).for_each(|endpoint| endpoint.set_retired(true));
            }
        }
    }

    fn endpoint_set(
        &self,
        tls: &UpstreamTls,
        endpoints: impl IntoIterator<Item = EndpointSpec>,
    ) -> EndpointSet {
        let mut known = self.known();
        let set = EndpointSet::of(endpoints.into_iter().map(|spec| Member {
            endpoint: Self::keep(&mut known, spec.addr, tls.for_endpoint(spec.has_identity)),
            weight: spec.weight,
            priority: spec.priority,
            locality: spec.locality,
        }));
        drop(known);
        let listed: HashSet<u64> = set.iter().map(|endpoint| endpoint.id()).collect();
        let addresses: HashSet<_> = set.iter().map(|endpoint| endpoint.addr()).collect();
        // Both under the detector's lock: nobody is ejected any more once it has gone.
        let mut detector = self.detector();
        let mut known = self.known();
        known.retain(|_, endpoint| {
            let Some(endpoint) = endpoint.upgrade() else { return false };
            let is_gone = !listed.contains(&endpoint.id());
            endpoint.set_retired(is_gone);
            if is_gone {
                endpoint.failures().clear();
                endpoint.set_ejected(false);
            }
            true
        });
        drop(known);
        // Who is gone is none of the ejected any more, or they would keep others from being ejected.
        detector.retain(|addr| addresses.contains(addr));
        self.set_next_return(&detector);
        drop(detector);
        set
    }

    fn keep(known: &mut Known, addr: SocketAddr, tls: Option<&Arc<ClientTls>>) -> Arc<Endpoint> {
        let key = (addr, tls.cloned());
        if let Some(endpoint) = known.get(&key).and_then(Weak::upgrade) {
            return endpoint;
        }
        let endpoint = Arc::new(Endpoint::secured(addr, tls.cloned()));
        known.insert(key, Arc::downgrade(&endpoint));
        endpoint
    }
}

fn nanos(origin: Instant, at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(origin).as_nanos()).unwrap_or(u64::MAX - 1)
}

impl fmt::Debug for ClusterRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterRuntime")
            .field("name", &self.name)
            .field("connections", &self.connections())
            .field("pending", &self.pending())
            .field("requests", &self.requests())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use rand::rngs::SmallRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;
    use crate::RetryBudget;
    use crate::cluster::{ClusterSpec, EndpointSpec};

    fn cluster(ports: &[u16]) -> Arc<Cluster> {
        let endpoints = ports.iter().map(|port| EndpointSpec::new(([127, 0, 0, 1], *port).into())).collect();
        Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom("a"), Discovery::Static(endpoints))))
    }

    #[test]
    fn an_address_keeps_its_endpoint_over_a_reload() {
        let clusters = Clusters::new();
        let first = cluster(&[1, 2]);
        clusters.reconcile(std::slice::from_ref(&first));
        let second = cluster(&[2, 3]);
        clusters.reconcile(std::slice::from_ref(&second));
        let ids = |cluster: &Cluster| {
            cluster.endpoints().iter().map(|e| (e.addr().port(), e.id())).collect::<HashMap<_, _>>()
        };
        assert_eq!(ids(&first)[&2], ids(&second)[&2]);
        assert_eq!(first.runtime().map(|r| r.id()), second.runtime().map(|r| r.id()));
        assert_eq!(ids(&first).len(), 2, "the old generation keeps its own endpoints");
    }

    #[test]
    fn addresses_that_came_with_requests_are_forgotten() {
        let clusters = Clusters::new();
        let cluster = cluster(&[]);
        clusters.reconcile(std::slice::from_ref(&cluster));
        let runtime = cluster.runtime().unwrap();
        for port in 1..=10_000 {
            drop(runtime.endpoint(([10, 0, 0, 1], port).into(), &UpstreamTls::Disable));
        }
        assert!(runtime.known.lock().len() <= 64);
    }

    #[test]
    fn c6_an_endpoint_retires_when_no_configuration_has_it() {
        let clusters = Clusters::new();
        let first = cluster(&[1, 2]);
        clusters.reconcile(std::slice::from_ref(&first));
        let endpoints: Vec<_> = first.endpoints().iter().cloned().collect();
        let retired = || endpoints.iter().map(|endpoint| endpoint.is_retired()).collect::<Vec<_>>();
        let second = cluster(&[2]);
        clusters.reconcile(std::slice::from_ref(&second));
        assert_eq!(retired(), [true, false]);
        let third = cluster(&[1, 2]);
        clusters.reconcile(std::slice::from_ref(&third));
        assert_eq!(retired(), [false, false]);
        drop((first, second));
        assert_eq!(retired(), [false, false]);
        drop(third);
        assert_eq!(retired(), [true, true], "the cluster is gone");
    }

    #[test]
    fn a_runtime_goes_with_its_last_holder() {
        let clusters = Clusters::new();
        let first = cluster(&[1]);
        clusters.reconcile(std::slice::from_ref(&first));
        assert_eq!(clusters.runtimes().len(), 1);
        drop(first);
        assert_eq!(clusters.runtimes().len(), 0);
    }

    #[test]
    fn dr_od03_the_endpoints_are_counted_before_the_detector_is_locked() {
        let runtime = ClusterRuntime::alone(ClusterName::custom("a"));
        let endpoint = runtime.endpoint(([10, 0, 0, 1], 1).into(), &UpstreamTls::Disable);
        let config = OutlierDetection { consecutive_5xx: 1, ..OutlierDetection::default() };
        let mut is_free = false;
        runtime.observe(&config, &endpoint, Observation::of_response(StatusCode::BAD_GATEWAY, None), || {
            is_free = runtime.detector.is_free();
            1
        });
        assert!(is_free, "who counts holds a lock of its own, and others take the two the other way round");
    }

    #[test]
    fn dr_od03_bug_an_endpoint_that_went_while_it_was_judged_was_one_of_the_ejected() {
        let runtime = ClusterRuntime::alone(ClusterName::custom("a"));
        let [one, two] = [1, 2].map(|last| EndpointSpec::new(([10, 0, 0, last], 1).into()));
        runtime.set_resolved([one.clone()]);
        let endpoint = runtime.resolved().iter().next().cloned().unwrap();
        let config =
            OutlierDetection { consecutive_5xx: 1, max_ejection_percent: 100, ..OutlierDetection::default() };
        let seen = Observation::of_response(StatusCode::BAD_GATEWAY, None);
        let is_ejected = runtime.observe(&config, &endpoint, seen, || {
            // Between the first look at the endpoint and the lock.
            runtime.set_resolved([two.clone()]);
            1
        });
        assert!(!is_ejected && !endpoint.is_ejected());
        assert_eq!(runtime.with_outliers(Detector::ejected), 0);
        // It is as good as any other when it comes back.
        runtime.set_resolved([one]);
        assert!(runtime.observe(&config, &endpoint, seen, || 1));
    }

    #[test]
    fn b1_a_request_that_waits_for_a_connection_counts_once_for_the_budget() {
        let budget = RetryBudget { percent: 20.0, min_retry_concurrency: 0, ..RetryBudget::default() };
        let mut spec = ClusterSpec::new(ClusterName::custom("a"), Discovery::Static(Vec::new()));
        spec.retry_budget = Some(budget);
        let runtime = Arc::new(ClusterRuntime::alone(ClusterName::custom("a")));
        let waiting: Vec<_> = (0..10)
            .flat_map(|_| [COUNTERS[2], COUNTERS[1]])
            .map(|counter| Permit::acquire(&runtime, counter, 10).unwrap())
            .collect();
        assert_eq!((runtime.requests(), runtime.pending()), (10, 10));
        let retries: Vec<_> = std::iter::from_fn(|| runtime.admit_retry(&spec)).take(10).collect();
        assert_eq!(retries.len(), 2, "a fifth of ten");
        drop((waiting, retries));
    }

    const COUNTERS: [fn(&ClusterRuntime) -> &AtomicU32; 4] = [
        |runtime| &runtime.connections,
        |runtime| &runtime.pending,
        |runtime| &runtime.requests,
        |runtime| runtime.retries.in_flight(),
    ];

    #[test]
    fn b6_limits_are_exact_over_a_million_steps() {
        let clusters = Clusters::new();
        let cluster = cluster(&[1]);
        clusters.reconcile(std::slice::from_ref(&cluster));
        let runtime = cluster.runtime().unwrap();
        let mut rng = SmallRng::seed_from_u64(6);
        let mut held: [Vec<Permit<ClusterRuntime>>; 4] = Default::default();
        for _ in 0..1_000_000 {
            let at = rng.random_range(0..4);
            if rng.random_ratio(2, 5) {
                held[at].pop();
                continue;
            }
            // Also one that a reload has lowered below what is held.
            let limit = rng.random_range(0..8);
            let before = held[at].len();
            let permit = Permit::acquire(runtime, COUNTERS[at], limit);
            assert_eq!(permit.is_some(), before < limit as usize, "{before} of {limit}");
            held[at].extend(permit);
            assert_eq!(COUNTERS[at](runtime).load(Ordering::Relaxed) as usize, held[at].len());
        }
        drop(held);
        assert!(COUNTERS.iter().all(|counter| counter(runtime).load(Ordering::Relaxed) == 0));
    }
}
