//! Picking an endpoint.
//!
//! A [`Balancer`] is what one cluster picks from: endpoints by priority and locality, hash tables, and which of the
//! endpoints are available. It is immutable. It is made anew, by whoever changes something (the configuration, the
//! resolver, outlier detection), and published to the workers, so that a pick is a pure function of balancer, key,
//! cursor, time and a seeded generator: it neither locks nor allocates, and looks at nobody's state but the numbers that
//! the algorithm compares.
//!
//! In this order: the priority by its load ([`priority`]), the locality by its weight where localities have weights, then
//! one of its available endpoints by the algorithm. With a hash, the table of the priority takes the place of the latter
//! two: it holds all endpoints, and steps over those that are out, so that nobody else's keys move.

mod least_request;
pub mod locality;
pub mod maglev;
pub mod peak_ewma;
pub mod priority;
mod random;
pub mod ring_hash;
mod round_robin;
mod service;
mod warm_up;
pub mod zone_aware;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Instant;

use rand::{Rng, RngExt as _};

pub use self::locality::LocalityWeights;
pub use self::round_robin::Cursors;
pub use self::service::{Balance, NotStatic};
pub use self::warm_up::WarmUp;
pub use self::zone_aware::ZoneAware;

use self::warm_up::Warming;
use crate::cluster::{BalancerKind, ClusterSpec};
use crate::endpoint::{Endpoint, EndpointSet, Member};
use crate::lock_order::{Ordered, TABLES};

/// How often an endpoint is drawn to find one that was not tried, as Istio sets it.
const HOST_SELECTIONS: usize = 5;

/// After how many tries the priorities of those before are left out, as Istio sets it.
const PRIORITY_UPDATES: usize = 2;

/// What a request wishes of a pick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice<'a> {
    /// The key; `None` picks by chance. Without meaning where the algorithm has no table.
    pub hash: Option<u64>,
    /// The ids of the endpoints that were tried before, in order.
    pub tried: &'a [u64],
    /// Picks again, up to five times, when an endpoint was tried before (`retryIgnorePreviousHosts`). Off where the
    /// algorithm has a table.
    pub ignore_previous_hosts: bool,
    /// After every second try leaves out the priorities that were tried while there are others
    /// (`retryRemoteLocalities`).
    pub remote_localities: bool,
}

/// What a cluster picks from.
#[derive(Debug)]
pub struct Balancer {
    layout: Arc<Layout>,
    levels: Box<[Level]>,
}

/// What stays when availability changes.
#[derive(Debug)]
struct Layout {
    kind: BalancerKind,
    warm_up: Option<WarmUp>,
    /// The panic threshold; `None` when nobody is ever out.
    panic_threshold: Option<u32>,
    zone_aware: Option<ZoneAware>,
    tiers: Box<[Tier]>,
}

/// All endpoints of a priority.
#[derive(Debug)]
struct Tier {
    priority: u32,
    endpoints: Arc<EndpointSet>,
    table: Option<Arc<Table>>,
    /// Weight and endpoints of each locality; empty when localities do not count. Of zone aware routing the weights are
    /// computed with what is available.
    localities: Box<[(u32, Arc<EndpointSet>)]>,
}

/// What a priority takes now.
#[derive(Debug)]
struct Level {
    load: priority::Load,
    /// How much it can take, in percent.
    available: u32,
    /// The loads up to here.
    upto: u32,
    /// Whether some endpoints are stepped over.
    partial: bool,
    parts: Box<[Part]>,
}

/// Endpoints that are available.
#[derive(Debug)]
struct Part {
    /// The weights of the localities up to here.
    upto: u64,
    /// The place of its cursor.
    index: usize,
    endpoints: Arc<EndpointSet>,
    warming: Option<Warming>,
}

impl Balancer {
    /// What a cluster with these endpoints picks from.
    #[must_use]
    pub fn new(spec: &ClusterSpec, endpoints: &Arc<EndpointSet>) -> Self {
        Self::with_tables(spec, endpoints, &Tables::default())
    }

    pub(crate) fn with_tables(spec: &ClusterSpec, endpoints: &Arc<EndpointSet>, tables: &Tables) -> Self {
        let warms_up = matches!(spec.balancer, BalancerKind::RoundRobin | BalancerKind::LeastRequest);
        let layout = Layout {
            kind: spec.balancer,
            warm_up: spec.warm_up.filter(|_| warms_up),
            panic_threshold: spec.outlier_detection.as_ref().map(|config| config.min_health_percent),
            zone_aware: spec.zone_aware.as_deref().cloned(),
            tiers: tiers(spec, endpoints, tables),
        };
        Self::available(Arc::new(layout))
    }

