//! The one place that reads the monotonic clock.
//!
//! Every decision takes `now` as an argument, so that tests pause time and `explain` can replay a moment. What
//! has to ask for the time asks here: tokio's clock obeys `tokio::time::pause`, `std::time::Instant::now()` does
//! not, and clippy refuses it everywhere else.

use std::time::Instant;

/// The current moment of the runtime's clock (the paused clock, in a test that paused it).
#[must_use]
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
