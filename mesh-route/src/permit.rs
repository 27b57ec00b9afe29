//! A unit of a counter with a limit, held by what it counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// One unit of a counter of `T`; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit<T> {
    of: Arc<T>,
    counter: fn(&T) -> &AtomicU32,
}

impl<T> Permit<T> {
    /// Takes one below `limit`, exactly, whatever other workers do.
    pub(crate) fn acquire(of: &Arc<T>, counter: fn(&T) -> &AtomicU32, limit: u32) -> Option<Self> {
        counter(of)
            .try_update(Ordering::AcqRel, Ordering::Relaxed, |count| (count < limit).then(|| count + 1))
            .ok()?;
        Some(Self { of: Arc::clone(of), counter })
    }

    /// Takes one whatever the limit.
    pub(crate) fn force(of: &Arc<T>, counter: fn(&T) -> &AtomicU32) -> Self {
        counter(of).fetch_add(1, Ordering::AcqRel);
        Self { of: Arc::clone(of), counter }
    }
}

impl<T> Drop for Permit<T> {
    fn drop(&mut self) {
        (self.counter)(&self.of).fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b6_limits_are_exact_over_threads() {
        let counter = Arc::new(AtomicU32::new(0));
        let acquire = || Permit::acquire(&counter, |counter| counter, 3);
        let most = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..250_000 {
                        if let Some(permit) = acquire() {
                            most.fetch_max(counter.load(Ordering::Relaxed), Ordering::Relaxed);
                            drop(permit);
                        }
                    }
                });
            }
        });
        assert!(most.load(Ordering::Relaxed) <= 3);
        assert_eq!(counter.load(Ordering::Relaxed), 0);
        let held: Vec<_> = (0..3).map(|_| acquire().unwrap()).collect();
        assert!(acquire().is_none(), "exactly the fourth is refused");
        drop(held);
    }
}
