//! Zone aware routing (DR-LB07): as many requests as possible stay in the client's own locality, as long as no endpoint
//! gets more than its share.
//!
//! Envoy's rules. Where the share of the endpoints that a locality has is at least its share of the clients, its clients
//! ask nobody else. Otherwise they ask their own for as much as those can take, and the others by what these have left
//! over. Who the other clients are is known from the service that the client itself belongs to; all of them are thought
//! to send alike. It comes to weights of localities, computed anew whenever availability changes, so that a pick costs
//! what it costs with weights.

use std::collections::BTreeMap;
use std::sync::Arc;

/// `minClusterSize` where none is given.
pub const MIN_CLUSTER_SIZE: u32 = 6;

/// What shares are counted in, as in Envoy.
const WHOLE: u64 = 10_000;

/// The client's side of zone aware routing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneAware {
    /// Where the client is: `region/zone/subzone`.
    pub local: Arc<str>,
    /// How many clients each locality has, this one among them.
    pub clients: BTreeMap<Arc<str>, u32>,
    /// Available endpoints of the first priority below which zones do not count. Default 6.
    pub min_cluster_size: u32,
}

impl ZoneAware {
    /// The weights of localities with so many available endpoints each; `None` when zones do not count: with one
    /// locality, nobody at home, or fewer endpoints than [`ZoneAware::min_cluster_size`].
    pub(super) fn weights(&self, localities: &[(&str, usize)]) -> Option<Vec<u64>> {
        let endpoints: u64 = localities.iter().map(|(_, available)| *available as u64).sum();
        let clients: u64 = self.clients.values().copied().map(u64::from).sum();
        let local = localities.iter().position(|(name, _)| *name == &*self.local)?;
        if localities.len() < 2
            || localities[local].1 == 0
            || endpoints < u64::from(self.min_cluster_size)
            || clients == 0
        {
            return None;
        }
        let shares: Vec<_> = localities
            .iter()
            .map(|(name, available)| {
                let asking = u64::from(self.clients.get(*name).copied().unwrap_or(0));
                (asking * WHOLE / clients, *available as u64 * WHOLE / endpoints)
            })
            .collect();
        let (asking, offered) = shares[local];
        if offered >= asking {
            return Some((0..localities.len()).map(|at| u64::from(at == local)).collect());
        }
        let stays = offered * WHOLE / asking;
        let left_over: Vec<_> =
            shares.iter().map(|(asking, offered)| offered.saturating_sub(*asking)).collect();
        // Rounding may leave nothing over: then the rest is everybody's.
        let left_over =
            if left_over.iter().all(|left| *left == 0) { vec![1; shares.len()] } else { left_over };
        let total: u64 = left_over.iter().sum();
        let weight =
            |(at, left): (usize, &u64)| (WHOLE - stays) * left + if at == local { stays * total } else { 0 };
        Some(left_over.iter().enumerate().map(weight).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone_aware(clients: &[(&str, u32)]) -> ZoneAware {
        let clients = clients.iter().map(|(name, count)| (Arc::from(*name), *count)).collect();
        ZoneAware { local: "a".into(), clients, min_cluster_size: 6 }
    }

    /// The share of each locality, in whole percents.
    fn percents(clients: &[(&str, u32)], localities: &[(&str, usize)]) -> Option<Vec<u64>> {
        let weights = zone_aware(clients).weights(localities)?;
        let total: u64 = weights.iter().sum();
        Some(weights.iter().map(|weight| (weight * 100 + total / 2) / total).collect())
    }

    #[test]
    fn dr_lb07_requests_stay_where_there_is_room_and_overflow_by_what_is_left() {
        let even = [("a", 1), ("b", 1)];
        assert_eq!(percents(&even, &[("a", 3), ("b", 3)]), Some(vec![100, 0]));
        assert_eq!(percents(&even, &[("a", 5), ("b", 3)]), Some(vec![100, 0]));
        // A quarter of the endpoints for half of the clients: half of their requests go elsewhere.
        assert_eq!(percents(&even, &[("a", 2), ("b", 6)]), Some(vec![50, 50]));
        // All clients are here, so each locality gets the share of its endpoints.
        assert_eq!(percents(&[("a", 4)], &[("a", 2), ("b", 2), ("c", 4)]), Some(vec![25, 25, 50]));
        // What b has is taken by its own clients, c has clients for less than it could take.
        assert_eq!(
            percents(&[("a", 2), ("b", 1), ("c", 1)], &[("a", 2), ("b", 2), ("c", 4)]),
            Some(vec![50, 0, 50])
        );
    }

    #[test]
    fn dr_lb07_whatever_the_numbers_no_endpoint_gets_more_than_its_share() {
        // Every client follows the rule; each locality's endpoints then get what its number of them deserves, or less
        // where another keeps its own requests. The bound is Envoy's purpose in words: about the same load everywhere.
        for (a, b, c) in [(1, 2, 3), (4, 1, 1), (2, 2, 2), (5, 3, 1)] {
            for (x, y, z) in [(6, 3, 3), (2, 4, 6), (1, 1, 10), (4, 4, 4)] {
                let localities = [("a", x), ("b", y), ("c", z)];
                let clients = [("a", a), ("b", b), ("c", c)];
                let mut load = [0.0_f64; 3];
                for (at, (name, count)) in clients.iter().enumerate() {
                    let client = ZoneAware { local: (*name).into(), ..zone_aware(&clients) };
                    let weights = client.weights(&localities).unwrap();
                    let total: u64 = weights.iter().sum();
                    assert!(weights[at] > 0, "its own locality always has a part");
                    for (load, weight) in load.iter_mut().zip(weights) {
                        *load += f64::from(*count) * weight as f64 / total as f64;
                    }
                }
                let fair = f64::from(a + b + c) / (x + y + z) as f64;
                for (load, (_, endpoints)) in load.iter().zip(localities) {
                    let each = load / endpoints as f64;
                    assert!(
                        (each / fair - 1.0).abs() < 0.01,
                        "{each} for {fair}: {clients:?} {localities:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn dr_lb07_when_zones_do_not_count() {
        let even = [("a", 1), ("b", 1)];
        assert_eq!(percents(&even, &[("a", 6)]), None, "one locality");
        assert_eq!(percents(&even, &[("a", 2), ("b", 3)]), None, "fewer than six");
        assert_eq!(percents(&even, &[("a", 0), ("b", 9)]), None, "nobody at home");
        assert_eq!(percents(&even, &[("b", 3), ("c", 3)]), None);
        assert_eq!(percents(&[], &[("a", 3), ("b", 3)]), None, "the client belongs to no service");
        // A client that is not among those that are counted: nobody else is here, so its own have room.
        assert_eq!(percents(&[("b", 2)], &[("a", 3), ("b", 3)]), Some(vec![100, 0]));
    }
}
