//! `mirror`, `mirrorPercentage`, `mirrorPercent` and `mirrors` of a VirtualService's rule (VS-P01 … VS-P03), and the
//! annotation for what Istio has no field for (VS-P04).
//!
//! The annotation is a JSON object, by mirrors as the rules name them: `HOST/SUBSET`, else `HOST`, else `*`.
//!
//! ```yaml
//! mesh.rs/mirror: |
//!   {"reviews/v2": {"authority": "v2.example", "set": {"x-mirror": "yes"}, "add": {}, "remove": ["cookie"],
//!                   "sampleBy": "header:x-user"}}
//! ```
//!
//! Another has the answers of all mirrors compared with those of the primary (VS-P05); every field may be left out:
//!
//! ```yaml
//! mesh.rs/mirror-diff: |
//!   {"percentage": 100, "headers": ["content-type"], "baseline": 10, "baselineAnyMethod": false, "bodyBytes": 65536,
//!    "capture": false}
//! ```
//!
//! `capture` keeps the compared requests with their bodies, for whoever may read the admin port.

use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use mesh_core::Compat;
use mesh_core::diagnostics::{Diagnostics, Severity};
use mesh_core::istio::types::common::Percent;
use mesh_core::istio::types::virtual_service::{Destination, HttpRoute, VirtualService};
use mesh_core::istio::{Resource, ResourceSet};
use serde_json::{Map, Value};

use super::annotations;
use super::clusters::Found;
use super::http::{Place, Rules};
use crate::diff::DiffPolicy;
use crate::hash_policy::HashPolicy;
use crate::headers::HeaderOps;
use crate::mirror::{Mirror, MirrorAuthority};
use crate::percentage::Percentage;

/// The mirrors of a rule, without those that get nothing.
pub(super) fn compile(
    rules: &mut Rules<'_, '_>,
    resource: &Resource<VirtualService>,
    path: &str,
    rule: &HttpRoute,
    place: &Place<'_>,
) -> Box<[Mirror]> {
    // What cannot be read was reported.
    let extras = resource
        .meta
        .annotations
        .get(annotations::MIRROR)
        .and_then(|value| Extras::parse(value).ok())
        .unwrap_or_default();
    let diff = resource.meta.annotations.get(annotations::MIRROR_DIFF);
    let diff = diff.and_then(|value| diff_policy(value).ok()).map(Arc::new);
    let mut mirrors = Vec::new();
    for (field, to, percentage) in named(rule) {
        if percentage == Percentage::NEVER {
            continue;
        }
        let host = rules.mesh.resolve(&to.host, &resource.meta.namespace);
        let port =
            to.port.as_ref().and_then(|port| u16::try_from(port.number).ok()).filter(|port| *port != 0);
        let found = rules.clusters.find(&host, port, place.port, &to.subset);
        let (mut mirror, missing) = match found {
            Found::Cluster(cluster) => (Mirror::new(cluster), None),
            Found::UnknownHost(name) => {
                (Mirror::unknown(name), Some(format!("no service has the host {host:?}")))
            }
            Found::UnknownPort(name) => {
                let missing = match port {
                    Some(port) => format!("{host:?} has no port {port}"),
                    None => format!("{host:?} has several ports, and none is named"),
                };
                (Mirror::unknown(name), Some(missing))
            }
            Found::UnknownSubset(name) => {
                let subset = &to.subset;
                (
                    Mirror::unknown(name),
                    Some(format!("no destination rule defines the subset {subset:?} of {host:?}")),
                )
            }
        };
        if let Some(missing) = missing {
            let path = format!("{path}.{field}");
            let message = format!("{missing}: nothing is mirrored there");
            rules.diags.report(resource.doc, Severity::Warning, path, message, Some("IST0101"));
        }
        mirror.percentage = percentage;
        if rules.mesh.cx.compat == Compat::V1_1 {
            mirror.authority = MirrorAuthority::Shadow;
        }
        if let Some(extra) = extras.of(to) {
            if let Some(authority) = &extra.authority {
                mirror.authority = MirrorAuthority::Replace(authority.clone());
            }
            mirror.request_headers = extra.headers.clone();
            mirror.sample_by = extra.sample_by.clone();
        }
        mirror.diff = diff.clone();
        mirrors.push(mirror);
    }
    mirrors.into()
}