    /// The same with the endpoints that are available now.
    pub(crate) fn renew(&self) -> Self {
        Self::available(Arc::clone(&self.layout))
    }

    fn available(layout: Arc<Layout>) -> Self {
        let is_out = |endpoint: &Endpoint| layout.panic_threshold.is_some() && endpoint.is_ejected();
        let counts: Vec<_> = layout
            .tiers
            .iter()
            .map(|tier| {
                let all = tier.endpoints.len();
                (all - tier.endpoints.iter().filter(|endpoint| is_out(endpoint)).count(), all)
            })
            .collect();
        let loads = priority::loads(&counts, layout.panic_threshold.unwrap_or(0));
        let (mut upto, mut index) = (0, 0);
        let levels = layout.tiers.iter().zip(loads).zip(&counts).map(|((tier, load), (available, all))| {
            let partial = available < all && !load.panic;
            let left = |endpoints: &Arc<EndpointSet>| {
                if !partial {
                    return Arc::clone(endpoints);
                }
                let left = endpoints.members().filter(|member| !is_out(&member.endpoint)).cloned();
                Arc::new(EndpointSet::of(left))
            };
            let mut part = |upto, endpoints: Arc<EndpointSet>| {
                index += 1;
                let warming = Warming::of(layout.warm_up, &endpoints);
                Part { upto, index: index - 1, endpoints, warming }
            };
            let localities = (!load.panic)
                .then(|| tier.localities.iter().map(|(_, all)| left(all)).collect::<Vec<_>>())
                .and_then(|left| Some((tier.weights(layout.zone_aware.as_ref(), &left)?, left)));
            let parts: Box<[_]> = match localities {
                None => Box::new([part(1, left(&tier.endpoints))]),
                Some((weights, left)) => {
                    let mut upto = 0;
                    let upto = weights.into_iter().map(|weight| {
                        upto += weight;
                        upto
                    });
                    upto.zip(left).map(|(upto, left)| part(upto, left)).collect()
                }
            };
            upto += load.percent;
            let available = if load.panic { 100 } else { priority::available(*available, *all) };
            Level { load, available, upto, partial, parts }
        });
        let levels = levels.collect();
        Self { layout, levels }
    }

    /// How it picks.
    #[must_use]
    pub fn kind(&self) -> BalancerKind {
        self.layout.kind
    }

    /// Each priority with what it takes and all its endpoints.
    pub fn priorities(&self) -> impl ExactSizeIterator<Item = (u32, priority::Load, &EndpointSet)> {
        let both = self.layout.tiers.iter().zip(&self.levels);
        both.map(|(tier, level)| (tier.priority, level.load, &*tier.endpoints))
    }

    /// Of each priority, in the same order, its localities with their shares of it in percent; none where localities do
    /// not count.
    pub fn localities(&self) -> impl ExactSizeIterator<Item = Vec<(&str, f64)>> {
        let both = self.layout.tiers.iter().zip(&self.levels);
        both.map(|(tier, level)| level.shares(tier))
    }

    /// Picks an endpoint; `None` when none is available. `cursors` belong to the cluster and the caller; `now` is asked
    /// for only where time counts.
    pub fn pick(
        &self,
        choice: &Choice<'_>,
        cursors: &mut Cursors,
        rng: &mut impl Rng,
        now: impl Fn() -> Instant,
    ) -> Option<&Arc<Endpoint>> {
        if self.layout.kind.is_by_hash() {
            let hash = choice.hash.unwrap_or_else(|| rng.random());
            let (tier, level) = self.level(choice, || (hash % 100) as u32)?;
            return tier.table.as_ref()?.pick(hash, &tier.endpoints, level.partial);
        }
        let mut draw = || {
            let (_, level) = self.level(choice, || rng.random_range(0..100))?;
            let part = level.part(rng)?;
            self.pick_of(part, cursors, rng, &now).map(|member| &member.endpoint)
        };
        let mut picked = draw()?;
        if choice.ignore_previous_hosts && !choice.tried.is_empty() {
            for _ in 1..HOST_SELECTIONS {
                if !choice.tried.contains(&picked.id()) {
                    break;
                }
                picked = draw()?;
            }
            // As a last resort by looking: draws may miss the only one that is left.
            if choice.tried.contains(&picked.id()) {
                picked = self.untried(choice, rng).unwrap_or(picked);
            }
        }
        Some(picked)
    }

