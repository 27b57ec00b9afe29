//! `mesh.rs` Scenario, a kind of ours: what a simulation does to a configuration.
//!
//! It says which requests are made, what the endpoints do and when, and what must come of it. Times count from the
//! start of the run. It configures no proxy; the simulator of mesh-route gives it meaning.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use super::check::{self, Checked};
use super::common::Duration;
use crate::istio::findings::{Findings, Validate};

/// The most requests that a scenario may make; each is kept until the report is made.
const MAX_REQUESTS: f64 = 2_000_000.0;

/// The most rows that a report may have.
const MAX_INTERVALS: i128 = 10_000;

/// The most users of a load, so that each has an address.
const MAX_USERS: u32 = 65_536;

/// The most workers.
const MAX_WORKERS: u32 = 64;

/// A simulation: load, endpoints, expectations.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Scenario {
    /// Where every random number comes from; the same seed gives the same report. Default 0.
    pub seed: u64,
    /// How long requests are made. Required.
    pub duration: Option<Duration>,
    /// What one row of the report stands for; default a tenth of the duration, in whole seconds where it is longer.
    pub interval: Option<Duration>,
    /// How long requests may take after the last was made, before the run ends without them; default 15 s.
    pub drain: Option<Duration>,
    /// Workers, which share limits and ejections and nothing else; default 1.
    pub workers: Option<u32>,
    /// Files of the configuration, relative to this one; documents beside the scenario belong to it too.
    pub config: Vec<String>,
    /// The requests.
    pub load: Vec<Load>,
    /// What endpoints do. Where several select an endpoint, what a later one says wins.
    pub endpoints: Vec<EndpointScript>,
    /// What names resolve to.
    pub dns: Vec<DnsAnswer>,
    /// Changes of the configuration.
    pub reload: Vec<Reload>,
    /// What must come of it.
    pub expect: Vec<Expectation>,
}

/// Requests that are made whatever becomes of those before (an open loop).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Load {
    /// Its name in the report and for expectations.
    pub name: String,
    /// Requests per second. Required.
    pub rate: f64,
    /// How they are spread; default evenly.
    pub arrivals: Arrivals,
    /// When they begin; default at once.
    pub from: Option<Duration>,
    /// When they end; default with the run.
    pub to: Option<Duration>,
    /// The method; default GET.
    pub method: Option<String>,
    /// The authority, with a port where it matters. Required.
    pub host: String,
    /// The path with its query; default `/`. In it, and in the values of headers, `{user}` is the number of a user.
    pub path: Option<String>,
    /// How many users there are, each with an address and a number; each request is of one of them, drawn. Default 1.
    pub users: Option<u32>,
    /// Headers.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
    /// Whether the client speaks HTTP/2; default false.
    pub http2: bool,
    /// The port of the gateway's listener; default its first.
    pub port: Option<u32>,
}

/// How requests are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Arrivals {
    /// The same time between any two.
    #[default]
    Even,
    /// Independently of each other, at this rate in the mean.
    Poisson,
}

/// What some endpoints do. Whatever selects must all be true of an endpoint; nothing selects every endpoint.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointScript {
    /// Those with one of these addresses, `10.0.0.1` or `10.0.0.1:8080`.
    pub addresses: Vec<String>,
    /// Those of the service of this host, in full.
    pub host: String,
    /// Those of this subset.
    pub subset: String,
    /// Those with these labels.
    pub labels: BTreeMap<String, String>,
    /// How long an answer takes, unless a window says otherwise; default no time.
    pub latency: Option<Latency>,
    /// What they do at certain times; otherwise they answer 200. Where windows overlap, the last wins.
    pub script: Vec<Window>,
}

/// What an endpoint does for a while.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Window {
    /// When it begins; default at once.
    pub from: Option<Duration>,
    /// When it ends; default with the run.
    pub to: Option<Duration>,
    /// What becomes of connections; default they are accepted.
    pub connect: ConnectionFate,
    /// How long an answer takes.
    pub latency: Option<Latency>,
    /// What becomes of requests, by shares; the rest is answered 200.
    pub answers: Vec<Answer>,
}

