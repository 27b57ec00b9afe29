//! Endpoints and sets of endpoints.
//!
//! An [`Endpoint`] is runtime state: it is shared by every generation that names its address in the same cluster, so
//! that a reload does not forget what is in flight. A set is immutable and belongs to one generation, or to one answer
//! of the resolver; weights, priorities and localities are the set's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_core::{ClientTls, ConnectTarget, Spoken};

use crate::balance::peak_ewma::PeakEwma;
use crate::outlier::Counters;

/// Turns of a weighted round robin that are laid out in advance; a set that needs more draws by weight.
const MAX_TURNS: u64 = 4096;

/// One address of a cluster, and how the transport to it is secured. The same address secured otherwise is another
/// endpoint: it has connections of its own, and nothing of the one is sent over those of the other.
#[derive(Debug)]
pub struct Endpoint {
    id: u64,
    addr: SocketAddr,
    tls: Option<Arc<ClientTls>>,
    in_flight: AtomicU32,
    connections: AtomicU32,
    requests: AtomicU64,
    retired: AtomicBool,
    /// Left out by outlier detection.
    ejected: AtomicBool,
    failures: Counters,
    since: Instant,
    latency: PeakEwma,
}

impl Endpoint {
    #[cfg(test)]
    pub(crate) fn new(addr: SocketAddr) -> Self {
        Self::secured(addr, None)
    }

    pub(crate) fn secured(addr: SocketAddr, tls: Option<Arc<ClientTls>>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let since = mesh_core::clock::now();
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            since,
            latency: PeakEwma::new(since),
            addr,
            tls,
            in_flight: AtomicU32::new(0),
            connections: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            ejected: AtomicBool::new(false),
            failures: Counters::default(),
        }
    }

    /// A number that no other endpoint of this process has or had.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its address.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How the transport to it is secured; `None` is plaintext.
    #[must_use]
    pub fn tls(&self) -> Option<&Arc<ClientTls>> {
        self.tls.as_ref()
    }

    /// Where a connection to it goes.
    pub(crate) fn target(&self, spoken: Spoken) -> ConnectTarget {
        ConnectTarget { addr: self.addr, tls: self.tls.clone(), spoken }
    }

    /// Requests whose response has not ended.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Open connections, over all workers.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Requests that were sent to it since it appeared.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Whether the newest configuration, or the newest answer of the resolver, no longer has it: requests that were
    /// routed before may still go there, and its connections are not kept for others.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    /// Whether outlier detection leaves it out.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Ordering::Relaxed)
    }

    pub(crate) fn set_ejected(&self, ejected: bool) {
        self.ejected.store(ejected, Ordering::Relaxed);
    }

    /// When it first appeared in its cluster, from which a warm-up counts.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Tells how long the head of a response took, for [`BalancerKind::PeakEwma`](crate::BalancerKind::PeakEwma).
    pub fn observe(&self, rtt: Duration, now: Instant) {
        self.latency.observe(rtt, now);
    }

    /// What it is expected to cost: its latency, decayed to `now`, for each request in flight and one more.
    #[must_use]
    pub fn cost(&self, now: Instant) -> f64 {
        self.latency.read(now) * (f64::from(self.in_flight()) + 1.0)
    }

    /// Its consecutive failures.
    pub(crate) fn failures(&self) -> &Counters {
        &self.failures
    }

    pub(crate) fn set_retired(&self, retired: bool) {
        self.retired.store(retired, Ordering::Relaxed);
    }

    pub(crate) fn connections_counter(&self) -> &AtomicU32 {
        &self.connections
    }

    pub(crate) fn start_request(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }
}

/// One request in flight at an endpoint; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<Endpoint>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Endpoints with their weights, none of weight 0.
#[derive(Debug, Default)]
pub struct EndpointSet {
    entries: Box<[Entry]>,
    total: u64,
    /// The order of a weighted round robin; empty when every weight is the same or there would be too many turns.
    turns: Box<[u32]>,
    uniform: bool,
}

/// An endpoint as one set has it.
#[derive(Clone, Debug)]
pub struct Member {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// Its share, relative to its siblings; 0 takes no traffic.
    pub weight: u32,
    /// 0 is the first choice; higher ones take what lower ones cannot.
    pub priority: u32,
    /// `region/zone/subzone`; empty when not known.
    pub locality: Arc<str>,
}

