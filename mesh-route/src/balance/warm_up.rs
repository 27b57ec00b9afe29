//! Slow start (DR-LB08): an endpoint that has just appeared takes a growing share.
//!
//! Envoy's formula. The share is relative to the others': endpoints that appeared together, as at the start of the
//! proxy, have the same factor and take equal shares at once, as they do in Envoy. So a factor is divided by that of the
//! oldest endpoint, and an endpoint that is drawn is kept with this probability, else drawn again: each one's share is
//! its weight times its factor, whatever draws, and nothing is laid out again as time goes by.

use std::time::{Duration, Instant};

use rand::{Rng, RngExt as _};

use crate::endpoint::{EndpointSet, Member};

/// Draws after which the last one is kept.
const DRAWS: u32 = 16;

/// How an endpoint that has just appeared takes its share (DestinationRule's `warmup`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WarmUp {
    /// How long it takes.
    pub duration: Duration,
    /// The share at the beginning, in percent. Default 10.
    pub minimum_percent: f64,
    /// How the share grows: 1, the default, is linear, more is faster at the beginning.
    pub aggression: f64,
}

impl WarmUp {
    /// A linear warm-up that begins with a tenth.
    #[must_use]
    pub const fn new(duration: Duration) -> Self {
        Self { duration, minimum_percent: 10.0, aggression: 1.0 }
    }

    /// What the weight of an endpoint of this age is multiplied with; 1 when it is warm.
    #[must_use]
    pub fn factor(&self, age: Duration) -> f64 {
        if age >= self.duration {
            return 1.0;
        }
        let time = age.as_secs_f64() / self.duration.as_secs_f64();
        let grown = if self.aggression == 1.0 { time } else { time.powf(1.0 / self.aggression) };
        grown.max(self.minimum_percent / 100.0).min(1.0)
    }
}

/// A warm-up of some endpoints: they are cold until `newest` is warm.
#[derive(Clone, Copy, Debug)]
pub(super) struct Warming {
    config: WarmUp,
    oldest: Instant,
    newest: Instant,
}

impl Warming {
    pub(super) fn of(config: Option<WarmUp>, endpoints: &EndpointSet) -> Option<Self> {
        let since = || endpoints.iter().map(|endpoint| endpoint.since());
        Some(Self { config: config?, oldest: since().min()?, newest: since().max()? })
    }

    /// Draws until one is kept.
    pub(super) fn draw<'e, R: Rng>(
        &self,
        now: Instant,
        rng: &mut R,
        mut draw: impl FnMut(&mut R) -> Option<&'e Member>,
    ) -> Option<&'e Member> {
        let mut drawn = draw(rng)?;
        let factor = |since| self.config.factor(now.saturating_duration_since(since));
        if now.saturating_duration_since(self.newest) >= self.config.duration {
            return Some(drawn);
        }
        let most = factor(self.oldest);
        for _ in 1..DRAWS {
            let share = factor(drawn.endpoint.since());
            if share >= most || rng.random::<f64>() * most < share {
                break;
            }
            drawn = draw(rng)?;
        }
        Some(drawn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dr_lb08_the_factor_is_envoys() {
        let minute = |minimum_percent, aggression| WarmUp {
            duration: Duration::from_secs(60),
            minimum_percent,
            aggression,
        };
        let rounded =
            |warm_up: WarmUp, seconds| (warm_up.factor(Duration::from_secs(seconds)) * 1000.0).round() as u32;
        let linear = minute(10.0, 1.0);
        assert_eq!(linear, WarmUp::new(Duration::from_secs(60)));
        assert_eq!([0, 6, 30, 59, 60, 600].map(|at| rounded(linear, at)), [100, 100, 500, 983, 1000, 1000]);
        let fast = minute(10.0, 2.0);
        assert_eq!([0, 15, 30].map(|at| rounded(fast, at)), [100, 500, 707]);
        assert_eq!(rounded(minute(50.0, 1.0), 6), 500);
        assert_eq!(rounded(minute(0.0, 1.0), 0), 0);
    }
}
