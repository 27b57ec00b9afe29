//! Names that are resolved in the background (SE-03).
//!
//! A cluster whose endpoints are names is resolved at once when its generation is published, and again every refresh
//! interval for as long as somebody holds it. Requests never wait for DNS: until the first answer, and when nothing is
//! there, they get 503 `UH`. An answer that fails or is empty keeps the last good one (A12).

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::cluster::{Cluster, Discovery, DnsEndpoint, EndpointSpec};
use crate::runtime::ClusterRuntime;

/// How often names are resolved again unless a cluster says otherwise. Istio's `dnsRefreshRate` default.
pub const REFRESH: Duration = Duration::from_secs(60);

/// Most addresses that one name may have; the rest of a longer answer is left out.
const MAX_ADDRESSES: usize = 1024;

/// What a resolver answers with.
pub type Resolving = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// Resolves names.
pub trait Resolve: Send + Sync + 'static {
    /// The addresses of a name, in the order of the answer.
    fn resolve(&self, name: Arc<str>) -> Resolving;
}

/// The resolver of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, name: Arc<str>) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((&*name, 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }
}

/// Keeps the endpoints of clusters by name up to date, on the runtime that it was made for.
#[derive(Clone)]
pub struct Discoverer {
    resolver: Arc<dyn Resolve>,
    runtime: tokio::runtime::Handle,
    running: Arc<Mutex<HashMap<u64, Running>>>,
}

/// The shortest time between two look-ups of a name, whatever is configured.
const SHORTEST: Duration = Duration::from_secs(1);

struct Running {
    names: Vec<DnsEndpoint>,
    first_only: bool,
    refresh: Duration,
    task: AbortHandle,
}

impl Discoverer {
    /// Resolves by `resolver` with tasks of `runtime`: the control plane's, never a worker's.
    #[must_use]
    pub fn new(resolver: impl Resolve, runtime: tokio::runtime::Handle) -> Self {
        Self { resolver: Arc::new(resolver), runtime, running: Arc::default() }
    }

    /// Follows the clusters of a generation. Called after [`Clusters::reconcile`](crate::Clusters::reconcile), before
    /// the generation is published. A cluster whose names did not change goes on as it was.
    pub fn follow(&self, clusters: &[Arc<Cluster>]) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|_, running| !running.task.is_finished());
        for cluster in clusters {
            let Some(runtime) = cluster.runtime() else { continue };
            let (names, first_only) = match &cluster.spec().discovery {
                Discovery::StrictDns(names) => (names.clone(), false),
                Discovery::LogicalDns(name) => (vec![name.clone()], true),
                // A cluster that had names and has none any more is not resolved on: the answers would retire the
                // endpoints that configuration lists now.
                _ => {
                    if let Some(known) = running.remove(&runtime.id()) {
                        known.task.abort();
                    }
                    continue;
                }
            };
            let refresh = cluster.spec().dns_refresh_rate;
            if let Some(known) = running.get(&runtime.id()) {
                if known.names == names && known.first_only == first_only && known.refresh == refresh {
                    continue;
                }
                known.task.abort();
            }
            let task = self.runtime.spawn(keep_resolving(
                Arc::downgrade(runtime),
                names.clone(),
                first_only,
                Arc::clone(&self.resolver),
                refresh,
            ));
            running.insert(runtime.id(), Running { names, first_only, refresh, task: task.abort_handle() });
        }
    }
}

impl std::fmt::Debug for Discoverer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Discoverer").finish_non_exhaustive()
    }
}

