//! What a simulation came to.
//!
//! A request is counted in the row in which it was made, with everything that became of it later; a try in the row in
//! which its endpoint saw it. So `tries per request` is exact, and what an endpoint bore is true to the time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::diagnostics::Position;
use mesh_core::istio::Resource;
use mesh_core::istio::types::scenario::{Condition, Expectation, Scenario};
use serde_json::{Value, json};

use super::ledger::{Book, Exchange, Ledger, Sample, State};

/// What a simulation came to. Prints as a table; [`Report::to_json`] has everything.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// The name of the scenario.
    pub scenario: String,
    /// Where its random numbers came from.
    pub seed: u64,
    /// How many workers there were.
    pub workers: u32,
    /// When the last request had ended, or was given up.
    pub end: Duration,
    /// The rows, in order of time.
    pub intervals: Vec<Interval>,
    /// Everything together.
    pub total: Interval,
    /// Every endpoint of the configurations, in order.
    pub endpoints: Vec<SocketAddr>,
    /// What happened, in order of time.
    pub events: Vec<Event>,
    /// What was expected.
    pub expected: Vec<Checked>,
}

/// What happened in some time.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Interval {
    /// From here on.
    pub from: Duration,
    /// Before this.
    pub to: Duration,
    /// Requests that were made.
    pub requests: u64,
    /// Those with a whole answer that is not an error of a server (5xx, or a gRPC status but 0).
    pub succeeded: u64,
    /// Those that failed, by Envoy's response flags; where there are none, by the status.
    pub failed: BTreeMap<String, u64>,
    /// Those that had not ended when the run did.
    pub unfinished: u64,
    /// Tries of these requests.
    pub tries: u64,
    /// How many of these were not the first of their request.
    pub retries: u64,
    /// How long half, 90 % and 99 % of these requests took at most, whatever the answer; `None` without any.
    pub latency: Option<[Duration; 3]>,
    /// What circuit breakers refused: requests and their tries.
    pub overflows: u64,
    /// Retries that `maxRetries` or a budget refused.
    pub retry_overflows: u64,
    /// Tries as the endpoints saw them; those with none are left out.
    pub tries_by_endpoint: BTreeMap<SocketAddr, u64>,
    /// Who was ejected at its end.
    pub ejected: Vec<SocketAddr>,
    /// The clusters that were in panic at its end.
    pub panic: Vec<String>,
    /// The share of each canary at its end, in percent, by what is rolled out.
    pub canaries: BTreeMap<String, u8>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// When.
    pub at: Duration,
    /// What kind of thing.
    pub kind: EventKind,
    /// In which cluster.
    pub cluster: Option<String>,
    /// To which endpoint.
    pub endpoint: Option<SocketAddr>,
    /// In words, with the evidence.
    pub what: String,
    /// How often, one after the other.
    pub times: u64,
}

/// What kind of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// Outlier detection ejected an endpoint.
    Ejected,
    /// It would have, but too many are.
    NotEjected,
    /// The time of an ejection is over.
    Returned,
    /// Another configuration is in force.
    Reloaded,
    /// The controller of a canary has decided.
    Canary,
}

/// A condition, and whether it was met.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Checked {
    /// Its field, as `spec.expect[1].success`.
    pub path: String,
    /// The name of the expectation; may be empty.
    pub name: String,
    /// Where the scenario says so.
    pub position: Position,
    /// The condition as it was written.
    pub condition: String,
    /// What it was, in the unit of the condition; `None` when there was nothing to judge.
    pub was: Option<String>,
    /// Whether it was met. What cannot be judged is not.
    pub met: bool,
}

impl EventKind {
    /// A word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ejected => "ejected",
            Self::NotEjected => "not_ejected",
            Self::Returned => "returned",
            Self::Reloaded => "reloaded",
            Self::Canary => "canary",
        }
    }
}

impl Interval {
    /// How many requests failed.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }

    /// The share of the requests that succeeded, in percent; `None` without any.
    #[must_use]
    pub fn success(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.succeeded as f64 * 100.0 / self.requests as f64)
    }

    /// Tries per request; `None` without any.
    #[must_use]
    pub fn amplification(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.tries as f64 / self.requests as f64)
    }

    fn of<'b>(from: Duration, to: Duration, requests: impl Iterator<Item = &'b Exchange>) -> Self {
        let mut interval = Self { from, to, ..Self::default() };
        let mut took = Vec::new();
        for request in requests {
            interval.requests += 1;
            interval.tries += u64::from(request.tries());
            interval.retries += u64::from(request.tries().saturating_sub(1));
            match &request.state {
                State::UnderWay(_) => interval.unfinished += 1,
                State::Ended(end) => {
                    took.push(end.took);
                    match &end.failure {
                        None => interval.succeeded += 1,
                        Some(failure) => *interval.failed.entry(failure.clone()).or_default() += 1,
                    }
                }
            }
        }
        took.sort_unstable();
        // The smallest that so many keep within.
        let within =
            |percent: usize| took.get((took.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        if let (Some(p50), Some(p90), Some(p99)) = (within(50), within(90), within(99)) {
            interval.latency = Some([p50, p90, p99]);
        }
        interval
    }

    /// Whether nothing was made, tried or refused.
    fn is_quiet(&self) -> bool {
        self.requests + self.overflows + self.retry_overflows == 0 && self.tries_by_endpoint.is_empty()
    }

    /// Adds what was seen of the clusters.
    fn observe<'b>(&mut self, samples: impl Iterator<Item = &'b Sample>) {
        for sample in samples {
            self.overflows += sample.overflows;
            self.retry_overflows += sample.retry_overflows;
            self.ejected.clone_from(&sample.ejected);
            self.panic.clone_from(&sample.panic);
            self.canaries.clone_from(&sample.canaries);
        }
    }

    fn to_json(&self) -> Value {
        let millis = |time: Duration| time.as_millis() as u64;
        let [p50, p90, p99] =
            self.latency.map_or([None; 3], |latency| latency.map(|time| Some(millis(time))));
        json!({
            "from_ms": millis(self.from),
            "to_ms": millis(self.to),
            "requests": self.requests,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "unfinished": self.unfinished,
            "tries": self.tries,
            "retries": self.retries,
            "tries_per_request": self.amplification(),
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
            "overflows": self.overflows,
            "retry_overflows": self.retry_overflows,
            "tries_by_endpoint": self.tries_by_endpoint.iter()
                .map(|(addr, tries)| (addr.to_string(), (*tries).into()))
                .collect::<serde_json::Map<_, _>>(),
            "ejected": self.ejected.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "panic": self.panic,
            "canaries": self.canaries,
        })
    }
}

impl Report {
    pub(super) fn new(
        scenario: &Resource<Scenario>,
        positions: impl Fn(&str) -> Position,
        endpoints: Vec<SocketAddr>,
        end: Duration,
        ledger: &Ledger,
    ) -> Self {
        let mut book = ledger.lock();
        let (spec, row) = (&scenario.spec, scenario.spec.row());
        // Those who were seen later may have happened before.
        book.events.sort_by_key(|event| event.at);
        let duration = spec.duration.unwrap_or_default().to_std();
        let rows = end.max(duration).as_nanos().div_ceil(row.as_nanos().max(1));
        let rows = u32::try_from(rows).unwrap_or(u32::MAX);
        let intervals = (0..rows).map(|nth| {
            let (from, to) = (row * nth, row * (nth + 1));
            let made = |request: &&Exchange| (from..to).contains(&request.at);
            let mut interval = Interval::of(from, to, book.requests.iter().filter(made));
            interval.observe(book.samples.iter().filter(|sample| from < sample.at && sample.at <= to));
            interval.tries_by_endpoint = tries(&book, from, to);
            interval
        });
        let mut intervals: Vec<_> = intervals.collect();
        // Most requests that end after the last was made do so without anything that is worth a row.
        while intervals.last().is_some_and(|last| last.from >= duration && last.is_quiet()) {
            intervals.pop();
        }
        let mut total = Interval::of(Duration::ZERO, end, book.requests.iter());
        total.observe(book.samples.iter());
        total.tries_by_endpoint = tries(&book, Duration::ZERO, Duration::MAX);
        let expected = spec.expect.iter().enumerate().flat_map(|(index, expectation)| {
            judge(spec, index, expectation, &book).into_iter().map(|judged| Checked {
                position: positions(&judged.path),
                name: expectation.name.clone(),
                path: judged.path,
                condition: judged.condition,
                was: judged.was,
                met: judged.met,
            })
        });
        Self {
            scenario: scenario.meta.name.clone(),
            seed: spec.seed,
            workers: spec.workers.unwrap_or(1),
            end,
            intervals,
            total,
            endpoints,
            expected: expected.collect(),
            events: book.events.clone(),
        }
    }