    /// One of the endpoints that take requests now and were not tried; `None` when all were.
    fn untried(&self, choice: &Choice<'_>, rng: &mut impl Rng) -> Option<&Arc<Endpoint>> {
        let parts =
            || self.levels.iter().filter(|level| level.load.percent > 0).flat_map(|level| &level.parts);
        let left = || {
            let all = parts().flat_map(|part| part.endpoints.iter());
            all.filter(|endpoint| !choice.tried.contains(&endpoint.id()))
        };
        match left().count() {
            0 => None,
            count => left().nth(rng.random_range(0..count)),
        }
    }

    fn pick_of<'e, R: Rng>(
        &self,
        part: &'e Part,
        cursors: &mut Cursors,
        rng: &mut R,
        now: &impl Fn() -> Instant,
    ) -> Option<&'e Member> {
        let endpoints = &*part.endpoints;
        if endpoints.len() <= 1 {
            return endpoints.at(0);
        }
        let mut draw = |rng: &mut R| match self.layout.kind {
            BalancerKind::RoundRobin => round_robin::pick(endpoints, cursors.next(part.index), rng),
            BalancerKind::LeastRequest => least_request::pick(endpoints, rng),
            BalancerKind::PeakEwma => peak_ewma::pick(endpoints, now(), rng),
            _ => random::pick(endpoints, rng),
        };
        match &part.warming {
            None => draw(rng),
            Some(warming) => warming.draw(now(), rng, draw),
        }
    }

    fn level(&self, choice: &Choice<'_>, draw: impl FnOnce() -> u32) -> Option<(&Tier, &Level)> {
        let index = match &*self.levels {
            [] => return None,
            [only] => (only.load.percent > 0).then_some(0)?,
            levels => {
                let draw = draw();
                match self.remote(choice, draw) {
                    Some(index) => index,
                    None => levels.iter().position(|level| draw < level.upto)?,
                }
            }
        };
        Some((&self.layout.tiers[index], &self.levels[index]))
    }

    /// The priority of a retry that leaves out those that were tried: what the others can take, in order. `None` when
    /// it is like any other, or all were tried.
    fn remote(&self, choice: &Choice<'_>, draw: u32) -> Option<usize> {
        let counted = choice.tried.len() - choice.tried.len() % PRIORITY_UPDATES;
        if !choice.remote_localities || counted == 0 {
            return None;
        }
        let tried = &choice.tried[..counted];
        let left = || {
            let was_tried =
                |tier: &Tier| tier.endpoints.iter().any(|endpoint| tried.contains(&endpoint.id()));
            let tiers = self.layout.tiers.iter().zip(&self.levels).enumerate();
            tiers.filter(move |(_, (tier, _))| !was_tried(tier)).map(|(at, (_, level))| (at, level.available))
        };
        let total = left().map(|(_, available)| available).sum::<u32>().min(100);
        let mut upto = 0;
        left().find_map(|(at, available)| {
            upto += (available * 100).checked_div(total)?;
            (draw < upto).then_some(at)
        })
    }
}

impl Tier {
    /// The weight of each locality, of which so many endpoints are left; `None` when localities do not count.
    fn weights(&self, zone_aware: Option<&ZoneAware>, left: &[Arc<EndpointSet>]) -> Option<Vec<u64>> {
        let both = || self.localities.iter().zip(left);
        match zone_aware {
            _ if self.localities.is_empty() => None,
            Some(zone_aware) => {
                let counts = both().map(|((_, all), left)| (all.locality(), left.len()));
                zone_aware.weights(&counts.collect::<Vec<_>>())
            }
            None => {
                let weight = |((weight, all), left): (&(u32, Arc<EndpointSet>), &Arc<EndpointSet>)| {
                    u64::from(*weight) * u64::from(priority::available(left.len(), all.len()))
                };
                Some(both().map(weight).collect())
            }
        }
    }
}

impl Level {
    /// The localities of its tier with their shares in percent; none when localities do not count.
    fn shares<'t>(&self, tier: &'t Tier) -> Vec<(&'t str, f64)> {
        if self.parts.len() != tier.localities.len() {
            return Vec::new();
        }
        let total = self.parts.last().map_or(0, |last| last.upto).max(1) as f64;
        let from = std::iter::once(0).chain(self.parts.iter().map(|part| part.upto));
        let shares =
            self.parts.iter().zip(from).map(|(part, from)| (part.upto - from) as f64 * 100.0 / total);
        tier.localities.iter().map(|(_, endpoints)| endpoints.locality()).zip(shares).collect()
    }

    fn part(&self, rng: &mut impl Rng) -> Option<&Part> {
        match &*self.parts {
            [only] => Some(only),
            [.., last] if last.upto > 0 => {
                let draw = rng.random_range(0..last.upto);
                self.parts.get(self.parts.partition_point(|part| part.upto <= draw))
            }
            _ => None,
        }
    }
}

