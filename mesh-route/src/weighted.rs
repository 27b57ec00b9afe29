//! The weighted choice among the destinations of a route: the canary split.
//!
//! A share is weight / sum (VS-R02). A single destination takes everything whatever its weight; among several, one of
//! weight 0 takes nothing, ever. The choice is exact integer arithmetic on one random draw, so that a seed replays it.
//!
//! Or it is made by a key (VS-R05), by weighted rendezvous hashing: each destination makes of the key and of its own
//! name a number `u` that is uniform in (0, 1], and the least `-ln(u) / weight` wins. The minimum of exponential
//! variables falls on each in proportion to its weight, so shares are what they are without a key. A key moves only
//! when its winner loses weight against another destination, and then to one that gained: from 90/10 to 80/20 one key
//! in ten, and none between destinations whose weights keep their proportion. That is the least there can be between
//! two destinations, and among several when one gains or loses against all others. What else changes among several
//! moves at most `2d / (1 + d)` of the keys, where `d` is the least: no choice that remembers nobody does with less for
//! all changes. Names count and not places, so that the order of a rule means nothing.

use rand::{Rng, RngExt as _};

use crate::hash_policy::xxhash;

/// Values with cumulative weights.
#[derive(Clone, Debug)]
pub struct Weighted<T> {
    items: Box<[Item<T>]>,
    total: u64,
}

#[derive(Clone, Debug)]
struct Item<T> {
    weight: u32,
    /// Sum of the weights up to and including this one.
    upto: u64,
    /// What stands for it among keys.
    seed: u64,
    value: T,
}

/// Weights among which nothing can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidWeights {
    /// There is no destination.
    #[error("a route needs at least one destination")]
    Empty,
    /// There are several, all of weight 0.
    #[error("the weights of several destinations sum to 0")]
    Zero,
}

impl<T> Weighted<T> {
    /// Everything goes to `value`.
    #[must_use]
    pub fn single(value: T) -> Self {
        Self { items: Box::new([Item { weight: 0, upto: 1, seed: 0, value }]), total: 1 }
    }

    /// The destinations with their weights.
    ///
    /// # Errors
    /// [`InvalidWeights`] when there is none, or when several sum to 0.
    pub fn new(items: impl IntoIterator<Item = (u32, T)>) -> Result<Self, InvalidWeights> {
        let mut total = 0_u64;
        let mut items: Vec<_> = (0..)
            .zip(items)
            .map(|(seed, (weight, value))| {
                total = total.saturating_add(u64::from(weight));
                Item { weight, upto: total, seed: mix(seed), value }
            })
            .collect();
        match &mut items[..] {
            [] => return Err(InvalidWeights::Empty),
            [only] => (only.upto, total) = (1, 1),
            _ if total == 0 => return Err(InvalidWeights::Zero),
            _ => {}
        }
        Ok(Self { items: items.into_boxed_slice(), total })
    }

    /// The same values, each known by its name to [`pick_by`](Self::pick_by); without it they are known by their
    /// places. Those of one name are told apart by their order.
    #[must_use]
    pub fn named<'n>(mut self, name: impl Fn(&T) -> &str + 'n) -> Self {
        for at in 0..self.items.len() {
            let (before, rest) = self.items.split_at_mut(at);
            let Some(item) = rest.first_mut() else { break };
            let own = name(&item.value);
            let alike = before.iter().filter(|other| name(&other.value) == own).count();
            item.seed = mix(xxhash(own.as_bytes(), alike as u64));
        }
        self
    }

    /// Chooses the one that a key belongs to, so that a key stays with its value while weights change, as far as the
    /// weights allow. `hash` is that of the key; it is mixed again here.
    #[must_use]
    pub fn pick_by(&self, hash: u64) -> &T {
        &self.items[self.index_by(hash, |_, weight| u64::from(weight))].value
    }

    /// The index of [`pick_by`](Self::pick_by) by weights in the place of those that were given.
    pub(crate) fn index_by(&self, hash: u64, weigh: impl Fn(usize, u32) -> u64) -> usize {
        if self.items.len() == 1 {
            return 0;
        }
        let mut best = (f64::INFINITY, 0);
        for (at, item) in self.items.iter().enumerate() {
            let weight = weigh(at, item.weight);
            if weight == 0 {
                continue;
            }
            // The 53 bits that a float has, of (0, 1].
            let uniform = ((mix(hash ^ item.seed) >> 11) + 1) as f64 / (1_u64 << 53) as f64;
            let score = -uniform.ln() / weight as f64;
            if score < best.0 {
                best = (score, at);
            }
        }
        best.1
    }

    /// The value at a place.
    pub(crate) fn get(&self, at: usize) -> Option<&T> {
        self.items.get(at).map(|item| &item.value)
    }

    /// Chooses one. Draws from `rng` only when there is a choice.
    pub fn pick(&self, rng: &mut impl Rng) -> &T {
        let draw = if self.items.len() == 1 { 0 } else { rng.random_range(0..self.total) };
        self.at(draw)
    }

    /// The values with the weights that were given, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u32, &T)> {
        self.items.iter().map(|item| (item.weight, &item.value))
    }

    fn at(&self, draw: u64) -> &T {
        // `draw` is below the total, so an item is always found; the last stands in for the impossible.
        let index = self.items.partition_point(|item| item.upto <= draw);
        &self.items[index.min(self.items.len() - 1)].value
    }
}