    /// The conditions that were not met.
    pub fn unmet(&self) -> impl Iterator<Item = &Checked> {
        self.expected.iter().filter(|checked| !checked.met)
    }

    /// Everything, for programs.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "scenario": self.scenario,
            "seed": self.seed,
            "workers": self.workers,
            "end_ms": self.end.as_millis() as u64,
            "endpoints": self.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "intervals": self.intervals.iter().map(Interval::to_json).collect::<Vec<_>>(),
            "total": self.total.to_json(),
            "events": self.events.iter().map(|event| json!({
                "at_ms": event.at.as_millis() as u64,
                "kind": event.kind.as_str(),
                "cluster": event.cluster,
                "endpoint": event.endpoint.map(|endpoint| endpoint.to_string()),
                "what": event.what,
                "times": event.times,
            })).collect::<Vec<_>>(),
            "expected": self.expected.iter().map(|checked| json!({
                "field": checked.path,
                "name": checked.name,
                "at": checked.position.to_string(),
                "condition": checked.condition,
                "was": checked.was,
                "met": checked.met,
            })).collect::<Vec<_>>(),
        })
    }
}

fn tries(book: &Book, from: Duration, to: Duration) -> BTreeMap<SocketAddr, u64> {
    let within = |times: &Vec<Duration>| {
        let upto = |limit: Duration| times.partition_point(|at| *at < limit);
        upto(to).saturating_sub(upto(from)) as u64
    };
    let counted = book.tries.iter().map(|(addr, times)| (*addr, within(times)));
    counted.filter(|(_, tries)| *tries > 0).collect()
}

struct Judged {
    path: String,
    condition: String,
    was: Option<String>,
    met: bool,
}

fn judge(scenario: &Scenario, index: usize, expectation: &Expectation, book: &Book) -> Vec<Judged> {
    let from = expectation.from.map_or(Duration::ZERO, |from| from.to_std());
    let to = expectation.to.map_or(Duration::MAX, |to| to.to_std());
    let load = scenario.load.iter().position(|load| load.name == expectation.load);
    let load = load.filter(|_| !expectation.load.is_empty());
    let is_meant = |request: &&Exchange| {
        (from..to).contains(&request.at) && load.is_none_or(|load| request.load == load)
    };
    let seen = Interval::of(from, to, book.requests.iter().filter(is_meant));
    let ejections = book.events.iter().filter(|event| event.kind == EventKind::Ejected);
    let ejections = ejections.filter(|event| (from..to).contains(&event.at)).count();
    let sampled = book.samples.iter().filter(|sample| from < sample.at && sample.at <= to);
    let refused: u64 = sampled.map(|sample| sample.overflows + sample.retry_overflows).sum();
    let any = |count: u64| (seen.requests > 0).then_some(count as f64);
    let millis = |nth: usize| seen.latency.map(|latency| latency[nth].as_secs_f64() * 1000.0);
    let value = |field: &str| match field {
        "success" => seen.success(),
        "failed" => any(seen.failures()),
        "amplification" => seen.amplification(),
        "retries" => any(seen.retries),
        "p50" => millis(0),
        "p90" => millis(1),
        "p99" => millis(2),
        "refused" => Some(refused as f64),
        _ => Some(ejections as f64),
    };
    let said = |field: &str, value: f64| match field {
        "success" => format!("{value:.2}%"),
        "amplification" => format!("{value:.2}"),
        "p50" | "p90" | "p99" => format!("{value}ms"),
        _ => format!("{value}"),
    };
    let judged = expectation.conditions().map(|(field, text, unit)| {
        let value = value(field);
        // What the validator has let pass can be read.
        let holds = |value| Condition::parse(text, unit).is_ok_and(|condition| condition.holds(value));
        Judged {
            path: format!("spec.expect[{index}].{field}"),
            condition: text.to_owned(),
            was: value.map(|value| said(field, value)),
            met: value.is_some_and(holds),
        }
    });
    judged.collect()
}
