//! `MeshConfig`, as istiod takes it: a file of its own, or the key `mesh` of the ConfigMap `istio` (MC-01).
//!
//! The struct holds the fields that decide something here; the accessors fill in istiod's defaults. What it does not
//! hold is tolerated and reported as a warning, since the file is shared with istiod.

mod validate;

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::common::Duration;
use super::destination_rule::{
    ClientTlsSettings, H2UpgradePolicy, LocalityLbSetting, TcpKeepalive, TrafficPolicy, ZoneAwareLbSetting,
};
use super::sidecar::OutboundMode;
use super::virtual_service::HttpRetry;
use crate::diagnostics::Position;

/// The trust domain of a mesh that names none.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// The root namespace of a mesh that names none.
pub const DEFAULT_ROOT_NAMESPACE: &str = "istio-system";

/// Settings of the whole mesh.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshConfig {
    /// The trust domain of the mesh's identities; see [`trust_domain`](Self::trust_domain).
    pub trust_domain: String,
    /// Trust domains that are taken for the mesh's own (AP-12).
    pub trust_domain_aliases: Vec<String>,
    /// The namespace whose policies are for the mesh; see [`root_namespace`](Self::root_namespace).
    pub root_namespace: String,
    /// Whether clients use mTLS where the destination takes it (DR-TLS03); default true.
    pub enable_auto_mtls: Option<bool>,
    /// What happens to calls of unknown destinations; default ALLOW_ANY.
    pub outbound_traffic_policy: Option<MeshOutboundTrafficPolicy>,
    /// Where inbound traffic goes; default PASSTHROUGH.
    pub inbound_traffic_policy: Option<InboundTrafficPolicy>,
    /// How long a TCP connect may take; default 10 s.
    pub connect_timeout: Option<Duration>,
    /// How long protocol sniffing waits; default 0, which is for ever.
    pub protocol_detection_timeout: Option<Duration>,
    /// How often names are resolved again; default 60 s.
    pub dns_refresh_rate: Option<Duration>,
    /// Keep-alive of TCP connections to upstreams.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Whether upstream connections use HTTP/2; default DO_NOT_UPGRADE.
    pub h2_upgrade_policy: H2UpgradePolicy,
    /// Preference by locality; on by default.
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// Preference by zone, before that by locality; off by default.
    pub zone_aware_lb_setting: Option<ZoneAwareLbSetting>,
    /// `exportTo` of services that say none; default `*`.
    pub default_service_export_to: Vec<String>,
    /// `exportTo` of virtual services that say none; default `*`.
    pub default_virtual_service_export_to: Vec<String>,
    /// `exportTo` of destination rules that say none; default `*`.
    pub default_destination_rule_export_to: Vec<String>,
    /// Retries of routes that say none; default 2 attempts.
    pub default_http_retry_policy: Option<HttpRetry>,
    /// A policy below every DestinationRule's (DR-CP06).
    pub default_traffic_policy: Option<TrafficPolicy>,
    /// How paths are normalised before they are matched; default BASE.
    pub path_normalization: Option<PathNormalization>,
    /// Settings of proxies.
    pub default_config: Option<MeshProxyConfig>,
    /// Whether spans are made; default true.
    pub enable_tracing: Option<bool>,
    /// Where access logs go; empty is nowhere.
    pub access_log_file: String,
    /// The format of access logs; empty is Istio's (TE-06).
    pub access_log_format: String,
    /// Whether access logs are text or JSON.
    pub access_log_encoding: AccessLogEncoding,
    /// Providers of metrics, traces, logs and authorization, by name.
    pub extension_providers: Vec<ExtensionProvider>,
    /// Which of them are used where a Telemetry names none.
    pub default_providers: Option<DefaultProviders>,
    /// The port that outbound traffic is redirected to; default 15001. Judged alone.
    pub proxy_listen_port: Option<u32>,
    /// Settings of some services. Judged alone.
    pub service_settings: Vec<ServiceSettings>,
    /// TLS between workloads.
    #[serde(rename = "meshMTLS")]
    pub mesh_mtls: Option<MeshTls>,
    /// TLS outside of the mesh.
    pub tls_defaults: Option<MeshTls>,
    /// Whether Mixer's checks are off (MX-08); default true.
    pub disable_policy_checks: Option<bool>,
    /// Whether a request passes when a check fails to be made (MX-08); default false.
    pub policy_check_fail_open: Option<bool>,
    /// The fields that were written, by path, with their positions: what of them nobody honours is reported.
    #[serde(skip)]
    pub written: Vec<(String, Position)>,
}

/// What happens to calls of unknown destinations, wrapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshOutboundTrafficPolicy {
    /// The mode.
    pub mode: OutboundMode,
}

/// Where inbound traffic goes, wrapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InboundTrafficPolicy {
    /// The mode.
    pub mode: InboundMode,
}

/// Where inbound traffic goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum InboundMode {
    /// To the address that it came for; the default.
    #[default]
    Passthrough,
    /// To localhost.
    Localhost,
}