impl Member {
    /// A member of priority 0 without locality.
    #[must_use]
    pub fn new(endpoint: Arc<Endpoint>, weight: u32) -> Self {
        Self { endpoint, weight, priority: 0, locality: Arc::from("") }
    }
}

#[derive(Debug)]
struct Entry {
    member: Member,
    upto: u64,
}

impl EndpointSet {
    /// The set of these endpoints, of priority 0 and without locality; those of weight 0 are left out.
    #[must_use]
    pub fn new(endpoints: impl IntoIterator<Item = (Arc<Endpoint>, u32)>) -> Self {
        Self::of(endpoints.into_iter().map(|(endpoint, weight)| Member::new(endpoint, weight)))
    }

    /// The set of these members; those of weight 0 are left out.
    #[must_use]
    pub fn of(members: impl IntoIterator<Item = Member>) -> Self {
        let mut total = 0_u64;
        let entries: Box<[_]> = members
            .into_iter()
            .filter(|member| member.weight > 0)
            .map(|member| {
                total = total.saturating_add(u64::from(member.weight));
                Entry { member, upto: total }
            })
            .collect();
        let uniform = entries.windows(2).all(|pair| pair[0].member.weight == pair[1].member.weight);
        let turns = if uniform { Box::default() } else { turns(&entries) };
        Self { entries, total, turns, uniform }
    }

    /// How many endpoints there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The endpoints in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Endpoint>> {
        self.entries.iter().map(|entry| &entry.member.endpoint)
    }

    /// The endpoints with what the set says of them, in order.
    pub fn members(&self) -> impl ExactSizeIterator<Item = &Member> {
        self.entries.iter().map(|entry| &entry.member)
    }

    /// The member at this place of the order.
    pub(crate) fn at(&self, index: usize) -> Option<&Member> {
        self.entries.get(index).map(|entry| &entry.member)
    }

    /// The locality of the first; of a set of one locality, that.
    pub(crate) fn locality(&self) -> &str {
        self.at(0).map_or("", |member| &*member.locality)
    }

    /// The member whose share contains `draw`, a number below [`EndpointSet::total`].
    pub(crate) fn at_share(&self, draw: u64) -> Option<&Member> {
        let index = if self.uniform && !self.entries.is_empty() {
            usize::try_from(draw / u64::from(self.entries[0].member.weight)).ok()?
        } else {
            self.entries.partition_point(|entry| entry.upto <= draw)
        };
        self.at(index)
    }

    /// The sum of the weights.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The member whose turn it is; `None` when turns by weight would be too many to lay out.
    pub(crate) fn at_turn(&self, turn: usize) -> Option<&Member> {
        let index = if self.uniform {
            turn.checked_rem(self.entries.len())?
        } else {
            *self.turns.get(turn.checked_rem(self.turns.len())?)? as usize
        };
        self.at(index)
    }
}

/// The smooth weighted order: over one period every endpoint has its weight in turns, spread evenly.
fn turns(entries: &[Entry]) -> Box<[u32]> {
    let divisor = entries.iter().fold(0, |divisor, entry| gcd(divisor, u64::from(entry.member.weight)));
    let period = entries.iter().map(|entry| u64::from(entry.member.weight) / divisor.max(1)).sum::<u64>();
    if period > MAX_TURNS || entries.len() as u64 > MAX_TURNS {
        return Box::default();
    }
    let mut credit: Vec<i64> = vec![0; entries.len()];
    let sum = entries.iter().map(|entry| i64::from(entry.member.weight)).sum::<i64>();
    (0..period)
        .filter_map(|_| {
            for (credit, entry) in credit.iter_mut().zip(entries) {
                *credit += i64::from(entry.member.weight);
            }
            // The first of equals, so that the order does not depend on anything else.
            let (index, credit) = credit
                .iter_mut()
                .enumerate()
                .max_by_key(|(index, credit)| (**credit, std::cmp::Reverse(*index)))?;
            *credit -= sum;
            u32::try_from(index).ok()
        })
        .collect()
}

const fn gcd(left: u64, right: u64) -> u64 {
    let (mut left, mut right) = (left, right);
    while right != 0 {
        (left, right) = (right, left % right);
    }
    left
}
