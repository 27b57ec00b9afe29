//! `authentication.istio.io/v1alpha1`, the authentication of Istio 1.1 (LA-01).

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::check;
use super::common::StringMatch;
use super::request_authentication::{JwtRule, no_empty};
use crate::istio::findings::{Findings, Validate};

/// The only name of a policy for a whole namespace or the whole mesh.
const DEFAULT_NAME: &str = "default";

/// How callers of services prove who they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AuthenticationPolicy {
    /// The services; none is the whole namespace.
    pub targets: Vec<TargetSelector>,
    /// How the peer proves itself; any of them.
    pub peers: Vec<PeerMethod>,
    /// Whether a request is let through when no peer method succeeds.
    pub peer_is_optional: bool,
    /// How the end user proves itself; any of them.
    pub origins: Vec<OriginMethod>,
    /// Whether a request is let through when no origin method succeeds.
    pub origin_is_optional: bool,
    /// Whose identity is the request's principal.
    pub principal_binding: PrincipalBinding,
}

/// A policy for the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct MeshPolicy(pub AuthenticationPolicy);

/// Which service, and which of its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TargetSelector {
    /// The service's short name.
    pub name: String,
    /// Labels of the workloads.
    pub labels: BTreeMap<String, String>,
    /// The ports; none is all.
    pub ports: Vec<TargetPort>,
}

/// A port by number or by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TargetPort {
    /// The number.
    pub number: Option<u32>,
    /// The name.
    pub name: Option<String>,
}

/// How a peer proves itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerMethod {
    /// By its certificate. `mtls:` without a value counts.
    pub mtls: Option<PeerMtls>,
    /// By a token; not implemented by Istio.
    pub jwt: Option<LegacyJwt>,
}

/// Read as a map, since in a struct a field without a value is taken for absent.
impl<'de> Deserialize<'de> for PeerMethod {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Method;

        impl<'de> Visitor<'de> for Method {
            type Value = PeerMethod;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("mtls or jwt")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<PeerMethod, A::Error> {
                let mut method = PeerMethod::default();
                while let Some(name) = fields.next_key::<String>()? {
                    match name.as_str() {
                        "mtls" => method.mtls = Some(fields.next_value::<Option<_>>()?.unwrap_or_default()),
                        "jwt" => method.jwt = Some(fields.next_value()?),
                        other => return Err(de::Error::unknown_field(other, &["mtls", "jwt"])),
                    }
                }
                Ok(method)
            }
        }

        deserializer.deserialize_map(Method)
    }
}

/// mTLS of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerMtls {
    /// The deprecated form of `mode: PERMISSIVE`.
    pub allow_tls: bool,
    /// Whether plain text is let through too.
    pub mode: PeerMtlsMode,
}

/// Whether plain text is let through too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PeerMtlsMode {
    /// No; the default.
    #[default]
    Strict,
    /// Yes.
    Permissive,
}

/// How an end user proves itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OriginMethod {
    /// By a token.
    pub jwt: Option<LegacyJwt>,
}

/// A token's issuer, and when it is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LegacyJwt {
    /// The claim `iss`.
    pub issuer: String,
    /// Accepted values of the claim `aud`.
    pub audiences: Vec<String>,
    /// Where the keys are fetched from.
    pub jwks_uri: String,
    /// The keys themselves.
    pub jwks: String,
    /// Headers in which the token may be.
    pub jwt_headers: Vec<String>,
    /// Query parameters in which the token may be.
    pub jwt_params: Vec<String>,
    /// On which paths the token is asked for; none is all. Any rule that matches triggers.
    pub trigger_rules: Vec<TriggerRule>,
}

/// Paths on which a token is asked for: any included one, and no excluded one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TriggerRule {
    /// None of these.
    pub excluded_paths: Vec<LegacyStringMatch>,
    /// Any of these; none is all.
    pub included_paths: Vec<LegacyStringMatch>,
}

/// How a path is compared: one of the four.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LegacyStringMatch {
    /// Equal to this.
    pub exact: Option<String>,
    /// Begins with this.
    pub prefix: Option<String>,
    /// Ends with this.
    pub suffix: Option<String>,
    /// Matched as a whole by this expression.
    pub regex: Option<String>,
}

