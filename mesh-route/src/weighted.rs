//! The weighted choice among the destinations of a route: the canary split.
//!
//! A share is weight / sum (VS-R02). A single destination takes everything whatever its weight; among several, one of
//! weight 0 takes nothing, ever. The choice is exact integer arithmetic on one random draw, so that a seed replays it.

use rand::{Rng, RngExt as _};

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
        Self { items: Box::new([Item { weight: 0, upto: 1, value }]), total: 1 }
    }

    /// The destinations with their weights.
    ///
    /// # Errors
    /// [`InvalidWeights`] when there is none, or when several sum to 0.
    pub fn new(items: impl IntoIterator<Item = (u32, T)>) -> Result<Self, InvalidWeights> {
        let mut total = 0_u64;
        let mut items: Vec<_> = items
            .into_iter()
            .map(|(weight, value)| {
                total = total.saturating_add(u64::from(weight));
                Item { weight, upto: total, value }
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

#[cfg(test)]
mod tests {
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
}
