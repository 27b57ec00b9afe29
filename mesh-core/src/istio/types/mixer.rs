//! `config.istio.io/v1alpha2`, the configuration of Istio 1.1's Mixer (MX-01, MX-02, MX-06, MX-07), kept as data.
//!
//! A rule, handler or instance is a tree whose shape the adapter or template defines, and each adapter and template
//! is a kind of its own in the older form. So all of them are one type: the kind, and the `spec` as it was written.

use serde::Deserialize;
use serde_json::Value;

use crate::istio::findings::{Findings, Validate};

/// The kinds beside rules, handlers and instances, which have a shape of their own.
const SPECS: [&str; 4] = ["QuotaSpec", "QuotaSpecBinding", "HTTPAPISpec", "HTTPAPISpecBinding"];

/// Rules and the newer form of adapters and templates.
const CORE: [&str; 6] = ["rule", "handler", "instance", "adapter", "template", "attributemanifest"];

/// The adapters of 1.1, each a kind of its own in the older form.
const ADAPTERS: [&str; 20] = [
    "bypass",
    "circonus",
    "cloudwatch",
    "denier",
    "dogstatsd",
    "fluentd",
    "kubernetesenv",
    "listchecker",
    "memquota",
    "noop",
    "opa",
    "prometheus",
    "rbac",
    "redisquota",
    "signalfx",
    "solarwinds",
    "stackdriver",
    "statsd",
    "stdio",
    "zipkin",
];

/// The templates of 1.1, each a kind of its own in the older form.
const TEMPLATES: [&str; 11] = [
    "apikey",
    "authorization",
    "checknothing",
    "edge",
    "kubernetes",
    "listentry",
    "logentry",
    "metric",
    "quota",
    "reportnothing",
    "tracespan",
];

/// What a kind of Mixer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MixerRole {
    /// A rule, or a description of an adapter or a template.
    Core,
    /// A handler in the older form, whose kind is the adapter.
    Adapter,
    /// An instance in the older form, whose kind is the template.
    Template,
    /// A quota or API specification, or its binding.
    Spec,
}

impl MixerRole {
    /// The role of a kind; `None` for a kind that Istio 1.1 did not have.
    #[must_use]
    pub fn of(kind: &str) -> Option<Self> {
        if CORE.contains(&kind) {
            Some(Self::Core)
        } else if ADAPTERS.contains(&kind) {
            Some(Self::Adapter)
        } else if TEMPLATES.contains(&kind) {
            Some(Self::Template)
        } else if SPECS.contains(&kind) {
            Some(Self::Spec)
        } else {
            None
        }
    }
}

/// One resource of Mixer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MixerResource {
    /// The kind, of which [`MixerRole::of`] knows the role.
    pub kind: String,
    /// The `spec`, as it was written.
    pub spec: Value,
}

/// The `spec` of a resource of Mixer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub(in crate::istio) struct MixerSpec {
    pub(in crate::istio) spec: Value,
}

impl Validate for MixerSpec {
    fn validate(&self, out: &mut Findings) {
        if !self.spec.is_object() && !self.spec.is_null() {
            out.error("", "must be an object");
        }
    }
}