async fn keep_resolving(
    cluster: Weak<ClusterRuntime>,
    names: Vec<DnsEndpoint>,
    first_only: bool,
    resolver: Arc<dyn Resolve>,
    refresh: Duration,
) {
    let mut last: Vec<Vec<IpAddr>> = vec![Vec::new(); names.len()];
    loop {
        for (name, last) in names.iter().zip(&mut last) {
            match addresses(name, resolver.as_ref()).await {
                Ok(found) if found.is_empty() => {
                    tracing::warn!(name = &*name.host, "no address; the last ones stay");
                }
                Ok(found) => *last = found,
                Err(error) => {
                    tracing::warn!(name = &*name.host, %error, "not resolved; the last addresses stay");
                }
            }
        }
        let Some(cluster) = cluster.upgrade() else { return };
        let most = if first_only { 1 } else { MAX_ADDRESSES };
        cluster.set_resolved(names.iter().zip(&last).flat_map(|(name, found)| {
            found.iter().take(most).map(|address| EndpointSpec {
                addr: SocketAddr::new(*address, name.port),
                weight: name.weight,
                locality: Arc::clone(&name.locality),
                labels: Arc::clone(&name.labels),
                priority: name.priority,
                has_identity: name.has_identity,
            })
        }));
        drop(cluster);
        tokio::time::sleep(refresh.max(SHORTEST)).await;
    }
}

