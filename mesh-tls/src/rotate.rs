//! When a certificate is renewed, and when it is tried again if that fails. Pure: time and chance are arguments.
//!
//! A certificate is renewed when half of its life is over, as Istio's agent does, earlier by up to a tenth of its life so
//! that a thousand workloads which began together do not come together again. When the authority does not answer, the
//! certificate is kept until its real end, and the authority is asked again with growing pauses (D10).

use std::time::{Duration, SystemTime};

/// The first pause after a failure.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause between failures.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// When a certificate of this life is renewed. `chance` is a draw from 0 to 1.
#[must_use]
pub fn renew_at(not_before: SystemTime, not_after: SystemTime, chance: f64) -> SystemTime {
    let life = not_after.duration_since(not_before).unwrap_or_default();
    not_before + life.mul_f64(0.5 - 0.1 * chance.clamp(0.0, 1.0))
}

/// How long to wait after so many failures in a row, the first being 1. `chance` is a draw from 0 to 1. It is never more
/// than a tenth of the time that the certificate has `left`, while it has any: there is always time for another try.
#[must_use]
pub fn pause(failures: u32, left: Duration, chance: f64) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let longest = doubled.min(LONGEST_PAUSE);
    let longest = if left.is_zero() { longest } else { longest.min(left / 10) };
    longest.max(FIRST_PAUSE / 10).mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn pa_05_a_certificate_is_renewed_at_half_of_its_life_at_the_latest() {
        let begin = SystemTime::UNIX_EPOCH + 100 * HOUR;
        let at = |chance| renew_at(begin, begin + 24 * HOUR, chance).duration_since(begin).unwrap();
        assert_eq!(at(0.0), 12 * HOUR);
        assert_eq!(at(1.0).as_secs(), 34_560);
        assert!(at(0.5) > at(1.0) && at(0.5) < at(0.0));
        // One that ends before it begins is renewed at once.
        assert_eq!(renew_at(begin, begin - HOUR, 0.0), begin);
    }

    #[test]
    fn d10_an_authority_that_is_away_is_asked_again_until_the_end() {
        let hour = |failures| pause(failures, HOUR, 1.0);
        assert_eq!([1, 2, 3].map(hour), [1, 2, 4].map(Duration::from_secs));
        assert_eq!(hour(100), LONGEST_PAUSE);
        assert_eq!(pause(100, HOUR, 0.0), LONGEST_PAUSE / 2);
        // An hour without an authority, with six hours left: a try at least each minute, and none too many.
        let (mut time, mut tries) = (Duration::ZERO, 0);
        while time < HOUR {
            tries += 1;
            time += pause(tries, 6 * HOUR, 0.5);
        }
        assert!((60..100).contains(&tries), "{tries}");
        // The end is near: the pauses shrink with what is left.
        assert_eq!(pause(100, Duration::from_secs(10), 1.0), Duration::from_secs(1));
        assert!(pause(100, Duration::from_millis(1), 1.0) >= Duration::from_millis(50));
    }
}