/// The endpoints by priority.
fn tiers(spec: &ClusterSpec, endpoints: &Arc<EndpointSet>, tables: &Tables) -> Box<[Tier]> {
    let mut by_priority: BTreeMap<u32, Vec<Member>> = BTreeMap::new();
    for member in endpoints.members() {
        by_priority.entry(member.priority).or_default().push(member.clone());
    }
    let is_table = spec.balancer.is_by_hash();
    let zone_aware = spec.zone_aware.is_some() && !is_table;
    let whole = by_priority.len() == 1 && spec.locality_weights.is_none() && !zone_aware;
    by_priority
        .into_iter()
        .enumerate()
        .map(|(at, (priority, members))| {
            let localities = match &spec.locality_weights {
                Some(weights) => Some(weights.split(&members)),
                // Zones count in the first priority alone, as in Envoy.
                None if zone_aware && at == 0 => Some(locality::group(&members)),
                None => None,
            };
            let (endpoints, localities): (_, Box<[_]>) = match localities {
                None if whole => (Arc::clone(endpoints), Box::default()),
                None => (Arc::new(EndpointSet::of(members)), Box::default()),
                // A table has no localities: their weights become those of the endpoints.
                Some(localities) if is_table => {
                    (Arc::new(EndpointSet::of(locality::flatten(localities))), Box::default())
                }
                Some(localities) => {
                    let sets = localities
                        .into_iter()
                        .map(|(weight, members)| (weight, Arc::new(EndpointSet::of(members))));
                    let sets: Box<[_]> = sets.collect();
                    let all = sets.iter().flat_map(|(_, set)| set.members()).cloned();
                    (Arc::new(EndpointSet::of(all)), sets)
                }
            };
            let table = is_table.then(|| tables.get(spec.balancer, &endpoints));
            Tier { priority, endpoints, table, localities }
        })
        .filter(|tier| !tier.endpoints.is_empty())
        .collect()
}

/// A table that finds the endpoint of a key, by its index in the set.
#[derive(Debug)]
enum Table {
    Ring(ring_hash::Ring),
    Maglev(maglev::Maglev),
}

impl Table {
    fn new(kind: BalancerKind, endpoints: &EndpointSet) -> Self {
        match kind {
            BalancerKind::Maglev { table_size } => Self::Maglev(maglev::Maglev::new(endpoints, table_size)),
            BalancerKind::RingHash { minimum_size } => {
                Self::Ring(ring_hash::Ring::new(endpoints, minimum_size))
            }
            _ => Self::Ring(ring_hash::Ring::new(endpoints, ring_hash::MINIMUM_SIZE)),
        }
    }

    fn pick<'e>(&self, hash: u64, endpoints: &'e EndpointSet, partial: bool) -> Option<&'e Arc<Endpoint>> {
        let wanted = |endpoint: &Endpoint| !partial || !endpoint.is_ejected();
        match self {
            Self::Ring(ring) => ring.pick(hash, endpoints, wanted),
            Self::Maglev(maglev) => maglev.pick(hash, endpoints, wanted),
        }
    }
}

/// The tables of a process: clusters with equal endpoints share theirs. Only who makes clusters or resolves names comes
/// here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tables(Arc<Ordered<TABLES, HashMap<TableKey, Weak<Table>>>>);

type TableKey = (BalancerKind, Box<[(SocketAddr, u32)]>);

impl Tables {
    fn get(&self, kind: BalancerKind, endpoints: &EndpointSet) -> Arc<Table> {
        let members = endpoints.members().map(|member| (member.endpoint.addr(), member.weight)).collect();
        let mut tables = self.0.lock();
        let key = (kind, members);
        if let Some(table) = tables.get(&key).and_then(Weak::upgrade) {
            return table;
        }
        tables.retain(|_, table| table.strong_count() > 0);
        let table = Arc::new(Table::new(kind, endpoints));
        tables.insert(key, Arc::downgrade(&table));
        table
    }
}

#[cfg(test)]
mod tests;
