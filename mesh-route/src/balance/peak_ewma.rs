//! Latency-aware choice (DR-LB10): Finagle's and Linkerd's peak EWMA, which Istio does not have.
//!
//! Each endpoint has a moving average of how long the heads of its responses took. A worse value replaces the average
//! at once, better ones sink in over [`DECAY`], and without news it fades, so that an endpoint that was slow is asked
//! again some time. The cost of an endpoint is this latency for each of its requests in flight and one more; of two
//! random endpoints the cheaper one is picked.
//!
//! Average and time share one atomic number, so that workers neither lock nor read halves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::Rng;

use super::random;
use crate::endpoint::{EndpointSet, Member};

/// After so long a value has lost all but 1/e of its weight. Linkerd's default.
pub const DECAY: Duration = Duration::from_secs(10);

/// What an endpoint that nothing is known of is thought to take. Linkerd's default.
pub const UNKNOWN: Duration = Duration::from_millis(30);

/// What a try without an answer is taken for at least: an endpoint that refuses at once is not a fast one.
pub const FAILED: Duration = Duration::from_secs(1);

/// A moving average: the microseconds as `f32` below, the milliseconds since the beginning above.
#[derive(Debug)]
pub(crate) struct PeakEwma {
    state: AtomicU64,
    origin: Instant,
}

impl PeakEwma {
    pub(crate) fn new(now: Instant) -> Self {
        Self { state: AtomicU64::new(pack(0, UNKNOWN.as_secs_f32() * 1e6)), origin: now }
    }

    pub(crate) fn observe(&self, rtt: Duration, now: Instant) {
        let (rtt, now) = (rtt.as_secs_f32() * 1e6, self.millis(now));
        let _ = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| {
            let (at, average) = unpack(state);
            let elapsed = since(at, now);
            if rtt >= average {
                return Some(pack(now, rtt));
            }
            // Within a millisecond nothing decays; the time stays, so that short times add up.
            (elapsed > 0).then(|| {
                let kept = decay(elapsed);
                pack(now, average.mul_add(kept, rtt * (1.0 - kept)))
            })
        });
    }

    /// The average in microseconds, faded to `now`.
    pub(crate) fn read(&self, now: Instant) -> f64 {
        let (at, average) = unpack(self.state.load(Ordering::Relaxed));
        f64::from(average * decay(since(at, self.millis(now))))
    }

    fn millis(&self, now: Instant) -> u32 {
        // Wraps around after 49 days; only differences are used.
        now.saturating_duration_since(self.origin).as_millis() as u32
    }
}

/// Milliseconds from `at` to `now`; none for a worker whose clock was read a little earlier.
fn since(at: u32, now: u32) -> u32 {
    let elapsed = now.wrapping_sub(at);
    if elapsed > u32::MAX / 2 { 0 } else { elapsed }
}

fn decay(elapsed: u32) -> f32 {
    (-(elapsed as f32) / (DECAY.as_millis() as f32)).exp()
}

fn pack(at: u32, average: f32) -> u64 {
    u64::from(at) << 32 | u64::from(average.to_bits())
}

fn unpack(state: u64) -> (u32, f32) {
    ((state >> 32) as u32, f32::from_bits(state as u32))
}

/// The cheaper of two that are drawn by weight.
pub(super) fn pick<'e>(endpoints: &'e EndpointSet, now: Instant, rng: &mut impl Rng) -> Option<&'e Member> {
    let first = random::pick(endpoints, rng)?;
    let second = random::pick(endpoints, rng)?;
    let cost = |member: &Member, weight: u32| member.endpoint.cost(now) * f64::from(weight);
    Some(if cost(first, second.weight) > cost(second, first.weight) { second } else { first })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dr_lb10_a_peak_counts_at_once_and_better_values_sink_in() {
        let start = mesh_core::clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let average = PeakEwma::new(start);
        assert_eq!(average.read(start).round(), 30_000.0);
        average.observe(Duration::from_millis(500), at(1));
        assert_eq!(average.read(at(1)).round(), 500_000.0, "a peak is taken at once");
        average.observe(Duration::from_millis(10), at(11));
        let expected = 500_000.0 / std::f64::consts::E + 10_000.0 * (1.0 - 1.0 / std::f64::consts::E);
        assert!((average.read(at(11)) - expected).abs() < 1.0, "{}", average.read(at(11)));
        assert!((average.read(at(21)) - expected / std::f64::consts::E).abs() < 1.0, "it fades without news");
        assert!(average.read(at(11)) > average.read(at(60)));
    }

    #[test]
    fn dr_lb10_many_values_in_a_millisecond_do_not_stop_the_time() {
        let start = mesh_core::clock::now();
        let average = PeakEwma::new(start);
        average.observe(Duration::from_secs(1), start);
        for micros in (0..20_000_000_u64).step_by(100) {
            average.observe(Duration::from_millis(1), start + Duration::from_micros(micros));
        }
        let read = average.read(start + Duration::from_secs(20));
        assert!((100_000.0..150_000.0).contains(&read), "two decays: about a seventh is left, not {read}");
    }
}