/// How paths are normalised, wrapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PathNormalization {
    /// The normalisation.
    pub normalization: NormalizationType,
}

/// How paths are normalised, each with what the one before it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum NormalizationType {
    /// BASE.
    #[default]
    Default,
    /// Not at all.
    None,
    /// RFC 3986: dot segments, and backslashes.
    Base,
    /// And slashes in a row.
    MergeSlashes,
    /// And `%2F`, `%5C` are decoded.
    DecodeAndMergeSlashes,
}

/// Whether access logs are text or JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum AccessLogEncoding {
    /// Text; the default.
    #[default]
    Text,
    /// JSON.
    Json,
}

/// Settings of proxies, as far as they mean something here.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshProxyConfig {
    /// Worker threads; 0 is all cores.
    pub concurrency: Option<i32>,
    /// How long connections may drain; default 45 s.
    pub drain_duration: Option<Duration>,
    /// How long a terminated proxy goes on; default 5 s.
    pub termination_drain_duration: Option<Duration>,
    /// What stands before a gateway.
    pub gateway_topology: Option<GatewayTopology>,
    /// What proxies tell each other about themselves, by name.
    pub proxy_metadata: BTreeMap<String, String>,
    /// Headers that proxies add.
    pub proxy_headers: Option<Value>,
    /// How spans are made and where they go.
    pub tracing: Option<MeshTracing>,
    /// `host:port` of istiod. Judged alone, as what follows is.
    pub discovery_address: Option<String>,
    /// Port of the proxy's administration; default 15000.
    pub proxy_admin_port: Option<u32>,
    /// Port of the agent's health; default 15020.
    pub status_port: Option<u32>,
    /// `host:port` of a StatsD server.
    pub statsd_udp_address: String,
    /// Where Envoy sends metrics.
    pub envoy_metrics_service: Option<RemoteService>,
    /// Where Envoy sends access logs.
    pub envoy_access_log_service: Option<RemoteService>,
    /// Who signs for TLS handshakes.
    pub private_key_provider: Option<PrivateKeyProvider>,
}

/// A service outside of the proxy.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RemoteService {
    /// `host:port`; empty is none.
    pub address: String,
    /// TLS to it.
    pub tls_settings: Option<ClientTlsSettings>,
    /// Keep-alive of the connection.
    pub tcp_keepalive: Option<TcpKeepalive>,
}

/// Who signs for TLS handshakes: one of its members.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PrivateKeyProvider {
    /// Intel's AVX-512.
    pub cryptomb: Option<PolledKeys>,
    /// Intel's QuickAssist.
    pub qat: Option<PolledKeys>,
}

/// Signatures that are waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolledKeys {
    /// How long is waited between looks; required, and not 0.
    pub poll_delay: Option<Duration>,
    /// Whether software does it where the hardware is missing.
    pub fallback: Option<bool>,
}

/// Settings of some services.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSettings {
    /// The settings.
    pub settings: Option<Value>,
    /// The services, also by wildcard.
    pub hosts: Vec<String>,
}

/// What stands before a gateway.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayTopology {
    /// Proxies in front whose `X-Forwarded-For` entries are trusted; default 0.
    pub num_trusted_proxies: u32,
    /// What happens to `X-Forwarded-Client-Cert`.
    pub forward_client_cert_details: ForwardClientCertDetails,
    /// That the PROXY protocol is read.
    pub proxy_protocol: Option<Value>,
}

/// What happens to `X-Forwarded-Client-Cert` (PA-04).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ForwardClientCertDetails {
    /// SANITIZE_SET at a gateway, APPEND_FORWARD at a sidecar.
    #[default]
    Undefined,
    /// It is removed.
    Sanitize,
    /// It is passed on when the connection is mTLS.
    ForwardOnly,
    /// The client's certificate is appended.
    AppendForward,
    /// It is replaced by the client's certificate.
    SanitizeSet,
    /// It is passed on.
    AlwaysForwardOnly,
}

/// How spans are made and where they go.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshTracing {
    /// 0.0..=100.0; default 1.
    pub sampling: Option<f64>,
    /// The longest path in a span's tags, in bytes; default 256.
    pub max_path_tag_length: u32,
    /// A Zipkin collector.
    pub zipkin: Option<Value>,
    /// A Lightstep collector.
    pub lightstep: Option<Value>,
    /// A Datadog agent.
    pub datadog: Option<Value>,
    /// Stackdriver.
    pub stackdriver: Option<Value>,
    /// OpenCensus.
    pub open_census_agent: Option<Value>,
    /// Tags by name.
    pub custom_tags: BTreeMap<String, Value>,
    /// TLS to the collector.
    pub tls_settings: Option<ClientTlsSettings>,
    /// Whether Istio's own tags are set; default true.
    pub enable_istio_tags: Option<bool>,
}

