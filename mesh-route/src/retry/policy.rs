//! When a try is worth another: `retryOn` with Envoy's meaning (VS-Y03, VS-Y04), as a pure function of what came back.

use std::fmt;
use std::time::Duration;

use http::{HeaderMap, HeaderName, Method, StatusCode};
use mesh_core::{ErrorKind, vendor};

use super::backoff::Backoff;

/// How often, when and how a request is tried again.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Tries after the first. A request is sent at most once more than this.
    pub attempts: u32,
    /// What is worth another try.
    pub on: RetryOn,
    /// Time for one try, from the whole request to the head of the response; `None`, the default, is no limit.
    pub per_try_timeout: Option<Duration>,
    /// Time between tries.
    pub backoff: Backoff,
    /// Whether endpoints that were tried are avoided while there are others. Default true (VS-Y07).
    pub ignore_previous_hosts: bool,
    /// Whether a retry may leave the localities that were tried. Default false.
    pub remote_localities: bool,
    /// Whether a request that is not idempotent is tried again only when the upstream cannot have seen it
    /// (VS-Y10). Default false, which is Istio's.
    pub only_idempotent: bool,
}

/// The conditions of `retryOn`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RetryOn {
    conditions: u32,
    status_codes: Box<[StatusCode]>,
    headers: Box<[HeaderName]>,
}

/// A word of `retryOn` that nobody knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no retry condition: a name such as \"5xx\", \"reset\", \"unavailable\", or a status code")]
pub struct UnknownCondition(pub String);

/// What one try came to.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// The upstream answered.
    Response {
        /// Its status.
        status: StatusCode,
        /// Its headers.
        headers: &'a HeaderMap,
        /// The gRPC status, from the headers or from trailers that followed at once.
        grpc_status: Option<u16>,
    },
    /// There was no answer.
    Failed(ErrorKind),
}

/// What has to be kept of a request so that it can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryClass {
    /// Nothing: it is not tried again.
    Never,
    /// Nothing: only what was not written is sent again, and that comes back by itself.
    Connect,
    /// The head: there is no body.
    Head,
    /// The head, and a copy of the body while it is small enough.
    Replay,
}

macro_rules! conditions {
    ($($name:ident = $bit:literal, $word:literal;)*) => {
        $(const $name: u32 = 1 << $bit;)*
        const WORDS: &[(&str, u32)] = &[$(($word, $name),)*];
    };
}

conditions! {
    ON_5XX = 0, "5xx";
    GATEWAY_ERROR = 1, "gateway-error";
    RESET = 2, "reset";
    RESET_BEFORE_REQUEST = 3, "reset-before-request";
    CONNECT_FAILURE = 4, "connect-failure";
    RETRIABLE_4XX = 5, "retriable-4xx";
    REFUSED_STREAM = 6, "refused-stream";
    RETRIABLE_STATUS_CODES = 7, "retriable-status-codes";
    RETRIABLE_HEADERS = 8, "retriable-headers";
    RATELIMITED = 9, "envoy-ratelimited";
    // There is no HTTP/3 upstream, so it never holds.
    HTTP3_POST_CONNECT_FAILURE = 10, "http3-post-connect-failure";
    GRPC_CANCELLED = 11, "cancelled";
    GRPC_DEADLINE_EXCEEDED = 12, "deadline-exceeded";
    GRPC_INTERNAL = 13, "internal";
    GRPC_RESOURCE_EXHAUSTED = 14, "resource-exhausted";
    GRPC_UNAVAILABLE = 15, "unavailable";
}

const GRPC: u32 =
    GRPC_CANCELLED | GRPC_DEADLINE_EXCEEDED | GRPC_INTERNAL | GRPC_RESOURCE_EXHAUSTED | GRPC_UNAVAILABLE;

/// Conditions that a failure after the request was written can meet, whatever the protocol.
const AFTER_WRITING: u32 = ON_5XX | GATEWAY_ERROR | RESET;

impl RetryOn {
    /// Nothing.
    #[must_use]
    pub fn never() -> Self {
        Self::default()
    }