/// What becomes of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ConnectionFate {
    /// They are accepted.
    #[default]
    Accept,
    /// New ones are refused, and open ones break off when it begins.
    Refuse,
    /// New ones are never made, and requests on open ones are never answered.
    Hang,
}

/// A share of the requests, and what becomes of them: one of status, gRPC status, hang and reset.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Answer {
    /// The share, 0 to 100; one of a window may leave it out and takes what is left.
    pub percent: Option<f64>,
    /// An answer with this status.
    pub status: Option<u32>,
    /// An answer 200 with this gRPC status and no message.
    pub grpc_status: Option<u32>,
    /// No answer, ever.
    pub hang: bool,
    /// The exchange breaks off.
    pub reset: Option<ResetAt>,
}

/// Where an exchange breaks off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ResetAt {
    /// Before the head of the answer.
    Head,
    /// Within its body.
    Body,
}

/// How long something takes: one of these. The clock of a simulation counts milliseconds, upwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Latency {
    /// Always the same.
    pub fixed: Option<Duration>,
    /// Anything between two bounds.
    pub uniform: Option<Uniform>,
    /// Exponentially distributed.
    pub exponential: Option<Exponential>,
}

/// Bounds of a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Uniform {
    /// The least.
    pub min: Duration,
    /// The most.
    pub max: Duration,
}

/// An exponentially distributed time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Exponential {
    /// Its mean.
    pub mean: Duration,
}

/// What a name resolves to, from some time on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DnsAnswer {
    /// The name.
    pub name: String,
    /// Since when; default from the start. The last answer that has begun counts.
    pub from: Option<Duration>,
    /// Its addresses; none is a failure to resolve it.
    pub addresses: Vec<String>,
}

/// A change of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Reload {
    /// When. Required.
    pub at: Option<Duration>,
    /// Files that take the place of `spec.config`, relative to the scenario; documents beside it stay.
    pub config: Vec<String>,
}

/// What must come of some of the requests. A condition is a comparison and a value: `">= 99.5%"`, `"< 200ms"`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Expectation {
    /// What it is called when it is not met.
    pub name: String,
    /// Of the requests of this load; default of all.
    pub load: String,
    /// Of those made from here on.
    pub from: Option<Duration>,
    /// Of those made before.
    pub to: Option<Duration>,
    /// The share of the requests that succeed, in percent.
    pub success: Option<String>,
    /// How many requests fail.
    pub failed: Option<String>,
    /// Tries per request.
    pub amplification: Option<String>,
    /// How many tries were more than the first of their request.
    pub retries: Option<String>,
    /// The latency that half of the answers keep within.
    pub p50: Option<String>,
    /// The latency that 90 % of the answers keep within.
    pub p90: Option<String>,
    /// The latency that 99 % of the answers keep within.
    pub p99: Option<String>,
    /// What circuit breakers and retry budgets refused, of whatever load, to a tenth of a second.
    pub refused: Option<String>,
    /// How often outlier detection ejected an endpoint, at whatever load.
    pub ejections: Option<String>,
}

/// What the value of a condition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A percentage, with its sign.
    Percent,
    /// A number.
    Number,
    /// A time, compared in milliseconds.
    Time,
}

/// A comparison with a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Condition {
    comparison: Comparison,
    value: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    AtLeast,
    AtMost,
    Above,
    Below,
    Equal,
}