/// A provider by name: one of its members. Settings are kept as they were written, for the crate that knows them.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "each is the kind of provider that its name says")]
pub struct ExtensionProvider {
    /// The name, unique among all.
    pub name: String,
    pub envoy_ext_authz_http: Option<Value>,
    pub envoy_ext_authz_grpc: Option<Value>,
    pub zipkin: Option<Value>,
    pub lightstep: Option<Value>,
    pub datadog: Option<Value>,
    pub stackdriver: Option<Value>,
    pub opencensus: Option<Value>,
    pub skywalking: Option<Value>,
    pub opentelemetry: Option<Value>,
    pub prometheus: Option<Value>,
    pub envoy_file_access_log: Option<Value>,
    pub envoy_http_als: Option<Value>,
    pub envoy_tcp_als: Option<Value>,
    pub envoy_otel_als: Option<Value>,
    pub sds: Option<Value>,
}

/// Which providers are used where a Telemetry names none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DefaultProviders {
    /// Of traces.
    pub tracing: Vec<String>,
    /// Of metrics.
    pub metrics: Vec<String>,
    /// Of access logs.
    pub access_logging: Vec<String>,
}

/// Limits of TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshTls {
    /// The lowest version; default TLS 1.2.
    pub min_protocol_version: super::gateway::TlsProtocol,
    /// Curves, in BoringSSL's names.
    pub ecdh_curves: Vec<String>,
    /// Cipher suites, in OpenSSL's names.
    pub cipher_suites: Vec<String>,
}

impl MeshConfig {
    /// The trust domain of the mesh's identities; default `cluster.local`.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        if self.trust_domain.is_empty() { DEFAULT_TRUST_DOMAIN } else { &self.trust_domain }
    }

    /// The namespace whose policies are for the mesh; default `istio-system`.
    #[must_use]
    pub fn root_namespace(&self) -> &str {
        if self.root_namespace.is_empty() { DEFAULT_ROOT_NAMESPACE } else { &self.root_namespace }
    }

    /// What happens to calls of unknown destinations; default ALLOW_ANY.
    #[must_use]
    pub fn outbound_mode(&self) -> OutboundMode {
        self.outbound_traffic_policy.map_or(OutboundMode::AllowAny, |policy| policy.mode)
    }

    /// Whether clients use mTLS where the destination takes it; default true.
    #[must_use]
    pub fn auto_mtls(&self) -> bool {
        self.enable_auto_mtls.unwrap_or(true)
    }

    /// How long a TCP connect may take; default 10 s.
    #[must_use]
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout.unwrap_or(Duration::from_secs(10))
    }

    /// How paths are normalised, never [`NormalizationType::Default`]; default BASE.
    #[must_use]
    pub fn normalization(&self) -> NormalizationType {
        match self.path_normalization.unwrap_or_default().normalization {
            NormalizationType::Default => NormalizationType::Base,
            other => other,
        }
    }

    /// Proxies in front of a gateway whose `X-Forwarded-For` entries are trusted; default 0.
    #[must_use]
    pub fn trusted_proxies(&self) -> u32 {
        let topology = self.default_config.as_ref().and_then(|config| config.gateway_topology.as_ref());
        topology.map_or(0, |topology| topology.num_trusted_proxies)
    }

    /// Whether locality decides on load balancing; default true.
    #[must_use]
    pub fn locality_lb(&self) -> bool {
        self.locality_lb_setting.as_ref().and_then(|setting| setting.enabled).unwrap_or(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::findings::{Findings, Validate};

    #[test]
    fn mc_01_defaults() {
        let mesh = MeshConfig::default();
        assert_eq!((mesh.trust_domain(), mesh.root_namespace()), ("cluster.local", "istio-system"));
        assert_eq!(mesh.outbound_mode(), OutboundMode::AllowAny);
        assert!(mesh.auto_mtls() && mesh.locality_lb());
        assert_eq!(mesh.connect_timeout(), Duration::from_secs(10));
        assert_eq!((mesh.normalization(), mesh.trusted_proxies()), (NormalizationType::Base, 0));
    }

    #[test]
    fn mc_01_reads_what_istiod_reads() {
        let mesh: MeshConfig = serde_json::from_str(
            r#"{"trustDomain":"td","trustDomainAliases":["old.td"],"outboundTrafficPolicy":{"mode":"REGISTRY_ONLY"},
                "pathNormalization":{"normalization":"DECODE_AND_MERGE_SLASHES"},"meshMTLS":{"ecdhCurves":["P-256"]},
                "defaultConfig":{"gatewayTopology":{"numTrustedProxies":2}},"connectTimeout":"2h"}"#,
        )
        .unwrap();
        assert_eq!(mesh.outbound_mode(), OutboundMode::RegistryOnly);
        assert_eq!(
            (mesh.normalization(), mesh.trusted_proxies()),
            (NormalizationType::DecodeAndMergeSlashes, 2)
        );
        let mut out = Findings::default();
        mesh.validate(&mut out);
        let paths: Vec<_> = out.iter().map(|finding| finding.path.as_str()).collect();
        assert_eq!(paths, ["connectTimeout", "meshMTLS.ecdhCurves"]);
    }
}