    /// The conditions of a comma-separated list; a number is a status code.
    ///
    /// # Errors
    /// [`UnknownCondition`] for the first word that is neither.
    pub fn parse(list: &str) -> Result<Self, UnknownCondition> {
        let mut on = Self::default();
        let mut codes = Vec::new();
        for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            if let Some((_, condition)) = WORDS.iter().find(|(name, _)| *name == word) {
                on.conditions |= condition;
            } else {
                let code = word.parse().ok().and_then(|code| StatusCode::from_u16(code).ok());
                codes.push(code.ok_or_else(|| UnknownCondition(word.to_owned()))?);
                on.conditions |= RETRIABLE_STATUS_CODES;
            }
        }
        on.status_codes = codes.into();
        Ok(on)
    }

    /// Adds response headers for `retriable-headers`: a response that has one of them is worth another try.
    #[must_use]
    pub fn with_headers(mut self, headers: impl IntoIterator<Item = HeaderName>) -> Self {
        self.headers = headers.into_iter().collect();
        self
    }

    /// Both.
    #[must_use]
    pub(crate) fn or(&self, other: &Self) -> Self {
        Self {
            conditions: self.conditions | other.conditions,
            status_codes: self.status_codes.iter().chain(&other.status_codes).copied().collect(),
            headers: self.headers.iter().chain(&other.headers).cloned().collect(),
        }
    }

    const fn has(&self, any_of: u32) -> bool {
        self.conditions & any_of != 0
    }

    /// Whether the outcome is one of them.
    #[must_use]
    pub fn holds(&self, outcome: &Outcome<'_>) -> bool {
        match *outcome {
            Outcome::Response { status, headers, grpc_status } => {
                self.holds_for_response(status, headers, grpc_status)
            }
            Outcome::Failed(kind) => self.has(match kind {
                ErrorKind::ConnectFailure | ErrorKind::ConnectTimeout => {
                    CONNECT_FAILURE | RESET_BEFORE_REQUEST | AFTER_WRITING
                }
                ErrorKind::Unsent => RESET_BEFORE_REQUEST | AFTER_WRITING,
                ErrorKind::RefusedStream => REFUSED_STREAM | AFTER_WRITING,
                ErrorKind::UpstreamReset | ErrorKind::UpstreamProtocol | ErrorKind::Timeout => AFTER_WRITING,
                // Limits are there to be kept, and without an endpoint there is nothing to try.
                _ => 0,
            }),
        }
    }

    fn holds_for_response(&self, status: StatusCode, headers: &HeaderMap, grpc: Option<u16>) -> bool {
        if vendor::RATELIMITED.get(headers).is_some() {
            return self.has(RATELIMITED);
        }
        let code = status.as_u16();
        let grpc = match grpc {
            Some(1) => GRPC_CANCELLED,
            Some(4) => GRPC_DEADLINE_EXCEEDED,
            Some(8) => GRPC_RESOURCE_EXHAUSTED,
            Some(13) => GRPC_INTERNAL,
            Some(14) => GRPC_UNAVAILABLE,
            _ => 0,
        };
        (self.has(ON_5XX) && status.is_server_error())
            || (self.has(GATEWAY_ERROR) && matches!(code, 502..=504))
            || (self.has(RETRIABLE_4XX) && code == 409)
            || (self.has(RETRIABLE_STATUS_CODES) && self.status_codes.contains(&status))
            || (self.has(RETRIABLE_HEADERS) && self.headers.iter().any(|name| headers.contains_key(name)))
            || self.has(grpc)
    }

    /// Whether what has been written may have to be sent again: because of an answer, or of a failure.
    fn needs_replay(&self, grpc: bool, http2: bool) -> bool {
        self.has(AFTER_WRITING | RETRIABLE_4XX | RATELIMITED)
            || (self.has(RETRIABLE_STATUS_CODES) && !self.status_codes.is_empty())
            || (self.has(RETRIABLE_HEADERS) && !self.headers.is_empty())
            || (grpc && self.has(GRPC))
            // Over HTTP/2 a stream is refused after it was written.
            || (http2 && self.has(REFUSED_STREAM))
    }
}

/// As `retryOn` says it.
impl fmt::Display for RetryOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = WORDS.iter().filter(|(_, condition)| self.has(*condition)).map(|(word, _)| *word);
        let mut separator = "";
        for word in words {
            write!(f, "{separator}{word}")?;
            separator = ",";
        }
        for code in &self.status_codes {
            write!(f, "{separator}{}", code.as_u16())?;
            separator = ",";
        }
        Ok(())
    }
}