/// Each mirror of a rule with its field and share; a share that is absent is everything.
fn named(rule: &HttpRoute) -> impl Iterator<Item = (String, &Destination, Percentage)> {
    let share = |percent: Option<Percent>| {
        percent.map_or(Percentage::ALWAYS, |Percent { value }| Percentage::from_percent(value))
    };
    let whole = rule.mirror_percent.map(|percent| Percent { value: percent.into() });
    let one = rule
        .mirror
        .iter()
        .map(move |to| ("mirror.host".to_owned(), to, share(rule.mirror_percentage.or(whole))));
    let many = (0..).zip(&rule.mirrors).filter_map(move |(at, mirror): (usize, _)| {
        let to = mirror.destination.as_ref()?;
        Some((format!("mirrors[{at}].destination.host"), to, share(mirror.percentage)))
    });
    one.chain(many)
}

/// Says which mirrors and annotations mean nothing.
pub(super) fn check(set: &ResourceSet, diags: &mut Diagnostics) {
    for resource in set.virtual_services() {
        for (at, rule) in resource.spec.http.iter().enumerate() {
            let answers = rule.redirect.is_some() || rule.direct_response.is_some();
            if answers && named(rule).next().is_some() {
                let field = if rule.mirror.is_some() { "mirror" } else { "mirrors" };
                let message = "has no effect: what is not forwarded is not mirrored";
                diags.warning_at(resource.doc, format!("spec.http[{at}].{field}"), message);
            }
        }
        // What a delegate mirrors, its root says more of.
        let delegates = resource.spec.http.iter().any(|rule| rule.delegate.is_some());
        let names: Vec<_> = resource.spec.http.iter().flat_map(named).map(|(_, to, _)| to).collect();
        if resource.meta.annotations.contains_key(annotations::MIRROR_DIFF) && names.is_empty() && !delegates
        {
            let path = format!("metadata.annotations.{}", annotations::MIRROR_DIFF);
            diags.warning_at(resource.doc, path, "has no effect: no rule mirrors");
        }
        let Some(extras) =
            resource.meta.annotations.get(annotations::MIRROR).and_then(|value| Extras::parse(value).ok())
        else {
            continue;
        };
        let path = || format!("metadata.annotations.{}", annotations::MIRROR);
        for (name, _) in extras.0.iter().filter(|_| !delegates) {
            if !names.iter().any(|to| is_named(name, to)) {
                diags.warning_at(resource.doc, path(), format!("has no effect: no rule mirrors to {name:?}"));
            }
        }
    }
}

/// What the annotation says, by mirror.
#[derive(Default)]
pub(super) struct Extras(Vec<(String, Extra)>);

struct Extra {
    authority: Option<HeaderValue>,
    headers: HeaderOps,
    sample_by: Option<HashPolicy>,
}

/// The most specific name comes first.
fn is_named(name: &str, to: &Destination) -> bool {
    match name.split_once('/') {
        Some((host, subset)) => host == to.host && subset == to.subset,
        None => name == "*" || name == to.host,
    }
}

impl Extras {
    /// Reads the annotation.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let Value::Object(mirrors) = value else {
            return Err("a JSON object by mirror is wanted".to_owned());
        };
        let extra = |(name, value): (String, Value)| match value {
            Value::Object(fields) => match Extra::parse(&fields) {
                Ok(extra) => Ok((name, extra)),
                Err(reason) => Err(format!("{name}: {reason}")),
            },
            _ => Err(format!("{name}: an object is wanted")),
        };
        mirrors.into_iter().map(extra).collect::<Result<_, _>>().map(Self)
    }

    fn of(&self, to: &Destination) -> Option<&Extra> {
        let specific = |name: &str| if name == "*" { 2 } else { u8::from(!name.contains('/')) };
        let named = self.0.iter().filter(|(name, _)| is_named(name, to));
        named.min_by_key(|(name, _)| specific(name)).map(|(_, extra)| extra)
    }
}

