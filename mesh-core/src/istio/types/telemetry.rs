//! `telemetry.istio.io` Telemetry (TE-01 … TE-05).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::cel_syntax;
use super::check;
use super::common::{Duration, PolicyTargetReference, WorkloadSelector};
use super::target;
use crate::istio::findings::{Findings, Validate};

/// What is measured, traced and logged.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Telemetry {
    /// The workloads; not together with a target reference.
    pub selector: Option<WorkloadSelector>,
    /// The one target; the older form of `target_refs`.
    pub target_ref: Option<PolicyTargetReference>,
    /// The targets.
    pub target_refs: Vec<PolicyTargetReference>,
    /// Traces; more than one is not supported by Istio.
    pub tracing: Vec<Tracing>,
    /// Metrics, in order.
    pub metrics: Vec<Metrics>,
    /// Access logs, in order.
    pub access_logging: Vec<AccessLogging>,
}

/// The name of a provider in MeshConfig's `extensionProviders`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProviderRef {
    /// The name.
    pub name: String,
}

/// Which side of a call a setting is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum WorkloadMode {
    /// Not said; both, in the Telemetry API.
    #[default]
    Undefined,
    /// Outbound, and gateways.
    Client,
    /// Inbound.
    Server,
    /// Both.
    ClientAndServer,
}

/// A mode, wrapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ModeSelector {
    /// The side.
    pub mode: WorkloadMode,
}

/// How spans are made (TE-04).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Tracing {
    /// The side that it is for.
    #[serde(rename = "match")]
    pub matches: Option<ModeSelector>,
    /// Where spans go; at most one is supported.
    pub providers: Vec<ProviderRef>,
    /// 0.0..=100.0 in steps of 0.01; none inherits.
    pub random_sampling_percentage: Option<f64>,
    /// Whether spans are withheld; none inherits.
    pub disable_span_reporting: Option<bool>,
    /// Tags by name; they replace the parent's.
    pub custom_tags: BTreeMap<String, CustomTag>,
    /// Whether the request's ID carries the sampling decision; none inherits.
    pub use_request_id_for_trace_sampling: Option<bool>,
    /// Whether Istio's own tags are set; none inherits.
    pub enable_istio_tags: Option<bool>,
    /// Whether trace headers are not passed on; none inherits.
    pub disable_context_propagation: Option<bool>,
}

/// Where a tag's value comes from: one of the four.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CustomTag {
    /// A fixed text.
    pub literal: Option<LiteralTag>,
    /// A variable of the proxy's environment.
    pub environment: Option<NamedTag>,
    /// A header of the request.
    pub header: Option<NamedTag>,
    /// A format string of the access log.
    pub formatter: Option<LiteralTag>,
}

/// A tag of a fixed or formatted text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LiteralTag {
    /// The text.
    pub value: String,
}

/// A tag whose value has a name somewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NamedTag {
    /// The name.
    pub name: String,
    /// The value when there is none of that name.
    pub default_value: String,
}

/// Changes to metrics (TE-02).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metrics {
    /// For whom; none is all.
    pub providers: Vec<ProviderRef>,
    /// The changes, in order.
    pub overrides: Vec<MetricsOverrides>,
    /// How often TCP and gRPC streams are reported; default 5 s.
    pub reporting_interval: Option<Duration>,
}

/// One change to some metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MetricsOverrides {
    /// Which metrics; none is all.
    #[serde(rename = "match")]
    pub matches: Option<MetricSelector>,
    /// Whether they are off; `false` turns on what a parent turned off.
    pub disabled: Option<bool>,
    /// Changes of tags by name.
    pub tag_overrides: BTreeMap<String, TagOverride>,
}

/// Which metrics: one of Istio's, or a custom one, on one side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MetricSelector {
    /// One of Istio's.
    pub metric: Option<IstioMetric>,
    /// The name of another.
    pub custom_metric: Option<String>,
    /// The side.
    pub mode: WorkloadMode,
}

/// Istio's metrics (ME-01).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum IstioMetric {
    /// All of them.
    #[default]
    AllMetrics,
    /// `istio_requests_total`.
    RequestCount,
    /// `istio_request_duration_milliseconds`.
    RequestDuration,
    /// `istio_request_bytes`.
    RequestSize,
    /// `istio_response_bytes`.
    ResponseSize,
    /// `istio_tcp_connections_opened_total`.
    TcpOpenedConnections,
    /// `istio_tcp_connections_closed_total`.
    TcpClosedConnections,
    /// `istio_tcp_sent_bytes_total`.
    TcpSentBytes,
    /// `istio_tcp_received_bytes_total`.
    TcpReceivedBytes,
    /// `istio_request_messages_total`.
    GrpcRequestMessages,
    /// `istio_response_messages_total`.
    GrpcResponseMessages,
}

