//! What a cluster is: the compiled, immutable half.
//!
//! A [`Cluster`] says where a destination's endpoints come from and how to talk to them. It holds no runtime state:
//! connections, in-flight counts and resolved addresses live in [`ClusterRuntime`](crate::runtime), keyed by the
//! cluster's name, and survive a reload whose defining fields are equal. The compiler makes clusters, the registry
//! attaches each to its runtime before the snapshot is published, and a route holds its clusters directly, so that
//! no request looks a name up.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;

use mesh_core::{ClusterName, UpstreamTls};

use crate::balance::locality::{ClientLocality, LocalityPreference, Place};
use crate::balance::{Balancer, LocalityWeights, Tables, WarmUp, ZoneAware, maglev, ring_hash};
use crate::endpoint::EndpointSet;
use crate::hash_policy::HashPolicy;
use crate::outlier::OutlierDetection;
use crate::retry::RetryBudget;
use crate::runtime::ClusterRuntime;

/// A cluster that routes hold: what configuration says of it, and the runtime that the registry attached.
#[derive(Debug)]
pub struct Cluster {
    spec: ClusterSpec,
    attached: OnceLock<Attached>,
}

#[derive(Debug)]
struct Attached {
    runtime: Arc<ClusterRuntime>,
    /// The endpoints that configuration lists; `None` when the runtime finds them.
    listed: Option<Arc<EndpointSet>>,
    balancer: ArcSwap<Balancer>,
}

impl Cluster {
    /// A cluster without runtime; [`Clusters::reconcile`](crate::Clusters::reconcile) attaches it.
    #[must_use]
    pub fn new(spec: ClusterSpec) -> Self {
        Self { spec, attached: OnceLock::new() }
    }