impl RetryPolicy {
    /// Tries again up to `attempts` times on these conditions, with Istio's defaults for everything else.
    #[must_use]
    pub fn new(attempts: u32, on: RetryOn) -> Self {
        Self {
            attempts,
            on,
            per_try_timeout: None,
            backoff: Backoff::default(),
            ignore_previous_hosts: true,
            remote_localities: false,
            only_idempotent: false,
        }
    }

    /// Never tries again.
    #[must_use]
    pub fn never() -> Self {
        Self::new(0, RetryOn::never())
    }

    /// What Istio does on a route that says nothing (VS-Y01): two more tries for what was not processed.
    #[must_use]
    pub fn istio_default() -> Self {
        let conditions =
            CONNECT_FAILURE | REFUSED_STREAM | GRPC_UNAVAILABLE | GRPC_CANCELLED | RETRIABLE_STATUS_CODES;
        Self::new(2, RetryOn { conditions, ..RetryOn::default() })
    }

    /// What Istio 1.1 did on a route that says nothing: also when the upstream answered 503.
    #[must_use]
    pub fn istio_1_1_default() -> Self {
        let mut policy = Self::istio_default();
        policy.on.conditions |= GRPC_RESOURCE_EXHAUSTED;
        policy.on.status_codes = Box::new([StatusCode::SERVICE_UNAVAILABLE]);
        policy
    }

    /// Time for one try.
    #[must_use]
    pub fn per_try_timeout(mut self, timeout: Duration) -> Self {
        self.per_try_timeout = Some(timeout);
        self
    }

    /// Time between tries.
    #[must_use]
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    /// Tries what is not idempotent again only when the upstream cannot have seen it.
    #[must_use]
    pub fn idempotent_only(mut self) -> Self {
        self.only_idempotent = true;
        self
    }

    /// What has to be kept of a request: by its protocols, and whether it has a body.
    #[must_use]
    pub fn class(&self, grpc: bool, http2: bool, idempotent: bool, has_body: bool) -> RetryClass {
        if self.attempts == 0 {
            RetryClass::Never
        } else if self.on.needs_replay(grpc, http2) && (idempotent || !self.only_idempotent || http2) {
            if has_body { RetryClass::Replay } else { RetryClass::Head }
        } else if self.on.conditions == 0 {
            RetryClass::Never
        } else {
            RetryClass::Connect
        }
    }

    /// Whether the outcome of a try is worth another, however many there were.
    #[must_use]
    pub fn wants(&self, outcome: &Outcome<'_>, idempotent: bool) -> bool {
        let unseen = matches!(outcome, Outcome::Failed(kind) if kind.is_unsent());
        self.on.holds(outcome) && (idempotent || !self.only_idempotent || unseen)
    }
}