impl Condition {
    /// Reads a comparison (`>=`, `<=`, `>`, `<`, `==`) and a value.
    ///
    /// # Errors
    /// No comparison, or a value that is not in `unit`.
    pub fn parse(text: &str, unit: Unit) -> Result<Self, String> {
        const KNOWN: [(&str, Comparison); 5] = [
            (">=", Comparison::AtLeast),
            ("<=", Comparison::AtMost),
            ("==", Comparison::Equal),
            (">", Comparison::Above),
            ("<", Comparison::Below),
        ];
        let found = KNOWN.iter().find_map(|(sign, comparison)| Some((*comparison, text.strip_prefix(sign)?)));
        let (comparison, value) =
            found.ok_or_else(|| format!("{text:?} begins with none of >=, <=, ==, > and <"))?;
        let value = value.trim();
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|number| number.is_finite());
        let read = match unit {
            Unit::Percent => value.strip_suffix('%').and_then(number),
            Unit::Number => number(value),
            Unit::Time => value.parse::<Duration>().ok().map(|time| time.as_nanos() as f64 / 1e6),
        };
        match read {
            Some(value) => Ok(Self { comparison, value }),
            None => Err(format!("{value:?} is not {unit}")),
        }
    }

    /// Whether it is true of `value`: a percentage, a number, or milliseconds.
    #[must_use]
    pub fn holds(&self, value: f64) -> bool {
        match self.comparison {
            Comparison::AtLeast => value >= self.value,
            Comparison::AtMost => value <= self.value,
            Comparison::Above => value > self.value,
            Comparison::Below => value < self.value,
            Comparison::Equal => (value - self.value).abs() < 1e-9,
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Percent => "a percentage such as 99.5%",
            Self::Number => "a number",
            Self::Time => "a time such as 200ms",
        })
    }
}

impl Scenario {
    /// The time of one row of the report.
    #[must_use]
    pub fn row(&self) -> std::time::Duration {
        let tenth = self.duration.unwrap_or_default().to_std() / 10;
        let default = match tenth.as_secs() {
            0 => tenth.max(std::time::Duration::from_millis(1)),
            seconds => std::time::Duration::from_secs(seconds),
        };
        self.interval.map_or(default, Duration::to_std)
    }
}

impl Expectation {
    /// Every condition that was written: its field, its text and the unit of its value.
    pub fn conditions(&self) -> impl Iterator<Item = (&'static str, &str, Unit)> {
        [
            ("success", &self.success, Unit::Percent),
            ("failed", &self.failed, Unit::Number),
            ("amplification", &self.amplification, Unit::Number),
            ("retries", &self.retries, Unit::Number),
            ("p50", &self.p50, Unit::Time),
            ("p90", &self.p90, Unit::Time),
            ("p99", &self.p99, Unit::Time),
            ("refused", &self.refused, Unit::Number),
            ("ejections", &self.ejections, Unit::Number),
        ]
        .into_iter()
        .filter_map(|(field, text, unit)| Some((field, text.as_deref()?, unit)))
    }
}

impl Validate for Scenario {
    fn validate(&self, out: &mut Findings) {
        match self.duration {
            None => out.error("duration", "duration is required"),
            Some(duration) => {
                out.check("duration", check::duration(duration));
            }
        }
        if let Some(interval) = self.interval
            && out.check("interval", check::duration(interval))
            && self
                .duration
                .is_some_and(|duration| duration.as_nanos() / interval.as_nanos().max(1) > MAX_INTERVALS)
        {
            out.error("interval", format!("the report would have more than {MAX_INTERVALS} rows"));
        }
        if let Some(drain) = self.drain {
            out.check("drain", check::duration_or_zero(drain));
        }
        if self.workers.is_some_and(|workers| !(1..=MAX_WORKERS).contains(&workers)) {
            out.error("workers", format!("must be between 1 and {MAX_WORKERS}"));
        }
        if self.load.is_empty() {
            out.error("load", "at least one load is required");
        }
        let mut names = BTreeSet::new();
        for (index, load) in self.load.iter().enumerate() {
            out.item("load", index, |out| {
                load.validate(out);
                if !load.name.is_empty() && !names.insert(load.name.as_str()) {
                    out.error("name", format!("another load is called {:?}", load.name));
                }
            });
        }
        let seconds = |time: Duration| time.as_nanos() as f64 / 1e9;
        let made = |load: &Load| {
            let end = self.duration.unwrap_or_default();
            let to = load.to.map_or(end, |to| to.min(end));
            load.rate * (seconds(to) - seconds(load.from.unwrap_or_default())).max(0.0)
        };
        if self.load.iter().map(made).sum::<f64>() > MAX_REQUESTS {
            out.error("load", format!("the loads make more than {MAX_REQUESTS} requests"));
        }
        for (index, endpoints) in self.endpoints.iter().enumerate() {
            out.item("endpoints", index, |out| endpoints.validate(out));
        }
        for (index, answer) in self.dns.iter().enumerate() {
            out.item("dns", index, |out| {
                out.check("name", check::fqdn(&answer.name));
                times(out, answer.from, None);
                for (at, address) in answer.addresses.iter().enumerate() {
                    out.check(&format!("addresses[{at}]"), check::ip(address));
                }
            });
        }
        for (index, reload) in self.reload.iter().enumerate() {
            out.item("reload", index, |out| match reload.at {
                None => out.error("at", "at is required"),
                Some(at) => {
                    out.check("at", check::duration_or_zero(at));
                }
            });
        }
        for (index, expectation) in self.expect.iter().enumerate() {
            out.item("expect", index, |out| expectation.validate(out, &names));
        }
    }
}

