//! Random numbers of requests: each has a generator of its own, from a seed and its number, so that clones of a service
//! neither repeat one another nor share a lock, and a seed replays them.

use std::sync::atomic::{AtomicU64, Ordering};

use rand::SeedableRng as _;
use rand::rngs::SmallRng;

/// Gives out generators.
#[derive(Debug)]
pub(crate) struct Draws {
    seed: u64,
    next: AtomicU64,
}

impl Draws {
    /// From this seed, or one of the operating system's.
    pub(crate) fn new(seed: Option<u64>) -> Self {
        Self { seed: seed.unwrap_or_else(rand::random), next: AtomicU64::new(0) }
    }

    pub(crate) fn rng(&self) -> SmallRng {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // The seed is mixed into a whole state, so neighbours have nothing in common.
        SmallRng::seed_from_u64(self.seed.wrapping_add(number))
    }
}
