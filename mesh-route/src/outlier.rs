//! Outlier detection: endpoints that keep failing are left out for a while.
//!
//! Two parts. Workers count consecutive failures at the endpoint, with atomics (`Counters`). Only when a count crosses
//! its threshold is the ejection lock of the cluster taken, and the [`Detector`] decides: it knows who is ejected, for
//! how long and how often in a row, and how many may be at once. It is pure: time is an argument, and there is no timer.
//! An ejection ends when its time is over, which whoever picks next finds out; decay is computed when it is needed.
//!
//! **How many.** Envoy's rule since 1.28: an endpoint is ejected only if the ejected share stays within
//! `maxEjectionPercent`, even when that means that none ever is (10 % of nine endpoints). Before, one was always ejected.
//! An ejection that did not happen for this reason is an event too.
//!
//! **What counts** (DR-OD01, DR-OD05, DR-OD07). An answer counts by its status, a gRPC status in its headers by the HTTP
//! status it stands for. Connect failures, resets and timeouts count as 503 and 504, or, when they are told apart, as
//! local-origin failures. What a limit of ours refused never counts (DR-CP04), and neither does what a client cancelled.

mod layer;
mod watch;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use http::StatusCode;
use mesh_core::ErrorKind;

pub(crate) use self::layer::no_healthy_upstream;
pub use self::layer::{DetectOutlier, OutlierDetectionLayer, OutlierGroup};
pub(crate) use self::watch::Watch;

/// Ejections and returns that are remembered per cluster.
const EVENTS: usize = 64;

/// When an endpoint is ejected, and for how long (DestinationRule's `outlierDetection`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlierDetection {
    /// Consecutive answers that are errors; 0 is off. Default 5.
    pub consecutive_5xx: u32,
    /// Consecutive 502, 503 and 504; 0, the default, is off.
    pub consecutive_gateway: u32,
    /// Consecutive failures without an answer, where these are told apart. Default 5.
    pub consecutive_local_origin: u32,
    /// Whether failures without an answer are told apart from answers. Default false.
    pub split_local_origin: bool,
    /// After so long without an ejection an endpoint's next one is shorter by one base time. Default 10 s.
    pub interval: Duration,
    /// The time of the first ejection; the nth in a row is n times as long. Default 30 s.
    pub base_ejection_time: Duration,
    /// The longest ejection, unless the base is longer. Default 300 s, Envoy's.
    pub max_ejection_time: Duration,
    /// The share of the endpoints that may be ejected at once. Default 10.
    pub max_ejection_percent: u32,
    /// Below this share of endpoints that are not ejected, everybody is used again (panic); 0, the default, is never
    /// (DR-OD04).
    pub min_health_percent: u32,
    /// The answers that are errors, in place of 500 to 599 (DR-OD06); empty is the default.
    pub error_codes: Vec<u16>,
}

impl Default for OutlierDetection {
    fn default() -> Self {
        Self {
            consecutive_5xx: 5,
            consecutive_gateway: 0,
            consecutive_local_origin: 5,
            split_local_origin: false,
            interval: Duration::from_secs(10),
            base_ejection_time: Duration::from_secs(30),
            max_ejection_time: Duration::from_secs(300),
            max_ejection_percent: 10,
            min_health_percent: 0,
            error_codes: Vec::new(),
        }
    }
}

/// What one try says of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// It answered with this status.
    Status(u16),
    /// It could not be reached, or broke off before its answer.
    Unreachable,
    /// It did not answer in time.
    Late,
}

impl Observation {
    /// What an answer says: its status, or for gRPC the HTTP status that the gRPC status stands for.
    #[must_use]
    pub fn of_response(status: StatusCode, grpc_status: Option<u16>) -> Self {
        Self::Status(match grpc_status {
            None => status.as_u16(),
            Some(0) => 200,
            Some(1) => 499,
            Some(3 | 9 | 11) => 400,
            Some(4) => 504,
            Some(5) => 404,
            Some(6 | 10) => 409,
            Some(7) => 403,
            Some(8) => 429,
            Some(12) => 501,
            Some(14) => 503,
            Some(16) => 401,
            Some(_) => 500,
        })
    }