impl Extra {
    fn parse(fields: &Map<String, Value>) -> Result<Self, String> {
        const KNOWN: [&str; 5] = ["authority", "set", "add", "remove", "sampleBy"];
        if let Some(unknown) = fields.keys().find(|name| !KNOWN.contains(&name.as_str())) {
            return Err(format!("{unknown}: known are {}", KNOWN.join(", ")));
        }
        let text = |name: &str| match fields.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(format!("{name}: a text is wanted")),
        };
        let pairs = |name: &str| match fields.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Object(pairs)) => pairs
                .iter()
                .map(|(key, value)| match value.as_str() {
                    Some(value) => Ok((key.as_str(), value)),
                    None => Err(format!("{name}.{key}: a text is wanted")),
                })
                .collect(),
            Some(_) => Err(format!("{name}: an object of texts is wanted")),
        };
        let removed = match fields.get("remove") {
            None => Vec::new(),
            Some(Value::Array(names)) => names
                .iter()
                .map(|name| name.as_str().ok_or_else(|| "remove: names of headers are wanted".to_owned()))
                .collect::<Result<_, _>>()?,
            Some(_) => return Err("remove: a list is wanted".to_owned()),
        };
        let authority = match text("authority")? {
            None => None,
            Some(authority) if authority.parse::<http::uri::Authority>().is_ok() => {
                HeaderValue::try_from(authority).ok()
            }
            Some(authority) => return Err(format!("authority: {authority:?} is none")),
        };
        let sample_by = match text("sampleBy")? {
            None => None,
            Some(key) => Some(key.parse().map_err(|error| format!("sampleBy: {error}"))?),
        };
        let headers =
            HeaderOps::new(removed, pairs("set")?, pairs("add")?).map_err(|error| error.to_string())?;
        Ok(Self { authority, headers, sample_by })
    }
}

/// Reads the annotation that has answers compared.
pub(super) fn diff_policy(text: &str) -> Result<DiffPolicy, String> {
    const KNOWN: [&str; 6] =
        ["percentage", "headers", "baseline", "baselineAnyMethod", "bodyBytes", "capture"];
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let Value::Object(fields) = value else { return Err("a JSON object is wanted".to_owned()) };
    if let Some(unknown) = fields.keys().find(|name| !KNOWN.contains(&name.as_str())) {
        return Err(format!("{unknown}: known are {}", KNOWN.join(", ")));
    }
    let percent = |name: &str, default: Percentage| match fields.get(name) {
        None => Ok(default),
        Some(value) => match value.as_f64().filter(|percent| (0.0..=100.0).contains(percent)) {
            Some(percent) => Ok(Percentage::from_percent(percent)),
            None => Err(format!("{name}: a percentage from 0 to 100 is wanted")),
        },
    };
    let mut policy = DiffPolicy::default();
    policy.percentage = percent("percentage", policy.percentage)?;
    policy.baseline = percent("baseline", policy.baseline)?;
    let flag = |name: &str| match fields.get(name) {
        None => Ok(false),
        Some(value) => value.as_bool().ok_or(format!("{name}: true or false is wanted")),
    };
    policy.baseline_any_method = flag("baselineAnyMethod")?;
    policy.capture = flag("capture")?;
    if let Some(bytes) = fields.get("bodyBytes") {
        let bytes =
            bytes.as_u64().filter(|bytes| *bytes <= MOST_BODY_BYTES).and_then(|bytes| bytes.try_into().ok());
        policy.body_bytes = bytes.ok_or(format!("bodyBytes: at most {MOST_BODY_BYTES} are kept"))?;
    }
    if let Some(names) = fields.get("headers") {
        let name = |name: &Value| name.as_str().and_then(|name| HeaderName::try_from(name).ok());
        let names = names.as_array().and_then(|names| names.iter().map(name).collect::<Option<_>>());
        policy.headers = names.ok_or("headers: a list of names is wanted")?;
    }
    Ok(policy)
}

