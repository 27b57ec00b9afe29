//! Picking an endpoint: pure functions of the set, a cursor and a seeded generator (DR-LB01, DR-LB09).

use std::sync::Arc;

use rand::{Rng, RngExt as _};

use crate::cluster::BalancerKind;
use crate::endpoint::{Endpoint, EndpointSet};

/// Picks an endpoint; `None` when there is none. `cursor` belongs to the cluster and the caller, and moves on with
/// every pick of a round robin.
pub fn pick<'e>(
    kind: BalancerKind,
    endpoints: &'e EndpointSet,
    cursor: &mut usize,
    rng: &mut impl Rng,
) -> Option<&'e Arc<Endpoint>> {
    if endpoints.len() <= 1 {
        return endpoints.iter().next();
    }
    match kind {
        BalancerKind::RoundRobin => {
            let turn = *cursor;
            *cursor = cursor.wrapping_add(1);
            endpoints.at_turn(turn).or_else(|| Some(by_weight(endpoints, rng)?.0))
        }
        BalancerKind::Random | BalancerKind::Passthrough => Some(by_weight(endpoints, rng)?.0),
        BalancerKind::LeastRequest => {
            let (first, first_weight) = by_weight(endpoints, rng)?;
            let (second, second_weight) = by_weight(endpoints, rng)?;
            // Compares load per weight without dividing: a/v < b/w is a*w < b*v.
            let load = |endpoint: &Endpoint, weight: u32| u64::from(endpoint.in_flight()) * u64::from(weight);
            let first_is_busier = load(first, second_weight) > load(second, first_weight);
            Some(if first_is_busier { second } else { first })
        }
    }
}

fn by_weight<'e>(endpoints: &'e EndpointSet, rng: &mut impl Rng) -> Option<(&'e Arc<Endpoint>, u32)> {
    endpoints.at_share(rng.random_range(0..endpoints.total()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;

    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::SmallRng;

    use super::*;

    fn set(weights: &[u32]) -> EndpointSet {
        EndpointSet::new(weights.iter().zip(1..).map(|(weight, port)| {
            (Arc::new(Endpoint::new(SocketAddr::from(([127, 0, 0, 1], port)))), *weight)
        }))
    }

    fn counts(kind: BalancerKind, endpoints: &EndpointSet, picks: usize) -> BTreeMap<u16, usize> {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut cursor = 0;
        let mut counts = BTreeMap::new();
        for _ in 0..picks {
            let endpoint = pick(kind, endpoints, &mut cursor, &mut rng).unwrap();
            *counts.entry(endpoint.addr().port()).or_default() += 1;
        }
        counts
    }

    #[test]
    fn dr_lb01_round_robin_is_exact() {
        assert_eq!(
            counts(BalancerKind::RoundRobin, &set(&[1, 1, 1]), 300),
            BTreeMap::from([(1, 100), (2, 100), (3, 100)])
        );
    }

    #[test]
    fn dr_lb09_weights_are_honoured_and_zero_takes_nothing() {
        let weighted = set(&[5, 0, 1]);
        assert_eq!(counts(BalancerKind::RoundRobin, &weighted, 600), BTreeMap::from([(1, 500), (3, 100)]));
        for kind in [BalancerKind::Random, BalancerKind::LeastRequest] {
            let counts = counts(kind, &weighted, 60_000);
            assert!(
                (49_000..51_000).contains(&counts[&1]) && !counts.contains_key(&2),
                "{kind:?} {counts:?}"
            );
        }
    }

    #[test]
    fn dr_lb01_least_request_prefers_the_less_loaded_of_two() {
        let endpoints = set(&[1, 1]);
        let busy: Vec<_> = (0..10).map(|_| endpoints.iter().next().unwrap().start_request()).collect();
        let counts = counts(BalancerKind::LeastRequest, &endpoints, 10_000);
        // The busy one is picked only when both draws name it.
        assert!((2_200..2_800).contains(&counts[&1]), "{counts:?}");
        drop(busy);
        assert_eq!(endpoints.iter().next().unwrap().in_flight(), 0);
    }

    #[test]
    fn nothing_is_picked_from_nothing() {
        let mut rng = SmallRng::seed_from_u64(1);
        for kind in [BalancerKind::RoundRobin, BalancerKind::Random, BalancerKind::LeastRequest] {
            assert!(pick(kind, &set(&[]), &mut 0, &mut rng).is_none());
            assert!(pick(kind, &set(&[0]), &mut 0, &mut rng).is_none());
        }
    }

    proptest! {
        #[test]
        fn dr_lb09_a_period_of_turns_has_exactly_the_weights(weights in proptest::collection::vec(1_u32..12, 1..8)) {
            let endpoints = set(&weights);
            let period: u32 = weights.iter().sum();
            let counts = counts(BalancerKind::RoundRobin, &endpoints, period as usize);
            let expected: BTreeMap<u16, usize> = if endpoints.len() == 1 {
                BTreeMap::from([(1, period as usize)])
            } else {
                (1..).zip(weights.iter().map(|weight| *weight as usize)).collect()
            };
            // Equal weights take turns by one, so a period of theirs is the number of endpoints; the counts agree.
            prop_assert_eq!(counts, expected);
        }
    }
}
