//! The one place that reads the monotonic clock.
//!
//! Every decision takes `now` as an argument, so that tests pause time and `explain` can replay a moment. What
//! has to ask for the time asks here: tokio's clock obeys `tokio::time::pause`, `std::time::Instant::now()` does
//! not, and clippy refuses it everywhere else.

use std::time::{Duration, Instant};

/// The current moment of the runtime's clock (the paused clock, in a test that paused it).
#[must_use]
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// As good as never: thirty years, as tokio has it.
pub const NEVER: Duration = Duration::from_secs(86_400 * 365 * 30);

/// `duration` after `at`, and thirty years after where that is more than a clock can tell: limits come from configuration,
/// and the longest of them must not panic where they are added.
#[must_use]
pub fn after(at: Instant, duration: Duration) -> Instant {
    at.checked_add(duration).or_else(|| at.checked_add(NEVER)).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_clock_can_tell_is_never() {
        let at = now();
        assert_eq!(after(at, Duration::from_secs(5)), at + Duration::from_secs(5));
        assert_eq!(after(at, Duration::MAX), at + NEVER);
    }
}
