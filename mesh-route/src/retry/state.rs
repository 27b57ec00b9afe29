//! What the layers of a process share of their retries.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::admission::Retries;
use super::budget::RetryBudget;
use crate::permit::Permit;

/// How many retries there may be at once, over everything that shares it: one for each upstream and process, as the
/// limits of a cluster are. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct RetryState(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    max_retries: u32,
    budget: Option<RetryBudget>,
    /// Requests whose response has not ended; counted for a budget alone.
    active: AtomicU32,
    retries: Retries,
}

impl Default for Shared {
    fn default() -> Self {
        Self { max_retries: u32::MAX, budget: None, active: AtomicU32::new(0), retries: Retries::default() }
    }
}

/// Counts a request, or a retry.
pub(super) struct Counted {
    _permit: Permit<Shared>,
}

impl RetryState {
    /// At most `max_retries` at once (Istio's default is 2³²−1), and what the budget allows, if there is one (DR-RB01).
    #[must_use]
    pub fn new(max_retries: u32, budget: Option<RetryBudget>) -> Self {
        Self(Arc::new(Shared { max_retries, budget, ..Shared::default() }))
    }

    /// Retries in flight, the time before them included.
    #[must_use]
    pub fn retries(&self) -> u32 {
        self.0.retries.in_flight().load(Ordering::Relaxed)
    }

    /// Retries so far.
    #[must_use]
    pub fn retried(&self) -> u64 {
        self.0.retries.admitted()
    }

    /// Retries that a limit refused.
    #[must_use]
    pub fn overflows(&self) -> u64 {
        self.0.retries.refused()
    }

    /// Counts a request that may be retried, where a budget counts them: over time, or until it is done.
    pub(super) fn begin(&self) -> Option<Counted> {
        let budget = self.0.budget.as_ref()?;
        self.0.retries.count_request(Some(budget));
        let counts = budget.interval.is_zero();
        counts.then(|| Counted { _permit: Permit::force(&self.0, |shared| &shared.active) })
    }

    /// A place among the retries.
    pub(super) fn admit(&self) -> Option<Counted> {
        let Shared { max_retries, budget, active, retries } = &*self.0;
        let active = || u64::from(active.load(Ordering::Relaxed));
        let acquire = |most| Permit::acquire(&self.0, |shared| shared.retries.in_flight(), most);
        let permit = retries.admit(*max_retries, budget.as_ref(), active, acquire);
        permit.map(|permit| Counted { _permit: permit })
    }
}