    /// What configuration says of it.
    #[must_use]
    pub fn spec(&self) -> &ClusterSpec {
        &self.spec
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &ClusterName {
        &self.spec.name
    }

    /// Its runtime; `None` until a registry attached it.
    #[must_use]
    pub fn runtime(&self) -> Option<&Arc<ClusterRuntime>> {
        self.attached.get().map(|attached| &attached.runtime)
    }

    /// Its endpoints now; none before a registry attached it.
    #[must_use]
    pub fn endpoints(&self) -> Arc<EndpointSet> {
        match self.attached.get() {
            Some(Attached { listed: Some(listed), .. }) => Arc::clone(listed),
            Some(Attached { runtime, .. }) => runtime.resolved(),
            None => Arc::default(),
        }
    }

    /// What it picks from now; `None` until a registry attached it.
    #[must_use]
    pub fn balancer(&self) -> Option<Arc<Balancer>> {
        self.attached.get().map(|attached| attached.balancer.load_full())
    }

    /// What it picks from now, for one look.
    pub(crate) fn with_balancer<T>(&self, look: impl FnOnce(&Balancer) -> T) -> Option<T> {
        self.attached.get().map(|attached| look(&attached.balancer.load()))
    }

    /// The resolver has found others.
    pub(crate) fn endpoints_changed(&self, tables: &Tables) {
        if let Some(Attached { listed: None, runtime, balancer }) = self.attached.get() {
            balancer.store(Arc::new(Balancer::with_tables(&self.spec, &runtime.resolved(), tables)));
        }
    }

    /// An endpoint was ejected, or has returned.
    pub(crate) fn availability_changed(&self) {
        if let Some(attached) = self.attached.get() {
            let renewed = attached.balancer.load().renew();
            attached.balancer.store(Arc::new(renewed));
        }
    }

    /// Attaches the runtime, which counts this cluster among its holders already, and the endpoints that
    /// configuration lists.
    pub(crate) fn attach(
        &self,
        runtime: Arc<ClusterRuntime>,
        listed: Option<Arc<EndpointSet>>,
        tables: &Tables,
    ) {
        let endpoints = listed.clone().unwrap_or_else(|| runtime.resolved());
        let balancer = ArcSwap::from_pointee(Balancer::with_tables(&self.spec, &endpoints, tables));
        // A cluster belongs to one registry; the first keeps it.
        if let Err(second) = self.attached.set(Attached { runtime, listed, balancer }) {
            second.runtime.release();
        }
    }

    /// Where its endpoints are, in words: the addresses that are known now, or why there are none.
    #[must_use]
    pub fn describe_endpoints(&self) -> Vec<String> {
        let known = self.endpoints();
        if !known.is_empty() {
            return known.iter().map(|endpoint| endpoint.addr().to_string()).collect();
        }
        match &self.spec.discovery {
            Discovery::Static(endpoints) => {
                endpoints.iter().map(|endpoint| endpoint.addr.to_string()).collect()
            }
            Discovery::StrictDns(names) => {
                names.iter().map(|name| format!("{}:{}", name.host, name.port)).collect()
            }
            Discovery::LogicalDns(name) => vec![format!("{}:{}", name.host, name.port)],
            Discovery::OriginalDst | Discovery::OriginalDstPort(_) => vec!["original destination".to_owned()],
            Discovery::BlackHole => Vec::new(),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(attached) = self.attached.get() {
            attached.runtime.release();
        }
    }
}

/// A cluster as configuration defines it.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterSpec {
    /// Its name, the key of its runtime state.
    pub name: ClusterName,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// How an endpoint is picked.
    pub balancer: BalancerKind,
    /// Where the key of a request is, for the kinds that go by one; `None`, the default, picks by chance.
    pub hash_policy: Option<Box<HashPolicy>>,
    /// The weights of localities; `None`, the default, when localities do not count.
    pub locality_weights: Option<LocalityWeights>,
    /// Keeps requests in the client's locality as far as its endpoints can take them, with the kinds that go by no key;
    /// `None`, the default, does not. Without meaning beside `locality_weights`.
    pub zone_aware: Option<Box<ZoneAware>>,
    /// How endpoints that have just appeared take their share, with the kinds that take turns or count requests;
    /// `None`, the default, at once.
    pub warm_up: Option<WarmUp>,
    /// The protocol spoken to its endpoints.
    pub protocol: UpstreamProtocol,
    /// How the transport to its endpoints is secured.
    pub tls: UpstreamTls,
    /// Limits and time-outs of its connections.
    pub pool: PoolSettings,
    /// How often its names are resolved again, where it has names. Default 60 s, Istio's `dnsRefreshRate`.
    pub dns_refresh_rate: Duration,
    /// When endpoints that fail are left out; `None`, the default, is never.
    pub outlier_detection: Option<Box<OutlierDetection>>,
    /// How many retries it bears; `None`, the default, sets no limit beside `max_retries`.
    pub retry_budget: Option<RetryBudget>,
}

/// Where the endpoints of a cluster come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// A fixed list.
    Static(Vec<EndpointSpec>),
    /// Names that are resolved in the background; every record of every name is an endpoint.
    StrictDns(Vec<DnsEndpoint>),
    /// One name; new connections go to the first record of the last answer.
    LogicalDns(DnsEndpoint),
    /// The destination before the redirect; a request without one has no endpoint (503 `UH`).
    OriginalDst,
    /// The destination before the redirect, at this port of the loopback address or of the original address.
    OriginalDstPort(u16),
    /// Nothing: every request is answered 502, as Istio's BlackHoleCluster does.
    BlackHole,
}

/// One endpoint with a known address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Its address.
    pub addr: SocketAddr,
    /// Its share, relative to its siblings. Default 1; 0 takes no traffic.
    pub weight: u32,
    /// `region/zone/subzone`; empty when not known.
    pub locality: Arc<str>,
    /// Its labels, sorted by key.
    pub labels: Arc<[(String, String)]>,
    /// 0, the default, is the first choice; higher ones take what lower ones cannot.
    pub priority: u32,
    /// Whether it shows an identity of the mesh, for clusters that are secured where one is shown. Default no.
    pub has_identity: bool,
}

impl EndpointSpec {
    /// An endpoint of weight 1 and priority 0, without locality and labels.
    #[must_use]
    pub fn new(addr: SocketAddr) -> Self {
        Self {
            addr,
            weight: 1,
            locality: Arc::from(""),
            labels: Arc::from([]),
            priority: 0,
            has_identity: false,
        }
    }
}

