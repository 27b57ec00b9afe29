//! The headers by which proxies speak to each other, and the prefix of their names (VS-X01).
//!
//! Envoy names them `x-envoy-…`, and its bootstrap lets another vendor's prefix stand there (`header_prefix`). So here:
//! the prefix is the process's. It is chosen once, by [`set`], before any of the headers is used; from then on it cannot
//! change, so that reading it takes no lock and what one layer writes another one finds.
//!
//! With `x-envoy` a [`Header`] uses a constant, whose hash the compiler computes: looking one up by a name of which that
//! is not known costs several ns more. Names with another prefix are made when it is chosen, and point to memory that
//! stays, so that a copy neither allocates nor counts references.
//!
//! The prefix stands in what the proxy itself writes, believes and removes. What a configuration writes, as in
//! `headers.response.remove` or `%REQ(…)%`, is the name that is meant, with any prefix. All proxies of a mesh want the
//! same one: to a proxy with another prefix these headers are a client's like any other. A gateway always removes
//! `x-envoy-` as well.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use http::{HeaderMap, HeaderName, HeaderValue};

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

/// `None` is `x-envoy`.
static OTHER: OnceLock<Option<Names>> = OnceLock::new();

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

/// The prefix has been chosen before, or a header has been used already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the prefix of the headers is chosen once, before any is used")]
pub struct InUse;

/// Chooses the prefix of this process.
///
/// # Errors
/// When it was chosen before, or any [`Header`] was used, which every layer does: then it is `x-envoy` for good.
pub fn set(prefix: &Prefix) -> Result<(), InUse> {
    let other = (*prefix != Prefix::default()).then(|| Names::new(prefix));
    OTHER.set(other).map_err(|_| InUse)
}

#[inline]
fn other() -> Option<&'static Names> {
    OTHER.get_or_init(|| None).as_ref()
}

/// A header of the proxies, under the name that the prefix of this process makes.
#[derive(Clone, Debug)]
pub struct Header {
    envoy: HeaderName,
    other: fn(&Names) -> &HeaderName,
}

impl Header {
    /// Its name.
    #[inline]
    #[must_use]
    pub fn name(self) -> HeaderName {
        match other() {
            None => self.envoy,
            Some(names) => (self.other)(names).clone(),
        }
    }

    /// Its first value.
    #[inline]
    #[must_use]
    pub fn get(self, headers: &HeaderMap) -> Option<&HeaderValue> {
        match other() {
            None => headers.get(self.envoy),
            Some(names) => headers.get((self.other)(names)),
        }
    }

    /// Puts this value in the place of those that it has.
    #[inline]
    pub fn insert(self, headers: &mut HeaderMap, value: HeaderValue) {
        match other() {
            None => headers.insert(self.envoy, value),
            Some(names) => headers.insert((self.other)(names), value),
        };
    }

    /// Removes it; its first value.
    #[inline]
    pub fn remove(self, headers: &mut HeaderMap) -> Option<HeaderValue> {
        match other() {
            None => headers.remove(self.envoy),
            Some(names) => headers.remove((self.other)(names)),
        }
    }
}