impl Load {
    fn validate(&self, out: &mut Findings) {
        if !(self.rate.is_finite() && self.rate > 0.0) {
            out.error("rate", "must be a number of requests per second above 0");
        }
        times(out, self.from, self.to);
        if self.method.as_ref().is_some_and(|method| method.parse::<http::Method>().is_err()) {
            out.error("method", "is not a method");
        }
        if self.host.is_empty() {
            out.error("host", "host is required");
        } else if self.host.parse::<http::uri::Authority>().is_err() {
            out.error("host", format!("{:?} is not an authority", self.host));
        }
        if let Some(path) = &self.path
            && !(path.starts_with('/')
                && path.replace("{user}", "0").parse::<http::uri::PathAndQuery>().is_ok())
        {
            out.error("path", format!("{path:?} is not a path that begins with /"));
        }
        out.within("headers", |out| {
            for (name, value) in &self.headers {
                let at = check::key_path(name);
                out.check(&at, check::header_name(name));
                if http::HeaderValue::from_str(value).is_err() {
                    out.error(&at, "is not the value of a header");
                }
            }
        });
        if let Some(port) = self.port {
            out.check("port", check::port(port));
        }
        if self.users.is_some_and(|users| !(1..=MAX_USERS).contains(&users)) {
            out.error("users", format!("must be between 1 and {MAX_USERS}"));
        }
    }
}

impl EndpointScript {
    fn validate(&self, out: &mut Findings) {
        for (index, address) in self.addresses.iter().enumerate() {
            if address.parse::<IpAddr>().is_err() && address.parse::<SocketAddr>().is_err() {
                let message = format!("{address:?} is not an address such as 10.0.0.1 or 10.0.0.1:8080");
                out.error(&format!("addresses[{index}]"), message);
            }
        }
        if !self.host.is_empty() {
            out.check("host", check::fqdn(&self.host));
        }
        check::labels(out, "labels", &self.labels);
        latency(out, self.latency);
        for (index, window) in self.script.iter().enumerate() {
            out.item("script", index, |out| window.validate(out));
        }
    }
}

impl Window {
    fn validate(&self, out: &mut Findings) {
        times(out, self.from, self.to);
        latency(out, self.latency);
        if self.connect != ConnectionFate::Accept && !self.answers.is_empty() {
            out.error("answers", "there are no answers where no connections are accepted");
        }
        let mut sum = 0.0;
        let mut rest = 0;
        for (index, answer) in self.answers.iter().enumerate() {
            out.item("answers", index, |out| {
                match answer.percent {
                    None => rest += 1,
                    Some(percent) if (0.0..=100.0).contains(&percent) => sum += percent,
                    Some(percent) => {
                        out.error("percent", format!("percentage {percent} must be in the range 0..100"));
                    }
                }
                if let Some(status) = answer.status {
                    out.check("status", final_status(status));
                }
                if answer.grpc_status.is_some_and(|status| status > 16) {
                    out.error("grpcStatus", "is not a gRPC status (0 to 16)");
                }
                let fates = [
                    answer.status.is_some(),
                    answer.grpc_status.is_some(),
                    answer.hang,
                    answer.reset.is_some(),
                ];
                if fates.into_iter().filter(|said| *said).count() != 1 {
                    out.error("", "exactly one of status, grpcStatus, hang and reset is wanted");
                }
            });
        }
        if rest > 1 {
            out.error("answers", "only one may leave its percent out");
        }
        if sum > 100.0 {
            out.error("answers", format!("the percentages add up to {sum}, more than 100"));
        }
    }
}