/// One endpoint whose name is resolved in the background.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsEndpoint {
    /// The name, or an address in text form.
    pub host: Arc<str>,
    /// The port.
    pub port: u16,
    /// The share of each of its addresses.
    pub weight: u32,
    /// `region/zone/subzone`; empty when not known.
    pub locality: Arc<str>,
    /// Its labels, sorted by key.
    pub labels: Arc<[(String, String)]>,
    /// 0, the default, is the first choice; higher ones take what lower ones cannot.
    pub priority: u32,
    /// Whether it shows an identity of the mesh. Default no.
    pub has_identity: bool,
}

impl DnsEndpoint {
    /// An endpoint of weight 1 and priority 0, without locality and labels.
    #[must_use]
    pub fn new(host: impl Into<Arc<str>>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
            weight: 1,
            locality: Arc::from(""),
            labels: Arc::from([]),
            priority: 0,
            has_identity: false,
        }
    }
}

/// How an endpoint is picked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BalancerKind {
    /// The less loaded of two random ones, by requests in flight and weight.
    #[default]
    LeastRequest,
    /// In turn, by weight.
    RoundRobin,
    /// At random, by weight.
    Random,
    /// The destination before the redirect.
    Passthrough,
    /// By the key of the request, on a ring.
    RingHash {
        /// Least places on the ring; 1024 for Istio.
        minimum_size: u64,
    },
    /// By the key of the request, in Maglev's table.
    Maglev {
        /// The places of the table, a prime number; 65 537 for Istio.
        table_size: u32,
    },
    /// The one of two random ones that is expected to answer first, by its latency and its requests in flight
    /// (DR-LB10; an extension).
    PeakEwma,
}

impl BalancerKind {
    /// A ring of Istio's default size.
    #[must_use]
    pub const fn ring_hash() -> Self {
        Self::RingHash { minimum_size: ring_hash::MINIMUM_SIZE }
    }

    /// Maglev's table of Istio's default size.
    #[must_use]
    pub const fn maglev() -> Self {
        Self::Maglev { table_size: maglev::TABLE_SIZE }
    }

    /// Whether the key of a request decides.
    #[must_use]
    pub const fn is_by_hash(self) -> bool {
        matches!(self, Self::RingHash { .. } | Self::Maglev { .. })
    }
}

/// The protocol spoken to the endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// What the downstream spoke.
    Downstream,
}

/// Limits and time-outs of a cluster's connections: DestinationRule's `connectionPool`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSettings {
    /// Connections per cluster and proxy. Default 2³²−1.
    pub max_connections: u32,
    /// Time for a connection to be made. Default 10 s.
    pub connect_timeout: Duration,
    /// Requests that wait for a connection, h2 included. Default 2³²−1.
    pub max_pending_requests: u32,
    /// Requests in flight, h1 included. Default 2³²−1.
    pub max_requests: u32,
    /// Retries in flight. Default 2³²−1.
    pub max_retries: u32,
    /// Requests after which a connection is closed; `None` is no limit.
    pub max_requests_per_connection: Option<u32>,
    /// Streams per h2 connection. Default 2³¹−1.
    pub max_concurrent_streams: u32,
    /// How long a connection may be without a request; `None` is for ever. Default 1 h.
    pub idle_timeout: Option<Duration>,
    /// How long a connection that is not HTTP may carry no byte; `None` is for ever. Default 1 h.
    pub tcp_idle_timeout: Option<Duration>,
    /// How long a connection may live; `None` is for ever, the default.
    pub max_connection_duration: Option<Duration>,
    /// TCP keep-alive of the connections; `None` leaves it off, the default.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Pings on HTTP/2 connections; `None` sends none, the default.
    pub http2_keepalive: Option<Http2Keepalive>,
}

/// Pings on HTTP/2 connections, whether or not they carry requests, as Envoy sends them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Http2Keepalive {
    /// Time between pings.
    pub interval: Duration,
    /// How long an answer may take; a connection without one is closed, and its requests fail.
    pub timeout: Duration,
}