/// Makes of each number another, such that near ones are far apart (SplitMix64).
const fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng as _;
    use rand::rngs::SmallRng;

    use super::*;

    fn shares(weights: &[u32], seed: u64, draws: u32) -> Vec<f64> {
        let weighted = Weighted::new(weights.iter().copied().zip(0_usize..)).unwrap();
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut counts = vec![0_u32; weights.len()];
        for _ in 0..draws {
            counts[*weighted.pick(&mut rng)] += 1;
        }
        counts.iter().map(|count| f64::from(*count) * 100.0 / f64::from(draws)).collect()
    }

    #[test]
    fn vs_r02_weight_0_never_among_several_and_everything_alone() {
        assert_eq!(shares(&[0], 1, 1000), [100.0]);
        assert_eq!(shares(&[7], 1, 1000), [100.0]);
        let among = shares(&[0, 5, 0, 5, 0], 1, 100_000);
        assert_eq!((among[0], among[2], among[4]), (0.0, 0.0, 0.0));
        assert_eq!(shares(&[100, 0], 3, 100_000), [100.0, 0.0]);
        assert_eq!(Weighted::<()>::new([]).unwrap_err(), InvalidWeights::Empty);
        assert_eq!(Weighted::new([(0, 'a'), (0, 'b')]).unwrap_err(), InvalidWeights::Zero);
    }

    #[test]
    fn vs_r06_a_million_draws_are_within_a_quarter_of_a_point() {
        for seed in [1, 42, 2026] {
            for weights in
                [&[90, 10][..], &[1, 99], &[50, 50], &[1, 1, 1], &[5, 15, 80], &[0, 1, 3], &[1000, 1]]
            {
                let sum: u32 = weights.iter().sum();
                for (share, weight) in shares(weights, seed, 1_000_000).into_iter().zip(weights) {
                    let expected = f64::from(*weight) * 100.0 / f64::from(sum);
                    assert!(
                        (share - expected).abs() <= 0.25,
                        "{weights:?} seed {seed}: {share} for {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn vs_r06_a_seed_replays_the_choice() {
        let weighted = Weighted::new([(90, 'a'), (10, 'b')]).unwrap();
        let run = |seed| {
            let mut rng = SmallRng::seed_from_u64(seed);
            (0..1000).map(|_| *weighted.pick(&mut rng)).collect::<String>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    fn named(weights: &[u32]) -> Weighted<String> {
        let named = (0..).zip(weights).map(|(at, weight)| (*weight, format!("v{at}")));
        Weighted::new(named).unwrap().named(String::as_str)
    }

    /// Of so many keys, how many each value has, and how many go from one to another as weights change.
    fn moves(before: &[u32], after: &[u32], keys: u32) -> Vec<Vec<u32>> {
        let (before, after) = (named(before), named(after));
        let mut moved = vec![vec![0; after.items.len()]; before.items.len()];
        for key in 0..keys {
            let hash = xxhash(&key.to_le_bytes(), 0);
            let [from, to] =
                [&before, &after].map(|weighted| weighted.index_by(hash, |_, weight| u64::from(weight)));
            moved[from][to] += 1;
        }
        moved
    }

    #[test]
    fn vs_r05_a_million_keys_are_within_a_quarter_of_a_point() {
        for weights in [&[90, 10][..], &[1, 99], &[1, 1, 1], &[5, 15, 80], &[0, 1, 3], &[1000, 1]] {
            let moved = moves(weights, weights, 1_000_000);
            let sum: u32 = weights.iter().sum();
            for (at, weight) in weights.iter().enumerate() {
                let share = f64::from(moved[at][at]) / 10_000.0;
                let expected = f64::from(*weight) * 100.0 / f64::from(sum);
                assert!((share - expected).abs() <= 0.25, "{weights:?}: {share} for {expected}");
            }
        }
    }

    #[test]
    fn vs_r05_only_those_who_must_move_do() {
        let moved = moves(&[90, 10], &[80, 20], 100_000);
        assert_eq!(moved[1][0], 0, "nobody leaves the canary while it grows");
        assert!((9_500..10_500).contains(&moved[0][1]), "{moved:?}");
        let moved = moves(&[80, 15, 5], &[80, 15, 0], 100_000);
        assert_eq!((moved[0][1], moved[1][0], moved[0][2], moved[1][2], moved[2][2]), (0, 0, 0, 0, 0));
    }

    /// Among several destinations more may move than the weights demand, but not more than is said above.
    #[test]
    fn vs_r05_what_moves_among_several_is_bounded() {
        for (before, after) in [
            (&[80, 15, 5][..], &[70, 25, 5][..]),
            (&[40, 30, 20, 10], &[10, 20, 30, 40]),
            (&[50, 50, 0], &[0, 50, 50]),
            (&[34, 33, 33], &[33, 34, 33]),
        ] {
            let moved = moves(before, after, 200_000);
            let stayed: u32 = (0..before.len()).map(|at| moved[at][at]).sum();
            let least = before.iter().zip(after).map(|(b, a)| a.saturating_sub(*b)).sum::<u32>();
            let (moved, least) = (1.0 - f64::from(stayed) / 200_000.0, f64::from(least) / 100.0);
            let most = 2.0 * least / (1.0 + least);
            assert!(moved >= least - 0.005 && moved <= most + 0.005, "{before:?} {after:?}: {moved} {least}");
        }
    }

    #[test]
    fn vs_r05_names_count_and_not_places() {
        let one = Weighted::new([(70, "a"), (20, "b"), (10, "c")]).unwrap().named(|name| name);
        let other = Weighted::new([(1, "c"), (7, "a"), (2, "b")]).unwrap().named(|name| name);
        assert!((0..10_000).all(|key| one.pick_by(key) == other.pick_by(key)));
        let twice = Weighted::new([(1, ("a", 1)), (1, ("a", 2))]).unwrap().named(|value| value.0);
        let first = (0..10_000).filter(|key| twice.pick_by(*key).1 == 1).count();
        assert!((4_800..5_200).contains(&first), "{first}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Of two, exactly the share that changes hands moves, and all of it one way.
        #[test]
        fn vs_r05_from_a_to_b_moves_the_difference(a in 0_u32..=100, b in 0_u32..=100) {
            const KEYS: u32 = 20_000;
            let moved = moves(&[100 - a, a], &[100 - b, b], KEYS);
            let (forth, back) = (moved[0][1], moved[1][0]);
            prop_assert_eq!(forth.min(back), 0);
            let share = f64::from(forth.max(back)) / f64::from(KEYS);
            // Five standard deviations, at the most.
            prop_assert!((share - f64::from(a.abs_diff(b)) / 100.0).abs() < 0.018, "{} {}: {}", a, b, share);
        }

        #[test]
        fn vs_r05_a_key_moves_only_to_what_has_gained_from_what_has_lost(
            before in proptest::collection::vec(0_u32..100, 2..6),
            after in proptest::collection::vec(0_u32..100, 6),
            keys in proptest::collection::vec(any::<u64>(), 100),
        ) {
            let after = &after[..before.len()];
            prop_assume!(before.iter().any(|weight| *weight > 0) && after.iter().any(|weight| *weight > 0));
            let (one, two) = (named(&before), named(after));
            for key in keys {
                let weigh = |_: usize, weight: u32| u64::from(weight);
                let (from, to) = (one.index_by(key, weigh), two.index_by(key, weigh));
                prop_assert!(before[from] > 0 && after[to] > 0);
                // The proportion of the two has changed in favour of where it went.
                if from != to {
                    let (then, now) = (before[to] * after[from], after[to] * before[from]);
                    prop_assert!(now > then, "{before:?} {after:?} {from} {to}");
                }
            }
        }
    }
}
