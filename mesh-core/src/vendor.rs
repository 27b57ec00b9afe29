//! The headers by which proxies speak to each other, and the prefix of their names (VS-X01).
//!
//! Envoy names them `x-envoy-…`, and its bootstrap lets another vendor's prefix stand there (`header_prefix`). So here:
//! the prefix is the process's. It is chosen once, by [`set`], before anything has asked for [`names`]; from then on it
//! cannot change, so that reading it takes no lock and what one layer writes another one finds. Every name is made when
//! the process begins and points to memory that stays, so that a copy of it neither allocates nor counts references,
//! whatever the prefix.
//!
//! The prefix stands in what the proxy itself writes, believes and removes. What a configuration writes, as in
//! `headers.response.remove` or `%REQ(…)%`, is the name that is meant, with any prefix. All proxies of a mesh want the
//! same one: to a proxy with another prefix these headers are a client's like any other. A gateway always removes
//! `x-envoy-` as well.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use http::{HeaderMap, HeaderName};

/// The longest prefix, in bytes.
const LONGEST: usize = 64;

/// Headers that others speak by. A prefix that covers one would take it from every client of a gateway.
const OTHERS: [&str; 17] = [
    "accept-encoding",
    "access-control-request-method",
    "cache-control",
    "content-length",
    "grpc-timeout",
    "if-match",
    "keep-alive",
    "max-forwards",
    "proxy-authorization",
    "sec-websocket-key",
    "transfer-encoding",
    "user-agent",
    "x-b3-traceid",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-mesh-mirrored",
    "x-request-id",
];

/// From outside of the mesh nobody is believed what begins so, whatever the prefix.
const INTERNAL: [&str; 2] = ["x-envoy-", "x-istio-attributes"];

static NAMES: OnceLock<Names> = OnceLock::new();

/// What the names begin with, without the dash that follows; by default `x-envoy`.
///
/// In lower case, whatever it was parsed from: names of headers are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(Box<str>);

