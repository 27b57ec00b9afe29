//! Endpoints and sets of endpoints.
//!
//! An [`Endpoint`] is runtime state: it is shared by every generation that names its address in the same cluster, so
//! that a reload does not forget what is in flight. A set is immutable and belongs to one generation, or to one answer
//! of the resolver; the weights are the set's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::outlier::Counters;

/// Turns of a weighted round robin that are laid out in advance; a set that needs more draws by weight.
const MAX_TURNS: u64 = 4096;

/// One address of a cluster.
#[derive(Debug)]
pub struct Endpoint {
    id: u64,
    addr: SocketAddr,
    in_flight: AtomicU32,
    connections: AtomicU32,
    requests: AtomicU64,
    retired: AtomicBool,
    /// Left out by outlier detection.
    ejected: AtomicBool,
    failures: Counters,
}

impl Endpoint {
    pub(crate) fn new(addr: SocketAddr) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            addr,
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

#[derive(Debug)]
struct Entry {
    endpoint: Arc<Endpoint>,
    weight: u32,
    upto: u64,
}

impl EndpointSet {
    /// The set of these endpoints; those of weight 0 are left out.
    #[must_use]
    pub fn new(endpoints: impl IntoIterator<Item = (Arc<Endpoint>, u32)>) -> Self {
        let mut total = 0_u64;
        let entries: Box<[_]> = endpoints
            .into_iter()
            .filter(|(_, weight)| *weight > 0)
            .map(|(endpoint, weight)| {
                total = total.saturating_add(u64::from(weight));
                Entry { endpoint, weight, upto: total }
            })
            .collect();
        let uniform = entries.windows(2).all(|pair| pair[0].weight == pair[1].weight);
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
        self.entries.iter().map(|entry| &entry.endpoint)
    }

    /// The endpoints with their weights, in order.
    pub fn weighted(&self) -> impl ExactSizeIterator<Item = (&Arc<Endpoint>, u32)> {
        self.entries.iter().map(|entry| (&entry.endpoint, entry.weight))
    }

    /// The endpoint whose share contains `draw`, a number below [`EndpointSet::total`].
    pub(crate) fn at_share(&self, draw: u64) -> Option<(&Arc<Endpoint>, u32)> {
        let index = if self.uniform && !self.entries.is_empty() {
            usize::try_from(draw / u64::from(self.entries[0].weight)).ok()?
        } else {
            self.entries.partition_point(|entry| entry.upto <= draw)
        };
        self.entries.get(index).map(|entry| (&entry.endpoint, entry.weight))
    }

    /// The sum of the weights.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The endpoint whose turn it is; `None` when turns by weight would be too many to lay out.
    pub(crate) fn at_turn(&self, turn: usize) -> Option<&Arc<Endpoint>> {
        let index = if self.uniform {
            turn.checked_rem(self.entries.len())?
        } else {
            *self.turns.get(turn.checked_rem(self.turns.len())?)? as usize
        };
        self.entries.get(index).map(|entry| &entry.endpoint)
    }
}

/// The smooth weighted order: over one period every endpoint has its weight in turns, spread evenly.
fn turns(entries: &[Entry]) -> Box<[u32]> {
    let divisor = entries.iter().fold(0, |divisor, entry| gcd(divisor, u64::from(entry.weight)));
    let period = entries.iter().map(|entry| u64::from(entry.weight) / divisor.max(1)).sum::<u64>();
    if period > MAX_TURNS || entries.len() as u64 > MAX_TURNS {
        return Box::default();
    }
    let mut credit: Vec<i64> = vec![0; entries.len()];
    let sum = entries.iter().map(|entry| i64::from(entry.weight)).sum::<i64>();
    (0..period)
        .filter_map(|_| {
            for (credit, entry) in credit.iter_mut().zip(entries) {
                *credit += i64::from(entry.weight);
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