    /// What a failure says; `None` for one that is not the endpoint's.
    #[must_use]
    pub fn of_failure(kind: ErrorKind) -> Option<Self> {
        match kind {
            ErrorKind::ConnectFailure
            | ErrorKind::ConnectTimeout
            | ErrorKind::Unsent
            | ErrorKind::RefusedStream
            | ErrorKind::UpstreamReset
            | ErrorKind::UpstreamProtocol => Some(Self::Unreachable),
            ErrorKind::Timeout => Some(Self::Late),
            _ => None,
        }
    }
}

/// Consecutive failures of one endpoint, counted by every worker.
#[derive(Debug, Default)]
pub struct Counters {
    server_errors: AtomicU32,
    gateway_errors: AtomicU32,
    local_origin: AtomicU32,
}

/// Which threshold was crossed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// `consecutive5xxErrors`.
    Consecutive5xx,
    /// `consecutiveGatewayErrors`.
    ConsecutiveGateway,
    /// `consecutiveLocalOriginFailures`.
    ConsecutiveLocalOrigin,
}

impl Cause {
    /// The field that it is about.
    #[must_use]
    pub const fn field(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "consecutive5xxErrors",
            Self::ConsecutiveGateway => "consecutiveGatewayErrors",
            Self::ConsecutiveLocalOrigin => "consecutiveLocalOriginFailures",
        }
    }
}

/// A threshold that was crossed: the evidence of an ejection. Prints as `COUNT FIELD reached, last WHAT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// Which.
    pub cause: Cause,
    /// How many failures in a row there were.
    pub failures: u32,
    /// What the last of them was.
    pub last: Observation,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} reached, last {:?}", self.failures, self.cause.field(), self.last)
    }
}

impl Counters {
    /// Counts one observation; the evidence, when it crosses a threshold. A threshold is crossed once: the count starts
    /// again with it.
    pub fn observe(&self, config: &OutlierDetection, seen: Observation) -> Option<Evidence> {
        let status =
            match seen {
                Observation::Status(status) => status,
                Observation::Unreachable | Observation::Late if config.split_local_origin => {
                    return cross(&self.local_origin, config.consecutive_local_origin).map(|failures| {
                        Evidence { cause: Cause::ConsecutiveLocalOrigin, failures, last: seen }
                    });
                }
                Observation::Unreachable => 503,
                Observation::Late => 504,
            };
        if config.split_local_origin {
            reset(&self.local_origin);
        }
        let is_error = if config.error_codes.is_empty() {
            (500..600).contains(&status)
        } else {
            // What never became an answer is an error whatever the codes.
            config.error_codes.contains(&status) || !matches!(seen, Observation::Status(_))
        };
        if !is_error {
            reset(&self.server_errors);
            reset(&self.gateway_errors);
            return None;
        }
        let evidence = |cause| move |failures| Evidence { cause, failures, last: seen };
        // Where it is not lower, the threshold of gateway errors has no effect.
        let gateway = config.consecutive_gateway;
        let lower = gateway > 0 && (config.consecutive_5xx == 0 || gateway < config.consecutive_5xx);
        if matches!(status, 502..=504) {
            if lower && let Some(failures) = cross(&self.gateway_errors, gateway) {
                return Some(evidence(Cause::ConsecutiveGateway)(failures));
            }
        } else {
            reset(&self.gateway_errors);
        }
        cross(&self.server_errors, config.consecutive_5xx).map(evidence(Cause::Consecutive5xx))
    }

    /// Forgets every failure.
    pub fn clear(&self) {
        for counter in [&self.server_errors, &self.gateway_errors, &self.local_origin] {
            reset(counter);
        }
    }
}

