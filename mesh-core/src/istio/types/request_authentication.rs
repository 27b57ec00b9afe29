//! `security.istio.io` RequestAuthentication (JW-01 … JW-06).

use serde::Deserialize;
use serde_json::Value;

use super::check::{self, Checked};
use super::common::{Duration, PolicyTargetReference, WorkloadSelector};
use super::target;
use super::workload_group::plain_header_name;
use crate::istio::findings::{Findings, Validate};

/// The longest address of a key set, in bytes.
const MAX_JWKS_URI_LEN: usize = 2048;

/// Which tokens are valid. A request without a token is not rejected by this alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RequestAuthentication {
    /// The workloads (X-05); not together with a target reference.
    pub selector: Option<WorkloadSelector>,
    /// The one target; the older form of `target_refs`.
    pub target_ref: Option<PolicyTargetReference>,
    /// The targets.
    pub target_refs: Vec<PolicyTargetReference>,
    /// The issuers whose tokens are accepted.
    pub jwt_rules: Vec<JwtRule>,
}

/// One issuer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JwtRule {
    /// The claim `iss`; may be empty when `jwks_uri` is set, and then any issuer is accepted.
    pub issuer: String,
    /// Accepted values of the claim `aud`, any of them; empty accepts the service's name, or any.
    pub audiences: Vec<String>,
    /// Where the keys are fetched from; empty means that they are discovered from the issuer.
    pub jwks_uri: String,
    /// The keys themselves, as a JSON text; not together with `jwks_uri`.
    pub jwks: String,
    /// Headers in which the token may be.
    pub from_headers: Vec<JwtHeader>,
    /// Query parameters in which the token may be.
    pub from_params: Vec<String>,
    /// Cookies in which the token may be.
    pub from_cookies: Vec<String>,
    /// The header in which the payload is passed on, base64url without padding.
    pub output_payload_to_header: String,
    /// Whether the token stays in the request; default false.
    pub forward_original_token: bool,
    /// Claims that are passed on as headers.
    pub output_claim_to_headers: Vec<ClaimToHeader>,
    /// How long a fetch of keys may take; default 5 s.
    pub timeout: Option<Duration>,
    /// Claims that are lists separated by spaces, beside `scope` and `permission`.
    pub space_delimited_claims: Vec<String>,
    /// Whether a request without a token is rejected.
    pub presence: Presence,
}

/// Whether a request must have a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Presence {
    /// A request without a token is let through, without an identity. The default.
    #[default]
    Optional,
    /// A request without a token is rejected.
    Required,
}

/// A header in which the token may be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JwtHeader {
    /// The name.
    pub name: String,
    /// What stands before the token, exactly (`"Bearer "`).
    pub prefix: String,
}

/// A claim that is passed on as a header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClaimToHeader {
    /// The header's name.
    pub header: String,
    /// The claim; `a.b` is a nested one.
    pub claim: String,
}

impl Validate for RequestAuthentication {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        target::aim(out, self.selector.as_ref(), self.target_ref.as_ref(), &self.target_refs);
        for (index, rule) in self.jwt_rules.iter().enumerate() {
            out.item("jwtRules", index, |out| rule.validate(out));
        }
    }
}

impl Validate for JwtRule {
    fn validate(&self, out: &mut Findings) {
        if self.issuer.is_empty() && self.jwks_uri.is_empty() {
            out.error("issuer", "issuer or jwksUri must be a non-empty string");
        }
        for (field, list) in [
            ("audiences", &self.audiences),
            ("fromParams", &self.from_params),
            ("fromCookies", &self.from_cookies),
            ("spaceDelimitedClaims", &self.space_delimited_claims),
        ] {
            no_empty(out, field, list);
        }
        if !self.jwks_uri.is_empty() {
            out.check("jwksUri", jwks_uri(&self.jwks_uri));
        }
        if !self.jwks.is_empty() {
            if !self.jwks_uri.is_empty() {
                out.error("jwks", "only one of jwks and jwksUri can be set");
            }
            jwks(out, &self.jwks);
        }
        for (index, header) in self.from_headers.iter().enumerate() {
            if header.name.is_empty() {
                out.error(&format!("fromHeaders[{index}].name"), "must be a non-empty string");
            }
        }
        for (index, copy) in self.output_claim_to_headers.iter().enumerate() {
            out.item("outputClaimToHeaders", index, |out| {
                if copy.claim.is_empty() {
                    out.error("claim", "must be a non-empty string");
                }
                out.check("header", plain_header_name(&copy.header));
            });
        }
        if let Some(timeout) = self.timeout {
            out.check("timeout", check::duration(timeout));
        }
    }
}