/// TCP keep-alive; an unset part is the operating system's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TcpKeepalive {
    /// Probes without an answer after which the connection is dead.
    pub probes: Option<u32>,
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            max_connections: u32::MAX,
            connect_timeout: Duration::from_secs(10),
            max_pending_requests: u32::MAX,
            max_requests: u32::MAX,
            max_retries: u32::MAX,
            max_requests_per_connection: None,
            max_concurrent_streams: (1 << 31) - 1,
            idle_timeout: Some(Duration::from_secs(3600)),
            tcp_idle_timeout: Some(Duration::from_secs(3600)),
            max_connection_duration: None,
            tcp_keepalive: None,
            http2_keepalive: None,
        }
    }
}

impl ClusterSpec {
    /// A cluster with the defaults of every other field.
    #[must_use]
    pub fn new(name: ClusterName, discovery: Discovery) -> Self {
        Self {
            name,
            discovery,
            balancer: BalancerKind::default(),
            hash_policy: None,
            locality_weights: None,
            zone_aware: None,
            warm_up: None,
            protocol: UpstreamProtocol::default(),
            tls: UpstreamTls::default(),
            pool: PoolSettings::default(),
            dns_refresh_rate: crate::discover::REFRESH,
            outlier_detection: None,
            retry_budget: None,
        }
    }

    /// Picks by this algorithm.
    #[must_use]
    pub fn with_balancer(self, balancer: BalancerKind) -> Self {
        Self { balancer, ..self }
    }

    /// Keeps requests with the same key at the same endpoint, with an algorithm that goes by keys
    /// ([`BalancerKind::ring_hash`], [`BalancerKind::maglev`]).
    #[must_use]
    pub fn with_hash_policy(self, balancer: BalancerKind, policy: HashPolicy) -> Self {
        Self { balancer, hash_policy: Some(Box::new(policy)), ..self }
    }

    /// Gives endpoints that have just appeared a growing share.
    #[must_use]
    pub fn with_warm_up(self, warm_up: WarmUp) -> Self {
        Self { warm_up: Some(warm_up), ..self }
    }

    /// Prefers endpoints as a client does: writes the priorities of the endpoints, or the weights of their localities.
    /// A priority is left for the next only when its endpoints are ejected, so failover wants outlier detection.
    #[must_use]
    pub fn with_locality_preference(
        mut self,
        preference: &LocalityPreference,
        client: &ClientLocality,
    ) -> Self {
        let places = self.places();
        if !preference.distribute.is_empty() {
            self.locality_weights = preference.weights(client, &places);
            return self;
        }
        let priorities = preference.priorities(client, &places);
        self.prioritise(priorities);
        self
    }

    /// Prefers the client's region, and within it its locality as far as the endpoints there can take its requests
    /// (DR-LB07). `preference` says in which order other regions come; its `distribute` means nothing here.
    #[must_use]
    pub fn with_zone_aware_routing(
        mut self,
        preference: &LocalityPreference,
        client: &ClientLocality,
        zone_aware: Option<ZoneAware>,
    ) -> Self {
        let priorities = preference.regions(client, &self.places());
        self.prioritise(priorities);
        self.zone_aware = zone_aware.map(Box::new);
        self
    }

    /// Where the endpoints are that configuration lists.
    fn places(&self) -> Vec<Place<'_>> {
        match &self.discovery {
            Discovery::Static(endpoints) => endpoints
                .iter()
                .map(|it| Place { locality: &it.locality, labels: &it.labels, weight: it.weight })
                .collect(),
            Discovery::StrictDns(names) => names
                .iter()
                .map(|it| Place { locality: &it.locality, labels: &it.labels, weight: it.weight })
                .collect(),
            _ => Vec::new(),
        }
    }

    /// Gives the endpoints that configuration lists these priorities.
    fn prioritise(&mut self, priorities: Vec<u32>) {
        match &mut self.discovery {
            Discovery::Static(endpoints) => {
                for (endpoint, priority) in endpoints.iter_mut().zip(priorities) {
                    endpoint.priority = priority;
                }
            }
            Discovery::StrictDns(names) => {
                for (name, priority) in names.iter_mut().zip(priorities) {
                    name.priority = priority;
                }
            }
            _ => {}
        }
    }
}