/// The most bytes of a body that are kept for comparison.
const MOST_BODY_BYTES: u64 = 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vs_p04_an_annotation_that_is_none_says_why() {
        for (text, reason) in [
            ("", "EOF"),
            ("[]", "a JSON object by mirror is wanted"),
            (r#"{"a": 1}"#, "a: an object is wanted"),
            (r#"{"a": {"authorty": "b"}}"#, "a: authorty: known are authority, set, add, remove, sampleBy"),
            (r#"{"a": {"authority": 1}}"#, "authority: a text is wanted"),
            (r#"{"a": {"authority": "b c"}}"#, "authority: \"b c\" is none"),
            (r#"{"a": {"set": {"x": 1}}}"#, "set.x: a text is wanted"),
            (r#"{"a": {"set": []}}"#, "set: an object of texts is wanted"),
            (r#"{"a": {"set": {"host": "b"}}}"#, "`host` is not a header that can be changed"),
            (r#"{"a": {"add": {"x": "%UNKNOWN%"}}}"#, "is not a variable that is known"),
            (r#"{"a": {"remove": "x"}}"#, "remove: a list is wanted"),
            (r#"{"a": {"remove": [1]}}"#, "remove: names of headers are wanted"),
            (r#"{"a": {"sampleBy": "user"}}"#, "sampleBy: expected header:NAME"),
        ] {
            let said = Extras::parse(text).err().unwrap_or_default();
            assert!(said.contains(reason), "{text}: {said}");
        }
    }

    #[test]
    fn vs_p05_the_annotation_is_judged() {
        for (text, reason) in [
            ("yes", "expected value"),
            ("1", "a JSON object is wanted"),
            (r#"{"percent": 1}"#, "percent: known are percentage, headers"),
            (r#"{"percentage": 101}"#, "percentage: a percentage from 0 to 100 is wanted"),
            (r#"{"baseline": "1"}"#, "baseline: a percentage"),
            (r#"{"baselineAnyMethod": 1}"#, "baselineAnyMethod: true or false"),
            (r#"{"capture": "yes"}"#, "capture: true or false"),
            (r#"{"bodyBytes": 2000000}"#, "at most 1048576"),
            (r#"{"headers": "a"}"#, "a list of names"),
            (r#"{"headers": ["a b"]}"#, "a list of names"),
        ] {
            let said = diff_policy(text).unwrap_err();
            assert!(said.contains(reason), "{text}: {said}");
        }
        assert_eq!(diff_policy("{}"), Ok(DiffPolicy::default()));
        let all = r#"{"percentage": 5, "headers": ["ETag"], "baseline": 0, "baselineAnyMethod": true, "bodyBytes": 10, "capture": true}"#;
        let expected = DiffPolicy {
            percentage: Percentage::from_percent(5.0),
            headers: vec![HeaderName::from_static("etag")],
            baseline: Percentage::NEVER,
            baseline_any_method: true,
            capture: true,
            body_bytes: 10,
        };
        assert_eq!(diff_policy(all), Ok(expected));
    }

    #[test]
    fn vs_p04_the_most_specific_name_counts() {
        let text =
            r#"{"*": {"authority": "any"}, "a": {"authority": "host"}, "a/v1": {"authority": "subset"}}"#;
        let extras = Extras::parse(text).unwrap();
        let of = |host: &str, subset: &str| {
            let to =
                Destination { host: host.to_owned(), subset: subset.to_owned(), ..Destination::default() };
            extras.of(&to).and_then(|extra| extra.authority.clone()).unwrap()
        };
        assert_eq!(of("a", "v1"), "subset");
        assert_eq!(of("a", "v2"), "host");
        assert_eq!(of("a", ""), "host");
        assert_eq!(of("b", "v1"), "any");
    }
}