/// Whether a request can be repeated without another effect: by its method (RFC 9110, 9.2.2), or because its client
/// gave it a key.
#[must_use]
pub fn is_idempotent(method: &Method, headers: &HeaderMap) -> bool {
    method.is_idempotent()
        || headers.contains_key("idempotency-key")
        || headers.contains_key("x-idempotency-key")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(list: &str) -> RetryOn {
        RetryOn::parse(list).unwrap()
    }

    fn answered(on: &RetryOn, status: u16) -> bool {
        let headers = HeaderMap::new();
        on.holds(&Outcome::Response {
            status: StatusCode::from_u16(status).unwrap(),
            headers: &headers,
            grpc_status: None,
        })
    }

    #[test]
    fn vs_y03_every_token_is_known_and_no_other() {
        for (word, _) in WORDS {
            assert_eq!(on(word).to_string(), *word);
        }
        assert_eq!(on(" 5xx , 429,").to_string(), "5xx,retriable-status-codes,429");
        assert_eq!(RetryOn::parse("5xx,oops").unwrap_err(), UnknownCondition("oops".to_owned()));
        assert!(RetryOn::parse("99").is_err() && RetryOn::parse("1000").is_err());
    }

    #[test]
    fn vs_y04_answers() {
        let codes = [200, 409, 429, 500, 501, 502, 503, 504, 599];
        let which = |list: &str| {
            let on = on(list);
            codes.into_iter().filter(|code| answered(&on, *code)).collect::<Vec<_>>()
        };
        assert_eq!(which("5xx"), [500, 501, 502, 503, 504, 599]);
        assert_eq!(which("gateway-error"), [502, 503, 504]);
        assert_eq!(which("retriable-4xx"), [409]);
        assert_eq!(which("429,503"), [429, 503]);
        assert!(which("reset,connect-failure,refused-stream,reset-before-request").is_empty());
    }

    #[test]
    fn vs_y04_failures() {
        use ErrorKind::*;
        let kinds = [
            ConnectFailure,
            ConnectTimeout,
            Unsent,
            RefusedStream,
            UpstreamReset,
            UpstreamProtocol,
            Timeout,
            Overflow,
            NoHealthyUpstream,
            LocalReply,
            DownstreamReset,
        ];
        let which = |list: &str| {
            let on = on(list);
            kinds.into_iter().filter(|kind| on.holds(&Outcome::Failed(*kind))).collect::<Vec<_>>()
        };
        for all in ["5xx", "gateway-error", "reset"] {
            assert_eq!(which(all), kinds[..7], "{all}");
        }
        assert_eq!(which("connect-failure"), [ConnectFailure, ConnectTimeout]);
        assert_eq!(which("refused-stream"), [RefusedStream]);
        assert_eq!(which("reset-before-request"), [ConnectFailure, ConnectTimeout, Unsent]);
        assert!(which("503,retriable-4xx,unavailable").is_empty(), "VS-Y05: ours is no answer");
    }

    #[test]
    fn vs_y04_headers_and_grpc() {
        let mut headers = HeaderMap::new();
        let holds = |on: &RetryOn, headers: &HeaderMap, grpc_status| {
            on.holds(&Outcome::Response { status: StatusCode::OK, headers, grpc_status })
        };
        for (word, code) in [
            ("cancelled", 1),
            ("deadline-exceeded", 4),
            ("resource-exhausted", 8),
            ("internal", 13),
            ("unavailable", 14),
        ] {
            assert!((0..17).all(|status| holds(&on(word), &headers, Some(status)) == (status == code)));
        }
        let retriable = on("retriable-headers").with_headers([HeaderName::from_static("x-again")]);
        assert!(!holds(&retriable, &headers, None));
        headers.insert("x-again", "1".parse().unwrap());
        assert!(holds(&retriable, &headers, None));
        headers.insert("x-envoy-ratelimited", "true".parse().unwrap());
        assert!(!holds(&retriable, &headers, None), "a rate limit is retried only when it is asked for");
        assert!(holds(&on("envoy-ratelimited"), &headers, None));
    }

    #[test]
    fn vs_y08_the_class_is_the_least_that_will_do() {
        let default = RetryPolicy::istio_default();
        let of = |policy: &RetryPolicy, grpc, http2| {
            [true, false].map(|has_body| policy.class(grpc, http2, true, has_body))
        };
        assert_eq!(of(&default, false, false), [RetryClass::Connect; 2]);
        assert_eq!(of(&default, true, false), [RetryClass::Replay, RetryClass::Head]);
        assert_eq!(of(&default, false, true), [RetryClass::Replay, RetryClass::Head]);
        assert_eq!(of(&RetryPolicy::never(), true, true), [RetryClass::Never; 2]);
        let answers = RetryPolicy::new(1, on("503"));
        assert_eq!(of(&answers, false, false), [RetryClass::Replay, RetryClass::Head]);
        assert_eq!(answers.idempotent_only().class(false, false, false, true), RetryClass::Connect);
        assert_eq!(
            of(&RetryPolicy::new(1, on("retriable-status-codes")), false, false),
            [RetryClass::Connect; 2]
        );
    }

    #[test]
    fn vs_y10_only_what_was_not_seen_is_repeated_unless_idempotent() {
        let careful = RetryPolicy::new(2, on("5xx")).idempotent_only();
        let seen = Outcome::Failed(ErrorKind::UpstreamReset);
        let unseen = Outcome::Failed(ErrorKind::ConnectFailure);
        assert!(careful.wants(&seen, true) && !careful.wants(&seen, false));
        assert!(careful.wants(&unseen, true) && careful.wants(&unseen, false));
        let mut headers = HeaderMap::new();
        assert!(is_idempotent(&Method::PUT, &headers) && !is_idempotent(&Method::POST, &headers));
        headers.insert("idempotency-key", "7".parse().unwrap());
        assert!(is_idempotent(&Method::POST, &headers));
    }
}
