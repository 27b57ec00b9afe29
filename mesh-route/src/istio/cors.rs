//! `corsPolicy` of a VirtualService's rule (VS-C01, VS-C02).

use mesh_core::istio::types::virtual_service::{self as istio, UnmatchedPreflights as Unmatched};
use mesh_core::matcher::StringMatcher;

use super::http::string_matcher;
use crate::cors::{CorsPolicy, UnmatchedPreflights};

/// The policy of a rule; where it cannot be compiled, the field that cannot, with the reason.
pub(super) fn compile(policy: &istio::CorsPolicy) -> Result<CorsPolicy, (String, String)> {
    let mut builder = CorsPolicy::builder()
        .allow_methods(&policy.allow_methods)
        .allow_headers(&policy.allow_headers)
        .expose_headers(&policy.expose_headers)
        .allow_credentials(policy.allow_credentials.unwrap_or(false))
        .unmatched_preflights(match policy.unmatched_preflights {
            Unmatched::Unspecified | Unmatched::Forward => UnmatchedPreflights::Forward,
            Unmatched::Ignore => UnmatchedPreflights::Ignore,
        });
    if let Some(age) = policy.max_age {
        builder = builder.max_age(age.to_std());
    }
    // The deprecated list counts only where the other is not written.
    if policy.allow_origins.is_empty() {
        for origin in &policy.allow_origin {
            builder = builder.allow_origin(StringMatcher::exact(origin.as_str()));
        }
    }
    for (at, origin) in policy.allow_origins.iter().enumerate() {
        let matcher = string_matcher(origin).map_err(|reason| (format!(".allowOrigins[{at}]"), reason))?;
        builder = builder.allow_origin(matcher);
    }
    builder.build().map_err(|error| (String::new(), error.to_string()))
}