/// Counts up; the count, when it reaches `threshold`, from where it starts again. A threshold of 0 is never reached.
fn cross(counter: &AtomicU32, threshold: u32) -> Option<u32> {
    let count = counter.fetch_add(1, Ordering::Relaxed).saturating_add(1);
    // Exactly one of the workers that count sees the threshold; a threshold that was lowered meanwhile is passed.
    (threshold > 0 && count >= threshold && counter.swap(0, Ordering::Relaxed) >= threshold).then_some(count)
}

/// Most answers are no errors, and the line of the counter is shared by the workers: it is written only to change it.
fn reset(counter: &AtomicU32) {
    if counter.load(Ordering::Relaxed) != 0 {
        counter.store(0, Ordering::Relaxed);
    }
}

/// Who is ejected from a cluster, and until when.
#[derive(Debug, Default)]
pub struct Detector {
    hosts: HashMap<SocketAddr, Host>,
    events: VecDeque<Event>,
    noted: u64,
    ejections: u64,
    prevented: u64,
}

#[derive(Clone, Copy, Debug)]
struct Host {
    /// Ejections in a row, not yet decayed.
    times: u32,
    until: Instant,
    ejected: bool,
    /// Of its last ejection.
    evidence: Evidence,
}

/// An ejection that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// When it ends.
    pub until: Instant,
    /// How often in a row, this time included.
    pub times: u32,
    /// Why.
    pub evidence: Evidence,
}

/// Something that the detector decided, with its evidence (DR-OD08).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at: Instant,
    /// About which endpoint.
    pub endpoint: SocketAddr,
    /// What.
    pub kind: EventKind,
}

/// What the detector decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The endpoint gets no requests.
    Ejected {
        /// Why.
        evidence: Evidence,
        /// For how long.
        duration: Duration,
        /// How often in a row, this time included.
        times: u32,
    },
    /// It would have been ejected, but too many are already.
    NotEjected {
        /// Why it would have been.
        evidence: Evidence,
        /// How many are ejected.
        ejected: usize,
        /// Of how many.
        of: usize,
    },
    /// Its time is over.
    Returned {
        /// How often it had been ejected in a row.
        times: u32,
    },
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ejected { evidence, duration, times } => {
                write!(f, "ejected for {duration:?} (time {times} in a row): {evidence}")
            }
            Self::NotEjected { evidence, ejected, of } => write!(
                f,
                "not ejected, {ejected} of {of} are and maxEjectionPercent allows no more: {evidence}"
            ),
            Self::Returned { times } => write!(f, "returned after ejection {times} in a row"),
        }
    }
}

impl Detector {
    /// Decides on an endpoint that crossed a threshold, of a cluster with `endpoints`. Whether it is ejected now.
    pub fn trip(
        &mut self,
        config: &OutlierDetection,
        endpoint: SocketAddr,
        evidence: Evidence,
        endpoints: usize,
        now: Instant,
    ) -> bool {
        let known = self.hosts.get(&endpoint).copied();
        if known.is_some_and(|host| host.ejected) {
            return false;
        }
        let ejected = self.ejected();
        // In hundredths of an endpoint, so that the share is exact.
        if (ejected + 1) * 100 > endpoints * config.max_ejection_percent.min(100) as usize {
            self.prevented += 1;
            self.note(now, endpoint, EventKind::NotEjected { evidence, ejected, of: endpoints });
            return false;
        }
        let before = known.map_or(0, |host| decayed(host, config.interval, now));
        let times = before.saturating_add(1);
        let most = config.max_ejection_time.max(config.base_ejection_time);
        let duration = config.base_ejection_time.saturating_mul(times).min(most);
        let until = mesh_core::clock::after(now, duration);
        self.hosts.insert(endpoint, Host { times, until, ejected: true, evidence });
        self.ejections += 1;
        self.note(now, endpoint, EventKind::Ejected { evidence, duration, times });
        true
    }

