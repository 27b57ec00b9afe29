//! In which order locks are taken.
//!
//! Who holds one may take only one that stands further down, so no two threads can each hold what the other waits for:
//!
//! | | lock | who takes it |
//! |---|---|---|
//! | 1 | the clusters of a process | a reload |
//! | 2 | the endpoints of a group, or what the resolver found | an embedding program; a reload, the resolver |
//! | 3 | the detector of a cluster | who crosses a threshold; the first to pick when an ejection is over |
//! | 4 | the endpoints that a cluster knows, or the generations that follow it | a reload, the resolver, an ejection |
//! | 5 | the tables of balancers | a reload, the resolver |
//! | 6 | a shard | every request |
//!
//! Under the lock of a shard none of these is taken, and nothing of others is woken, dropped or closed: what is to be is
//! moved out first. Wakers count among that, as the last to hold a task ends it, with all that it holds. Locks of one
//! request, of a body or of a timer are not here: no waker is cloned, woken or dropped while they are held. Builds with debug assertions, tests among them, panic where the order is broken.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) const CLUSTERS: u8 = 1;
pub(crate) const MEMBERS: u8 = 2;
pub(crate) const FOUND: u8 = 2;
pub(crate) const DETECTOR: u8 = 3;
pub(crate) const KNOWN: u8 = 4;
pub(crate) const ATTACHED: u8 = 4;
pub(crate) const TABLES: u8 = 5;
pub(crate) const SHARD: u8 = 6;

/// A mutex with its place in the order.
#[derive(Default)]
pub(crate) struct Ordered<const PLACE: u8, T>(Mutex<T>);

/// Holds an [`Ordered`].
pub(crate) struct Guard<'a, T> {
    guard: MutexGuard<'a, T>,
    _held: Held,
}

impl<const PLACE: u8, T> Ordered<PLACE, T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Waits for the lock. One that is poisoned is taken as it is: what it guards is whole after every statement.
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        let held = Held::new(PLACE);
        Guard { guard: self.0.lock().unwrap_or_else(PoisonError::into_inner), _held: held }
    }

    #[cfg(test)]
    pub(crate) fn is_free(&self) -> bool {
        self.0.try_lock().is_ok()
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<const PLACE: u8, T: fmt::Debug> fmt::Debug for Ordered<PLACE, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(debug_assertions)]
use self::checked::Held;

#[cfg(debug_assertions)]
mod checked {
    use std::cell::RefCell;

    thread_local! {
        /// The places of the locks that this thread holds.
        static HELD: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) struct Held(u8);

    impl Held {
        pub(super) fn new(place: u8) -> Self {
            // A thread that ends may be without its list already.
            let _ = HELD.try_with(|held| {
                let mut held = held.borrow_mut();
                let last = held.iter().max().copied().unwrap_or(0);
                assert!(last < place, "a lock of place {place} is taken under one of place {last}");
                held.push(place);
            });
            Self(place)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = HELD.try_with(|held| {
                let mut held = held.borrow_mut();
                if let Some(at) = held.iter().rposition(|place| *place == self.0) {
                    held.remove(at);
                }
            });
        }
    }
}

#[cfg(not(debug_assertions))]
struct Held;

#[cfg(not(debug_assertions))]
impl Held {
    #[inline]
    const fn new(_: u8) -> Self {
        Self
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn two_locks_the_other_way_round_are_a_panic() {
        let (first, second) = (Ordered::<DETECTOR, u8>::new(1), Ordered::<KNOWN, u8>::new(2));
        let both = |held: u8| {
            let one = first.lock();
            let other = second.lock();
            assert_eq!(*one + *other, held);
        };
        both(3);
        let other_way = catch_unwind(AssertUnwindSafe(|| {
            let _other = second.lock();
            let _one = first.lock();
        }));
        assert!(other_way.is_err());
        // Nothing is left of it, and the order in which they are given back does not count.
        both(3);
        let (one, other) = (first.lock(), second.lock());
        drop(one);
        drop(other);
        both(3);
        let same = catch_unwind(AssertUnwindSafe(|| {
            let _one = first.lock();
            let _again = first.lock();
        }));
        assert!(same.is_err(), "nor is one taken twice");
    }
}