macro_rules! headers {
    ($($(#[$doc:meta])* $header:ident $field:ident: $suffix:literal,)*) => {
        $(
            $(#[$doc])*
            #[doc = concat!("\n\n`x-envoy-", $suffix, "`")]
            pub const $header: Header = Header {
                envoy: HeaderName::from_static(concat!("x-envoy-", $suffix)),
                other: |names| &names.$field,
            };
        )*

        /// The names with another prefix than `x-envoy`.
        #[derive(Debug)]
        struct Names {
            prefix: Prefix,
            $($field: HeaderName,)*
        }

        impl Names {
            fn new(prefix: &Prefix) -> Self {
                Self { prefix: prefix.clone(), $($field: name(prefix, $suffix),)* }
            }
        }

        #[cfg(test)]
        fn all() -> Vec<Header> {
            vec![$($header),*]
        }
    };
}

headers! {
    /// To the upstream: which try it is, from 1.
    ATTEMPT_COUNT attempt_count: "attempt-count",
    /// To the upstream: the milliseconds that it has.
    EXPECTED_RQ_TIMEOUT_MS expected_rq_timeout_ms: "expected-rq-timeout-ms",
    /// To the upstream, from a gateway: the address of the client.
    EXTERNAL_ADDRESS external_address: "external-address",
    /// From a client that may order faults: the status of an abort in gRPC.
    FAULT_ABORT_GRPC_REQUEST fault_abort_grpc_request: "fault-abort-grpc-request",
    /// From a client that may order faults: the status of an abort in HTTP.
    FAULT_ABORT_REQUEST fault_abort_request: "fault-abort-request",
    /// From a client that may order faults: how many percent are aborted.
    FAULT_ABORT_REQUEST_PERCENTAGE fault_abort_request_percentage: "fault-abort-request-percentage",
    /// From a client that may order faults: the milliseconds of a delay.
    FAULT_DELAY_REQUEST fault_delay_request: "fault-delay-request",
    /// From a client that may order faults: how many percent are delayed.
    FAULT_DELAY_REQUEST_PERCENTAGE fault_delay_request_percentage: "fault-delay-request-percentage",
    /// From a trusted client: how often to retry.
    MAX_RETRIES max_retries: "max-retries",
    /// To the upstream: the path before it was rewritten.
    ORIGINAL_PATH original_path: "original-path",
    /// To the client, in a reply of our own: a limit refused the request.
    OVERLOADED overloaded: "overloaded",
    /// From the upstream: a limit of requests refused this one.
    RATELIMITED ratelimited: "ratelimited",
    /// From a trusted client: which statuses are retried.
    RETRIABLE_STATUS_CODES retriable_status_codes: "retriable-status-codes",
    /// From a trusted client: which statuses of gRPC are retried.
    RETRY_GRPC_ON retry_grpc_on: "retry-grpc-on",
    /// From a trusted client: when to retry.
    RETRY_ON retry_on: "retry-on",
    /// From a trusted client: the milliseconds of each try.
    UPSTREAM_RQ_PER_TRY_TIMEOUT_MS upstream_rq_per_try_timeout_ms: "upstream-rq-per-try-timeout-ms",
    /// From a trusted client: the milliseconds of the request.
    UPSTREAM_RQ_TIMEOUT_MS upstream_rq_timeout_ms: "upstream-rq-timeout-ms",
    /// To the client: the milliseconds that the upstream took.
    UPSTREAM_SERVICE_TIME upstream_service_time: "upstream-service-time",
}

/// Removes what only the mesh may say.
pub(crate) fn distrust(headers: &mut HeaderMap) {
    distrust_with(other(), headers);
}

fn distrust_with(other: Option<&Names>, headers: &mut HeaderMap) {
    let is_internal = |name: &&HeaderName| {
        INTERNAL.iter().any(|known| name.as_str().starts_with(known))
            || other.is_some_and(|names| covers(&names.prefix.0, name.as_str()))
    };
    let internal: Vec<_> = headers.keys().filter(is_internal).cloned().collect();
    for name in internal {
        headers.remove(name);
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
    use super::*;

    fn left(other: Option<&Names>, said: &[&'static str]) -> Vec<String> {
        let mut headers: HeaderMap = said
            .iter()
            .map(|name| (HeaderName::from_static(name), HeaderValue::from_static("said")))
            .collect();
        distrust_with(other, &mut headers);
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
        let acme = Names::new(&"X-Acme".parse().unwrap());
        assert_eq!(acme.attempt_count, "x-acme-attempt-count");
        for header in all() {
            let suffix = header.envoy.as_str().strip_prefix("x-envoy-").unwrap();
            assert_eq!((header.other)(&acme).as_str(), format!("x-acme-{suffix}"));
        }
    }

    #[test]
    fn vs_x01_nobody_outside_is_believed() {
        let said = ["x-acme", "x-acme-retry-on", "x-acmes-own", "x-envoy-retry-on", "x-istio-attributes"];
        assert_eq!(left(None, &said), ["x-acme", "x-acme-retry-on", "x-acmes-own"]);
        assert_eq!(left(Some(&Names::new(&"x-acme".parse().unwrap())), &said), ["x-acme", "x-acmes-own"]);
    }

    #[test]
    fn vs_x01_names_that_are_used_stay() {
        assert_eq!(OVERLOADED.name(), "x-envoy-overloaded");
        assert_eq!(set(&"x-acme".parse().unwrap()), Err(InUse));
        assert_eq!(set(&Prefix::default()), Err(InUse));
        assert_eq!(OVERLOADED.name(), "x-envoy-overloaded");
    }
}