    /// Lets those return whose time is over; their addresses.
    pub fn sweep(&mut self, now: Instant) -> Vec<SocketAddr> {
        let over = self.hosts.iter_mut().filter(|(_, host)| host.ejected && host.until <= now);
        let mut returned: Vec<_> = over
            .map(|(addr, host)| {
                host.ejected = false;
                (host.until, *addr, host.times)
            })
            .collect();
        returned.sort_unstable();
        for (_, endpoint, times) in &returned {
            self.note(now, *endpoint, EventKind::Returned { times: *times });
        }
        returned.into_iter().map(|(_, endpoint, _)| endpoint).collect()
    }

    /// Forgets endpoints that are gone.
    pub fn retain(&mut self, mut is_known: impl FnMut(&SocketAddr) -> bool) {
        self.hosts.retain(|addr, _| is_known(addr));
    }

    /// How many are ejected.
    #[must_use]
    pub fn ejected(&self) -> usize {
        self.hosts.values().filter(|host| host.ejected).count()
    }

    /// When the next ejection ends; `None` when nobody is ejected.
    #[must_use]
    pub fn next_return(&self) -> Option<Instant> {
        self.hosts.values().filter(|host| host.ejected).map(|host| host.until).min()
    }

    /// Until when an endpoint is ejected; `None` when it is not.
    #[must_use]
    pub fn ejected_until(&self, endpoint: &SocketAddr) -> Option<Instant> {
        self.hosts.get(endpoint).filter(|host| host.ejected).map(|host| host.until)
    }

    /// The ejection of an endpoint; `None` when it is not ejected.
    #[must_use]
    pub fn ejection(&self, endpoint: &SocketAddr) -> Option<Ejection> {
        let host = self.hosts.get(endpoint).filter(|host| host.ejected)?;
        Some(Ejection { until: host.until, times: host.times, evidence: host.evidence })
    }

    /// The last decisions, oldest first.
    pub fn events(&self) -> impl ExactSizeIterator<Item = &Event> {
        self.events.iter()
    }

    /// How many decisions there were so far, of which [`events`](Self::events) has the last.
    #[must_use]
    pub fn noted(&self) -> u64 {
        self.noted
    }

    /// Ejections so far.
    #[must_use]
    pub fn ejections(&self) -> u64 {
        self.ejections
    }

    /// Ejections that `maxEjectionPercent` prevented.
    #[must_use]
    pub fn prevented(&self) -> u64 {
        self.prevented
    }

    fn note(&mut self, at: Instant, endpoint: SocketAddr, kind: EventKind) {
        if self.events.len() == EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event { at, endpoint, kind });
        self.noted += 1;
    }
}