/// One change to one tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TagOverride {
    /// Set or removed.
    pub operation: TagOperation,
    /// A CEL expression for the value; with UPSERT alone.
    pub value: String,
}

/// What is done with a tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TagOperation {
    /// Set, whether there was one or not; the default.
    #[default]
    Upsert,
    /// Removed.
    Remove,
}

/// An access log (TE-05).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessLogging {
    /// The side that it is for.
    #[serde(rename = "match")]
    pub matches: Option<ModeSelector>,
    /// Where lines go.
    pub providers: Vec<ProviderRef>,
    /// Whether it is off; none inherits.
    pub disabled: Option<bool>,
    /// Which requests are logged; none is all.
    pub filter: Option<AccessLogFilter>,
}

/// Which requests are logged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessLogFilter {
    /// A CEL expression that is true for them.
    pub expression: String,
}

impl Validate for Telemetry {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        target::aim(out, self.selector.as_ref(), self.target_ref.as_ref(), &self.target_refs);
        if self.tracing.len() > 1 {
            out.warning("tracing", "multiple tracing is not currently supported");
        }
        for (index, tracing) in self.tracing.iter().enumerate() {
            out.item("tracing", index, |out| tracing.validate(out));
        }
        for (index, metrics) in self.metrics.iter().enumerate() {
            out.item("metrics", index, |out| metrics.validate(out));
        }
        for (index, log) in self.access_logging.iter().enumerate() {
            out.item("accessLogging", index, |out| {
                providers(out, &log.providers);
                if let Some(filter) = &log.filter {
                    out.check("filter.expression", cel_syntax::expression(&filter.expression));
                }
            });
        }
    }
}

impl Validate for Tracing {
    fn validate(&self, out: &mut Findings) {
        if self.providers.len() > 1 {
            out.warning("providers", "multiple providers is not currently supported");
        }
        providers(out, &self.providers);
        if self.random_sampling_percentage.is_some_and(|percent| !(0.0..=100.0).contains(&percent)) {
            out.error("randomSamplingPercentage", "must be in range [0.0, 100.0]");
        }
        out.within("customTags", |out| {
            for (name, tag) in &self.custom_tags {
                out.within(check::key_path(name), |out| {
                    if name.is_empty() {
                        out.error("", "a tag name may not be empty");
                    }
                    tag.validate(out);
                });
            }
        });
    }
}

impl Validate for CustomTag {
    fn validate(&self, out: &mut Findings) {
        let values = [
            (
                "literal.value",
                "literal tag value may not be empty",
                self.literal.as_ref().map(|tag| &tag.value),
            ),
            (
                "formatter.value",
                "formatter tag value may not be empty",
                self.formatter.as_ref().map(|tag| &tag.value),
            ),
            (
                "environment.name",
                "environment tag name may not be empty",
                self.environment.as_ref().map(|tag| &tag.name),
            ),
            ("header.name", "header tag name may not be empty", self.header.as_ref().map(|tag| &tag.name)),
        ];
        if values.iter().filter(|(_, _, value)| value.is_some()).count() > 1 {
            out.error("", "only one of literal, environment, header and formatter may be set");
        }
        for (field, reason, value) in values {
            if value.is_some_and(String::is_empty) {
                out.error(field, reason);
            }
        }
    }
}

impl Validate for Metrics {
    fn validate(&self, out: &mut Findings) {
        providers(out, &self.providers);
        if let Some(interval) = self.reporting_interval {
            out.check("reportingInterval", check::duration(interval));
        }
        for (index, change) in self.overrides.iter().enumerate() {
            out.item("overrides", index, |out| change.validate(out));
        }
    }
}

impl Validate for MetricsOverrides {
    fn validate(&self, out: &mut Findings) {
        for (name, tag) in &self.tag_overrides {
            out.within(format!("tagOverrides.{}", check::key_path(name)), |out| {
                if name.is_empty() {
                    out.warning("", "the name of a tag may not be empty");
                }
                match tag.operation {
                    TagOperation::Upsert if tag.value.is_empty() => {
                        out.error("value", "must be set when operation is UPSERT");
                    }
                    TagOperation::Remove if !tag.value.is_empty() => {
                        out.error("value", "may only be set when operation is UPSERT");
                    }
                    _ => {}
                }
            });
        }
        if let Some(selector) = &self.matches {
            if selector.custom_metric.as_ref().is_some_and(String::is_empty) {
                out.error("match.customMetric", "may not be empty");
            }
            if selector.custom_metric.is_some() && selector.metric.is_some() {
                out.error("match", "only one of metric and customMetric may be set");
            }
        }
    }
}

fn providers(out: &mut Findings, providers: &[ProviderRef]) {
    for (index, provider) in providers.iter().enumerate() {
        if provider.name.is_empty() {
            out.error(&format!("providers[{index}].name"), "providers.name may not be empty");
        }
    }
}
