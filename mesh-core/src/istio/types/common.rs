//! Messages that several kinds share.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

const NANOS_PER_SECOND: i128 = 1_000_000_000;
const NANOS_PER_MILLI: i128 = 1_000_000;

/// The range of `google.protobuf.Duration`: 10,000 years either way.
const MAX_SECONDS: i128 = 315_576_000_000;

/// A span of time as it was written: protobuf JSON (`"1.5s"`) or Go's form (`"1h"`, `"1m30s"`, `"1ms"`).
///
/// The value is exact to the nanosecond and may be negative, so that the validator of the field, and not the
/// parser, judges range and precision ([`check::duration`](super::check::duration)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration {
    seconds: i64,
    nanos: i32,
}

/// The text is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a duration; write it as \"1.5s\", \"1h\", \"1m\" or \"1ms\"")]
pub struct InvalidDuration {
    text: String,
}

impl Duration {
    /// The span of `millis` milliseconds.
    #[must_use]
    pub fn from_millis(millis: i64) -> Self {
        Self::from_nanos(i128::from(millis) * NANOS_PER_MILLI).unwrap_or_default()
    }

    /// The span of `seconds` seconds.
    #[must_use]
    pub const fn from_secs(seconds: i64) -> Self {
        Self { seconds, nanos: 0 }
    }

    /// The span in nanoseconds; negative when it was written so.
    #[must_use]
    pub fn as_nanos(self) -> i128 {
        i128::from(self.seconds) * NANOS_PER_SECOND + i128::from(self.nanos)
    }

    /// The span for timers; a negative one is zero.
    #[must_use]
    pub fn to_std(self) -> std::time::Duration {
        match (u64::try_from(self.seconds), u32::try_from(self.nanos)) {
            (Ok(seconds), Ok(nanos)) => std::time::Duration::new(seconds, nanos),
            _ => std::time::Duration::ZERO,
        }
    }

    /// Whether it is exactly zero, which many fields use for "off".
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.seconds == 0 && self.nanos == 0
    }

    /// Whether it is below zero, which no field allows.
    #[must_use]
    pub const fn is_negative(self) -> bool {
        self.seconds < 0 || self.nanos < 0
    }

    /// Whether it is a whole number of milliseconds.
    #[must_use]
    pub fn is_whole_millis(self) -> bool {
        self.as_nanos() % NANOS_PER_MILLI == 0
    }

    fn from_nanos(nanos: i128) -> Option<Self> {
        let seconds = nanos / NANOS_PER_SECOND;
        if seconds.abs() > MAX_SECONDS {
            return None;
        }
        let rest = nanos % NANOS_PER_SECOND;
        Some(Self { seconds: i64::try_from(seconds).ok()?, nanos: i32::try_from(rest).ok()? })
    }
}

impl FromStr for Duration {
    type Err = InvalidDuration;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_duration(text).ok_or_else(|| InvalidDuration { text: text.to_owned() })
    }
}

/// Go's grammar, of which protobuf's `1.5s` is a part: a sign, then numbers with units, largest or smallest first.
fn parse_duration(text: &str) -> Option<Duration> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(Duration::default());
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (digits, after) = rest.split_at(number);
        let unit_len = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, tail) = after.split_at(unit_len);
        let unit_nanos: i128 = match unit {
            "h" => 3_600 * NANOS_PER_SECOND,
            "m" => 60 * NANOS_PER_SECOND,
            "s" => NANOS_PER_SECOND,
            "ms" => NANOS_PER_MILLI,
            "us" | "µs" | "μs" => 1_000,
            "ns" => 1,
            _ => return None,
        };
        total = total.checked_add(scale(digits, unit_nanos)?)?;
        rest = tail;
    }
    Duration::from_nanos(if negative { -total } else { total })
}

/// `digits` (with at most one point) times `unit`; below a nanosecond it is cut, as Go does.
fn scale(digits: &str, unit: i128) -> Option<i128> {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let mut nanos = if whole.is_empty() { 0 } else { whole.parse::<i64>().ok()? as i128 * unit };
    let mut place = unit;
    for digit in fraction.bytes().take(18) {
        place /= 10;
        nanos += i128::from(digit - b'0') * place;
    }
    Some(nanos)
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.is_negative() { "-" } else { "" };
        write!(f, "{sign}{}", self.seconds.unsigned_abs())?;
        if self.nanos != 0 {
            let digits = format!("{:09}", self.nanos.unsigned_abs());
            write!(f, ".{}", digits.trim_end_matches('0'))?;
        }
        f.write_str("s")
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Duration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as \"1.5s\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Duration, E> {
                Err(E::custom(format_args!(
                    "{number} has no unit; write it as \"{number}s\" or \"{number}ms\""
                )))
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Duration, E> {
                Err(E::custom(format_args!(
                    "{number} has no unit; write it as \"{number}s\" or \"{number}ms\""
                )))
            }
        }

        deserializer.deserialize_any(Text)
    }
}