async fn addresses(name: &DnsEndpoint, resolver: &dyn Resolve) -> io::Result<Vec<IpAddr>> {
    match name.host.parse() {
        Ok(address) => Ok(vec![address]),
        Err(_) => resolver.resolve(Arc::clone(&name.host)).await,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use mesh_core::ClusterName;

    use super::*;
    use crate::cluster::ClusterSpec;
    use crate::runtime::Clusters;

    /// Answers that are given one after the other; then failures.
    #[derive(Clone, Default)]
    struct Script(Arc<Mutex<VecDeque<Option<Vec<IpAddr>>>>>);

    impl Resolve for Script {
        fn resolve(&self, _: Arc<str>) -> Resolving {
            let answer = self.0.lock().unwrap().pop_front().flatten();
            Box::pin(async move { answer.ok_or_else(|| io::Error::other("SERVFAIL")) })
        }
    }

    fn named(discovery: impl Fn(DnsEndpoint) -> Discovery) -> Arc<Cluster> {
        let name = DnsEndpoint::new("a.example", 80);
        let cluster = Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom("a"), discovery(name))));
        Clusters::new().reconcile(std::slice::from_ref(&cluster));
        cluster
    }

    fn answers(answers: &[Option<&[&str]>]) -> Script {
        let parse = |texts: &&[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Script(Arc::new(Mutex::new(answers.iter().map(|answer| answer.as_ref().map(parse)).collect())))
    }

    fn known(cluster: &Cluster) -> Vec<String> {
        cluster.endpoints().iter().map(|endpoint| endpoint.addr().to_string()).collect()
    }

    async fn settle() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bug_resolving_went_on_for_a_cluster_that_had_become_static() {
        let clusters = Clusters::new();
        let make = |discovery| {
            let cluster = Arc::new(Cluster::new(ClusterSpec::new(ClusterName::custom("a"), discovery)));
            clusters.reconcile(std::slice::from_ref(&cluster));
            cluster
        };
        let name = DnsEndpoint::new("a.example", 80);
        let script = answers(&[Some(&["10.0.0.1"]), Some(&["10.0.0.1"]), Some(&["10.0.0.1"])]);
        let discoverer = Discoverer::new(script.clone(), tokio::runtime::Handle::current());
        let by_name = make(Discovery::StrictDns(vec![name]));
        discoverer.follow(std::slice::from_ref(&by_name));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(script.0.lock().unwrap().len(), 2);
        let listed = EndpointSpec::new(([10, 0, 0, 2], 80).into());
        let fixed = make(Discovery::Static(vec![listed]));
        discoverer.follow(std::slice::from_ref(&fixed));
        tokio::time::sleep(REFRESH * 2).await;
        assert_eq!(script.0.lock().unwrap().len(), 2, "nobody asks any more");
        assert!(fixed.endpoints().iter().all(|endpoint| !endpoint.is_retired()));
    }

    #[tokio::test(start_paused = true)]
    async fn a12_failures_and_empty_answers_keep_the_last_good_set() {
        let script = answers(&[Some(&["10.0.0.1", "10.0.0.2"]), None, Some(&[]), Some(&["10.0.0.3"])]);
        let cluster = named(|name| Discovery::StrictDns(vec![name]));
        let discoverer = Discoverer::new(script, tokio::runtime::Handle::current());
        discoverer.follow(std::slice::from_ref(&cluster));
        settle().await;
        assert_eq!(known(&cluster), ["10.0.0.1:80", "10.0.0.2:80"]);
        for _ in 0..2 {
            tokio::time::advance(REFRESH).await;
            settle().await;
            assert_eq!(known(&cluster), ["10.0.0.1:80", "10.0.0.2:80"]);
        }
        tokio::time::advance(REFRESH).await;
        settle().await;
        assert_eq!(known(&cluster), ["10.0.0.3:80"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a12_a_time_to_live_of_nothing_asks_once_a_second_and_ten_thousand_records_are_bounded() {
        /// Counts the look-ups; each answer is of ten thousand records, and no two are alike.
        #[derive(Clone, Default)]
        struct Huge(Arc<std::sync::atomic::AtomicU32>);

        impl Resolve for Huge {
            fn resolve(&self, _: Arc<str>) -> Resolving {
                let round = self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let found =
                    (0..10_000).map(|at| IpAddr::from((0x0a00_0000 + round * 10_000 + at).to_be_bytes()));
                let found = found.collect();
                Box::pin(async move { Ok(found) })
            }
        }

        let huge = Huge::default();
        let mut spec = ClusterSpec::new(
            ClusterName::custom("a"),
            Discovery::StrictDns(vec![DnsEndpoint::new("a.example", 80)]),
        );
        spec.dns_refresh_rate = Duration::ZERO;
        let cluster = Arc::new(Cluster::new(spec));
        Clusters::new().reconcile(std::slice::from_ref(&cluster));
        let discoverer = Discoverer::new(huge.clone(), tokio::runtime::Handle::current());
        discoverer.follow(std::slice::from_ref(&cluster));
        // Half a second beside the look-ups, so that none is on the edge.
        tokio::time::sleep(Duration::from_millis(10_500)).await;
        assert_eq!(huge.0.load(std::sync::atomic::Ordering::SeqCst), 11, "at once, and each second");
        assert_eq!(cluster.endpoints().len(), MAX_ADDRESSES);
        let runtime = cluster.runtime().unwrap();
        assert!(runtime.resolved().iter().all(|endpoint| !endpoint.is_retired()));
    }

    #[tokio::test(start_paused = true)]
    async fn se_03_round_robin_takes_the_first_record_and_addresses_need_no_dns() {
        let cluster = named(Discovery::LogicalDns);
        let discoverer =
            Discoverer::new(answers(&[Some(&["10.0.0.1", "10.0.0.2"])]), tokio::runtime::Handle::current());
        discoverer.follow(std::slice::from_ref(&cluster));
        settle().await;
        assert_eq!(known(&cluster), ["10.0.0.1:80"]);
        let literal = named(|name| Discovery::StrictDns(vec![DnsEndpoint { host: "::1".into(), ..name }]));
        discoverer.follow(std::slice::from_ref(&literal));
        settle().await;
        assert_eq!(known(&literal), ["[::1]:80"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cluster_that_is_gone_is_resolved_no_more() {
        let script = answers(&[Some(&["10.0.0.1"]), Some(&["10.0.0.2"]), Some(&["10.0.0.3"])]);
        let cluster = named(|name| Discovery::StrictDns(vec![name]));
        let discoverer = Discoverer::new(script.clone(), tokio::runtime::Handle::current());
        discoverer.follow(std::slice::from_ref(&cluster));
        settle().await;
        drop(cluster);
        for _ in 0..3 {
            tokio::time::advance(REFRESH).await;
            settle().await;
        }
        assert_eq!(script.0.lock().unwrap().len(), 1, "one look finds that nobody is there");
    }
}
