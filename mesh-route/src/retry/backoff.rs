//! Time between tries: exponential, with full jitter, so that clients that failed together do not come back together.

use std::time::Duration;

use rand::{Rng, RngExt as _};

/// Before retry N a time drawn evenly from `[0, (2^N − 1) · base)`, where the upper end is at most `cap` (VS-Y06).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
}

impl Backoff {
    /// From this base, with a cap of ten times as much.
    #[must_use]
    pub const fn new(base: Duration) -> Self {
        Self { base, cap: base.saturating_mul(10) }
    }

    /// The time before retry `retry`, from 1.
    pub fn before(&self, retry: u32, rng: &mut impl Rng) -> Duration {
        let most = self.most(retry).as_nanos();
        let most = u64::try_from(most).unwrap_or(u64::MAX);
        if most == 0 { Duration::ZERO } else { Duration::from_nanos(rng.random_range(0..most)) }
    }

    /// The upper end before retry `retry`, from 1.
    #[must_use]
    pub fn most(&self, retry: u32) -> Duration {
        let factor = 1_u32.checked_shl(retry).map_or(u32::MAX, |power| power - 1);
        self.base.saturating_mul(factor).min(self.cap)
    }
}

/// A base of 25 ms, Istio's.
impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_millis(25))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::SmallRng;

    use super::*;

    #[test]
    fn vs_y06_the_upper_end_doubles_up_to_ten_times_the_base() {
        let backoff = Backoff::default();
        let most: Vec<_> = (1..=6).map(|retry| backoff.most(retry).as_millis()).collect();
        assert_eq!(most, [25, 75, 175, 250, 250, 250]);
        assert_eq!(backoff.most(u32::MAX).as_millis(), 250);
    }

    #[test]
    fn vs_y06_the_jitter_is_full() {
        let mut rng = SmallRng::seed_from_u64(1);
        let draws: Vec<_> = (0..10_000).map(|_| Backoff::default().before(2, &mut rng)).collect();
        assert!(draws.iter().all(|draw| *draw < Duration::from_millis(75)));
        let mean = draws.iter().sum::<Duration>().as_secs_f64() / 10_000.0;
        assert!((mean - 0.0375).abs() < 0.001, "{mean}");
        assert_eq!(Backoff::new(Duration::ZERO).before(1, &mut rng), Duration::ZERO);
    }
}