/// Whose identity is the request's principal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PrincipalBinding {
    /// The peer's; the default.
    #[default]
    UsePeer,
    /// The end user's.
    UseOrigin,
}

impl Validate for AuthenticationPolicy {
    fn validate(&self, out: &mut Findings) {
        if (out.subject().name == DEFAULT_NAME) != self.targets.is_empty() {
            out.error("targets", "a policy has targets if and only if its name is not \"default\"");
        }
        self.validate_rules(out);
    }
}

impl Validate for MeshPolicy {
    fn validate(&self, out: &mut Findings) {
        if out.subject().name != DEFAULT_NAME {
            out.at_root("metadata", |out| {
                out.error("name", "a policy of the mesh must be named \"default\"");
            });
        }
        if !self.0.targets.is_empty() {
            out.error("targets", "a policy of the mesh has no targets");
        }
        self.0.validate_rules(out);
    }
}

impl AuthenticationPolicy {
    fn validate_rules(&self, out: &mut Findings) {
        for (index, target) in self.targets.iter().enumerate() {
            out.item("targets", index, |out| target.validate(out));
        }
        for (index, peer) in self.peers.iter().enumerate() {
            if let Some(jwt) = &peer.jwt {
                out.within(format!("peers[{index}].jwt"), |out| jwt.validate(out));
            }
        }
        let mut issuers = Vec::new();
        for (index, origin) in self.origins.iter().enumerate() {
            out.item("origins", index, |out| match &origin.jwt {
                None => out.error("jwt", "an origin needs a jwt"),
                Some(jwt) => {
                    out.within("jwt", |out| jwt.validate(out));
                    if issuers.contains(&&jwt.issuer) {
                        out.error("jwt.issuer", format!("issuer {:?} is listed twice", jwt.issuer));
                    }
                    issuers.push(&jwt.issuer);
                }
            });
        }
    }
}

impl Validate for TargetSelector {
    fn validate(&self, out: &mut Findings) {
        out.check("name", check::dns1123_label(&self.name));
        for (index, port) in self.ports.iter().enumerate() {
            out.item("ports", index, |out| match (port.number, &port.name) {
                (Some(number), None) => {
                    out.check("number", check::port(number));
                }
                (None, Some(name)) => {
                    out.check("name", check::dns1123_label(name));
                }
                _ => out.error("", "a port is either a number or a name"),
            });
        }
    }
}

impl Validate for LegacyJwt {
    fn validate(&self, out: &mut Findings) {
        let rule = JwtRule {
            issuer: self.issuer.clone(),
            audiences: self.audiences.clone(),
            jwks_uri: self.jwks_uri.clone(),
            jwks: self.jwks.clone(),
            ..JwtRule::default()
        };
        if self.issuer.is_empty() {
            out.error("issuer", "issuer must be set");
        } else {
            rule.validate(out);
        }
        no_empty(out, "jwtHeaders", &self.jwt_headers);
        no_empty(out, "jwtParams", &self.jwt_params);
        for (index, rule) in self.trigger_rules.iter().enumerate() {
            for (field, paths) in
                [("excludedPaths", &rule.excluded_paths), ("includedPaths", &rule.included_paths)]
            {
                for (at, path) in paths.iter().enumerate() {
                    out.within(format!("triggerRules[{index}].{field}[{at}]"), |out| path.validate(out));
                }
            }
        }
    }
}

impl Validate for LegacyStringMatch {
    fn validate(&self, out: &mut Findings) {
        let set = [&self.exact, &self.prefix, &self.suffix, &self.regex].into_iter().flatten().count();
        if set != 1 {
            out.error("", "exactly one of exact, prefix, suffix and regex must be set");
        }
        check::string_match(out, "", &StringMatch { regex: self.regex.clone(), ..StringMatch::default() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn la_01_mtls_without_a_value_counts() {
        for text in [r#"{"peers":[{"mtls":null}]}"#, r#"{"peers":[{"mtls":{}}]}"#] {
            let policy: AuthenticationPolicy = serde_json::from_str(text).unwrap();
            assert_eq!(policy.peers[0].mtls, Some(PeerMtls::default()), "{text}");
        }
        let policy: AuthenticationPolicy = serde_json::from_str(r#"{"peers":[{}]}"#).unwrap();
        assert_eq!(policy.peers[0].mtls, None);
    }
}