impl Default for Prefix {
    fn default() -> Self {
        Self("x-envoy".into())
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Prefix {
    type Err = InvalidPrefix;

    fn from_str(text: &str) -> Result<Self, InvalidPrefix> {
        let name = HeaderName::from_str(text).map_err(|_| InvalidPrefix::NoName)?;
        let prefix = name.as_str();
        if prefix.len() > LONGEST {
            return Err(InvalidPrefix::TooLong);
        }
        if prefix.ends_with('-') {
            return Err(InvalidPrefix::Dash);
        }
        match OTHERS.iter().find(|other| covers(prefix, other)) {
            Some(other) => Err(InvalidPrefix::Covers(other)),
            None => Ok(Self(prefix.into())),
        }
    }
}

/// Why a text is no prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidPrefix {
    /// It is empty, or has characters that names of headers do not have.
    #[error("it cannot begin the name of a header")]
    NoName,
    /// It is longer than 64 bytes.
    #[error("it is longer than {LONGEST} bytes")]
    TooLong,
    /// It ends with the dash that is put after it.
    #[error("a dash is put after it; leave out the one at its end")]
    Dash,
    /// A header of others begins so.
    #[error("`{0}` begins so as well, and a gateway would take it from every request")]
    Covers(&'static str),
}

/// The prefix has been chosen before, or the names have been used already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the prefix of the headers is chosen once, before any is used")]
pub struct InUse;

/// Chooses the prefix of this process.
///
/// # Errors
/// When it was chosen before, or [`names`] was asked for, which every layer does: then it is `x-envoy` for good.
pub fn set(prefix: &Prefix) -> Result<(), InUse> {
    NAMES.set(Names::new(prefix)).map_err(|_| InUse)
}

/// The names with the prefix of this process.
#[inline]
#[must_use]
pub fn names() -> &'static Names {
    NAMES.get_or_init(Names::default)
}

macro_rules! names {
    ($($(#[$doc:meta])* $field:ident: $suffix:literal,)*) => {
        /// The names of the headers, which Envoy documents as those of its router and its fault filter.
        #[derive(Clone, Debug)]
        #[non_exhaustive]
        pub struct Names {
            $($(#[$doc])* #[doc = concat!("\n\n`x-envoy-", $suffix, "`")] pub $field: HeaderName,)*
            /// Another prefix than `x-envoy`.
            other: Option<Prefix>,
        }

        /// With `x-envoy`.
        impl Default for Names {
            fn default() -> Self {
                Self {
                    $($field: HeaderName::from_static(concat!("x-envoy-", $suffix)),)*
                    other: None,
                }
            }
        }

        impl Names {
            fn new(prefix: &Prefix) -> Self {
                if *prefix == Prefix::default() {
                    return Self::default();
                }
                Self {
                    $($field: name(prefix, $suffix),)*
                    other: Some(prefix.clone()),
                }
            }
        }
    };
}

names! {
    /// To the upstream: which try it is, from 1.
    attempt_count: "attempt-count",
    /// To the upstream: the milliseconds that it has.
    expected_rq_timeout_ms: "expected-rq-timeout-ms",
    /// To the upstream, from a gateway: the address of the client.
    external_address: "external-address",
    /// From a client that may order faults: the status of an abort in gRPC.
    fault_abort_grpc_request: "fault-abort-grpc-request",
    /// From a client that may order faults: the status of an abort in HTTP.
    fault_abort_request: "fault-abort-request",
    /// From a client that may order faults: how many percent are aborted.
    fault_abort_request_percentage: "fault-abort-request-percentage",
    /// From a client that may order faults: the milliseconds of a delay.
    fault_delay_request: "fault-delay-request",
    /// From a client that may order faults: how many percent are delayed.
    fault_delay_request_percentage: "fault-delay-request-percentage",
    /// From a trusted client: how often to retry.
    max_retries: "max-retries",
    /// To the upstream: the path before it was rewritten.
    original_path: "original-path",
    /// To the client, in a reply of our own: a limit refused the request.
    overloaded: "overloaded",
    /// From the upstream: a limit of requests refused this one.
    ratelimited: "ratelimited",
    /// From a trusted client: which statuses are retried.
    retriable_status_codes: "retriable-status-codes",
    /// From a trusted client: which statuses of gRPC are retried.
    retry_grpc_on: "retry-grpc-on",
    /// From a trusted client: when to retry.
    retry_on: "retry-on",
    /// From a trusted client: the milliseconds of each try.
    upstream_rq_per_try_timeout_ms: "upstream-rq-per-try-timeout-ms",
    /// From a trusted client: the milliseconds of the request.
    upstream_rq_timeout_ms: "upstream-rq-timeout-ms",
    /// To the client: the milliseconds that the upstream took.
    upstream_service_time: "upstream-service-time",
}

impl Names {
    /// Removes what only the mesh may say.
    pub(crate) fn distrust(&self, headers: &mut HeaderMap) {
        let internal: Vec<_> =
            headers.keys().filter(|name| self.is_internal(name.as_str())).cloned().collect();
        for name in internal {
            headers.remove(name);
        }
    }

    fn is_internal(&self, name: &str) -> bool {
        INTERNAL.iter().any(|known| name.starts_with(known))
            || self.other.as_ref().is_some_and(|prefix| covers(&prefix.0, name))
    }
}

fn covers(prefix: &str, name: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('-'))
}

/// Made once for each process, so that what is leaked is bounded. It is a name, because the prefix is one.
fn name(prefix: &Prefix, suffix: &str) -> HeaderName {
    HeaderName::from_static(format!("{prefix}-{suffix}").leak())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn left(names: &Names, said: &[&'static str]) -> Vec<String> {
        let mut headers: HeaderMap = said
            .iter()
            .map(|name| (HeaderName::from_static(name), HeaderValue::from_static("said")))
            .collect();
        names.distrust(&mut headers);
        let mut left: Vec<_> = headers.keys().map(ToString::to_string).collect();
        left.sort();
        left
    }

    #[test]
    fn vs_x01_what_a_prefix_is() {
        let parse = |text: &str| text.parse::<Prefix>().map(|prefix| prefix.to_string());
        assert_eq!(parse("X-Acme"), Ok("x-acme".to_owned()));
        assert_eq!(parse("x-envoy").unwrap().parse(), Ok(Prefix::default()));
        for text in ["", "x acme", "x-acme:", "x-acme\r\n", "é"] {
            assert_eq!(parse(text), Err(InvalidPrefix::NoName), "{text:?}");
        }
        assert_eq!(parse("x-acme-"), Err(InvalidPrefix::Dash));
        assert!(parse(&"a".repeat(LONGEST)).is_ok());
        assert_eq!(parse(&"a".repeat(LONGEST + 1)), Err(InvalidPrefix::TooLong));
        for text in ["x", "x-forwarded", "x-request", "x-mesh", "content", "grpc"] {
            assert!(matches!(parse(text), Err(InvalidPrefix::Covers(_))), "{text}");
        }
    }

    #[test]
    fn vs_x01_every_name_begins_with_the_prefix() {
        let (envoy, acme) = (Names::default(), Names::new(&"X-Acme".parse().unwrap()));
        assert_eq!(envoy.attempt_count, "x-envoy-attempt-count");
        assert_eq!(acme.attempt_count, "x-acme-attempt-count");
        // With what is said of the other prefix, the names are all the text there is.
        let text = |names: &Names| format!("{names:?}").split(", other:").next().unwrap().to_owned();
        assert_eq!(text(&envoy).replace("x-envoy-", "x-acme-"), text(&acme));
        assert_eq!(text(&Names::new(&Prefix::default())), text(&envoy));
    }

    #[test]
    fn vs_x01_nobody_outside_is_believed() {
        let said = ["x-acme", "x-acme-retry-on", "x-acmes-own", "x-envoy-retry-on", "x-istio-attributes"];
        assert_eq!(left(&Names::default(), &said), ["x-acme", "x-acme-retry-on", "x-acmes-own"]);
        assert_eq!(left(&Names::new(&"x-acme".parse().unwrap()), &said), ["x-acme", "x-acmes-own"]);
    }

    #[test]
    fn vs_x01_names_that_are_used_stay() {
        let overloaded = &names().overloaded;
        assert_eq!(set(&"x-acme".parse().unwrap()), Err(InUse));
        assert_eq!(set(&Prefix::default()), Err(InUse));
        assert_eq!((&names().overloaded, overloaded.as_str()), (overloaded, "x-envoy-overloaded"));
    }
}
