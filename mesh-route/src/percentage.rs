//! A share of requests, as exact as Envoy draws it.

use std::fmt;

use rand::{Rng, RngExt as _};

/// A share of requests in millionths, which is what Envoy draws from: 0 % is never, 100 % is always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Percentage(u32);

impl Percentage {
    /// Never. The default.
    pub const NEVER: Self = Self(0);

    /// Always.
    pub const ALWAYS: Self = Self(1_000_000);

    /// So many of a million; more than a million is always.
    #[must_use]
    pub const fn from_millionths(millionths: u32) -> Self {
        if millionths > Self::ALWAYS.0 { Self::ALWAYS } else { Self(millionths) }
    }

    /// A percentage as Istio writes it, from 0 to 100; what is finer than 0.0001 % is cut off, not rounded, as Istio
    /// does. What is below 0, or no number, is never.
    #[must_use]
    pub fn from_percent(percent: f64) -> Self {
        // A cast from a float saturates, and takes NaN for 0.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Self::from_millionths((percent * 10_000.0) as u32)
    }

    /// How many of a million.
    #[must_use]
    pub const fn millionths(self) -> u32 {
        self.0
    }

    /// Whether this request is one of the share. Draws from `rng` only when that is open.
    pub fn draw(self, rng: &mut impl Rng) -> bool {
        match self {
            Self::NEVER => false,
            Self::ALWAYS => true,
            Self(share) => rng.random_range(0..Self::ALWAYS.0) < share,
        }
    }

    /// Whether what has this hash is one of the share. The same hash is one of every larger share too.
    #[must_use]
    pub const fn takes(self, hash: u64) -> bool {
        ((hash as u128 * Self::ALWAYS.0 as u128) >> 64) < self.0 as u128
    }
}

/// Prints as `12.5 %`.
impl fmt::Display for Percentage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", f64::from(self.0) / 10_000.0)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::SmallRng;

    use super::*;

    #[test]
    fn what_is_finer_than_a_millionth_is_cut_off() {
        for (percent, millionths) in [
            (0.0, 0),
            (0.0001, 1),
            (0.000_19, 1),
            (0.000_09, 0),
            (12.5, 125_000),
            (99.9999, 999_999),
            (100.0, 1_000_000),
            (1e9, 1_000_000),
            (-1.0, 0),
            (f64::NAN, 0),
        ] {
            assert_eq!(Percentage::from_percent(percent).millionths(), millionths, "{percent}");
        }
        assert_eq!(Percentage::from_percent(12.5).to_string(), "12.5 %");
        assert_eq!(Percentage::from_millionths(u32::MAX), Percentage::ALWAYS);
    }

    #[test]
    fn never_and_always_are_exact_and_what_is_between_is_close() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut share = |percentage: Percentage| {
            let hits = (0..100_000).filter(|_| percentage.draw(&mut rng)).count();
            hits as f64 / 1_000.0
        };
        assert_eq!(share(Percentage::NEVER), 0.0);
        assert_eq!(share(Percentage::ALWAYS), 100.0);
        for percent in [0.1, 1.0, 10.0, 50.0, 99.0] {
            let seen = share(Percentage::from_percent(percent));
            assert!((seen - percent).abs() <= 0.25, "{seen} for {percent}");
        }
    }
}