impl Expectation {
    fn validate(&self, out: &mut Findings, loads: &BTreeSet<&str>) {
        times(out, self.from, self.to);
        if !self.load.is_empty() && !loads.contains(self.load.as_str()) {
            out.error("load", format!("no load is called {:?}", self.load));
        }
        for (field, text, unit) in self.conditions() {
            out.check(field, Condition::parse(text, unit).map(drop));
        }
        if self.conditions().next().is_none() {
            out.error("", "nothing is expected");
        }
    }
}

fn final_status(status: u32) -> Checked {
    if (200..=599).contains(&status) {
        Ok(())
    } else {
        Err(format!("{status} is not the status of an answer"))
    }
}

fn times(out: &mut Findings, from: Option<Duration>, to: Option<Duration>) {
    for (field, time) in [("from", from), ("to", to)] {
        if let Some(time) = time {
            out.check(field, check::duration_or_zero(time));
        }
    }
    if let Some(to) = to
        && to <= from.unwrap_or_default()
    {
        out.error("to", "must be after from");
    }
}

fn latency(out: &mut Findings, latency: Option<Latency>) {
    let Some(latency) = latency else { return };
    out.within("latency", |out| {
        let forms = [latency.fixed.is_some(), latency.uniform.is_some(), latency.exponential.is_some()];
        if forms.into_iter().filter(|said| *said).count() != 1 {
            out.error("", "exactly one of fixed, uniform and exponential is wanted");
        }
        let named = [
            ("fixed", latency.fixed),
            ("uniform.min", latency.uniform.map(|uniform| uniform.min)),
            ("uniform.max", latency.uniform.map(|uniform| uniform.max)),
            ("exponential.mean", latency.exponential.map(|exponential| exponential.mean)),
        ];
        for (field, time) in named {
            if time.is_some_and(Duration::is_negative) {
                out.error(field, "must not be negative");
            }
        }
        if latency.uniform.is_some_and(|uniform| uniform.max < uniform.min) {
            out.error("uniform.max", "must not be below min");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_compare_in_their_unit() {
        let holds = |text, unit, value| Condition::parse(text, unit).unwrap().holds(value);
        assert!(holds(">= 99.5%", Unit::Percent, 99.5) && !holds(">=99.5 %", Unit::Percent, 99.4));
        assert!(holds("< 1.3", Unit::Number, 1.2) && !holds("<1.3", Unit::Number, 1.3));
        assert!(holds("<= 1m", Unit::Time, 60_000.0) && !holds("> 200ms", Unit::Time, 200.0));
        assert!(holds("== 4", Unit::Number, 4.0) && !holds("== 4", Unit::Number, 4.1));
        for (text, unit) in [
            ("99%", Unit::Percent),
            (">= 99", Unit::Percent),
            ("<= 5", Unit::Time),
            ("> x", Unit::Number),
            ("> nan", Unit::Number),
            ("", Unit::Number),
        ] {
            assert!(Condition::parse(text, unit).is_err(), "{text}");
        }
    }

    #[test]
    fn a_row_is_a_tenth_unless_it_is_said() {
        let row = |duration, interval| Scenario { duration, interval, ..Scenario::default() }.row();
        let millis = std::time::Duration::from_millis;
        assert_eq!(row(Some(Duration::from_secs(45)), None), millis(4000));
        assert_eq!(row(Some(Duration::from_secs(5)), None), millis(500));
        assert_eq!(row(Some(Duration::from_secs(5)), Some(Duration::from_secs(1))), millis(1000));
    }
}