/// How a string is compared: the oneof `exact | prefix | regex`, which is case-sensitive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StringMatch {
    /// Equal to this.
    pub exact: Option<String>,
    /// Begins with this.
    pub prefix: Option<String>,
    /// Matched as a whole by this RE2 expression.
    pub regex: Option<String>,
}

/// What a [`StringMatch`] compares with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StringMatchKind<'a> {
    /// Nothing was said; headers and query parameters take it as "present".
    Unset,
    /// Equal.
    Exact(&'a str),
    /// Begins with.
    Prefix(&'a str),
    /// Full match of an RE2 expression.
    Regex(&'a str),
}

impl StringMatch {
    /// An exact match.
    #[must_use]
    pub fn exact(value: impl Into<String>) -> Self {
        Self { exact: Some(value.into()), ..Self::default() }
    }

    /// A prefix match.
    #[must_use]
    pub fn prefix(value: impl Into<String>) -> Self {
        Self { prefix: Some(value.into()), ..Self::default() }
    }

    /// A full regex match.
    #[must_use]
    pub fn regex(value: impl Into<String>) -> Self {
        Self { regex: Some(value.into()), ..Self::default() }
    }

    /// The member of the oneof that is set; the validator has seen to it that there is at most one.
    #[must_use]
    pub fn kind(&self) -> StringMatchKind<'_> {
        match (&self.exact, &self.prefix, &self.regex) {
            (Some(value), ..) => StringMatchKind::Exact(value),
            (_, Some(value), _) => StringMatchKind::Prefix(value),
            (.., Some(value)) => StringMatchKind::Regex(value),
            (None, None, None) => StringMatchKind::Unset,
        }
    }
}

/// A port by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortSelector {
    /// 1..=65535; 0 when it was not written.
    pub number: u32,
}

/// A share of requests: 0.0..=100.0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Percent {
    /// The percentage, not the fraction.
    pub value: f64,
}

/// `istio.type.v1beta1.WorkloadSelector`: used by the kinds of security, telemetry and extensions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadSelector {
    /// Labels that a workload must have, all of them.
    pub match_labels: BTreeMap<String, String>,
}

/// `istio.networking.v1alpha3.WorkloadSelector`: used by Sidecar, ServiceEntry and EnvoyFilter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkingWorkloadSelector {
    /// Labels that a workload must have, all of them.
    pub labels: BTreeMap<String, String>,
}

/// `istio.type.v1beta1.PolicyTargetReference`: attaches a policy to a Gateway, GatewayClass, Service or ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyTargetReference {
    /// The API group; empty is Kubernetes' core group.
    pub group: String,
    /// The kind.
    pub kind: String,
    /// The name.
    pub name: String,
    /// The namespace; must be empty or the policy's own.
    pub namespace: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x_02_durations_in_both_forms() {
        for (text, nanos) in [
            ("1.5s", 1_500_000_000),
            ("1h", 3_600_000_000_000),
            ("1m", 60_000_000_000),
            ("1s", 1_000_000_000),
            ("1ms", 1_000_000),
            ("1m30s", 90_000_000_000),
            ("0", 0),
            ("0s", 0),
            ("0.000000001s", 1),
            ("100us", 100_000),
            ("-2s", -2_000_000_000),
            (".5s", 500_000_000),
        ] {
            assert_eq!(text.parse::<Duration>().unwrap().as_nanos(), nanos, "{text}");
        }
        for text in
            ["", "s", "1", "1x", "1.2.3s", "--1s", ".s", "99999999999999999999s", "400000000000s", "1 s"]
        {
            assert!(text.parse::<Duration>().is_err(), "{text}");
        }
    }

    #[test]
    fn durations_print_as_protobuf_does() {
        for (text, printed) in [("1h", "3600s"), ("1500ms", "1.5s"), ("-0.25s", "-0.25s"), ("0", "0s")] {
            assert_eq!(text.parse::<Duration>().unwrap().to_string(), printed);
        }
    }
}
