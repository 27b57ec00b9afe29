//! Whether there is room for another retry (VS-Y09): counts that whoever shares them keeps, and one rule.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use super::budget::{Recent, RetryBudget};
use crate::permit::Permit;

/// The retries of a cluster, or of what else shares a limit.
#[derive(Debug)]
pub(crate) struct Retries {
    in_flight: AtomicU32,
    admitted: AtomicU64,
    refused: AtomicU64,
    recent: Recent,
    origin: Instant,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            admitted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            recent: Recent::default(),
            origin: mesh_core::clock::now(),
        }
    }
}

impl Retries {
    /// Retries in flight, the time before them included.
    pub(crate) fn in_flight(&self) -> &AtomicU32 {
        &self.in_flight
    }

    /// Retries so far.
    pub(crate) fn admitted(&self) -> u64 {
        self.admitted.load(Ordering::Relaxed)
    }

    /// Retries that a limit refused.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Counts a request that may be retried, where the budget counts over time.
    pub(crate) fn count_request(&self, budget: Option<&RetryBudget>) {
        if let Some(budget) = budget.filter(|budget| !budget.interval.is_zero()) {
            self.recent.request(budget.interval, self.origin, mesh_core::clock::now());
        }
    }

    /// A place among the retries, if `max_retries` and the budget have one. `active` are the requests that are active
    /// or pending; `acquire` takes a place below the limit that it is given.
    pub(crate) fn admit<T>(
        &self,
        max_retries: u32,
        budget: Option<&RetryBudget>,
        active: impl FnOnce() -> u64,
        acquire: impl FnOnce(u32) -> Option<Permit<T>>,
    ) -> Option<Permit<T>> {
        let (at_once, over_time) = match budget {
            Some(budget) if budget.interval.is_zero() => (budget.limit(active()), None),
            budget => (u32::MAX, budget),
        };
        let within_interval = |budget| self.recent.retry(budget, self.origin, mesh_core::clock::now());
        let permit = acquire(at_once.min(max_retries)).filter(|_| over_time.is_none_or(within_interval));
        let counter = if permit.is_some() { &self.admitted } else { &self.refused };
        counter.fetch_add(1, Ordering::Relaxed);
        permit
    }
}
