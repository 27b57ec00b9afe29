//! `networking.istio.io` WorkloadGroup (WG-01).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::check;
use super::target;
use super::workload_entry::WorkloadEntry;
use crate::istio::findings::{Findings, Validate};

/// Workload entries that register themselves after one template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadGroup {
    /// Labels and annotations of the entries.
    pub metadata: Option<GroupMetadata>,
    /// The entries' spec, without address; required.
    pub template: Option<WorkloadEntry>,
    /// How an entry's health is found out.
    pub probe: Option<ReadinessProbe>,
}

/// Metadata of the entries of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GroupMetadata {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// An active health check; exactly one of the four methods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReadinessProbe {
    /// Seconds before the first probe; default 0.
    pub initial_delay_seconds: i32,
    /// Seconds until a probe counts as failed; 0 is the default of 1.
    pub timeout_seconds: i32,
    /// Seconds between probes; 0 is the default of 10.
    pub period_seconds: i32,
    /// Successes in a row that make it healthy; 0 is the default of 1.
    pub success_threshold: i32,
    /// Failures in a row that make it unhealthy; 0 is the default of 3.
    pub failure_threshold: i32,
    /// GET, healthy on 200..=399.
    pub http_get: Option<HttpProbe>,
    /// Healthy when it connects.
    pub tcp_socket: Option<TcpProbe>,
    /// Healthy when the command exits with 0.
    pub exec: Option<ExecProbe>,
    /// `grpc.health.v1.Health/Check`.
    pub grpc: Option<GrpcProbe>,
}

/// A probe by HTTP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpProbe {
    /// The path; empty is `/`.
    pub path: String,
    /// 1..=65535.
    pub port: u32,
    /// The host to connect to; empty is the workload's address.
    pub host: String,
    /// `HTTP` (default) or `HTTPS`.
    pub scheme: String,
    /// Headers of the request, in order.
    pub http_headers: Vec<ProbeHeader>,
}

/// A header of a probe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProbeHeader {
    /// The name.
    pub name: String,
    /// The value.
    pub value: String,
}

/// A probe that only connects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpProbe {
    /// The host to connect to; empty is localhost.
    pub host: String,
    /// 1..=65535.
    pub port: u32,
}

/// A probe by a command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExecProbe {
    /// The command with its arguments.
    pub command: Vec<String>,
}

/// A probe by gRPC's health protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrpcProbe {
    /// 1..=65535.
    pub port: u32,
    /// The service that is asked about; empty is the server as a whole.
    pub service: String,
}

impl Validate for WorkloadGroup {
    fn validate(&self, out: &mut Findings) {
        target::metadata(out, false);
        match &self.template {
            Some(template) => out.within("template", |out| template.validate_as_template(out)),
            None => out.error("template", "a template is required"),
        }
        if let Some(metadata) = &self.metadata {
            out.within("metadata", |out| check::labels(out, "labels", &metadata.labels));
        }
        if let Some(probe) = &self.probe {
            out.within("probe", |out| probe.validate(out));
        }
    }
}

impl Validate for ReadinessProbe {
    fn validate(&self, out: &mut Findings) {
        for (field, value) in [
            ("initialDelaySeconds", self.initial_delay_seconds),
            ("timeoutSeconds", self.timeout_seconds),
            ("periodSeconds", self.period_seconds),
            ("successThreshold", self.success_threshold),
            ("failureThreshold", self.failure_threshold),
        ] {
            if value < 0 {
                out.error(field, format!("{field} must be non-negative"));
            }
        }
        let methods =
            [self.http_get.is_some(), self.tcp_socket.is_some(), self.exec.is_some(), self.grpc.is_some()];
        if methods.into_iter().filter(|set| *set).count() != 1 {
            out.error("", "exactly one health check method must be set: httpGet, tcpSocket, exec or grpc");
        }
        if let Some(probe) = &self.http_get {
            out.within("httpGet", |out| probe.validate(out));
        }
        if let Some(probe) = &self.tcp_socket {
            out.check("tcpSocket.port", check::port(probe.port));
        }
        if let Some(probe) = &self.grpc {
            out.check("grpc.port", check::port(probe.port));
        }
        if let Some(probe) = &self.exec {
            if probe.command.is_empty() {
                out.error("exec.command", "a command is required");
            }
            for index in probe.command.iter().enumerate().filter(|(_, word)| word.is_empty()).map(|(i, _)| i)
            {
                out.error(&format!("exec.command[{index}]"), "must not be empty");
            }
        }
    }
}

impl Validate for HttpProbe {
    fn validate(&self, out: &mut Findings) {
        out.check("port", check::port(self.port));
        if !matches!(self.scheme.as_str(), "" | "HTTP" | "HTTPS") {
            out.error("scheme", "must be one of HTTP and HTTPS");
        }
        for (index, header) in self.http_headers.iter().enumerate() {
            out.check(&format!("httpHeaders[{index}].name"), plain_header_name(&header.name));
        }
    }
}

/// A header name of letters, digits and hyphens alone, which is what Kubernetes allows in a probe.
///
/// # Errors
/// Empty, or another character.
pub(crate) fn plain_header_name(name: &str) -> check::Checked {
    if name.is_empty() {
        return Err("a header name must not be empty".to_owned());
    }
    if name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Ok(());
    }
    Err(format!("header name {name:?} is not a valid header name"))
}
