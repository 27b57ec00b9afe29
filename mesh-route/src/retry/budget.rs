//! How many retries a cluster bears at once (DR-RB01).
//!
//! A retry storm is stopped by counting what is in flight and not by guessing a rate: retries may be a share of the
//! requests that are active or pending, and always a few. As retries are requests too, a share of 20 % lets load grow
//! by a quarter at most.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The limit on concurrent retries of a cluster.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    /// Retries for each hundred requests. Default 20.
    pub percent: f64,
    /// Retries that are always allowed. Default 3.
    pub min_retry_concurrency: u32,
    /// The time over which requests and retries are counted; zero, the default, counts those that are in flight.
    pub interval: Duration,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { percent: 20.0, min_retry_concurrency: 3, interval: Duration::ZERO }
    }
}

impl RetryBudget {
    /// How many retries there may be for so many requests.
    #[must_use]
    pub fn limit(&self, requests: u64) -> u32 {
        let share = (requests as f64 * self.percent / 100.0) as u32;
        share.max(self.min_retry_concurrency)
    }
}

const SLOTS: u64 = 10;

/// Requests and retries of the last interval, in tenths of it. Shared by workers, without a lock.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    requests: [AtomicU64; SLOTS as usize],
    retries: [AtomicU64; SLOTS as usize],
}

impl Recent {
    /// Counts a request.
    pub(crate) fn request(&self, interval: Duration, origin: Instant, now: Instant) {
        add(&self.requests, tick(interval, origin, now));
    }

    /// Counts a retry, unless the budget is spent.
    pub(crate) fn retry(&self, budget: &RetryBudget, origin: Instant, now: Instant) -> bool {
        let tick = tick(budget.interval, origin, now);
        let allowed = u64::from(budget.limit(sum(&self.requests, tick)));
        if sum(&self.retries, tick) >= allowed {
            return false;
        }
        add(&self.retries, tick);
        true
    }
}

/// The number of the tenth of an interval that `now` lies in.
fn tick(interval: Duration, origin: Instant, now: Instant) -> u32 {
    let slot = (interval.as_nanos() / u128::from(SLOTS)).max(1);
    (now.saturating_duration_since(origin).as_nanos() / slot) as u32
}

/// A slot is the number of its tenth and a count; one of an older round starts again.
fn add(slots: &[AtomicU64], tick: u32) {
    let Some(slot) = slots.get((u64::from(tick) % SLOTS) as usize) else { return };
    slot.update(Ordering::Relaxed, Ordering::Relaxed, |packed| {
        let count = if (packed >> 32) as u32 == tick { packed as u32 } else { 0 };
        (u64::from(tick) << 32) | u64::from(count.saturating_add(1))
    });
}

fn sum(slots: &[AtomicU64], tick: u32) -> u64 {
    slots
        .iter()
        .map(|slot| slot.load(Ordering::Relaxed))
        .filter(|packed| u64::from(tick.wrapping_sub((packed >> 32) as u32)) < SLOTS)
        .map(|packed| u64::from(packed as u32))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dr_rb01_a_share_of_what_is_active_and_always_a_few() {
        let budget = RetryBudget::default();
        assert_eq!([0, 1, 15, 19, 20, 100].map(|active| budget.limit(active)), [3, 3, 3, 3, 4, 20]);
        assert_eq!(RetryBudget { percent: 0.0, min_retry_concurrency: 0, ..budget }.limit(1000), 0);
    }

    #[test]
    fn dr_rb01_an_interval_is_counted_and_forgotten() {
        let origin = mesh_core::clock::now();
        let at = |millis| origin + Duration::from_millis(millis);
        let budget = RetryBudget { interval: Duration::from_secs(1), ..RetryBudget::default() };
        let recent = Recent::default();
        for millis in 0..100 {
            recent.request(budget.interval, origin, at(millis * 10));
        }
        assert_eq!((0..100).filter(|_| recent.retry(&budget, origin, at(999))).count(), 20);
        assert!(
            !recent.retry(&budget, origin, at(1_500)),
            "what was retried still counts, and more than the half left"
        );
        assert_eq!((0..100).filter(|_| recent.retry(&budget, origin, at(2_500))).count(), 3);
    }
}
