//! What a client that is trusted may say about time and tries (VS-T02).
//!
//! Envoy's headers, off unless the route trusts its clients: they let whoever sends a request multiply its load. They
//! are taken from the request, so that the next hop does not apply them again.

use std::time::Duration;

use http::HeaderMap;
use mesh_core::vendor;

use crate::retry::{RetryOn, RetryPolicy};

/// What the headers of one request say.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Overrides {
    /// In place of the route's; zero is none.
    pub(crate) timeout: Option<Duration>,
    pub(crate) per_try: Option<Duration>,
    attempts: Option<u32>,
    retry_on: Option<RetryOn>,
}

impl Overrides {
    /// Takes the headers out; `None` when there is none. A value that cannot be read says nothing.
    pub(crate) fn take(headers: &mut HeaderMap) -> Option<Box<Self>> {
        let mut said = Self::default();
        let millis = |text: String| text.parse().ok().map(Duration::from_millis);
        said.timeout = remove(headers, vendor::UPSTREAM_RQ_TIMEOUT_MS).and_then(millis);
        said.per_try = remove(headers, vendor::UPSTREAM_RQ_PER_TRY_TIMEOUT_MS).and_then(millis);
        said.attempts = remove(headers, vendor::MAX_RETRIES).and_then(|text| text.parse().ok());
        // Lists of conditions: words, gRPC words, status codes.
        for header in [vendor::RETRY_ON, vendor::RETRY_GRPC_ON, vendor::RETRIABLE_STATUS_CODES] {
            // One word that nobody knows does not take the others away.
            let words = remove(headers, header).unwrap_or_default();
            for on in words
                .split(',')
                .filter(|word| !word.trim().is_empty())
                .filter_map(|word| RetryOn::parse(word).ok())
            {
                said.retry_on = Some(said.retry_on.unwrap_or_default().or(&on));
            }
        }
        (said != Self::default()).then(|| Box::new(said))
    }

    /// The policy of the route with what the client said: its conditions are added, its number is taken.
    pub(crate) fn retry(&self, route: &RetryPolicy) -> RetryPolicy {
        let mut policy = route.clone();
        if let Some(on) = &self.retry_on {
            policy.on = policy.on.or(on);
            // A client that says when says also that, once (Envoy's default).
            policy.attempts = policy.attempts.max(1);
        }
        if let Some(attempts) = self.attempts {
            policy.attempts = attempts;
        }
        policy
    }
}

fn remove(headers: &mut HeaderMap, header: vendor::Header) -> Option<String> {
    header.remove(headers)?.to_str().ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs_t02_headers_are_taken_and_understood() {
        let mut headers = HeaderMap::new();
        assert_eq!(Overrides::take(&mut headers), None);
        for (name, value) in [
            ("x-envoy-upstream-rq-timeout-ms", "1500"),
            ("x-envoy-upstream-rq-per-try-timeout-ms", "200"),
            ("x-envoy-max-retries", "5"),
            ("x-envoy-retry-on", "5xx,what"),
            ("x-envoy-retriable-status-codes", "429"),
            ("x-other", "kept"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        let said = Overrides::take(&mut headers).unwrap();
        assert_eq!(headers.len(), 1);
        assert_eq!(
            (said.timeout, said.per_try),
            (Some(Duration::from_millis(1500)), Some(Duration::from_millis(200)))
        );
        let policy = said.retry(&RetryPolicy::new(2, RetryOn::parse("reset").unwrap()));
        assert_eq!(
            (policy.attempts, policy.on.to_string().as_str()),
            (5, "5xx,reset,retriable-status-codes,429")
        );
    }
}