/// Ejections in a row, one less for each interval since the last one ended.
fn decayed(host: Host, interval: Duration, now: Instant) -> u32 {
    let healthy = now.saturating_duration_since(host.until).as_nanos();
    let intervals = healthy.checked_div(interval.as_nanos()).unwrap_or(0);
    host.times.saturating_sub(u32::try_from(intervals).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: Observation = Observation::Status(500);
    const GATEWAY: Observation = Observation::Status(503);
    const GOOD: Observation = Observation::Status(200);

    fn addr(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    fn evidence() -> Evidence {
        Evidence { cause: Cause::Consecutive5xx, failures: 5, last: BAD }
    }

    /// After which observation, from 1, a threshold is crossed, and which.
    fn crossed(config: &OutlierDetection, seen: &[Observation]) -> Option<(usize, Cause)> {
        let counters = Counters::default();
        (1..).zip(seen).find_map(|(at, seen)| Some((at, counters.observe(config, *seen)?.cause)))
    }

    #[test]
    fn dr_od01_consecutive_errors_with_nothing_good_between() {
        let config = OutlierDetection::default();
        assert_eq!(crossed(&config, &[BAD; 9]), Some((5, Cause::Consecutive5xx)));
        assert_eq!(crossed(&config, &[BAD, BAD, BAD, BAD, GOOD, BAD, BAD, BAD, BAD]), None);
        assert_eq!(crossed(&config, &[Observation::Status(404); 9]), None);
        let off = OutlierDetection { consecutive_5xx: 0, ..config.clone() };
        assert_eq!(crossed(&off, &[BAD; 100]), None);
        let gateway = OutlierDetection { consecutive_gateway: 3, ..config.clone() };
        assert_eq!(crossed(&gateway, &[GATEWAY; 9]), Some((3, Cause::ConsecutiveGateway)));
        assert_eq!(
            crossed(&gateway, &[GATEWAY, GATEWAY, BAD, GATEWAY, BAD]),
            Some((5, Cause::Consecutive5xx))
        );
        let useless = OutlierDetection { consecutive_gateway: 7, ..config.clone() };
        assert_eq!(crossed(&useless, &[GATEWAY; 9]), Some((5, Cause::Consecutive5xx)));
        let only_gateway = OutlierDetection { consecutive_gateway: 7, ..off };
        assert_eq!(crossed(&only_gateway, &[GATEWAY; 9]), Some((7, Cause::ConsecutiveGateway)));
    }

    #[test]
    fn dr_od05_failures_without_an_answer_count_as_answers_or_by_themselves() {
        let config = OutlierDetection { consecutive_gateway: 2, ..OutlierDetection::default() };
        let mixed = [Observation::Unreachable, Observation::Late, Observation::Unreachable];
        assert_eq!(crossed(&config, &mixed), Some((2, Cause::ConsecutiveGateway)));
        let split = OutlierDetection { split_local_origin: true, consecutive_local_origin: 3, ..config };
        assert_eq!(crossed(&split, &mixed), Some((3, Cause::ConsecutiveLocalOrigin)));
        assert_eq!(crossed(&split, &[Observation::Late, GOOD, Observation::Late, Observation::Late]), None);
        assert_eq!(
            crossed(&split, &[GATEWAY, Observation::Late, GATEWAY]),
            Some((3, Cause::ConsecutiveGateway)),
            "an answer ends a row of failures, a failure does not end a row of answers"
        );
    }

    #[test]
    fn dr_od06_the_codes_that_are_errors() {
        let config = OutlierDetection {
            error_codes: vec![429, 503],
            consecutive_5xx: 2,
            ..OutlierDetection::default()
        };
        assert_eq!(crossed(&config, &[BAD; 9]), None);
        assert_eq!(crossed(&config, &[Observation::Status(429); 9]), Some((2, Cause::Consecutive5xx)));
    }

    #[test]
    fn dr_od07_a_grpc_status_counts_as_the_http_status_it_stands_for() {
        let of = |grpc| Observation::of_response(StatusCode::OK, grpc);
        assert_eq!(
            [None, Some(0), Some(14), Some(4), Some(13), Some(2), Some(5)].map(of),
            [
                Observation::Status(200),
                Observation::Status(200),
                Observation::Status(503),
                Observation::Status(504),
                Observation::Status(500),
                Observation::Status(500),
                Observation::Status(404),
            ]
        );
        assert_eq!(Observation::of_failure(ErrorKind::Overflow), None, "DR-CP04");
        assert_eq!(Observation::of_failure(ErrorKind::DownstreamReset), None);
    }

    #[test]
    fn dr_od02_ejections_grow_and_decay() {
        let config = OutlierDetection { max_ejection_percent: 100, ..OutlierDetection::default() };
        let mut detector = Detector::default();
        let start = mesh_core::clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(detector.trip(&config, addr(1), evidence(), 3, at(0)));
        assert_eq!(detector.ejected_until(&addr(1)), Some(at(30)));
        assert!(!detector.trip(&config, addr(1), evidence(), 3, at(1)), "it is ejected already");
        assert!(detector.sweep(at(29)).is_empty());
        assert_eq!(detector.sweep(at(30)), [addr(1)]);
        assert!(detector.trip(&config, addr(1), evidence(), 3, at(31)));
        assert_eq!(detector.ejected_until(&addr(1)), Some(at(91)), "the second in a row is twice as long");
        assert_eq!(detector.sweep(at(200)), [addr(1)]);
        assert!(detector.trip(&config, addr(1), evidence(), 3, at(101)));
        assert_eq!(
            detector.ejected_until(&addr(1)),
            Some(at(101 + 60)),
            "an interval of health took one away"
        );
        detector.sweep(at(500));
        for round in 0..20 {
            let now = at(1000 + round * 301);
            assert!(detector.trip(&config, addr(2), evidence(), 3, now));
            let duration = detector.ejected_until(&addr(2)).unwrap() - now;
            assert!(duration <= Duration::from_secs(300));
            detector.sweep(detector.next_return().unwrap());
        }
    }

    #[test]
    fn dr_od03_never_more_than_the_share() {
        let config = OutlierDetection { max_ejection_percent: 50, ..OutlierDetection::default() };
        let mut detector = Detector::default();
        let now = mesh_core::clock::now();
        let tripped: Vec<_> =
            (1..=5).map(|port| detector.trip(&config, addr(port), evidence(), 5, now)).collect();
        assert_eq!(tripped, [true, true, false, false, false]);
        assert_eq!((detector.ejected(), detector.prevented()), (2, 3));
        let ten = OutlierDetection::default();
        let mut detector = Detector::default();
        assert!(!detector.trip(&ten, addr(1), evidence(), 9, now), "one of nine is more than a tenth");
        assert!(detector.trip(&ten, addr(1), evidence(), 10, now));
    }

    #[test]
    fn dr_od08_every_decision_is_an_event_with_its_evidence() {
        let config = OutlierDetection { max_ejection_percent: 50, ..OutlierDetection::default() };
        let mut detector = Detector::default();
        let now = mesh_core::clock::now();
        detector.trip(&config, addr(1), evidence(), 2, now);
        detector.trip(&config, addr(2), evidence(), 2, now);
        detector.sweep(now + Duration::from_secs(30));
        let said: Vec<_> =
            detector.events().map(|event| format!("{} {}", event.endpoint, event.kind)).collect();
        assert_eq!(
            said,
            [
                "127.0.0.1:1 ejected for 30s (time 1 in a row): 5 consecutive5xxErrors reached, last Status(500)",
                "127.0.0.1:2 not ejected, 1 of 2 are and maxEjectionPercent allows no more: 5 consecutive5xxErrors \
                 reached, last Status(500)",
                "127.0.0.1:1 returned after ejection 1 in a row",
            ]
        );
        for _ in 0..1000 {
            detector.trip(&config, addr(1), evidence(), 2, now);
            detector.sweep(now + Duration::from_secs(1000));
        }
        assert_eq!(detector.events().len(), EVENTS);
        assert_eq!(detector.noted(), 3 + 2 * 1000);
    }

    #[test]
    fn bug_an_ejection_longer_than_a_clock_can_tell_panicked() {
        let config = OutlierDetection { base_ejection_time: Duration::MAX, ..OutlierDetection::default() };
        let mut detector = Detector::default();
        let now = mesh_core::clock::now();
        assert!(detector.trip(&config, addr(1), evidence(), 10, now));
        assert_eq!(detector.sweep(now + Duration::from_secs(86_400 * 365)), []);
        assert_eq!(detector.ejected(), 1);
    }

    #[test]
    fn a_threshold_that_workers_cross_together_is_crossed_once() {
        let config = OutlierDetection { consecutive_5xx: 10, ..OutlierDetection::default() };
        let counters = Counters::default();
        let crossed = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        if counters.observe(&config, BAD).is_some() {
                            crossed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(crossed.into_inner(), 1);
    }
}