/// Judges a list of names, none of which may be empty.
pub(crate) fn no_empty(out: &mut Findings, field: &str, list: &[String]) {
    for (index, _) in list.iter().enumerate().filter(|(_, value)| value.is_empty()) {
        out.error(&format!("{field}[{index}]"), "must be a non-empty string");
    }
}

/// An `http` or `https` address.
fn jwks_uri(uri: &str) -> Checked {
    let scheme = uri.split_once("://").map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest));
    let Some((scheme, rest)) = scheme.filter(|(scheme, _)| matches!(scheme.as_str(), "http" | "https"))
    else {
        return Err(format!("{uri:?}: the url must have scheme http:// or https://"));
    };
    if uri.len() > MAX_JWKS_URI_LEN {
        return Err(format!("a url of {} bytes is too long (at most {MAX_JWKS_URI_LEN})", uri.len()));
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let parsed = authority.parse::<http::uri::Authority>();
    let port = authority.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
    let fine = parsed.is_ok() && port.is_none_or(|port| port.parse::<u16>().is_ok());
    if !fine || uri.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(format!("{uri:?} is not a valid {scheme} url"));
    }
    Ok(())
}

/// A key set, or one key alone. A private key in it is a warning: everyone who can read the resource has it.
fn jwks(out: &mut Findings, text: &str) {
    let set: Value = match serde_json::from_str(text) {
        Ok(set) => set,
        Err(error) => {
            out.error("jwks", format!("jwks parse error: {error}"));
            return;
        }
    };
    let keys = match set.get("keys") {
        None => std::slice::from_ref(&set),
        Some(Value::Array(keys)) => keys.as_slice(),
        Some(_) => {
            out.error("jwks", "jwks parse error: `keys` is not a list");
            return;
        }
    };
    for (index, key) in keys.iter().enumerate() {
        if let Err(reason) = jwk(key) {
            out.error("jwks", format!("jwks parse error: key {index} {reason}"));
        } else if key.get("d").is_some() {
            out.warning(
                "jwks",
                format!("key {index} is a private key; a key set for validation needs public keys alone"),
            );
        }
    }
}

/// The members that each type of key must have (RFC 7518, 6).
fn jwk(key: &Value) -> Checked {
    let member = |name: &str| key.get(name).and_then(Value::as_str).filter(|value| !value.is_empty());
    let required: &[&str] = match member("kty") {
        Some("RSA") => &["n", "e"],
        Some("EC") => &["crv", "x", "y"],
        Some("OKP") => &["crv", "x"],
        Some("oct") => &["k"],
        Some(other) => return Err(format!("is of the unknown type {other:?}")),
        None => return Err("has no type (`kty`)".to_owned()),
    };
    match required.iter().find(|name| member(name).is_none()) {
        Some(name) => Err(format!("has no `{name}`")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jw_05_key_sets() {
        let judge = |text: &str| {
            let mut out = Findings::default();
            jwks(&mut out, text);
            (out.has_errors(), out.iter().count())
        };
        assert_eq!(judge(r#"{"keys":[{"kty":"RSA","n":"AQ","e":"AQAB"}]}"#), (false, 0));
        assert_eq!(judge(r#"{"kty":"EC","crv":"P-256","x":"AQ","y":"AQ","d":"AQ"}"#), (false, 1));
        for bad in ["foo", "[]", r#"{"keys":{}}"#, r#"{"keys":[{"kty":"RSA","e":"AQAB"}]}"#, r#"{"kty":"X"}"#]
        {
            assert!(judge(bad).0, "{bad}");
        }
    }

    #[test]
    fn jw_05_addresses() {
        for uri in ["https://a.b/c", "http://10.0.0.1:8080/keys?x", "HTTPS://a", "http://[::1]:80/"] {
            assert_eq!(jwks_uri(uri), Ok(()), "{uri}");
        }
        for uri in
            ["a.b/c", "ftp://a", "https:/a", "https://", "http://a:b/", "http://a b/", "hTPp\\\u{8}lah"]
        {
            assert!(jwks_uri(uri).is_err(), "{uri}");
        }
    }
}
